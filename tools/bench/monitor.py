# SPDX-License-Identifier: GPL-2.0-or-later
"""A QMP monitor with nothing around it: its answers are timed."""

import json
import socket
import time
from typing import Any, Dict, Optional

SECONDS = 60.0

Json = Dict[str, Any]


class BenchError(Exception):
    """Something did not do what it had to."""


class Monitor:
    """A connection that a server has made to us."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SECONDS)
        self._socket = connection
        self._rest = b''
        self._message()
        self.cmd('qmp_capabilities')

    def close(self) -> None:
        """End the connection."""
        self._socket.close()

    def _message(self) -> Json:
        while b'\n' not in self._rest:
            data = self._socket.recv(1 << 16)
            if not data:
                raise BenchError('the monitor was closed')
            self._rest += data
        line, self._rest = self._rest.split(b'\n', 1)
        message: Json = json.loads(line)
        return message

    def query(self, command: str, args: Optional[Json] = None) -> Json:
        """Give a command; return the answer or the error."""
        request = {'execute': command, 'arguments': args or {}}
        try:
            self._socket.sendall(json.dumps(request).encode())
            while True:
                message = self._message()
                if 'event' not in message:
                    return message
        except OSError as exc:
            raise BenchError(f'{command}: {exc}') from exc

    def cmd(self, command: str, args: Optional[Json] = None) -> Any:
        """Give a command that has to succeed; return its answer."""
        message = self.query(command, args)
        if 'error' in message:
            raise BenchError(f"{command}: {message['error']['desc']}")
        return message['return']

    def timed(self, command: str, args: Optional[Json] = None) -> float:
        """Give a command that has to succeed; return how many ms it took."""
        begin = time.perf_counter()
        self.cmd(command, args)
        return 1000 * (time.perf_counter() - begin)
