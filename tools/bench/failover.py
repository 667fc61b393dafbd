# SPDX-License-Identifier: GPL-2.0-or-later
"""A failover: until the guest goes on, and until the merge is done."""

import os
import time
from functools import partial
from pathlib import Path
from typing import Dict, List

from figures import MB_PER_S, MIB, MS, Cell, Row, Setting, Values, row
from nodes import GIB, Layout, open_secondary
from server import Server
from subject import OURS, Subject

GROUP = 'failover'
SIZE = 256 * MIB
STOPPED, MERGED, RATE = 'stop returns', 'merge done', 'speed of the merge'


def rows_of(where: str) -> Dict[str, Row]:
    """All rows of a place."""
    title = f'256 MiB dirty, {where}'
    return {STOPPED: row(GROUP, title, STOPPED, MS, charted=False),
            MERGED: row(GROUP, title, MERGED, MS),
            RATE: row(GROUP, title, RATE, MB_PER_S, charted=False)}


def is_merged(server: Server) -> bool:
    """Whether the replication node stands on the disk itself."""
    graph = server.monitor.cmd('x-debug-query-block-graph')
    names = {node['id']: node['name'] for node in graph['nodes']}
    return any(names[edge['parent']] == 'replication0'
               and edge['name'] == 'file'
               and names[edge['child']] == 'disk0'
               for edge in graph['edges'])


def copy(source: Path, target: Path, sync: bool) -> float:
    """Copy as much as is merged; return how many ms that took."""
    with open(source, 'rb', buffering=0) as reader, \
            open(target, 'r+b', buffering=0) as writer:
        begin = time.perf_counter()
        for _ in range(SIZE // MIB):
            writer.write(reader.read(MIB))
        if sync:
            os.fdatasync(writer.fileno())
        return 1000 * (time.perf_counter() - begin)


def measure(where: str, image: Path, setting: Setting, folder: Path,
            subject: Subject) -> Values:
    """Lose the primary, and wait for the end of the merge."""
    own = {name: each.figures[OURS] for name, each in rows_of(where).items()}
    if not subject.protected:
        source = folder / 'copied'
        source.write_bytes(bytes(SIZE))
        try:
            merged = copy(source, image, where == 'disk')
        finally:
            source.unlink()
        return {own[MERGED]: merged, own[RATE]: SIZE / merged / 1000}
    layout = Layout(folder, GIB, disk=image)
    with open_secondary(setting.place, subject, layout) as host:
        server = host.server
        server.qemu_io(host.guests[0].name, f'write 0 {SIZE}')
        server.cmd('block-export-del', {'id': 'export-disk0', 'mode': 'hard'})
        begin = time.perf_counter()
        stopped = server.monitor.timed('xen-set-replication', {
            'enable': False, 'primary': False, 'failover': True})
        server.wait_until(lambda: is_merged(server), 'the end of the merge')
        merged = 1000 * (time.perf_counter() - begin)
    return {own[STOPPED]: stopped, own[MERGED]: merged,
            own[RATE]: SIZE / merged / 1000}


def cells(setting: Setting, memory: Path, disk: Path) -> List[Cell]:
    """All cells of the group."""
    places = {'tmpfs': (memory, setting.place.memory),
              'disk': (disk, setting.place.disk)}
    return [Cell(f'256 MiB dirty, {where}',
                 partial(measure, where, image, setting, folder),
                 tuple(rows_of(where).values()))
            for where, (image, folder) in places.items()]
