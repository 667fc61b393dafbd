#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Protect a running VM, kill a host of it, protect it again, and check it."""

import argparse
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import List, Sequence, Tuple

import command
from forms import Synced
from guest import GuestError, get_guest, run_tool
from guesthost import Beat, Disks, GuestHost, MIB, Setup, accelerator
from host import HostError
from pair import Checkpoint, ColoPair, Failover
from picture import (Look, Protection, Timeline, Work, copied_words,
                     draw)
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
    parser.add_argument('--after', type=float, default=5, metavar='N',
                        help='time under protection again, after the kill '
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

    @property
    def kept(self) -> bool:
        """Whether the survivor knows all that the last checkpoint held."""
        return self.failover.beat.tx >= self.safe.tx

    @property
    def gone(self) -> int:
        """How many transactions came too late for the survivor."""
        return max(self.before.tx - self.failover.beat.tx, 0)


def version(build: Path) -> str:
    """Return what a built QEMU calls itself."""
    found = re.search(r'version (\S+)', run_tool([
        str(build / 'qemu-system-x86_64'), '--version']))
    return f'QEMU {found[1] if found else "of an unknown version"}'


class Story:
    """One run of the demo."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.screen = command.Progress()
        self._began = time.time()
        self._checkpoints: List[Checkpoint] = []
        self.pair = ColoPair(self._setup())

    def say(self, topic: str, text: str) -> None:
        """Write a line with the time since the start."""
        self.screen.say(f'{self.screen.seconds:6.1f} s  {topic:<11}{text}')

    def run(self) -> bool:
        """Tell it all; return whether nothing was lost."""
        pair = self.pair
        self.say('primary', 'booting the guest, not protected yet')
        pair.start_primary(lambda: self.screen.show(
            f'guest      boots, {100 * pair.filled():.0f} % of its disks are '
            'filled'))
        self.say('guest', 'at work: SQLite on ext4, numbered blocks beside it')
        first = self._protect(pair, self.options.seconds)
        outcome = self._kill(pair)
        again = self._protect(pair, self.options.after)
        ended = time.time()
        after = again.protected - outcome.victim.died
        self.say('AGAIN', f'protected again after {after:.1f} s, '
                 f'{copied_words(again.copied, again.size)}')
        pair.unprotect()
        self.say('guest', 'alone, told to check all it wrote and shut down')
        found = self._judge(pair, outcome)
        self._draw(pair, found, outcome, (first, again, ended))
        self._show(found, outcome, again)
        return not found.problems

    def _setup(self) -> Setup:
        options = self.options
        guest = get_guest(options.cache, lambda text: self.say('guest', text))
        accel = options.accel if options.accel != 'auto' else accelerator()
        disks = Disks(count=options.disks)
        self._footer = (
            f'{version(options.build_dir)} ({accel.upper()}), Linux '
            f'{guest.version} in the guest. All hosts are processes of this '
            'machine, joined by unix sockets: a network is slower.')
        self.say('setup', f'two QEMUs ({accel.upper()}), {disks.count} x '
                 f'{disks.size // MIB} MiB disk, Linux {guest.version}')
        return Setup(options.build_dir, guest, self.folder, disks, accel,
                     options.checkpoint_ms)

    def _show_sync(self, parts: Sequence[float]) -> None:
        done = sum(parts) / len(parts)
        filled = int(done * BAR)
        self.screen.show(f'sync       [{"#" * filled}{"." * (BAR - filled)}] '
                         + ' '.join(f'{100 * part:.0f} %'
                                    for part in parts[:6]))

    def _protect(self, pair: ColoPair, seconds: float) -> Protection:
        """Protect the guest for so long."""
        pair.look()
        pair.start_secondary()
        name = pair.secondary.name
        old = '' if pair.secondary.images[0].parent.name == name else \
            ', with the disks of the last one'
        self.say('secondary', f'{name} is up, exports its disks by NBD{old}')
        self.say('sync', 'copying the disks while the guest writes')
        pair.begin_sync()
        synced: Synced = pair.finish_sync(self._show_sync)
        self.say('sync', 'disks equal, '
                 f'{copied_words(synced.copied, synced.size)}; every write '
                 'is forwarded')
        self.say('guest', str(pair.primary.beat))
        switch = pair.protect()
        self.say('memory', 'migrated with x-colo, pause '
                 f'{switch.pause_ms:.0f} ms; protected from now on')
        pair.watch(seconds, lambda checkpoint: self.say(
            'checkpoint', f'{len(pair.checkpoints()):3}  pause '
            f'{checkpoint.pause_ms:4.0f} ms   {pair.primary.beat}'))
        self._checkpoints += pair.checkpoints()
        return Protection(name, (synced.began, synced.ended),
                          pair.protected_at, synced.copied, synced.size)

    def _kill(self, pair: ColoPair) -> Kill:
        victim, other = pair.primary, pair.secondary
        if self.options.kill == 'secondary':
            victim, other = other, victim
        runs = pair.primary.console
        safe = runs.last_before(self._checkpoints[-1].stopped)
        victim.sigkill()
        self.say('KILL',
                 f'SIGKILL to the {self.options.kill} ({victim.name})')
        if self.options.kill == 'primary':
            failover = pair.fail_over_to_secondary()
            # an ordinary end is none
            if other.seen('REPLICATION_ERROR'):
                raise HostError(f'{other.name}: the failover was an error')
        else:
            failover = pair.fail_over_to_primary()
        self.say('failover', f'guest runs on {other.name} '
                 f'{failover.running_ms:.0f} ms after the kill, first '
                 f'output after {failover.output_ms:.0f} ms')
        if failover.merged_ms is not None:
            self.say('failover', 'overlays merged into the disk within '
                     f'{failover.merged_ms:.0f} ms of the kill')
        before = runs.last_before(victim.died)
        assert before
        return Kill(victim, failover, before, safe or before)

    def _judge(self, pair: ColoPair, outcome: Kill) -> Findings:
        report = pair.finish(lambda: self.screen.show(
            'guest      checks all it wrote'))
        self.say('host', 'checks the image of the survivor')
        found = judge(report, pair.images(), pair.setup.disks, self.folder)
        found.demand(
            outcome.kept, 'the survivor took over at an older state than that '
            'of the last checkpoint')
        return found

    def _draw(self, pair: ColoPair, found: Findings, outcome: Kill,
              spans: Tuple[Protection, Protection, float]) -> None:
        """Leave a picture of it."""
        failover = outcome.failover
        killed = outcome.victim.died
        first, again, ended = spans

        def after(milliseconds: float) -> float:
            return killed + milliseconds / 1000

        timeline = Timeline(
            victim=outcome.victim.name, survivor=pair.primary.name,
            killed_side=self.options.kill, began=self._began,
            first=first, killed=killed,
            running=after(failover.running_ms),
            first_output=after(failover.output_ms), again=again, ended=ended,
            merged=None if failover.merged_ms is None
            else after(failover.merged_ms),
            checkpoints=[(c.stopped, c.resumed) for c in self._checkpoints],
            work={host.name: [Work(beat.when, beat.tx)
                              for beat in host.console.beats()
                              if beat.when <= ended] for host in pair.hosts},
            looks=[Look(look.when, look.pending, look.lacking)
                   for look in pair.looks if look.when <= ended],
            merge=pair.merge, safe=outcome.safe.tx, at_kill=outcome.before.tx,
            taken_over=failover.beat.tx, at_end=found.rows,
            checked=found.blocks, host_checked=found.host_blocks,
            wrong=found.all_wrong, footer=self._footer,
            problems=found.problems)
        self.options.picture.write_text(draw(timeline), encoding='utf-8')

    def _show(self, found: Findings, outcome: Kill,
              again: Protection) -> None:
        """Show the verdict.

        The secondary's guest runs by itself between two checkpoints.  So it
        may take over with fewer or more transactions than the primary had at
        the kill, but never with fewer than at the last checkpoint.
        """
        pauses = sorted(c.pause_ms for c in self._checkpoints)
        failover = outcome.failover
        self.screen.say('\nVerdict')
        for name, text, good in (
                ('checkpoints', f'{len(pauses)}, median pause '
                 f'{pauses[len(pauses) // 2]:.0f} ms, longest '
                 f'{pauses[-1]:.0f} ms', True),
                ('guest running again', f'after {failover.running_ms:.0f} ms '
                 f'(first output {failover.output_ms:.0f} ms)', True),
                ('protected again', f'after '
                 f'{again.protected - outcome.victim.died:.1f} s, '
                 f'{copied_words(again.copied, again.size)}', True),
                ('transactions', f'{outcome.safe.tx} at the last checkpoint: '
                 'guaranteed', True),
                ('', f'{outcome.before.tx} at the kill', True),
                ('', f'{failover.beat.tx} when the survivor took over'
                 + (f', {outcome.gone} newer ones are gone' if outcome.gone
                    else ''), outcome.kept),
                ('', f'{found.committed} at the end', True),
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
        if self.options.kill == 'primary':
            self.screen.say(
                'Without colo-compare, what the guest has told the outside '
                'since the\nlast checkpoint may be gone.')


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
