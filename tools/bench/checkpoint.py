# SPDX-License-Identifier: GPL-2.0-or-later
"""Checkpoints on a secondary: how long they take."""

import statistics
from functools import partial
from pathlib import Path
from typing import Dict, List

from figures import MIB, MS, Cell, Row, Setting, Values, row
from nodes import GIB, Layout, open_secondary
from server import Server, launch_qemu
from subject import OURS, STOCK, UNPROTECTED, Subject

GROUP = 'checkpoint'
LIMIT = f'{GROUP}: no disk'
SIZES = {GIB: '1 GiB', 1024 * GIB: '1 TiB'}
COUNTS = (1, 8, 32)
DIRTY = 50 * 65536
MORE_DIRTY = 64 * MIB
# Where the guest of the secondary writes
GUEST = 512 * MIB
IDLE, WRITTEN = 'idle', 'dirty'


def disks(count: int) -> str:
    """How many."""
    return '1 disk' if count == 1 else f'{count} disks'


def rows_of(where: str, size: int, count: int) -> Dict[str, Row]:
    """The rows of a layout."""
    return {name: row(GROUP, f'{where}, {name}',
                      f'{SIZES[size]}, {disks(count)}', MS,
                      others={UNPROTECTED: LIMIT})
            for name in (IDLE, WRITTEN)}


def dirty_row(where: str, size: int) -> Row:
    """The row of a disk that much was written to."""
    return row(GROUP, f'{where}, 64 MiB dirty', f'{SIZES[size]}, 1 disk', MS,
               others={UNPROTECTED: LIMIT})


def dirty_checkpoints(server: Server, size: int, count: int) -> List[float]:
    """Write on both sides of all disks, do a checkpoint, some times."""
    took = []
    # not the same blocks on both sides: each overlay is to have some
    writes = [(node, f'write {0 if name.startswith("disk") else GUEST} {size}')
              for name, node in server.exported().items()]
    # the first time touches new memory: throw it away
    for _ in range(1 + count):
        for node, command in writes:
            server.qemu_io(node, command)
        took.append(server.checkpoint())
    return took[1:]


def measure(setting: Setting, where: str, layout: Layout, subject: Subject
            ) -> Values:
    """Checkpoints of disks that nobody used, and that were written to."""
    rows = rows_of(where, layout.size, layout.disks)
    count = setting.pace.checkpoints
    with open_secondary(setting.place, subject, layout) as host:
        host.server.checkpoint()
        took = {rows[IDLE].figures[OURS]: [host.server.checkpoint()
                                           for _ in range(2 * count)],
                rows[WRITTEN].figures[OURS]: dirty_checkpoints(
                    host.server, DIRTY, count)}
        if layout.disks == 1:
            more = dirty_row(where, layout.size)
            took[more.figures[OURS]] = dirty_checkpoints(
                host.server, MORE_DIRTY, count)
    return {name: statistics.median(times) for name, times in took.items()}


def measure_limit(setting: Setting, subject: Subject) -> Values:
    """A checkpoint of a VM that has no disk."""
    with launch_qemu(setting.place, subject) as server:
        server.checkpoint()
        return {LIMIT: statistics.median(
            server.checkpoint() for _ in range(2 * setting.pace.checkpoints))}


def cells(setting: Setting) -> List[Cell]:
    """All cells of the group."""
    places: Dict[str, Path] = {'tmpfs': setting.place.memory,
                               'disk': setting.place.disk}
    result = [Cell('no disk', partial(measure_limit, setting),
                   subjects=(UNPROTECTED,))]
    for where, folder in places.items():
        for count in (1, 8) if setting.pace.quick else COUNTS:
            for size in SIZES:
                rows = list(rows_of(where, size, count).values())
                if count == 1:
                    rows.append(dirty_row(where, size))
                result.append(Cell(
                    f'{where}, {SIZES[size]}, {disks(count)}',
                    partial(measure, setting, where,
                            Layout(folder, size, count)),
                    tuple(rows), (STOCK, OURS)))
    return result
