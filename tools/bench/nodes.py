# SPDX-License-Identifier: GPL-2.0-or-later
"""The disks of a primary and of a secondary, and their hosts."""

import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

from monitor import Json
from place import Place
from server import Export, Server, launch_daemon, launch_qemu
from subject import Subject

GIB = 1 << 30

# The overlay options that the documentation recommends for active
RECOMMENDED = 'extended_l2=on,cluster_size=128k'


def file_node(path: Path, aio: Optional[str] = None) -> Json:
    """A file, as operators open it if they name the kind of I/O."""
    direct = {'aio': aio, 'cache': {'direct': True}} if aio else {}
    return {'driver': 'file', 'filename': str(path), 'discard': 'unmap',
            **direct}


def disk_node(name: str, path: Path, aio: Optional[str] = None) -> Json:
    """A raw disk."""
    direct = {'cache': {'direct': True}} if aio else {}
    return {'driver': 'raw', 'node-name': name, 'discard': 'unmap', **direct,
            'file': file_node(path, aio)}


class Remote(NamedTuple):
    """The way to a secondary that only waits, and how long."""
    kind: str
    ms: float

    def __str__(self) -> str:
        return f'{self.kind} {self.ms:g} ms'

    def null(self) -> Json:
        """A disk that takes its time to forget what is written."""
        return {'driver': 'null-co', 'node-name': 'remote', 'size': GIB,
                'latency-ns': int(1000000 * self.ms), 'read-zeroes': True}


@contextmanager
def open_remote(place: Place, subject: Subject, remote: Remote
                ) -> Iterator[Json]:
    """What a replication node of a primary stands on."""
    if remote.kind == 'null-co':
        yield remote.null()
        return
    with launch_daemon(place, subject) as daemon:
        daemon.add(remote.null())
        daemon.serve()
        yield nbd_node(daemon.export('remote', iothread=True).socket)


def nbd_node(socket: Path) -> Json:
    """A client of an export that is called remote."""
    return {'driver': 'nbd', 'node-name': 'link', 'export': 'remote',
            'discard': 'unmap',
            'server': {'type': 'unix', 'path': str(socket)}}


class Primary(NamedTuple):
    """A primary host whose guest is to be."""
    server: Server
    guest: Export


@contextmanager
def open_primary(place: Place, subject: Subject, local: Json,
                 remote: Optional[Json], write_behind: Optional[int] = None
                 ) -> Iterator[Primary]:
    """A primary; without a remote, a plain disk."""
    wanted = {} if write_behind is None else {'write_behind': write_behind}
    with launch_qemu(place, subject) as server:
        server.add({**local, 'node-name': 'local'})
        if remote:
            server.add(
                {**subject.replication('primary', **wanted),
                 'node-name': 'forward', 'discard': 'unmap', 'file': remote},
                {'driver': 'quorum', 'node-name': 'top', 'discard': 'unmap',
                 'vote-threshold': 1, 'read-pattern': 'fifo',
                 'children': ['local', 'forward']})
        server.serve()
        guest = server.export('top' if remote else 'local', iothread=True)
        if remote:
            server.start_replication(primary=True)
        yield Primary(server, guest)


class Overlays:
    """Creates overlays, and keeps empty ones to copy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, subject: Subject, path: Path, size: int, options: str
               ) -> None:
        """An empty overlay."""
        template = self._folder / f'template-{size}-{options or "default"}'
        if not template.exists():
            subprocess.run(
                [str(subject.tool('qemu-img')), 'create', '-q', '-f', 'qcow2',
                 *(['-o', options] if options else []), str(template),
                 str(size)], check=True, timeout=60)
        shutil.copyfile(template, path)


class Layout(NamedTuple):
    """Of the disks of a secondary."""
    folder: Path
    size: int
    disks: int = 1
    active: str = ''
    aio: Optional[str] = None
    # a disk that is there; else sparse ones are made
    disk: Optional[Path] = None

    def image(self, kind: str, number: int) -> Path:
        """The path of an image."""
        if kind == 'disk' and self.disk:
            return self.disk
        return self.folder / f'{kind}{number}'

    def create(self, subject: Subject) -> List[Path]:
        """Make all images; return those that were not there."""
        overlays = Overlays(self.folder)
        made = []
        for number in range(self.disks):
            if not self.disk:
                made.append(self.image('disk', number))
                with open(made[-1], 'wb') as file:
                    file.truncate(self.size)
            for kind, options in ('active', self.active), ('hidden', ''):
                made.append(self.image(kind, number))
                overlays.create(subject, made[-1], self.size, options)
        return made


class Secondary(NamedTuple):
    """A secondary host: where the primary's writes arrive, and its guest."""
    server: Server
    disks: List[Export]
    guests: List[Export]


def secondary_node(subject: Subject, layout: Layout, number: int) -> Json:
    """The chain above a disk of a secondary."""
    direct = {'cache': {'direct': True}} if layout.aio else {}

    def overlay(kind: str, backing: Json) -> Json:
        return {'driver': 'qcow2', 'node-name': f'{kind}{number}',
                'discard': 'unmap', **direct, **backing,
                'file': file_node(layout.image(kind, number), layout.aio)}

    hidden = overlay('hidden', {'backing': f'disk{number}'})
    return {'driver': 'quorum', 'node-name': f'top{number}',
            'vote-threshold': 1, 'read-pattern': 'fifo', 'children': [
                {**subject.replication('secondary'),
                 'node-name': f'replication{number}',
                 'top-id': f'top{number}',
                 'file': overlay('active', {'backing': hidden})}]}


@contextmanager
def open_secondary(place: Place, subject: Subject, layout: Layout
                   ) -> Iterator[Secondary]:
    """A secondary; without protection, plain disks."""
    made = layout.create(subject)
    numbers = range(layout.disks)
    try:
        with launch_qemu(place, subject) as server:
            server.serve()
            disks, guests = [], []
            for number in numbers:
                server.add(disk_node(f'disk{number}',
                                     layout.image('disk', number),
                                     layout.aio))
                disks.append(server.export(f'disk{number}'))
                if subject.protected:
                    server.add(secondary_node(subject, layout, number))
                    guests.append(server.export(f'top{number}'))
            if subject.protected:
                server.start_replication(primary=False)
            yield Secondary(server, disks, guests or disks)
    finally:
        for path in made:
            path.unlink()
