#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What is wrong with a configuration is said before anything is started."""

import asyncio
import socket
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List

import command
from guesthost import MIB, Disks
from qemu_replication import check, graph
from qemu_replication.config import Config, ConfigError, load
from qemu_replication.facts import Facts
from qemu_replication.errors import Busy, Failed, Unreachable
from qemu_replication.keeper import Keeper
from qemu_replication.peer import Peer
from qemu_replication.states import STATES
from sides import configuration, like_qemu, toml

Json = Dict[str, Any]
SECONDS = 60.0
KEY = '0123456789abcdef' * 4


OPTIONS, REST = command.parser(__doc__).parse_known_args()


def changed(table: Json, key: str, value: Any) -> Json:
    """The same with another value, or none, at a.b.c or a.0.c."""
    first, _, rest = key.partition('.')
    if isinstance(table, list):
        return [changed(each, rest, value)
                if str(number) == first else each
                for number, each in enumerate(table)]
    result = dict(table)
    if rest:
        result[first] = changed(table.get(first, {}), rest, value)
    elif value is None:
        del result[first]
    else:
        result[first] = value
    return result


class ConfigTest(unittest.TestCase):
    """Each mistake has its own message."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.table = configuration(OPTIONS.build, self.folder,
                                   Disks(2, MIB, 0))

    def load(self, table: Json, host: str = 'east') -> Config:
        """Have it read, with the folders of the disks."""
        path = self.folder / 'vm1.toml'
        path.write_text(toml(table), 'utf-8')
        for name in ('east', 'west'):
            (self.folder / name).mkdir(exist_ok=True)
        return load(path, host)

    def problems(self, key: str = '', value: Any = None) -> List[str]:
        """What is wrong with one thing changed."""
        table = changed(self.table, key, value) if key else self.table
        return list(check.problems(self.load(table)))

    def test_good(self) -> None:
        """Nothing to object to; each host has its own files."""
        self.assertEqual(self.problems(), [])
        config = self.load(self.table, 'west')
        self.assertEqual(config.disks[1].file,
                         f'{self.folder}/west/disk1.raw')
        self.assertEqual(config.peer, 'east')
        self.assertEqual(config.disks[0].bytes, MIB)

    def test_mistakes(self) -> None:
        """Of the file itself."""
        for key, value, text in (
                ('vm', None, '[vm]: name is missing'),
                ('vm.name', None, '[vm]: name is missing'),
                ('vm.name', 5, '[vm]: name has to be a text'),
                ('vm.name', 'a b', 'letters, digits'),
                ('vm.name', '..', 'not begin with'),
                ('run', '/run/a,b', 'run may not have a comma'),
                ('tls', {'kind': 'psk', 'dir': '/a,b'}, 'not have a comma'),
                ('vm.arguments', 'x', 'arguments has to be a list'),
                ('vm.arguments', [1], 'arguments has to be a list'),
                ('vm.memory', '1G', '[vm] has no memory; there are: name'),
                ('disk', None, 'no [[disk]]'),
                ('disk.0.size', '10 G', 'like "10G"'),
                ('disk.0.size', '0', 'not 0'),
                ('disk.0.size', '513', 'multiple of 512'),
                ('disk.1.format', 'vmdk', 'qcow2 or raw'),
                ('disk.1.file', f'{self.folder}/{{host}}/disk0.raw',
                 'the same file'),
                ('disk.1.file', f'{self.folder}//{{host}}/./disk0.raw',
                 'the same file'),
                ('disk.1.metadata', f'{self.folder}/{{host}}/disk0.raw',
                 'the same file'),
                ('disk.1.metadata', f'{self.folder}/{{host}}/disk0.raw.meta',
                 'the same file'),
                ('disk.0.file', '', 'file has to be a path, from /'),
                ('disk.0.file', 'disk0.raw', 'file has to be a path, from /'),
                ('disk.0.metadata', 'meta', 'metadata has to be a path'),
                ('disk.0.overlays', '~/fast', 'overlays has to be a path'),
                ('tls.kind', 'psk', 'dir has to be a path'),
                ('vm.qemu', './qemu', 'qemu has to be a path'),
                ('host.west', None, 'two hosts'),
                ('host.third.address', '127.0.0.3', 'two hosts'),
                ('host.west.address', self.table['host']['east']['address'],
                 'the same address'),
                ('host.west', 'x', '[host.west] has to be a table'),
                ('ports.disks', 0, 'from 1 to 65535'),
                ('ports.disks', 9998, 'two of them are equal'),
                ('ports.disks', '9', 'has to be a whole number'),
                ('limits.answer', 0, 'more than 0'),
                ('limits.answer', 1e9, 'at most 1000000'),
                ('limits.checkpoint_ms', 0.5, 'has to be a whole number'),
                ('tls.kind', 'ssh', 'none, psk or x509'),
                ('network.device', 'e1000', 'bridge or a netdev'),
                ('network.bridge', 'br0', 'wants a device'),
                ('cluster.judge', 'me', 'operator or pacemaker'),
                ('cluster.judge', 'pacemaker', 'wants a resource'),
                ('run', 'here', 'run has to be a folder'),
                ('fencing', 'yes', 'there is no fencing')):
            with self.subTest(key=key, value=value):
                with self.assertRaises(ConfigError) as caught:
                    self.load(changed(self.table, key, value))
                self.assertIn(text, str(caught.exception))
                self.assertTrue(str(caught.exception).startswith(
                    str(self.folder / 'vm1.toml')))
                self.assertNotIn('\n', str(caught.exception))

    def test_no_number(self) -> None:
        """TOML has words for what is no limit."""
        path = self.folder / 'vm1.toml'
        for word in 'nan', 'inf':
            path.write_text(toml(changed(
                self.table, 'limits.answer', 7)).replace(
                    'answer = 7', f'answer = {word}'), 'utf-8')
            with self.assertRaisesRegex(ConfigError, 'answer has to be more'):
                load(path, 'east')

    def test_no_toml(self) -> None:
        """A file that is none, or not there."""
        path = self.folder / 'vm2.toml'
        with self.assertRaisesRegex(ConfigError, 'No such file'):
            load(path)
        path.write_text('vm = [', 'utf-8')
        with self.assertRaisesRegex(ConfigError, 'vm2.toml: '):
            load(path)

    def test_host(self) -> None:
        """Which of the hosts this is."""
        with self.assertRaisesRegex(ConfigError, 'no host north, but east'):
            self.load(self.table, 'north')
        with self.assertRaisesRegex(ConfigError, 'say --host'):
            self.load(self.table, '')

    def test_long_names(self) -> None:
        """A host may be called by all of its name, or the first part."""
        path = self.folder / 'vm1.toml'
        path.write_text(toml(self.table).replace(
            'host.east', 'host."east.example.org"'), 'utf-8')
        for name, here in (('east.example.org', 'east.example.org'),
                           ('west.example.org', 'west')):
            with unittest.mock.patch('socket.gethostname',
                                     return_value=name):
                self.assertEqual(load(path).here, here)

    def expect(self, text: str, key: str, value: Any = None) -> None:
        """One problem."""
        found = self.problems(key, value)
        self.assertEqual(len(found), 1, found)
        self.assertIn(text, found[0])

    def test_machine(self) -> None:
        """What this host lacks."""
        self.expect('no program /no/qemu', 'vm.qemu', '/no/qemu')
        self.expect('not a QEMU with this replication driver', 'vm.qemu',
                    self.fake_qemu())
        # it takes a moment each time
        self.assertEqual((self.folder / 'calls').read_text('utf-8'), '\n')
        for word in '-drive', '--drive', '-hda', '-nic':
            self.expect(f'may not have {word}', 'vm.arguments', [word, 'x'])
        self.expect('"east1" is not an IP address', 'host.east.address',
                    'east1')
        for address in '0.0.0.0', '::', '224.0.0.1':
            self.expect(f'[host.west]: {address} is no address of one',
                        'host.west.address', address)
        self.expect('192.0.2.77 is not an address of this machine',
                    'host.east.address', '192.0.2.77')
        self.expect('/no/hosts cannot be written to', 'disk.0.overlays',
                    '/no/hosts')
        self.expect('too long', 'run', f'{self.folder}/{"x" * 90}')
        self.expect('no bridge nosuch', 'network',
                    {'device': 'e1000', 'bridge': 'nosuch'})
        self.expect('vhost=off', 'network', {
            'device': 'e1000', 'netdev': 'tap,vhost=on'})
        self.expect('no interface nosuch', 'network', {
            'device': 'e1000', 'netdev': 'tap,ifname=nosuch'})

    def test_limits_of_pacemaker(self) -> None:
        """It would end what the keeper still waits for."""
        plain, self.table = self.table, changed(self.table, 'cluster', {
            'judge': 'pacemaker', 'resource': 'vm'})
        self.assertEqual(self.problems(), [])
        for name, most, operation in (
                ('start', 60, '90 s for "start"'),
                ('failover', 60, '120 s for "promote"'),
                ('answer', 40, '120 s for "stop"')):
            key = f'limits.{name}'
            self.assertEqual(self.problems(key, most), [])
            self.expect(f'[limits]: {name} may be {most} at most', key,
                        most + 1)
            self.expect(operation, key, most + 1)
            self.assertEqual(list(check.problems(self.load(changed(
                plain, key, most + 1)))), [])
        guide = Path(command.__file__).parents[2].joinpath(
            'docs/operate-a-cluster.txt').read_text('utf-8')
        for name, seconds in check.TIMEOUTS.items():
            if name not in ('validate-all', 'meta-data'):
                self.assertRegex(guide, rf'name="{name}"[^/]*timeout='
                                 f'"{seconds}s"')

    def test_no_network(self) -> None:
        """QEMU does not make one by itself, which would not be protected."""
        words = ' '.join(graph.arguments(self.load(self.table), True))
        self.assertIn('-nic none', words)
        words = ' '.join(graph.arguments(self.load(changed(
            self.table, 'network', {'device': 'e1000', 'netdev': 'user'})),
            True))
        self.assertNotIn('-nic', words)

    def test_short_limit(self) -> None:
        """It does not come out as none."""
        for stalled, wanted in (0.0001, 1), (0.0015, 2), (5, 5000):
            top = list(graph.nodes(self.load(changed(
                self.table, 'limits.stalled', stalled)), True))[2]
            self.assertEqual(top['replica-timeout'], wanted)

    def fake_qemu(self) -> str:
        """A program that knows nothing."""
        for name in ('qemu', 'qemu-img'):
            path = self.folder / name
            path.write_text(f'#!/bin/sh\necho >>{self.folder}/calls\n',
                            'utf-8')
            path.chmod(0o755)
        return str(self.folder / 'qemu')

    def test_port(self) -> None:
        """One that somebody else has."""
        with socket.socket() as other:
            other.bind((self.table['host']['east']['address'], 0))
            other.listen()
            port = other.getsockname()[1]
            self.expect('Address already in use', 'ports.memory', port)
            # by the VM itself
            with like_qemu(self.folder / 'east') as qemu:
                self.assertEqual(self.problems('ports.memory', port), [])
                qemu.kill()

    def test_disk(self) -> None:
        """Of another size, format, or over another one."""
        self.load(self.table)
        path = self.folder / 'east/disk0.raw'
        path.write_bytes(bytes(MIB // 2))
        self.expect(f'its size is {MIB // 2} bytes', 'disk.0.device', 'x')
        self.expect('not in qcow2', 'disk.0.format', 'qcow2')
        path.unlink()
        base = self.folder / 'base.raw'
        base.write_bytes(bytes(MIB))
        subprocess.run([OPTIONS.build / 'qemu-img', 'create', '-q', '-f',
                        'qcow2', '-b', base, '-F', 'raw', path], check=True)
        self.expect(f'overlay of {base}', 'disk.0.format', 'qcow2')

    def test_tls(self) -> None:
        """Keys that are not there, not secret or none."""
        tls = {'kind': 'psk', 'dir': str(self.folder)}
        keys = self.folder / 'keys.psk'
        self.assertIn('no such file', self.problems('tls', tls)[0])
        keys.write_text(f'qemu:{KEY}\n', 'utf-8')
        keys.chmod(0o644)
        self.expect('others may read it', 'tls', tls)
        keys.chmod(0o600)
        self.assertEqual(self.problems('tls', tls), [])
        keys.write_text('somebody:else\n', 'utf-8')
        self.expect('no line "qemu:"', 'tls', tls)

    def test_facts(self) -> None:
        """They are read as they were written."""
        path = self.folder / 'facts.json'
        self.assertEqual(Facts.read(path), Facts())
        facts = Facts(3, 'sole', True, True)
        facts.save(path)
        self.assertEqual(Facts.read(path), facts)

    def test_damaged_facts(self) -> None:
        """It is said which file that is, and what to do."""
        path = self.folder / 'facts.json'
        for text in ('', '[]', '{"data": 5, "no": 1}', '{"data": "x"}'):
            path.write_text(text, 'utf-8')
            with self.assertRaisesRegex(Failed, f'{path}: .*standby --force'):
                Facts.read(path)

    def test_peer(self) -> None:
        """Who has another key gets no answer, and none is believed."""
        async def answer(body: Json) -> Json:
            return {'heard': body['ask'], 'n': body['n']}

        async def talk(ours: str, theirs: str) -> Json:
            sides = []
            for name, key in (('east', ours), ('west', theirs)):
                keys = self.folder / name / 'keys.psk'
                keys.parent.mkdir(exist_ok=True)
                keys.write_text(f'qemu:{key}\n', 'utf-8')
                tls = {'kind': 'psk', 'dir': str(keys.parent)}
                sides.append(Peer(self.load(
                    changed(self.table, 'tls', tls), name), answer))
            await sides[1].serve()
            try:
                return await sides[0].ask('status', n=7)
            finally:
                await sides[1].close()

        self.assertEqual(asyncio.run(talk(KEY, KEY)),
                         {'heard': 'status', 'n': 7})
        # of two without a key as well
        for ours, theirs in (KEY, 'f' * 64), ('', ''):
            with self.assertRaises(Failed):
                asyncio.run(talk(ours, theirs))

    def test_said_before(self) -> None:
        """An answer is to this question, and to no earlier one."""
        keys = self.folder / 'keys.psk'
        keys.write_text(f'qemu:{KEY}\n', 'utf-8')
        table = changed(self.table, 'tls', {'kind': 'psk',
                                            'dir': str(self.folder)})
        heard: List[bytes] = []

        async def answer(_body: Json) -> Json:
            return {'yields': True}

        async def ask() -> None:
            east = Peer(self.load(table, 'east'), answer)
            west = Peer(self.load(table, 'west'), answer)
            await west.serve()
            with unittest.mock.patch.object(
                    asyncio.StreamReader, 'readline', autospec=True,
                    side_effect=asyncio.StreamReader.readline) as readline:
                read = readline.side_effect

                async def listen(reader: asyncio.StreamReader) -> bytes:
                    heard.append(await read(reader))
                    return heard[-1]

                readline.side_effect = listen
                self.assertTrue((await east.ask('yield'))['yields'])
            await west.close()
            # what west had drawn, what was asked, and what west has said
            nonce, _, told = heard

            async def say_again(reader: asyncio.StreamReader,
                                writer: asyncio.StreamWriter) -> None:
                writer.write(nonce)
                await reader.readline()
                writer.write(told)
                writer.close()

            config = self.load(table, 'west')
            server = await asyncio.start_server(
                say_again, config.address, config.ports.keeper)
            with self.assertRaises(Unreachable):
                await east.ask('yield')
            server.close()

        asyncio.run(ask())

    def test_another_vm(self) -> None:
        """With the same ports: that one must not give up anything."""
        asked = []

        async def answer(body: Json) -> Json:
            asked.append(body['ask'])
            return {}

        async def ask() -> None:
            other = changed(self.table, 'vm.name', 'vm2')
            west = Peer(self.load(other, 'west'), answer)
            await west.serve()
            for table, name, error in (
                    (self.table, 'east', 'is that of vm2 on west'),
                    # east's address is one of west
                    (other, 'west', 'is that of vm2 on west'),
                    (other, 'east', '')):
                config = self.load(table, name)
                peer = Peer(replace(config, hosts={
                    **config.hosts, config.peer: config.hosts['west']}),
                    answer)
                try:
                    await peer.ask('status')
                    self.assertEqual(error, '')
                except Unreachable as exc:
                    self.assertIn(error or 'no error', str(exc))
            await west.close()

        asyncio.run(ask())
        self.assertEqual(asked, ['status'])

    def test_slow_answer(self) -> None:
        """It is given up where nobody waits for it any more."""
        table = changed(self.table, 'limits.answer', 0.2)

        async def ask() -> None:
            ended = asyncio.Event()

            async def answer(_body: Json) -> Json:
                try:
                    await asyncio.Event().wait()
                finally:
                    ended.set()
                return {}

            east, west = [Peer(self.load(table, name), answer)
                          for name in ('east', 'west')]
            await west.serve()
            with self.assertRaises(Busy):
                await east.ask('yield')
            await asyncio.wait_for(ended.wait(), SECONDS)
            await west.close()

        asyncio.run(ask())


class StatesTest(unittest.TestCase):
    """The table."""

    def test_table(self) -> None:
        """Each way leads somewhere, and each work is known."""
        led = {new for state in STATES.values() for new in state.on.values()}
        self.assertEqual(led - STATES.keys(), set())
        # where a keeper begins
        self.assertEqual(STATES.keys() - led, {'finding', 'joining'})
        for name, state in STATES.items():
            if state.work:
                self.assertTrue(hasattr(Keeper, f'_do_{state.work}'), name)
            # what has a bound may fail
            if state.limit:
                self.assertIn('failed', state.on, name)

    def test_can_be_ended(self) -> None:
        """At any time: a stop that fails has the host fenced."""
        for name, state in STATES.items():
            if state.role != 'none':
                self.assertIn('stop', state.on, name)
            if state.role == 'primary':
                self.assertIn('demote', state.on, name)

    def test_running_qemu_may_die(self) -> None:
        """In each state in which there is one."""
        for name, state in STATES.items():
            if state.role != 'none':
                self.assertIn('died', state.on, name)
            # its guest may have shut down
            if state.role == 'primary':
                self.assertIn('off', state.on, name)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST])
