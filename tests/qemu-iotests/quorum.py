# SPDX-License-Identifier: GPL-2.0-or-later
"""What the quorum-* tests share."""

import os
from typing import Any, List, Optional, Tuple

import iotests
from iotests import qemu_img, qemu_img_create, qemu_io
import replication
from replication import Json, Side


def main() -> None:
    """Most need no replication driver"""
    replication.main(['quorum', 'blkdebug'])


def stale_of(vm: replication.VM, quorum: str) -> List[str]:
    """The children that are neither read nor written"""
    stats = replication.stats_of(vm, quorum)
    return [child['child'] for child in stats['children'] if child['stale']]


class QuorumCase(replication.TestCase):
    """A quorum of images that were equal, each with faults of its own"""

    def setUp(self) -> None:
        super().setUp()
        self.guest = Side(replication.pattern(replication.SIZE))

    def image(self, number: int) -> str:
        return os.path.join(iotests.test_dir, f'child{number}.img')

    def create_image(self, number: int) -> None:
        """Write what the guest has into an image of the test's format"""
        path = self.image(number)
        raw = path + '.raw'
        for name in (path, raw):
            self.addCleanup(iotests.try_remove, name)
        with open(raw, 'wb') as file:
            file.write(self.guest.data)
        qemu_img_create('-f', iotests.imgfmt, path, str(len(self.guest.data)))
        qemu_io('-c', f'write -s {raw} 0 {len(self.guest.data)}', path)

    def child_options(self, number: int, faults: Json,
                      **options: Any) -> Json:
        """An image, and blkdebug above it"""
        return {'driver': 'blkdebug', 'node-name': f'child{number}',
                'image': {'driver': iotests.imgfmt,
                          'file': {'driver': 'file',
                                   'filename': self.image(number)}},
                **faults, **options}

    def add_quorum(self, *children: Json, **options: Any) -> None:
        self.vm.cmd('blockdev-add',
                    {'driver': 'quorum', 'node-name': 'top',
                     'vote-threshold': 1, 'read-pattern': 'fifo',
                     'discard': 'unmap', 'children': list(children),
                     **options})
        self.guest.uri = self.vm.export('top')

    def open(self, *faults: Json, **options: Any) -> None:
        """Open a quorum with one child for each set of faults"""
        for number in range(len(faults)):
            self.create_image(number)
        self.add_quorum(*(self.child_options(number, rules)
                          for number, rules in enumerate(faults)), **options)

    def close(self) -> None:
        """Remove the export and the quorum, to open another one"""
        self.vm.unexport('top')
        self.vm.cmd('blockdev-del', node_name='top')

    def stats(self) -> Json:
        return replication.stats_of(self.vm, 'top')

    def stale(self) -> List[str]:
        return stale_of(self.vm, 'top')

    def change(self, **args: str) -> Optional[str]:
        """Add or remove a child of the quorum; return the error"""
        return replication.error_of(
            self.vm.qmp('x-blockdev-change', parent='top', **args))

    def reports(self) -> List[Tuple[str, str]]:
        """
        Node and operation of each failure that quorum has reported since; but
        of several that one node has in a second, only the first.
        """
        # what came before the reply to a command is here by now
        self.vm.query('query-status')
        return [(event['data'].get('node-name') or event['data']['reference'],
                 event['data'].get('type', 'quorum'))
                for event in self.vm.get_qmp_events()
                if event['event'] in ('QUORUM_REPORT_BAD', 'QUORUM_FAILURE')]

    def assert_child(self, number: int, data: bytearray) -> None:
        """Compare an image that QEMU has open, and has flushed"""
        model = self.image(number) + '.raw'
        with open(model, 'wb') as file:
            file.write(data)
        result = qemu_img('compare', '-U', '-f', iotests.imgfmt, '-F', 'raw',
                          self.image(number), model, check=False)
        self.assertEqual(result.returncode, 0,
                         f'child {number}: {result.stdout.strip()}')
