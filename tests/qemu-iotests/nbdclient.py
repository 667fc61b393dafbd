# SPDX-License-Identifier: GPL-2.0-or-later
"""
A client of NBD that leaves to the test when to send which bytes, and when to
read what the server has to say.
"""

import socket
import struct
from typing import Tuple

from nbdserver import (CMD_WRITE, FIXED_NEWSTYLE, GREETING, OPT_GO, OPTION,
                       OPTION_MAGIC, OPTION_REPLY, REP_ACK, REP_INFO, REPLY,
                       REPLY_MAGIC, REQUEST, REQUEST_MAGIC)

OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 10, 11
REP_META_CONTEXT = 4
EXTENDED_REQUEST = struct.Struct('>IHHQQQ')
EXTENDED_REQUEST_MAGIC = 0x21e41c71
CHUNK = struct.Struct('>IHHQQQ')
CHUNK_MAGIC = 0x6e8a278c
CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_ERROR = 0, 1, 1 << 15 | 1
PAYLOAD = 1 << 5
CMD_BLOCK_STATUS = 7


class Connection:
    """One connection, for as long as the socket lives"""

    def __init__(self, sock: socket.socket, extended: bool = False,
                 context: str = '') -> None:
        self.sock = sock
        self.input = sock.makefile('rb')
        self.extended = extended
        self.recv(GREETING.size)
        self.sock.sendall(struct.pack('>I', FIXED_NEWSTYLE))
        if extended:
            self.option(OPT_EXTENDED_HEADERS, b'')
        name = b'\0\0\0\4disk'
        if context:
            query = context.encode()
            self.option(OPT_SET_META_CONTEXT, name +
                        struct.pack('>II', 1, len(query)) + query)
        self.option(OPT_GO, name + bytes(2))

    def close(self) -> None:
        self.input.close()
        self.sock.close()

    def recv(self, size: int) -> bytes:
        data = self.input.read(size)
        assert len(data) == size, 'the server has hung up'
        return data

    def option(self, option: int, data: bytes) -> None:
        self.sock.sendall(OPTION.pack(OPTION_MAGIC, option, len(data)) + data)
        reply = REP_INFO
        while reply in (REP_INFO, REP_META_CONTEXT):
            _, _, reply, length = OPTION_REPLY.unpack(
                self.recv(OPTION_REPLY.size))
            self.recv(length)
        assert reply == REP_ACK

    def header(self, command: int, cookie: int, start: int = 0,
               length: int = 0, flags: int = 0) -> bytes:
        if self.extended:
            return EXTENDED_REQUEST.pack(EXTENDED_REQUEST_MAGIC, flags,
                                         command, cookie, start, length)
        return REQUEST.pack(REQUEST_MAGIC, flags, command, cookie, start,
                            length)

    def request(self, command: int, cookie: int, start: int = 0,
                length: int = 0) -> bytes:
        """With zeroes as data, if it is a write"""
        data = bytes(length if command == CMD_WRITE else 0)
        flags = PAYLOAD if data and self.extended else 0
        return self.header(command, cookie, start, length, flags) + data

    def send(self, command: int, cookie: int, start: int = 0,
             length: int = 0) -> None:
        self.sock.sendall(self.request(command, cookie, start, length))

    def chunk(self) -> Tuple[int, int, bytes]:
        """Kind, cookie and payload of the next part of a reply"""
        assert self.extended
        magic, _, kind, cookie, _, length = CHUNK.unpack(self.recv(CHUNK.size))
        assert magic == CHUNK_MAGIC
        return kind, int(cookie), self.recv(length)

    def reply(self) -> int:
        """The cookie of the next reply, which tells of success"""
        if self.extended:
            magic, flags, kind, cookie, _, length = CHUNK.unpack(
                self.recv(CHUNK.size))
            assert magic == CHUNK_MAGIC and flags == CHUNK_DONE
            assert kind == CHUNK_NONE and not length
            return int(cookie)
        magic, error, cookie = REPLY.unpack(self.recv(REPLY.size))
        assert magic == REPLY_MAGIC and not error
        return int(cookie)
