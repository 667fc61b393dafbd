#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Break protected VMs at random instants, and look for damage.

Each round protects a guest with COLO and breaks something: a host is killed
or goes silent, or the link that carries the disk writes is cut, at a random
instant before, in or after a checkpoint.  The guest, which knows all that it
wrote, must go on with not a block wrong.
"""

import argparse
import asyncio
import shutil
import sys
import time
from pathlib import Path
from subprocess import SubprocessError
from typing import List, Optional

from qemu.machine.machine import QEMUMachineError
from qemu.qmp import QMPError

import command
from autopsy import stacks
from chaos_plan import GENERATIONS, plan_guest, plan_round
from chaos_round import ChaosPair, RoundResult, Round
from forms import FORMS
from guest import get_guest
from guesthost import MIB, Setup, accelerator
from host import HostError
from verify import judge

# What a step raises when QEMU does not do what it should.
FAILURES = (HostError, QMPError, QEMUMachineError, asyncio.TimeoutError,
            OSError, SubprocessError)


def say(text: str) -> None:
    """Print a line at once."""
    print(f'{time.strftime("%H:%M:%S")}  {text}', flush=True)


class Campaign:
    """Runs the rounds; stops at the first that went wrong."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.results: List[RoundResult] = []
        self.guests = 0
        self.blocks = 0
        self.good = True
        self._guest = get_guest(options.cache, say)
        self._pair: Optional[ChaosPair] = None

    def run(self) -> None:
        """Run them all; good tells whether nothing was lost."""
        group = -1
        for index in command.numbers(self.options):
            try:
                if index // GENERATIONS != group:
                    self._finish_guest()
                    group = index // GENERATIONS
                    self._start_guest(group)
                self._round(index, group)
            except FAILURES as exc:
                self._fail(f'{type(exc).__name__}: {exc}')
            if not self.good:
                break
        try:
            self._finish_guest()
        except FAILURES as exc:
            self._fail(f'the check of the guest: {exc}')
        self._sum_up()

    def close(self) -> None:
        """End what runs."""
        if self._pair:
            self._pair.close()
            self._pair = None

    def _start_guest(self, group: int) -> None:
        plan = plan_guest(self.options.seed, group)
        self.guests += 1
        folder = self.folder / f'g{self.guests}'
        folder.mkdir()
        options = {} if plan.behind else {'write-behind': 0}
        form = FORMS[plan.form]
        if form.has_metadata:
            options['log-size'] = plan.log_size
        self._pair = ChaosPair(
            Setup(self.options.build, self._guest, folder, plan.disks,
                  accelerator(), plan.checkpoint_ms),
            form(plan.disks.count, plan.disks.size, **options))
        self._pair.start_primary()
        say(f'guest {self.guests}: {plan.disks.count} x '
            f'{plan.disks.size // MIB} MiB, a checkpoint every '
            f'{plan.checkpoint_ms} ms, {plan.form}'
            f'{"".join(f", {key}={value}" for key, value in options.items())}')

    def _finish_guest(self) -> None:
        """Have the guest checked in full; it has survived all its rounds."""
        pair = self._pair
        if not pair or not self.good:
            return
        report = pair.finish()
        found = judge(report, pair.images(), pair.setup.disks,
                      pair.setup.folder)
        self.blocks += found.blocks
        last = self.results[-1]
        last.wrong = max(last.wrong, found.all_wrong)
        say(f'guest {self.guests}: {found.blocks} blocks checked by the '
            f'guest, {found.host_blocks} in the images, {found.all_wrong} '
            f'wrong; {found.rows} of {found.committed} transactions, '
            f'integrity_check {found.integrity}, e2fsck {found.e2fsck}')
        if found.problems:
            self._fail('\n'.join(found.problems))
            return
        self.close()
        shutil.rmtree(pair.setup.folder)

    def _round(self, index: int, group: int) -> None:
        assert self._pair
        this = Round(self._pair, plan_round(
            self.options.seed, index, plan_guest(self.options.seed, group)))
        self.results.append(this.result)
        try:
            this.run()
        finally:
            this.result.wrong = self._pair.wrong
            say(str(this.result))
        if this.result.problems or this.result.wrong:
            self._fail('\n'.join(this.result.problems)
                       or 'the guest read wrong blocks')

    def _fail(self, problem: str) -> None:
        """Note a problem, with all that may explain it."""
        self.good = False
        say(f'FAIL: {problem}')
        for host in self._pair.hosts if self._pair else []:
            found = stacks(host)
            if found:
                host.path('stacks').write_text(found)
                say(f'{host.name}: its stacks are in {host.path("stacks")}')
        for host in self._pair.hosts[-2:] if self._pair else []:
            say(host.last_words())

    def _sum_up(self) -> None:
        times = sorted(result.running_ms for result in self.results
                       if result.running_ms is not None)
        if times:
            print(f'guest running again after {len(times)} of '
                  f'{len(self.results)} blows: median '
                  f'{times[len(times) // 2]:.0f} ms, longest {times[-1]:.0f} '
                  'ms (with the time that a silent host was waited for)')
        synced = [r.synced for r in self.results
                  if r.synced and r.synced.lacking < r.synced.size]
        print(f'{len(synced)} secondaries got an old disk: '
              f'{sum(s.copied for s in synced) // 1024} KiB copied for '
              f'{sum(s.lacking for s in synced) // 1024} KiB that had changed')
        blocks = self.blocks + sum(r.blocks for r in self.results)
        print(f'{self.guests} guests; {blocks} blocks checked, '
              f'{sum(r.wrong for r in self.results)} wrong; '
              f'seed {self.options.seed}')
        print('PASS' if self.good else 'FAIL', flush=True)


def main() -> int:
    """Make room for a run, do it, and clean up."""
    parser = command.parser(__doc__)
    command.add_seed(parser)
    options = parser.parse_args()
    command.begin()
    print(f'seed {options.seed}', flush=True)
    with command.work_folder('chaos-') as folder:
        campaign = Campaign(options, folder)
        try:
            campaign.run()
        except Exception:
            campaign.good = False
            raise
        finally:
            with command.held():
                campaign.close()
            if not campaign.good:
                (folder / 'KEEP').touch()
        return 0 if campaign.good else 1


if __name__ == '__main__':
    sys.exit(main())
