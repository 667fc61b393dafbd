# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's story: protect a running VM, kill one side, judge the other."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

from console import Beat
from guest import get_guest
from machine import Layout, MIB, PairError, Setup, Side, kvm_works
from pair import Checkpoint, ColoPair, Failover
from picture import Timeline, Work, draw
from screen import Screen
from verify import Verdict, judge

LOG_TAIL = 15
PROBLEMS = 8


@dataclass
class Outcome:
    """The numbers that a failover leaves for the verdict."""
    victim: Side
    failover: Failover
    before: Beat
    safe: Beat
    checkpoints: List[Checkpoint]

    @property
    def kept(self) -> bool:
        """Whether the survivor knows all that the last checkpoint held."""
        return self.failover.beat.tx >= self.safe.tx


class Story:
    """One run of the demo."""

    def __init__(self, options: argparse.Namespace, work: Path,
                 screen: Screen) -> None:
        self.options = options
        self.work = work
        self.screen = screen
        self.pair: Optional[ColoPair] = None
        self._began = time.time()
        self._sync = (0.0, 0.0)

    def run(self) -> bool:
        """Tell it all; return whether nothing was lost."""
        pair = ColoPair(self._setup())
        self.pair = pair
        self._boot(pair)
        self._protect(pair)
        outcome = self._kill(pair)
        self._go_on(pair)
        ended = time.time()
        verdict = self._judge(pair, outcome)
        self._draw(pair, verdict, outcome, ended)
        self._show(verdict, outcome)
        return not verdict.problems

    def close(self) -> None:
        """End what runs."""
        if self.pair is not None:
            self.pair.close()

    def _setup(self) -> Setup:
        options, screen = self.options, self.screen
        for name in ('qemu-system-x86_64', 'qemu-img'):
            if not (options.build_dir / name).exists():
                raise PairError(f'there is no {name} in {options.build_dir}')
        guest = get_guest(options.cache,
                          lambda text: screen.say('guest', text))
        accel = options.accel
        if accel == 'auto':
            accel = 'kvm' if kvm_works() else 'tcg'
        layout = Layout(disks=options.disks)
        screen.say('setup', f'two QEMUs ({accel.upper()}), '
                   f'{layout.disks} x {layout.disk_size // MIB} MiB disk, '
                   f'Linux {guest.version}')
        return Setup(build_dir=options.build_dir, guest=guest,
                     work_dir=self.work, layout=layout, accel=accel,
                     checkpoint_ms=options.checkpoint_ms)

    def _boot(self, pair: ColoPair) -> None:
        self.screen.say('primary', 'booting the guest, not protected yet')
        pair.start_primary()
        pair.wait_for_work()
        self.screen.say('guest', 'at work: SQLite on ext4, numbered blocks '
                        'beside it')
        pair.start_secondary()
        self.screen.say('secondary', 'up, exports its disks by NBD')

    def _protect(self, pair: ColoPair) -> None:
        screen = self.screen
        screen.say('sync', 'copying the disks while the guest writes')
        sync_began = time.time()
        pair.sync(lambda parts: screen.progress('sync', parts))
        self._sync = (sync_began, time.time())
        screen.say('sync', 'disks equal, every write is forwarded')
        screen.say('guest', work_line(last_beat(pair.primary)))
        switch = pair.protect()
        screen.say('memory', 'migrated with x-colo, pause '
                   f'{switch.pause_ms:.0f} ms; protected from now on')
        count = 0

        def tell(checkpoint: Checkpoint) -> None:
            nonlocal count
            count += 1
            beat = last_beat(pair.primary)
            screen.say('checkpoint', f'{count:3}  pause '
                       f'{checkpoint.pause_ms:4.0f} ms   {work_line(beat)}')

        pair.watch(self.options.seconds, tell)

    def _kill(self, pair: ColoPair) -> Outcome:
        screen = self.screen
        victim, other = pair.primary, pair.secondary
        if self.options.kill == 'secondary':
            victim, other = other, victim
        done = pair.checkpoints()
        before = last_beat(pair.primary)
        safe = pair.primary.console.last_before(done[-1].stopped) or before
        victim.sigkill()
        screen.say('KILL', f'SIGKILL to the {self.options.kill} '
                   f'({victim.name})')
        if self.options.kill == 'primary':
            failover = pair.fail_over_to_secondary()
        else:
            failover = pair.fail_over_to_primary()
        screen.say('failover', f'guest runs on {other.name} '
                   f'{failover.running_ms:.0f} ms after the kill, first '
                   f'output after {failover.output_ms:.0f} ms')
        if failover.merged_ms is not None:
            screen.say('failover', 'overlays merged into the disk within '
                       f'{failover.merged_ms:.0f} ms of the kill')
        return Outcome(victim, failover, before, safe, done)

    def _go_on(self, pair: ColoPair) -> None:
        side = pair.primary
        enough: int = last_beat(side).number + 10 * self.options.after

        side.wait_until(lambda: last_beat(side).number >= enough,
                        'the time after the failover')
        self.screen.say('guest', work_line(last_beat(side)))
        self.screen.say('guest', 'told to check all it wrote and shut down')

    def _judge(self, pair: ColoPair, outcome: Outcome) -> Verdict:
        report = pair.finish()
        self.screen.say('host', 'checks the image of the survivor')
        verdict = judge(report, pair.images(), pair.setup.layout, self.work)
        verdict.demand(
            outcome.kept, 'the survivor took over at an older state than that '
            'of the last checkpoint')
        return verdict

    def _draw(self, pair: ColoPair, verdict: Verdict, outcome: Outcome,
              ended: float) -> None:
        """Leave a picture of it."""
        failover = outcome.failover
        killed = outcome.victim.died()

        def after(milliseconds: float) -> float:
            return killed + milliseconds / 1000

        timeline = Timeline(
            victim=outcome.victim.name, survivor=pair.primary.name,
            killed_side=self.options.kill, began=self._began,
            sync=self._sync, protected=pair.protected_at, killed=killed,
            running=after(failover.running_ms),
            first_output=after(failover.output_ms), ended=ended,
            merged=None if failover.merged_ms is None
            else after(failover.merged_ms),
            checkpoints=[(c.stopped, c.resumed) for c in outcome.checkpoints],
            work={side.name: [Work(beat.when, beat.tx)
                              for beat in side.console.beats()
                              if beat.when <= ended] for side in pair.sides},
            lag=pair.lag, merge=pair.merge, safe=outcome.safe.tx,
            taken_over=failover.beat.tx, at_end=verdict.rows,
            checked=verdict.blocks,
            host_checked=verdict.host_blocks,
            wrong=verdict.wrong + verdict.host_wrong,
            problems=verdict.problems)
        self.options.picture.write_text(draw(timeline), encoding='utf-8')

    def _show(self, verdict: Verdict, outcome: Outcome) -> None:
        """Show the verdict.

        The secondary's guest runs by itself between two checkpoints.  So it
        may take over with fewer or more transactions than the primary had at
        the kill, but never with fewer than at the last checkpoint.
        """
        screen = self.screen
        pauses = sorted(c.pause_ms for c in outcome.checkpoints)
        screen.heading('Verdict')
        screen.item('checkpoints', f'{len(pauses)}, median pause '
                    f'{pauses[len(pauses) // 2]:.0f} ms, longest '
                    f'{pauses[-1]:.0f} ms')
        screen.item('guest running again', 'after '
                    f'{outcome.failover.running_ms:.0f} ms (first output '
                    f'{outcome.failover.output_ms:.0f} ms)')
        screen.item('transactions', f'{outcome.before.tx} at the kill, '
                    f'{outcome.safe.tx} at the last checkpoint')
        screen.item('', f'{outcome.failover.beat.tx} when the survivor took '
                    f'over, {verdict.committed} at the end',
                    outcome.kept)
        screen.item('PRAGMA integrity_check', f'{verdict.integrity}, '
                    f'{verdict.rows} of {verdict.committed} rows',
                    verdict.integrity == 'ok'
                    and verdict.rows == verdict.committed)
        screen.item('e2fsck -fn', verdict.e2fsck, verdict.e2fsck == 'clean')
        screen.item('blocks checked', f'{verdict.blocks} by the guest, '
                    f'{verdict.host_blocks} in the images')
        screen.item('wrong blocks', f'{verdict.wrong + verdict.host_wrong}',
                    verdict.wrong + verdict.host_wrong == 0)
        screen.item('picture', str(self.options.picture))
        for problem in verdict.problems[:PROBLEMS]:
            screen.item('problem', problem, False)
        if len(verdict.problems) > PROBLEMS:
            screen.item('problem', f'and {len(verdict.problems) - PROBLEMS} '
                        'more', False)
        screen.heading(f'PASS: the VM survived the {self.options.kill}, its '
                       'memory and its disks agree.'
                       if not verdict.problems else 'FAIL')

    def show_logs(self) -> None:
        """Show the ends of all logs, for a run that went wrong."""
        if self.pair is None:
            return
        for side in self.pair.sides:
            for name in (f'{side.name}.log', 'guest.log'):
                path = side.path(name)
                text = path.read_text(errors='replace').splitlines() \
                    if path.exists() else []
                if text:
                    self.screen.heading(f'{side.name}/{name}, its end:')
                    print('\n'.join(text[-LOG_TAIL:]), flush=True)


def last_beat(side: Side) -> Beat:
    """Return the guest's last beat; it must have had one."""
    beat = side.console.beat
    if beat is None:
        raise PairError(f'{side.name}: the guest has said nothing')
    return beat


def work_line(beat: Beat) -> str:
    """Say what the guest has done so far."""
    return (f'{beat.tx} transactions, {beat.writes} blocks, '
            f'{beat.wrong} wrong')
