# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of a primary that holds both disks share."""

import os
from typing import Any, Dict, Optional

from primary import PrimaryCase
from replication import CLUSTER, SIZE, Json, error_of, wait_until


class ReplicaCase(PrimaryCase):
    """A node for the guest, and a server with its replica"""

    def open(self, local: Optional[Json] = None,
             replica: Optional[str] = None,
             options: Optional[Json] = None) -> None:
        """The node that the guest uses, with its disk; and the server"""
        with open(self.local, 'wb') as file:
            file.write(self.guest.data)
        self.vm.cmd('blockdev-add', {
            'driver': 'replication', 'node-name': 'top', 'mode': 'primary',
            'discard': 'unmap', 'replica': replica, 'replica-timeout': 0,
            'file': self.local_disk(local), **(options or {})})
        self.guest.uri = self.vm.export('top')

    def serve_new(self, size: int = SIZE,
                  faults: Optional[Json] = None) -> None:
        """A disk with something else in it"""
        with open(self.remote, 'wb') as file:
            file.write(b'\x5a' * size)
        self.serve(faults=faults)

    def add_link(self, read_only: bool = False, unmap: bool = True) -> None:
        self.vm.cmd('blockdev-add', {
            'driver': 'nbd', 'node-name': 'link',
            'discard': 'unmap' if unmap else 'ignore',
            'server': {'type': 'unix', 'path': self.socket},
            'read-only': read_only})

    def new_link(self, size: int = SIZE, keep: bool = False) -> None:
        """To another server in place of the one that was, and another disk"""
        self.vm.cmd('blockdev-del', node_name='link')
        self.kill_server()
        os.unlink(self.socket)
        if keep:
            self.serve()
        else:
            self.serve_new(size)
        self.add_link()

    def sync(self, replica: str = 'link', **options: Any) -> None:
        self.vm.cmd('x-block-replica-sync', {
            'job-id': 'sync', 'node-name': 'top', 'replica': replica,
            **options})

    def sync_error(self, replica: str = 'link', **options: Any) -> str:
        reply = self.vm.qmp('x-block-replica-sync', {
            'job-id': 'sync', 'node-name': 'top', 'replica': replica,
            **options})
        return error_of(reply) or ''

    def detach(self, **options: Any) -> None:
        self.vm.cmd('x-block-replica-detach', {'node-name': 'top', **options})

    def hurry(self) -> None:
        """Copy without a limit what is left to copy, if there is anything"""
        error = error_of(self.vm.qmp('block-job-set-speed', device='sync',
                                     speed=0))
        assert error in (None, "Block job 'sync' not found"), error

    def wait_synced(self) -> None:
        event = self.vm.event_wait('BLOCK_JOB_COMPLETED', timeout=20.0)
        assert event
        self.assertNotIn('error', event['data'])
        self.assertEqual(self.stats()['replica-state'], 'synced')

    def sync_and_wait(self, **options: Any) -> None:
        self.sync(**options)
        self.wait_synced()

    def stats(self) -> Dict[str, Any]:
        for node in self.vm.query('query-blockstats', query_nodes=True):
            if node.get('node-name') == 'top':
                stats = node['driver-specific']
                assert isinstance(stats, dict)
                return stats
        raise KeyError('top')

    def assert_both(self) -> None:
        """Once all has arrived"""
        wait_until(lambda: self.stats()['pending-requests'] == 0,
                   'what is forwarded')
        self.assert_equal_disks()

    def write_some(self, byte: int) -> None:
        self.write_all_kinds(byte)
        self.guest.zero(12 * CLUSTER, CLUSTER, '-u')
