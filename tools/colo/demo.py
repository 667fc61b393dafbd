#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Protect a running VM, kill one of its two hosts, and look for damage."""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence

import command
from guest import GuestError, get_guest
from guesthost import Beat, Disks, GuestHost, MIB, Setup, accelerator
from pair import Checkpoint, ColoPair, Failover
from picture import Timeline, Work, draw
from verify import Findings, judge

PROBLEMS = 8
BAR = 24


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser(__doc__, './run demo')
    parser.add_argument('--cache', type=Path, required=True, metavar='DIR',
                        help='folder that keeps the guest between runs')
    parser.add_argument('--seconds', type=float, default=15, metavar='N',
                        help='time under protection before the kill '
                        '(default: %(default)s)')
    parser.add_argument('--after', type=int, default=3, metavar='N',
                        help="the guest's time after the failover "
                        '(default: %(default)s)')
    parser.add_argument('--disks', type=int, default=2, metavar='N',
                        choices=range(1, 9),
                        help='number of disks, 1 to 8 (default: %(default)s)')
    parser.add_argument('--kill', choices=('primary', 'secondary'),
                        default='primary',
                        help='the side that dies (default: %(default)s)')
    parser.add_argument('--checkpoint-ms', type=int, default=1500,
                        metavar='N', help='time between two checkpoints '
                        '(default: %(default)s)')
    parser.add_argument('--accel', choices=('auto', 'kvm', 'tcg'),
                        default='auto', help='default: KVM where it works')
    parser.add_argument('--picture', type=Path, metavar='FILE',
                        help='where a picture of it goes, as SVG (default: '
                        'demo/SIDE-killed.svg in the cache)')
    parser.add_argument('--keep', action='store_true',
                        help='leave images and logs, and say where')
    return parser.parse_args()


@dataclass
class Kill:
    """What a failover leaves for the verdict."""
    victim: GuestHost
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

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.screen = command.Progress()
        self._began = time.time()
        self._sync = (0.0, 0.0)
        self.pair = ColoPair(self._setup())

    def say(self, topic: str, text: str) -> None:
        """Write a line with the time since the start."""
        self.screen.say(f'{self.screen.seconds:6.1f} s  {topic:<11}{text}')

    def run(self) -> bool:
        """Tell it all; return whether nothing was lost."""
        pair = self.pair
        self._boot(pair)
        self._protect(pair)
        outcome = self._kill(pair)
        self._go_on(pair)
        ended = time.time()
        found = self._judge(pair, outcome)
        self._draw(pair, found, outcome, ended)
        self._show(found, outcome)
        return not found.problems

    def _setup(self) -> Setup:
        options = self.options
        guest = get_guest(options.cache, lambda text: self.say('guest', text))
        accel = options.accel if options.accel != 'auto' else accelerator()
        disks = Disks(count=options.disks)
        self.say('setup', f'two QEMUs ({accel.upper()}), {disks.count} x '
                 f'{disks.size // MIB} MiB disk, Linux {guest.version}')
        return Setup(options.build_dir, guest, self.folder, disks, accel,
                     options.checkpoint_ms)

    def _boot(self, pair: ColoPair) -> None:
        self.say('primary', 'booting the guest, not protected yet')
        pair.start_primary()
        self.say('guest', 'at work: SQLite on ext4, numbered blocks beside it')
        pair.start_secondary()
        self.say('secondary', 'up, exports its disks by NBD')

    def _show_sync(self, parts: Sequence[float]) -> None:
        done = sum(parts) / len(parts)
        filled = int(done * BAR)
        self.screen.show(f'sync       [{"#" * filled}{"." * (BAR - filled)}] '
                         + ' '.join(f'{100 * part:.0f} %'
                                    for part in parts[:6]))

    def _protect(self, pair: ColoPair) -> None:
        self.say('sync', 'copying the disks while the guest writes')
        began = time.time()
        pair.begin_sync()
        pair.finish_sync(self._show_sync)
        self._sync = (began, time.time())
        self.say('sync', 'disks equal, every write is forwarded')
        self.say('guest', str(pair.primary.beat))
        switch = pair.protect()
        self.say('memory', 'migrated with x-colo, pause '
                 f'{switch.pause_ms:.0f} ms; protected from now on')
        pair.watch(self.options.seconds, lambda checkpoint: self.say(
            'checkpoint', f'{len(pair.checkpoints()):3}  pause '
            f'{checkpoint.pause_ms:4.0f} ms   {pair.primary.beat}'))

    def _kill(self, pair: ColoPair) -> Kill:
        victim, other = pair.primary, pair.secondary
        if self.options.kill == 'secondary':
            victim, other = other, victim
        done = pair.checkpoints()
        before = pair.primary.beat
        safe = pair.primary.console.last_before(done[-1].stopped) or before
        victim.sigkill()
        self.say('KILL',
                 f'SIGKILL to the {self.options.kill} ({victim.name})')
        if self.options.kill == 'primary':
            failover = pair.fail_over_to_secondary()
        else:
            failover = pair.fail_over_to_primary()
        self.say('failover', f'guest runs on {other.name} '
                 f'{failover.running_ms:.0f} ms after the kill, first '
                 f'output after {failover.output_ms:.0f} ms')
        if failover.merged_ms is not None:
            self.say('failover', 'overlays merged into the disk within '
                     f'{failover.merged_ms:.0f} ms of the kill')
        return Kill(victim, failover, before, safe, done)

    def _go_on(self, pair: ColoPair) -> None:
        host = pair.primary
        enough: int = host.beat.number + 10 * self.options.after
        host.wait_until(lambda: host.beat.number >= enough,
                        'the time after the failover')
        self.say('guest', str(host.beat))
        self.say('guest', 'told to check all it wrote and shut down')

    def _judge(self, pair: ColoPair, outcome: Kill) -> Findings:
        report = pair.finish()
        self.say('host', 'checks the image of the survivor')
        found = judge(report, pair.images(), pair.setup.disks, self.folder)
        found.demand(
            outcome.kept, 'the survivor took over at an older state than that '
            'of the last checkpoint')
        return found

    def _draw(self, pair: ColoPair, found: Findings, outcome: Kill,
              ended: float) -> None:
        """Leave a picture of it."""
        failover = outcome.failover
        killed = outcome.victim.died

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
            work={host.name: [Work(beat.when, beat.tx)
                              for beat in host.console.beats()
                              if beat.when <= ended] for host in pair.hosts},
            lag=pair.lag, merge=pair.merge, safe=outcome.safe.tx,
            taken_over=failover.beat.tx, at_end=found.rows,
            checked=found.blocks, host_checked=found.host_blocks,
            wrong=found.all_wrong, problems=found.problems)
        self.options.picture.write_text(draw(timeline), encoding='utf-8')

    def _show(self, found: Findings, outcome: Kill) -> None:
        """Show the verdict.

        The secondary's guest runs by itself between two checkpoints.  So it
        may take over with fewer or more transactions than the primary had at
        the kill, but never with fewer than at the last checkpoint.
        """
        pauses = sorted(c.pause_ms for c in outcome.checkpoints)
        failover = outcome.failover
        self.screen.say('\nVerdict')
        for name, text, good in (
                ('checkpoints', f'{len(pauses)}, median pause '
                 f'{pauses[len(pauses) // 2]:.0f} ms, longest '
                 f'{pauses[-1]:.0f} ms', True),
                ('guest running again', f'after {failover.running_ms:.0f} ms '
                 f'(first output {failover.output_ms:.0f} ms)', True),
                ('transactions', f'{outcome.before.tx} at the kill, '
                 f'{outcome.safe.tx} at the last checkpoint', True),
                ('', f'{failover.beat.tx} when the survivor took over, '
                 f'{found.committed} at the end', outcome.kept),
                ('PRAGMA integrity_check', f'{found.integrity}, {found.rows} '
                 f'of {found.committed} rows', found.integrity == 'ok'
                 and found.rows == found.committed),
                ('e2fsck -fn', found.e2fsck, found.e2fsck == 'clean'),
                ('blocks checked', f'{found.blocks} by the guest, '
                 f'{found.host_blocks} in the images', True),
                ('wrong blocks', f'{found.all_wrong}', not found.all_wrong),
                ('picture', str(self.options.picture), True),
                *(('problem', problem, False)
                  for problem in found.problems[:PROBLEMS])):
            self.screen.say(f' {" " if good else "!"} {name:<26} {text}')
        self.screen.say(
            f'\nFAIL: {len(found.problems)} problems' if found.problems else
            f'\nPASS: the VM survived the {self.options.kill}, its memory and '
            'its disks agree.')


def run(options: argparse.Namespace, folder: Path) -> bool:
    """Run the demo in a folder; return whether nothing was lost."""
    try:
        story = Story(options, folder)
    except GuestError as exc:
        sys.exit(f'error: {exc}')
    try:
        good = story.run()
    except Exception as exc:  # pylint: disable=broad-except
        good = False
        # A launch that failed has its whole command line below this.
        first = str(exc).split('\n\tExit code:')[0]
        story.screen.say(f'\nFAIL: {type(exc).__name__}: {first}')
    finally:
        story.screen.wipe()
        with command.held():
            story.pair.close()
    if not good:
        for host in story.pair.hosts:
            story.screen.say(f'\n{host.last_words()}')
    return good


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    command.begin()
    if options.picture is None:
        options.picture = options.cache / 'demo' / f'{options.kill}-killed.svg'
    try:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.unlink(missing_ok=True)
    except OSError as exc:
        print(f'error: no room for the picture: {exc}', file=sys.stderr)
        return 2
    # ./run top looks for a folder of this name
    with command.work_folder('colo-demo-', options.work_dir) as folder:
        if options.keep:
            (folder / 'KEEP').touch()
        return 0 if run(options, folder) else 1


if __name__ == '__main__':
    sys.exit(main())
