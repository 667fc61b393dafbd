# SPDX-License-Identifier: GPL-2.0-or-later
"""Two QEMU processes with COLO between them, and what one does with them.

The survivor of one pair is the primary of the next, for which
start_secondary(), sync() and protect() are called again.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Tuple

import nodes
from forms import Form, Progress, Synced
from guesthost import (CHECK_SECONDS, MIB, POLL, STEP_SECONDS, Beat,
                       GuestHost, Setup, fields)
from host import HostError, Json

# Called again and again while something takes its time
Tell = Callable[[], None]
# Unlimited: the guest must not wait for a migration that is throttled.
BANDWIDTH = 1 << 40
# What a replica lacks is known in blocks of so many bytes
NOTED = 64 * 1024
# What the metadata of a disk takes, however large that is
METADATA = MIB
# How often the primary is asked how far the secondary is behind, in seconds.
LOOK_EVERY = 0.1


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


@dataclass(frozen=True)
class Look:
    """What the primary told at a time, in bytes of all disks."""
    when: float
    # on the way to the secondary
    pending: int
    # what the secondary does not have
    lacking: int


class ColoPair:
    """A protected VM: the host that runs it and the one that stands by."""

    def __init__(self, setup: Setup, form: Form) -> None:
        self.setup = setup
        self.form = form
        self.hosts: List[GuestHost] = []
        self._primary: Optional[GuestHost] = None
        self._secondary: Optional[GuestHost] = None
        # The host that died last; if it was the secondary, does the primary
        # know what its disks lack?
        self._lost: Optional[GuestHost] = None
        self._knows = False
        self.protected_at = 0.0
        # what each QEMU gets besides
        self.host_args: List[str] = []
        self._exporting = False
        self.looks: List[Look] = []
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
            host.kill()

    # Both hosts, before protection

    def _new_host(self, images: List[Path], secondary: bool) -> GuestHost:
        """Start a host, with images of another or new ones."""
        name = self._name(images)
        folder = self.setup.folder / name
        folder.mkdir()
        images = images or [self._new_image(folder, disk)
                            for disk in self.disks]
        made = [self._nodes(folder, image, disk, secondary)
                for disk, image in enumerate(images)]
        self.hosts.append(GuestHost(self.setup, name, made, images,
                                    secondary, self.host_args))
        return self.hosts[-1]

    def _name(self, images: List[Path]) -> str:
        """A host that comes back has its old name, and a number."""
        if not images:
            return f'host{len({h.images[0] for h in self.hosts}) + 1}'
        lives = sum(host.images == images for host in self.hosts)
        return f'{images[0].parent.name}-{lives + 1}'

    def _new_image(self, folder: Path, disk: int) -> Path:
        path = folder / f'disk{disk}.raw'
        nodes.sparse(path, self.setup.disks.size)
        nodes.sparse(metadata(path), METADATA)
        return path

    def _local_disk(self, image: Path, disk: int) -> Json:
        return nodes.image('raw', f'disk{disk}', nodes.file(image))

    def _overlay(self, path: Path, name: str, backing: str,
                 options: str = '') -> Json:
        nodes.create(self.setup.build, path, self.setup.disks.size, options)
        return nodes.image('qcow2', name, nodes.file(path), backing=backing)

    def _nodes(self, folder: Path, image: Path, disk: int,
               secondary: bool) -> List[Json]:
        local = self._local_disk(image, disk)
        root = (self.form.secondary_root if secondary else
                self.form.primary_root)(disk)
        if self.form.has_metadata:
            return [local, nodes.file(metadata(image), **{
                'node-name': f'meta{disk}'}), root]
        if not secondary:
            return [local, root]
        return [local,
                self._overlay(folder / f'hidden{disk}.qcow2',
                              f'hidden{disk}', f'disk{disk}'),
                self._overlay(folder / f'active{disk}.qcow2',
                              f'active{disk}', f'hidden{disk}',
                              nodes.RECOMMENDED_ACTIVE),
                nodes.secondary(f'replication{disk}', root['node-name'],
                                f'active{disk}'), root]

    def start_primary(self, tell: Tell = lambda: None) -> None:
        """Boot the guest, not protected yet, and wait for it to work."""
        host = self._primary = self._new_host([], False)

        def works() -> bool:
            tell()
            beat = host.console.beat
            return beat is not None and beat.ready and beat.tx > 0

        host.wait_until(works, "the guest's start", CHECK_SECONDS)

    def start_secondary(self) -> None:
        """Start the host that stands by, with its disks exported.

        They are those of the last one, if it is known what these lack.
        """
        for dead in self.hosts:
            if dead is not self.primary:
                dead.kill()
        known = self._knows and self.form.keeps_disk
        images = self._lost.images if self._lost and (
            known or self.form.has_metadata) else []
        host = self._secondary = self._new_host(images, True)
        host.serve()
        for disk in self.disks:
            for name, node in self.form.exports(disk).items():
                host.export(node, name)
        self._exporting = True
        self._enable_colo(host)
        host.cmd('migrate-incoming', uri=f'unix:{host.path("ram.sock")}')

    @staticmethod
    def _enable_colo(host: GuestHost) -> None:
        host.cmd('migrate-set-capabilities', capabilities=[
            {'capability': 'x-colo', 'state': True},
            {'capability': 'events', 'state': True}])

    # From a running guest to a protected one

    def begin_sync(self, speed: int = 0) -> None:
        """Begin to bring the secondary's disks in step while the guest writes.

        At most so many bytes a second are copied, if there is a limit.
        """
        self.look()
        self.form.begin_sync(self.primary, self.secondary.socket,
                             self._knows and self.form.keeps_disk, speed)

    def finish_sync(self, progress: Progress) -> Synced:
        """Wait until they are, and will be from now on."""
        def look(done: Sequence[float]) -> None:
            self.look()
            progress(done)

        synced = self.form.finish_sync(self.primary, look)
        self._knows = True
        return synced

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
            self.look()
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
            self.look()
            self.primary.console.wait(POLL)

    def look(self) -> None:
        """Note what the primary tells, unless that was noted just now."""
        now = time.time()
        if not self.looks or now >= self.looks[-1].when + LOOK_EVERY:
            self.looks.append(Look(now, self._sum('pending-memory'),
                                   self.lacking()))

    def lacking(self) -> int:
        """How many bytes the secondary may lack, as far as that is told."""
        return self._sum('out-of-sync-bytes')

    def _sum(self, name: str) -> int:
        return sum(stats.get(name, 0) for stats in self.primary.statistics())

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
        # First the guest: the node cuts off whoever writes to its disk.
        host.cmd('x-colo-lost-heartbeat')
        self.stop_exports()
        self._primary, self._secondary = host, None
        self._lost, self._knows = dead, False
        return self._wait_for_failover(host, since or dead.died, merge=True)

    def fail_over_to_primary(self, since: Optional[float] = None) -> Failover:
        """Go on with the primary after the secondary's death.

        As for fail_over_to_secondary(), it may be given up in another way.
        """
        host, dead = self.primary, self.secondary
        # First the guest: a checkpoint that will never end may hold it.
        host.cmd('x-colo-lost-heartbeat')
        result = self._wait_for_failover(host, since or dead.died,
                                         merge=False)
        self.lose_secondary()
        return result

    def lose_secondary(self) -> None:
        """Let go of a secondary."""
        self._lost, self._secondary = self.secondary, None
        self.form.let_go(self.primary)

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
        told = [stats['failover'] for stats in host.statistics()
                if 'failover' in stats]
        if told:
            self.merge.append((time.time(), sum(t['done'] for t in told),
                               sum(t['total'] for t in told)))

    def _wait_for_merge(self, host: GuestHost) -> float:
        """Wait until the overlays are merged into the disk.

        The merge is a job of the driver's own that query-block-jobs does
        not list.  At its end the disk takes the place of the overlays.
        """
        def merged() -> bool:
            self._look_at_merge(host)
            return len(done()) == len(self.disks)

        def done() -> List[float]:
            return [event['when'] for event
                    in host.seen('REPLICATION_STAGE_CHANGE')
                    if event['data']['stage'] == self.form.merged()]

        # that it has not ended is no reason to wait
        self.form.promoted(host)
        host.wait_until(merged, 'the merge of the overlays')
        # how much it was is known for sure when it has ended
        self._look_at_merge(host)
        return max(done())

    # What the guest does, and finds

    def wrote(self) -> int:
        """How much of the disks the guest has written so far, at most.

        In bytes, in the blocks in which is noted what a replica lacks.
        """
        return (self._counted('wr_bytes')
                + 2 * NOTED * self._counted('wr_operations'))

    def filled(self) -> float:
        """How much of its disks a guest that boots has filled, at most."""
        disks = self.setup.disks
        return min(self._counted('wr_bytes')
                   / (disks.count * disks.size - disks.fs_size), 1)

    def _counted(self, what: str) -> int:
        return sum(device['stats'][what]
                   for device in self.primary.cmd('query-blockstats'))

    def check(self) -> int:
        """Have the guest check all that it ever wrote, and go on.

        Returns how many blocks that were.
        """
        host, console = self.primary, self.primary.console
        before = len(console.lines('CHECKED'))
        console.send('check')
        host.wait_until(lambda: len(console.lines('CHECKED')) > before,
                        "the guest's check", CHECK_SECONDS)
        return int(fields(console.lines('CHECKED')[-1])['blocks'])

    def complaints(self) -> List[str]:
        """Return the lines in which a guest says that something is wrong."""
        return [f'{host.name}: the guest says: {line}' for host in self.hosts
                for line in host.console.lines('FAIL', 'WRONG', 'SQL')
                if not line.startswith('SQL')
                or fields(line).get('integrity') != 'ok']

    @property
    def wrong(self) -> int:
        """The wrong blocks that any guest of the pair has seen.

        A guest tells of the first few and counts the rest.
        """
        consoles = [host.console for host in self.hosts]
        told = sum(len(console.lines('WRONG')) for console in consoles)
        return max([told, *(beat.wrong for console in consoles
                            for beat in console.beats())])

    # The end

    def finish(self, tell: Tell = lambda: None) -> List[str]:
        """Have the guest check itself and shut down; return its report."""
        host = self.primary
        console = host.console
        console.send('finish')
        end = time.monotonic() + CHECK_SECONDS
        over = False
        while not console.lines('CLEAN', 'FAIL'):
            if over:
                raise HostError(f'{host.name}: the guest did not report')
            tell()
            console.wait(POLL)
            over = not host.is_running() or time.monotonic() > end
            if over:
                # its last line, if there is one, comes before the end
                console.close()
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
        return self.primary.images


def metadata(image: Path) -> Path:
    """Where the metadata of a disk is."""
    return image.with_suffix('.meta')


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
