#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM under a real Pacemaker, on nodes of this machine.

Each test begins with a protected VM, on whichever node, and ends with one
whose guest has checked every block that it ever wrote.  Needs root.
"""

import argparse
import atexit
import os
import signal
import sys
import tempfile
import time
import unittest
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from clusternodes import LINK, NETWORKS, PAGE, Cluster, Node, unpacked
from guest import get_guest
from guesthost import MIB, Disks
from page import answers, steps
from sides import (NAMES, PROGRAM, Side, configuration, toml,
                   with_guest)

DISKS = Disks(2, 20 * MIB, 16 * MIB)
BLOCKS = 6144
# Longer than any of it takes on a machine that does other things
SECONDS = 180.0
SKIPPED = 77


def parse() -> Tuple[argparse.Namespace, List[str]]:
    """Read the command line; the rest is for unittest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build', type=Path, required=True)
    parser.add_argument('--cache', type=Path, required=True)
    return parser.parse_known_args()


OPTIONS, REST = parse()


class NodeSide(Side):
    """A side whose keeper the cluster starts."""

    def qemu(self) -> Optional[int]:
        """The process, as seen from outside of the node."""
        mark = os.fsencode(self.folder / 'qemu.pid')
        for path in Path('/proc').glob('[0-9]*/cmdline'):
            try:
                words = path.read_bytes().split(b'\0')
            except OSError:
                # it has ended
                continue
            if mark in words and b'qemu-system' in words[0]:
                return int(path.parent.name)
        return None

    def signal(self, number: signal.Signals) -> int:
        """Send QEMU a signal."""
        pid = self.qemu()
        assert pid
        os.kill(pid, number)
        return pid


class ClusterCase(unittest.TestCase):
    """One cluster for all tests of a class."""
    witness = False
    sides: Dict[str, NodeSide]
    cluster: Cluster
    # what was measured, in seconds
    times: List[str] = []

    @classmethod
    def setUpClass(cls) -> None:
        # unittest goes on after any other exception
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory(prefix='ha-')
        cls.addClassCleanup(holder.cleanup)
        folder = Path(holder.name)
        config = with_guest(configuration(OPTIONS.build, folder, DISKS),
                            get_guest(OPTIONS.cache, print), DISKS)
        cls.cluster = Cluster(folder, unpacked(OPTIONS.cache),
                              PROGRAM.parent, witness=cls.witness)
        cls.addClassCleanup(cls.cluster.close)
        atexit.register(cls.cluster.close)
        config['host'] = {
            name: {'address': cls.cluster.address(cls.cluster.nodes[name],
                                                  LINK)}
            for name in NAMES}
        config['cluster'] = {'judge': 'pacemaker', 'resource': 'vm'}
        cls.sides = {}
        for name in NAMES:
            path = folder / f'etc-{name}/qemu-replication/vm1.toml'
            path.parent.mkdir()
            path.write_text(toml(config), 'utf-8')
            cls.sides[name] = NodeSide(path, folder, name)
        for disk in range(DISKS.count):
            with open(folder / f'east/disk{disk}.raw', 'wb') as image:
                image.truncate(DISKS.size)
        for node in cls.cluster.nodes.values():
            node.start()
        for side in cls.sides.values():
            cls.addClassCleanup(side.close)

    def setUp(self) -> None:
        east, west = self.sides.values()
        east.wait(lambda: {east.state, west.state}
                  == {'protected', 'secondary'}, 'protection', SECONDS)
        self.primary, self.standby = (east, west) \
            if east.state == 'protected' else (west, east)
        self.cluster.fenced.clear()
        self.began = time.monotonic()

    def tearDown(self) -> None:
        """Say what was said, if that is of use."""
        outcome = getattr(self, '_outcome').result
        if any(test is self for test, _ in outcome.failures + outcome.errors):
            for side in self.sides.values():
                print(side.words())
                print(self.node(side).run(
                    'tail', '-n', '150', '/var/log/pacemaker/pacemaker.log'))

    def node(self, side: Side) -> Node:
        """The node of a side."""
        return self.cluster.nodes[side.name]

    def cut(self, side: Side) -> None:
        """Pull all cables of a node."""
        for network in NETWORKS:
            self.node(side).unplug(network)

    def goes_on(self, side: NodeSide, other: NodeSide,
                *, fenced: bool = False) -> None:
        """The VM runs there in the end, and is protected by the other."""
        side.wait(lambda: side.state in ('alone', 'copying', 'migrating',
                                         'protected'), 'the VM', SECONDS)
        runs = time.monotonic()
        self.assertEqual(self.cluster.fenced, [other.name] if fenced else [])
        after = f', {runs - self.cluster.fenced_at:.1f} s after the fence' \
            if fenced else ''
        self.is_protected(side, other)
        self.times.append(
            f'{self.id().split("test_")[-1]}: goes on after '
            f'{runs - self.began:.1f} s{after}, protected after '
            f'{time.monotonic() - self.began:.1f} s')
        print(self.times[-1], flush=True)
        self.assertEqual(side.check_guest(), BLOCKS)

    @staticmethod
    def is_protected(side: NodeSide, other: NodeSide) -> None:
        """In the end."""
        side.wait(lambda: side.state == 'protected'
                  and other.state == 'secondary', 'protection', SECONDS)


class TwoNodes(ClusterCase):
    """As most have it."""

    def test_01_start(self) -> None:
        """The seeded node has got the VM, and the scores are right."""
        self.assertEqual(self.primary.name, 'east')
        self.primary.check_guest()
        node = self.node(self.primary)
        for name, score in (('east', '200'), ('west', '100')):
            self.assertEqual(node.run(
                'crm_attribute', '--promotion=vm', '-N', name, '-l',
                'forever', '-G', '-q').strip(), score)

    def test_02_kill_primary(self) -> None:
        """The standby takes the VM; it is not booted again in place."""
        self.primary.signal(signal.SIGKILL)
        self.goes_on(self.standby, self.primary)

    def test_03_kill_secondary(self) -> None:
        """The VM stays where it is."""
        before = self.primary.qemu()
        self.standby.signal(signal.SIGKILL)
        self.left(self.primary)
        self.goes_on(self.primary, self.standby)
        self.assertEqual(self.primary.qemu(), before)

    @staticmethod
    def left(side: NodeSide) -> None:
        """It has noticed."""
        side.wait(lambda: side.state != 'protected', 'the loss', SECONDS)

    def test_04_stop_primary(self) -> None:
        """One that hangs is ended, and the standby takes the VM."""
        self.primary.signal(signal.SIGSTOP)
        self.goes_on(self.standby, self.primary)

    def test_05_stop_secondary(self) -> None:
        """One that hangs is ended, and the VM stays where it is."""
        before = self.primary.qemu()
        self.standby.signal(signal.SIGSTOP)
        self.left(self.primary)
        self.goes_on(self.primary, self.standby)
        self.assertEqual(self.primary.qemu(), before)

    def test_06_power_cut_primary(self) -> None:
        """It is fenced, and then the standby takes the VM."""
        self.node(self.primary).power_off()
        self.goes_on(self.standby, self.primary, fenced=True)

    def test_07_power_cut_secondary(self) -> None:
        """It is fenced, and then the VM goes on."""
        before = self.primary.qemu()
        self.node(self.standby).power_off()
        self.left(self.primary)
        self.goes_on(self.primary, self.standby, fenced=True)
        self.assertEqual(self.primary.qemu(), before)

    def test_08_cable_cut(self) -> None:
        """One of them is fenced, and the other one has the VM."""
        self.cut(self.standby)
        self.primary.wait(lambda: len(self.cluster.fenced) == 1,
                          'the fence', SECONDS)
        left, gone = (self.primary, self.standby) \
            if self.cluster.fenced == [self.standby.name] \
            else (self.standby, self.primary)
        if left is self.standby:
            # without quorum the other one does not start
            for network in NETWORKS:
                self.node(left).plug(network)
        self.goes_on(left, gone, fenced=True)

    def test_09_link_cut(self) -> None:
        """Only replication's; the cluster knows that the peer may not."""
        before = self.primary.qemu()
        self.node(self.standby).unplug(LINK)
        self.primary.wait(lambda: self.primary.state == 'alone', 'the loss',
                          SECONDS)
        self.node(self.standby).plug(LINK)
        self.goes_on(self.primary, self.standby)
        self.assertEqual(self.primary.qemu(), before)

    def test_10_kill_during_resync(self) -> None:
        """The secondary, and then the only disks' QEMU, which boots."""
        primary, standby = self.primary, self.standby
        first = primary.qemu()
        standby.signal(signal.SIGKILL)
        for victim, other in ((standby, primary), (primary, standby)):
            primary.wait(lambda: primary.state in ('copying', 'migrating'),
                         'another copy', SECONDS)
            dead = victim.signal(signal.SIGKILL)
            victim.wait(lambda dead=dead, victim=victim:  # type: ignore[misc]
                        victim.qemu() not in (None, dead), 'another QEMU',
                        SECONDS)
            self.assertNotEqual(other.state, 'none')
        self.goes_on(primary, standby)
        self.assertNotEqual(primary.qemu(), first)

    def test_11_both_cut(self) -> None:
        """The VM is booted where it ran."""
        nodes = [self.node(side) for side in (self.primary, self.standby)]
        for node in nodes:
            node.power_off()
        for side in (self.primary, self.standby):
            side.forget()
        for node in nodes:
            node.start()
        self.goes_on(self.primary, self.standby)

    def test_12_switch(self) -> None:
        """As an administrator asks for it."""
        node = self.node(self.standby)
        node.run('crm_resource', '--ban', '--promoted', '-r', 'vms', '-N',
                 self.primary.name)
        self.goes_on(self.standby, self.primary)
        node.run('crm_resource', '--clear', '-r', 'vms', '-N',
                 self.primary.name)

    def test_13_fence_delay(self) -> None:
        """With one, the node with the VM wins in a partition."""
        self.node(self.primary).run(
            'crm_attribute', '-t', 'crm_config', '-n',
            'priority-fencing-delay', '-v', '3s')
        self.began = time.monotonic()
        self.cut(self.standby)
        self.left(self.primary)
        self.goes_on(self.primary, self.standby, fenced=True)


class ThreeNodes(ClusterCase):
    """One of them without the VM: who is cut off has no quorum."""
    witness = True

    def test_0_page(self) -> None:
        """What the operator's page says, command by command."""
        for step in steps(PAGE):
            for side in self.sides.values():
                if step.host in (side.name, 'both'):
                    told = self.node(side).run(
                        'sh', '-c', f'{step.command}\necho "ended: $?"'
                        ).splitlines()
                    if step.answer:
                        self.assertTrue(answers(step, told[:-1]), told)
                    self.assertEqual(told[-1], 'ended: 0', told)
            self.settle(step.command)
        self.assertEqual(self.sides['west'].check_guest(), BLOCKS)

    def settle(self, command: str) -> None:
        """The page has people wait."""
        east, west = self.sides.values()
        if '--ban' in command:
            self.is_protected(west, east)
        elif command.endswith('Stopped'):
            west.wait(lambda: not east.qemu() and not west.qemu(), 'the end',
                      SECONDS)
        elif '-d target-role' in command:
            self.is_protected(west, east)

    def test_1_power_cut_primary(self) -> None:
        """As with two."""
        self.node(self.primary).power_off()
        self.goes_on(self.standby, self.primary, fenced=True)

    def test_2_cable_cut_primary(self) -> None:
        """It is the one that is fenced."""
        self.cut(self.primary)
        self.goes_on(self.standby, self.primary, fenced=True)


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite,
               _pattern: object) -> unittest.TestSuite:
    """Not what is only there to be derived from."""
    del tests
    return unittest.TestSuite(loader.loadTestsFromTestCase(case)
                              for case in (TwoNodes, ThreeNodes))


if __name__ == '__main__':
    if os.geteuid():
        print('a cluster of namespaces needs root')
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
