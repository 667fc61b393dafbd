# SPDX-License-Identifier: GPL-2.0-or-later
"""
A server of NBD that takes one request at a time, each from its first byte to
the last one of its reply, and that can hang up or stall anywhere in between.

Neither can be asked of qemu-nbd, which reads ahead while it sends.
"""

import socket
import struct
import threading
from typing import List, NamedTuple, Optional, Set, Tuple, Union

GREETING = struct.Struct('>QQH')
OPTION = struct.Struct('>QII')
OPTION_REPLY = struct.Struct('>QIII')
EXPORT_INFO = struct.Struct('>HQH')
REQUEST = struct.Struct('>IHHQQI')
REPLY = struct.Struct('>IIQ')

GREETING_MAGIC = 0x4e42444d41474943
OPTION_MAGIC = 0x49484156454f5054
OPTION_REPLY_MAGIC = 0x3e889045565a9
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698

FIXED_NEWSTYLE = 1
OPT_GO = 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, 0x80000001
INFO_EXPORT = 0
HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM = 1, 4, 8, 32
SEND_WRITE_ZEROES = 64
CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH = 0, 1, 2, 3
CMD_TRIM, CMD_WRITE_ZEROES = 4, 6

# A client that hangs does not hang the test for longer
SOCKET_SECONDS = 30.0


class HungUp(Exception):
    """The connection has ended, by whichever side."""


class Life(NamedTuple):
    """How a connection goes: so many bytes of requests are taken."""
    bytes_taken: Optional[int] = None
    # then: read nothing more, but stay
    stalls: bool = False


class OneSlotServer:
    """
    Serves as many connections as it has lives, one by one: at a path, or from
    somebody else's socket.
    """

    flags = HAS_FLAGS | SEND_FLUSH

    def __init__(self, place: Union[str, socket.socket], data: bytearray,
                 *lives: Life) -> None:
        self.data = data
        # The writes that a reply was sent to
        self.done: Set[int] = set()
        self.connections = 0
        self.stalled = threading.Event()
        self.request_flags = 0
        self._lives: List[Life] = list(lives)
        self._life = Life()
        self._taken = 0
        self.conn: Optional[socket.socket] = None
        self._end = threading.Event()
        if isinstance(place, str):
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(place)
            self._listener.listen()
        else:
            self._listener = place
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        """End, also in the middle."""
        self._end.set()
        for sock in self._listener, self.conn:
            try:
                if sock:
                    sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                # it has ended by itself
                pass
        self._thread.join()

    def wait_for_end(self) -> None:
        """Do nothing until close()"""
        self._end.wait()

    def _serve(self) -> None:
        with self._listener:
            for self._life in self._lives:
                try:
                    conn, _ = self._listener.accept()
                except OSError:
                    return
                conn.settimeout(SOCKET_SECONDS)
                self.connections += 1
                self.conn, self._taken = conn, 0
                with conn:
                    try:
                        self.negotiate()
                        while not self._end.is_set():
                            self.answer()
                    except (HungUp, OSError):
                        pass

    def send(self, data: bytes) -> None:
        assert self.conn
        self.conn.sendall(data)

    def recv(self, size: int) -> bytearray:
        assert self.conn
        data = bytearray(size)
        view = memoryview(data)
        while view:
            length = self.conn.recv_into(view)
            if not length:
                raise HungUp
            view = view[length:]
        return data

    def negotiate(self) -> None:
        """Until the transmission begins"""
        self.send(GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE))
        self.recv(4)
        option = None
        while option != OPT_GO:
            _, option, length = OPTION.unpack(self.recv(OPTION.size))
            self.recv(length)
            if option == OPT_GO:
                self._tell(option, REP_INFO, EXPORT_INFO.pack(
                    INFO_EXPORT, len(self.data), self.flags))
                self._tell(option, REP_ACK)
            else:
                self._tell(option, REP_ERR_UNSUP)

    def _tell(self, option: int, reply: int, data: bytes = b'') -> None:
        self.send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply,
                                    len(data)) + data)

    def _take(self, size: int) -> bytearray:
        """A part of a request, if life lasts for so long"""
        life = self._life
        if life.bytes_taken is not None:
            left = life.bytes_taken - self._taken
            if left < size:
                self.recv(left)
                if life.stalls:
                    self.stalled.set()
                    self.wait_for_end()
                raise HungUp
        self._taken += size
        return self.recv(size)

    def write(self, start: int, data: bytes) -> None:
        """A write that has arrived"""
        self.data[start:start + len(data)] = data
        self.done.add(start)

    def request(self) -> Tuple[int, int, int, int]:
        """Command, cookie, start and length of the next request"""
        magic, flags, command, cookie, start, length = REQUEST.unpack(
            self._take(REQUEST.size))
        assert magic == REQUEST_MAGIC
        self.request_flags = flags
        return command, cookie, start, length

    def answer(self) -> None:
        """One request, and all of its reply before the next"""
        self.do(*self.request())

    def do(self, command: int, cookie: int, start: int, length: int) -> None:
        if command == CMD_DISC:
            raise HungUp
        if command == CMD_READ:
            self.reply(cookie, self.data[start:start + length])
            return
        if command == CMD_WRITE:
            self.write(start, self._take(length))
        elif command in (CMD_TRIM, CMD_WRITE_ZEROES):
            self.write(start, bytes(length))
        self.reply(cookie)

    def reply(self, cookie: int, data: bytes = b'') -> None:
        self.send(REPLY.pack(REPLY_MAGIC, 0, cookie) + data)


class LateServer(OneSlotServer):
    """Does one write later than those that come behind it"""

    flags = HAS_FLAGS | SEND_FLUSH | SEND_TRIM | SEND_WRITE_ZEROES

    def __init__(self, path: str, data: bytearray) -> None:
        self._lock = threading.Lock()
        # It has been held, and where it has to begin below
        self.has_held = threading.Event()
        self._below = 0
        self._late: Optional[Tuple[int, int, bytes]] = None
        super().__init__(path, data, Life())

    def hold(self, below: int) -> None:
        """The next write that begins below"""
        self._below = below

    def let_go(self) -> None:
        """Do it, if it is there and not done: it is when the next has come"""
        if self._late:
            cookie, start, data = self._late
            self._late = None
            self.write(start, data)
            self.reply(cookie)

    def do(self, command: int, cookie: int, start: int, length: int) -> None:
        if command == CMD_WRITE and start < self._below:
            self._below = 0
            self._late = cookie, start, bytes(self._take(length))
            self.has_held.set()
        else:
            super().do(command, cookie, start, length)

    def reply(self, cookie: int, data: bytes = b'') -> None:
        with self._lock:
            super().reply(cookie, data)
