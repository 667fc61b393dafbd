# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known of each side, and what follows from it: rates, time left."""

import time
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Deque, Dict, Iterable, List, Optional, Tuple

Json = Dict[str, Any]

# Rates are taken over so many seconds.
RATE_SECONDS = 3.0
# As many pauses as the widest sparkline has room for.
PAUSES = 60

SILENT_SECONDS = 2.0
DEMO_SOCKET = 'top.sock'

# Those that a person wants to read.  STOP and RESUME come with every
# checkpoint: they become pauses.
EVENTS = ('REPLICATION_STAGE_CHANGE', 'REPLICATION_ERROR',
          'REPLICATION_REPLICA_CHANGE', 'COLO_EXIT', 'QUORUM_FAILURE',
          'QUORUM_REPORT_BAD', 'BLOCK_IO_ERROR', 'BLOCK_JOB_READY',
          'BLOCK_JOB_COMPLETED', 'BLOCK_JOB_CANCELLED', 'BLOCK_JOB_ERROR',
          'MIGRATION', 'SHUTDOWN', 'RESET', 'GUEST_PANICKED')


class Rate:
    """How fast a count grows."""

    def __init__(self) -> None:
        self._samples: Deque[Tuple[float, int]] = deque()

    def take(self, when: float, count: int) -> None:
        """Take in the count at a time."""
        samples = self._samples
        if samples and count < samples[-1][1]:
            # it counts anew
            samples.clear()
        samples.append((when, count))
        while len(samples) > 2 and when - samples[1][0] >= RATE_SECONDS:
            samples.popleft()

    @property
    def per_second(self) -> Optional[float]:
        """The rate, or None if it is not known yet."""
        if len(self._samples) < 2:
            return None
        (first, low), (last, high) = self._samples[0], self._samples[-1]
        return (high - low) / (last - first) if last > first else None


@dataclass
class Portion:
    """How far something is."""
    done: int
    total: int
    seconds_left: Optional[float]

    @property
    def part(self) -> float:
        """The part that is done, from 0 to 1."""
        return min(self.done / self.total, 1) if self.total else 0


class Job:
    """A block job that a person has started, such as the disks' sync."""

    def __init__(self) -> None:
        self.info: Json = {}
        self._rate = Rate()

    def take(self, when: float, info: Json) -> None:
        """Take in what query-block-jobs has told."""
        self.info = info
        self._rate.take(when, info['offset'])

    @property
    def progress(self) -> Portion:
        """How far it is, by the rate of late."""
        done, total = self.info['offset'], self.info['len']
        rate = self._rate.per_second
        left = (total - done) / rate if rate else None
        return Portion(done, total, left)


class NodeFigures:
    """A replication node."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stats: Json = {}
        self.requests = Rate()
        self.bytes = Rate()
        # of the checkpoints that were seen, in ns
        self.checkpoints: Deque[int] = deque(maxlen=PAUSES)

    def take(self, when: float, stats: Json) -> None:
        """Take in the driver's statistics."""
        before = self.stats.get('checkpoints', stats['checkpoints'])
        if stats['checkpoints'] > before:
            self.checkpoints.append(stats['last-checkpoint-ns'])
        self.stats = stats
        if self.is_primary:
            self.requests.take(when, stats['forwarded-requests'])
            self.bytes.take(when, stats['forwarded-bytes'])
        else:
            self.bytes.take(when, stats['copied-bytes'])

    @property
    def is_primary(self) -> bool:
        """Whether it forwards, rather than receives."""
        return bool(self.stats['mode'] == 'primary')

    @property
    def disk(self) -> str:
        """The guest's disk: after a failover, two nodes may be below it."""
        return str(self.stats.get('top-node', self.name))

    @property
    def failover(self) -> Optional[Portion]:
        """How far a failover is, if there was one."""
        told = self.stats.get('failover')
        if not told:
            return None
        done, total = told['done'], told['total']
        left = told['elapsed-ns'] * (total - done) / done / 1e9 if done \
            else None
        return Portion(done, total, left)


@dataclass
class Event:
    """Something that a QEMU has told."""
    when: float
    side: str
    text: str
    is_bad: bool


def describe(event: Json) -> Event:
    """Say what an event tells, in a line."""
    name = event['event']
    data = event.get('data', {})
    who = data.get('node-name') or data.get('device') or data.get('id')
    words = [str(data[key])
             for key in ('stage', 'state', 'reason', 'status', 'error')
             if data.get(key)]
    stamp = event['timestamp']
    bad = bool('error' in data or data.get('stage') in ('broken',
                                                        'failover-failed')
               or name in ('QUORUM_FAILURE', 'QUORUM_REPORT_BAD',
                           'BLOCK_IO_ERROR', 'GUEST_PANICKED'))
    text = ' '.join([name, *([str(who)] if who else []), *words])
    return Event(stamp['seconds'] + stamp['microseconds'] / 1e6, '', text,
                 bad)


@dataclass
class Watched:
    """A QEMU: what it was when it was last heard of."""
    path: Path
    name: str = ''
    # why there is no connection; None while there is one
    trouble: Optional[str] = 'not connected yet'
    # whether somebody is there all the same
    hangs: bool = False
    since: float = 0.0
    heard: bool = False
    # for how long it has owed an answer, in s
    silent_since: Optional[float] = None
    status: str = ''
    colo: str = ''
    nodes: Dict[str, NodeFigures] = field(default_factory=dict)
    jobs: Dict[str, Job] = field(default_factory=dict)
    # how long the guest stood still, in s
    pauses: Deque[float] = field(
        default_factory=lambda: deque(maxlen=PAUSES))
    pause_count: int = 0
    longest_pause: float = 0.0
    _stopped: Optional[float] = None

    def __post_init__(self) -> None:
        # the demo has a folder for each host
        path = self.path.absolute()
        self.name = path.parent.name if path.name == DEMO_SOCKET \
            else path.name

    def connected(self, name: Optional[str]) -> None:
        """There is a connection, maybe to another QEMU than before."""
        self.name = name or self.name
        self.trouble = None
        self.heard = True
        self._stopped = None

    def lost(self, why: str, when: float, hangs: bool = False) -> None:
        """There is no connection any more, or still none."""
        if self.trouble is None or not self.since:
            self.since = when
        self.trouble = why
        self.hangs = hangs
        self.silent_since = None

    @property
    def silence(self) -> float:
        """For how long it has owed an answer, if that is too long."""
        if self.silent_since is None:
            return 0
        silence = time.monotonic() - self.silent_since
        return silence if silence > SILENT_SECONDS else 0

    def unprotected(self) -> List[NodeFigures]:
        """Return a node of each disk that no node of it protects.

        It is the primary's where a promoted secondary has got one above it.
        """
        nodes = sorted(self.nodes.values(), key=lambda node: node.disk)
        disks = [list(group) for _, group
                 in groupby(nodes, key=lambda node: node.disk)]
        return [max(disk, key=lambda node: node.is_primary) for disk in disks
                if not any(node.stats['protects'] for node in disk)]

    def take_nodes(self, when: float, blockstats: List[Json]) -> None:
        """Take in what query-blockstats has told."""
        told = {entry['node-name']: entry['driver-specific']
                for entry in blockstats
                if entry.get('driver-specific', {}).get('driver')
                == 'replication'}
        self.nodes = {name: self.nodes.get(name) or NodeFigures(name)
                      for name in sorted(told)}
        for name, node in self.nodes.items():
            node.take(when, told[name])

    def take_jobs(self, when: float, jobs: List[Json]) -> None:
        """Take in what query-block-jobs has told."""
        told = {job['device']: job for job in jobs}
        self.jobs = {name: self.jobs.get(name) or Job()
                     for name in sorted(told)}
        for name, job in self.jobs.items():
            job.take(when, told[name])

    def take_event(self, event: Json) -> Optional[Event]:
        """Take in an event; return it if it is worth a line."""
        told = describe(event)
        if event['event'] == 'STOP':
            self._stopped = told.when
        elif event['event'] == 'RESUME' and self._stopped is not None:
            pause = told.when - self._stopped
            self._stopped = None
            self.pauses.append(pause)
            self.pause_count += 1
            self.longest_pause = max(self.longest_pause, pause)
        if event['event'] not in EVENTS:
            return None
        told.side = self.name
        return told


# For monitors, as exit statuses
PROTECTED, DOUBTFUL, UNPROTECTED = 0, 1, 2


def clock(time_ns: int) -> str:
    """Say when something was, with the date if that was not today."""
    then = time.localtime(time_ns / 1e9)
    today = then[:3] == time.localtime()[:3]
    return time.strftime('%H:%M:%S' if today else '%F %H:%M:%S', then)


def verdict(sides: Iterable[Watched], max_age: float) -> Tuple[int, str]:
    """Tell whether the VM is protected, in a line."""
    sides = list(sides)
    if not sides:
        return UNPROTECTED, 'NOT PROTECTED: no QEMU is there'
    whys, doubts = [], []
    for side in sides:
        if side.hangs and side.trouble is not None:
            doubts.append(f'{side.name} does not answer: {side.trouble}')
        elif side.trouble is not None:
            when = int(side.since * 1e9) if side.heard else None
            whys.append((when, f'{side.name} does not answer: '
                               f'{side.trouble}'))
        elif not side.nodes:
            whys.append((None, f'there is no replication node on {side.name}'))
        else:
            whys += [(why.get('time-ns'),
                      f'of {node.name} on {side.name}: {why["text"]}')
                     for node in side.unprotected()
                     for why in [node.stats['unprotected']]]
    if whys:
        when, why = min(whys, key=lambda why: why[0] or float('inf'))
        since = f' since {clock(when)}' if when else ''
        return UNPROTECTED, f'NOT PROTECTED{since}, because {why}'
    ages = [node.stats['checkpoint-age-ns'] / 1e9 for side in sides
            for node in side.nodes.values() if node.stats['protects']
            and side.trouble is None]
    doubts += [f'{side.name} does not answer for {side.silence:.0f} s'
               for side in sides if side.silence]
    if not ages:
        return DOUBTFUL, f'IN DOUBT, because {doubts[0]}'
    age = max(ages)
    text = f'PROTECTED, last checkpoint {age:.1f} s ago'
    if doubts:
        return DOUBTFUL, f'{text}, but {doubts[0]}'
    return DOUBTFUL if age > max_age else PROTECTED, text
