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

from console import Beat
from guest import run_tool
from machine import Json, PairError, POLL, STEP_TIMEOUT, Setup, Side, top

# The secondary's guest writes new blocks of it at nearly the speed of a plain
# disk then.  The hidden overlay is better off without.
ACTIVE_OPTIONS = ('-o', 'extended_l2=on,cluster_size=128k')
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


def nbd_node(name: str, socket: Path, export: str) -> Json:
    """Return the options of an NBD client."""
    return {'driver': 'nbd', 'node-name': name, 'export': export,
            'server': {'type': 'unix', 'path': str(socket)}}


def quorum_node(disk: int, child: str) -> Json:
    """Return the options of a disk's root node."""
    return {'driver': 'quorum', 'node-name': top(disk),
            'read-pattern': 'fifo', 'vote-threshold': 1, 'children': [child]}


class ColoPair:
    """A protected VM: the side that runs it and the one that stands by."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.sides: List[Side] = []
        self._primary: Optional[Side] = None
        self._secondary: Optional[Side] = None
        self.protected_at = 0.0
        # Memory for writes that are not on the secondary yet, unless it is
        # the default; sync() takes it
        self.write_behind: Optional[int] = None
        self._sync_began = 0.0
        self._exporting = False
        # when, and how many bytes the secondary did not have then
        self.lag: List[Tuple[float, int]] = []
        # when, and how many bytes were merged, of how many
        self.merge: List[Tuple[float, int, int]] = []

    @property
    def primary(self) -> Side:
        """The side that runs the VM."""
        if self._primary is None:
            raise PairError('there is no primary')
        return self._primary

    @property
    def secondary(self) -> Side:
        """The side that stands by."""
        if self._secondary is None:
            raise PairError('there is no secondary')
        return self._secondary

    @property
    def disks(self) -> range:
        """The numbers of the disks."""
        return range(self.setup.layout.disks)

    def close(self) -> None:
        """End both QEMUs, whatever they do."""
        for side in self.sides:
            side.end()

    # Both sides, before protection

    def _new_side(self) -> Side:
        side = Side(self.setup, f'host{len(self.sides) + 1}')
        self.sides.append(side)
        return side

    def _own_disk(self, side: Side, disk: int) -> Json:
        path = side.path(f'disk{disk}.raw')
        with path.open('wb') as image:
            image.truncate(self.setup.layout.disk_size)
        return {'driver': 'raw', 'node-name': f'disk{disk}',
                'file': {'driver': 'file', 'filename': str(path)}}

    def _overlay(self, side: Side, name: str, backing: str,
                 options: Sequence[str] = ()) -> Json:
        path = side.path(f'{name}.qcow2')
        run_tool([self.setup.tool('qemu-img'), 'create', '-q', '-f', 'qcow2',
                  *options, str(path), str(self.setup.layout.disk_size)])
        return {'driver': 'qcow2', 'node-name': name, 'backing': backing,
                'file': {'driver': 'file', 'filename': str(path)}}

    def start_primary(self) -> None:
        """Boot the guest, not protected yet."""
        side = self._new_side()
        nodes: List[Json] = []
        for disk in self.disks:
            nodes += [self._own_disk(side, disk),
                      quorum_node(disk, f'disk{disk}')]
        side.launch(nodes, incoming=False)
        self._primary = side

    def wait_for_work(self) -> None:
        """Wait until the guest does its work."""
        side = self.primary

        def ready() -> bool:
            beat = side.console.beat
            return beat is not None and beat.ready and beat.tx > 0

        side.wait_until(ready, "the guest's start")

    def start_secondary(self) -> None:
        """Start the side that stands by, with its disks exported."""
        side = self._new_side()
        nodes: List[Json] = []
        for disk in self.disks:
            nodes += [self._own_disk(side, disk),
                      self._overlay(side, f'hidden{disk}', f'disk{disk}'),
                      self._overlay(side, f'active{disk}', f'hidden{disk}',
                                    ACTIVE_OPTIONS),
                      {'driver': 'replication', 'mode': 'secondary',
                       'node-name': f'replication{disk}',
                       'top-id': top(disk), 'file': f'active{disk}'},
                      quorum_node(disk, f'replication{disk}')]
        side.launch(nodes, incoming=True)
        self._secondary = side

        side.cmd('nbd-server-start', addr={
            'type': 'unix', 'data': {'path': str(side.path('nbd.sock'))}})
        for disk in self.disks:
            side.cmd('block-export-add', type='nbd', id=f'export{disk}',
                     node_name=f'disk{disk}', name=f'disk{disk}',
                     writable=True)
        self._exporting = True
        self._enable_colo(side)
        side.cmd('migrate-incoming', uri=f'unix:{side.path("ram.sock")}')

    @staticmethod
    def _enable_colo(side: Side) -> None:
        side.cmd('migrate-set-capabilities', capabilities=[
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
        side = self.primary
        self._sync_began = time.time()
        socket = self.secondary.path('nbd.sock')
        for disk in self.disks:
            side.cmd('blockdev-add',
                     nbd_node(f'sync-link{disk}', socket, f'disk{disk}'))
            side.cmd('blockdev-mirror', job_id=f'sync{disk}',
                     device=top(disk), target=f'sync-link{disk}',
                     sync='full', copy_mode='write-blocking',
                     filter_node_name=f'sync-filter{disk}')
        side.wait_until(lambda: self._mirrored(progress), 'the disk sync')
        for disk in self.disks:
            side.cmd('blockdev-add',
                     nbd_node(f'link{disk}', socket, f'disk{disk}'))
            side.cmd('blockdev-add', self._forward_node(disk))
            side.cmd('x-blockdev-change', parent=top(disk),
                     node=f'forward{disk}')
        self._end_mirrors(side)

    def _forward_node(self, disk: int) -> Json:
        node = {'driver': 'replication', 'mode': 'primary',
                'node-name': f'forward{disk}', 'file': f'link{disk}'}
        if self.write_behind is None:
            return node
        return {**node, 'write-behind': self.write_behind}

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

    def _check_mirrors(self, side: Side) -> None:
        for event in side.seen('BLOCK_JOB_COMPLETED', self._sync_began):
            if 'error' in event['data']:
                raise PairError(f'{side.name}: the disk sync failed: '
                                f'{event["data"]["error"]}')

    def _end_mirrors(self, side: Side) -> None:
        for disk in self.disks:
            side.cmd('block-job-cancel', device=f'sync{disk}')
        side.wait_until(lambda: not side.cmd('query-block-jobs'),
                        'the end of the disk sync')
        side.pump()
        self._check_mirrors(side)
        for disk in self.disks:
            side.cmd('blockdev-del', node_name=f'sync-link{disk}')

    def protect(self) -> Checkpoint:
        """Migrate the memory and start COLO; return the pause it took."""
        side = self.primary
        start = time.time()
        self._enable_colo(side)
        side.cmd('migrate-set-parameters', max_bandwidth=BANDWIDTH,
                 x_checkpoint_delay=self.setup.checkpoint_ms)
        side.cmd('migrate', uri=f'unix:{self.secondary.path("ram.sock")}')

        def in_colo() -> bool:
            state = side.cmd('query-migrate')
            if state['status'] == 'failed':
                raise PairError(f'{side.name}: migration failed: '
                                f'{state.get("error-desc", "no reason")}')
            self.secondary.pump()
            return (state['status'] == 'colo'
                    and bool(side.seen('RESUME', start)))

        side.wait_until(in_colo, 'the migration of the memory')
        switch = pauses(side, start)[0]
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
            if time.monotonic() > end + STEP_TIMEOUT:
                raise PairError('there was no checkpoint')
            for side in (self.primary, self.secondary):
                side.check_alive('the end of the protected time')
                side.pump()
                if side.seen('COLO_EXIT', self.protected_at):
                    raise PairError(f'{side.name}: COLO ended by itself')
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

    # One side dies

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
        side, dead = self.secondary, self.primary
        # Nobody may write to the disk that the failover merges into.
        self.stop_exports()
        side.cmd('x-colo-lost-heartbeat')
        self._primary, self._secondary = side, None
        return self._wait_for_failover(side, since or dead.died(), merge=True)

    def fail_over_to_primary(self, since: Optional[float] = None) -> Failover:
        """Go on with the primary after the secondary's death.

        As for fail_over_to_secondary(), it may be given up in another way.
        """
        side, dead = self.primary, self.secondary
        # First the guest: a checkpoint that will never end may hold it.
        side.cmd('x-colo-lost-heartbeat')
        self._secondary = None
        result = self._wait_for_failover(side, since or dead.died(),
                                         merge=False)
        self._cut_links(side)
        return result

    def give_up_secondary(self) -> None:
        """Go on without a secondary that died before protect() was done."""
        side = self.primary
        self._secondary = None
        for job in side.cmd('query-block-jobs'):
            side.cmd('block-job-cancel', device=job['device'], force=True)
        side.wait_until(lambda: not side.cmd('query-block-jobs'),
                        'the end of the disk sync')
        self._cut_links(side)

    def _cut_links(self, side: Side) -> None:
        """Take the secondary out of the primary's graph."""
        nodes = [node['node-name'] for node in
                 side.cmd('query-named-block-nodes', flat=True)]
        for disk in self.disks:
            for name, node in side.children(top(disk)).items():
                if node == f'forward{disk}':
                    side.cmd('x-blockdev-change', parent=top(disk),
                             child=name)
            for node in (f'forward{disk}', f'link{disk}', f'sync-link{disk}'):
                if node in nodes:
                    side.cmd('blockdev-del', node_name=node)

    def _wait_for_failover(self, side: Side, since: float,
                           merge: bool) -> Failover:
        def running() -> bool:
            if merge:
                self._look_at_merge(side)
            return (side.cmd('query-migrate').get('status') == 'completed'
                    and side.cmd('query-status')['running']
                    and bool(side.seen('RESUME', since)))

        side.wait_until(running, 'the failover')
        side.pump()
        resumed = side.seen('RESUME')[-1]['when']

        def speaks() -> bool:
            if merge:
                self._look_at_merge(side)
            beat = side.console.beat
            return beat is not None and beat.when > resumed

        side.wait_until(speaks, 'the first sign of the guest')
        beat = next(b for b in side.console.beats() if b.when > resumed)
        merged_ms = None
        if merge:
            merged_ms = (self._wait_for_merge(side) - since) * 1000
        return Failover((resumed - since) * 1000,
                        (beat.when - since) * 1000, merged_ms, beat)

    def _look_at_merge(self, side: Side) -> None:
        told = [stats.get('failover') for stats in side.statistics()]
        self.merge.append((time.time(), sum(t['done'] for t in told if t),
                           sum(t['total'] for t in told if t)))

    def _wait_for_merge(self, side: Side) -> float:
        """Wait until the overlays are merged into the disk.

        The merge is a job of the driver's own that query-block-jobs does
        not list.  At its end the disk takes the place of the overlays.
        """
        def merged() -> bool:
            self._look_at_merge(side)
            return all(side.children(f'replication{disk}').get('file')
                       == f'disk{disk}' for disk in self.disks)

        side.wait_until(merged, 'the merge of the overlays')
        return time.time()

    # The end

    def finish(self) -> List[str]:
        """Have the guest check itself and shut down; return its report."""
        side = self.primary
        console = side.console
        console.send('finish')
        if not console.wait_for(lambda: bool(console.lines('CLEAN')
                                             or console.lines('FAIL')),
                                STEP_TIMEOUT):
            raise PairError(f'{side.name}: the guest did not report within '
                            f'{STEP_TIMEOUT} s')
        side.vm.wait(timeout=STEP_TIMEOUT)
        # A wrong read counts wherever and whenever it was: the secondary's
        # guest forgets its own at each checkpoint, but has said it.
        wrong = [line for any_side in self.sides
                 for line in any_side.console.lines('WRONG')]
        status = side.vm.exitcode()
        ended = [f'FAIL QEMU ended with status {status}'] if status else []
        return wrong + ended + [line for word in ('FAIL', 'SQL', 'REGION',
                                                  'CLEAN')
                                for line in console.lines(word)]

    def images(self) -> List[Path]:
        """Return the survivor's disk images."""
        return [self.primary.path(f'disk{disk}.raw') for disk in self.disks]


def pauses(side: Side, since: float) -> List[Checkpoint]:
    """Return the pauses of a side's guest, from a time on."""
    found: List[Checkpoint] = []
    stopped: Optional[float] = None
    for event in side.events:
        if event['when'] < since:
            continue
        if event['event'] == 'STOP':
            stopped = event['when']
        elif event['event'] == 'RESUME' and stopped is not None:
            found.append(Checkpoint(stopped, event['when']))
            stopped = None
    return found
