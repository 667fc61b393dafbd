# SPDX-License-Identifier: GPL-2.0-or-later
"""What the tools' command lines share: options, signals, folder, progress."""

import argparse
import logging
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from math import inf
from pathlib import Path
from random import SystemRandom
from typing import Iterator, List, Optional, TextIO

WIDTH = 78
# A terminal is redrawn so often; elsewhere there is a line now and then
REDRAW_SECONDS, LINE_SECONDS = 0.5, 10.0
# A unix socket's path has room for 107 bytes; a folder and a name follow
MAX_FOLDER = 75

_held = 0
_pending: List[int] = []


def _handle(number: int, _frame: object) -> None:
    if _held:
        _pending.append(number)
    else:
        raise SystemExit(128 + number)


@contextmanager
def held() -> Iterator[None]:
    """Keep signals back.

    An exception out of the middle of a QMP command would leave the library's
    event loop in pieces, and one out of a clean-up would end that.
    """
    global _held  # pylint: disable=global-statement
    _held += 1
    try:
        yield
    finally:
        _held -= 1
    if _pending and not _held:
        raise SystemExit(128 + _pending.pop())


def begin() -> None:
    """Have signals end the tool, but not before all is cleaned up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _handle)
    # QEMU's modules log a QEMU that was killed with its whole command line.
    logging.getLogger('qemu').setLevel(logging.CRITICAL)


def parser(text: Optional[str]) -> argparse.ArgumentParser:
    """A command line with what those want that run a build."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument('--build', type=Path, required=True, metavar='DIR',
                      help='folder of the built QEMU')
    made.add_argument('--tree', type=Path, metavar='DIR',
                      help='folder of its source')
    made.add_argument('--cache', type=Path, metavar='DIR',
                      help='folder that keeps the guest between runs')
    return made


def add_seed(made: argparse.ArgumentParser) -> None:
    """Options of what is random, and goes on until it is told to end."""
    made.add_argument('--seed', type=int, metavar='N',
                      default=SystemRandom().randrange(1 << 31),
                      help='repeat the run that printed this seed')
    made.add_argument('--first', type=int, metavar='I', default=0,
                      help='begin with this one of the seed')
    made.add_argument('--count', type=float, metavar='K', default=inf,
                      help='end after so many')
    made.add_argument('--minutes', type=float, metavar='M', default=inf,
                      help='begin nothing new after this time')


def numbers(options: argparse.Namespace) -> Iterator[int]:
    """What to play of a seed."""
    number, end = options.first, time.monotonic() + 60 * options.minutes
    while number < options.first + options.count and time.monotonic() < end:
        yield number
        number += 1


@contextmanager
def work_folder(prefix: str) -> Iterator[Path]:
    """A folder for images, sockets and logs.

    It is kept if its file KEEP exists at the end.
    """
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        if len(str(folder)) > MAX_FOLDER:
            sys.exit(f'error: {folder} is too long for the path of a socket')
        yield folder
    finally:
        if (folder / 'KEEP').exists():
            print(f'images and logs: {folder}', flush=True)
        else:
            with held():
                shutil.rmtree(folder, ignore_errors=True)


class Progress:
    """Lines that stay, and between them one that says how far it is."""

    def __init__(self, stream: TextIO = sys.stdout) -> None:
        self._stream = stream
        self._begin = time.monotonic()
        self._tty = stream.isatty()
        self._next = 0.0
        self._drawn = False

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    def say(self, text: str) -> None:
        """Write a line that stays."""
        self.wipe()
        print(text, file=self._stream, flush=True)

    def show(self, text: str, at_once: bool = False) -> None:
        """Say what is being done, unless that was said just now."""
        if self.seconds < self._next and not at_once:
            return
        self._next = self.seconds + (REDRAW_SECONDS if self._tty
                                     else LINE_SECONDS)
        text = f'{self.seconds:6.1f} s  {text}'
        if not self._tty:
            print(text, file=self._stream, flush=True)
            return
        print(f'\r{text[:WIDTH]:<{WIDTH}}', end='', file=self._stream,
              flush=True)
        self._drawn = True

    def wipe(self) -> None:
        """Remove the line that is being redrawn."""
        if self._drawn:
            print(f"\r{'':<{WIDTH}}\r", end='', file=self._stream, flush=True)
        self._drawn = False
