# SPDX-License-Identifier: GPL-2.0-or-later
"""Two keepers on this machine, each with an address of its own."""

import atexit
import json
import os
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from guest import Guest
from guesthost import (STEP_SECONDS, Console, Disks, accelerator, fields,
                       guest_arguments)

PROGRAM = Path(__file__).resolve().parents[2] / 'ha/qemu-replication'
QMP = PROGRAM.parents[1] / 'tools/guide/qmp.py'
POLL = 0.05
# Its start and its check of all that it has want much of the CPU
GUEST_SECONDS = 500.0
NAMES = ('east', 'west')
Json = Dict[str, Any]


class SideError(Exception):
    """A keeper did not do what it had to."""


def toml(table: Json, name: str = '') -> str:
    """As much of TOML as a configuration has."""
    plain, tables = [], []
    for key, value in table.items():
        below = f'{name}.{key}' if name else key
        if isinstance(value, dict):
            tables.append(toml(value, below))
        elif isinstance(value, list) and value \
                and isinstance(value[0], dict):
            tables += [f'[[{below}]]\n{toml(each)}' for each in value]
        else:
            plain.append(f'{key} = {json.dumps(value)}')
    head = f'[{name}]\n' if name and plain else ''
    return head + '\n'.join(plain + tables) + '\n'


def addresses() -> List[str]:
    """Two that no other test has."""
    net = f'127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}'
    return [f'{net}.1', f'{net}.2']


def configuration(build: Path, folder: Path, disks: Disks) -> Json:
    """A VM without a guest."""
    return {
        'run': f'{folder}/{{host}}', 'state': f'{folder}/{{host}}/state',
        'vm': {'name': 'vm1', 'qemu': str(build / 'qemu-system-x86_64'),
               'arguments': []},
        'disk': [{'file': f'{folder}/{{host}}/disk{disk}.raw',
                  'size': str(disks.size), 'format': 'raw',
                  'device': f'virtio-blk-pci,id=vd{disk}'}
                 for disk in range(disks.count)],
        'host': {name: {'address': address}
                 for name, address in zip(NAMES, addresses())},
        'limits': {'checkpoint_ms': 500, 'answer': 5, 'stalled': 5}}


def with_guest(config: Json, guest: Guest, disks: Disks,
               words: str = '') -> Json:
    """The guest that checks every block it has written."""
    return dict(config, vm=dict(config['vm'], arguments=[
        *guest_arguments(guest, disks, accelerator(), '{run}',
                         # an NMI, which QMP has, is a panic
                         f'unknown_nmi_panic {words}'),
        '-device', 'pvpanic-pci']))


def like_qemu(folder: Path) -> 'subprocess.Popen[bytes]':
    """A process that a keeper takes for its QEMU, until it is killed."""
    # pylint: disable=consider-using-with
    process = subprocess.Popen(
        ['sh', '-c', 'echo; read line', '-pidfile', folder / 'qemu.pid'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    # /proc tells nothing of it before it has begun
    assert process.stdout
    process.stdout.readline()
    return process


class Side:
    """A host: its keeper, and the QEMU that this one has started."""

    def __init__(self, config: Path, folder: Path, name: str,
                 *prefix: str) -> None:
        """A prefix is what to run its programs with."""
        self.config = config
        self._program = [*prefix, str(PROGRAM)]
        self.folder = folder / name
        self.name = name
        self.folder.mkdir(exist_ok=True)
        self._keeper: Optional['subprocess.Popen[bytes]'] = None
        self.console = Console(self.folder)
        self._told = self.folder / 'status.json'

    def start(self) -> None:
        """Start the keeper, and wait until it answers."""
        self.forget()
        with open(self.folder / 'keeper.log', 'ab') as log:
            # pylint: disable=consider-using-with
            self._keeper = subprocess.Popen(
                ['setpriv', '--pdeathsig', 'KILL', *self._program, 'keeper',
                 str(self.config), '--host', self.name],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.wait(lambda: self.status() is not None, 'the keeper')

    def kill_keeper(self) -> None:
        """Kill the keeper; QEMU goes on."""
        assert self._keeper
        self._keeper.kill()
        self._keeper.wait(timeout=STEP_SECONDS)

    def status(self) -> Optional[Json]:
        """What the keeper has told last."""
        if not self._told.exists():
            return None
        return dict(json.loads(self._told.read_text('utf-8')))

    def forget(self) -> None:
        """It has ended, and what it has told is not so any more."""
        self._told.unlink(missing_ok=True)

    @property
    def state(self) -> str:
        """Where the keeper is in its table."""
        return str((self.status() or {'state': 'none'})['state'])

    @property
    def data(self) -> str:
        """What this host's disks are."""
        return str((self.status() or {'facts': {}})['facts'].get('data'))

    def run(self, command: str, *words: str
            ) -> 'subprocess.CompletedProcess[str]':
        """Use the command line."""
        return subprocess.run(
            [*self._program, command, str(self.config), '--host', self.name,
             *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=GUEST_SECONDS, check=False)

    def order(self, command: str, *words: str, status: int = 0) -> str:
        """Have something done; return what is said."""
        done = self.run(command, *words)
        if done.returncode != status:
            raise SideError(f'{self.name}: {command} {" ".join(words)}: '
                            f'status {done.returncode}: {done.stdout}')
        return done.stdout

    def qmp(self, command: str) -> None:
        """Give QEMU a command."""
        subprocess.run([QMP, self.folder / 'top.sock', command], check=True,
                       stdout=subprocess.DEVNULL, timeout=STEP_SECONDS)

    @property
    def pid(self) -> int:
        """QEMU's."""
        told = self.status()
        if not told or not told['pid']:
            raise SideError(f'{self.name}: no QEMU runs')
        return int(told['pid'])

    def signal(self, number: signal.Signals) -> int:
        """Send QEMU a signal; return who got it."""
        pid = self.pid
        os.kill(pid, number)
        return pid

    def wait(self, done: Callable[[], bool], what: str,
             seconds: float = STEP_SECONDS) -> None:
        """Wait for something that can be asked for."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise SideError(f'{self.name}: {what} took more than '
                                f'{seconds:.0f} s: {self.status()}; the '
                                f'guest: {self.heard()}')
            time.sleep(POLL)

    def heard(self) -> str:
        """What was last heard of the guest."""
        return (f'{self.console.beat}, '
                f'{self.console.lines("FAIL", "WRONG", "CHECKED")}')

    def wait_for(self, *states: str) -> None:
        """Wait until it is in one of some states."""
        self.wait(lambda: self.state in states, ' or '.join(states))

    def stands_by_again(self, dead: int) -> bool:
        """Whether another QEMU than the one that is dead stands by."""
        told = self.status()
        return bool(told and told['state'] == 'secondary'
                    and told['pid'] not in (None, dead))

    def check_guest(self, gone: Callable[[], bool] = lambda: False) -> int:
        """Have the guest check all that it ever wrote.

        Returns how many blocks that were; a wrong one is an error.  It may be
        that the guest is gone meanwhile: then there were none.
        """
        console, since = self.console, time.time()

        def works() -> bool:
            beat = console.beat
            return bool(beat and beat.when > since and beat.ready)

        def heard(done: Callable[[], bool]) -> Callable[[], bool]:
            """Or what is no good."""
            return lambda: done() or gone() \
                or bool(console.lines('FAIL', 'WRONG'))

        self.wait(heard(works), "the guest's work", GUEST_SECONDS)
        before = len(console.lines('CHECKED'))
        console.send('check')
        self.wait(heard(lambda: len(console.lines('CHECKED')) > before),
                  "the guest's check", GUEST_SECONDS)
        bad, good = console.lines('FAIL', 'WRONG'), console.lines('CHECKED')
        if not bad and len(good) == before:
            return 0
        if bad or fields(good[-1]).get('wrong') != '0':
            raise SideError(f'{self.name}: the guest says: {bad + good[-1:]}')
        return int(fields(good[-1])['blocks'])

    @property
    def last_pid(self) -> int:
        """QEMU's, whether or not there is a keeper."""
        return int((self.folder / 'qemu.pid').read_text('utf-8'))

    def words(self) -> str:
        """What keeper and QEMU have said."""
        return '\n'.join(f'{path}:\n{path.read_text("utf-8")}' for path in (
            self.folder / 'keeper.log', self.folder / 'qemu.log')
            if path.exists())

    def close(self) -> None:
        """End the keeper and its QEMU, whatever they do."""
        self.console.close()
        if self._keeper:
            self.kill_keeper()
        try:
            pid = self.last_pid
            line = Path(f'/proc/{pid}/cmdline').read_bytes()
            if bytes(self.folder) in line:
                os.kill(pid, signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            # it has ended
            pass


class SidesTest(unittest.TestCase):
    """Two sides, in a folder, for all tests of a class."""
    folder: Path
    sides: Dict[str, Side]

    @classmethod
    def setUpClass(cls) -> None:
        # unittest goes on after any other exception
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory(prefix='ha-')
        cls.addClassCleanup(holder.cleanup)
        cls.folder = Path(holder.name)
        cls.sides = {}

    @classmethod
    def add_side(cls, config: Path, name: str, *prefix: str) -> None:
        """Another one, which is closed however this ends."""
        cls.sides[name] = Side(config, cls.folder, name, *prefix)
        cls.addClassCleanup(cls.sides[name].close)
        atexit.register(cls.sides[name].close)

    def setUp(self) -> None:
        found = [side for side in self.sides.values()
                 if side.state == 'protected']
        self.assertEqual(len(found), 1)
        self.primary = found[0]
        self.standby = next(side for side in self.sides.values()
                            if side is not self.primary)

    def tearDown(self) -> None:
        """Say what was said, if that is of use."""
        outcome = getattr(self, '_outcome').result
        if any(test is self for test, _ in outcome.failures + outcome.errors):
            for side in self.sides.values():
                print(self.words(side))

    def words(self, side: Side) -> str:
        """What was said on a host."""
        return side.words()
