#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Lose the secondary again and again, and protect the guest anew.

Where the primary holds both disks, each new secondary has the disks of the
last one, and is brought in step with what changed.  In the end it has to be
equal to the primary, byte by byte, and to what the guest remembers.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import command
from forms import Form, Holder, Quorum
from guest import GuestError, get_guest
from guesthost import BLOCK, MIB, Disks, Setup, accelerator
from host import HostError
from pair import NOTED, ColoPair
from verify import judge

FORMS = {'holder': Holder, 'quorum': Quorum}
KIB = 1024


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser(__doc__)
    parser.add_argument('--cache', type=Path, required=True, metavar='DIR',
                        help='folder that keeps the guest between runs')
    parser.add_argument('--rounds', type=int, default=10, metavar='N',
                        help='how often the secondary is lost '
                        '(default: %(default)s)')
    parser.add_argument('--form', choices=FORMS, default='holder',
                        help='how the disks are put together '
                        '(default: %(default)s)')
    return parser.parse_args()


def blocks_of(image: Path, size: int) -> Iterator[bytes]:
    """An image in pieces."""
    data = image.read_bytes()
    return (data[at:at + size] for at in range(0, len(data), size))


class Rounds:
    """One guest, and one secondary after the other."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.screen = command.Progress()
        disks = Disks(2, 20 * MIB, 16 * MIB)
        guest = get_guest(options.cache, self.screen.say)
        form: Form = FORMS[options.form](disks.count, disks.size)
        self.rounds: int = options.rounds
        self.pair = ColoPair(Setup(options.build_dir, guest, folder, disks,
                                   accelerator(), 500), form)
        self.changed = self.copied = 0

    def run(self) -> None:
        """Run them all; what goes wrong is raised."""
        pair = self.pair
        pair.start_primary(lambda: self.screen.show(
            f'the guest boots, {100 * pair.filled():.0f} % of its disks are '
            'filled'))
        self._sync('at first')
        for number in range(self.rounds):
            pair.protect()
            pair.watch(1, lambda _checkpoint: None)
            pair.secondary.sigkill()
            pair.fail_over_to_primary()
            self._sync(f'round {number + 1}')
            self.screen.show('the guest checks its disks')
            blocks = pair.check()
            self._demand(not pair.complaints(), '\n'.join(pair.complaints()))
            self.screen.say(f'{blocks} blocks checked, none wrong')
        if self.copied:
            self.screen.say(
                f'in sum {self.copied / KIB:,.0f} KiB were copied, for '
                f'{self.changed / KIB:,.0f} KiB that differed in blocks of '
                f'{BLOCK // KIB} KiB; what differs is noted in blocks of '
                f'{NOTED // KIB} KiB')
        self._compare()

    def _sync(self, what: str) -> None:
        pair = self.pair
        pair.start_secondary()
        with self._stopped():
            changed, blocks = self._differing(BLOCK), self._differing(NOTED)
            told = pair.lacking()
        self._demand(not pair.form.keeps_disk or told >= blocks,
                     f'{told} bytes are out of sync, {blocks} differ')
        before = pair.wrote()
        pair.begin_sync()
        synced = pair.finish_sync(lambda done: self.screen.show(
            f'copying: {100 * sum(done) / len(done):.0f} %'))
        written = pair.wrote() - before
        self.screen.say(
            f'{what}: {synced.copied / KIB:,.0f} of {synced.size / KIB:,.0f} '
            f'KiB copied, {changed / KIB:,.0f} KiB differed')
        self._demand(synced.copied <= synced.lacking + written,
                     'more was copied than had changed')
        if synced.lacking < synced.size:
            self.changed += changed
            self.copied += synced.copied
        with self._stopped():
            self._demand_equal()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        """Hold the guest when all that it has written has arrived."""
        host = self.pair.primary
        host.cmd('stop')
        host.wait_until(lambda: not any(
            stats['pending-requests'] for stats in host.statistics()),
            'what is forwarded')
        yield
        host.cmd('cont')

    def _differing(self, size: int) -> int:
        """How many bytes are in blocks that the two hosts have not alike."""
        return sum(
            size for ours, theirs in zip(self.pair.primary.images,
                                         self.pair.secondary.images)
            for one, other in zip(blocks_of(ours, size),
                                  blocks_of(theirs, size)) if one != other)

    def _demand_equal(self) -> None:
        differ = self._differing(BLOCK)
        self._demand(not differ, f'{differ} bytes differ on the two hosts')

    def _compare(self) -> None:
        pair = self.pair
        report = pair.finish(lambda: self.screen.show(
            'the guest checks its disks and shuts down'))
        found = judge(report, pair.images(), pair.setup.disks,
                      pair.setup.folder)
        self._demand(not found.problems, '\n'.join(found.problems))
        self._demand_equal()
        self.screen.say(
            f'PASS: {found.blocks} blocks checked by the guest, '
            f'{found.host_blocks} in the images, none wrong; the images of '
            'both hosts are equal')

    @staticmethod
    def _demand(true: bool, problem: str) -> None:
        if not true:
            raise HostError(problem)


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    command.begin()
    with command.work_folder('colo-rounds-', options.work_dir) as folder:
        try:
            rounds = Rounds(options, folder)
        except GuestError as exc:
            sys.exit(f'error: {exc}')
        try:
            rounds.run()
        except BaseException:
            (folder / 'KEEP').touch()
            for host in rounds.pair.hosts[-2:]:
                print(host.last_words())
            raise
        finally:
            with command.held():
                rounds.pair.close()
    return 0


if __name__ == '__main__':
    sys.exit(main())
