#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM loses one side after the other, and heals itself.

Each test begins with a protected VM, on whichever side, and ends with one
whose guest has checked every block that it ever wrote.
"""

import json
import os
import signal
import sys
import unittest
from pathlib import Path
from typing import List

import command
from guest import get_guest
from guesthost import MIB, Disks
from sides import (GUEST_SECONDS, NAMES, Side, SidesTest, configuration, toml,
                   with_guest)

DISKS = Disks(2, 20 * MIB, 16 * MIB)
# On each disk behind what the guest writes
TAIL = 12 * MIB
MARK = b'not copied'
# docs/replication-metadata.txt
LOG = 16384
# It is tidied every minute or two
LOG_SECONDS = 300.0
REFUSED, NO_KEEPER = 4, 3


OPTIONS, REST = command.parser(__doc__).parse_known_args()


def last_region_logged(metadata: Path) -> bool:
    """Whether the disk's last MiB is in the log."""
    region = (DISKS.size + TAIL) // MIB - 1
    log = metadata.read_bytes()[LOG:]
    return bool(log[region // 8] >> region % 8 & 1)


class PairTest(SidesTest):
    """One guest for all tests."""

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        config = with_guest(configuration(OPTIONS.build, cls.folder, DISKS),
                            get_guest(OPTIONS.cache, print), DISKS)
        for disk in config['disk']:
            disk['size'] = str(DISKS.size + TAIL)
        config['tls'] = {'kind': 'psk', 'dir': f'{cls.folder}'}
        config['network'] = {
            'device': 'e1000,mac=52:54:00:12:34:56,romfile=',
            'netdev': 'user,restrict=on'}
        keys = cls.folder / 'keys.psk'
        keys.write_text(f'qemu:{os.urandom(32).hex()}\n', 'utf-8')
        keys.chmod(0o600)
        path = cls.folder / 'vm1.toml'
        path.write_text(toml(config), 'utf-8')
        for name in NAMES:
            cls.add_side(path, name)
        cls._first_start()

    @classmethod
    def _first_start(cls) -> None:
        east, west = cls.sides.values()
        assert west.run('standby').returncode == NO_KEEPER
        for disk in range(DISKS.count):
            with open(east.folder / f'disk{disk}.raw', 'wb') as image:
                image.seek(DISKS.size)
                image.write(os.urandom(TAIL))
        east.start()
        west.start()
        east.order('protect', '--no-wait')
        # without another guest beside it that is faster
        east.check_guest()
        west.order('standby')
        east.order('protect')

    def protected(self, primary: Side, standby: Side) -> None:
        """Wait until it is, and have the guest judge."""
        primary.wait_for('protected')
        standby.wait_for('secondary')
        self.assertEqual(primary.run('status').returncode, 0)
        self.assertEqual(standby.run('status').returncode, 0)
        self.assertEqual(primary.check_guest(), 6144)

    def unprotected(self, side: Side, *states: str) -> None:
        """It notices, and says so."""
        side.wait_for(*states)
        self.assertEqual(side.run('status').returncode, 2)

    def same(self) -> List[int]:
        """Who both QEMUs are."""
        return [side.pid for side in self.sides.values()]

    def test_kill_secondary(self) -> None:
        """The VM goes on where it is, and gets another standby."""
        before = self.primary.pid
        dead = self.standby.signal(signal.SIGKILL)
        self.standby.wait(lambda: self.standby.stands_by_again(dead),
                          'another QEMU')
        self.protected(self.primary, self.standby)
        self.assertEqual(self.primary.pid, before)

    def test_kill_primary(self) -> None:
        """A person has the standby take over; the other one stands by."""
        self.primary.signal(signal.SIGKILL)
        self.unprotected(self.standby, 'orphan')
        self.unprotected(self.primary, 'down')
        self.standby.order('failover')
        self.protected(self.standby, self.primary)

    def test_takeover_fails(self) -> None:
        """What fails for a time is repeated until it does not."""
        in_the_way = self.standby.folder / 'disk1.raw.standby-hidden.qcow2'
        in_the_way.mkdir()
        self.primary.signal(signal.SIGKILL)
        self.unprotected(self.standby, 'orphan')
        self.standby.order('failover')
        self.standby.wait(lambda: '"failover-failed"' in json.dumps(
            self.standby.status()), 'the failure')
        in_the_way.rmdir()
        self.protected(self.standby, self.primary)

    def test_kill_primary_and_keeper(self) -> None:
        """Nobody takes over unless somebody vouches for it."""
        dead = self.primary
        dead.signal(signal.SIGKILL)
        dead.kill_keeper()
        self.unprotected(self.standby, 'orphan')
        said = self.standby.order('failover', status=1)
        self.assertIn('no keeper on', said)
        self.standby.order('failover', '--peer-is-down')
        dead.start()
        self.protected(self.standby, dead)

    def test_hang_secondary(self) -> None:
        """Its keeper gives it up, and the VM goes on."""
        before = self.primary.pid
        hung = self.standby.signal(signal.SIGSTOP)
        self.standby.wait(lambda: self.standby.stands_by_again(hung),
                          'another QEMU')
        self.protected(self.primary, self.standby)
        self.assertEqual(self.primary.pid, before)

    def test_hang_primary(self) -> None:
        """It is ended before the other side takes over."""
        hung = self.primary.signal(signal.SIGSTOP)
        self.standby.order('failover')
        self.protected(self.standby, self.primary)
        self.assertNotEqual(self.primary.pid, hung)

    def test_stop_hung(self) -> None:
        """Who has heard that it is stopped may rely on that."""
        hung = self.primary.signal(signal.SIGSTOP)
        self.primary.kill_keeper()
        self.primary.start()
        self.assertEqual(self.primary.state, 'finding')
        self.primary.order('stop', '--force')
        line = Path(f'/proc/{hung}/cmdline')
        self.assertFalse(line.exists() and line.read_bytes())
        self.standby.order('failover')
        self.primary.order('standby')
        self.protected(self.standby, self.primary)

    def test_switch(self) -> None:
        """From either side."""
        self.primary.order('switch')
        self.protected(self.standby, self.primary)
        self.primary.order('switch')
        self.protected(self.primary, self.standby)

    def test_keepers_restart(self) -> None:
        """Keepers may end and come back: both QEMUs go on."""
        before = self.same()
        for side in self.sides.values():
            side.kill_keeper()
            self.assertEqual(side.run('status').returncode, NO_KEEPER)
        for side in self.sides.values():
            side.start()
        self.protected(self.primary, self.standby)
        self.assertEqual(self.same(), before)

    def test_secondary_lost_without_keeper(self) -> None:
        """A person vouches for it that the peer is down."""
        self.standby.kill_keeper()
        os.kill(self.standby.last_pid, signal.SIGKILL)
        self.unprotected(self.primary, 'asking')
        self.assertIn('--peer-is-down', self.primary.run('status').stdout)
        self.primary.order('alone', '--peer-is-down')
        self.primary.check_guest()
        self.standby.start()
        self.protected(self.primary, self.standby)

    def test_alone(self) -> None:
        """Until it is to be protected again; and only what changed."""
        self.primary.order('alone')
        self.unprotected(self.primary, 'held')
        self.primary.check_guest()
        self.standby.order('stop')
        self.unprotected(self.standby, 'stopped')
        self.standby.order('standby')
        self.primary.order('protect')
        self.protected(self.primary, self.standby)
        copied = sum(disk['copied-bytes'] for disk in json.loads(
            self.primary.run('status', '--json').stdout)['disks'])
        self.assertGreater(copied, 0)

    def test_what_returns_is_known(self) -> None:
        """Only what has changed is copied to a host that has crashed."""
        # the first copy is in the logs for a while, as it were a change
        self.primary.wait(lambda: not any(
            last_region_logged(self.primary.folder / f'disk{disk}.raw.meta')
            for disk in range(DISKS.count)), 'the log', LOG_SECONDS)
        self.primary.signal(signal.SIGKILL)
        self.unprotected(self.primary, 'down')
        images = [self.primary.folder / f'disk{disk}.raw'
                  for disk in range(DISKS.count)]
        for image in images:
            with open(image, 'r+b') as file:
                file.seek(-len(MARK), os.SEEK_END)
                file.write(MARK)
        self.standby.order('failover')
        self.protected(self.standby, self.primary)
        for image in images:
            self.assertEqual(image.read_bytes()[-len(MARK):], MARK)

    def test_wrong_disks(self) -> None:
        """They are not overwritten, and it is said why."""
        self.standby.order('stop')
        self.unprotected(self.primary, 'alone')
        for suffix in ('raw', 'raw.meta'):
            first, second = [self.standby.folder / f'disk{disk}.{suffix}'
                             for disk in range(2)]
            spare = self.standby.folder / 'spare'
            first.rename(spare)
            second.rename(first)
            spare.rename(second)
        before = [self.standby.folder.joinpath(f'disk{disk}.raw').read_bytes()
                  for disk in range(2)]
        self.standby.order('standby')
        self.primary.wait(
            lambda: 'that is of another disk' in self.primary.run(
                'status').stdout, 'to be told')
        self.standby.order('stop')
        self.assertEqual(before, [
            self.standby.folder.joinpath(f'disk{disk}.raw').read_bytes()
            for disk in range(2)])
        self.standby.order('standby', '--force')
        self.protected(self.primary, self.standby)

    def test_shutdown(self) -> None:
        """The guest's own: the standby does not take over, but waits."""
        self.primary.console.send('finish')
        self.unprotected(self.primary, 'off')
        self.unprotected(self.standby, 'standby')
        self.primary.wait(lambda: self.primary.data == 'sole',
                          'the peer to give up')
        self.assertEqual(self.primary.console.lines('FAIL', 'WRONG'), [])
        self.primary.order('protect')
        self.protected(self.primary, self.standby)

    def test_panic(self) -> None:
        """Of the VM it is the end, and of what stands by it is not."""
        before = self.primary.pid
        dead = self.standby.pid
        self.standby.qmp('inject-nmi')
        self.standby.wait(lambda: self.standby.stands_by_again(dead),
                          'another QEMU')
        self.protected(self.primary, self.standby)
        self.assertEqual(self.primary.pid, before)
        self.primary.qmp('inject-nmi')
        self.unprotected(self.primary, 'off')
        self.unprotected(self.standby, 'standby')
        self.primary.wait(lambda: self.primary.data == 'sole',
                          'the peer to give up')
        self.primary.order('protect')
        self.protected(self.primary, self.standby)

    def test_reboot(self) -> None:
        """The guest's own: both QEMUs go on."""
        before = self.same()
        beats = self.primary.console.beats()
        self.primary.qmp('system_reset')
        self.primary.wait(
            lambda: self.primary.console.beats()[-1].number
            < beats[-1].number, 'the reboot', GUEST_SECONDS)
        self.protected(self.primary, self.standby)
        self.assertEqual(self.same(), before)

    def test_refusals(self) -> None:
        """What would do harm is not done."""
        before = self.same()
        for side, words, text in (
                (self.primary, ['failover'], 'runs the VM'),
                (self.primary, ['standby'], 'runs the VM'),
                (self.primary, ['stop'], 'say --force'),
                (self.standby, ['protect'], 'stands by'),
                (self.standby, ['alone'], 'stands by')):
            self.assertIn(text, side.order(*words, status=REFUSED))
        self.protected(self.primary, self.standby)
        self.assertEqual(self.same(), before)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
