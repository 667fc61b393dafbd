# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU without a guest, or a storage daemon, driven by QMP."""

import itertools
import socket
import subprocess
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

from monitor import SECONDS, BenchError, Json, Monitor
from place import Place
from subject import Subject

POLL = 0.002
QEMU = ['-machine', 'none', '-accel', 'qtest', '-S', '-nodefaults',
        '-display', 'none', '-object', 'iothread,id=iothread0']
_numbers = itertools.count()


class Export(NamedTuple):
    """Where a load goes."""
    socket: Path
    name: str

    @property
    def uri(self) -> str:
        """The same for libnbd."""
        return f'nbd+unix:///{self.name}?socket={self.socket}'


class Server:
    """A process with a monitor."""

    def __init__(self, place: Place, program: Path, arguments: List[str],
                 monitor: str, cpu: Optional[int]) -> None:
        name = f'{program.name}-{next(_numbers)}'
        self.socket = place.memory / f'{name}.nbd'
        self._log = place.memory / f'{name}.log'
        path = place.memory / f'{name}.qmp'
        # The monitor is the last to be set up: when it is there, all is
        command = [str(program), *arguments,
                   '--chardev', f'socket,id=qmp,path={path}',
                   monitor, 'chardev=qmp,mode=control']
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen(1)
            with open(self._log, 'wb') as log:
                self._process = subprocess.Popen(
                    place.command(command, cpu), stdin=subprocess.DEVNULL,
                    stdout=log, stderr=log)
            try:
                self.monitor = Monitor(self._accept(listener))
            except BaseException:
                self._kill()
                raise
        path.unlink()

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + SECONDS
        listener.settimeout(0.1)
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                return listener.accept()[0]
            except socket.timeout:
                pass
        raise BenchError(f'{self._log.stem} does not start: {self.log()}')

    def _kill(self) -> None:
        self._process.kill()
        self._process.wait(SECONDS)

    def log(self) -> str:
        """The end of what the process has printed."""
        return self._log.read_text(errors='replace')[-500:].strip()

    def __enter__(self) -> 'Server':
        return self

    def __exit__(self, *_exc: object) -> None:
        self.monitor.close()
        self._kill()
        self.socket.unlink(missing_ok=True)

    # Commands

    def cmd(self, command: str, args: Optional[Json] = None) -> None:
        """Give a command that has to succeed."""
        self.monitor.cmd(command, args)

    def add(self, *nodes: Json) -> None:
        """Add nodes."""
        for node in nodes:
            self.cmd('blockdev-add', node)

    def serve(self) -> None:
        """Begin to take clients."""
        self.cmd('nbd-server-start', {'addr': {
            'type': 'unix', 'data': {'path': str(self.socket)}}})

    def export(self, node: str, iothread: bool = False) -> Export:
        """Let clients use a node."""
        thread = {'iothread': 'iothread0'} if iothread else {}
        self.cmd('block-export-add', {
            'type': 'nbd', 'id': f'export-{node}', 'name': node,
            'node-name': node, 'writable': True, **thread})
        return Export(self.socket, node)

    def exported(self) -> Dict[str, str]:
        """What stands behind each export: a job puts filters in between."""
        return {export['id'][len('export-'):]: export['node-name']
                for export in self.monitor.cmd('query-block-exports')}

    def qemu_io(self, node: str, command: str) -> float:
        """Do a request; return how many ms it took."""
        begin = time.perf_counter()
        text = self.monitor.cmd('human-monitor-command', {
            'command-line': f'qemu-io {node} "{command}"'})
        took = 1000 * (time.perf_counter() - begin)
        if text and 'ops' not in text:
            raise BenchError(f'qemu-io {node} {command}: {text.strip()}')
        return took

    def start_replication(self, primary: bool) -> None:
        """Begin to replicate."""
        self.cmd('xen-set-replication', {'enable': True, 'primary': primary})

    def checkpoint(self) -> float:
        """Do a checkpoint; return how many ms it took."""
        return self.monitor.timed('xen-colo-do-checkpoint')

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for something that can be asked for."""
        deadline = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise BenchError(f'waited too long for {what}')
            time.sleep(POLL)


def launch_qemu(place: Place, subject: Subject) -> Server:
    """A QEMU on the near CPU."""
    return Server(place, subject.tool('qemu-system-x86_64'), QEMU, '-mon',
                  place.near)


def launch_daemon(place: Place, subject: Subject) -> Server:
    """A storage daemon on the far CPU."""
    return Server(place, subject.tool('storage-daemon/qemu-storage-daemon'),
                  ['--object', 'iothread,id=iothread0'], '--monitor',
                  place.far)
