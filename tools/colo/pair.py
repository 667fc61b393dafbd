# SPDX-License-Identifier: GPL-2.0-or-later
"""Two QEMU processes with COLO between them, and what one does with them.

The graph of one disk, with its node names:

    primary                                secondary
    colo-disk0 (quorum)                    colo-disk0 (quorum)
      |      \\                               |
    disk0   forward0 (replication)         replication0
              |                              |
            link0 (nbd) -- unix socket --> active0 -> hidden0 -> disk0
                                           NBD server ------------^

A secondary that was promoted keeps replication0 below its quorum; it can be
the primary of the next pair, for which start_secondary(), sync() and
protect() are called again.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import nodes
from guesthost import (CHECK_SECONDS, POLL, STEP_SECONDS, Beat, GuestHost,
                       Setup, top)
from host import HostError, Json

# Unlimited: the guest must not wait for a migration that is throttled.
BANDWIDTH = 1 << 40
# How often the primary is asked how far the secondary is behind, in seconds.
LAG_EVERY = 0.2


@dataclass(frozen=True)
class Checkpoint:
    """A stop of the primary's guest, from event to event."""
    stopped: float
    resumed: float

    @property
    def pause_ms(self) -> float:
        """How long the guest stood still."""
        return (self.resumed - self.stopped) * 1000


@dataclass(frozen=True)
class Failover:
    """What a failover took, in ms after the kill, and what it led to."""
    running_ms: float
    output_ms: float
    merged_ms: Optional[float]
    beat: Beat


class ColoPair:
    """A protected VM: the host that runs it and the one that stands by."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.hosts: List[GuestHost] = []
        self._primary: Optional[GuestHost] = None
        self._secondary: Optional[GuestHost] = None
        self.protected_at = 0.0
        # Memory for writes that are not on the secondary yet, unless it is
        # the default; sync() takes it
        self.write_behind: Optional[int] = None
        # what each QEMU gets besides
        self.host_args: List[str] = []
        self._sync_began = 0.0
        self._exporting = False
        # when, and how many bytes the secondary did not have then
        self.lag: List[Tuple[float, int]] = []
        # when, and how many bytes were merged, of how many
        self.merge: List[Tuple[float, int, int]] = []

    @property
    def primary(self) -> GuestHost:
        """The host that runs the VM."""
        assert self._primary
        return self._primary

    @property
    def secondary(self) -> GuestHost:
        """The host that stands by."""
        assert self._secondary
        return self._secondary

    @property
    def disks(self) -> range:
        """The numbers of the disks."""
        return range(self.setup.disks.count)

    def close(self) -> None:
        """End both QEMUs, whatever they do."""
        for host in self.hosts:
            host.close()

    # Both hosts, before protection

    def _new_host(self, own: Callable[[Path, int], List[Json]],
                  incoming: bool) -> GuestHost:
        """Start a host, with the nodes that each disk has in its folder."""
        name = f'host{len(self.hosts) + 1}'
        folder = self.setup.folder / name
        folder.mkdir()
        made = [node for disk in self.disks for node in own(folder, disk)]
        self.hosts.append(GuestHost(self.setup, name, made, incoming,
                                    self.host_args))
        return self.hosts[-1]

    def _own_disk(self, folder: Path, disk: int) -> Json:
        path = folder / f'disk{disk}.raw'
        with path.open('wb') as image:
            image.truncate(self.setup.disks.size)
        return nodes.image('raw', f'disk{disk}', nodes.file(path))

    def _overlay(self, path: Path, name: str, backing: str,
                 options: str = '') -> Json:
        nodes.create(self.setup.build, path, self.setup.disks.size, options)
        return nodes.image('qcow2', name, nodes.file(path), backing=backing)

    def _primary_nodes(self, folder: Path, disk: int) -> List[Json]:
        return [self._own_disk(folder, disk),
                nodes.quorum(top(disk), f'disk{disk}')]

    def _secondary_nodes(self, folder: Path, disk: int) -> List[Json]:
        return [self._own_disk(folder, disk),
                self._overlay(folder / f'hidden{disk}.qcow2',
                              f'hidden{disk}', f'disk{disk}'),
                self._overlay(folder / f'active{disk}.qcow2',
                              f'active{disk}', f'hidden{disk}',
                              nodes.RECOMMENDED_ACTIVE),
                nodes.secondary(f'replication{disk}', top(disk),
                                f'active{disk}'),
                nodes.quorum(top(disk), f'replication{disk}')]

    def start_primary(self) -> None:
        """Boot the guest, not protected yet, and wait for it to work."""
        host = self._primary = self._new_host(self._primary_nodes, False)

        def works() -> bool:
            beat = host.console.beat
            return beat is not None and beat.ready and beat.tx > 0

        host.wait_until(works, "the guest's start", CHECK_SECONDS)

    def start_secondary(self) -> None:
        """Start the host that stands by, with its disks exported."""
        host = self._secondary = self._new_host(self._secondary_nodes, True)
        host.serve()
        for disk in self.disks:
            host.export(f'disk{disk}')
        self._exporting = True
        self._enable_colo(host)
        host.cmd('migrate-incoming', uri=f'unix:{host.path("ram.sock")}')

    @staticmethod
    def _enable_colo(host: GuestHost) -> None:
        host.cmd('migrate-set-capabilities', capabilities=[
            {'capability': 'x-colo', 'state': True},
            {'capability': 'events', 'state': True}])

    # From a running guest to a protected one

    def sync(self, progress: Callable[[Sequence[float]], None]) -> None:
        """Fill the secondary's disks and leave forwarding behind.

        The guest writes all the time; no block may end up old.  Why none
        does:

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
        host = self.primary
        self._sync_began = time.time()
        socket = self.secondary.socket
        for disk in self.disks:
            host.add(nodes.link(f'sync-link{disk}', socket, f'disk{disk}'))
            host.cmd('blockdev-mirror', job_id=f'sync{disk}',
                     device=top(disk), target=f'sync-link{disk}',
                     sync='full', copy_mode='write-blocking',
                     filter_node_name=f'sync-filter{disk}')
        host.wait_until(lambda: self._mirrored(progress), 'the disk sync')
        options = {} if self.write_behind is None else {
            'write-behind': self.write_behind}
        for disk in self.disks:
            host.add(nodes.link(f'link{disk}', socket, f'disk{disk}'),
                     nodes.primary(f'forward{disk}', f'link{disk}',
                                   **options))
            host.cmd('x-blockdev-change', parent=top(disk),
                     node=f'forward{disk}')
        self._end_mirrors(host)

    def _mirrored(self, progress: Callable[[Sequence[float]], None]) -> bool:
        jobs = {job['device']: job
                for job in self.primary.cmd('query-block-jobs')}
        self._check_mirrors(self.primary)
        if len(jobs) != len(self.disks):
            # One is gone: its event, still on the way, says why.
            return False
        ordered = [jobs[f'sync{disk}'] for disk in self.disks]
        progress([job['offset'] / (job['len'] or 1) for job in ordered])
        return all(job['ready'] and job['actively-synced']
                   for job in ordered)

    def _check_mirrors(self, host: GuestHost) -> None:
        for event in host.seen('BLOCK_JOB_COMPLETED', self._sync_began):
            if 'error' in event['data']:
                raise HostError(f'{host.name}: the disk sync failed: '
                                f'{event["data"]["error"]}')

    def _end_mirrors(self, host: GuestHost) -> None:
        for disk in self.disks:
            host.cmd('block-job-cancel', device=f'sync{disk}')
        host.wait_until(lambda: not host.cmd('query-block-jobs'),
                        'the end of the disk sync')
        host.pump()
        self._check_mirrors(host)
        for disk in self.disks:
            host.delete(f'sync-link{disk}')

    def protect(self) -> Checkpoint:
        """Migrate the memory and start COLO; return the pause it took."""
        host = self.primary
        start = time.time()
        self._enable_colo(host)
        host.cmd('migrate-set-parameters', max_bandwidth=BANDWIDTH,
                 x_checkpoint_delay=self.setup.checkpoint_ms)
        host.cmd('migrate', uri=f'unix:{self.secondary.path("ram.sock")}')

        def in_colo() -> bool:
            state = host.cmd('query-migrate')
            if state['status'] == 'failed':
                raise HostError(f'{host.name}: migration failed: '
                                f'{state.get("error-desc", "no reason")}')
            self.secondary.pump()
            return (state['status'] == 'colo'
                    and bool(host.seen('RESUME', start)))

        host.wait_until(in_colo, 'the migration of the memory')
        switch = pauses(host, start)[0]
        self.protected_at = switch.resumed
        return switch

    # While it is protected

    def checkpoints(self) -> List[Checkpoint]:
        """Return the checkpoints since protect() that are complete."""
        ended = self.primary.seen('COLO_EXIT', self.protected_at)
        return [pause for pause in pauses(self.primary, self.protected_at)
                if not ended or pause.resumed < ended[0]['when']]

    def watch(self, seconds: float,
              tell: Callable[[Checkpoint], None]) -> None:
        """Stay protected for a while and tell of each checkpoint.

        It lasts longer than that if no checkpoint was complete by then.
        """
        end = time.monotonic() + seconds
        told = len(self.checkpoints())
        while time.monotonic() < end or not told:
            if time.monotonic() > end + STEP_SECONDS:
                raise HostError('there was no checkpoint')
            for host in (self.primary, self.secondary):
                host.check_alive('the end of the protected time')
                host.pump()
                if host.seen('COLO_EXIT', self.protected_at):
                    raise HostError(f'{host.name}: COLO ended by itself')
            done = self.checkpoints()
            for checkpoint in done[told:]:
                tell(checkpoint)
            told = len(done)
            self._look_at_lag()
            self.primary.console.wait(POLL)

    def _look_at_lag(self) -> None:
        now = time.time()
        if not self.lag or now >= self.lag[-1][0] + LAG_EVERY:
            self.lag.append((now, sum(stats['pending-memory'] for stats
                                      in self.primary.statistics())))

    # One host dies

    def stop_exports(self) -> None:
        """Cut off whoever writes to the secondary's disks."""
        if self._exporting:
            self.secondary.cmd('nbd-server-stop')
            self._exporting = False

    def fail_over_to_secondary(self,
                               since: Optional[float] = None) -> Failover:
        """Go on with the secondary after the primary's death.

        A primary that was given up without being killed needs a time since
        which.
        """
        host, dead = self.secondary, self.primary
        # Nobody may write to the disk that the failover merges into.
        self.stop_exports()
        host.cmd('x-colo-lost-heartbeat')
        self._primary, self._secondary = host, None
        return self._wait_for_failover(host, since or dead.died, merge=True)

    def fail_over_to_primary(self, since: Optional[float] = None) -> Failover:
        """Go on with the primary after the secondary's death.

        As for fail_over_to_secondary(), it may be given up in another way.
        """
        host, dead = self.primary, self.secondary
        # First the guest: a checkpoint that will never end may hold it.
        host.cmd('x-colo-lost-heartbeat')
        self._secondary = None
        result = self._wait_for_failover(host, since or dead.died,
                                         merge=False)
        self._cut_links(host)
        return result

    def _cut_links(self, host: GuestHost) -> None:
        """Take the secondary out of the primary's graph."""
        known = [node['node-name'] for node in
                 host.cmd('query-named-block-nodes', flat=True)]
        for disk in self.disks:
            for name, node in host.children(top(disk)).items():
                if node == f'forward{disk}':
                    host.cmd('x-blockdev-change', parent=top(disk),
                             child=name)
            for node in (f'forward{disk}', f'link{disk}', f'sync-link{disk}'):
                if node in known:
                    host.delete(node)

    def _wait_for_failover(self, host: GuestHost, since: float,
                           merge: bool) -> Failover:
        def running() -> bool:
            if merge:
                self._look_at_merge(host)
            return (host.cmd('query-migrate').get('status') == 'completed'
                    and host.cmd('query-status')['running']
                    and bool(host.seen('RESUME', since)))

        host.wait_until(running, 'the failover')
        host.pump()
        resumed = host.seen('RESUME')[-1]['when']

        def speaks() -> bool:
            if merge:
                self._look_at_merge(host)
            beat = host.console.beat
            return beat is not None and beat.when > resumed

        host.wait_until(speaks, 'the first sign of the guest')
        beat = next(b for b in host.console.beats() if b.when > resumed)
        merged_ms = None
        if merge:
            merged_ms = (self._wait_for_merge(host) - since) * 1000
        return Failover((resumed - since) * 1000,
                        (beat.when - since) * 1000, merged_ms, beat)

    def _look_at_merge(self, host: GuestHost) -> None:
        told = [stats.get('failover') for stats in host.statistics()]
        self.merge.append((time.time(), sum(t['done'] for t in told if t),
                           sum(t['total'] for t in told if t)))

    def _wait_for_merge(self, host: GuestHost) -> float:
        """Wait until the overlays are merged into the disk.

        The merge is a job of the driver's own that query-block-jobs does
        not list.  At its end the disk takes the place of the overlays.
        """
        def merged() -> bool:
            self._look_at_merge(host)
            return all(host.children(f'replication{disk}').get('file')
                       == f'disk{disk}' for disk in self.disks)

        host.wait_until(merged, 'the merge of the overlays')
        return time.time()

    # The end

    def finish(self) -> List[str]:
        """Have the guest check itself and shut down; return its report."""
        host = self.primary
        console = host.console
        console.send('finish')
        if not console.wait_for(lambda: bool(console.lines('CLEAN', 'FAIL'))):
            raise HostError(f'{host.name}: the guest did not report')
        host.wait(timeout=int(STEP_SECONDS))
        # A wrong read counts wherever and whenever it was: the secondary's
        # guest forgets its own at each checkpoint, but has said it.
        wrong = [line for any_host in self.hosts
                 for line in any_host.console.lines('WRONG')]
        status = host.exitcode()
        ended = [f'FAIL QEMU ended with status {status}'] if status else []
        return wrong + ended + console.lines('FAIL', 'SQL', 'REGION', 'CLEAN')

    def images(self) -> List[Path]:
        """Return the survivor's disk images."""
        return [self.primary.path(f'disk{disk}.raw') for disk in self.disks]


def pauses(host: GuestHost, since: float) -> List[Checkpoint]:
    """Return the pauses of a host's guest, from a time on."""
    found: List[Checkpoint] = []
    stopped: Optional[float] = None
    for event in host.events:
        if event['when'] < since:
            continue
        if event['event'] == 'STOP':
            stopped = event['when']
        elif event['event'] == 'RESUME' and stopped is not None:
            found.append(Checkpoint(stopped, event['when']))
            stopped = None
    return found
