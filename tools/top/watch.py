# SPDX-License-Identifier: GPL-2.0-or-later
"""Asks QEMUs how replication does, through QMP, again and again."""

import asyncio
import time
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, Optional

from qemu.qmp import EventListener, QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from figures import Event, Watched

# A socket takes one client: whoever comes second gets no greeting.
CONNECT_SECONDS = 10.0
# A snapshot is given up after so long without an answer.
ANSWER_SECONDS = 10.0
CLOSE_SECONDS = 1.0
RETRY_SECONDS = 1.0
EVENTS_KEPT = 100

TROUBLES = (QMPError, OSError, EOFError, asyncio.TimeoutError)


def hangs(exc: BaseException) -> bool:
    """Whether somebody is there, but says nothing."""
    return isinstance(exc, asyncio.TimeoutError)


def reason(exc: BaseException) -> str:
    """Say in a few words why there is no connection."""
    if hangs(exc):
        return 'it hangs, or the socket has another client'
    # QMP's errors say what failed, and have the reason inside
    cause = exc.__cause__ or getattr(exc, 'exc', None) or exc
    if isinstance(cause, (FileNotFoundError, ConnectionRefusedError)):
        return 'no QEMU at this socket'
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror
    return 'the connection has ended'


class Watcher:
    """Keeps a side up to date."""

    def __init__(self, side: Watched, interval: float,
                 events: Deque[Event]) -> None:
        self.side = side
        self._interval = interval
        self._events = events
        self._qmp: Optional[QMPClient] = None
        self._listener: Optional['asyncio.Task[None]'] = None

    async def connect(self) -> None:
        """Connect, or raise one of TROUBLES."""
        qmp = QMPClient('top')
        listener = EventListener()
        qmp.register_listener(listener)
        await asyncio.wait_for(qmp.connect(str(self.side.path)),
                               CONNECT_SECONDS)
        self._qmp = qmp
        name = await asyncio.wait_for(self._ask('query-name'),
                                      CONNECT_SECONDS)
        self.side.connected(name.get('name'))
        self._listener = asyncio.create_task(self._listen(listener))

    async def close(self) -> None:
        """End the connection, if there is one."""
        if self._qmp is None:
            return
        if self._listener is not None:
            self._listener.cancel()
            self._listener = None
        try:
            await asyncio.wait_for(self._qmp.disconnect(), CLOSE_SECONDS)
        except TROUBLES:
            # QEMU was first: it says so once more.
            pass
        self._qmp = None

    async def _listen(self, listener: EventListener) -> None:
        async for message in listener:
            event = self.side.take_event(dict(message))
            if event:
                self._events.append(event)

    async def _ask(self, command: str, **arguments: Any) -> Any:
        assert self._qmp is not None
        return await self._qmp.execute(command, arguments)

    async def look(self) -> None:
        """Ask for all there is to know."""
        side = self.side
        side.silent_since = time.monotonic()
        blockstats = await self._ask('query-blockstats',
                                     **{'query-nodes': True})
        when = time.monotonic()
        side.take_nodes(when, blockstats)
        side.take_jobs(when, await self._ask('query-block-jobs'))
        side.status = (await self._ask('query-status'))['status']
        try:
            side.colo = (await self._ask('query-colo-status'))['mode']
        except ExecuteError:
            # This QEMU was built without COLO.
            side.colo = 'none'
        side.silent_since = None

    async def run(self) -> None:
        """Stay with it for ever, whatever it does."""
        while True:
            try:
                await self.connect()
                while True:
                    await self.look()
                    await asyncio.sleep(self._interval)
            except TROUBLES as exc:
                self.side.lost(reason(exc), time.time(), hangs(exc))
            finally:
                await self.close()
            await asyncio.sleep(RETRY_SECONDS)


class Watch:
    """All sides."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.events: Deque[Event] = deque(maxlen=EVENTS_KEPT)
        self.sides: Dict[Path, Watched] = {}
        self._tasks: Dict[Path, 'asyncio.Task[None]'] = {}

    def _watcher(self, path: Path) -> Watcher:
        side = self.sides.setdefault(path, Watched(path))
        return Watcher(side, self._interval, self.events)

    async def look_once(self, path: Path) -> None:
        """Connect, look twice, so that there are rates, and leave."""
        watcher = self._watcher(path)
        try:
            await watcher.connect()
            await asyncio.wait_for(watcher.look(), ANSWER_SECONDS)
            await asyncio.sleep(self._interval)
            await asyncio.wait_for(watcher.look(), ANSWER_SECONDS)
        finally:
            await watcher.close()

    def follow(self, path: Path) -> None:
        """Watch a socket from now on, if it is not watched yet."""
        if path not in self._tasks:
            self._tasks[path] = asyncio.create_task(
                self._watcher(path).run())

    async def forget(self, path: Path) -> None:
        """Do not watch it any more."""
        task = self._tasks.pop(path)
        self.sides.pop(path)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def close(self) -> None:
        """End all connections."""
        for path in list(self._tasks):
            await self.forget(path)
