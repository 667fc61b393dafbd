# SPDX-License-Identifier: GPL-2.0-or-later
"""Writes on a primary, with a way to the secondary that takes its time."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from figures import IOPS, MIB, MS, Cell, Row, Setting, Values, row
from fio import Job, Speed, load
from nodes import GIB, Remote, disk_node, open_primary, open_remote
from subject import (NAMES, OURS, STOCK, UNPROTECTED, WRITE_BEHIND,
                     Subject)

GROUP = 'primary'
DRAIN = 'drain'
BURST, STEADY = 'burst', 'steady'
PROTECTED = (STOCK, OURS)
LATENCIES = (0.0, 0.2, 1.0, 5.0)
# A burst ends after this time, if need be
BURST_MS = 400
# It is measured this much later, if it lasts much longer: a new QEMU first
# takes memory for requests and their stacks, which one that has been running
# for long has
WARM_MS = 50


class Work(NamedTuple):
    """What the guest does."""
    title: str
    options: Dict[str, Any]
    # what a queue of 64 MiB has room for
    burst: int
    warm_ms: int

    def jobs(self, setting: Setting) -> List[Job]:
        """A burst, a load that fills any queue, and one that goes on."""
        pace = setting.pace
        common: Dict[str, Any] = {'size': GIB}
        fill = {'rw': 'write', 'bs': 65536, 'iodepth': 16}
        return [
            Job(BURST, {**common, **self.options, 'io_size': self.burst,
                        'ramp_time': f'{self.warm_ms}ms',
                        'runtime': f'{BURST_MS}ms'}),
            Job('fill', {**common, **fill, 'io_size': 128 * MIB,
                         'runtime': '150ms'}),
            Job(STEADY, {**common, **self.options, 'time_based': True,
                         'ramp_time': f'{int(1000 * pace.ramp)}ms',
                         'runtime': f'{int(1000 * pace.steady)}ms'})]


DEPTH_1 = Work('4 KiB random, depth 1',
               {'rw': 'randwrite', 'bs': 4096, 'iodepth': 1}, 32 * MIB,
               WARM_MS)
DEPTH_16 = Work('4 KiB random, depth 16',
                {'rw': 'randwrite', 'bs': 4096, 'iodepth': 16}, 32 * MIB,
                WARM_MS)
SEQUENTIAL = Work('64 KiB sequential, depth 4',
                  {'rw': 'write', 'bs': 65536, 'iodepth': 4}, 48 * MIB, 0)
FSYNC = Work('4 KiB random, depth 1, fsync after each',
             {'rw': 'randwrite', 'bs': 4096, 'iodepth': 1, 'fsync': 1},
             32 * MIB, WARM_MS)


def remotes(kind: str) -> List[Remote]:
    """One for each latency."""
    return [Remote(kind, ms) for ms in LATENCIES]


def plan(setting: Setting) -> List[Tuple[Work, List[Remote]]]:
    """What to measure with what."""
    if setting.pace.quick:
        return [(DEPTH_1, [Remote('null-co', 1), Remote('NBD', 1)]),
                (FSYNC, [Remote('NBD', 1)])]
    both = remotes('null-co') + remotes('NBD')
    return [(DEPTH_1, both), (DEPTH_16, both), (SEQUENTIAL, both),
            (FSYNC, [Remote('null-co', 1), *remotes('NBD')])]


def speeds(names: Dict[str, str], results: Dict[str, Speed]) -> Values:
    """The figures of some jobs, each with its latencies beside it."""
    values = {}
    for job, name in names.items():
        values[name] = results[job].iops
        values[f'{name} (p50 us)'] = results[job].p50
        values[f'{name} (p99 us)'] = results[job].p99
    return values


def measure(setting: Setting, image: Path, work: Work,
            remote: Optional[Remote], write_behind: Optional[int],
            names: Dict[str, str], subject: Subject) -> Values:
    """Do the work on a new host."""
    local = disk_node('local', image)
    jobs = work.jobs(setting)
    if remote is None or not subject.protected:
        with open_primary(setting.place, subject, local, None) as host:
            return speeds(names, load(setting.place, host.guest, jobs))
    with open_remote(setting.place, subject, remote) as node, \
            open_primary(setting.place, subject, local, node,
                         write_behind) as host:
        return speeds(names, load(setting.place, host.guest, jobs))


def unprotected_name(work: Work, kind: str) -> str:
    """Of the figure that is the limit of all remotes."""
    return f'{GROUP}: {work.title}, unprotected, {kind}'


def limit_beside(remote: Remote) -> bool:
    """
    Whether the plain disk is measured beside it, not once for all rows.

    A shared machine may be a third slower ten seconds later.
    """
    return remote.ms == 1


def work_rows(work: Work, remote: Remote) -> Dict[str, Row]:
    """The rows of a workload."""
    return {kind: row(GROUP, work.title, str(remote), IOPS, kind,
                      others=None if limit_beside(remote) else
                      {UNPROTECTED: unprotected_name(work, kind)})
            for kind in (BURST, STEADY)}


def cells(setting: Setting, image: Path) -> List[Cell]:
    """All cells of the group."""
    result = []
    waits = WRITE_BEHIND in setting.subjects[OURS].options
    if not waits:
        setting.note(f'this build does not know {WRITE_BEHIND}: no rows '
                     'with it')
    for work, ways in plan(setting):
        if not all(map(limit_beside, ways)):
            result.append(Cell(
                f'{work.title}, unprotected',
                partial(measure, setting, image, work, None, None,
                        {kind: unprotected_name(work, kind)
                         for kind in (BURST, STEADY)}),
                subjects=(UNPROTECTED,)))
        for remote in ways:
            rows = work_rows(work, remote)
            result.append(Cell(
                f'{work.title}, {remote}',
                partial(measure, setting, image, work, remote, None,
                        {kind: each.figures[OURS]
                         for kind, each in rows.items()}),
                tuple(rows.values()),
                NAMES if limit_beside(remote) else PROTECTED))
            if waits and remote == Remote('NBD', 1):
                result.append(waiting(setting, image, work, remote,
                                      rows[STEADY]))
    return result


def waiting(setting: Setting, image: Path, work: Work, remote: Remote,
            default: Row) -> Cell:
    """The same as default, but each write waits for the secondary."""
    waits = row(GROUP, work.title, f'{remote}, {WRITE_BEHIND}=0', IOPS, STEADY,
                others={name: default.figures[name]
                        for name in (UNPROTECTED, STOCK)})
    return Cell(
        f'{work.title}, {waits.line}',
        partial(measure, setting, image, work, remote, 0,
                {STEADY: waits.figures[OURS]}), (waits,), (OURS,))


def drain(setting: Setting, image: Path, name: str, remote: Remote,
          subject: Subject) -> Values:
    """A checkpoint right after a burst, which has to arrive for it."""
    with open_remote(setting.place, subject, remote) as node, \
            open_primary(setting.place, subject, disk_node('local', image),
                         node) as host:
        load(setting.place, host.guest, DEPTH_16.jobs(setting)[:1])
        return {name: host.server.checkpoint()}


def drain_cells(setting: Setting, image: Path) -> List[Cell]:
    """What write-behind costs at the checkpoint."""
    result = []
    for remote in remotes('NBD')[2:3 if setting.pace.quick else None]:
        each = row(DRAIN, 'checkpoint on the primary after 32 MiB',
                   str(remote), MS, charted=False)
        result.append(Cell(
            each.name, partial(drain, setting, image, each.figures[OURS],
                               remote), (each,), PROTECTED))
    return result
