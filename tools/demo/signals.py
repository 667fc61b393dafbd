# SPDX-License-Identifier: GPL-2.0-or-later
"""Ending by a signal: at once, but not in the middle of what must be whole."""

import signal
from contextlib import contextmanager
from typing import Iterator, List

_held = 0
_pending: List[int] = []


def _handle(number: int, _frame: object) -> None:
    if _held:
        _pending.append(number)
    else:
        raise SystemExit(128 + number)


def install() -> None:
    """Turn the usual signals into SystemExit, so that all is cleaned up."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, _handle)


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
