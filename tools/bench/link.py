# SPDX-License-Identifier: GPL-2.0-or-later
"""A link that counts what crosses it."""

import selectors
import socket
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from monitor import SECONDS, BenchError

CHUNK = 1 << 20


class Link:
    """Passes on all bytes of one connection, both ways."""

    def __init__(self, path: Path, target: Path) -> None:
        self.bytes = 0
        self._target = target
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """Cut the connection."""
        self._end.close()
        self._thread.join(SECONDS)
        if self._thread.is_alive():
            raise BenchError('the counting link does not end')
        self._ended.close()

    def _run(self) -> None:
        with self._listener, selectors.DefaultSelector() as selector, \
                socket.socket(socket.AF_UNIX) as target:
            selector.register(self._ended, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            if selector.select()[0][0].fileobj is self._ended:
                return
            client = self._listener.accept()[0]
            with client:
                target.settimeout(SECONDS)
                client.settimeout(SECONDS)
                target.connect(str(self._target))
                selector.register(client, selectors.EVENT_READ, target)
                selector.register(target, selectors.EVENT_READ, client)
                selector.unregister(self._listener)
                self._pass_on(selector)

    def _pass_on(self, selector: selectors.BaseSelector) -> None:
        while True:
            for key, _events in selector.select():
                if key.fileobj is self._ended:
                    return
                assert isinstance(key.fileobj, socket.socket)
                data = key.fileobj.recv(CHUNK)
                if not data:
                    return
                self.bytes += len(data)
                key.data.sendall(data)


@contextmanager
def counted(path: Path, target: Path) -> Iterator[Link]:
    """A link that is there for a while."""
    link = Link(path, target)
    try:
        yield link
    finally:
        link.close()
        path.unlink()
