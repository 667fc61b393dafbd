# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of the metadata of block replication share."""

import json
import os
import subprocess
import uuid
from typing import Any, Callable, List, Optional

import iotests
import replication
import replmeta
from replica import ReplicaCase
from replication import MIB, Json, Side, error_of, pattern, wait_until

DISK = 24 * MIB

# Written to the metadata when a primary opens it for the first time
RECORDS = 2


def faults_after(writes: int, *rules: Json) -> Json:
    """blkdebug options: so many writes pass before any of these fail"""
    faults: Json = {
        'inject-error': [{'event': 'pwritev', 'iotype': 'write',
                          'state': writes + 1, **rule} for rule in rules]}
    if writes:
        faults['set-state'] = [
            {'event': 'pwritev', 'state': i, 'new_state': i + 1}
            for i in range(1, writes + 1)]
    return faults


class MetadataCase(ReplicaCase):
    """
    A primary with metadata, and two servers: of its replica, and of the
    metadata of that, which the test writes as a secondary would.
    """

    def setUp(self) -> None:
        super().setUp()
        self.guest = Side(pattern(DISK))
        self.meta = os.path.join(iotests.test_dir, 'local.meta')
        self.peer_meta = os.path.join(iotests.test_dir, 'remote.meta')
        self.meta_socket = os.path.join(iotests.sock_dir, 'remote-meta')
        self.meta_server: 'Optional[subprocess.Popen[bytes]]' = None
        self.addCleanup(self.remove_metadata)
        replmeta.create(self.meta, DISK)

    def remove_metadata(self) -> None:
        self.kill_meta_server()
        for path in (self.meta, self.peer_meta, self.meta_socket):
            iotests.try_remove(path)

    def kill_meta_server(self) -> None:
        if self.meta_server:
            self.meta_server.kill()
            self.meta_server.wait()
            self.meta_server = None

    # The primary

    def options(self, faults: Optional[Json] = None,
                above: Callable[[Json], Json] = lambda image: image,
                **options: Any) -> Json:
        """Of a node with metadata, what fails there, and what is above it"""
        image: Json = {'driver': 'file', 'filename': self.meta}
        if faults:
            image = {'driver': 'blkdebug', 'image': image, **faults}
        image = above(image)
        return {'driver': 'replication', 'node-name': 'top', 'mode': 'primary',
                'discard': 'unmap', 'replica': None, 'replica-timeout': 0,
                'file': self.local_disk(),
                'metadata': {'driver': 'raw', 'node-name': 'meta',
                             'file': image}, **options}

    def open_primary(self, faults: Optional[Json] = None,
                     **options: Any) -> None:
        self.vm.cmd('blockdev-add', self.options(faults, **options))
        self.guest.uri = self.vm.export('top')

    def new_primary(self, faults: Optional[Json] = None,
                    **options: Any) -> None:
        with open(self.local, 'wb') as file:
            file.write(self.guest.data)
        self.open_primary(faults, **options)

    def close_primary(self) -> None:
        self.vm.unexport('top')
        self.vm.cmd('blockdev-del', node_name='top')

    def open_error(self) -> str:
        reply = self.vm.qmp('blockdev-add', self.options())
        return error_of(reply) or ''

    def crash(self) -> None:
        """As by kill -9, and another QEMU in its place"""
        self.vm.kill()
        self.vm.launch()

    def own(self) -> replmeta.Own:
        return replmeta.read_own(self.meta)

    # The replica

    def serve_peer(self, own: Optional[replmeta.Own] = None,
                   peer: Optional[replmeta.Peer] = None,
                   log: Optional[List[int]] = None) -> None:
        """A secondary's, which has opened it"""
        replmeta.create(self.peer_meta, DISK)
        if own:
            replmeta.write_own(self.peer_meta, own)
        if peer:
            replmeta.write_peer(self.peer_meta, peer)
        if log:
            replmeta.write_log(self.peer_meta, set(log), DISK)
        self.serve_meta()

    def serve_meta(self, faults: Optional[Json] = None) -> None:
        image: Json = {'driver': 'file', 'filename': self.peer_meta}
        if faults:
            image = {'driver': 'blkdebug', 'image': image, **faults}
        options = json.dumps({'driver': 'raw', 'file': image})
        # ends in kill_meta_server()
        self.meta_server = replication.nbd_server(self.meta_socket,
                                                  f'json:{options}')

    def fresh_secondary(self) -> replmeta.Own:
        return replmeta.Own(size=DISK, instance=uuid.uuid4())

    def stop_serving(self) -> None:
        """And forget the links"""
        self.vm.cmd('blockdev-del', node_name='link')
        self.vm.cmd('blockdev-del', node_name='link-meta')
        self.kill_server()
        self.kill_meta_server()

    def add_links(self) -> None:
        self.add_link()
        self.vm.cmd('blockdev-add', {
            'driver': 'nbd', 'node-name': 'link-meta',
            'server': {'type': 'unix', 'path': self.meta_socket}})

    def sync_auto(self, **options: Any) -> None:
        self.sync_and_wait(**{'replica-metadata': 'link-meta', **options})

    def auto_error(self, **options: Any) -> str:
        return self.sync_error(**{'replica-metadata': 'link-meta', **options})

    def new_replica(self) -> None:
        """One that has had nothing"""
        self.serve_new(DISK)
        self.serve_peer(self.fresh_secondary())
        self.add_links()

    def protect(self) -> None:
        """Nothing but what changes from now on is in the log in the end"""
        self.vm.start(primary=True)
        for _ in range(3):
            self.vm.checkpoint()
        # of a log of no size, each change lets others go
        wait_until(self.log_is_short, 'the log to become short')

    def log_is_short(self) -> bool:
        self.guest.write(0, 512, 0x99)
        self.vm.checkpoint()
        return int(self.stats()['log-regions']) <= 2
