#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What a keeper does when what is beside it fails, without any QEMU."""

import asyncio
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from configparser import ConfigParser
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import command
import nodes
from guesthost import MIB, Disks
from host import NO_GUEST, Host
from qemu_replication import graph
from qemu_replication.cli import no_keeper
from qemu_replication.client import DONE, FAILED, NO_KEEPER
from qemu_replication.config import Cluster, Config, load
from qemu_replication.control import Commands, Control, Refusal
from qemu_replication.errors import (Busy, Failed, Late, Refused,
                                     Unreachable)
from qemu_replication.facts import LOG_BYTES, Facts, open_log
from qemu_replication.judge import Verdict
from qemu_replication.keeper import Event, Keeper
from qemu_replication.monitor import Monitor
from qemu_replication.states import REPLICA, SHARED, SOLE, STATES
from sides import PROGRAM, Side, configuration, like_qemu, toml

SECONDS = 60.0
UNPROTECTED = 2
Json = Dict[str, Any]


OPTIONS, REST = command.parser(__doc__).parse_known_args()
HANGS = Late('QEMU did not answer')


class Qmp(Monitor):
    """Says what it was told to, by the command."""

    def __init__(self, config: Config, answers: Json) -> None:
        super().__init__(config.run, 1.0, lambda event: None)
        self.answers = answers
        self.given: List[object] = []

    async def cmd(self, command: str, arguments: Optional[Json] = None,
                  oob: bool = False) -> Any:
        answer = self.answers.get(command, {})
        self.given.append((command, arguments))
        if isinstance(answer, Failed):
            raise answer
        return answer


def node(**stats: object) -> Json:
    """What QEMU says of the disk's node."""
    return {'node-name': 'top0', 'driver-specific': {
        'driver': 'replication', 'mode': 'secondary', 'stage': 'running',
        'protects': True, **stats}}


class KeeperCase(unittest.TestCase):
    """A keeper on east, in a loop of its own."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.path = path = self.folder / 'vm1.toml'
        config = configuration(OPTIONS.build, self.folder, Disks(1, MIB, 0))
        config['vm']['arguments'] = [
            '-nodefaults', '-L', '/usr/share/seabios', '-L',
            '/usr/share/qemu', '-machine', 'pc,accel=tcg', '-m', '64']
        path.write_text(toml(config), 'utf-8')
        self.config = load(path, 'east')
        self.config.state.mkdir(parents=True)

    def keeper(self, state: str = 'stopped', **answers: object) -> Keeper:
        """In a state, beside a QEMU that answers."""
        keeper = Keeper(self.config)
        keeper.state = state
        keeper.machine.monitor = Qmp(self.config, answers)
        keeper.machine.dead.clear()
        return keeper

    @staticmethod
    async def change(keeper: Keeper, looking: 'asyncio.Task[None]') -> None:
        """Wait for the next word of it."""
        async def changed() -> None:
            async with keeper.changed:
                await keeper.changed.wait()

        change = asyncio.create_task(changed())
        await asyncio.wait({change, looking}, timeout=SECONDS,
                           return_when=asyncio.FIRST_COMPLETED)
        if not change.done():
            raise AssertionError('it does not look any more')


class TroubleTest(KeeperCase):
    """It goes on."""

    def test_pause(self) -> None:
        """However often something has failed."""
        async def pause() -> float:
            keeper = self.keeper()
            keeper._tries = 5000
            return keeper._pause_seconds()

        self.assertEqual(asyncio.run(pause()), 60.0)

    def test_looks_again(self) -> None:
        """A merge that cannot be repeated now, and a folder that is full."""
        async def look() -> None:
            keeper = self.keeper('alone', **{
                'query-blockstats': [node(stage='failover-failed')],
                'query-status': {'status': 'running'},
                'xen-set-replication': HANGS})
            looking = asyncio.create_task(keeper._look_often())
            told = self.config.run / 'status.json'
            in_the_way = told.with_name(told.name + '.new')
            in_the_way.mkdir()
            for guest in ('silent', 'running'):
                while keeper.status()['guest'] != guest:
                    await self.change(keeper, looking)
                keeper.machine.monitor = Qmp(self.config, {
                    'query-blockstats': [node()],
                    'query-status': {'status': 'running'}})
            in_the_way.rmdir()
            while not told.exists():
                await self.change(keeper, looking)
            looking.cancel()

        with self.assertLogs('keeper', 'WARNING') as logs:
            asyncio.run(look())
        self.assertEqual(len(logs.output), 2, logs.output)

    def test_does_not_understand(self) -> None:
        """What a QEMU of another version tells: it looks again."""
        async def look() -> None:
            keeper = self.keeper('alone', **{
                'query-blockstats': [{'node-name': 'x', 'driver-specific': {
                    'driver': 'replication'}}],
                'query-status': {'status': 'running'}})
            keeper._on_event({'event': 'REPLICATION_ERROR', 'data': {}})
            given = getattr(keeper._monitor, 'given')
            looking = asyncio.create_task(keeper._look_often())
            while len(given) < 4 and not looking.done():
                await asyncio.sleep(0)
            self.assertFalse(looking.done())
            keeper.machine.monitor = Qmp(self.config, {
                'query-blockstats': [node()],
                'query-status': {'status': 'running'}})
            await self.change(keeper, looking)
            self.assertEqual(keeper.status()['guest'], 'running')
            looking.cancel()

        with unittest.mock.patch('qemu_replication.keeper.LOOK_SECONDS', 0), \
                self.assertLogs('keeper', 'ERROR') as logs:
            asyncio.run(asyncio.wait_for(look(), SECONDS))
        self.assertEqual(len(logs.output), 1)

    def test_refused_migration(self) -> None:
        """It is told why the VM is not protected, and begun anew."""
        async def migrate() -> List[str]:
            keeper = self.keeper('copying', **{
                'qom-list': [], 'query-status': {'running': True,
                                                 'status': 'running'},
                'query-blockstats': [], 'query-chardev': [],
                'query-block-jobs': [], 'migrate': Refused('the port')})
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                return_value={'facts': {'generation': 0}, 'state': 'arming',
                              'role': 'standby'}))
            keeper.post('done')
            states = []
            while keeper.state != 'alone':
                await keeper._handle(await asyncio.wait_for(
                    keeper._events.get(), SECONDS))
                states.append(keeper.state)
            while not keeper.problem:
                await asyncio.sleep(0)
            assert keeper._work
            keeper._work.cancel()
            return [*states, keeper.problem]

        self.assertEqual(asyncio.run(migrate()), [
            'migrating', 'detaching', 'alone', 'the port'])

    def test_guest_sleeps(self) -> None:
        """Or has no space, or was stopped by somebody: it is no failure."""
        async def go_on(work: str, status: str) -> None:
            keeper = self.keeper(work, **{
                'query-status': {'status': status, 'running': False},
                'query-migrate': {'status': 'completed'},
                'query-blockstats': [], 'query-chardev': [], 'qom-list': [],
                'query-block-jobs': []})
            await asyncio.wait_for(getattr(keeper, f'_do_{work}')(), 1)

        for work in 'detach', 'promote':
            for status in 'suspended', 'io-error', 'paused':
                asyncio.run(go_on(work, status))
            with self.assertRaises(asyncio.TimeoutError):
                asyncio.run(go_on(work, 'colo'))

    def test_answers_late(self) -> None:
        """A VM is not ended because QEMU has needed a while once."""
        async def work(name: str, mode: str, late: str) -> str:
            answers: Json = {
                'query-status': {'status': 'running'}, 'qom-list': [],
                'query-migrate': {'status': 'completed'},
                'query-blockstats': [node(mode=mode)], 'query-chardev': [],
                'query-block-jobs': []}
            keeper = self.keeper('finding', **{**answers, late: HANGS})
            setattr(keeper.machine, 'connect', unittest.mock.AsyncMock())
            working = asyncio.create_task(getattr(keeper, f'_do_{name}')())
            while keeper.problem != str(HANGS) and not working.done():
                await asyncio.sleep(0)
            keeper.machine.monitor = Qmp(self.config, answers)
            return str(await asyncio.wait_for(working, SECONDS))

        for name, mode, late, wanted in (
                ('find', 'primary', 'query-migrate', 'detaching'),
                ('find', 'primary', 'query-status', 'detaching'),
                ('detach', 'primary', 'query-block-jobs', 'done'),
                ('promote', 'secondary', 'nbd-server-stop', 'done')):
            with self.subTest(work=name, late=late):
                self.assertEqual(asyncio.run(asyncio.wait_for(
                    work(name, mode, late), SECONDS)), wanted)

    def test_guest_was_off(self) -> None:
        """It has been started again since: QEMU has died then."""
        async def die(*events: str) -> str:
            keeper = self.keeper('protected')
            for name in events:
                keeper._on_event({'event': name, 'data': {
                    'guest': True, 'reason': 'guest-shutdown'}})
            keeper._on_death()
            return (await keeper._events.get()).name

        self.assertEqual(asyncio.run(die('SHUTDOWN')), 'off')
        self.assertEqual(asyncio.run(die('SHUTDOWN', 'RESET')), 'died')

    def test_command_cannot_be_done(self) -> None:
        """It is said why."""
        said: List[str] = []
        with unittest.mock.patch('qemu_replication.graph.leftovers',
                                 return_value=[self.config.state]):
            self.assertEqual(asyncio.run(self.force_standby(said.append)),
                             FAILED)
        self.assertIn(str(self.config.state), said[0])

    async def force_standby(self, say: Callable[[str], None]) -> int:
        """As a person does."""
        return await Control(self.keeper())._do(
            {'command': 'standby', 'force': True}, say)

    def test_boots_at_once(self) -> None:
        """QEMU has been told to end, and has not yet."""
        async def boot() -> bool:
            keeper = Keeper(self.config)
            with like_qemu(self.config.run) as qemu:
                self.assertTrue(keeper.machine.find())
                start = unittest.mock.AsyncMock()
                setattr(keeper, '_start', start)
                await keeper._do_boot()
                qemu.kill()
            return bool(start.called) and not keeper.machine.runs

        self.assertTrue(asyncio.run(boot()))

    def test_disk_is_gone(self) -> None:
        """Its file system may not be mounted: none is made below that."""
        async def arm(overwrite: bool = False, work: str = 'arm') -> None:
            keeper = Keeper(self.config)
            setattr(keeper, '_start', unittest.mock.AsyncMock())
            keeper.machine.monitor = Qmp(self.config, {})
            keeper.note(overwrite=overwrite)
            await getattr(keeper, f'_do_{work}')()

        disk = self.config.disks[0]
        self.config = replace(self.config, disks=(
            replace(disk, metadata=str(self.folder / 'meta')),))
        paths = Path(disk.file), self.folder / 'meta'
        asyncio.run(arm(work='boot'))
        for path in paths:
            mounted = path.rename(path.with_name('mounted'))
            with self.assertRaisesRegex(Failed, f'{path}.*mounted.*--force'):
                asyncio.run(arm())
            self.assertFalse(path.exists())
            mounted.rename(path)
            asyncio.run(arm())
            path.unlink()
            asyncio.run(arm(True))
            self.assertTrue(path.exists())
        # another disk is made as ever
        more = replace(disk, file=str(self.folder / 'more.raw'))
        self.config = replace(self.config, disks=(disk, more))
        asyncio.run(arm())
        self.assertTrue(Path(more.file).exists())

    def test_nothing_follows(self) -> None:
        """A failure in a state that has no other way out of it."""
        async def ask(*answers: object) -> str:
            keeper = self.keeper('asking')
            setattr(keeper.judge, 'of_peer', unittest.mock.AsyncMock(
                side_effect=answers))
            asking = asyncio.create_task(keeper._do('ask', '', 0))
            event = await asyncio.wait_for(keeper._events.get(), SECONDS)
            await asking
            return f'{event.name} {keeper.problem}'

        for problem in OSError(11, 'no process'), Failed('no process'):
            self.assertIn('done', asyncio.run(ask(problem, Verdict.OUT)))
            self.assertIn('no process', asyncio.run(ask(problem,
                                                        Verdict.OUT)))

    def test_runs_twice(self) -> None:
        """After a mistake of a person: both hosts say so."""
        async def wait(told: Json) -> str:
            keeper = self.keeper('alone', **{'query-blockstats': []})
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                return_value={'state': 'alone', 'since': 0.0, **told}))
            waiting = asyncio.create_task(keeper._do_wait_for_standby())
            while not getattr(keeper.peer.ask, 'called'):
                await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.cancel()
            return keeper.problem

        for told in ({'role': 'none', 'facts': {'generation': 1,
                                                'data': SOLE}},
                     {'role': 'primary', 'facts': {'generation': 0}}):
            self.assertIn('one of the two is wrong', asyncio.run(wait(told)))
        for facts in ({'generation': 0}, {'generation': 1, 'data': REPLICA}):
            self.assertEqual('', asyncio.run(wait({'role': 'none',
                                                   'facts': facts})))

    def test_merge_is_not_seen(self) -> None:
        """It may be seen the next time: the VM is to be protected then."""
        async def merged() -> str:
            keeper = self.keeper('alone', **{'query-blockstats': HANGS})
            self.assertFalse(await keeper._merged())
            return keeper.problem

        self.assertEqual(asyncio.run(merged()), str(HANGS))

    def test_folder_is_full(self) -> None:
        """What cannot be noted is not done, but later."""
        async def ask() -> List[str]:
            keeper = self.keeper('asking')
            keeper.facts.data = SHARED
            in_the_way = self.config.state / 'facts.json.new'
            in_the_way.mkdir()
            states = []
            for event in (keeper.post('drop'), Event('done', '', 0)):
                await keeper._handle(event)
                states.append(keeper.state)
            self.assertIn('facts.json', keeper.problem)
            self.assertEqual(keeper.facts.data, SHARED)
            in_the_way.rmdir()
            # the first one is that of a person, who was told
            self.assertFalse(keeper._events.get_nowait().taken.result())
            await keeper._handle(await asyncio.wait_for(keeper._events.get(),
                                                        SECONDS))
            states.append(keeper.state)
            return states

        self.assertEqual(asyncio.run(ask()), ['asking', 'asking',
                                              'detaching'])
        self.assertEqual(Facts.read(self.config.state / 'facts.json').data,
                         SOLE)

    def test_folder_is_full_in_failover(self) -> None:
        """Then it can be tried again."""
        async def promote() -> Keeper:
            keeper = self.keeper('promoting', **{
                'query-blockstats': [node()],
                'query-migrate': {'status': 'colo'}})
            keeper.note(data=REPLICA)
            (self.config.state / 'facts.json.new').mkdir()
            with self.assertRaises(Failed) as caught:
                await keeper._do_promote()
            self.assertEqual(caught.exception.event, 'unfit')
            return keeper

        self.assertEqual(asyncio.run(promote()).facts, Facts(0, REPLICA))

    def test_cannot_be_killed(self) -> None:
        """Its storage hangs: it is no one's turn until it has ended."""
        async def end(work: str) -> List[str]:
            keeper, done = self.keeper('down'), []
            problems = [Failed('QEMU 5 cannot be killed'), None]

            async def try_to_end(_seconds: float = 0) -> None:
                done.append('end')
                problem = problems.pop(0)
                if problem:
                    raise problem

            async def died() -> None:
                done.append(f'over{keeper.problem}')

            async def stopped() -> None:
                done.append('stopped')
                raise Failed('no cluster')

            setattr(keeper.machine, 'end', try_to_end)
            setattr(keeper.judge, 'has_died', died)
            setattr(keeper, '_wait_for_new_primary', died)
            setattr(keeper.judge, 'stopped', stopped)
            await getattr(keeper, f'_do_{work}')()
            return [*done, keeper.problem]

        for work, wanted in (
                ('tell_death', ['end', 'end', 'over', 'over', '']),
                ('wait', ['end', 'end', 'over', '']),
                # when it has ended, all is done that is to be done
                ('end', ['stopped', 'end', 'end', 'no cluster'])):
            self.assertEqual(asyncio.run(end(work)), wanted)

    def test_begins(self) -> None:
        """It says nothing before it knows whether there is a QEMU."""
        async def ask() -> List[str]:
            keeper, writer = self.keeper(), unittest.mock.Mock()
            writer.drain = unittest.mock.AsyncMock()
            reader = asyncio.StreamReader()
            reader.feed_data(b'{"command": "status", "other": false}\n')
            asked = [asyncio.create_task(Control(keeper)._serve_one(
                reader, writer)),
                asyncio.create_task(keeper._answer({'ask': 'status'}))]
            for _ in range(10):
                await asyncio.sleep(0)
            self.assertFalse(any(task.done() for task in asked))
            await keeper._begin()
            told = await asyncio.wait_for(asked[1], SECONDS)
            assert told
            await asyncio.wait_for(asked[0], SECONDS)
            return [told['state'], json.loads(
                writer.write.call_args.args[0])['state']]

        Facts(1, SOLE).save(self.config.state / 'facts.json')
        self.assertEqual(asyncio.run(ask()), ['waiting', 'waiting'])

    def test_refused(self) -> None:
        """What was not done has no effect later."""
        async def alone() -> bool:
            keeper = self.keeper('booting')
            asked = asyncio.create_task(Commands(keeper).alone(False))
            await keeper._handle(await keeper._events.get())
            with self.assertRaises(Refusal):
                await asked
            return keeper.facts.held

        self.assertFalse(asyncio.run(alone()))

    def test_next_keeper_holds(self) -> None:
        """Until it is told to protect, or the VM is started anew."""
        async def order(state: str, name: str, force: bool = False) -> None:
            keeper = self.keeper(state)
            asked = asyncio.create_task(getattr(Commands(keeper), name)(force))
            done, _ = await asyncio.wait({
                asked, asyncio.ensure_future(keeper._events.get())},
                return_when=asyncio.FIRST_COMPLETED)
            for task in done - {asked}:
                task.result().taken.set_result(True)
            await asyncio.wait_for(asked, SECONDS)

        async def detach() -> str:
            keeper = self.keeper('detaching', **{
                'query-status': {'status': 'running'}, 'query-chardev': [],
                'query-block-jobs': [], 'qom-list': []})
            return await keeper._do_detach()

        for state, name, force, wanted in (
                ('protected', 'alone', False, 'hold'),
                ('detaching', 'protect', False, 'done'),
                ('alone', 'alone', False, 'hold'),
                ('held', 'protect', False, 'done'),
                ('asking', 'alone', False, 'hold'),
                ('asking', 'alone', True, 'done')):
            asyncio.run(order(state, name, force))
            self.assertEqual(asyncio.run(detach()), wanted)

        async def begin_alone() -> None:
            keeper = self.keeper()
            keeper.note(held=True)
            keeper._begin_alone(5)

        asyncio.run(begin_alone())
        self.assertEqual(asyncio.run(detach()), 'done')

    def test_clock_is_set_back(self) -> None:
        """The next try comes all the same."""
        async def wait() -> None:
            keeper = self.keeper('alone', **{'query-blockstats': []})
            keeper._tried, keeper._tries = 5.0, 1

            async def ask(_what: str) -> Json:
                return {'facts': {'generation': 0}, 'state': 'standby',
                        'role': 'standby', 'since': 5.0}

            setattr(keeper.peer, 'ask', ask)
            with unittest.mock.patch('time.time', side_effect=count(0, -100)):
                await asyncio.wait_for(keeper._do_wait_for_standby(), SECONDS)

        asyncio.run(wait())


class ClaimTest(KeeperCase):
    """Who may take the VM."""

    def test_facts_are_lost(self) -> None:
        """The peer's tell that the VM was there: these disks may be old."""
        async def claim(theirs: str) -> str:
            keeper = self.keeper()
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                return_value={'role': 'none', 'facts': {'data': theirs}}))
            try:
                await Commands(keeper)._claim(False)
            except Refusal as exc:
                return str(exc)
            return ''

        for theirs in SOLE, SHARED:
            self.assertIn('newer data', asyncio.run(claim(theirs)))
        for theirs in '', REPLICA:
            self.assertEqual(asyncio.run(claim(theirs)), '')

    def test_primary_has_lost_its_facts(self) -> None:
        """Who stands by is older than it by the number, and no primary."""
        async def give_up(state: str, data: str) -> Json:
            keeper = self.keeper(state)
            keeper.begun.set()
            keeper.machine.dead.set()
            keeper.gave_up.set()
            keeper.facts = Facts(3, data)
            asked = asyncio.create_task(keeper._answer({
                'ask': 'yield', 'generation': 0}))
            handled = asyncio.create_task(keeper._handle(
                await keeper._events.get())) if data == REPLICA else None
            told = await asyncio.wait_for(asked, SECONDS)
            if handled:
                await handled
                assert keeper._work
                keeper._work.cancel()
            return told

        self.assertTrue(asyncio.run(give_up('secondary', REPLICA))['yields'])
        told = asyncio.run(give_up('protected', SHARED))
        self.assertFalse(told['yields'])

        async def force() -> int:
            keeper = self.keeper()
            keeper.facts = Facts(3, REPLICA)
            await Commands(keeper)._give_up_data(True)
            return keeper.facts.generation

        # it is no sign of a VM there for its peer any more
        self.assertEqual(asyncio.run(force()), 0)

    def test_stuck_before_it_has_begun(self) -> None:
        """A failover that QEMU was too late for: it is begun again."""
        async def order(data: str) -> str:
            keeper = self.keeper('stuck')
            keeper.note(data=data, generation=3)
            command = Commands(keeper).failover if data == REPLICA \
                else Commands(keeper).alone
            if data == REPLICA:
                # the peer would not know that the VM is here
                with self.assertRaisesRegex(Refusal, '"failover"'):
                    await Commands(keeper).alone(False)
            ordered = asyncio.create_task(command(False))
            await keeper._handle(await asyncio.wait_for(keeper._events.get(),
                                                        SECONDS))
            await ordered
            assert keeper._work
            keeper._work.cancel()
            return keeper.state

        for data, wanted in (REPLICA, 'promoting'), (SOLE, 'detaching'):
            self.assertEqual(asyncio.run(asyncio.wait_for(order(data),
                                                          SECONDS)), wanted)

    def test_only_checkpoint(self) -> None:
        """What is said to be done with it can be done."""
        async def order() -> None:
            keeper = self.keeper('arming')
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                return_value={'facts': {'data': REPLICA, 'generation': 0},
                              'role': 'standby'}))
            with unittest.mock.patch('qemu_replication.graph.leftovers',
                                     return_value=[self.path]), \
                    self.assertRaisesRegex(Failed, '"stop".*"protect --force'):
                await keeper._drop_leftovers()
            with self.assertRaisesRegex(Refusal, '"stop" and "protect"'):
                await Commands(keeper).protect(True)
            keeper.machine.dead.set()
            stopping = asyncio.create_task(Commands(keeper).stop(False))
            await keeper._handle(await keeper._events.get())
            self.assertIn(keeper.state, (await stopping).reached)
            await Commands(keeper)._claim(True)

        asyncio.run(order())

    def test_peer_may_take_it_later(self) -> None:
        """It is not enough that it has not done so yet."""
        async def claim() -> None:
            keeper = self.keeper()
            keeper.facts.data = SHARED
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                side_effect=Unreachable('no keeper')))
            with self.assertRaisesRegex(Refusal, 'if it is down, and has'):
                await Commands(keeper)._claim(False)
            await Commands(keeper)._claim(True)

        asyncio.run(claim())

    def test_next_keeper(self) -> None:
        """It knows what has been fenced since the hosts were in step."""
        async def begin() -> float:
            keeper = self.keeper('standby')
            with unittest.mock.patch('time.time', return_value=5.0):
                await asyncio.gather(keeper._begin(), keeper._answer(
                    {'ask': 'in-step', 'generation': 3}))
            return float(Keeper(self.config).status()['in-step-since'])

        self.assertEqual(asyncio.run(begin()), 5.0)

    def test_peer_has_ended(self) -> None:
        """And its keeper as well, which has left word."""
        async def take() -> List[str]:
            keeper, events = self.keeper('secondary'), []
            keeper.begun.set()
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                side_effect=Unreachable('no keeper')))
            for word in '', 'ended':
                await keeper._answer({'ask': word})
                try:
                    await keeper._do_take()
                    events.append('taken')
                except Failed as exc:
                    events.append(exc.event)
            # both at once
            keeper.peer_ended = False
            await keeper._enter('taking', '')
            self.assertTrue((await keeper._answer({'ask': 'ended'}))['ok'])
            await asyncio.wait_for(keeper._events.get(), SECONDS)
            # that is of no use when it is in step with another QEMU there
            for state in 'arming', 'standby', 'secondary':
                await keeper._enter(state, '')
                await keeper._answer({'ask': 'ended' * (state == 'standby')})
            events.append(str(keeper.peer_ended))
            return events

        self.assertEqual(asyncio.run(take()), ['failed', 'taken', 'False'])

    def test_peer_needs_long(self) -> None:
        """Its QEMU has much memory to give back: it is waited for."""
        async def take() -> bool:
            keeper = self.keeper('taking')
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                side_effect=[Busy('not yet'), Busy('not yet'),
                             {'yields': True}]))
            await keeper._do_take()
            return True

        self.assertTrue(asyncio.run(take()))

    def test_peer_is_given_up(self) -> None:
        """By a person: the cluster may not have it take the VM later."""
        async def give_up(hold: bool) -> None:
            keeper = self.keeper('protected', **{
                'query-status': {'status': 'running', 'running': True},
                'query-blockstats': [], 'query-chardev': [], 'qom-list': [],
                'query-block-jobs': []})
            keeper.note(held=hold)
            promoted = unittest.mock.AsyncMock()
            setattr(keeper.judge, 'promoted', promoted)
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                side_effect=Unreachable('no keeper')))
            keeper.post('drop')
            while not promoted.called:
                await keeper._handle(await asyncio.wait_for(
                    keeper._events.get(), SECONDS))
                for _ in range(10):
                    await asyncio.sleep(0)
            assert keeper._work
            keeper._work.cancel()
            self.assertEqual(keeper.state, 'held' if hold else 'alone')

        for hold in False, True:
            asyncio.run(give_up(hold))

    def test_leaves_word(self) -> None:
        """Who has stopped the VM is not there when the peer takes it."""
        async def stop(state: str, data: str) -> List[str]:
            keeper, asked = self.keeper(state), []
            keeper.facts.data = data
            keeper.machine.dead.set()

            async def ask(what: str) -> None:
                asked.append(what)

            setattr(keeper.peer, 'ask', ask)
            stopping = asyncio.create_task(Control(keeper)._do(
                {'command': 'stop', 'force': True}, lambda text: None))
            await keeper._handle(await keeper._events.get())
            self.assertEqual(await asyncio.wait_for(stopping, SECONDS), DONE)
            return asked

        for state, data, wanted in (('protected', SHARED, ['ended']),
                                    ('waiting', SHARED, ['ended']),
                                    ('alone', SOLE, []),
                                    ('secondary', REPLICA, [])):
            self.assertEqual(asyncio.run(stop(state, data)), wanted)


class FindTest(KeeperCase):
    """A keeper finds QEMU again."""
    given: List[object]

    def found(self, data: str, mode: str, migration: str, guest: str) -> str:
        """What it takes it for."""
        async def find() -> str:
            keeper = self.keeper('finding', **{
                'query-blockstats': [node(mode=mode)],
                'query-migrate': {'status': migration},
                'query-status': {'status': guest}})
            keeper.facts.data = data
            setattr(keeper.machine, 'connect', keeper._tell)
            self.given = getattr(keeper._monitor, 'given')
            return await keeper._do_find()

        return asyncio.run(find())

    def test_found(self) -> None:
        """One that stands by does not take the VM, whatever is forgotten."""
        for data, mode, migration, guest, wanted in (
                ('shared', 'primary', 'colo', 'running', 'protected'),
                ('sole', 'primary', 'none', 'running', 'detaching'),
                ('sole', 'secondary', 'completed', 'running', 'promoting'),
                ('replica', 'secondary', 'colo', 'running', 'secondary'),
                ('replica', 'secondary', 'none', 'inmigrate', 'arming'),
                # it was given up, or went on alone, but that was not all
                ('replica', 'primary', 'colo', 'running', 'arming'),
                ('sole', 'primary', 'colo', 'running', 'detaching'),
                # the facts were lost
                ('', 'primary', 'colo', 'running', 'protected'),
                ('', 'secondary', 'completed', 'running', 'promoting'),
                ('', 'secondary', 'colo', 'running', 'secondary'),
                ('', 'secondary', 'none', 'inmigrate', 'arming')):
            with self.subTest(data=data, mode=mode, migration=migration):
                self.assertEqual(self.found(data, mode, migration, guest),
                                 wanted)
                self.assertIn(wanted, STATES['joining' if data == REPLICA
                                             else 'finding'].on)
        # they are noted anew
        for state, data in (('secondary', REPLICA), ('protected', SHARED),
                            ('asking', SHARED)):
            self.assertEqual(STATES[state].data, data)

    def test_found_protected(self) -> None:
        """The last keeper may not have told the cluster, or told the other."""
        for problem, wanted in ((None, 'protected'),
                                (Failed('no cluster'), 'asking')):
            tell = unittest.mock.AsyncMock(side_effect=problem)
            with unittest.mock.patch('qemu_replication.judge.Judge.in_step',
                                     tell):
                self.assertEqual(self.found('shared', 'primary', 'colo',
                                            'running'), wanted)
            self.assertEqual(tell.call_count, 1)
            # the last one may have been about to switch
            self.assertIn(('migrate-set-parameters', {
                'x-checkpoint-delay': self.config.limits.checkpoint_ms}),
                self.given)

    def test_no_pidfile_yet(self) -> None:
        """It has been started, and its keeper has died at once."""
        async def find() -> int:
            machine = Keeper(self.config).machine
            self.assertFalse(machine.find())
            with like_qemu(self.config.run) as qemu:
                self.assertTrue(machine.find())
                self.assertEqual(machine.pid, qemu.pid)
                qemu.kill()
                await asyncio.wait_for(machine.dead.wait(), SECONDS)
            return machine.pid

        asyncio.run(find())

    def test_no_log(self) -> None:
        """Somebody has removed it: that QEMU ends is seen all the same."""
        qemu = self.folder / 'qemu'
        qemu.write_text(f'#!/bin/sh\nrm {self.config.run}/qemu.log\nexit 5\n')
        qemu.chmod(0o755)
        self.config = replace(self.config, vm=replace(self.config.vm,
                                                      qemu=str(qemu)))

        async def start() -> None:
            await asyncio.wait_for(Keeper(self.config).machine.start(True), 5)

        with self.assertRaisesRegex(Failed, 'with status 5: .*No such file'):
            asyncio.run(start())

    def test_hangs_within_a_checkpoint(self) -> None:
        """It may have the only one: the peer has to have the VM."""
        self.config = replace(self.config, limits=replace(
            self.config.limits, start=0.05))
        Facts(3, REPLICA).save(self.config.state / 'facts.json')

        def told(role: str, guest: str, data: str, generation: int = 3
                 ) -> Json:
            return {'role': role, 'guest': guest, 'facts': {
                'data': data, 'generation': generation}}

        async def find(*answers: object) -> Optional[str]:
            keeper = Keeper(self.config)
            setattr(keeper.peer, 'ask', unittest.mock.AsyncMock(
                side_effect=[*answers, Unreachable('the end')]))
            await keeper._begin()
            event = asyncio.create_task(keeper._events.get())
            while 'the end' not in keeper.problem and not event.done():
                await asyncio.sleep(0)
            assert keeper._work
            keeper._work.cancel()
            self.assertTrue(keeper.machine.runs)
            return event.result().name if event.done() else None

        with unittest.mock.patch('qemu_replication.keeper.LOOK_SECONDS', 0), \
                like_qemu(self.config.run) as qemu:
            for answer in (Unreachable('no keeper'),
                           told('primary', 'silent', SHARED),
                           told('none', 'none', SHARED),
                           told('standby', 'running', REPLICA),
                           told('primary', 'running', SHARED, 2),
                           told('none', 'none', SOLE, 2)):
                self.assertIsNone(asyncio.run(find(answer)))
            for answer in (told('primary', 'running', SHARED),
                           told('none', 'none', SOLE)):
                self.assertEqual(asyncio.run(find(answer)), 'arming')
            qemu.kill()

    def test_cannot_be_followed(self) -> None:
        """There are too many files: it does not run without a keeper."""
        qemu = self.folder / 'qemu'
        qemu.write_text('#!/bin/sh\nexec sleep 1000\n')
        qemu.chmod(0o755)
        self.config = replace(self.config, vm=replace(self.config.vm,
                                                      qemu=str(qemu)))
        started: List['subprocess.Popen[bytes]'] = []
        popen = subprocess.Popen

        def start(*words: Any, **more: Any) -> 'subprocess.Popen[bytes]':
            started.append(popen(*words, **more))
            return started[-1]

        async def fail() -> None:
            machine = Keeper(self.config).machine
            with unittest.mock.patch('os.pidfd_open',
                                     side_effect=OSError(24, 'too many')), \
                    unittest.mock.patch('subprocess.Popen', start), \
                    self.assertRaises(OSError):
                await machine.start(True)
            self.assertFalse(machine.runs)
            # and it is no trouble later
            await machine.end()

        try:
            asyncio.run(fail())
            self.assertIsNotNone(started[0].poll())
        finally:
            started[0].kill()
            started[0].wait()


class MonitorTest(KeeperCase):
    """QEMU is busy with something."""

    def test_can_be_cut_off(self) -> None:
        """However often it was asked: that is what ends it."""
        path = self.folder / 'qmp'
        long = {'command-line': f'qemu-io null "sleep {10 ** 6}"'}

        async def ask() -> None:
            monitor = Monitor(path, 0.2, lambda event: None)
            await asyncio.wait_for(monitor.connect(), SECONDS)
            for name in ['human-monitor-command', *10 * ['query-status']]:
                with self.assertRaises(Late):
                    await monitor.cmd(name, {} if 'query' in name else long)
            monitor._answer = SECONDS
            self.assertEqual(await monitor.cmd(
                'yank', {'instances': []}, oob=True), {})
            await monitor.close()

        with subprocess.Popen(
                [self.config.vm.qemu, '-machine', 'none', '-nodefaults',
                 '-display', 'none', '-blockdev', 'null-co,node-name=null',
                 '-qmp', f'unix:{path},server=on,wait=off']) as qemu:
            try:
                asyncio.run(ask())
            finally:
                qemu.kill()


class NamesTest(KeeperCase):
    """Of overlays that QEMU has left."""

    def test_names(self) -> None:
        """QEMU has made them where they are looked for."""
        folder = self.folder / 'a b-c%'
        folder.mkdir()
        disk = folder / 'd~\u00fc.raw'
        disk.write_bytes(bytes(MIB))
        link = self.folder / 'link'
        link.symlink_to(disk)
        elsewhere = self.folder / 'elsewhere'
        elsewhere.mkdir()
        for path in disk, link:
            for where in '', str(elsewhere):
                with self.subTest(path=path, where=where):
                    wanted = graph.overlays(replace(
                        self.config.disks[0], file=str(path), overlays=where))
                    options = {'overlay-dir': where} if where else {}
                    with Host(OPTIONS.build, self.folder, 'names',
                              *NO_GUEST) as host:
                        host.add(nodes.standby(
                            'top0', 'replica0', nodes.image(
                                'raw', 'disk0', nodes.file(path)), **options))
                        self.assertEqual(
                            sorted(wanted[0].parent.glob('*.scratch')),
                            [path.with_suffix('.scratch') for path in wanted])


class MergeTest(KeeperCase):
    """Of overlays that QEMU has left, before the VM is booted."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = self.config.disks[0]
        Path(self.disk.file).write_bytes(b'd' * MIB)
        self.overlays = [Path(f'{self.disk.file}.standby-{name}.qcow2')
                         for name in ('active', 'hidden')]

    def overlay(self, number: int, below: str, *write: str) -> None:
        """Make one, and have it written to."""
        path = str(self.overlays[number])
        for words in (['qemu-img', 'create', '-q', '-f', 'qcow2', '-b', below,
                       '-F', 'qcow2' if 'qcow2' in below else 'raw', path],
                      ['qemu-io', '-c', ' '.join(['write', '-q', *write]),
                       path]):
            subprocess.run([OPTIONS.build / words[0], *words[1:]], check=True,
                           timeout=SECONDS)

    def merge(self) -> bytes:
        """What the disk has after that."""
        async def merge() -> None:
            keeper = self.keeper()
            await keeper._merge(self.disk)
            self.assertTrue(keeper.facts.wiped)

        asyncio.run(merge())
        self.assertFalse(any(path.exists() for path in self.overlays))
        return Path(self.disk.file).read_bytes()

    def test_both(self) -> None:
        """The active one has the guest's latest word."""
        self.overlay(1, self.disk.file, '-P', '0x68', '0', '128k')
        self.overlay(0, str(self.overlays[1]), '-P', '0x61', '0', '64k')
        self.assertEqual(self.merge(), b'a' * 65536 + b'h' * 65536
                         + b'd' * (MIB - 131072))

    def test_one_is_left(self) -> None:
        """By a crash while both were being removed: all is merged."""
        self.overlay(1, self.disk.file, '-P', '0x68', '0', '128k')
        self.assertEqual(self.merge(), b'd' * MIB)

    def test_has_no_bound(self) -> None:
        """But it ends with who has begun it."""
        self.assertFalse(STATES['booting'].limit)
        fifo, tool = self.folder / 'fifo', self.folder / 'qemu-img'
        os.mkfifo(fifo)
        tool.write_text(f'#!/bin/sh\necho $$ >{fifo}\nexec sleep 1000\n')
        tool.chmod(0o755)
        self.config = replace(self.config, vm=replace(
            self.config.vm, qemu=str(self.folder / 'qemu')))
        self.overlays[0].touch()

        async def cancel() -> str:
            merging = asyncio.create_task(self.keeper()._merge(self.disk))
            pid = await asyncio.to_thread(fifo.read_text)
            merging.cancel()
            await asyncio.wait({merging}, timeout=SECONDS)
            return pid

        self.assertFalse(Path('/proc', asyncio.run(cancel()).strip()).exists())

    def test_fails(self) -> None:
        """It is said why."""
        self.overlays[0].write_bytes(b'no qcow2')
        with self.assertRaisesRegex(Failed, 'Did not find .*disk0.raw'):
            self.merge()


class ServiceTest(KeeperCase):
    """The program."""

    def setUp(self) -> None:
        super().setUp()
        self.side = Side(self.path, self.folder, 'east')
        self.addCleanup(self.side.close)

    def test_second_one(self) -> None:
        """It ends, and the first one is still there to be asked."""
        self.side.start()
        self.assertIn('runs already', self.side.order('keeper', status=1))
        self.assertIn('nothing runs here', self.side.order(
            'status', status=UNPROTECTED))

    def test_unit(self) -> None:
        """It is started until the link is there; QEMU outlives it."""
        unit = ConfigParser(interpolation=None)
        unit.read(PROGRAM.with_name('qemu-replication@.service'), 'utf-8')
        self.assertEqual(unit['Unit']['StartLimitIntervalSec'], '0')
        self.assertEqual(unit['Service']['Restart'], 'on-failure')
        self.assertEqual(unit['Service']['KillMode'], 'process')
        self.assertEqual(unit['Service']['OOMPolicy'], 'continue')

    def test_no_keeper(self) -> None:
        """Who starts it, if that is what is wrong."""
        config, words = self.config, {}
        for name, error, judge in (
                ('service', ConnectionRefusedError(), Cluster()),
                ('cluster', FileNotFoundError(), Cluster('pacemaker', 'vm')),
                ('root', PermissionError(13, 'no'), Cluster()),
                ('hangs', TimeoutError('timed out'), Cluster())):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                status = no_keeper(replace(config, cluster=judge), error)
            words[name] = status, said.getvalue()
        self.assertEqual([status for status, _ in words.values()],
                         [NO_KEEPER, NO_KEEPER, FAILED, FAILED])
        self.assertIn('start qemu-replication@vm1', words['service'][1])
        self.assertIn('Pacemaker starts it', words['cluster'][1])
        self.assertNotIn('no keeper', words['root'][1])
        self.assertIn('does not answer', words['hangs'][1])

    def test_files(self) -> None:
        """What a guest writes is not for everybody on this host."""
        before = os.umask(0)
        self.addCleanup(os.umask, before)
        self.side.start()
        self.side.order('standby')
        for name in ('disk0.raw', 'disk0.raw.meta', 'qemu.log', 'qmp.sock',
                     'status.json', 'state/facts.json', 'keeper.sock'):
            mode = (self.side.folder / name).stat().st_mode
            self.assertEqual(mode & 0o077, 0, name)

    def test_mistake_beside_qemu(self) -> None:
        """It is told, but somebody has to look after that QEMU."""
        Path(self.config.disks[0].file).write_bytes(b'other size')
        self.assertIn('its size is', self.side.order('keeper', status=2))
        with like_qemu(self.config.run) as qemu:
            self.side.start()
            self.assertIn('its size is', self.side.words())
            self.assertEqual(self.side.pid, qemu.pid)
            self.side.kill_keeper()
            qemu.kill()

    def test_interrupted(self) -> None:
        """Who does not want to wait any longer need not read Python."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(self.config.control))
            sock.listen()
            # it may be ignored by who has started this
            with subprocess.Popen(
                    ['env', '--default-signal=INT', PROGRAM, 'protect',
                     self.path, '--host', 'east'],
                    stderr=subprocess.PIPE) as asking:
                with sock.accept()[0] as connection:
                    connection.recv(1)
                    asking.send_signal(signal.SIGINT)
                    said = asking.communicate(timeout=SECONDS)[1]
        self.assertEqual((asking.returncode, said), (130, b''))

    def test_long_log(self) -> None:
        """It does not fill the memory, where it is, for ever."""
        path = self.folder / 'qemu.log'
        for size, left in ((LOG_BYTES, LOG_BYTES + 1), (LOG_BYTES + 1, 1)):
            path.write_bytes(bytes(size))
            with open_log(path) as log:
                log.write(b'x')
            self.assertEqual(path.stat().st_size, left)
        self.assertTrue((self.folder / 'qemu.old.log').exists())

    def test_log_that_is_open(self) -> None:
        """Whoever writes to it goes on at its begin; the end is kept."""
        async def look() -> None:
            keeper = self.keeper('alone', **{
                'query-blockstats': [], 'query-status': {'status': 'running'}})
            with open_log(path) as log:
                log.write(bytes(3 * LOG_BYTES) + b'last words')
                log.flush()
                looking = asyncio.create_task(keeper._look_often())
                while path.stat().st_size:
                    await self.change(keeper, looking)
                looking.cancel()
                log.write(b'x')

        for name in 'qemu', 'keeper':
            path = self.folder / f'east/{name}.log'
            asyncio.run(asyncio.wait_for(look(), SECONDS))
            self.assertEqual(path.read_bytes(), b'x')
            old = path.with_suffix('.old.log').read_bytes()
            self.assertEqual(len(old), LOG_BYTES)
            self.assertTrue(old.endswith(b'last words'))

    def test_damaged_facts(self) -> None:
        """It does not start, and says why."""
        path = self.config.state / 'facts.json'
        path.write_text('{', 'utf-8')
        said = self.side.order('keeper', status=1)
        self.assertIn(f'error: {path}: ', said)
        self.assertEqual(len(said.splitlines()), 1)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST])
