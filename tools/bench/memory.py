# SPDX-License-Identifier: GPL-2.0-or-later
"""Memory that a host takes while much is written."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Dict, List, Optional

from figures import MIB, MIB_UNIT, Cell, Row, Setting, Values, row
from fio import Job, load
from nodes import GIB, Layout, Remote, disk_node, open_primary, open_remote
from nodes import open_secondary
from server import Export, Server
from subject import OURS, STOCK, UNPROTECTED, WRITE_BEHIND, Subject

GROUP = 'memory'
# Slower than the guest, so that the queue is full
REMOTE = Remote('NBD', 5)
TITLE = 'growth while the guest writes, depth 16'
LARGE = Job('large', {'rw': 'write', 'bs': 65536, 'iodepth': 16, 'size': GIB,
                      'io_size': 512 * MIB, 'runtime': '1500ms'})
SMALL = Job('small', {'rw': 'randwrite', 'bs': 4096, 'iodepth': 16,
                      'size': GIB, 'io_size': 512 * MIB, 'runtime': '1500ms'})
SMALL_BOUND = 16 * MIB


class Growth:
    """How much more memory of its own a server has than at first."""

    def __init__(self, server: Server) -> None:
        self._status = Path(f'/proc/{server.pid}/status')
        self._first = self._most = self._now()

    def _now(self) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith('RssAnon:'):
                return int(line.split()[1])
        return 0

    def look(self) -> None:
        """Look again."""
        self._most = max(self._most, self._now())

    @property
    def mib(self) -> float:
        """The most that was seen."""
        return (self._most - self._first) / 1024


def watch(setting: Setting, server: Server, export: Export, job: Job
          ) -> float:
    """Write; return the growth in MiB."""
    growth = Growth(server)
    load(setting.place, export, [job], growth.look)
    growth.look()
    return growth.mib


def measure_primary(setting: Setting, image: Path, job: Job, bound: int,
                    name: str, subject: Subject) -> Values:
    """On a primary."""
    with ExitStack() as stack:
        remote = None
        if subject.protected:
            remote = stack.enter_context(open_remote(setting.place, subject,
                                                     REMOTE))
        host = stack.enter_context(open_primary(
            setting.place, subject, disk_node('local', image), remote,
            bound or None))
        growth = watch(setting, host.server, host.guest, job)
    return {name: growth}


def measure_secondary(setting: Setting, image: Path, arrives: bool,
                      name: str, subject: Subject) -> Values:
    """On a secondary."""
    layout = Layout(setting.place.memory, GIB, disk=image)
    with open_secondary(setting.place, subject, layout) as host:
        export = (host.disks if arrives else host.guests)[0]
        return {name: watch(setting, host.server, export, LARGE)}


def memory_row(line: str, others: Optional[Dict[str, str]] = None) -> Row:
    """A row of the group."""
    return row(GROUP, TITLE, line, MIB_UNIT, charted=False, others=others)


def cells(setting: Setting, image: Path) -> List[Cell]:
    """All cells of the group."""
    result = []
    for line, job in (f'primary, 64 KiB, {REMOTE}', LARGE), \
            (f'primary, 4 KiB, {REMOTE}', SMALL):
        each = memory_row(line)
        result.append(Cell(line, partial(
            measure_primary, setting, image, job, 0, each.figures[OURS]),
            (each,)))
        if WRITE_BEHIND in setting.subjects[OURS].options:
            bounded = memory_row(
                f'{line}, {WRITE_BEHIND}={SMALL_BOUND // MIB} MiB',
                {name: each.figures[name] for name in (UNPROTECTED, STOCK)})
            result.append(Cell(bounded.line, partial(
                measure_primary, setting, image, job, SMALL_BOUND,
                bounded.figures[OURS]), (bounded,), (OURS,)))
    for line, arrives in ('secondary, arriving, 64 KiB', True), \
            ('secondary, its guest, 64 KiB', False):
        each = memory_row(line)
        result.append(Cell(line, partial(
            measure_secondary, setting, image, arrives, each.figures[OURS]),
            (each,)))
    return result
