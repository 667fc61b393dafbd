# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest says on its second serial port, as it says it."""

import re
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Dict, List, Optional

_BEAT = re.compile(r'BEAT n=(\d+) ready=([01]) tx=(\d+) writes=(\d+) '
                   r'reads=(\d+) wrong=(\d+)')


@dataclass(frozen=True)
class Beat:
    """One of the worker's regular lines, with the time it arrived."""
    when: float
    number: int
    ready: bool
    tx: int
    writes: int
    reads: int
    wrong: int


def parse_beat(line: str, when: float) -> Optional[Beat]:
    """Return the beat that a line holds, or None for any other line.

    A secondary's first line after a checkpoint may be cut: it is no beat.
    """
    found = _BEAT.fullmatch(line)
    if not found:
        return None
    number, ready, tx, writes, reads, wrong = map(int, found.groups())
    return Beat(when, number, bool(ready), tx, writes, reads, wrong)


class Console:
    """Reads all that a guest says, so that it never blocks on its port."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._news = threading.Condition()
        self._closed = False
        self._lines: List[str] = []
        self._beats: List[Beat] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._socket.makefile('rb') as stream:
            try:
                for raw in stream:
                    self._take(raw.decode(errors='replace').strip('\r\n'))
            except OSError:
                # QEMU is gone: there is nothing more to read.
                pass
        with self._news:
            self._closed = True
            self._news.notify_all()

    def _take(self, line: str) -> None:
        beat = parse_beat(line, time.time())
        with self._news:
            if beat:
                self._beats.append(beat)
            else:
                self._lines.append(line)
            self._news.notify_all()

    @property
    def beat(self) -> Optional[Beat]:
        """The last beat, if there was one."""
        with self._news:
            return self._beats[-1] if self._beats else None

    def beats(self) -> List[Beat]:
        """Return all beats so far."""
        with self._news:
            return list(self._beats)

    def last_before(self, when: float) -> Optional[Beat]:
        """Return the last beat that had arrived at the given time."""
        return next((beat for beat in reversed(self.beats())
                     if beat.when <= when), None)

    def lines(self, word: str) -> List[str]:
        """Return all other lines that begin with word."""
        with self._news:
            return [line for line in self._lines
                    if line.split(' ', 1)[0] == word]

    def wait(self, timeout: float) -> None:
        """Return at the next line, or after timeout seconds."""
        with self._news:
            self._news.wait(timeout)

    def wait_for(self, ready: Callable[[], bool], timeout: float) -> bool:
        """Wait until ready, which is asked after every line.

        False when it is not ready in time, or never can be.
        """
        with self._news:
            return self._news.wait_for(lambda: self._closed or ready(),
                                       timeout) and ready()

    def send(self, line: str) -> None:
        """Type a line."""
        self._socket.sendall(line.encode() + b'\n')

    def close(self) -> None:
        """Stop reading."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            # The other end is gone already.
            pass
        self._thread.join(timeout=10)
        self._socket.close()


def fields(line: str) -> Dict[str, str]:
    """Return the name=value words of a line."""
    return dict(word.split('=', 1) for word in line.split() if '=' in word)
