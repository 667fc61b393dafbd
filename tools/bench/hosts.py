# SPDX-License-Identifier: GPL-2.0-or-later
"""The hosts of a benchmark: where they run, and the disks they have."""

import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import nodes
from host import NO_GUEST, SECONDS, Host, HostError, Json, replicate

MIB, GIB = 1 << 20, 1 << 30
# What the images take at most
NEEDED = 6 * GIB

UNPROTECTED, STOCK, OURS = SUBJECTS = 'unprotected', 'stock', 'ours'
_numbers = itertools.count()


class Place(NamedTuple):
    """Folders, CPUs and builds.

    Waking another CPU costs a virtual machine an exit.  So a QEMU and its
    load share a CPU, and what stands for the other host has the other one.
    """
    memory: Path
    disk: Path
    near: Optional[int]
    far: Optional[int]
    ours: Path
    stock: Path

    def build(self, subject: str) -> Path:
        """What is faster in QEMU itself is no merit of the driver."""
        return self.stock if subject == STOCK else self.ours


def file_system(path: Path) -> str:
    """The type of a file system, as stat calls it."""
    return subprocess.run(['stat', '-f', '-c', '%T', str(path)], check=True,
                          capture_output=True, text=True).stdout.strip()


@contextmanager
def make_place(memory: Path, disk: Path, free: bool, ours: Path, stock: Path
               ) -> Iterator[Place]:
    """Folders for a run, in memory and on a disk."""
    for folder in (memory, disk):
        if shutil.disk_usage(folder).free < NEEDED:
            raise HostError(f'{folder} has no {NEEDED // MIB} MiB free')
    if file_system(memory) != 'tmpfs':
        raise HostError(f'{memory} is not a tmpfs')
    cpus = sorted(os.sched_getaffinity(0))
    near, far = (None, None) if free else (cpus[0], cpus[-1])
    folders: List[Path] = []
    try:
        for folder in (memory, disk):
            folders.append(Path(tempfile.mkdtemp(prefix='bench-',
                                                 dir=folder)))
        if near is not None:
            # we are the one who waits for answers of the monitor
            os.sched_setaffinity(0, {near})
        yield Place(folders[0], folders[1], near, far, ours, stock)
    finally:
        os.sched_setaffinity(0, cpus)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def fill(path: Path, size: int, sync: bool = False) -> Path:
    """Make a file that has data all over, unless it is there."""
    if not path.exists():
        block = os.urandom(MIB)
        with open(path, 'wb') as file:
            for _ in range(size // MIB):
                file.write(block)
            if sync:
                os.fdatasync(file.fileno())
    return path


class TimedHost(Host):
    """A host with a monitor that has nothing around it, for what is timed."""

    def __init__(self, place: Place, subject: str, far: bool = False) -> None:
        name = f'host{next(_numbers)}'
        self._path = place.memory / f'{name}.qmp'
        self._build = place.build(subject)
        cpu = place.far if far else place.near
        self.pinned = [] if cpu is None else ['taskset', '-c', str(cpu)]
        super().__init__(
            self._build, place.memory, name, *NO_GUEST,
            '-chardev', f'socket,id=timed,path={self._path},server=on,'
            'wait=off', '-mon', 'chardev=timed,mode=control',
            cpu=cpu)

    def __enter__(self) -> 'TimedHost':
        self.launch()
        self._timed = socket.socket(socket.AF_UNIX)
        self._timed.settimeout(SECONDS)
        self._timed.connect(str(self._path))
        self._lines = self._timed.makefile('r')
        self._lines.readline()
        self.timed('qmp_capabilities')
        return self

    def __exit__(self, *exc: object) -> None:
        self._lines.close()
        self._timed.close()
        super().__exit__(*exc)

    def timed(self, command: str, **args: Any) -> float:
        """Give a command that has to succeed; return how many ms it took."""
        request = json.dumps({'execute': command, 'arguments': args}).encode()
        begin = time.perf_counter()
        self._timed.sendall(request)
        reply: Json = {'event': ''}
        while 'event' in reply:
            reply = json.loads(self._lines.readline())
        took = 1000 * (time.perf_counter() - begin)
        if 'error' in reply:
            raise HostError(f"{command}: {reply['error']['desc']}")
        return took

    def checkpoint(self) -> float:
        """Do a checkpoint; return how many ms it took."""
        return self.timed('xen-colo-do-checkpoint')

    def tool(self, name: str) -> str:
        """A program of the same build."""
        return str(self._build / name)

    def do(self, export: str, *commands: str) -> None:
        """Do what qemu-io can, as a client, and nothing may fail."""
        words = [word for each in commands for word in ('-c', each)]
        subprocess.run([self.tool('qemu-io'), '-f', 'raw', *words,
                        self.uri(export)], check=True, capture_output=True,
                       timeout=SECONDS)

    def begin(self, mode: str) -> None:
        """Begin to replicate."""
        error = replicate(self, True, mode)
        if error:
            raise HostError(error)

    @property
    def resident(self) -> int:
        """How many bytes it has in memory."""
        status = Path(f'/proc/{self.get_pid()}/status').read_text()
        return 1024 * int(status.split('RssAnon:')[1].split()[0])

    @property
    def moved(self) -> int:
        """How many bytes its files were read and written."""
        lines = Path(f'/proc/{self.get_pid()}/io').read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines
                   if line.startswith(('rchar', 'wchar')))

    def uri(self, export: str) -> str:
        """An export, for libnbd."""
        return f'nbd+unix:///{export}?socket={self.socket}'


def disk_node(name: str, path: Path, aio: Optional[str] = None) -> Json:
    """A raw disk, as operators open it if they name the kind of I/O."""
    direct = {'cache': {'direct': True}} if aio else {}
    kind: Json = {'aio': aio} if aio else {}
    return nodes.image('raw', name, nodes.file(
        path, discard='unmap', **kind, **direct), discard='unmap', **direct)


NULL, NBD, TCP = 'null-co', 'NBD', 'NBD, TCP'


class Remote(NamedTuple):
    """The way to a secondary that only waits, and how long."""
    kind: str
    ms: float

    def __str__(self) -> str:
        return f'{self.kind} {self.ms:g} ms'

    def null(self, size: int = GIB) -> Json:
        """A disk that takes its time to forget what is written."""
        return {'driver': 'null-co', 'node-name': 'remote', 'size': size,
                'latency-ns': int(1000000 * self.ms), 'read-zeroes': True}


def tcp_address() -> Dict[str, str]:
    """An address that nobody uses."""
    with socket.create_server(('127.0.0.1', 0)) as listener:
        where, port = listener.getsockname()
    return {'type': 'inet', 'host': where, 'port': str(port)}


@contextmanager
def serving(place: Place, subject: str, disk: Json, tcp: bool = False
            ) -> Iterator[TimedHost]:
    """What stands for the other host: it has a disk that is called remote."""
    with TimedHost(place, subject, far=True) as host:
        host.add(disk)
        host.serve(**tcp_address() if tcp else {})
        host.export('remote', iothread='iothread0')
        yield host


@contextmanager
def open_primary(place: Place, subject: str, local: Json,
                 target: nodes.Below, quorum: bool = False
                 ) -> Iterator[Tuple[TimedHost, str]]:
    """A primary, and where its guest writes; unprotected, a plain disk."""
    with TimedHost(place, subject) as host:
        host.add({**local, 'node-name': 'local'})
        guest = 'local' if subject == UNPROTECTED else 'top'
        if subject == OURS and not quorum:
            host.add(nodes.holder('top', 'local', replica=target,
                                  discard='unmap'))
        elif subject != UNPROTECTED:
            host.add(nodes.primary('forward', target, discard='unmap'),
                     nodes.quorum('top', 'local', 'forward',
                                  discard='unmap'))
        host.serve()
        host.export(guest, iothread='iothread0')
        if subject != UNPROTECTED:
            host.begin('primary')
        yield host, guest


@contextmanager
def open_remote_primary(place: Place, subject: str, local: Json,
                        remote: Remote, quorum: bool = False
                        ) -> Iterator[Tuple[TimedHost, str]]:
    """The same with a way to the secondary that takes its time."""
    with ExitStack() as stack:
        target: Json = remote.null()
        if remote.kind != NULL and subject != UNPROTECTED:
            far = stack.enter_context(serving(place, subject, target,
                                              remote.kind == TCP))
            target = nodes.link('link', far.server, 'remote', discard='unmap')
        yield stack.enter_context(open_primary(place, subject, local, target,
                                               quorum))


class Replicas(NamedTuple):
    """The disks of a secondary."""
    folder: Path
    size: int
    disks: int = 1
    active: str = ''
    aio: Optional[str] = None
    # a disk that is there; else sparse ones are made
    disk: Optional[Path] = None

    def create(self, build: Path) -> List[Path]:
        """Make all images that are not there; return those."""
        made = []
        for number in range(self.disks):
            if not self.disk:
                made.append(self.folder / f'disk{number}')
                nodes.sparse(made[-1], self.size)
            if self.active == nodes.OWN_OVERLAYS:
                continue
            for kind, options in ('active', self.active), ('hidden', ''):
                made.append(self.folder / f'{kind}{number}')
                nodes.create(build, made[-1], self.size, options)
        return made

    def disk_node(self, number: int) -> Json:
        """A disk."""
        return disk_node(f'disk{number}', self.disk
                         or self.folder / f'disk{number}', self.aio)

    def arrives_at(self, number: int) -> str:
        """Where the primary writes."""
        own = self.active == nodes.OWN_OVERLAYS
        return f'replica{number}' if own else f'disk{number}'

    def chain(self, number: int) -> Json:
        """What stands above it."""
        if self.active == nodes.OWN_OVERLAYS:
            return nodes.standby(
                f'top{number}', f'replica{number}', f'disk{number}',
                **{'overlay-dir': str(self.folder)})
        below: nodes.Below = f'disk{number}'
        for kind in 'hidden', 'active':
            below = {**disk_node(f'{kind}{number}',
                                 self.folder / f'{kind}{number}', self.aio),
                     'driver': 'qcow2', 'backing': below}
        return nodes.quorum(f'top{number}', nodes.secondary(
            f'replication{number}', f'top{number}', below))


@contextmanager
def open_secondary(place: Place, subject: str, replicas: Replicas
                   ) -> Iterator[Tuple[TimedHost, str]]:
    """A secondary, and where its guest writes; unprotected, plain disks."""
    made = replicas.create(place.build(subject))
    guest = 'disk0' if subject == UNPROTECTED else 'top0'
    try:
        with TimedHost(place, subject) as host:
            host.serve()
            for number in range(replicas.disks):
                host.add(replicas.disk_node(number))
                if subject == UNPROTECTED:
                    host.export(f'disk{number}')
                    continue
                host.add(replicas.chain(number))
                host.export(replicas.arrives_at(number))
                host.export(f'top{number}')
            if subject != UNPROTECTED:
                host.begin('secondary')
            yield host, guest
    finally:
        for path in made:
            path.unlink()
