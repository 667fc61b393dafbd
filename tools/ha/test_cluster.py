#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM under a real Pacemaker, on two nodes of this machine.

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

from clusternodes import Cluster, Node, unpacked
from guest import get_guest
from guesthost import MIB, Disks
from sides import PROGRAM, Side, configuration, toml, with_guest

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


class ClusterTest(unittest.TestCase):
    """One cluster for all tests."""
    sides: Dict[str, NodeSide]
    cluster: Cluster

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
        path = folder / 'vm1.toml'
        cls.cluster = Cluster(folder, unpacked(OPTIONS.cache), path,
                              PROGRAM.with_name('ocf-vm'))
        cls.addClassCleanup(cls.cluster.close)
        atexit.register(cls.cluster.close)
        config['host'] = {name: {'address': cls.cluster.address(node)}
                          for name, node in cls.cluster.nodes.items()}
        config['cluster'] = {'judge': 'pacemaker', 'resource': 'vm'}
        path.write_text(toml(config), 'utf-8')
        cls.sides = {name: NodeSide(path, folder, name)
                     for name in cls.cluster.nodes}
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
                log = self.node(side).run(
                    'tail', '-n', '150', '/var/log/pacemaker/pacemaker.log')
                print(log)

    def node(self, side: Side) -> Node:
        """The node of a side."""
        return self.cluster.nodes[side.name]

    def goes_on(self, side: NodeSide, other: NodeSide,
                *, fenced: bool = False) -> None:
        """The VM runs there in the end, and is protected by the other."""
        side.wait(lambda: side.state in ('alone', 'copying', 'migrating',
                                         'protected'), 'the VM', SECONDS)
        runs = time.monotonic() - self.began
        side.wait(lambda: side.state == 'protected'
                  and other.state == 'secondary', 'protection', SECONDS)
        print(f'goes on after {runs:.1f} s, protected after '
              f'{time.monotonic() - self.began:.1f} s', flush=True)
        self.assertEqual(self.cluster.fenced, [other.name] if fenced else [])
        self.assertEqual(side.check_guest(), BLOCKS)

    def test_1_start(self) -> None:
        """The seeded node has got the VM, and the scores are right."""
        self.assertEqual(self.primary.name, 'east')
        self.primary.check_guest()
        node = self.node(self.primary)
        for name, score in (('east', '200'), ('west', '100')):
            self.assertEqual(node.run(
                'crm_attribute', '--promotion=vm', '-N', name, '-l',
                'forever', '-G', '-q').strip(), score)

    def test_2_kill_primary(self) -> None:
        """The standby takes the VM; it is not booted again in place."""
        self.primary.signal(signal.SIGKILL)
        self.goes_on(self.standby, self.primary)

    def test_3_kill_secondary(self) -> None:
        """The VM stays where it is."""
        before = self.primary.qemu()
        dead = self.standby.signal(signal.SIGKILL)
        self.standby.wait(lambda: self.standby.state == 'secondary'
                          and self.standby.qemu() not in (None, dead),
                          'another QEMU', SECONDS)
        self.goes_on(self.primary, self.standby)
        self.assertEqual(self.primary.qemu(), before)

    def test_4_power_cut_primary(self) -> None:
        """It is fenced, and then the standby takes the VM."""
        self.node(self.primary).power_off()
        self.goes_on(self.standby, self.primary, fenced=True)

    def test_5_power_cut_secondary(self) -> None:
        """It is fenced, and then the VM goes on."""
        before = self.primary.qemu()
        self.node(self.standby).power_off()
        self.primary.wait(lambda: self.primary.state != 'protected',
                          'the loss', SECONDS)
        self.goes_on(self.primary, self.standby, fenced=True)
        self.assertEqual(self.primary.qemu(), before)

    def test_6_cable_cut(self) -> None:
        """One of them is fenced, and the other one has the VM."""
        self.node(self.standby).unplug()
        self.primary.wait(lambda: len(self.cluster.fenced) == 1,
                          'the fence', SECONDS)
        left, gone = (self.primary, self.standby) \
            if self.cluster.fenced == [self.standby.name] \
            else (self.standby, self.primary)
        if left is self.standby:
            # without quorum the other one does not start
            self.node(left).plug()
        self.goes_on(left, gone, fenced=True)

    def test_7_switch(self) -> None:
        """As an administrator asks for it."""
        node = self.node(self.standby)
        node.run('crm_resource', '--ban', '--promoted', '-r', 'vms', '-N',
                 self.primary.name)
        self.goes_on(self.standby, self.primary)
        node.run('crm_resource', '--clear', '-r', 'vms', '-N',
                 self.primary.name)


if __name__ == '__main__':
    if os.geteuid():
        print('a cluster of namespaces needs root')
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
