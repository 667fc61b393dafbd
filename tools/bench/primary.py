# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes on a primary, with a way to the secondary that takes its time."""

import os
import socket
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import nodes
from figures import BURST, BYTES, IOPS, MS, STEADY, Cell, Row, Setting, Values
from host import HostError
from hosts import (GIB, MIB, OURS, STOCK, SUBJECTS, UNPROTECTED, Place,
                   NBD, NULL, TCP, Remote, TimedHost, disk_node, fill,
                   open_primary, open_remote_primary, serving)
from load import Run, load

KINDS = 'native', 'io_uring'
LATENCIES = (0.0, 0.2, 1.0, 5.0)
FAR_MS = 20.0
# A burst ends after this time, if need be
BURST_MS = 400
ZEROES = 256 * MIB
# Zeroes that are written one by one
SMALL_ZEROES = 600


class Task(NamedTuple):
    """What the guest does."""
    title: str
    options: Dict[str, Any]
    # what a queue of 64 MiB has room for
    burst: int

    def jobs(self, setting: Setting) -> List[Run]:
        """A burst, a load that fills any queue, and one that goes on."""
        options = {'size': GIB, **self.options}
        return [
            Run(BURST, {**options, 'io_size': self.burst,
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
                32 * MIB)


DEPTH_1, DEPTH_16 = random_work(1), random_work(16)
FSYNC = random_work(1, ', fsync after each', fsync=1)
SEQUENTIAL = Task('64 KiB sequential, depth 4',
                  {'rw': 'write', 'bs': 65536, 'iodepth': 4}, 48 * MIB)


def measure(setting: Setting, image: Path, aio: Optional[str], work: Task,
            remote: Remote, names: Dict[str, str], subject: str,
            quorum: bool = False) -> Values:
    """Do the work on a new host."""
    jobs = [job for job in work.jobs(setting) if BURST in names or
            job.name == STEADY]
    local = disk_node('local', image, aio)
    with open_remote_primary(setting.place, subject, local, remote,
                             quorum) as (host, guest):
        speeds = load(setting.place, host, guest, *jobs)
    return {name: speeds[job] for job, name in names.items()}


def cells(setting: Setting) -> List[Cell]:
    """Writes of the primary guest, by the latency of the secondary."""
    image = fill(setting.place.memory / 'image', GIB)
    one_ms = [Remote(kind, 1) for kind in (NULL, NBD, TCP)]
    ways = [Remote(kind, ms) for kind in (NULL, NBD) for ms in LATENCIES]
    ways.append(one_ms[-1])
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


def quorum_cells(setting: Setting) -> List[Cell]:
    """Writes of a primary guest under quorum, as with QEMU's own driver."""
    image = fill(setting.place.memory / 'image', GIB)
    remote = Remote(NBD, 1)
    result = []
    for work in [DEPTH_1] if setting.quick else [DEPTH_1, DEPTH_16,
                                                 SEQUENTIAL]:
        rows = {kind: Row('quorum', work.title, str(remote), IOPS, kind)
                for kind in (BURST, STEADY)}
        result.append(Cell(f'{work.title}, {remote}', partial(
            measure, setting, image, None, work, remote,
            {kind: row.name for kind, row in rows.items()}, quorum=True),
            tuple(rows.values())))
    return result


# What the guest does before a checkpoint
Before = Callable[[Setting, TimedHost, str], None]


def burst(setting: Setting, host: TimedHost, guest: str) -> None:
    """As much as a queue has room for, at most."""
    load(setting.place, host, guest, DEPTH_16.jobs(setting)[0])


def small_zeroes(_: Setting, host: TimedHost, guest: str) -> None:
    """Zeroes one by one, that are not side by side."""
    host.do(guest, *(f'aio_write -z {8192 * number} 4096'
                     for number in range(SMALL_ZEROES)), 'aio_flush')


def drain(setting: Setting, row: Row, remote: Remote,
          work: Before, subject: str) -> Values:
    """A checkpoint right after a burst, which has to arrive for it."""
    local = disk_node('local', setting.place.memory / 'image')
    with open_remote_primary(setting.place, subject, local, remote) as (
            host, guest):
        work(setting, host, guest)
        return {row.name: host.checkpoint()}


def drain_cells(setting: Setting) -> List[Cell]:
    """A checkpoint on the primary right after a burst."""
    fill(setting.place.memory / 'image', GIB)
    plan: List[Tuple[str, Before, float]] = [
        ('32 MiB', burst, ms) for ms in (*LATENCIES, FAR_MS)]
    plan.append((f'{SMALL_ZEROES} small zeroes', small_zeroes, FAR_MS))
    result = []
    for what, work, ms in plan[-1:] if setting.quick else plan:
        remote = Remote(NBD, ms)
        row = Row('drain', f'checkpoint on the primary after {what}',
                  str(remote), MS, charted=False)
        result.append(Cell(f'{row.title}, {remote}',
                           partial(drain, setting, row, remote, work), (row,),
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
    remote = Remote(NBD, 1)
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
