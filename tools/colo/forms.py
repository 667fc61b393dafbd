# SPDX-License-Identifier: GPL-2.0-or-later
"""The ways to put a pair's disks together.

The graph of one disk, with its node names, where both hosts have metadata, and
the secondary makes its own overlays:

    primary                                secondary
    colo-disk0 (replication)               colo-disk0 (replication)
      |    |  \\                              |    |
      |  disk0 link0 (nbd) -- unix socket --> replica0 -> disk0
    meta0      link-meta0 (nbd) -----------------> meta0

Whoever died comes back as the secondary with the disk that it had.  Without
metadata, and with overlays that are given to the secondary:

    primary                                secondary
    colo-disk0 (replication)               guest0 (throttle)
      |      \\                               |
    disk0   link0 (nbd) -- unix socket --> replication0
                            NBD server       |
                                |          active0 -> hidden0 -> disk0
                                '------------------------------^

guest0 is there for the day on which the secondary is promoted and is to be
protected itself.  Then colo-disk0 is put between it and replication0, which
serves the guest whether or not the merge has ended.

And with quorum, before there was such a node:

    colo-disk0 (quorum)                    colo-disk0 (quorum)
      |      \\                               |
    disk0   forward0 (replication)         replication0
              |                              |
            link0 (nbd) ------------------> as above

Here, colo-disk0 of a secondary that was promoted gets another child.
"""

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple, Type

import nodes
from guesthost import NO_LIMITS, GuestHost
from host import HostError, Json

Progress = Callable[[Sequence[float]], None]


def top(disk: int) -> str:
    """The name of the primary's root node."""
    return f'colo-disk{disk}'


class SyncError(HostError):
    """The secondary's disks could not be made equal."""


@dataclass(frozen=True)
class Synced:
    """How the secondary's disks came to be equal; all in bytes."""
    began: float
    ended: float
    lacking: int
    copied: int
    size: int

    def __str__(self) -> str:
        """How much was copied, which may be some of it twice."""
        if self.copied >= self.size:
            return f'all {self.size / 2**20:.0f} MiB copied'
        return (f'{self.copied / 2**20:.{1 if self.copied < 2**25 else 0}f} '
                f'of {self.size / 2**20:.0f} MiB copied')


class Form(ABC):
    """What is done to the disks of a pair, the same on all of them."""

    # Whether a new secondary needs no more than what the last one's disk lacks
    keeps_disk = True
    # Whether that is so of the last primary's disk, too, by what is beside it,
    # and a secondary needs no overlays
    has_metadata = False
    # With metadata: whether what the next secondary has alone may be lost
    discard_peer = False

    def __init__(self, count: int, size: int, **options: Any) -> None:
        """The options are those of the primary's replication nodes."""
        self.disks = range(count)
        self.size = count * size
        self.options = options
        self._began = 0.0
        self._before = (0, 0)

    def exports(self, disk: int) -> Dict[str, str]:
        """What the primary gets of a secondary, by the exports' names."""
        return {f'disk{disk}': f'disk{disk}'}

    @abstractmethod
    def primary_root(self, disk: int) -> Json:
        """What the guest of a primary uses."""

    @abstractmethod
    def secondary_root(self, disk: int) -> Json:
        """What the guest of a secondary uses."""

    @abstractmethod
    def begin_sync(self, host: GuestHost, socket: Path, changed: bool,
                   speed: int) -> None:
        """Begin to make the disks behind a socket equal to the host's."""

    @abstractmethod
    def finish_sync(self, host: GuestHost, progress: Progress) -> Synced:
        """Wait until they are, and will be from now on."""

    @abstractmethod
    def let_go(self, host: GuestHost) -> None:
        """Take a secondary that was lost out of the host's graph."""

    @abstractmethod
    def promoted(self, host: GuestHost) -> None:
        """Have a secondary that was promoted be like a primary."""

    def merged(self) -> str:
        """The stage in which a disk is whole after a failover."""
        return 'none' if self.has_metadata else 'done'

    def _check_jobs(self, host: GuestHost) -> None:
        host.pump()
        for event in host.seen('BLOCK_JOB_COMPLETED', self._began):
            if 'error' in event['data']:
                raise SyncError(f'{host.name}: the disk sync failed: '
                                f'{event["data"]["error"]}')


def part(job: Json) -> float:
    """How far a job is."""
    return float(job['offset'] / (job['len'] or 1))


class Holder(Form):
    """A primary whose node holds both disks."""

    def primary_root(self, disk: int) -> Json:
        return nodes.holder(top(disk), f'disk{disk}', **self.options)

    def secondary_root(self, disk: int) -> Json:
        # a filter, unlike raw: what is allocated is told as it is below
        return {'driver': 'throttle', 'node-name': f'guest{disk}',
                'throttle-group': NO_LIMITS, 'file': f'replication{disk}'}

    @staticmethod
    def _counts(host: GuestHost) -> Tuple[int, int]:
        """How many bytes replicas lack, and have been copied so far."""
        told = [stats for stats in host.statistics()
                if stats['mode'] == 'primary']
        return (sum(stats['out-of-sync-bytes'] for stats in told),
                sum(stats['copied-bytes'] for stats in told))

    def _attach(self, host: GuestHost, socket: Path, disk: int, changed: bool
                ) -> Json:
        """Add the links of a disk; return how to use them."""
        host.add(nodes.link(f'link{disk}', socket, f'disk{disk}'))
        return {'replica': f'link{disk}',
                'sync': 'changed' if changed else 'full'}

    def begin_sync(self, host: GuestHost, socket: Path, changed: bool,
                   speed: int) -> None:
        self._began = time.time()
        self._before = self._counts(host)
        for disk in self.disks:
            host.cmd('x-block-replica-sync', job_id=f'sync{disk}',
                     node_name=top(disk), speed=speed,
                     **self._attach(host, socket, disk, changed))

    def finish_sync(self, host: GuestHost, progress: Progress) -> Synced:
        def ended() -> bool:
            jobs = {job['device']: job
                    for job in host.cmd('query-block-jobs')}
            self._check_jobs(host)
            # one that has ended has done all
            progress([part(jobs[f'sync{disk}']) if f'sync{disk}' in jobs
                      else 1.0 for disk in self.disks])
            return not jobs

        host.wait_until(ended, 'the disk sync')
        self._check_jobs(host)
        return Synced(self._began, time.time(), self._before[0],
                      self._counts(host)[1] - self._before[1], self.size)

    def let_go(self, host: GuestHost) -> None:
        for job in host.cmd('query-block-jobs'):
            # it may end by itself in this moment
            host.attempt('block-job-cancel', device=job['device'], force=True)
        host.wait_until(lambda: not host.cmd('query-block-jobs'),
                        'the end of the disk sync')
        known = set(host.node_names())
        for disk in self.disks:
            if 'replica' in host.children(top(disk)):
                host.cmd('x-block-replica-detach', node_name=top(disk),
                         force=True)
            host.delete(*known.intersection({f'link{disk}',
                                             f'link-meta{disk}'}))

    def promoted(self, host: GuestHost) -> None:
        for disk in self.disks:
            host.add(nodes.holder(top(disk), f'replication{disk}',
                                  **self.options))
            host.cmd('blockdev-reopen', {'options': [
                {**self.secondary_root(disk), 'file': top(disk)}]})


class Standby(Holder):
    """Both sides have metadata, and the secondary is to become a primary."""

    has_metadata = True

    def exports(self, disk: int) -> Dict[str, str]:
        return {f'disk{disk}': f'replica{disk}',
                f'meta{disk}': f'meta{disk}'}

    def primary_root(self, disk: int) -> Json:
        return {**super().primary_root(disk), 'metadata': f'meta{disk}'}

    def secondary_root(self, disk: int) -> Json:
        return nodes.standby(top(disk), f'replica{disk}', f'disk{disk}',
                             metadata=f'meta{disk}', **self.options)

    def _attach(self, host: GuestHost, socket: Path, disk: int, changed: bool
                ) -> Json:
        host.add(nodes.link(f'link{disk}', socket, f'disk{disk}'),
                 nodes.link(f'link-meta{disk}', socket, f'meta{disk}'))
        return {'replica': f'link{disk}',
                'replica-metadata': f'link-meta{disk}',
                'discard-peer': self.discard_peer}

    def begin_sync(self, host: GuestHost, socket: Path, changed: bool,
                   speed: int) -> None:
        super().begin_sync(host, socket, changed, speed)
        # what the other side's metadata says is known only now
        lacking, copied = self._counts(host)
        before = self._before[1]
        self._before = (lacking + copied - before, before)

    def promoted(self, host: GuestHost) -> None:
        """Nothing: the node becomes a primary by itself."""


class Quorum(Form):
    """A primary whose replication node stands beside its disk."""

    keeps_disk = False

    def primary_root(self, disk: int) -> Json:
        return nodes.quorum(top(disk), f'disk{disk}')

    def secondary_root(self, disk: int) -> Json:
        return nodes.quorum(top(disk), f'replication{disk}')

    def begin_sync(self, host: GuestHost, socket: Path, changed: bool,
                   speed: int) -> None:
        """Fill the secondary's disks.

        The guest writes all the time; no block may end up old.  Why none
        does, with finish_sync():

        1. The mirror's filter sits between the guest's device and the
           quorum, so it sees every guest write.  With
           copy-mode=write-blocking a write is done when it is on both
           disks, and what it overtakes is copied before it, never after.
        2. Once the job is ready and actively-synced, nothing is left to
           copy: from here on the mirror writes to the secondary only what
           a guest's write carries.
        3. Now the forwarding node joins the quorum.  QEMU drains the graph
           for that, so each write is either done on both disks already, or
           goes by both ways.  By both ways it carries the same data, and
           the guest is told that it is done when the mirror's is, and the
           other is in the queue of the forwarding, which keeps the order:
           a later write to the same block cannot be overtaken there.
        4. Only then the mirror ends.  Cancelling a ready job (not by force)
           lets it finish in sync, drained again.  What is left is the
           forwarding, which has missed nothing.

        The other order of 3 and 4 would lose what is written in between.
        The mirror's target shares its node with no other writer, so that
        mirror and forwarding have a connection each.
        """
        self._began = time.time()
        for disk in self.disks:
            host.add(nodes.link(f'sync-link{disk}', socket, f'disk{disk}'),
                     nodes.link(f'link{disk}', socket, f'disk{disk}'))
            host.cmd('blockdev-mirror', job_id=f'sync{disk}',
                     device=top(disk), target=f'sync-link{disk}',
                     sync='full', copy_mode='write-blocking', speed=speed,
                     filter_node_name=f'sync-filter{disk}')

    def finish_sync(self, host: GuestHost, progress: Progress) -> Synced:
        jobs: List[Json] = []

        def mirrored() -> bool:
            jobs[:] = sorted(host.cmd('query-block-jobs'),
                             key=lambda job: str(job['device']))
            self._check_jobs(host)
            progress([part(job) for job in jobs])
            # if one is gone, its event, still on the way, says why
            return len(jobs) == len(self.disks) and all(
                job['ready'] and job['actively-synced'] for job in jobs)

        host.wait_until(mirrored, 'the disk sync')
        for disk in self.disks:
            host.add(nodes.primary(f'forward{disk}', f'link{disk}',
                                   **self.options))
            host.cmd('x-blockdev-change', parent=top(disk),
                     node=f'forward{disk}')
        for disk in self.disks:
            host.cmd('block-job-cancel', device=f'sync{disk}')
        host.wait_until(lambda: not host.cmd('query-block-jobs'),
                        'the end of the disk sync')
        self._check_jobs(host)
        for disk in self.disks:
            host.delete(f'sync-link{disk}')
        return Synced(self._began, time.time(), self.size,
                      sum(job['offset'] for job in jobs), self.size)

    def let_go(self, host: GuestHost) -> None:
        known = host.node_names()
        for disk in self.disks:
            for name, node in host.children(top(disk)).items():
                if node == f'forward{disk}':
                    host.cmd('x-blockdev-change', parent=top(disk),
                             child=name)
            for node in (f'forward{disk}', f'link{disk}', f'sync-link{disk}'):
                if node in known:
                    host.delete(node)

    def promoted(self, host: GuestHost) -> None:
        """Nothing: replication0 serves what is below it."""


FORMS: Dict[str, Type[Form]] = {'standby': Standby, 'holder': Holder,
                                'quorum': Quorum}
