# SPDX-License-Identifier: GPL-2.0-or-later
"""A protected VM under a real Pacemaker, on nodes of this machine.

Each test begins with a protected VM, on whichever node, and ends with one
whose guest has checked every block that it ever wrote.  Needs root.
"""

import argparse
import atexit
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import command
from clusternodes import LINK, NETWORKS, Cluster, Node, unpacked
from guest import get_guest
from guesthost import MIB, Disks
from sides import (NAMES, PROGRAM, Json, Side, SidesTest, configuration, toml,
                   with_guest)

DISKS = Disks(2, 20 * MIB, 16 * MIB)
BLOCKS = 6144
# Longer than any of it takes on a machine that does other things
SECONDS = 180.0
SKIPPED = 77


def parse_as_root() -> Tuple[argparse.Namespace, List[str]]:
    """Read the command line; the rest is for the test."""
    if os.geteuid():
        print('a cluster of namespaces needs root')
        sys.exit(SKIPPED)
    return command.parser(__doc__).parse_known_args()


OPTIONS, REST = parse_as_root()


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


class ClusterCase(SidesTest):
    """One cluster for all tests of a class."""
    witness = False
    sides: Dict[str, NodeSide]  # type: ignore[assignment]
    primary: NodeSide
    standby: NodeSide
    cluster: Cluster
    # what was measured, in seconds
    times: List[str] = []

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = cls.folder
        # Pacemaker asks as another user what an agent can do
        folder.chmod(0o755)
        config = cls.vm_configuration(folder)
        cls.cluster = Cluster(
            folder, unpacked(OPTIONS.cache),
            Path(shutil.copytree(PROGRAM.parent, folder / 'ha')),
            witness=cls.witness)
        cls.addClassCleanup(cls.cluster.close)
        atexit.register(cls.cluster.close)
        config['host'] = {
            name: {'address': cls.cluster.address(cls.cluster.nodes[name],
                                                  LINK)}
            for name in NAMES}
        config['cluster'] = {'judge': 'pacemaker', 'resource': 'vm'}
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

    @classmethod
    def vm_configuration(cls, folder: Path) -> Json:
        """The VM, but for the hosts."""
        return with_guest(configuration(OPTIONS.build, folder, DISKS),
                          get_guest(OPTIONS.cache, print), DISKS)

    def setUp(self) -> None:
        east, west = self.sides.values()
        east.wait(lambda: {east.state, west.state}
                  == {'protected', 'secondary'}, 'protection', SECONDS)
        self.primary, self.standby = (east, west) \
            if east.state == 'protected' else (west, east)
        self.cluster.fenced.clear()
        self.began = time.monotonic()

    def words(self, side: Side) -> str:
        return super().words(side) + self.node(side).run(
            'tail', '-n', '150', '/var/log/pacemaker/pacemaker.log')

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
