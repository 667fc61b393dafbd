# SPDX-License-Identifier: GPL-2.0-or-later
"""What the demo shows: one line for each thing that happens."""

import sys
import time
from typing import Sequence

WIDTH = 78
BAR = 24


class Screen:
    """Writes lines with the time since the start.

    On a terminal a progress line is redrawn in place; elsewhere a line is
    written for each quarter.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._tty = sys.stdout.isatty()
        self._redrawing = False
        self._quarter = 0

    def _prefix(self, topic: str) -> str:
        return f'{time.monotonic() - self._start:6.1f} s  {topic:<11}'

    def say(self, topic: str, text: str) -> None:
        """Write a line."""
        self.end_progress()
        print(self._prefix(topic) + text, flush=True)

    def end_progress(self) -> None:
        """Wipe a line that was being redrawn."""
        if self._redrawing:
            print(f'\r{"":<{WIDTH}}\r', end='', flush=True)
            self._redrawing = False

    def progress(self, topic: str, parts: Sequence[float]) -> None:
        """Show how far some things are that go on at once."""
        done = sum(parts) / len(parts)
        filled = int(done * BAR)
        each = ' '.join(f'{100 * part:.0f} %' for part in parts[:6])
        text = f'[{"#" * filled}{"." * (BAR - filled)}] {each}'
        if self._tty:
            line = (self._prefix(topic) + text)[:WIDTH]
            print(f'\r{line:<{WIDTH}}', end='', flush=True)
            self._redrawing = True
        elif int(done * 4) > self._quarter:
            self._quarter = int(done * 4)
            self.say(topic, text)

    def heading(self, text: str) -> None:
        """Write a line without a time, after an empty one."""
        self.end_progress()
        print(f'\n{text}', flush=True)

    def item(self, name: str, text: str, good: bool = True) -> None:
        """Write a line of the verdict."""
        mark = ' ' if good else '!'
        print(f' {mark} {name:<26} {text}', flush=True)
