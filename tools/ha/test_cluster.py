#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Every failure that a cluster is there for, on two nodes and on three."""

import signal
import sys
import time
import unittest
from concurrent.futures import Future, ThreadPoolExecutor

from clustercase import (BLOCKS, OPTIONS, REST, SECONDS, ClusterCase,
                         NodeSide)
from clusternodes import LINK, NETWORKS, PAGE, Cluster
from guesthost import MIB, Disks
from page import answers, steps
from sides import configuration, toml

AGENT = '/usr/lib/ocf/resource.d/qemu-replication/vm'
OCF_TESTER = """
until crm_attribute --promotion=vm2 -N north -l forever -v 200 >/dev/null 2>&1
do sleep 0.2; done
ocf-tester -n vm2 -o config={config} {agent}
cd /usr/share/resource-agents
{agent} meta-data | xmllint --noout --relaxng metadata.rng -
"""
# What ocf-tester says of what need not be there
OPTIONAL = [f'* Your agent does not support the {name} action (optional)'
            for name in ('notify', 'reload')]


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

    def test_14_node_standby(self) -> None:
        """All of it is stopped there, the keeper as well, and then taken."""
        node = self.node(self.standby)
        node.run('crm_standby', '-v', 'on', '-N', self.primary.name)
        self.standby.wait(lambda: self.standby.state == 'alone', 'the VM',
                          SECONDS)
        node.run('crm_standby', '-D', '-N', self.primary.name)
        self.goes_on(self.standby, self.primary)


class ThreeNodes(ClusterCase):
    """One of them without the VM: who is cut off has no quorum."""
    witness = True
    agent_test: 'Future[str]'

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        # beside all others, in which nothing happens to that node
        executor = ThreadPoolExecutor()
        cls.addClassCleanup(executor.shutdown)
        cls.agent_test = executor.submit(cls.run_agent)

    @classmethod
    def run_agent(cls) -> str:
        """Have the agent run a VM of its own on the third node."""
        folder, nodes = cls.cluster.folder, cls.cluster.nodes
        config = configuration(OPTIONS.build, folder, Disks(1, MIB, 0))
        config['vm']['arguments'] = ['-nodefaults']
        config['host'] = {
            name: {'address': Cluster.address(nodes[name], LINK)}
            for name in ('north', 'east')}
        config['cluster'] = {'judge': 'pacemaker', 'resource': 'vm2'}
        # where nobody listens
        config['ports'] = {'keeper': 9990}
        path = folder / 'vm2.toml'
        path.write_text(toml(config), 'utf-8')
        (folder / 'north').mkdir()
        (folder / 'north/disk0.raw').write_bytes(bytes(MIB))
        told = ''
        while not told:
            # it may not have begun to start
            told = nodes['north'].run(
                'sh', '-c', OCF_TESTER.format(agent=AGENT, config=path),
                seconds=2 * SECONDS)
        return told

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

    def test_3_agent(self) -> None:
        """It is what Pacemaker expects of an agent."""
        self.assertEqual(self.agent_test.result().splitlines(), [
            f'Beginning tests for {AGENT}...', *OPTIONAL,
            f'{AGENT} passed all tests', '- validates'])


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
