# SPDX-License-Identifier: GPL-2.0-or-later
"""
The metadata of block replication, as docs/replication-metadata.txt has it.

Shares nothing with the driver, so that one tests the other.
"""

import struct
import uuid
from dataclasses import dataclass, field
from functools import lru_cache
from typing import List, Optional, Set

RECORD = 4096
LOG = 4 * RECORD
REGION = 1 << 20
HISTORY = 8

NONE = uuid.UUID(int=0)

PRIMARY, SECONDARY = 1, 2
OK, MERGING = 0, 1
SYNC, STARTED = 1, 2

_HEADER = struct.Struct('<8sIIQQII')
_OWN = struct.Struct('<IIQ8x16s16s16s16s128s1024s1024s')
_PEER = struct.Struct('<24x16s16s16s')


@lru_cache(maxsize=1024)
def _crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit"""
    crc = 0xffffffff
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82f63b78 if crc & 1 else 0)
    return crc ^ 0xffffffff


def size_for(disk: int) -> int:
    """Of the metadata of a disk"""
    log = (-(-disk // REGION) + 7) // 8
    return LOG + -(-log // RECORD) * RECORD


@dataclass
class Own:
    """What the owner of a disk says of it"""
    size: int
    sequence: int = 1
    role: int = SECONDARY
    state: int = OK
    log_void: bool = False
    absorbed: int = 0
    disk_id: uuid.UUID = NONE
    current: uuid.UUID = NONE
    base: uuid.UUID = NONE
    instance: uuid.UUID = NONE
    history: List[uuid.UUID] = field(default_factory=list)
    active: str = ''
    hidden: str = ''

    def pack(self, version: int = 1) -> bytes:
        history = b''.join(one.bytes for one in self.history)
        data = _HEADER.pack(b'QREPLOWN', version, 0, self.sequence, self.size,
                            REGION, int(self.log_void))
        data += _OWN.pack(self.role, self.state, self.absorbed,
                          self.disk_id.bytes, self.current.bytes,
                          self.base.bytes, self.instance.bytes, history,
                          self.active.encode(), self.hidden.encode())
        return _seal(data)


@dataclass
class Peer:
    """What a primary has announced"""
    kind: int
    size: int
    sequence: int = 1
    full: bool = False
    log_void: bool = False
    disk_id: uuid.UUID = NONE
    generation: uuid.UUID = NONE
    instance: uuid.UUID = NONE

    def pack(self, version: int = 1) -> bytes:
        data = _HEADER.pack(b'QREPLPEE', version, self.kind, self.sequence,
                            self.size, REGION,
                            int(self.full) | 2 * int(self.log_void))
        data += _PEER.pack(self.disk_id.bytes, self.generation.bytes,
                           self.instance.bytes)
        return _seal(data)


def _seal(data: bytes) -> bytes:
    data = data.ljust(RECORD - 4, b'\0')
    return data + struct.pack('<I', _crc32c(data))


def _newest(data: bytes, at: int) -> bytes:
    """The one of two copies that counts, or nothing"""
    best, sequence = b'', 0
    for copy in (data[at:at + RECORD], data[at + RECORD:at + 2 * RECORD]):
        crc = struct.unpack('<I', copy[-4:])[0]
        if crc == _crc32c(copy[:-4]) and _HEADER.unpack_from(copy)[1] == 1:
            if _HEADER.unpack_from(copy)[3] > sequence:
                best, sequence = copy, _HEADER.unpack_from(copy)[3]
    return best


def _text(raw: bytes) -> str:
    return raw.split(b'\0', 1)[0].decode()


def parse_own(data: bytes) -> Optional[Own]:
    """Of all of the metadata"""
    copy = _newest(data, 0)
    if not copy:
        return None
    _, _, _, sequence, size, _, flags = _HEADER.unpack_from(copy)
    (role, state, absorbed, disk_id, current, base, instance, history, active,
     hidden) = _OWN.unpack_from(copy, _HEADER.size)
    return Own(
        size=size, sequence=sequence, role=role, state=state,
        log_void=bool(flags & 1), absorbed=absorbed,
        disk_id=uuid.UUID(bytes=disk_id), current=uuid.UUID(bytes=current),
        base=uuid.UUID(bytes=base), instance=uuid.UUID(bytes=instance),
        history=[uuid.UUID(bytes=one)
                 for one in (history[16 * i:16 * i + 16]
                             for i in range(HISTORY)) if any(one)],
        active=_text(active), hidden=_text(hidden))


def parse_peer(data: bytes) -> Optional[Peer]:
    copy = _newest(data, 2 * RECORD)
    if not copy:
        return None
    _, _, kind, sequence, size, _, flags = _HEADER.unpack_from(copy)
    disk_id, generation, instance = _PEER.unpack_from(copy, _HEADER.size)
    return Peer(
        kind=kind, size=size, sequence=sequence, full=bool(flags & 1),
        log_void=bool(flags & 2),
        disk_id=uuid.UUID(bytes=disk_id), instance=uuid.UUID(bytes=instance),
        generation=uuid.UUID(bytes=generation))


def parse_log(data: bytes) -> Set[int]:
    """The regions in the log"""
    return {8 * i + bit for i, byte in enumerate(data[LOG:]) if byte
            for bit in range(8) if byte >> bit & 1}


def _read(path: str) -> bytes:
    with open(path, 'rb') as file:
        return file.read()


def read_own(path: str) -> Own:
    own = parse_own(_read(path))
    if not own:
        raise ValueError(f'{path} has no valid record of its own')
    return own


def read_peer(path: str) -> Peer:
    peer = parse_peer(_read(path))
    if not peer:
        raise ValueError(f'nobody has announced anything in {path}')
    return peer


def read_log(path: str) -> Set[int]:
    return parse_log(_read(path))


def create(path: str, disk: int) -> None:
    """Nothing is known"""
    with open(path, 'wb') as file:
        file.truncate(size_for(disk))


def _put(path: str, at: int, data: bytes) -> None:
    with open(path, 'r+b') as file:
        file.seek(at)
        file.write(data)


def write_own(path: str, own: Own, version: int = 1) -> None:
    _put(path, 0, 2 * own.pack(version))


def write_peer(path: str, peer: Peer, version: int = 1) -> None:
    _put(path, 2 * RECORD, 2 * peer.pack(version))


def damage(path: str, at: int) -> None:
    """A bit in both copies of the record there"""
    for copy in (0, RECORD):
        with open(path, 'r+b') as file:
            file.seek(at + copy + 100)
            byte = file.read(1)
        _put(path, at + copy + 100, bytes([byte[0] ^ 1]))


def write_log(path: str, regions: Set[int], disk: int) -> None:
    data = bytearray(size_for(disk) - LOG)
    for region in regions:
        data[region // 8] |= 1 << region % 8
    _put(path, LOG, bytes(data))
