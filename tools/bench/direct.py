# SPDX-License-Identifier: GPL-2.0-or-later
"""Some of it on a disk without the page cache, as operators run it."""

import os
from functools import partial
from pathlib import Path
from typing import List, Optional

from figures import IOPS, Cell, Row, Setting, Values, row
from fio import Blocks, load
from monitor import BenchError
from nodes import GIB, Layout, Remote, disk_node, open_primary, open_remote
from nodes import open_secondary
from primary import DEPTH_1, DEPTH_16, STEADY, Work, speeds
from server import launch_qemu
from subject import OURS, UNPROTECTED, Subject

GROUP = 'direct'
KINDS = 'native', 'io_uring'
REMOTE = Remote('NBD', 1)


def primary_row(aio: str, work: Work) -> Row:
    """The row of the primary."""
    return row(GROUP, f'aio={aio}', f'primary, {work.title}, {REMOTE}', IOPS)


def secondary_row(aio: str) -> Row:
    """The row of the secondary."""
    return row(GROUP, f'aio={aio}',
               'secondary, 4 KiB random, depth 1, fresh', IOPS)


def measure_primary(setting: Setting, image: Path, aio: str, work: Work,
                    subject: Subject) -> Values:
    """A steady load on a primary."""
    place = setting.place
    names = {STEADY: primary_row(aio, work).figures[OURS]}
    local = disk_node('local', image, aio)
    jobs = work.jobs(setting)[2:]
    if not subject.protected:
        with open_primary(place, subject, local, None) as host:
            return speeds(names, load(place, host.guest, jobs))
    with open_remote(place, subject, REMOTE) as remote, \
            open_primary(place, subject, local, remote) as host:
        return speeds(names, load(place, host.guest, jobs))


def measure_secondary(setting: Setting, image: Path, aio: str, blocks: Blocks,
                      subject: Subject) -> Values:
    """Writes that arrive just after a checkpoint."""
    layout = Layout(setting.place.disk, GIB, aio=aio, disk=image)
    with open_secondary(setting.place, subject, layout) as host:
        result = load(setting.place, host.disks[0],
                      [blocks.write('fresh', 1)])
    return speeds({'fresh': secondary_row(aio).figures[OURS]}, result)


def refusal(setting: Setting, image: Path, aio: str) -> Optional[str]:
    """Why this kind of I/O does not work here."""
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
        with launch_qemu(setting.place, setting.subjects[UNPROTECTED]) as qemu:
            qemu.add(disk_node('disk', image, aio))
    except (OSError, BenchError) as exc:
        return str(exc)
    return None


def cells(setting: Setting, image: Path) -> List[Cell]:
    """All cells of the group, but for what does not work here."""
    result = []
    count = setting.pace.blocks // 8
    blocks = Blocks(setting.place.memory, GIB, 65536, 4096, count)
    for aio in KINDS:
        why = refusal(setting, image, aio)
        if why:
            setting.note(f'{GROUP}: no rows with aio={aio}: {why}')
            continue
        for work in (DEPTH_1, DEPTH_16):
            result.append(Cell(
                f'aio={aio}, {work.title}',
                partial(measure_primary, setting, image, aio, work),
                (primary_row(aio, work),)))
        result.append(Cell(
            f'aio={aio}, secondary',
            partial(measure_secondary, setting, image, aio, blocks),
            (secondary_row(aio),)))
    return result
