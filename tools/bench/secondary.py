# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes that arrive at a secondary, its checkpoints, and a failover."""

import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Dict, List

from figures import IOPS, MS, PER_BYTE, Cell, Row, Setting, Values
from hosts import (GIB, MIB, OURS, STOCK, SUBJECTS, UNPROTECTED, Replicas,
                   TimedHost, fill, open_secondary)
from host import replicate
from load import Arrival, in_a_row, load, scattered
from nodes import OWN_OVERLAYS, RECOMMENDED_ACTIVE

CLUSTER = 65536
FRESH, AGAIN, IN_STEP = 'fresh', 'again', 'fresh, in step'
MOVED = 'moved per byte'
OVERLAYS = {'': 'default overlays', RECOMMENDED_ACTIVE: 'recommended overlays',
            OWN_OVERLAYS: 'own overlays'}
# What has them
COMPARED = {'': SUBJECTS, RECOMMENDED_ACTIVE: (STOCK, OURS),
            OWN_OVERLAYS: (OURS,)}

SIZES = {GIB: '1 GiB', 1024 * GIB: '1 TiB'}
IDLE, DIRTY, MORE_DIRTY = 'idle', 'dirty', '64 MiB dirty'
NO_DISK = 'checkpoint: no disk'
# Where the guest of the secondary writes
GUEST = 512 * MIB

MERGED = 256 * MIB


# Writes that arrive

def arrival_rows(arrival: Arrival, overlays: str) -> Dict[str, Row]:
    """The rows of what arrives, by their marks."""
    def new(mark: str, moved: bool = False) -> Row:
        limit = f'secondary: {arrival.title}, unprotected'
        return Row('secondary', arrival.title, OVERLAYS[overlays],
                   PER_BYTE if moved else IOPS,
                   f'{mark}: {MOVED}' if moved else mark,
                   f'{limit}: {MOVED}' if moved else limit, not moved)

    return {row.mark: row for row in (
        new(FRESH), new(AGAIN), new(IN_STEP), new(FRESH, True),
        new(IN_STEP, True))}


def measure_arrival(setting: Setting, arrival: Arrival, replicas: Replicas,
                    subject: str) -> Values:
    """Let writes arrive: where the guest was before, fresh, and again."""
    rows = arrival_rows(arrival, replicas.active)
    with open_secondary(setting.place, subject, replicas) as (host, guest):
        def arrive(*names: str) -> Values:
            before = host.moved
            export = ('disk0' if subject == UNPROTECTED else
                      replicas.arrives_at(0))
            speeds = load(setting.place, host, export,
                          *map(arrival.job, names))
            # what comes again is written, and nothing else
            moved = (host.moved - before) / arrival.data - len(names) + 1
            return {**{rows[name].figure(subject): speeds[name]
                       for name in names},
                    rows[f'{names[0]}: {MOVED}'].figure(subject): moved}

        def in_step() -> Values:
            load(setting.place, host, guest, arrival.job('guest'))
            return arrive(IN_STEP)

        # The first touch of memory is slow: throw the passes away that grow
        # the overlays to what they need.
        if subject == UNPROTECTED:
            arrive(FRESH)
            return arrive(FRESH)
        in_step()
        host.checkpoint()
        arrive(FRESH)
        host.checkpoint()
        values = in_step()
        host.checkpoint()
        return {**values, **arrive(FRESH, AGAIN)}


def cells(setting: Setting) -> List[Cell]:
    """Writes that arrive at the secondary disk."""
    memory = setting.place.memory
    image = fill(memory / 'image', GIB)
    arrivals = [scattered(memory, GIB, CLUSTER, setting.blocks, 1)]
    if not setting.quick:
        arrivals += [scattered(memory, GIB, CLUSTER, setting.blocks, 16),
                     in_a_row(CLUSTER, 1, 256 * MIB),
                     in_a_row(CLUSTER, 4, 256 * MIB)]
    result = []
    for arrival in arrivals:
        for overlays, subjects in COMPARED.items():
            # these matter most to small blocks one at a time
            if overlays == RECOMMENDED_ACTIVE and arrival is not arrivals[0]:
                continue
            result.append(Cell(
                f'{arrival.title}, {OVERLAYS[overlays]}',
                partial(measure_arrival, setting, arrival, Replicas(
                    memory, GIB, active=overlays, disk=image)),
                tuple(arrival_rows(arrival, overlays).values()),
                subjects))
    return result


def measure_direct(setting: Setting, replicas: Replicas, arrival: Arrival,
                   row: Row, subject: str) -> Values:
    """Writes that arrive just after a checkpoint."""
    with open_secondary(setting.place, subject, replicas) as (host, _guest):
        return {row.name: load(setting.place, host, 'disk0',
                               arrival.job(FRESH))[FRESH]}


def direct_cells(setting: Setting, aio: str) -> List[Cell]:
    """On a disk without the page cache."""
    place = setting.place
    row = Row('direct', f'aio={aio}',
              'secondary, 4 KiB random, depth 1, fresh', IOPS)
    return [Cell(f'aio={aio}, secondary', partial(
        measure_direct, setting,
        Replicas(place.disk, GIB, aio=aio, disk=place.disk / 'image'),
        scattered(place.memory, GIB, CLUSTER, setting.blocks // 8, 1), row),
        (row,))]


# Checkpoints

def checkpoint_rows(where: str, replicas: Replicas) -> Dict[str, Row]:
    """The rows of some disks."""
    count = replicas.disks
    line = f'{SIZES[replicas.size]}, {count} disk{"s" if count > 1 else ""}'
    kinds = [IDLE, DIRTY] if count > 1 else [IDLE, DIRTY, MORE_DIRTY]
    return {kind: Row('checkpoint', f'{where}, {kind}', line, MS,
                      limit=NO_DISK) for kind in kinds}


def measure_checkpoints(setting: Setting, replicas: Replicas,
                        rows: Dict[str, Row], subject: str) -> Values:
    """Checkpoints of disks that nobody used, and that were written to."""
    sizes = {IDLE: 0, DIRTY: 50 * CLUSTER, MORE_DIRTY: 64 * MIB}
    values = {}
    with open_secondary(setting.place, subject, replicas) as (host, _guest):
        host.checkpoint()
        for kind, row in rows.items():
            took = [after_writes(host, sizes[kind])
                    for _ in range(1 + setting.checkpoints)]
            # the first time touches new memory: throw it away
            values[row.name] = statistics.median(took[1:])
    return values


def after_writes(host: TimedHost, size: int) -> float:
    """Write on both sides of all disks, and do a checkpoint."""
    # not the same blocks on both sides: each overlay is to have some
    for name in host.exports() if size else []:
        export = name.split('-')[1]
        host.do(export, f'write {0 if "disk" in export else GUEST} {size}')
    return host.checkpoint()


def measure_no_disk(setting: Setting, subject: str) -> Values:
    """A checkpoint of a VM that has no disk."""
    with TimedHost(setting.place, subject) as host:
        host.checkpoint()
        return {NO_DISK: statistics.median(
            host.checkpoint() for _ in range(2 * setting.checkpoints))}


def checkpoint_cells(setting: Setting) -> List[Cell]:
    """Checkpoints on the secondary."""
    result = [Cell('no disk', partial(measure_no_disk, setting),
                   subjects=(UNPROTECTED,))]
    for where, folder in (('tmpfs', setting.place.memory),
                          ('disk', setting.place.disk)):
        for count in 1, 8:
            for size in SIZES:
                replicas = Replicas(folder, size, count)
                rows = checkpoint_rows(where, replicas)
                result.append(Cell(
                    f'{where}, {rows[IDLE].line}',
                    partial(measure_checkpoints, setting, replicas, rows),
                    tuple(rows.values()), (STOCK, OURS)))
    return result


# A failover

def measure_failover(setting: Setting, folder: Path, image: Path, row: Row,
                     subject: str) -> Values:
    """Lose the primary, and wait for the end of the merge."""
    if subject == UNPROTECTED:
        return {row.name: copy(fill(folder / 'copied', MERGED), image)}
    with open_secondary(setting.place, subject, Replicas(
            folder, GIB, disk=image)) as (host, guest):
        host.do(guest, f'write 0 {MERGED}')
        host.unexport('disk0')
        begin = time.perf_counter()
        replicate(host, False, 'secondary', failover=True)
        host.wait_until(
            lambda: host.children('replication0').get('file') == 'disk0',
            'the merge')
        return {row.name: 1000 * (time.perf_counter() - begin)}


def copy(source: Path, target: Path) -> float:
    """Copy as much as is merged; return how many ms that took."""
    with open(source, 'rb', buffering=0) as reader, \
            open(target, 'r+b', buffering=0) as writer:
        begin = time.perf_counter()
        for _ in range(MERGED // MIB):
            writer.write(reader.read(MIB))
        os.fdatasync(writer.fileno())
        return 1000 * (time.perf_counter() - begin)


def failover_cells(setting: Setting) -> List[Cell]:
    """A failover on the secondary, until the merge is done."""
    result = []
    for where, folder in (('tmpfs', setting.place.memory),
                          ('disk', setting.place.disk)):
        row = Row('failover', f'{MERGED // MIB} MiB dirty, {where}',
                  'merge done', MS)
        image = fill(folder / 'image', GIB, sync=where == 'disk')
        result.append(Cell(row.title, partial(
            measure_failover, setting, folder, image, row), (row,)))
    return result
