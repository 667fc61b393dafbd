# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that comes back with its old disk, and what its metadata costs.

A process that dies takes with it what exactly it had changed.  The log in its
metadata stays, also when its host loses power: each bit is on stable storage
before the first write that it is for.
"""

import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional, Tuple

import nodes
from figures import IOPS, PER_BYTE, SECONDS, Cell, Row, Setting, Values
from host import HostError, Json, replicate
from hosts import (GIB, MIB, NULL, OURS, UNPROTECTED, Remote, TimedHost,
                   disk_node, fill)
from load import Arrival, Run, load, scattered
from primary import KINDS, refusal

SIZE = 100 * GIB
SYNC = 'sync0'
# Or a disk that has nothing would be written all over
THIN = {'discard': 'unmap'}
TIME, COPIED = 'until it is protected', 'copied per changed byte'
COLD, WARM = 'cold', 'warm'


class HostDisk(NamedTuple):
    """A host with a disk and its metadata."""
    host: TimedHost
    disk: Path


def completed(host: TimedHost, since: float) -> bool:
    """Whether a copy has ended well."""
    host.pump()
    ended = host.seen('BLOCK_JOB_COMPLETED', since)
    if ended and 'error' in ended[0]['data']:
        raise HostError(ended[0]['data']['error'])
    return bool(ended)


def copy(host: TimedHost, options: Json) -> None:
    """Bring a replica in step."""
    since = time.time()
    host.cmd('x-block-replica-sync', {'job-id': SYNC, 'node-name': 'top',
                                      **options})
    host.wait_until(lambda: completed(host, since), 'the copy')


class Pair:
    """Two hosts, one of them protected by the other."""

    def __init__(self, setting: Setting, stack: ExitStack) -> None:
        self.setting = setting
        self.stack = stack
        self.near = self._start('near', False)
        self.far = self._start('far', True)
        self.protect()

    def _start(self, name: str, standby: bool) -> HostDisk:
        disk = self.setting.place.memory / name
        meta = disk.with_suffix('.meta')
        for path, size in ((disk, SIZE), (meta, MIB)):
            if not path.exists():
                nodes.sparse(path, size)
                self.stack.callback(path.unlink)
        host = self.stack.enter_context(
            TimedHost(self.setting.place, OURS, far=standby))
        host.add(disk_node('disk', disk),
                 nodes.file(meta, **{'node-name': 'meta'}))
        host.serve()
        if standby:
            host.add(nodes.standby('top', 'replica', 'disk',
                                   metadata='meta', **THIN))
            host.export('replica')
            host.export('meta')
        else:
            host.add(nodes.holder('top', 'disk', metadata='meta', **THIN))
        host.export('top')
        return HostDisk(host, disk)

    def protect(self) -> None:
        """Bring the far disk in step, and begin to replicate."""
        near, far = self.near.host, self.far.host
        near.add(nodes.link('link', far.socket, 'replica', **THIN),
                 nodes.link('link-meta', far.socket, 'meta'))
        copy(near, {'replica': 'link', 'replica-metadata': 'link-meta'})
        far.begin('secondary')
        near.begin('primary')

    def write(self, options: Json) -> None:
        """What the guest of the near host changes."""
        load(self.setting.place, self.near.host, 'top', Run('changed', {
            'bs': 65536, 'iodepth': 16, 'size': SIZE, **options}))

    def lose(self, primary: bool) -> None:
        """Kill a host, have the other one go on, and the dead one come back.

        The far host is the one that came back then.
        """
        dead, alive = ((self.near, self.far) if primary else
                       (self.far, self.near))
        dead.host.kill()
        mode = 'secondary' if primary else 'primary'
        replicate(alive.host, False, mode, failover=True)
        alive.host.wait_until(lambda: alone(alive.host), 'the failover')
        if not primary:
            alive.host.delete('link', 'link-meta')
        self.near = alive
        self.far = self._start(dead.disk.name, True)

    @property
    def copied(self) -> int:
        """How much was copied from the near host."""
        return int(self.near.host.statistics()[0]['copied-bytes'])


@contextmanager
def open_pair(setting: Setting) -> Iterator[Pair]:
    """A pair with disks of its own."""
    with ExitStack() as stack:
        yield Pair(setting, stack)


def alone(host: TimedHost) -> bool:
    """Whether a host is a primary without a replica."""
    told = host.statistics()[0]
    return told['mode'] == 'primary' and told['stage'] == 'none' \
        and told['replica-state'] in ('none', 'lost')


def fail_back(setting: Setting, changed: int, rw: str, primary: bool,
              rows: List[Row], _subject: str) -> Values:
    """Lose a host, and measure until its disk is of use again."""
    options = {'rw': rw, 'io_size': changed}
    with open_pair(setting) as pair:
        if primary:
            pair.write(options)
        pair.lose(primary)
        if not primary:
            pair.write(options)
        before, begin = pair.copied, time.perf_counter()
        pair.protect()
        took = time.perf_counter() - begin
        copied = (pair.copied - before) / changed
    return {rows[0].name: took, rows[1].name: copied}


def cells(setting: Setting) -> List[Cell]:
    """A host that comes back, with something changed of a large disk."""
    changed = 64 * MIB if setting.quick else GIB
    result = []
    for who, primary in (('secondary', False), ('primary', True)):
        title = (f'{changed // MIB} MiB changed of {SIZE // GIB} GiB, the '
                 f'{who} died')
        for line, rw in (('64 KiB at random', 'randwrite'),
                         ('in a row', 'write')):
            rows = [Row('failback', title, line, SECONDS, TIME, charted=False),
                    Row('failback', title, line, PER_BYTE, COPIED,
                        charted=False)]
            result.append(Cell(f'the {who} died, {line}', partial(
                fail_back, setting, changed, rw, primary, rows), tuple(rows),
                (OURS,)))
    return result


@contextmanager
def open_logged(setting: Setting, image: Path, aio: Optional[str],
                subject: str) -> Iterator[TimedHost]:
    """A primary with metadata that has nothing in it; unprotected, without."""
    meta = image.with_suffix('.meta')
    nodes.sparse(meta, MIB)
    with ExitStack() as stack:
        stack.callback(meta.unlink)
        host = stack.enter_context(TimedHost(setting.place, subject))
        more: Json = {}
        if subject == OURS:
            host.add(disk_node('meta', meta, aio))
            more['metadata'] = 'meta'
        host.add(disk_node('local', image, aio),
                 nodes.holder('top', 'local', **more),
                 Remote(NULL, 0).null())
        host.serve()
        host.export('top', iothread='iothread0')
        copy(host, {'replica': 'remote', 'sync': 'full'})
        host.begin('primary')
        host.wait_until(lambda: not host.statistics()[0].get('log-regions'),
                        'an empty log')
        yield host


def measure_log(setting: Setting, image: Path, aio: Optional[str],
                arrival: Arrival, rows: List[Row], subject: str) -> Values:
    """First writes to parts of the disk, and the same again."""
    with open_logged(setting, image, aio, subject) as host:
        speeds = load(setting.place, host, 'top', arrival.job(COLD),
                      arrival.job(WARM))
    return {row.name: speeds[row.mark] for row in rows}


def log_cells(setting: Setting) -> List[Cell]:
    """Writes with metadata; unprotected, of the same node without."""
    place = setting.place
    kinds: List[Tuple[Path, Optional[str], str]] = [
        (place.memory, None, 'memory')]
    for aio in KINDS:
        image = fill(place.disk / 'image', GIB, sync=True)
        if not refusal(place, image, aio):
            kinds.append((place.disk, aio, f'disk, aio={aio}'))
    result = []
    for folder, kind, where in kinds:
        image = fill(folder / 'image', GIB, sync=True)
        for depth in 1, 16:
            arrival = scattered(place.memory, GIB, MIB, GIB // MIB, depth)
            rows = [Row('metadata', arrival.title, where, IOPS, mark)
                    for mark in (COLD, WARM)]
            result.append(Cell(f'{arrival.title}, {where}', partial(
                measure_log, setting, image, kind, arrival, rows), tuple(rows),
                (UNPROTECTED, OURS)))
    return result
