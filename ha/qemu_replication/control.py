# SPDX-License-Identifier: GPL-2.0-or-later
"""What the command line can have a keeper do.

Over a unix socket: a line of JSON, {"command": NAME, "force": BOOL}.  The
keeper answers with lines {"say": TEXT} until the last, {"status": NUMBER}.
"""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Callable, Container, Dict, NamedTuple, Optional

from . import check, graph
from .client import DONE, FAILED, LATE, REFUSED
from .config import Json
from .keeper import Keeper
from .errors import Failed, Unreachable
from .states import (AT_REST, PRIMARY, PROMOTABLE, REPLICA, SHARED, SOLE,
                     STANDBY, STATES)

# A wait for what has bounds of its own, or for a person
LONG_SECONDS = 3600.0
RUNS_VM = tuple(name for name, state in STATES.items()
                if state.role == PRIMARY
                and name not in ('booting', 'promoting', 'stuck'))
IDLE = tuple(name for name, state in STATES.items()
             if state.role == STANDBY)
# So long after its last answer the keeper ends
QUIT_SECONDS = 0.2
Say = Callable[[str], None]


class Refusal(Exception):
    """Why a command is not done."""


class Goal(NamedTuple):
    """What a command waits for."""
    reached: Container[str]
    # these are no way there
    missed: Container[str]
    seconds: float
    # QEMU, which has to have ended besides: who waits takes that for granted
    dead: Optional[asyncio.Event] = None


class Commands:
    """Each method is a command of the same name."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._config = keeper.config

    async def _post(self, event: str) -> None:
        keeper = self._keeper
        if not await keeper.post(event, 'a person or the cluster said so'
                                 ).taken:
            raise Refusal(f'not now: this host {STATES[keeper.state].says}'
                          + (keeper.problem and f': {keeper.problem}'))

    async def _check(self) -> None:
        found = await asyncio.to_thread(
            lambda: list(check.problems(self._config)))
        if found:
            raise Refusal('; '.join(found))

    async def protect(self, force: bool) -> Goal:
        """Start the VM here if it does not run, and have it protected."""
        keeper = self._keeper
        role = STATES[keeper.state].role
        if role == STANDBY:
            raise Refusal('this host stands by: "failover" takes the VM from '
                          'a checkpoint, "stop" and "protect" start it from '
                          'the disks')
        if role != PRIMARY:
            await self._check()
            for disk in self._config.disks:
                if not Path(disk.file).exists():
                    raise Refusal(f'there is no disk {disk.file}')
            await self._claim(force)
            await self._post('boot')
        else:
            keeper.note(held=False)
            if keeper.state == 'held':
                await self._post('protect')
        return Goal(('protected',), ('stopped', 'down', 'stuck', 'arming'),
                    LONG_SECONDS)

    async def _claim(self, force: bool) -> None:
        """May the VM be started from these disks?"""
        keeper, peer = self._keeper, self._config.peer
        data = keeper.facts.data
        try:
            told = await keeper.peer.ask('status')
            if told['role'] == PRIMARY:
                raise Refusal(f'{peer} {told["says"]}')
            if data == SHARED:
                told = await keeper.peer.ask(
                    'yield', generation=keeper.facts.generation)
                if told['yields']:
                    data = SOLE
            elif not data and told['facts']['data'] in (SOLE, SHARED):
                data = REPLICA
        except Unreachable as exc:
            if data == SHARED and not force:
                raise Refusal(f'{peer} may have taken the VM, and {exc}: '
                              'if it is down, and has not, say --force'
                              ) from exc
        if data not in ('', SOLE) and not force:
            raise Refusal(f'{peer} may have newer data: if it has not, say '
                          '--force')

    async def standby(self, force: bool) -> Goal:
        """Stand by for the VM on the other host."""
        keeper = self._keeper
        role = STATES[keeper.state].role
        if role == PRIMARY:
            raise Refusal(f'this host {STATES[keeper.state].says}')
        if role != STANDBY:
            await self._check()
            await self._give_up_data(force)
            await self._post('arm')
        return Goal(('standby', 'secondary'), ('stopped', 'down'),
                    2 * self._config.limits.start)

    async def _give_up_data(self, force: bool) -> None:
        """May these disks be overwritten?"""
        keeper, disks = self._keeper, self._config.disks
        if force:
            for path in [path for disk in disks
                         for path in graph.leftovers(disk)]:
                path.unlink()
            # nor is it said any more that the VM was here last
            keeper.note(overwrite=True, generation=0)
        elif keeper.facts.data == SOLE:
            raise Refusal('only this host has the data of the VM: to have it '
                          'overwritten, say --force')
        elif not keeper.facts.data:
            for disk in disks:
                if Path(disk.file).exists() \
                        and not disk.metadata_file.exists():
                    raise Refusal(f'there is a disk {disk.file} already: to '
                                  'have it overwritten, say --force')

    async def failover(self, force: bool) -> Goal:
        """Take the VM, which the other host gives up or is down."""
        again = self._has_not_begun()
        if self._keeper.state not in PROMOTABLE and not again:
            raise Refusal('it cannot be taken: this host '
                          f'{STATES[self._keeper.state].says}')
        await self._post('promote' if force or again else 'take')
        return Goal(RUNS_VM, ('orphan', 'secondary', 'arming', 'down',
                              'stuck'), 2 * self._config.limits.failover)

    def _has_not_begun(self) -> bool:
        """Whether a failover has failed before the VM was this host's."""
        return self._keeper.state == 'stuck' \
            and self._keeper.facts.data == REPLICA

    async def alone(self, force: bool) -> Goal:
        """Go on without the other host, which gives up or is down."""
        keeper = self._keeper
        if STATES[keeper.state].role != PRIMARY:
            raise Refusal(f'this host {STATES[keeper.state].says}')
        if self._has_not_begun():
            raise Refusal('it has not taken the VM yet: "failover" does')
        # one that is down shall be protected with again when it comes back
        before, held = keeper.facts.held, not force
        keeper.note(held=held)
        try:
            if keeper.state == 'alone' and held:
                await self._post('hold')
            elif force or keeper.state in ('copying', 'stuck'):
                await self._post('drop')
            elif keeper.state not in ('asking', 'held'):
                await self._post('lost')
        except Refusal:
            keeper.note(held=before)
            raise
        return Goal(('held',) if held else
                    ('alone', 'held', 'copying', 'migrating'),
                    ('down', 'arming', 'stuck'),
                    2 * self._config.limits.failover)

    async def switch(self, _force: bool) -> Goal:
        """Have the other side run the VM, both being well."""
        keeper = self._keeper
        if keeper.state == 'protected':
            await self._post('switch')
            return Goal(('standby', 'secondary'),
                        ('protected', 'asking', 'down', 'stopped'),
                        2 * self._config.limits.failover)
        if keeper.state == 'secondary':
            told = await keeper.peer.ask('switch')
            if not told['ok']:
                raise Refusal(f'{self._config.peer}: {told["because"]}')
            return Goal(RUNS_VM, ('orphan', 'arming', 'down', 'stuck'),
                        2 * self._config.limits.failover)
        raise Refusal('only a protected VM can be switched: this host '
                      f'{STATES[keeper.state].says}')

    async def stop(self, force: bool) -> Goal:
        """End QEMU here."""
        keeper = self._keeper
        if STATES[keeper.state].role == PRIMARY and not force:
            raise Refusal('the VM runs here: to end it, say --force')
        dead = keeper.machine.dead
        if 'stop' in STATES[keeper.state].on:
            await self._post('stop')
            dead = keeper.gave_up
        return Goal(AT_REST, (), self._config.limits.answer + 60, dead)

    async def demote(self, _force: bool) -> Goal:
        """End QEMU here, for the other side to take the VM."""
        keeper = self._keeper
        # one that stands by goes on
        dead = None if STATES[keeper.state].role == STANDBY \
            else keeper.machine.dead
        if STATES[keeper.state].role == PRIMARY or keeper.state == 'down':
            await keeper.judge.gives_way()
            await self._post('demote')
        return Goal(AT_REST + IDLE, (), self._config.limits.answer + 60, dead)

    async def quit(self, _force: bool) -> Goal:
        """End the keeper, but not QEMU."""
        asyncio.get_running_loop().call_later(
            QUIT_SECONDS, os.kill, os.getpid(), signal.SIGTERM)
        return Goal(STATES, (), 1)


class Control:
    """The socket."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self._commands = Commands(keeper)

    async def serve(self) -> None:
        """Listen; who may is told by the folder."""
        path = self._keeper.config.control
        path.unlink(missing_ok=True)
        await asyncio.start_unix_server(self._serve_one, str(path))
        os.chmod(path, 0o600)

    async def _serve_one(self, reader: asyncio.StreamReader,
                         writer: asyncio.StreamWriter) -> None:
        def send(line: Json) -> None:
            writer.write(json.dumps(line).encode() + b'\n')

        try:
            request = json.loads(await reader.readline())
            await self._keeper.begun.wait()
            if request['command'] == 'status':
                send(await self._status() if request.get('other', True)
                     else self._keeper.status())
            else:
                send({'status': await self._do(
                    request, lambda text: send({'say': text}))})
            await writer.drain()
        except (OSError, ValueError, KeyError):
            # whoever it was has gone, or talks nonsense
            pass
        finally:
            writer.close()

    async def _status(self) -> Json:
        status = self._keeper.status()
        try:
            status['other'] = await self._keeper.peer.ask('status')
        except Unreachable as exc:
            status['other'] = {'problem': str(exc)}
        return status

    async def _do(self, request: Dict[str, object], say: Say) -> int:
        try:
            goal = await getattr(self._commands, str(request['command']))(
                bool(request.get('force')))
            return await self._reach(goal, bool(request.get('wait', True)),
                                     say)
        except Refusal as exc:
            say(f'refused: {exc}')
            return REFUSED
        except (OSError, Failed) as exc:
            say(f'failed: {exc}')
            return FAILED

    async def _reach(self, goal: Goal, wait: bool, say: Say) -> int:
        """Say what happens until the goal is reached, or missed."""
        keeper, said = self._keeper, ''
        deadline = asyncio.get_running_loop().time() + goal.seconds
        while True:
            text = self._line(goal)
            if text != said:
                say(text)
                said = text
            reached = keeper.state in goal.reached
            if reached and (not goal.dead or goal.dead.is_set()):
                return DONE
            if keeper.state in goal.missed:
                return FAILED
            if not wait and STATES[keeper.state].role == PRIMARY \
                    and keeper.state != 'booting':
                return DONE
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                say(f'not reached in {goal.seconds:g} s; the keeper goes on')
                return LATE
            try:
                await asyncio.wait_for(goal.dead.wait() if goal.dead
                                       and reached else self._change(), left)
            except asyncio.TimeoutError:
                # said above
                pass

    async def _change(self) -> None:
        async with self._keeper.changed:
            await self._keeper.changed.wait()

    def _line(self, goal: Goal) -> str:
        keeper = self._keeper
        text = f'{keeper.config.here}: {STATES[keeper.state].says}'
        if keeper.why and keeper.state in goal.missed:
            text += f' ({keeper.why})'
        return f'{text}: {keeper.problem}' if keeper.problem else text
