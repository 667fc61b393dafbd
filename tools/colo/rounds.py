#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Lose a host again and again, and protect the guest anew.

Where both have metadata, it is the primary that is lost, and comes back as the
secondary.  Else it is the secondary.  Where the primary holds both disks, each
new secondary has the disks of the one that was lost, and is brought in step
with what changed.  In the end it has to be equal to the primary, byte by byte,
and to what the guest remembers.
"""

import argparse
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Set

import command
from forms import FORMS
from guest import get_guest
from guesthost import BLOCK, MIB, Disks, Setup, accelerator
from host import HostError
from pair import NOTED, ColoPair, metadata
from verify import judge

KIB = 1024
# Where the log of a disk's metadata begins, with a bit for each region
LOG, REGION = 16 * KIB, MIB


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = command.parser(__doc__)
    parser.add_argument('--rounds', type=int, default=10, metavar='N',
                        help='how often a host is lost '
                        '(default: %(default)s)')
    parser.add_argument('--form', choices=FORMS, default='standby',
                        help='how the disks are put together '
                        '(default: %(default)s)')
    return parser.parse_args()


def blocks_of(image: Path, size: int) -> Iterator[bytes]:
    """An image in pieces."""
    data = image.read_bytes()
    return (data[at:at + size] for at in range(0, len(data), size))


def logged(image: Path) -> Set[int]:
    """The regions of a disk that its metadata says were changed."""
    log = metadata(image).read_bytes()[LOG:]
    return {8 * at + bit for at, byte in enumerate(log) if byte
            for bit in range(8) if byte >> bit & 1}


class Rounds:
    """One guest, and one secondary after the other."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.screen = command.Progress()
        disks = Disks(2, 20 * MIB, 16 * MIB)
        more: Dict[str, Any] = {}
        if options.form == 'standby':
            # most is written once, and a small log has to forget that
            disks = Disks(2, 48 * MIB, 16 * MIB, 6 * MIB)
            more = {'log-size': 8 * MIB}
        guest = get_guest(options.cache, self.screen.say)
        form = FORMS[options.form](disks.count, disks.size, **more)
        self.rounds: int = options.rounds
        self.pair = ColoPair(Setup(options.build, guest, folder, disks,
                                   accelerator(), 500), form)
        self.changed = self.copied = 0

    def run(self) -> None:
        """Run them all; what goes wrong is raised."""
        pair = self.pair
        pair.start_primary(lambda: self.screen.show(
            f'the guest boots, {100 * pair.filled():.0f} % of its disks are '
            'filled'))
        self._sync(0)
        for number in range(1, self.rounds + 1):
            pair.protect()
            pair.watch(1, lambda _checkpoint: None)
            if pair.form.has_metadata:
                pair.primary.sigkill()
                pair.fail_over_to_secondary()
            else:
                pair.secondary.sigkill()
                pair.fail_over_to_primary()
            self._sync(number)
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

    def _sync(self, number: int) -> None:
        pair, form = self.pair, self.pair.form
        pair.start_secondary()
        with self._stopped():
            changed, blocks = self._differing(BLOCK), self._differing(NOTED)
            told = pair.lacking()
            if form.has_metadata:
                self._demand_logged()
                told += sum(REGION * len(logged(image))
                            for image in pair.secondary.images)
            before = pair.wrote()
        self._demand(not form.keeps_disk or told >= blocks,
                     f'{told} bytes are out of sync, {blocks} differ')
        pair.begin_sync()
        synced = pair.finish_sync(lambda done: self.screen.show(
            f'copying: {100 * sum(done) / len(done):.0f} %'))
        written = pair.wrote() - before
        self.screen.say(
            f'{f"round {number}" if number else "at first"}: '
            f'{synced.copied / KIB:,.0f} of {synced.size / KIB:,.0f} KiB '
            f'copied, {changed / KIB:,.0f} KiB differed')
        if number and form.keeps_disk:
            self._demand(synced.copied <= told + written,
                         'more was copied than had changed')
            self._demand(synced.copied <= synced.size / 2,
                         'most of it was copied')
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

    def _demand_logged(self) -> None:
        """The disks may differ where one of both logs says so, and only so."""
        for ours, theirs in zip(self.pair.primary.images,
                                self.pair.secondary.images):
            differ = {number for number, (one, other) in enumerate(zip(
                blocks_of(ours, REGION), blocks_of(theirs, REGION)))
                if one != other}
            missing = differ - logged(ours) - logged(theirs)
            self._demand(not missing, f'{ours.name}: no log has the regions '
                         f'{sorted(missing)}, which differ')

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
    with command.work_folder('colo-rounds-') as folder:
        rounds = Rounds(options, folder)
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
