# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes on a primary, with a way to the secondary that takes its time."""

import os
import socket
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import nodes
from figures import BYTES, IOPS, MS, Cell, Row, Setting, Values
from host import HostError
from hosts import (GIB, MIB, OURS, STOCK, SUBJECTS, UNPROTECTED, Place,
                   Remote, TimedHost, disk_node, fill, open_primary,
                   open_remote_primary, serving)
from load import Run, load

BURST, STEADY = 'burst', 'steady'
KINDS = 'native', 'io_uring'
LATENCIES = (0.0, 0.2, 1.0, 5.0)
# A burst ends after this time, if need be
BURST_MS = 400
# It is measured this much later, if it lasts much longer: a new QEMU first
# takes memory for requests and their stacks, which one that has been running
# for long has
WARM_MS = 50
ZEROES = 256 * MIB


class Task(NamedTuple):
    """What the guest does."""
    title: str
    options: Dict[str, Any]
    # what a queue of 64 MiB has room for
    burst: int
    warm_ms: int

    def jobs(self, setting: Setting) -> List[Run]:
        """A burst, a load that fills any queue, and one that goes on."""
        options = {'size': GIB, **self.options}
        return [
            Run(BURST, {**options, 'io_size': self.burst,
                        'ramp_time': f'{self.warm_ms}ms',
                        'runtime': f'{BURST_MS}ms'}),
            Run('fill', {'size': GIB, 'rw': 'write', 'bs': 65536,
                         'iodepth': 16, 'io_size': 128 * MIB,
                         'runtime': '150ms'}),
            Run(STEADY, {**options, 'time_based': 1,
                         'ramp_time': f'{int(1000 * setting.ramp)}ms',
                         'runtime': f'{int(1000 * setting.steady)}ms'})]


def random_work(depth: int, more: str = '', **options: Any) -> Task:
    """Small writes all over the disk."""
    return Task(f'4 KiB random, depth {depth}{more}',
                {'rw': 'randwrite', 'bs': 4096, 'iodepth': depth, **options},
                32 * MIB, WARM_MS)


DEPTH_1, DEPTH_16 = random_work(1), random_work(16)
FSYNC = random_work(1, ', fsync after each', fsync=1)
SEQUENTIAL = Task('64 KiB sequential, depth 4',
                  {'rw': 'write', 'bs': 65536, 'iodepth': 4}, 48 * MIB, 0)


def measure(setting: Setting, image: Path, aio: Optional[str], work: Task,
            remote: Remote, names: Dict[str, str], subject: str) -> Values:
    """Do the work on a new host."""
    jobs = [job for job in work.jobs(setting) if BURST in names or
            job.name == STEADY]
    local = disk_node('local', image, aio)
    with open_remote_primary(setting.place, subject, local, remote) as (
            host, guest):
        speeds = load(setting.place, host, guest, *jobs)
    return {name: speeds[job] for job, name in names.items()}


def cells(setting: Setting) -> List[Cell]:
    """Writes of the primary guest, by the latency of the secondary."""
    image = fill(setting.place.memory / 'image', GIB)
    one_ms = [Remote('null-co', 1), Remote('NBD', 1)]
    ways = [Remote(kind, ms) for kind in ('null-co', 'NBD')
            for ms in LATENCIES]
    plan = {DEPTH_1.title: (DEPTH_1, one_ms), FSYNC.title: (FSYNC, one_ms)}
    if not setting.quick:
        plan = {work.title: (work, ways)
                for work in (DEPTH_1, DEPTH_16, SEQUENTIAL, FSYNC)}
    result = []
    for work, remotes in plan.values():
        limits = {kind: f'primary: {work.title}, unprotected, {kind}'
                  for kind in (BURST, STEADY)}
        if not setting.quick:
            result.append(Cell(
                f'{work.title}, unprotected',
                partial(measure, setting, image, None, work, ways[0], limits),
                subjects=(UNPROTECTED,)))
        for remote in remotes:
            # a shared machine may be a third slower ten seconds later: what
            # the goal is about is compared with what is measured beside it
            beside = remote.ms == 1
            rows = {kind: Row('primary', work.title, str(remote), IOPS, kind,
                              '' if beside else limit)
                    for kind, limit in limits.items()}
            result.append(Cell(
                f'{work.title}, {remote}',
                partial(measure, setting, image, None, work, remote,
                        {kind: row.name for kind, row in rows.items()}),
                tuple(rows.values()), SUBJECTS if beside else (STOCK, OURS)))
    return result


def drain(setting: Setting, row: Row, remote: Remote, subject: str) -> Values:
    """A checkpoint right after a burst, which has to arrive for it."""
    local = disk_node('local', setting.place.memory / 'image')
    with open_remote_primary(setting.place, subject, local, remote) as (
            host, guest):
        load(setting.place, host, guest, DEPTH_16.jobs(setting)[0])
        return {row.name: host.checkpoint()}


def drain_cells(setting: Setting) -> List[Cell]:
    """A checkpoint on the primary right after a burst."""
    fill(setting.place.memory / 'image', GIB)
    result = []
    for ms in (1.0,) if setting.quick else LATENCIES:
        remote = Remote('NBD', ms)
        row = Row('drain', 'checkpoint on the primary after 32 MiB',
                  str(remote), MS, charted=False)
        result.append(Cell(f'{row.title}, {remote}',
                           partial(drain, setting, row, remote), (row,),
                           (STOCK, OURS)))
    return result


def refusal(place: Place, image: Path, aio: str) -> Optional[str]:
    """Why a kind of I/O does not work here."""
    try:
        os.close(os.open(image, os.O_RDONLY | os.O_DIRECT))
        with TimedHost(place, UNPROTECTED) as host:
            host.add(disk_node('disk', image, aio))
    except (OSError, HostError) as exc:
        return str(exc)
    return None


def direct_cells(setting: Setting, aio: str) -> List[Cell]:
    """On a disk without the page cache, as operators run it."""
    image = fill(setting.place.disk / 'image', GIB, sync=True)
    remote = Remote('NBD', 1)
    row = Row('direct', f'aio={aio}', f'primary, {DEPTH_1.title}, {remote}',
              IOPS)
    return [Cell(f'aio={aio}, {DEPTH_1.title}',
                 partial(measure, setting, image, aio, DEPTH_1, remote,
                         {STEADY: row.name}), (row,))]


class Meter:
    """Passes on all bytes of one connection, both ways, and counts them."""

    def __init__(self, path: Path, target: Path) -> None:
        self.bytes = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._target = socket.socket(socket.AF_UNIX)
        self._target.connect(str(target))
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        client = self._listener.accept()[0]
        back = threading.Thread(target=self._pass_on, daemon=True,
                                args=(self._target, client))
        back.start()
        self._pass_on(client, self._target)
        back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while True:
                data = source.recv(MIB)
                if not data:
                    break
                self.bytes += len(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            # one of them was killed
            pass


def zeroes(setting: Setting, row: Row, subject: str) -> Values:
    """Write zeroes, which need not cross the link as data."""
    place = setting.place
    images = [place.memory / 'zeroes-local', place.memory / 'zeroes']
    path = place.memory / 'meter'
    with ExitStack() as stack:
        for image in images:
            stack.callback(fill(image, ZEROES).unlink)
        far = stack.enter_context(serving(
            place, subject, disk_node('remote', images[1])))
        meter = Meter(path, far.socket)
        stack.callback(path.unlink)
        host, guest = stack.enter_context(open_primary(
            place, subject, disk_node('local', images[0]),
            nodes.link('link', path, 'remote', discard='unmap')))
        before = meter.bytes
        # one request: a client would cut it into pieces
        said = host.qemu_io(guest, f'write -z 0 {ZEROES}')
        if said.strip() and 'ops' not in said:
            raise HostError(said)
        host.checkpoint()
        sent = meter.bytes - before
    return {row.name: sent}


def zeroes_cells(setting: Setting) -> List[Cell]:
    """Zeroes of the primary guest."""
    row = Row('zeroes', f'{ZEROES // MIB} MiB of zeroes', 'bytes on the link',
              BYTES, charted=False)
    return [Cell(f'{row.title}, bytes', partial(zeroes, setting, row), (row,),
                 (STOCK, OURS))]
