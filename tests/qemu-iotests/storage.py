# SPDX-License-Identifier: GPL-2.0-or-later
"""
Two hosts whose disks and metadata are in the test: it knows each write to
them, in which order they came, and what was flushed when.  So it can say what
there may be after a crash, and do something at any of the requests.
"""

import os
import threading
from typing import Any, Callable, List, NamedTuple, Optional

import iotests
import replmeta
from nbdserver import (CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES,
                       HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM,
                       SEND_WRITE_ZEROES, Life, OneSlotServer)
from replication import KIB, MIB, Json, pattern
from standby import Host, StandbyCase

DISK = 5 * MIB + 512 * KIB

SECTOR = 512
FUA = 1
# As often as a part may be opened
LIVES = 100


class Write(NamedTuple):
    """A write, or with nothing to write a flush"""
    part: str
    offset: int
    data: bytes
    fua: bool

    def torn(self) -> 'Write':
        """A half of it, in whole sectors"""
        half = len(self.data) // 2 // SECTOR * SECTOR
        return self._replace(data=self.data[:half])

    def covers(self, other: 'Write') -> bool:
        """That cannot get there any more"""
        return (self.offset <= other.offset and other.offset + len(other.data)
                <= self.offset + len(self.data))


def do(image: bytearray, write: Write) -> None:
    image[write.offset:write.offset + len(write.data)] = write.data


class Part(OneSlotServer):
    """A disk, or the metadata of one"""

    flags = (HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM |
             SEND_WRITE_ZEROES)

    def __init__(self, storage: 'Storage', name: str, data: bytearray) -> None:
        self.storage = storage
        self.name = name
        self.path = os.path.join(iotests.sock_dir, name)
        super().__init__(self.path, data, *LIVES * [Life()])

    def negotiate(self) -> None:
        # a disk may have nothing to do for longer
        assert self.conn
        self.conn.settimeout(None)
        super().negotiate()

    def do(self, command: int, cookie: int, start: int, length: int) -> None:
        data = b''
        if command == CMD_WRITE:
            data = bytes(self._take(length))
        elif command in (CMD_TRIM, CMD_WRITE_ZEROES):
            data = bytes(length)
        if data or command == CMD_FLUSH:
            self.storage.change(self, Write(self.name, start, data, bool(
                self.request_flags & FUA)))
            self.reply(cookie)
        else:
            super().do(command, cookie, start, length)


class Storage:
    """What the hosts have; in the log, the first is the oldest"""

    def __init__(self, **parts: bytearray) -> None:
        self.lock = threading.Lock()
        self.log: List[Write] = []
        # called before each write and flush, which wait for it
        self.hook: Callable[[Write], None] = lambda write: None
        self.first = {name: bytes(data) for name, data in parts.items()}
        self.parts = {name: Part(self, name, data)
                      for name, data in parts.items()}

    def change(self, part: Part, write: Write) -> None:
        with self.lock:
            self.hook(write)
            self.log.append(write)
            do(part.data, write)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()
            iotests.try_remove(part.path)

    def data(self, name: str) -> bytearray:
        return self.parts[name].data

    def set(self, name: str, data: bytes) -> None:
        """Nobody uses it"""
        self.parts[name].data[:] = data


class StorageHost(Host):
    """Its node has a disk and metadata of the storage's"""

    metadata = True

    def part(self, what: str) -> Json:
        return {'driver': 'nbd', 'server': {
            'type': 'unix',
            'path': os.path.join(iotests.sock_dir, f'{self.name}_{what}')}}

    def disk(self, number: int = 0, faults: Optional[Json] = None,
             latency_ns: int = 0) -> Json:
        return {'driver': 'raw', 'node-name': f'disk{number}',
                'discard': 'unmap',
                'file': {**self.part('disk'), 'discard': 'unmap'}}

    def add_metadata(self, number: int) -> None:
        self.vm.cmd('blockdev-add', {
            'driver': 'raw', 'node-name': f'meta{number}',
            'file': self.part('meta')})

    @staticmethod
    def standby(number: int = 0, **options: Any) -> Json:
        return Host.standby(number, **{'overlay-dir': iotests.test_dir,
                                       'log-size': 2 * MIB, **options})

    def overlay(self, which: str, end: str, number: int = 0) -> str:
        return os.path.join(iotests.test_dir, f'top{number}.'
                            f'standby-{which}.{end}')

    def overlays(self) -> List[str]:
        return sorted(name for name in os.listdir(iotests.test_dir)
                      if '.standby-' in name)

    def clean_up(self) -> None:
        super().clean_up()
        for name in self.overlays():
            os.unlink(os.path.join(iotests.test_dir, name))


class StorageCase(StandbyCase):
    """A primary and a secondary that have had no data before"""

    metadata = True
    size = DISK

    def launch(self) -> None:
        self.storage = Storage(
            a_disk=pattern(DISK), b_disk=bytearray(b'\x5a' * DISK),
            a_meta=bytearray(replmeta.size_for(DISK)),
            b_meta=bytearray(replmeta.size_for(DISK)))
        self.addCleanup(self.storage.close)
        super().launch()

    def host(self, name: str) -> Host:
        host = StorageHost(name)
        host.vm.launch()
        self.hosts.append(host)
        return host

    def data(self, host: Host, what: str = 'disk') -> bytearray:
        return self.storage.data(f'{host.name}_{what}')

    def open(self, **options: Any) -> None:
        self.open_primary(self.data(self.a))
        self.open_secondary(**options)

    def open_primary(self, data: bytes) -> None:
        options: Json = {'log-size': 2 * MIB}
        self.a.add_top(mode='primary', replica=None, **options)
        self.a_guests = [self.a.guest(data)]

    def open_secondary(self, **options: Any) -> None:
        self.b_guests = [self.b.add_standby(None, **options)]
        self.a.add_link(self.b)

    def remove_links(self) -> None:
        for name in ('link0', 'link-meta0'):
            self.a.vm.cmd('blockdev-del', node_name=name)

    def come_back(self) -> None:
        """The side that was lost is the secondary, with its old disk"""
        self.b = self.restart(self.b)
        self.open_secondary()

    def swap(self) -> None:
        """The secondary was promoted"""
        self.a, self.b = self.b, self.a
        self.a_guests, self.b_guests = self.b_guests, []
