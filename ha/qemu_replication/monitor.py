# SPDX-License-Identifier: GPL-2.0-or-later
"""QMP with a bound for every answer."""

import asyncio
from pathlib import Path
from typing import Any, Callable, Iterable, List, Optional, Set, Tuple

from qemu.qmp import EventListener, QMPClient, QMPError
from qemu.qmp.qmp_client import ExecuteError

from .config import Json
from .errors import Failed, Late, Refused

RETRY_SECONDS = 0.05
# QEMU reads no command any more while 8 have no answer, nor one beside its
# main loop, which is what helps then
MOST_UNANSWERED = 4


class Monitor:
    """A connection to a QEMU."""

    def __init__(self, path: Path, answer: float,
                 on_event: Callable[[Json], None]) -> None:
        self._path = path
        self._answer = answer
        self._on_event = on_event
        self._qmp: Optional[QMPClient] = None
        self._listener: Optional['asyncio.Task[None]'] = None
        # also those that nobody waits for any more
        self._unanswered: Set['asyncio.Task[object]'] = set()

    async def connect(self) -> None:
        """Connect; that QEMU is not that far yet is no error."""
        while True:
            qmp = QMPClient('keeper')
            listener = EventListener()
            qmp.register_listener(listener)
            try:
                await qmp.connect(str(self._path))
                break
            except (QMPError, OSError, EOFError):
                await asyncio.sleep(RETRY_SECONDS)
        self._qmp = qmp
        self._listener = asyncio.create_task(self._listen(listener))

    async def _listen(self, listener: EventListener) -> None:
        async for message in listener:
            self._on_event(dict(message))

    async def close(self) -> None:
        """End the connection."""
        if self._listener:
            self._listener.cancel()
            self._listener = None
        if self._qmp:
            qmp, self._qmp = self._qmp, None
            try:
                await asyncio.wait_for(qmp.disconnect(), self._answer)
            except (QMPError, OSError, EOFError, asyncio.TimeoutError):
                # QEMU was first
                pass

    async def cmd(self, command: str, arguments: Optional[Json] = None,
                  oob: bool = False) -> Any:
        """Give a command that has to succeed; return what it tells."""
        if not self._qmp:
            raise Failed('QEMU does not run')
        if not oob and len(self._unanswered) >= MOST_UNANSWERED:
            await asyncio.wait(self._unanswered, timeout=self._answer,
                               return_when=asyncio.FIRST_COMPLETED)
        if oob or len(self._unanswered) < MOST_UNANSWERED:
            task = self._give(command, arguments or {}, oob)
            await asyncio.wait({task}, timeout=self._answer)
            if task.done():
                return self._result(command, task)
        raise Late(f'{command}: QEMU did not answer for {self._answer:g} s')

    def _give(self, command: str, arguments: Json, oob: bool
              ) -> 'asyncio.Task[object]':
        if not self._qmp:
            raise Failed('QEMU does not run')
        task = asyncio.create_task(self._qmp.execute(command, arguments,
                                                     oob=oob))
        if not oob:
            self._unanswered.add(task)
        task.add_done_callback(self._answered)
        return task

    def _answered(self, task: 'asyncio.Task[object]') -> None:
        self._unanswered.discard(task)
        if not task.cancelled():
            # there may be nobody to hear of it
            task.exception()

    @staticmethod
    def _result(command: str, task: 'asyncio.Task[object]') -> Any:
        try:
            return task.result()
        except ExecuteError as exc:
            raise Refused(f'{command}: {exc}') from exc
        except (QMPError, OSError, EOFError) as exc:
            raise Failed(f'{command}: QEMU has ended') from exc

    async def all(self, commands: Iterable[Tuple[str, Json]]) -> None:
        """Give commands in their order."""
        for command, arguments in commands:
            await self.cmd(command, arguments)

    async def attempt(self, command: str,
                      arguments: Optional[Json] = None) -> Optional[str]:
        """Give a command that may be refused; return why."""
        try:
            await self.cmd(command, arguments)
        except Refused as exc:
            return str(exc)
        return None

    async def replication(self) -> List[Json]:
        """What each replication node tells of itself."""
        told = [dict(node['driver-specific'], **{'node': node['node-name']})
                for node in await self.cmd('query-blockstats',
                                           {'query-nodes': True})
                if 'driver-specific' in node]
        return [stats for stats in told if stats['driver'] == 'replication']
