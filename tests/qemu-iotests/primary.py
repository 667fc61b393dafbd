# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tests of a primary share."""

import json
import os
import signal
import subprocess
from typing import Any, Optional

import iotests
import replication
from replication import CLUSTER, SIZE, Json, Side, wait_until


class PrimaryCase(replication.TestCase):
    """A quorum of a local disk and a replication node, as COLO has it"""

    def setUp(self) -> None:
        super().setUp()
        self.server: 'Optional[subprocess.Popen[bytes]]' = None
        self.local = os.path.join(iotests.test_dir, 'local.img')
        self.remote = os.path.join(iotests.test_dir, 'remote.img')
        self.socket = os.path.join(iotests.sock_dir, 'remote')
        self.addCleanup(self.clean_up)
        self.guest = Side(replication.pattern(SIZE))

    def clean_up(self) -> None:
        self.kill_server()
        for path in (self.local, self.remote, self.socket):
            iotests.try_remove(path)

    # The secondary: a process of its own, which can be held and killed

    def serve(self, fmt: str = 'raw', faults: Optional[Json] = None,
              latency_ns: int = 0) -> None:
        image: Json = {'driver': 'file', 'filename': self.remote}
        if latency_ns:
            image = replication.slow(image, latency_ns)
        if faults:
            image = {'driver': 'blkdebug', 'image': image, **faults}
        options = json.dumps({'driver': fmt, 'file': image})
        # ends in kill_server()
        self.server = replication.nbd_server(self.socket, f'json:{options}')

    def kill_server(self) -> None:
        if self.server:
            self.server.kill()
            self.server.wait()
            self.server = None

    def hold_server(self) -> None:
        """It does nothing until it is released or killed"""
        assert self.server
        self.server.send_signal(signal.SIGSTOP)
        os.waitpid(self.server.pid, os.WUNTRACED)

    def release_server(self) -> None:
        assert self.server
        self.server.send_signal(signal.SIGCONT)

    # The primary

    def add_forward(self, link: Optional[Json] = None, **options: Any) -> None:
        self.vm.cmd('blockdev-add', {
            'driver': 'replication', 'node-name': 'forward',
            'mode': 'primary', 'file': {
                'driver': 'nbd', 'node-name': 'link', 'discard': 'unmap',
                'server': {'type': 'unix', 'path': self.socket},
                **(link or {})},
            # a server that is held is not given up
            'discard': 'unmap', 'replica-timeout': 0, **options})

    def local_disk(self, faults: Optional[Json] = None) -> Json:
        """Its node"""
        image: Json = {'driver': 'file', 'filename': self.local,
                       'discard': 'unmap'}
        if faults:
            image = {'driver': 'blkdebug', 'image': image, **faults,
                     'discard': 'unmap'}
        return {'driver': 'raw', 'node-name': 'local', 'discard': 'unmap',
                'file': image}

    def open_pair(self, local: Optional[Json] = None,
                  remote: Optional[Json] = None, link: Optional[Json] = None,
                  export: Optional[Json] = None, latency_ns: int = 0,
                  **options: Any) -> None:
        """
        local and remote are faults; options are those of replication; so long
        each write takes the server.
        """
        for path in (self.local, self.remote):
            with open(path, 'wb') as file:
                file.write(self.guest.data)
        self.serve(faults=remote, latency_ns=latency_ns)
        self.vm.cmd('blockdev-add', self.local_disk(local))
        self.add_forward(link, **options)
        self.vm.cmd('blockdev-add', {
            'driver': 'quorum', 'node-name': 'top', 'vote-threshold': 1,
            'read-pattern': 'fifo', 'discard': 'unmap',
            'children': ['local', 'forward']})
        self.guest.uri = self.vm.export('top', **(export or {}))

    def write_all_kinds(self, byte: int) -> None:
        self.guest.write_many([
            (0, CLUSTER, byte),
            (3 * CLUSTER + 1, 1, byte + 1),
            (4 * CLUSTER - 513, 1026, byte + 2),
            (SIZE - 1, 1, byte + 3),
        ])
        self.guest.write(6 * CLUSTER + 3, 3 * CLUSTER, byte + 4, '-f')
        self.guest.zero(CLUSTER, CLUSTER)
        self.guest.zero(10 * CLUSTER + 5, 2 * CLUSTER + 100)

    def assert_equal_disks(self) -> None:
        self.assert_side(self.guest)
        self.assert_image(self.local, self.guest.data)
        self.assert_image(self.remote, self.guest.data)

    def wait_for_error(self) -> None:
        """Forwarding has failed, or does so soon"""
        wait_until(lambda: self.vm.status() is not None,
                   'the failure to be reported')
