# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of a secondary that makes its own overlays share."""

import os
from typing import Any, Dict, List, Optional

from qemu.machine.machine import AbnormalShutdown

import iotests
import replication
import replmeta
from replication import CLUSTER, SIZE, VM, Json, Side, error_of, wait_until


class Host:
    """A QEMU with one or more disks, which are a primary's or a secondary's"""

    # each disk has its own
    metadata = False

    def __init__(self, name: str, iothreads: bool = False,
                 machine: str = 'none') -> None:
        self.name = name
        self.vm = VM(name, machine)
        # blkdebug options below the metadata
        self.meta_faults: Optional[Json] = None
        self.iothreads = iothreads
        if iothreads:
            for number in range(2):
                self.vm.add_object(f'iothread,id=iothread{number}')

    def path(self, number: int = 0) -> str:
        return os.path.join(iotests.test_dir, f'{self.name}{number}.img')

    def meta_path(self, number: int = 0) -> str:
        return os.path.join(iotests.test_dir, f'{self.name}{number}.meta')

    def overlay(self, which: str, end: str, number: int = 0) -> str:
        return f'{self.path(number)}.standby-{which}.{end}'

    def overlays(self) -> List[str]:
        """What there is of those"""
        return sorted(name for name in os.listdir(iotests.test_dir)
                      if name.startswith(self.name) and '.standby-' in name)

    def clean_up(self) -> None:
        names = [name for name in os.listdir(iotests.test_dir)
                 if name.startswith(self.name)]
        for name in names:
            os.unlink(os.path.join(iotests.test_dir, name))

    # Nodes

    def write_disk(self, data: bytes, number: int = 0) -> None:
        with open(self.path(number), 'wb') as file:
            file.write(data)

    def disk(self, number: int = 0, faults: Optional[Json] = None,
             latency_ns: int = 0) -> Json:
        image: Json = {'driver': 'file', 'filename': self.path(number),
                       'discard': 'unmap'}
        if faults:
            image = {'driver': 'blkdebug', 'image': image, 'discard': 'unmap',
                     **faults}
        if latency_ns:
            image = replication.slow(image, latency_ns)
        return {'driver': 'raw', 'node-name': f'disk{number}',
                'discard': 'unmap', 'file': image}

    def add_top(self, number: int = 0, faults: Optional[Json] = None,
                latency_ns: int = 0, **options: Any) -> None:
        self.vm.cmd('blockdev-add', self.disk(number, faults, latency_ns))
        if self.metadata:
            self.add_metadata(number)
            options['metadata'] = f'meta{number}'
        self.vm.cmd('blockdev-add', self.top(number, **options))

    def add_metadata(self, number: int) -> None:
        if not os.path.exists(self.meta_path(number)):
            size = os.stat(self.path(number)).st_size
            replmeta.create(self.meta_path(number), size)
        image: Json = {'driver': 'file', 'filename': self.meta_path(number)}
        if self.meta_faults:
            image = {'driver': 'blkdebug', 'image': image, **self.meta_faults}
        self.vm.cmd('blockdev-add', {
            'driver': 'raw', 'node-name': f'meta{number}', 'file': image})

    @staticmethod
    def top(number: int = 0, **options: Any) -> Json:
        return {'driver': 'replication', 'node-name': f'top{number}',
                'discard': 'unmap', 'file': f'disk{number}', **options}

    def export(self, node: str, number: int = 0) -> str:
        options: Json = {}
        if self.iothreads:
            options = {'iothread': f'iothread{number}'}
        return self.vm.export(f'{node}{number}', **options)

    @staticmethod
    def standby(number: int = 0, **options: Any) -> Json:
        """What makes a top a secondary"""
        return {'mode': 'secondary', 'replica-node-name': f'replica{number}',
                **options}

    def guest(self, data: bytes, number: int = 0) -> Side:
        """Its way into the disk"""
        side = Side(bytearray(data))
        side.uri = self.export('top', number)
        return side

    def add_primary(self, data: bytes, number: int = 0,
                    **options: Any) -> Side:
        """The node that the guest uses, on a new disk with this data"""
        self.write_disk(data, number)
        self.add_top(number, mode='primary', replica=None, **options)
        return self.guest(data, number)

    def add_standby(self, data: Optional[bytes] = None, number: int = 0,
                    **options: Any) -> Side:
        """The same of a secondary, which is exported for the primary"""
        if data is not None:
            self.write_disk(data, number)
        self.add_top(number, **self.standby(number, **options))
        self.export('replica', number)
        if self.metadata:
            self.export('meta', number)
        return self.guest(data or b'', number)

    def address(self) -> str:
        """Of what it exports"""
        return self.vm.sock

    def add_link(self, other: 'Host', number: int = 0) -> None:
        links = {f'link{number}': f'replica{number}'}
        if self.metadata:
            links[f'link-meta{number}'] = f'meta{number}'
        for name, export in links.items():
            self.vm.cmd('blockdev-add', {
                'driver': 'nbd', 'node-name': name, 'export': export,
                'discard': 'unmap',
                'server': {'type': 'unix', 'path': other.address()}})

    # Commands

    def sync(self, number: int = 0, **options: Any) -> None:
        if self.metadata:
            options.setdefault('replica-metadata', f'link-meta{number}')
        self.vm.cmd('x-block-replica-sync', {
            'job-id': f'sync{number}', 'node-name': f'top{number}',
            'replica': f'link{number}', **options})

    def wait_synced(self) -> None:
        event = self.vm.event_wait('BLOCK_JOB_COMPLETED', timeout=20.0)
        assert event and 'error' not in event['data'], event

    def stats(self, number: int = 0) -> Dict[str, Any]:
        return replication.stats_of(self.vm, f'top{number}')

    def stage(self, number: int = 0) -> str:
        return str(self.stats(number)['stage'])

    def wait_stage(self, stage: str, number: int = 0) -> None:
        wait_until(lambda: self.stage(number) == stage,
                   f'stage {stage} of {self.name}')

    def wait_merging(self) -> None:
        wait_until(lambda: self.stats()['failover']['total'],
                   'the merge to begin')

    def is_alone(self, number: int = 0) -> bool:
        """A primary, which has no replica"""
        stats = self.stats(number)
        return bool(stats['mode'] == 'primary' and stats['stage'] == 'none')

    def wait_alone(self, number: int = 0) -> None:
        wait_until(lambda: self.is_alone(number), f'{self.name} to be alone')

    def detach_error(self) -> Optional[str]:
        return error_of(self.vm.qmp('x-block-replica-detach',
                                    {'node-name': 'top0'}))


class StandbyCase(replication.TestCase):
    """Two hosts: a with the primary, b with the secondary"""

    disks = 1
    size = SIZE
    iothreads = False
    metadata = False

    def setUp(self) -> None:
        self.hosts: List[Host] = []
        super().setUp()
        self.a_guests: List[Side] = []
        self.b_guests: List[Side] = []
        # what the secondary's disk has before
        self.other = bytearray(b'\x5a' * self.size)

    def launch(self) -> None:
        self.a = self.host('a')
        self.b = self.host('b')
        for host in self.hosts:
            self.addCleanup(host.clean_up)
        self.vm = self.b.vm

    def host(self, name: str) -> Host:
        host = Host(name, self.iothreads, self.machine)
        host.metadata = self.metadata
        host.vm.launch()
        self.hosts.append(host)
        return host

    def quit(self) -> None:
        for host in self.hosts:
            self.vm = host.vm
            super().quit()

    # Steps

    def open(self, **options: Any) -> None:
        """Both sides, with different data"""
        for number in range(self.disks):
            self.a_guests.append(self.a.add_primary(
                replication.pattern(self.size), number))
            self.b_guests.append(self.b.add_standby(
                self.other, number, **options))
            self.a.add_link(self.b, number)

    def sync(self, **options: Any) -> None:
        for number in range(self.disks):
            self.a.sync(number, **options)
            self.a.wait_synced()

    def start(self) -> None:
        self.b.vm.start()
        self.a.vm.start(primary=True)
        self.checkpointed()

    def protect(self, **options: Any) -> None:
        self.open(**options)
        self.sync()
        self.start()

    def checkpoint(self) -> None:
        self.a.vm.checkpoint()
        self.b.vm.checkpoint()
        self.checkpointed()

    def checkpointed(self) -> None:
        for primary, secondary in zip(self.a_guests, self.b_guests):
            secondary.data[:] = primary.data

    def kill(self, host: Host) -> None:
        """As its power would"""
        self.hosts.remove(host)
        try:
            host.vm.shutdown(hard=True)
        except AbnormalShutdown:
            pass

    def failover(self) -> None:
        """The primary is lost"""
        self.kill(self.a)
        self.b.vm.stop_replication(failover=True)

    def fail_back(self, sync: Optional[Json] = None, **options: Any) -> None:
        """The host that was lost is the secondary, with its old disks"""
        self.a, self.b = self.b, self.restart(self.a)
        self.a_guests, self.b_guests = self.b_guests, []
        for number in range(self.disks):
            self.b_guests.append(self.b.add_standby(None, number, **options))
            self.a.add_link(self.b, number)
        self.sync(**(sync or {}))
        self.start()

    def restart(self, host: Host) -> Host:
        """With the images that it had"""
        return self.host(host.name)

    def write_both(self, byte: int) -> None:
        """Writes of both guests apart, over each other and at odd offsets"""
        for primary, secondary in zip(self.a_guests, self.b_guests):
            self.write_primary(primary, byte)
            secondary.write_many([
                (3 * CLUSTER + 8, 700, byte + 4),
                (6 * CLUSTER, 2 * CLUSTER + 1, byte + 5),
                (SIZE - 1, 1, byte + 7),
            ])
            secondary.zero(12 * CLUSTER, CLUSTER)

    @staticmethod
    def write_primary(primary: Side, byte: int) -> None:
        primary.write_many([
            (0, CLUSTER, byte),
            (3 * CLUSTER + 7, 3, byte + 1),
            (7 * CLUSTER + 1, 2 * CLUSTER, byte + 2),
            (SIZE - 1000, 1000, byte + 3),
        ])
        primary.zero(10 * CLUSTER, CLUSTER + 512)

    # Data

    def assert_both(self) -> None:
        for side in (*self.a_guests, *self.b_guests):
            self.assert_side(side)

    def assert_alone(self, host: Host, sides: List[Side]) -> None:
        """It needs nothing but its disks"""
        for number, side in enumerate(sides):
            host.wait_alone(number)
            side.write(5 * CLUSTER + 3, 4096, 0xee)
            self.assert_side(side)
            self.assert_image(host.path(number), side.data)
        self.assertEqual(host.overlays(), [])


class LonelyCase(StandbyCase):
    """Only the secondary, and a client that does what the primary would"""

    def launch(self) -> None:
        self.b = self.host('b')
        self.addCleanup(self.b.clean_up)
        self.vm = self.b.vm

    def add(self, number: int = 0, size: int = SIZE, **options: Any) -> None:
        """What a disk had before, both sides see"""
        data = replication.pattern(size)
        self.b_guests.append(self.b.add_standby(data, number, **options))
        primary = Side(bytearray(data))
        primary.uri = self.b.vm.uri(f'replica{number}')
        self.a_guests.append(primary)

    @property
    def primary(self) -> Side:
        return self.a_guests[0]

    @property
    def survivor(self) -> Side:
        return self.b_guests[0]

    def overwrite(self, byte: int = 0x10) -> None:
        """Some of the disk, as it is brought in step"""
        for number, primary in enumerate(self.a_guests):
            self.write_primary(primary, byte)
            self.b.wait_stage('syncing', number)

    def start(self) -> None:
        self.b.vm.start()
        self.checkpointed()

    def checkpoint(self) -> None:
        self.b.vm.checkpoint()
        self.checkpointed()

    def failover(self) -> None:
        self.b.vm.stop_replication(failover=True)

    def assert_fenced(self) -> None:
        for primary in self.a_guests:
            self.assertFalse(primary.io('write 0 512'))
            self.assertFalse(primary.io('write -z 0 512'))
            self.assertFalse(primary.io('discard 0 64k'))

    def assert_went_on_alone(self) -> None:
        self.assert_alone(self.b, self.b_guests)
        self.assert_fenced()
        self.assert_alone(self.b, self.b_guests)
