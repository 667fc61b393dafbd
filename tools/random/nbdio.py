# SPDX-License-Identifier: GPL-2.0-or-later
"""A client of an NBD export that waits for nothing without a limit."""

import threading
import time
from contextlib import contextmanager
from typing import Callable, Iterable, Iterator, NamedTuple, Optional

import nbd  # type: ignore

from host import Hang
from model import Write

SECONDS = 30.0
POLL = 0.1
FLAGS = {'fua': nbd.CMD_FLAG_FUA, 'no-hole': nbd.CMD_FLAG_NO_HOLE,
         'fast': nbd.CMD_FLAG_FAST_ZERO}


class Request(NamedTuple):
    """A request under way, with its data, which has to stay."""
    cookie: int
    buffer: bytearray = bytearray()


class Client:
    """A connection."""

    def __init__(self, socket: str, export: str) -> None:
        self._socket = socket
        self._export = export
        self._connect()

    def _connect(self) -> None:
        self._nbd = nbd.NBD()
        self._nbd.set_export_name(self._export)
        # QEMU takes requests of any alignment from who does not ask
        self._nbd.set_request_block_size(False)
        self._nbd.aio_connect_unix(self._socket)
        self._poll_until(self._nbd.aio_is_ready, 'a connection')

    def _connected(self) -> nbd.NBD:
        """QEMU hangs up when it fails to read in the middle of an answer."""
        if self._nbd.aio_is_closed() or self._nbd.aio_is_dead():
            self._connect()
        return self._nbd

    def close(self) -> None:
        """End the connection, in any state: libnbd does with its handle."""
        del self._nbd

    def _poll_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait, but not for longer than QEMU may take.

        Only time spent in waiting counts, and no wait more than it was meant
        to last: the whole machine may have been stopped meanwhile.
        """
        waited = 0.0
        while not done():
            if waited > SECONDS:
                raise Hang(
                    f'{self._export}: no answer to {what} in {waited:.0f} s: '
                    f'{self._nbd.connection_state()}')
            begin = time.monotonic()
            self._nbd.poll(int(1000 * POLL))
            waited += min(time.monotonic() - begin, POLL)

    def submit(self, write: Write, flag: str = '') -> Request:
        """Begin a request that changes the disk."""
        conn, flags = self._connected(), FLAGS.get(flag, 0)
        # Not in an nbd.Buffer: libnbd 1.14 does not free those
        data = bytearray(write.data)
        if write.kind == 'flush':
            cookie = conn.aio_flush()
        elif write.kind == 'trim':
            cookie = conn.aio_trim(len(data), write.offset, flags=flags)
        elif write.kind == 'zero':
            cookie = conn.aio_zero(len(data), write.offset, flags=flags)
        else:
            cookie = conn.aio_pwrite(data, write.offset, flags=flags)
        return Request(cookie, data)

    def wait(self, request: Request) -> Optional[str]:
        """Wait for the end of a request; return what failed, if it has."""
        try:
            self._poll_until(
                lambda: bool(self._nbd.aio_command_completed(request.cookie)),
                'a request')
        except nbd.Error as exc:
            return str(exc)
        return None

    def pump(self) -> None:
        """Send and receive what there is."""
        if not self._nbd.aio_is_closed() and not self._nbd.aio_is_dead():
            self._nbd.poll(1)

    def write(self, write: Write, flag: str = '') -> Optional[str]:
        """Change the disk; return what failed, if it has."""
        return self.wait(self.submit(write, flag))

    def read(self, offset: int, length: int) -> Optional[bytes]:
        """Return what is there, or nothing if that failed."""
        data = bytearray(length)
        cookie = self._connected().aio_pread(data, offset)
        if self.wait(Request(cookie, data)) is not None:
            return None
        return bytes(data)


@contextmanager
def pumped(clients: Iterable[Client]) -> Iterator[None]:
    """Meanwhile send what was submitted: QEMU waits for it when it drains."""
    end = threading.Event()

    def pump() -> None:
        while not end.is_set():
            for client in clients:
                client.pump()

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()
