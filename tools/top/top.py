#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Watch replication: both sides of a pair, live in the terminal.

Each SOCKET is a QMP socket of a QEMU.  It takes one client at a time, so give
QEMU one for this.  Without any, the running demo's are watched.
"""

import argparse
import asyncio
import logging
import os
import shutil
import signal
import sys
import tempfile
import termios
import time
import tty
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List

from figures import DEMO_SOCKET, verdict
from view import PLAIN_SPARKS, SPARKS, View
from watch import TROUBLES, Watch, hangs, reason

# As the demo has them: a folder for each run, in it one for each host.
DEMO_SOCKETS = f'colo-demo-*/*/{DEMO_SOCKET}'

ALTERNATE_SCREEN = '\033[?1049h\033[?25l'
NORMAL_SCREEN = '\033[?25h\033[?1049l'
HOME, CLEAR_LINE, CLEAR_BELOW = '\033[H', '\033[K', '\033[J'


def parse() -> argparse.Namespace:
    """Read the command line; tools/base/commands tells of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('sockets', type=Path, nargs='*')
    parser.add_argument('--once', action='store_true')
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--max-age', type=float, default=60.0)
    parser.add_argument('--interval', type=float, default=0.5)
    options = parser.parse_args()
    options.once = options.once or options.check
    if not options.once and not sys.stdout.isatty():
        parser.error('this is no terminal: use --once')
    return options


def demo_sockets() -> List[Path]:
    """Return the sockets of the demo that was started last."""
    found = list(Path(tempfile.gettempdir()).glob(DEMO_SOCKETS))
    folders = {path.parents[1] for path in found}
    if not folders:
        return []
    try:
        last = max(folders, key=lambda folder: folder.stat().st_ctime)
    except FileNotFoundError:
        # it has just ended
        return []
    return sorted(path for path in found if path.parents[1] == last)


def sockets(options: argparse.Namespace) -> List[Path]:
    """Return what to watch now."""
    return options.sockets or demo_sockets()


def new_view(options: argparse.Namespace) -> View:
    """Return a view for the terminal as it is now."""
    width = shutil.get_terminal_size().columns
    unicode = 'utf' in (sys.stdout.encoding or '').lower()
    return View(width, options.max_age, SPARKS if unicode else PLAIN_SPARKS)


async def once(options: argparse.Namespace, watch: Watch) -> int:
    """Print a snapshot; return the exit status."""
    paths = sockets(options)
    results = await asyncio.gather(*map(watch.look_once, paths),
                                   return_exceptions=True)
    for path, result in zip(paths, results):
        if isinstance(result, TROUBLES):
            watch.sides[path].lost(reason(result), time.time(), hangs(result))
        elif isinstance(result, BaseException):
            raise result
    sides = list(watch.sides.values())
    status, text = verdict(sides, options.max_age)
    if options.check:
        print(text)
        return status
    for line in new_view(options).lines(sides, watch.events):
        print(line.show(line.length, colour=False))
    return status


@contextmanager
def screen() -> Iterator[None]:
    """Take the terminal, and give it back as it was."""
    keyboard = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else None
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        sys.stdout.write(ALTERNATE_SCREEN)
        yield
    finally:
        sys.stdout.write(NORMAL_SCREEN)
        sys.stdout.flush()
        if keyboard is not None and before is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def draw(options: argparse.Namespace, watch: Watch) -> None:
    """Show how it is now."""
    columns, rows = shutil.get_terminal_size()
    view = new_view(options)
    clock = time.strftime('%H:%M:%S')
    title = 'Block replication'
    lines = [f'\033[7m{title:<{columns - 18}}{clock}  q: quit \033[0m']
    body = view.lines(list(watch.sides.values()), watch.events, rows - 2)
    lines += [line.show(columns, colour=True) for line in body]
    if not watch.sides:
        lines.append('Waiting for a demo: ./run demo in another terminal')
    sys.stdout.write(HOME + ''.join(f'{line}{CLEAR_LINE}\r\n'
                                    for line in lines) + CLEAR_BELOW)
    sys.stdout.flush()


async def live(options: argparse.Namespace, watch: Watch) -> int:
    """Show it until the user has seen enough."""
    loop = asyncio.get_running_loop()
    enough = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, enough.set)

    def key() -> None:
        # nothing: the terminal is gone
        if os.read(sys.stdin.fileno(), 100)[:1] in (b'q', b'Q', b''):
            enough.set()

    if sys.stdin.isatty():
        loop.add_reader(sys.stdin.fileno(), key)
    with screen():
        while not enough.is_set():
            now = sockets(options)
            for path in now:
                watch.follow(path)
            # those of a demo before, unless nothing else is to be seen
            for path in [path for path in watch.sides if now
                         and path not in now]:
                await watch.forget(path)
            draw(options, watch)
            try:
                await asyncio.wait_for(enough.wait(), options.interval)
            except asyncio.TimeoutError:
                # not yet
                pass
    return 0


async def run(options: argparse.Namespace) -> int:
    """Watch, once or until told to end; return the exit status."""
    watch = Watch(options.interval)
    try:
        if options.once:
            return await once(options, watch)
        return await live(options, watch)
    finally:
        await watch.close()


def main() -> int:
    """Watch."""
    options = parse()
    # They log a connection that has ended, in the middle of the screen.
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    return asyncio.run(run(options))


if __name__ == '__main__':
    sys.exit(main())
