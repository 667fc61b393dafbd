#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Clients of a protected VM notice nothing of a failover.

Hosts, the client and the switch between them are network namespaces.  What the
client sends comes back from the guest; each connection stays for all tests.
"""

import ctypes
import os
import random
import signal
import socket
import sys
import threading
import unittest
from pathlib import Path
from typing import Callable, Iterator, List

import command
from clusternodes import ip
from guest import get_guest
from guesthost import MIB, STEP_SECONDS, Disks
from sides import (NAMES, Side, SideError, SidesTest, configuration, toml,
                   with_guest)

DISKS = Disks(1, 20 * MIB, 16 * MIB)
SKIPPED = 77
MAC = bytes.fromhex('525400123456')
CLIENT, GUEST = '198.51.100.1', '198.51.100.2'
LINK = {'east': '192.0.2.1', 'west': '192.0.2.2'}
ECHO_PORT = 7
LONGEST_MESSAGE = 5000
# Datagrams at once, and bytes of each
FLOOD = 1000
# Of each connection, until it is said to go on
MESSAGES = 20
# Of the guest, in which it would send something
BEATS = 20
SMALL_BUFFERS = """for way in r w; do
    echo 4096 16384 65536 >/proc/sys/net/ipv4/tcp_${way}mem
done"""
ETH_P_ALL, ETH_P_RARP = 0x3, 0x8035
CLONE_NEWNET = 0x40000000


OPTIONS, REST = command.parser(__doc__).parse_known_args()


class Wires:
    """The namespaces, and what connects them."""

    def __init__(self) -> None:
        self._names: List[str] = []

    def name(self, which: str) -> str:
        """No other test has it."""
        return f'ha-{os.getpid()}-{which}'

    def build(self) -> None:
        """The hosts have a link of their own, and a bridge for VMs."""
        for which in ('switch', 'client', *NAMES):
            ip('netns', 'add', self.name(which))
            self._names.append(self.name(which))
        self._bridge('switch', 'br0')
        self._cable('client', 'eth0', 'switch', 'client')
        ip('-n', self.name('client'), 'addr', 'add', f'{CLIENT}/24', 'dev',
           'eth0')
        for which in NAMES:
            self._bridge(which, 'br0')
            self._cable(which, 'eth0', 'switch', which)
            self._join('switch', which)
            self._join(which, 'eth0')
            # what is not read fills them soon
            ip('netns', 'exec', self.name(which), 'sh', '-c', SMALL_BUFFERS)
        self._join('switch', 'client')
        self._cable('east', 'eth1', 'west', 'eth1')
        for which, address in LINK.items():
            ip('-n', self.name(which), 'addr', 'add', f'{address}/24', 'dev',
               'eth1')

    def _bridge(self, where: str, name: str) -> None:
        ip('-n', self.name(where), 'link', 'add', name, 'type', 'bridge')
        ip('-n', self.name(where), 'link', 'set', name, 'up')

    def _cable(self, where: str, name: str, there: str, theirs: str) -> None:
        ip('-n', self.name(where), 'link', 'add', name, 'type', 'veth',
           'peer', 'name', theirs, 'netns', self.name(there))
        for end, each in ((where, name), (there, theirs)):
            ip('-n', self.name(end), 'link', 'set', each, 'up')

    def _join(self, where: str, name: str) -> None:
        ip('-n', self.name(where), 'link', 'set', name, 'master', 'br0')

    def at_client(self, make: Callable[[], socket.socket]) -> socket.socket:
        """Make a socket there; it stays there."""
        setns = ctypes.CDLL(None, use_errno=True).setns
        with open('/proc/thread-self/ns/net', 'rb') as home, \
                open(f'/run/netns/{self.name("client")}', 'rb') as there:
            for space in (there, home):
                if setns(space.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), 'setns')
                if space is there:
                    made = make()
        return made

    def remove(self) -> None:
        """All of it."""
        while self._names:
            ip('netns', 'del', self._names.pop())


class Talk:
    """A connection; what is sent has to come back, byte by byte."""

    def __init__(self, wires: Wires) -> None:
        self._socket = wires.at_client(socket.socket)
        self._socket.settimeout(STEP_SECONDS)
        self._socket.connect((GUEST, ECHO_PORT))
        self.messages = 0
        self.problem = ''
        self._ends = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ends:
                self._exchange()
                self.messages += 1
        except OSError as exc:
            self.problem = self.problem or str(exc)

    def _exchange(self) -> None:
        said = b'%d:' % self.messages + random.randbytes(
            random.randrange(LONGEST_MESSAGE))
        self._socket.sendall(said)
        heard = b''
        while len(heard) < len(said):
            more = self._socket.recv(len(said) - len(heard))
            if not more:
                raise OSError('the guest has closed the connection')
            heard += more
        if heard != said:
            raise OSError('another message came back')

    def close(self) -> None:
        """Whatever it does."""
        self._ends = True
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(STEP_SECONDS)
        self._socket.close()


class NetworkTest(SidesTest):
    """One guest for all tests."""
    wires: Wires
    talks: List[Talk] = []

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.wires = Wires()
        cls.addClassCleanup(cls.wires.remove)
        cls.wires.build()
        path = cls._configure(cls.folder)
        for name in NAMES:
            cls.add_side(path, name, 'ip', 'netns', 'exec',
                         cls.wires.name(name))
        for side in cls.sides.values():
            side.start()
        east, west = cls.sides.values()
        with open(east.folder / 'disk0.raw', 'wb') as image:
            image.truncate(DISKS.size)
        east.order('protect', '--no-wait')
        # without another guest beside it that is faster
        east.check_guest()
        west.order('standby')
        # of before and after it is protected
        cls.talk()
        east.order('protect')
        cls.talk()

    @classmethod
    def _configure(cls, folder: Path) -> Path:
        config = with_guest(configuration(OPTIONS.build, folder, DISKS),
                            get_guest(OPTIONS.cache, print), DISKS,
                            f'demo.address={GUEST}/24')
        config['host'] = {name: {'address': LINK[name]} for name in NAMES}
        config['network'] = {'bridge': 'br0', 'device':
                             f'virtio-net-pci,mac={MAC.hex(":")},romfile='}
        path = folder / 'vm1.toml'
        path.write_text(toml(config), 'utf-8')
        return path

    @classmethod
    def talk(cls) -> None:
        """Another client comes."""
        cls.talks.append(Talk(cls.wires))
        cls.addClassCleanup(cls.talks[-1].close)

    def setUp(self) -> None:
        super().setUp()
        self.all_go_on()
        # Of what it is since the last checkpoint nothing was copied
        self.talk()

    def all_go_on(self) -> None:
        """Each connection."""
        wanted = [talk.messages + MESSAGES for talk in self.talks]

        def done() -> bool:
            problems = [talk.problem for talk in self.talks if talk.problem]
            if problems:
                raise SideError(f'a client says: {problems}')
            return all(talk.messages >= want
                       for talk, want in zip(self.talks, wanted))

        try:
            self.primary.wait(done, 'messages')
        except SideError as exc:
            self.fail(f'{exc}: {[talk.messages for talk in self.talks]} of '
                      f'{wanted}')

    def protected(self, primary: Side, standby: Side) -> None:
        """Wait until it is, and have guest and clients judge."""
        self.all_go_on()
        primary.wait_for('protected')
        standby.wait_for('secondary')
        self.all_go_on()
        primary.check_guest()

    def listen(self) -> socket.socket:
        """Hear all that the guest sends."""
        made = self.wires.at_client(lambda: socket.socket(
            socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)))
        self.addCleanup(made.close)
        made.bind(('eth0', 0))
        made.settimeout(STEP_SECONDS)
        return made

    @staticmethod
    def kinds(heard: socket.socket, seconds: float) -> Iterator[int]:
        """What the guest sends, until it sends nothing any more."""
        heard.settimeout(seconds)
        try:
            while True:
                frame = heard.recv(1 << 16)
                if frame[6:12] == MAC:
                    yield int.from_bytes(frame[12:14], 'big')
        except TimeoutError:
            pass

    def test_kill_primary(self) -> None:
        """The guest is found where it is now, and is not before."""
        self.primary.signal(signal.SIGKILL)
        self.primary.wait_for('down')
        heard = self.listen()
        self.standby.wait_for('orphan')
        # the client asks everybody where the guest is
        ip('-n', self.wires.name('client'), 'neigh', 'flush', 'dev', 'eth0')
        with self.wires.at_client(lambda: socket.socket(
                type=socket.SOCK_DGRAM)) as stranger:
            stranger.sendto(b'who?', (GUEST, ECHO_PORT))
        beats = len(self.standby.console.beats()) + BEATS
        self.standby.wait(
            lambda: len(self.standby.console.beats()) >= beats, 'beats')
        self.assertEqual(list(self.kinds(heard, 0.1)), [])
        self.standby.order('failover')
        self.assertIn(ETH_P_RARP, self.kinds(heard, STEP_SECONDS))
        self.protected(self.standby, self.primary)

    def test_kill_secondary(self) -> None:
        """What was to be compared goes out."""
        dead = self.standby.signal(signal.SIGKILL)
        self.standby.wait(lambda: self.standby.stands_by_again(dead),
                          'another QEMU')
        self.protected(self.primary, self.standby)

    def test_hang_secondary(self) -> None:
        """What comes for it and is not read does not hold up the VM."""
        before = self.primary.pid
        hung = self.standby.signal(signal.SIGSTOP)
        with self.wires.at_client(lambda: socket.socket(
                type=socket.SOCK_DGRAM)) as flood:

            def given_up() -> bool:
                for _ in range(FLOOD):
                    flood.sendto(bytes(FLOOD), (GUEST, ECHO_PORT))
                return self.standby.stands_by_again(hung)

            self.standby.wait(given_up, 'another QEMU')
        self.protected(self.primary, self.standby)
        self.assertEqual(self.primary.pid, before)

    def test_switch(self) -> None:
        """Twice, so that each connection is moved back, too."""
        self.primary.order('switch')
        self.protected(self.standby, self.primary)
        self.primary.order('switch')
        self.protected(self.primary, self.standby)


if __name__ == '__main__':
    if os.geteuid():
        print('namespaces need root')
        sys.exit(SKIPPED)
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
