#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Kill both hosts of a protected VM, one after the other, and check the VM.

The one that is killed first comes back with the disks that it had, and takes
over when the other one is killed.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import List, Sequence

import command
from forms import Standby
from guest import get_guest, run_tool
from guesthost import Disks, MIB, Setup, accelerator
from host import HostError
from pair import Checkpoint, ColoPair
from picture import Death, Protection, Timeline, draw
from verify import Findings, judge

PROBLEMS = 8
BAR = 24
# How long the last survivor is alone before it is checked
ALONE = 2.0
# What the guest writes again and again of each disk, and what the log is to
# have of it: most is written once and left alone, as on most disks
BUSY, LOG = 12 * MIB, 32 * MIB


def parse() -> argparse.Namespace:
    """Read the command line; tools/base/commands tells of it."""
    parser = command.parser(__doc__)
    parser.add_argument('--seconds', type=float, default=15)
    parser.add_argument('--after', type=float, default=5)
    parser.add_argument('--disks', type=int, default=2)
    parser.add_argument('--kill', default='primary')
    parser.add_argument('--checkpoint-ms', type=int, default=1500)
    parser.add_argument('--accel', default='auto')
    parser.add_argument('--picture', type=Path)
    parser.add_argument('--keep', action='store_true')
    return parser.parse_args()


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
        setup = self._setup()
        self.pair = ColoPair(setup, Standby(
            setup.disks.count, setup.disks.size, **{'log-size': LOG}))
        self._protections: List[Protection] = []
        self._deaths: List[Death] = []

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
        self._protect(pair, self.options.seconds)
        self._kill(pair, self.options.kill)
        self._protect(pair, self.options.after)
        again = self._protections[1]
        after = again.protected - self._deaths[0].when
        self.say('AGAIN', f'protected again after {after:.1f} s, '
                 f'{again.synced}')
        self._kill(pair, 'primary')
        self._work_alone(pair)
        ended = time.time()
        self.say('guest', 'told to check all it wrote and shut down')
        found = self._judge(pair)
        self._draw(pair, found, ended)
        self._show(found)
        return not found.problems

    def _setup(self) -> Setup:
        options = self.options
        guest = get_guest(options.cache, lambda text: self.say('guest', text))
        accel = options.accel if options.accel != 'auto' else accelerator()
        disks = Disks(count=options.disks, busy=BUSY)
        self._footer = (
            f'{version(options.build)} ({accel.upper()}), Linux '
            f'{guest.version} in the guest. All hosts are processes of this '
            'machine, joined by unix sockets: a network is slower.')
        self.say('setup', f'two QEMUs ({accel.upper()}), {disks.count} x '
                 f'{disks.size // MIB} MiB disk, Linux {guest.version}')
        return Setup(options.build, guest, self.folder, disks, accel,
                     options.checkpoint_ms)

    def _show_sync(self, parts: Sequence[float]) -> None:
        done = sum(parts) / len(parts)
        filled = int(done * BAR)
        self.screen.show(f'sync       [{"#" * filled}{"." * (BAR - filled)}] '
                         + ' '.join(f'{100 * part:.0f} %'
                                    for part in parts[:6]))

    def _protect(self, pair: ColoPair, seconds: float) -> None:
        """Protect the guest for so long."""
        pair.look()
        pair.start_secondary()
        name = pair.secondary.name
        old = '' if not self._deaths else (
            f': {self._deaths[-1].victim}, with the disks that it had')
        self.say('secondary', f'{name} is up, exports its disks by NBD{old}')
        self.say('sync', 'copying what they lack while the guest writes')
        pair.begin_sync()
        synced = pair.finish_sync(self._show_sync)
        self.say('sync', f'disks equal, {synced}; every write is forwarded')
        self.say('guest', str(pair.primary.beat))
        switch = pair.protect()
        self.say('memory', 'migrated with x-colo, pause '
                 f'{switch.pause_ms:.0f} ms; protected from now on')
        pair.watch(seconds, lambda checkpoint: self.say(
            'checkpoint', f'{len(pair.checkpoints()):3}  pause '
            f'{checkpoint.pause_ms:4.0f} ms   {pair.primary.beat}'))
        self._checkpoints += pair.checkpoints()
        self._protections.append(Protection(name, synced, pair.protected_at))

    def _kill(self, pair: ColoPair, side: str) -> None:
        victim, other = pair.primary, pair.secondary
        if side == 'secondary':
            victim, other = other, victim
        merge = len(pair.merge)
        runs = pair.primary.console
        safe = runs.last_before(self._checkpoints[-1].stopped)
        victim.sigkill()
        self.say('KILL', f'SIGKILL to the {side} ({victim.name})')
        if side == 'primary':
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
        self._deaths.append(Death(
            side=side, victim=victim.name, survivor=other.name,
            when=victim.died, running=victim.died + failover.running_ms / 1000,
            first_output=victim.died + failover.output_ms / 1000,
            merged=None if failover.merged_ms is None
            else victim.died + failover.merged_ms / 1000,
            merge=pair.merge[merge:], safe=(safe or before).tx,
            at_kill=before.tx, taken_over=failover.beat.tx))

    def _work_alone(self, pair: ColoPair) -> None:
        """Let the survivor show that it can."""
        end = time.monotonic() + ALONE
        while time.monotonic() < end:
            pair.primary.pause()

    def _judge(self, pair: ColoPair) -> Findings:
        report = pair.finish(lambda: self.screen.show(
            'guest      checks all it wrote'))
        self.say('host', 'checks the image of the survivor')
        found = judge(report, pair.images(), pair.setup.disks, self.folder)
        found.demand(
            all(death.kept for death in self._deaths), 'a survivor took over '
            'at an older state than that of the last checkpoint')
        return found

    def _draw(self, pair: ColoPair, found: Findings, ended: float) -> None:
        """Leave a picture of it."""
        timeline = Timeline(
            began=self._began, ended=ended, protections=self._protections,
            deaths=self._deaths,
            checkpoints=[(c.stopped, c.resumed) for c in self._checkpoints],
            work={host.name: [beat for beat in host.console.beats()
                              if beat.when <= ended] for host in pair.hosts},
            looks=[look for look in pair.looks if look.when <= ended],
            at_end=found.rows, checked=found.blocks,
            host_checked=found.host_blocks, wrong=found.all_wrong,
            footer=self._footer, problems=found.problems)
        self.options.picture.write_text(draw(timeline), encoding='utf-8')

    def _show(self, found: Findings) -> None:
        """Show the verdict.

        The secondary's guest runs by itself between two checkpoints.  So it
        may take over with fewer or more transactions than the primary had at
        the kill, but never with fewer than at the last checkpoint.
        """
        pauses = sorted(c.pause_ms for c in self._checkpoints)
        again = self._protections[1]
        lines = [('checkpoints', f'{len(pauses)}, median pause '
                  f'{pauses[len(pauses) // 2]:.0f} ms, longest '
                  f'{pauses[-1]:.0f} ms', True)]
        for death in self._deaths:
            lines += [
                (f'{death.victim} killed', 'guest running again after '
                 f'{(death.running - death.when) * 1000:.0f} ms (first output '
                 f'{(death.first_output - death.when) * 1000:.0f} ms)', True),
                ('transactions', f'{death.safe} at the last checkpoint: '
                 'guaranteed', True),
                ('', f'{death.at_kill} at the kill', True),
                ('', f'{death.taken_over} when {death.survivor} took over'
                 + (f', {death.gone} newer ones are gone' if death.gone
                    else ''), death.kept)]
            if death is self._deaths[0]:
                lines.append(('protected again', 'after '
                              f'{again.protected - death.when:.1f} s, '
                              f'{again.synced}', True))
        self.screen.say('\nVerdict')
        for name, text, good in (
                *lines,
                ('transactions at the end', f'{found.committed}', True),
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
            '\nPASS: the VM survived both hosts, one after the other; its '
            'memory and its disks\nagree.')
        self.screen.say(
            'Without colo-compare, what the guest has told the outside since '
            'the last\ncheckpoint may be gone.')


def run(options: argparse.Namespace, folder: Path) -> bool:
    """Run the demo in a folder; return whether nothing was lost."""
    story = Story(options, folder)
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
    with command.work_folder('colo-demo-') as folder:
        if options.keep:
            (folder / 'KEEP').touch()
        return 0 if run(options, folder) else 1


if __name__ == '__main__':
    sys.exit(main())
