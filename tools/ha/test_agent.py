#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What the OCF agent makes of what it hears, with a cluster that is none.

The programs of Pacemaker and Corosync are scripts that note how they are
called and say what a test wants; so is the keeper.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import unittest.mock
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import command
from guesthost import MIB, Disks
from qemu_replication import cluster
from qemu_replication.agent import Agent
from qemu_replication.check import TIMEOUTS
from qemu_replication.config import load
from qemu_replication.facts import Facts
from qemu_replication.judge import Judge, Verdict, new_judge
from qemu_replication.errors import Failed, Unreachable
from qemu_replication.work import Works
from sides import PROGRAM, configuration, like_qemu, toml

AGENT = PROGRAM.with_name('ocf-vm')
SECONDS = 60.0
SUCCESS, ERROR, INSTALLED, CONFIGURED, NOT_RUNNING, PROMOTED, \
    FAILED_PROMOTED = (0, 1, 5, 6, 7, 8, 9)
NO_SUCH = 105
QUORUM = '''Quorum information
------------------
Ring ID:          {ring}
Quorate:          {quorate}

Membership information
----------------------
    Nodeid      Votes Name
{members}
'''
Json = Dict[str, Any]


OPTIONS, REST = command.parser(__doc__).parse_known_args()


def quorum(*members: str, ring: str = '1.8', quorate: bool = True) -> str:
    """What corosync-quorumtool says on east."""
    return QUORUM.format(
        ring=ring, quorate='Yes' if quorate else 'No', members='\n'.join(
            f'         {number}          1 {name}'
            + (' (local)' if name == 'east' else '')
            for number, name in enumerate(members, 1)))


def fenced(when: float, status: str = 'success') -> str:
    """What stonith_admin says of west."""
    stamp = time.strftime('%Y-%m-%d %H:%M:%SZ', time.gmtime(when))
    return (f'<pacemaker-result><fence_event action="reboot" target="west" '
            f'status="{status}" completed="{stamp}"/></pacemaker-result>')


class FakeKeeper:
    """One that says what it was told to."""

    def __init__(self, path: Path) -> None:
        self.status: Json = {}
        # by command, with "force" behind it: exit status, state after that
        self.answers: Dict[str, Tuple[int, str]] = {}
        self.asked: List[str] = []
        # what it is after that
        self.later: Json = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def tell(self, state: str, role: str, data: str) -> None:
        """What it is."""
        self.status = {'state': state, 'role': role, 'facts': {'data': data},
                       'in-step-since': 1000.0, 'pid': None}

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, connection.makefile('rw') as stream:
                request = json.loads(stream.readline())
                stream.write(json.dumps(self._answer(request)) + '\n')

    def _answer(self, request: Json) -> Json:
        if request['command'] == 'status':
            told, self.status = self.status, self.later or self.status
            return told
        name = request['command'] + (' force' if request.get('force') else '')
        self.asked.append(name)
        return {'status': self.answers.get(name, (0, ''))[0]}

    def close(self) -> None:
        """End it."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class FakeCluster(unittest.TestCase):
    """Programs of a cluster, and a keeper."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.bin = self.folder / 'bin'
        self.calls_file = self.folder / 'calls'
        for path in (self.bin, self.folder / 'east', self.folder / 'west'):
            path.mkdir()
        for name in ('crm_attribute', 'crm_resource', 'corosync-quorumtool',
                     'stonith_admin'):
            self.program(name)
        table = configuration(OPTIONS.build, self.folder, Disks(1, MIB, 0))
        table['cluster'] = {'judge': 'pacemaker', 'resource': 'vm'}
        self.path = self.folder / 'vm1.toml'
        self.path.write_text(toml(table), 'utf-8')
        self.config = load(self.path, 'east')
        before = os.environ['PATH']
        os.environ['PATH'] = f'{self.bin}:{before}'
        self.addCleanup(os.environ.update, {'PATH': before})

    def program(self, name: str, text: str = '', status: int = 0) -> None:
        """Have one say something, and end with a status."""
        (self.folder / f'{name}.says').write_text(text, 'utf-8')
        path = self.bin / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>{self.calls_file}\n'
                        f'cat {self.folder}/{name}.says\nexit {status}\n',
                        'utf-8')
        path.chmod(0o755)

    def calls(self, part: str) -> List[str]:
        """How a program was called."""
        if not self.calls_file.exists():
            return []
        return [line for line in self.calls_file.read_text(
            'utf-8').splitlines() if part in line]

    def keeper(self, state: str, role: str, data: str) -> FakeKeeper:
        """A keeper that is there."""
        keeper = FakeKeeper(self.config.control)
        self.addCleanup(keeper.close)
        keeper.tell(state, role, data)
        return keeper

    def agent(self, action: str, wanted: int, config: Optional[str] = None,
              **more: str) -> str:
        """Call the agent as Pacemaker does."""
        env = {**os.environ, 'QEMU_REPLICATION_HOST': 'east',
               'HA_RSCTMP': str(self.folder / 'rsctmp'),
               'OCF_RESKEY_config': config or str(self.path), **more}
        done = subprocess.run(
            [sys.executable, str(AGENT), action], env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False,
            timeout=SECONDS)
        self.assertEqual(done.returncode, wanted, done.stderr)
        return done.stdout + done.stderr


class AgentTest(FakeCluster):
    """The actions."""

    def test_meta_data(self) -> None:
        """It is XML, and has all actions."""
        told = xml.etree.ElementTree.fromstring(self.agent('meta-data', 0))
        self.assertEqual(told.attrib['name'], 'vm')
        self.assertEqual(
            {action.attrib['name'] for action in told.iter('action')},
            {'start', 'stop', 'promote', 'demote', 'monitor', 'validate-all',
             'meta-data'})
        for action in told.iter('action'):
            self.assertEqual(action.attrib['timeout'],
                             f'{TIMEOUTS[action.attrib["name"]]}s')
        self.assertEqual(
            {action.attrib.get('role') for action in told.iter('action')
             if action.attrib['name'] == 'monitor'},
            {'Promoted', 'Unpromoted'})

    def test_validate_all(self) -> None:
        """As the command line, and what a promotable clone has to be."""
        self.agent('validate-all', SUCCESS)
        self.assertIn('clone-max', self.agent(
            'validate-all', CONFIGURED, OCF_RESKEY_CRM_meta_clone_max='3'))
        # that is so here, and need not be so on the other host
        for action in 'validate-all', 'start', 'promote', 'demote':
            self.assertIn('No such file', self.agent(
                action, INSTALLED, '/no/such.toml'))
        self.assertIn('config', self.agent('start', CONFIGURED,
                                           OCF_RESKEY_config=''))
        self.agent('start', CONFIGURED, OCF_RESKEY_CRM_meta_clone_max='3')
        # the host is called as Pacemaker calls it, whatever it calls itself
        self.agent('validate-all', SUCCESS, QEMU_REPLICATION_HOST='',
                   OCF_RESKEY_CRM_meta_on_node='west')
        self.agent('monitor', NOT_RUNNING, '/no/such.toml')
        self.agent('stop', SUCCESS, '/no/such.toml')
        self.agent('nonsense', 3)

    def test_monitor(self) -> None:
        """What each state means to Pacemaker."""
        self.agent('monitor', NOT_RUNNING)
        keeper = self.keeper('protected', 'primary', 'shared')
        for state, role, data, wanted in (
                ('protected', 'primary', 'shared', PROMOTED),
                ('asking', 'primary', 'shared', PROMOTED),
                ('alone', 'primary', 'sole', PROMOTED),
                ('secondary', 'standby', 'replica', SUCCESS),
                ('arming', 'standby', 'replica', SUCCESS),
                ('waiting', 'none', 'shared', SUCCESS),
                ('stuck', 'primary', 'sole', FAILED_PROMOTED),
                # the peer's turn: to be demoted is faster
                ('down', 'none', 'shared', PROMOTED),
                ('down', 'none', 'sole', FAILED_PROMOTED)):
            with self.subTest(state=state):
                keeper.tell(state, role, data)
                self.agent('monitor', wanted)
        # it cannot be killed, so the score is still there
        keeper.tell('down', 'none', 'shared')
        keeper.status['pid'] = 5
        self.agent('monitor', FAILED_PROMOTED)
        # the keeper alone sets scores
        self.assertEqual(self.calls('crm_attribute'), [])

    def test_start(self) -> None:
        """The host with the VM's disks waits; the other one stands by."""
        keeper = self.keeper('stopped', 'none', '')
        self.program('crm_attribute', '200\n')
        self.agent('start', SUCCESS)
        self.assertEqual(keeper.asked, [])
        self.program('crm_attribute', '', NO_SUCH)
        self.agent('start', SUCCESS)
        self.assertEqual(keeper.asked, ['standby'])
        keeper.tell('waiting', 'none', 'shared')
        self.agent('start', SUCCESS)
        keeper.tell('standby', 'standby', 'replica')
        self.agent('start', SUCCESS)
        self.assertEqual(keeper.asked, ['standby'])

    def test_file_is_changed(self) -> None:
        """What runs is where it was started to be, until it is stopped."""
        keeper = self.keeper('protected', 'primary', 'shared')
        self.agent('start', SUCCESS)
        good = self.path.read_text('utf-8')
        for text in good.replace('/{host}"', '/{host}-2"'), 'vm = [':
            self.assertNotEqual(text, good)
            self.path.write_text(text, 'utf-8')
            self.agent('monitor', PROMOTED)
            self.agent('demote', SUCCESS)
        self.agent('validate-all', INSTALLED)
        self.agent('start', INSTALLED)
        self.path.write_text(good, 'utf-8')
        self.agent('start', SUCCESS)
        self.assertEqual(keeper.asked, ['demote', 'demote'])
        self.config.control.unlink()
        self.agent('stop', SUCCESS)
        self.path.unlink()
        self.assertIn('No such file', self.agent('monitor', NOT_RUNNING))

    def test_promote(self) -> None:
        """The peer gives up, or the cluster knows that it is down."""
        keeper = self.keeper('orphan', 'standby', 'replica')
        for members, since, asked in (
                # it is there; not fenced; fenced before it was in step
                (['east', 'west'], 0, 'failover'),
                (['east'], 0, 'failover'), (['east'], 500, 'failover'),
                (['east'], 2000, 'failover force'),
                # it is up again
                (['east', 'west'], 2000, 'failover force')):
            with self.subTest(members=members, since=since):
                self.program('corosync-quorumtool', quorum(*members))
                self.program('stonith_admin', fenced(since) if since else '')
                keeper.asked.clear()
                self.agent('promote', SUCCESS)
                self.assertEqual(keeper.asked, [asked])
        keeper.asked.clear()
        self.program('corosync-quorumtool', quorum('east', quorate=False))
        self.agent('promote', SUCCESS)
        # without fencing, who has quorum is right
        self.program('stonith_admin')
        self.program('crm_attribute', 'false\n')
        self.agent('promote', SUCCESS)
        self.assertEqual(keeper.asked, ['failover', 'failover'])
        self.program('corosync-quorumtool', quorum('east', 'north'))
        self.agent('promote', SUCCESS)
        self.assertEqual(keeper.asked[2:], ['failover force'])
        keeper.answers['failover force'] = (1, '')
        self.agent('promote', ERROR)

    def test_promote_from_disks(self) -> None:
        """Where the VM does not run anywhere."""
        keeper = self.keeper('stopped', 'none', 'sole')
        self.agent('promote', SUCCESS)
        self.assertEqual(keeper.asked, ['protect'])
        keeper.tell('alone', 'primary', 'sole')
        self.agent('promote', SUCCESS)
        self.assertEqual(keeper.asked, ['protect'])

    def test_demote(self) -> None:
        """The keeper does it."""
        keeper = self.keeper('protected', 'primary', 'shared')
        self.agent('demote', SUCCESS)
        self.assertEqual(keeper.asked, ['demote'])

    def test_keeper_has_ended(self) -> None:
        """Its QEMU may have what nobody else has: it gets another one."""
        self.program('corosync-quorumtool', quorum('east'))
        self.program('stonith_admin', fenced(2000))
        agent = Agent(self.config)
        for action, state, role, asked in (
                (Agent.promote, 'joining', 'standby', 'failover force'),
                (Agent.demote, 'finding', 'primary', 'demote')):
            keepers = []

            def start() -> None:
                # pylint: disable=cell-var-from-loop
                keeper = FakeKeeper(self.config.control)
                keeper.tell('orphan', role, 'replica')
                keeper.later = dict(keeper.status)
                keeper.tell(state, role, 'replica')
                keepers.append(keeper)

            with self.subTest(state=state), like_qemu(self.config.run) as qemu:
                setattr(agent, '_start_keeper', start)
                self.assertEqual(action(agent), SUCCESS)
                self.assertEqual(keepers[0].asked, [asked])
                keepers[0].close()
                self.config.control.unlink()
                qemu.kill()

    def test_keeper_ends_again(self) -> None:
        """Its QEMU runs, and has not been stopped."""
        agent = Agent(self.config)
        setattr(agent, '_start_keeper', lambda: None)
        with like_qemu(self.config.run) as qemu:
            for action in agent.stop, agent.monitor, agent.demote:
                with self.assertRaisesRegex(Failed, 'ended again'):
                    action()
            qemu.kill()

    def test_keeper_hangs(self) -> None:
        """Nobody knows what it will do, so nothing has been stopped."""
        with socket.socket(socket.AF_UNIX) as sock, \
                unittest.mock.patch('qemu_replication.client.STATUS_SECONDS',
                                    0.1):
            sock.bind(str(self.config.control))
            sock.listen()
            for action in Agent.stop, Agent.monitor:
                with self.assertRaisesRegex(Failed, 'does not answer'):
                    action(Agent(self.config))

    def test_keeper_does_not_start(self) -> None:
        """It is not waited for."""
        self.path.write_text('', 'utf-8')
        with self.assertRaisesRegex(Failed, 'keeper.log'):
            getattr(Agent(self.config), '_start_keeper')()


class Lost:
    """What a judge sees of a keeper that has lost its peer."""

    def __init__(self, test: FakeCluster, *told: Optional[Json]) -> None:
        self.config = test.config
        self.facts = Facts(1, 'shared')
        self.problem = ''
        self.peer = self
        self._told = list(told)

    async def ask(self, _what: str, **_more: object) -> Json:
        """What the peer's keeper says."""
        told = self._told[0] if len(self._told) == 1 else self._told.pop(0)
        if told is None:
            raise Unreachable('no keeper on west')
        return told


class JudgeTest(FakeCluster):
    """When a host may go on alone."""

    def judge(self, told: Optional[Json] = None) -> Verdict:
        """What is said at the time 2000 of a peer in step since 1000."""
        judge: Judge = new_judge(Lost(self, told))  # type: ignore[arg-type]
        return asyncio.run(judge.of_peer(1000.0))

    def test_word_of_peer(self) -> None:
        """It is enough while it is in the cluster; the score goes before."""
        self.program('corosync-quorumtool', quorum('east'))
        self.assertIs(self.judge({'yields': True}), Verdict.UNKNOWN)
        self.calls_file.unlink()
        self.program('corosync-quorumtool', quorum('east', 'west'))
        self.assertIs(self.judge({'yields': True}), Verdict.OUT)
        self.assertEqual(self.calls('crm_attribute'), [
            'crm_attribute --promotion=vm -N west -l forever -D'])
        self.assertIs(self.judge({'yields': False, 'generation': 1,
                                  'because': 'x'}), Verdict.UNKNOWN)
        self.assertIs(self.judge({'yields': False, 'generation': 2,
                                  'because': 'x'}), Verdict.PROMOTED)
        # this host has lost its facts, and the peer has not taken the VM
        self.assertIs(self.judge({'yields': False, 'generation': 2,
                                  'data': 'replica', 'because': 'x'}),
                      Verdict.UNKNOWN)

    def test_score_cannot_be_deleted(self) -> None:
        """Then the peer may be promoted at any moment."""
        self.program('corosync-quorumtool', quorum('east', 'west'))
        self.program('crm_attribute', 'no connection', 1)
        self.assertIs(self.judge({'yields': True}), Verdict.UNKNOWN)

    def test_no_quorum(self) -> None:
        """What is written then may be taken for the latest later."""
        self.program('corosync-quorumtool',
                     quorum('east', 'west', quorate=False))
        self.assertIs(self.judge({'yields': True}), Verdict.UNKNOWN)
        self.assertEqual(self.calls('crm_attribute'), [])

    def test_silent_peer(self) -> None:
        """The cluster has to know."""
        for members, quorate, when, wanted in (
                (['east', 'west'], True, 0, Verdict.OUT),
                (['east', 'west'], False, 0, Verdict.UNKNOWN),
                (['east'], True, 0, Verdict.UNKNOWN),
                (['east'], True, 500, Verdict.UNKNOWN),
                (['east'], True, 1500, Verdict.OUT),
                (['east'], False, 1500, Verdict.UNKNOWN)):
            with self.subTest(members=members, quorate=quorate, when=when):
                self.program('corosync-quorumtool',
                             quorum(*members, quorate=quorate))
                self.program('stonith_admin', fenced(when) if when else '')
                self.assertIs(self.judge(), wanted)
        self.assertIn('--verbose', self.calls('stonith_admin')[-1])
        self.program('stonith_admin', fenced(1500, 'failed'))
        self.program('corosync-quorumtool', quorum('east'))
        self.assertIs(self.judge(), Verdict.UNKNOWN)

    def test_within_a_second(self) -> None:
        """Nobody comes back in step within the one in which it is fenced."""
        self.program('stonith_admin', fenced(1500))
        self.assertTrue(cluster.was_fenced('west', 1500.7))
        self.assertFalse(cluster.was_fenced('west', 1501.0))

    def test_ring_changes(self) -> None:
        """While the score is deleted: where was it deleted?"""
        self.program('corosync-quorumtool', quorum('east', 'west'))
        # the first deletion comes before the look
        (self.bin / 'crm_attribute').write_text(
            f'#!/bin/sh\necho >>{self.folder}/n\n'
            f'[ $(wc -l <{self.folder}/n) = 1 ] || sed -i s/1.8/1.9/ '
            f'{self.folder}/corosync-quorumtool.says\n', 'utf-8')
        self.assertIs(self.judge(), Verdict.UNKNOWN)

    def test_score_is_given_back(self) -> None:
        """To a peer that was asked about when QEMU died here."""
        self.program('corosync-quorumtool', quorum('east', 'west'))
        works = Works.__new__(Works)
        lost = Lost(self, {'facts': {'generation': 1}, 'state': 'orphan',
                           'role': 'standby'},
                    {'facts': {'generation': 2}, 'role': 'primary'})
        works.__dict__.update(vars(lost))
        works.judge = new_judge(works)
        asyncio.run(getattr(works, '_wait_for_new_primary')())
        self.assertEqual(self.calls('crm_attribute'), [
            'crm_attribute --promotion=vm -N east -l forever -D',
            'crm_attribute --promotion=vm -N west -l forever -v 100'])

    def test_scores_are_owed(self) -> None:
        """They could not be set when the VM began to run here."""
        self.program('crm_attribute', 'no connection', 1)
        works = Works.__new__(Works)
        lost = Lost(self, {'facts': {'generation': 1}, 'state': 'standby',
                           'role': 'standby', 'since': 5.0})
        works.__dict__.update(vars(lost), _tries=0, _tried=0.0, refusal='')
        works.judge = new_judge(works)
        asyncio.run(works.judge.promoted())
        self.assertEqual(works.problem, 'crm_attribute: no connection')
        self.program('crm_attribute')
        self.calls_file.unlink()

        async def merged() -> bool:
            return True

        setattr(works, '_merged', merged)
        for wanted in ([
                'crm_attribute --promotion=vm -N west -l forever -D',
                'crm_attribute --promotion=vm -N east -l forever -v 200'], []):
            asyncio.run(getattr(works, '_do_wait_for_standby')())
            self.assertEqual(self.calls('crm_attribute'), wanted)
            self.calls_file.unlink(missing_ok=True)
            works.__dict__.update(_tried=0.0)

    def test_no_process(self) -> None:
        """There are too many: the VM goes on without its scores."""
        works = Works.__new__(Works)
        works.__dict__.update(vars(Lost(self)))
        works.judge = new_judge(works)
        for error in OSError(11, 'too many'), PermissionError(13, 'no'):
            with unittest.mock.patch('subprocess.run', side_effect=error):
                asyncio.run(works.judge.promoted())
            self.assertTrue(works.judge.owes)
            self.assertEqual(works.problem,
                             f'crm_attribute: {error.strerror}')
        # what is said in no language
        self.program('crm_attribute', status=1)
        (self.folder / 'crm_attribute.says').write_bytes(b'\xff')
        asyncio.run(works.judge.promoted())
        self.assertIn('crm_attribute', works.problem)

    def test_order_of_scores(self) -> None:
        """One that is being set when the peer is lost is not there after."""
        fifo = self.folder / 'fifo'
        os.mkfifo(fifo)
        self.program('corosync-quorumtool', quorum('east', 'west'))
        (self.bin / 'crm_attribute').write_text(
            f'#!/bin/sh\ncase "$*" in *-v*) cat {fifo};; esac\n'
            f'echo "crm_attribute $*" >>{self.calls_file}\n', 'utf-8')

        async def lose() -> Verdict:
            judge = new_judge(Lost(
                self, {'yields': True}))  # type: ignore[arg-type]
            setting = asyncio.create_task(judge.in_step())
            # it is open when somebody reads
            pipe = await asyncio.to_thread(fifo.open, 'w')
            setting.cancel()
            losing = asyncio.create_task(judge.of_peer(1000.0))
            while not self.calls('quorumtool'):
                await asyncio.sleep(0.01)
            asyncio.get_running_loop().call_later(0.5, pipe.close)
            return await asyncio.wait_for(losing, SECONDS)

        self.assertIs(asyncio.run(lose()), Verdict.OUT)
        self.assertEqual([call[-6:] for call in self.calls('crm_attribute')],
                         ['-v 100', 'ver -D'])

    def test_watch(self) -> None:
        """It goes on when there was no terminal for a while."""
        self.program('corosync-quorumtool', 'Date: now\n' + quorum('east'))
        script = self.bin / 'corosync-quorumtool'
        script.write_text(script.read_text('utf-8').replace(
            'exit 0', 'exec sleep 1000'), 'utf-8')
        judge = new_judge(Lost(self))  # type: ignore[arg-type]

        async def watch() -> str:
            lost: 'asyncio.Future[str]' = \
                asyncio.get_running_loop().create_future()
            with unittest.mock.patch('os.openpty', side_effect=[
                    OSError('too many'), os.openpty()]):
                watching = asyncio.create_task(judge.watch(lost.set_result))
                try:
                    return await asyncio.wait_for(lost, SECONDS)
                finally:
                    watching.cancel()

        self.assertIn('has lost west', asyncio.run(watch()))

    def test_members(self) -> None:
        """As corosync-quorumtool tells them."""
        self.program('corosync-quorumtool', quorum('east', 'west'))
        self.assertEqual(cluster.membership().members, ['east', 'west'])


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST])
