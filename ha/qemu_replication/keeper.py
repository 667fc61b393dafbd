# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps a VM protected: one process on each host, beside QEMU.

It never decides by itself that the other host is dead.  A host gives up the
VM when its own keeper says so, once QEMU has ended there, or when a person
or the cluster vouches for it.
"""

import asyncio
import logging
import os
import socket
import subprocess
import time
from dataclasses import asdict
from typing import List, Optional

from .config import Config, Json
from .facts import bound_log, write_whole
from .machine import Machine
from .errors import Failed, Unreachable
from .peer import Peer
from .states import AT_REST, PRIMARY, PROMOTABLE, REPLICA, SOLE, STATES
from .work import LOOK_SECONDS, Works, insistent

log = logging.getLogger('keeper')
# Between two attempts at a merge that has failed: its cause may be gone
AGAIN_SECONDS = 5.0
# The guest has ended it, and would do so on the peer as well
GUEST_REASONS = ('guest-shutdown', 'guest-panic')


def notify(text: str) -> None:
    """Tell systemd, if it has started us."""
    path = os.environ.get('NOTIFY_SOCKET', '')
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(path.replace('@', '\0', 1))
            sock.sendall(text.encode())


class Event:
    """What has happened, and in which state if it is of that only."""

    def __init__(self, name: str, why: str = '',
                 entered: Optional[int] = None) -> None:
        self.name = name
        self.why = why
        self.entered = entered
        # whether it has led to another state
        self.taken: 'asyncio.Future[bool]' = \
            asyncio.get_running_loop().create_future()


class Keeper(Works):
    """One side."""

    def __init__(self, config: Config) -> None:
        super().__init__(
            config, Machine(config, self._on_event, self._on_death),
            Peer(config, self._answer))
        self.state = 'stopped'
        self.since = time.time()
        self.changed = asyncio.Condition()
        # before, nobody is told anything
        self.begun = asyncio.Event()
        self._events: 'asyncio.Queue[Event]' = asyncio.Queue()
        self._entered = 0
        self._work: Optional['asyncio.Task[None]'] = None
        self._look: Json = {}
        self._merged_at = 0.0
        # why nobody could be told last time
        self._trouble = ''
        # and what was logged last of what nobody has thought of
        self._mistake = ''

    # The machine of states

    def post(self, name: str, why: str = '') -> Event:
        """Something has happened."""
        event = Event(name, why)
        self._events.put_nowait(event)
        return event

    async def run(self) -> None:
        """Serve for ever."""
        await self.peer.serve()
        await self._begin()
        watching = [
            asyncio.create_task(self._look_often()),
            asyncio.create_task(self.judge.watch(self._on_loss))]
        try:
            while True:
                await self._handle(await self._events.get())
        finally:
            for task in watching:
                task.cancel()
            if self._work:
                self._work.cancel()
            await self.peer.close()
            await self._monitor.close()

    async def _handle(self, event: Event) -> None:
        new = STATES[self.state].on.get(event.name)
        taken = False
        if new and event.entered in (None, self._entered):
            try:
                await self._enter(new, event.why or event.name)
                taken = True
            except Failed as exc:
                self._put_off(event, str(exc))
        if not event.taken.cancelled():
            event.taken.set_result(taken)

    def _put_off(self, event: Event, problem: str) -> None:
        """What came of a work; others are told, and may try again."""
        if problem != self.problem:
            log.warning('%s', problem)
            self.problem = problem
        if event.entered is not None:
            asyncio.get_running_loop().call_later(
                LOOK_SECONDS, self._events.put_nowait,
                Event(event.name, event.why, event.entered))

    async def _enter(self, new: str, why: str) -> None:
        state = STATES[new]
        if state.data and self.facts.data != state.data:
            self.note(data=state.data)
        if self._work:
            self._work.cancel()
            await asyncio.wait([self._work])
            self._work = None
        log.info('%s -> %s: %s', self.state, new, why)
        if self.state in ('copying', 'migrating'):
            self.refusal = '' if new in ('migrating', 'protected') else why
        self.state, self.since, self.why = new, time.time(), why
        self.problem = self.progress = ''
        if state.work in ('end', 'arm'):
            self.gave_up.clear()
            self.peer_ended = False
        self._entered += 1
        if state.work:
            self._work = asyncio.create_task(self._do(state.work, state.limit,
                                                      self._entered))
        await self._tell()

    async def _do(self, work: str, limit: str, entered: int) -> None:
        """The work of a state, and again where nothing follows its failure."""
        event = await self._do_once(work, limit, entered)
        while event.name == 'failed' \
                and 'failed' not in STATES[self.state].on:
            self.problem = event.why
            await asyncio.sleep(LOOK_SECONDS)
            event = await self._do_once(work, limit, entered)
        self._events.put_nowait(event)

    async def _do_once(self, work: str, limit: str, entered: int) -> Event:
        bound = getattr(self.config.limits, limit) if limit else None
        try:
            name = await asyncio.wait_for(getattr(self, f'_do_{work}')(),
                                          bound)
            return Event(name or 'done', entered=entered)
        except asyncio.TimeoutError:
            return Event('failed', f'{work} took more than {bound:g} s',
                         entered)
        except Failed as exc:
            return Event(exc.event, str(exc), entered)
        except (OSError, subprocess.SubprocessError) as exc:
            return Event('failed', str(exc), entered)
        except Exception as exc:  # pylint: disable=broad-except
            self._log_mistake(exc)
            return Event('failed', 'a mistake of this program', entered)

    def _log_mistake(self, exc: Exception) -> None:
        if repr(exc) != self._mistake:
            self._mistake = repr(exc)
            log.error('a mistake of this program', exc_info=exc)

    async def _tell(self) -> None:
        """Let all who watch know."""
        status, trouble = self.status(), ''
        try:
            write_whole(self.config.run / 'status.json', status, False)
            notify(f'STATUS={status["says"]}')
        except OSError as exc:
            # who asks is told all the same
            trouble = str(exc)
        if trouble not in ('', self._trouble):
            log.warning('%s', trouble)
        self._trouble = trouble
        async with self.changed:
            self.changed.notify_all()

    async def _begin(self) -> None:
        """Go on where an earlier keeper has stopped."""
        if self.machine.find():
            await self._enter('joining' if self.facts.data == REPLICA
                              else 'finding', 'QEMU was found')
        elif self.facts.data == REPLICA:
            # it may not run by itself, and does no harm when it stands by
            await self._enter('arming', 'this host has stood by')
        elif self.facts.data:
            await self._enter('waiting', 'this host has run the VM')
        else:
            await self._tell()
        self.begun.set()
        notify('READY=1')

    async def _do_find(self) -> str:
        """What a QEMU is that was found: the state to go on in."""
        await self.machine.connect()
        return await self._what_it_is()

    async def _do_join(self) -> str:
        """One that hangs does so within a checkpoint, maybe the only one."""
        connected = False
        while True:
            try:
                if not connected:
                    await self.machine.connect()
                    connected = True
                return await asyncio.wait_for(self._what_it_is(),
                                              self.config.limits.start)
            except asyncio.TimeoutError:
                why = 'QEMU does not answer'
            except Failed as exc:
                why = str(exc)
            try:
                if self._has_it(await self.peer.ask('status')):
                    return 'arming'
                why += f', and {self.config.peer} may not have the VM'
            except Unreachable as exc:
                why += f', and {exc}'
            self.problem = f'{why}: "stop" ends it, for good'
            await asyncio.sleep(LOOK_SECONDS)

    def _has_it(self, told: Json) -> bool:
        """Whether the peer needs nothing of what is here."""
        runs = told['role'] == PRIMARY and told['guest'] == 'running'
        facts = told['facts']
        return bool(facts['generation'] >= self.facts.generation
                    and (runs or facts['data'] == SOLE))

    @insistent
    async def _what_it_is(self) -> str:
        await self._look_once()
        nodes = await self._monitor.replication()
        status = (await self._monitor.cmd('query-status'))['status']
        migration = await self._monitor.cmd('query-migrate')
        in_colo = migration.get('status') == 'colo'
        is_primary = any(node['mode'] == 'primary' for node in nodes)
        # with lost facts, what has been promoted runs, and not in COLO
        if self.facts.data == REPLICA or not (
                is_primary or self.facts.data == SOLE or not in_colo
                and status != 'inmigrate'):
            running = all(node['stage'] == 'running' for node in nodes)
            # a primary had been given up when the last keeper ended
            return 'secondary' if in_colo and running and not is_primary \
                else 'arming'
        if not is_primary:
            # it was promoted, but that was not all
            return 'promoting'
        if not in_colo or self.facts.data == SOLE:
            # nobody is asked again what was decided
            return 'detaching'
        return await self._still_protected(nodes)

    async def _still_protected(self, nodes: List[Json]) -> str:
        """The last keeper may not have ended what it did with the peer."""
        if self._protects(nodes):
            try:
                await self._take_time()
                await self.judge.in_step()
                return 'protected'
            except Failed as exc:
                log.warning('%s', exc)
        return 'asking'

    # What QEMU tells

    def _on_death(self) -> None:
        if self._off:
            self.post('off', 'the guest was shut down')
        else:
            self.post('died', self.machine.ended)

    def _on_loss(self, why: str) -> None:
        """As far as the VM is protected by the peer."""
        if STATES[self.state].role == PRIMARY:
            self.post('lost', why)

    def _on_event(self, event: Json) -> None:
        name, data = event['event'], event.get('data', {})
        if name == 'SHUTDOWN' and data.get('reason') in GUEST_REASONS:
            self._off = STATES[self.state].role == PRIMARY
        elif name == 'RESET':
            # with -action shutdown=pause it may have been off before
            self._off = False
        elif name == 'COLO_EXIT':
            self._colo_ended = True
            self.post('lost', f'COLO has ended: {data.get("reason")}')
        elif name == 'REPLICATION_ERROR' and data.get('reason') == 'forward':
            self.post('lost', f'{data.get("node-name")}: the peer\'s disk '
                      'cannot be reached')
        elif name == 'REPLICATION_STAGE_CHANGE':
            asyncio.create_task(self._look_once())

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self._look_once()
                await self._tell()
            except Exception as exc:  # pylint: disable=broad-except
                # it may be of another version
                self._log_mistake(exc)
            self._bound_logs()

    def _bound_logs(self) -> None:
        """They may be in memory; a service's own is elsewhere."""
        for name in 'qemu.log', 'keeper.log':
            try:
                bound_log(self.machine.path(name))
            except OSError:
                # to say so there is no help
                pass

    async def _look_once(self) -> None:
        """Ask QEMU how it is, which may tell what no event has told."""
        if not self.machine.runs:
            self._look = {}
            return
        entered = self._entered
        try:
            nodes = await self._monitor.replication()
            status = (await self._monitor.cmd('query-status'))['status']
            await self._merge_again(nodes)
        except Failed as exc:
            self._look = {'status': 'silent', 'nodes': []}
            if self.machine.runs and entered == self._entered:
                self._events.put_nowait(Event('silent', str(exc), entered))
            return
        self._look = {'status': status, 'nodes': nodes}
        await self._conclude(nodes)

    async def _merge_again(self, nodes: List[Json]) -> None:
        """The guest's data is in three files, and none may take it over."""
        failed = [node['node'] for node in nodes
                  if node['stage'] == 'failover-failed']
        if failed and time.monotonic() - self._merged_at > AGAIN_SECONDS:
            self._merged_at = time.monotonic()
            log.warning('%s: the failover is tried again', ', '.join(failed))
            await self._monitor.attempt('xen-set-replication', {
                'enable': False, 'primary': False, 'failover': True})

    async def _conclude(self, nodes: List[Json]) -> None:
        mine = [node for node in nodes if node['mode'] == 'secondary']
        if self.state == 'standby' and mine and all(
                node['stage'] == 'running' for node in mine):
            self._tries = 0
            self.post('in-step', 'the primary has brought it in step')
        elif self.state == 'secondary' and self._colo_ended:
            self.post('lost', 'COLO has ended')
        elif self.state == 'protected':
            self._conclude_protected([node for node in nodes
                                      if node['mode'] == 'primary'])

    def _conclude_protected(self, nodes: List[Json]) -> None:
        limits = self.config.limits
        age = max((node['checkpoint-age-ns'] for node in nodes), default=0)
        if self._colo_ended or any(
                node.get('error', {}).get('reason') == 'forward'
                for node in nodes):
            self.post('lost', 'the peer is not in step any more')
        elif age / 1e9 > limits.checkpoint_ms / 1000 + limits.stalled:
            # COLO waits for a peer that is gone without a word for ever, and
            # the guest with it
            self.post('lost', f'no checkpoint for {age / 1e9:.0f} s')

    # What others ask

    def status(self) -> Json:
        """All that there is to know."""
        state = STATES[self.state]
        nodes = self._look.get('nodes', [])
        return {
            'vm': self.config.vm.name, 'host': self.config.here,
            'peer': self.config.peer, 'state': self.state,
            'role': state.role, 'says': state.says, 'since': self.since,
            'why': self.why, 'problem': self.problem,
            'progress': self.progress,
            'protected': self.state in ('protected', 'secondary')
            and self._protects(nodes),
            'in-step-since': self.facts.since,
            'facts': asdict(self.facts), 'pid': self.machine.pid
            if self.machine.runs else None,
            'guest': self._look.get('status', 'none'), 'disks': [
                {'node': node['node'], 'stage': node['stage'],
                 'protects': node['protects'],
                 'unprotected': node.get('unprotected', {}).get('text'),
                 'checkpoint-age': node.get('checkpoint-age-ns', 0) / 1e9,
                 'out-of-sync-bytes': node.get('out-of-sync-bytes'),
                 'copied-bytes': node.get('copied-bytes')}
                for node in nodes]}

    async def _answer(self, body: Json) -> Json:
        """What the peer's keeper wants to know."""
        await self.begun.wait()
        what = body.get('ask')
        if what == 'status':
            return self.status()
        if what == 'yield':
            return await self._answer_yield(int(body['generation']))
        if what == 'well':
            # now, not when it was last looked at
            try:
                await self._monitor.cmd('query-status')
            except Failed:
                # within a checkpoint it waits for a primary that hangs
                await self._yank([{'type': 'migration'}])
                await self._monitor.cmd('query-status')
            return {'ok': self.state in PROMOTABLE,
                    'because': f'it {STATES[self.state].says}'}
        if what == 'in-step' and self.state == 'standby':
            self.note(generation=int(body['generation']), overwrite=False,
                      since=time.time())
            return {'ok': True}
        if what == 'ended':
            # what it had before is of a time when it was not in step
            self.peer_ended = self.state in (*PROMOTABLE, 'taking')
            return {'ok': self.peer_ended}
        if what in ('take', 'switch') and what in STATES[self.state].on:
            return {'ok': await self.post(
                what, f'{self.config.peer} wants it').taken,
                'because': f'it {STATES[self.state].says}'}
        return {'ok': False, 'because': f'it {STATES[self.state].says}'}

    async def _answer_yield(self, generation: int) -> Json:
        """Give up any claim to the VM, for good, before this is answered."""
        yields = False
        # who stands by has its number from the primary, which may have lost it
        if self.facts.generation <= generation or self.facts.data == REPLICA:
            dead = self.machine.dead
            if self.state in AT_REST and self.facts.data == SOLE:
                # the peer has no newer data
                pass
            elif self.state in ('yielded', 'arming'):
                # the QEMU that is there may be the next one already
                dead, yields = self.gave_up, True
            else:
                yields = await self.post(
                    'yield', f'{self.config.peer} has the VM').taken
            if yields:
                await dead.wait()
        return {'yields': yields, 'generation': self.facts.generation,
                'data': self.facts.data,
                'because': f'it {STATES[self.state].says}'}
