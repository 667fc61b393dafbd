# SPDX-License-Identifier: GPL-2.0-or-later
"""One round: a protected guest, a blow to it, and what is left of it."""

import signal
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, Optional

from chaos_plan import Cut, Kind, Moment, RoundPlan
from forms import Form, Synced, SyncError
from guesthost import MIB, STEP_SECONDS, Beat, GuestHost, Setup
from host import HostError, Json
from pair import ColoPair, Failover

EVENT_SECONDS = 60
# The primary is held up for so long at most.
HOLD_UP = 2.0
# How long a host that woke too late stays.
AWAKE = 1.0
# Speed of a slow merge in bytes a second, and for how many seconds: the guest
# dirties the overlays faster than that, so that it would never end.
SLOW = MIB // 16
SLOW_FOR = 4.0
# A copy that is broken off is slow, too; no part of it takes a second.
COPY_SPEED = 16 * MIB
# After these the primary may have gone on alone, and the secondary does, too.
SPLIT = (Kind.MUTE_PRIMARY, Kind.LINK_THEN_PRIMARY, Kind.LINK_EXIT_PRIMARY)


class ChaosPair(ColoPair):
    """A pair whose merge can be slowed down."""

    def __init__(self, setup: Setup, form: Form) -> None:
        super().__init__(setup, form)
        self.merge_slowly = False
        for disk in self.disks:
            self.host_args += ['-object', f'throttle-group,id=speed{disk}']

    def _local_disk(self, image: Path, disk: int) -> Json:
        node = super()._local_disk(image, disk)
        node['file'] = {'driver': 'throttle', 'throttle-group': f'speed{disk}',
                        'file': node['file']}
        return node

    def _limit_writes(self, host: GuestHost, bytes_a_second: int) -> None:
        for disk in self.disks:
            host.cmd('qom-set', {'path': f'/objects/speed{disk}',
                                 'property': 'limits',
                                 'value': {'bps-write': bytes_a_second}})

    def fail_over_to_secondary(self,
                               since: Optional[float] = None) -> Failover:
        """Go on with the secondary, whose disks may be slow for a while."""
        if self.merge_slowly:
            self._limit_writes(self.secondary, SLOW)
        return super().fail_over_to_secondary(since)

    def _wait_for_merge(self, host: GuestHost) -> float:
        if self.merge_slowly:
            let_pass(SLOW_FOR, host)
            self._limit_writes(host, 0)
            self.merge_slowly = False
        return super()._wait_for_merge(host)


@dataclass
class RoundResult:
    """What a round led to."""
    plan: RoundPlan
    checkpoints: int = 0
    running_ms: Optional[float] = None
    synced: Optional[Synced] = None
    wrong: int = 0
    blocks: int = 0
    notes: List[str] = field(default_factory=list)
    problems: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        plan = self.plan
        head = (f'round {plan.index:3}  {plan.kind.value}, '
                f'{plan.moment.value} ({"; ".join(self.notes)}): ')
        if self.running_ms is None:
            return head + f'FAILED, {self.wrong} wrong'
        return head + (f'guest runs after {self.running_ms:.0f} ms, '
                       f'{self.checkpoints} checkpoints, {self.blocks} '
                       f'blocks checked, {self.wrong} wrong')


class Round:
    """Carries out a plan on a pair that has a primary and no secondary."""

    def __init__(self, pair: ChaosPair, plan: RoundPlan) -> None:
        self.pair = pair
        self.plan = plan
        self.result = RoundResult(plan)

    def run(self) -> None:
        """Protect the guest, break something, and look at the survivor."""
        blows: Dict[Kind, Callable[[], Failover]] = {
            Kind.PRIMARY: self._kill_primary,
            Kind.SECONDARY: self._kill_secondary,
            Kind.MUTE_PRIMARY: self._mute_primary,
            Kind.MUTE_SECONDARY: self._mute_secondary,
            Kind.LINK: self._cut_link,
            Kind.LINK_THEN_PRIMARY: self._cut_link_then_kill_primary,
            Kind.LINK_EXIT_PRIMARY: self._kill_primary_at_exit,
        }
        pair = self.pair
        pair.start_secondary()
        if self.plan.moment is Moment.COPYING:
            self._break_copy()
            return
        pair.begin_sync()
        self.result.synced = pair.finish_sync(lambda _parts: None)
        pair.form.discard_peer = False
        self.result.notes.append(f'{self.result.synced.copied // 1024} KiB '
                                 'copied')
        if self.plan.moment is Moment.MIGRATING:
            self._break_migration()
            return
        pair.protect()
        self._await_checkpoints()
        self._reach_moment()
        failover = blows[self.plan.kind]()
        self.result.running_ms = failover.running_ms
        pair.form.discard_peer = self.plan.kind in SPLIT
        self._look_at(pair.primary, failover.beat)

    def _break_copy(self) -> None:
        """Lose the secondary before the guest is protected."""
        pair, victim = self.pair, self.pair.secondary
        pair.begin_sync(COPY_SPEED)
        let_pass(self.plan.delay, pair.primary, victim)
        since = time.time()
        if self.plan.kind is Kind.SECONDARY:
            victim.sigkill()
        elif self.plan.kind is Kind.LINK:
            self._cut()
        else:
            victim.send_signal(signal.SIGSTOP)
            let_pass(self.plan.silence, pair.primary)
            self._yank_links()
        try:
            pair.finish_sync(lambda _parts: None)
            self.result.notes.append('copied before')
        except SyncError as exc:
            self.result.notes.append(str(exc))
        pair.lose_secondary()
        victim.kill()
        self._await_sign(since)

    def _break_migration(self) -> None:
        """Lose the secondary when only its disks are in step."""
        pair, host = self.pair, self.pair.primary
        kill = threading.Timer(self.plan.delay, pair.secondary.sigkill)
        kill.start()
        try:
            pair.protect()
        except HostError as exc:
            self.result.notes.append(str(exc))
        finally:
            kill.join()
        since = pair.secondary.died
        host.wait_until(lambda: host.cmd('query-migrate')['status']
                        in ('failed', 'colo'), 'the end of the migration')
        if host.cmd('query-migrate')['status'] == 'colo':
            self.result.notes.append('COLO had begun')
            pair.fail_over_to_primary()
        else:
            pair.lose_secondary()
        self._await_sign(since)

    def _await_sign(self, since: float) -> None:
        """The guest has to go on, with all that it had."""
        host, console = self.pair.primary, self.pair.primary.console
        host.wait_until(
            lambda: console.beat is not None and console.beat.when > since,
            'a sign of the guest')
        first = next(beat for beat in console.beats() if beat.when > since)
        self.result.running_ms = (first.when - since) * 1000
        self._look_at(host, first)

    # Up to the blow

    def _step(self, host: GuestHost, wait: float) -> None:
        """Wait for an event of a host, or less; both hosts must be well."""
        host.pump(wait)
        for each in (self.pair.primary, self.pair.secondary):
            each.pump()
            each.check_alive('the blow')
            if each.seen('COLO_EXIT', self.pair.protected_at):
                raise HostError(f'{each.name}: COLO ended by itself')

    def _await_checkpoints(self) -> None:
        deadline = time.monotonic() + STEP_SECONDS
        while len(self.pair.checkpoints()) < self.plan.checkpoints:
            if time.monotonic() > deadline:
                raise HostError('there were no checkpoints')
            self._step(self.pair.primary, 0.5)

    def _reach_moment(self) -> None:
        primary, secondary = self.pair.primary, self.pair.secondary
        host, name = {
            Moment.BETWEEN: (primary, 'RESUME'),
            Moment.SECONDARY_STOPS: (secondary, 'STOP'),
            Moment.PRIMARY_STOPS: (primary, 'STOP'),
            Moment.SECONDARY_RESUMES: (secondary, 'RESUME'),
            Moment.PRIMARY_RESUMES: (primary, 'RESUME'),
            Moment.SLOW_MERGE: (primary, 'RESUME'),
        }[self.plan.moment]
        since = time.time()
        deadline = time.monotonic() + EVENT_SECONDS
        while not host.seen(name, since):
            if time.monotonic() > deadline:
                raise HostError(f'{host.name}: no {name} event')
            self._step(host, 0.5)
        let_pass(self.plan.delay, host)

    def _note_state(self) -> None:
        """Note in which state the blow met the two guests."""
        if self.plan.moment is Moment.COPYING:
            return
        states = []
        for name, host in (('primary', self.pair.primary),
                           ('secondary', self.pair.secondary)):
            host.pump()
            last = [event['event'] for event in host.events
                    if event['event'] in ('STOP', 'RESUME')][-1]
            states.append(f'{name} {"stopped" if last == "STOP" else "runs"}')
        self.result.notes.append(', '.join(states))
        self.result.checkpoints = len(self.pair.checkpoints())

    # Going on after it

    def _to_secondary(self, since: Optional[float] = None) -> Failover:
        pair = self.pair
        pair.primary.pump()
        done = pair.checkpoints()
        self.result.checkpoints = len(done)
        safe = pair.primary.console.last_before(done[-1].stopped)
        failover = pair.fail_over_to_secondary(since)
        self._demand_kept(failover, safe)
        return failover

    def _to_primary(self, since: Optional[float] = None) -> Failover:
        pair = self.pair
        safe = pair.primary.console.beat
        failover = pair.fail_over_to_primary(since)
        self._demand_kept(failover, safe)
        return failover

    def _demand_kept(self, failover: Failover, safe: Optional[Beat]) -> None:
        if safe and failover.beat.tx < safe.tx:
            self.result.problems.append(
                f'the survivor knows {failover.beat.tx} transactions, but '
                f'{safe.tx} were safe')

    # The blows

    def _kill_primary(self) -> Failover:
        pair, slow = self.pair, self.plan.moment is Moment.SLOW_MERGE
        pair.primary.sigkill()
        self._note_state()
        pair.merge_slowly = slow
        failover = self._to_secondary()
        last = pair.primary.console.beat
        if slow and last and failover.merged_ms:
            self.result.notes.append(
                f'merged after {failover.merged_ms / 1000:.1f} s beside '
                f'{last.writes - failover.beat.writes} writes of the guest')
        return failover

    def _kill_secondary(self) -> Failover:
        self.pair.secondary.sigkill()
        self._note_state()
        return self._to_primary()

    def _mute_primary(self) -> Failover:
        pair, victim = self.pair, self.pair.primary
        victim.send_signal(signal.SIGSTOP)
        since = time.time()
        self._note_state()
        let_pass(self.plan.silence, pair.secondary)
        # Within a checkpoint the secondary reads the memory from it, under the
        # lock that its monitor needs for all else.
        pair.secondary.yank([{'type': 'migration'}])
        failover = self._to_secondary(since)
        self._end_silence(victim)
        return failover

    def _mute_secondary(self) -> Failover:
        pair, victim = self.pair, self.pair.secondary
        victim.send_signal(signal.SIGSTOP)
        since = time.time()
        self._note_state()
        let_pass(self.plan.silence, pair.primary)
        # Its connections are alive: without this the guest's writes would
        # wait for it.
        self._yank_links({'type': 'migration'})
        failover = self._to_primary(since)
        self._end_silence(victim)
        return failover

    def _yank_links(self, *more: Json) -> None:
        self.pair.primary.yank(
            [{'type': 'block-node', 'node-name': f'link{disk}'}
             for disk in self.pair.disks] + list(more))

    def _end_silence(self, victim: GuestHost) -> None:
        """A host that was given up may wake up, and dies."""
        if self.plan.wakes:
            victim.send_signal(signal.SIGCONT)
            let_pass(AWAKE, victim, self.pair.primary)
            victim.cmd('query-status')
            self._put_down(victim)
            self.result.notes.append('the silent host woke up')
        else:
            victim.sigkill()

    @staticmethod
    def _put_down(host: GuestHost) -> None:
        """Kill a host that must have been alive until now."""
        host.check_alive('its death')
        host.sigkill()

    def _cut(self) -> float:
        """Cut the link that carries the disk writes; return when."""
        pair, cut = self.pair, self.plan.cut
        self._note_state()
        self.result.notes.append(f'by {cut.value}')
        since = time.time()
        if cut is Cut.YANK:
            pair.primary.yank([{'type': 'block-node',
                                'node-name': f'link{self.plan.disk}'}])
        elif self.plan.held_up:
            self._hold_up_primary(self._cut_at_secondary)
        else:
            self._cut_at_secondary()
        return since

    def _cut_at_secondary(self) -> None:
        if self.plan.cut is Cut.SERVER:
            self.pair.stop_exports()
        else:
            self.pair.secondary.cmd('block-export-del', mode='hard',
                                    id=f'export-disk{self.plan.disk}')

    def _hold_up_primary(self, action: Callable[[], None]) -> None:
        """Do something while the primary stands still.

        Not for long: a secondary that is reading a checkpoint from it answers
        no command until it has got that.
        """
        primary = self.pair.primary
        release = threading.Timer(HOLD_UP, primary.send_signal,
                                  [signal.SIGCONT])
        primary.send_signal(signal.SIGSTOP)
        release.start()
        try:
            action()
        finally:
            release.cancel()
            release.join()
            primary.send_signal(signal.SIGCONT)
        self.result.notes.append('the primary held up')

    def _await_exit(self, since: float) -> float:
        """Wait until COLO ends on a host; return when."""
        pair = self.pair
        deadline = time.monotonic() + EVENT_SECONDS
        while time.monotonic() < deadline:
            for name, host in (('primary', pair.primary),
                               ('secondary', pair.secondary)):
                host.check_alive('the end of COLO')
                ended = host.seen('COLO_EXIT', since)
                if ended:
                    self.result.notes.append(f'COLO_EXIT on the {name}')
                    when: float = ended[0]['when']
                    return when
            let_pass(0.1, pair.primary, pair.secondary)
        raise HostError(f'COLO went on for {EVENT_SECONDS} s without the link')

    def _cut_link(self) -> Failover:
        victim = self.pair.secondary
        failover = self._to_primary(self._await_exit(self._cut()))
        self._put_down(victim)
        return failover

    def _cut_link_then_kill_primary(self) -> Failover:
        victim = self.pair.primary
        self._cut()
        let_pass(self.plan.gap, victim, self.pair.secondary)
        self._put_down(victim)
        return self._to_secondary()

    def _kill_primary_at_exit(self) -> Failover:
        victim = self.pair.primary
        self._await_exit(self._cut())
        self._put_down(victim)
        return self._to_secondary()

    # Afterwards

    def _look_at(self, host: GuestHost, first: Beat) -> None:
        """Have the survivor's guest check all that it ever wrote."""
        self.result.blocks = self.pair.check()
        # It must be able to write, too.
        host.wait_until(lambda: bool(
            host.console.beat and host.console.beat.writes > first.writes
            and host.console.beat.tx > first.tx + 1), "the survivor's work")
        self.result.problems += self.pair.complaints()


def let_pass(seconds: float, *hosts: GuestHost) -> None:
    """Take the events of some hosts for some time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        hosts[0].pump(end - time.monotonic())
        for host in hosts[1:]:
            host.pump()
