# SPDX-License-Identifier: GPL-2.0-or-later
"""The images of a disk and the nodes that open them, with random options."""

import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Dict, List, NamedTuple, Optional

from host import Json

KIB = 1024
MIB = 1024 * KIB
SECTOR = 512

# Not all a multiple of 4 KiB, 64 KiB or a cluster.  Of all the base's formats
# only raw files can have a length that is not one of 512.
SIZES = [MIB, MIB + SECTOR, 2 * MIB - 3 * SECTOR, MIB + 64 * KIB + 4 * KIB,
         2 * MIB, 3 * MIB - 64 * KIB + SECTOR]
OVERLAYS = ['', '', 'extended_l2=on,cluster_size=128k', 'cluster_size=4k',
            'cluster_size=512', 'lazy_refcounts=on', 'cluster_size=2M',
            'refcount_bits=1']
# What a fault hits: kinds of requests
FAULTS: List[List[str]] = [
    ['write', 'write-zeroes', 'discard'], ['write'], ['write-zeroes'],
    ['flush'], ['read'], ['read', 'write', 'write-zeroes', 'flush'],
]
EIO, ENOSPC = 5, 28


class Layout(NamedTuple):
    """How a disk is built."""
    size: int
    # Bytes that the file of a raw disk lacks, which read as zeroes
    short: int
    disk_format: str
    active: str
    hidden: str
    # The secondary's top node: quorum, or another
    top: str
    discard: str
    # The same of the primary's link
    link_discard: str
    # Request alignment below the disk
    align: int
    # What moves the nodes to an iothread, if anything
    iothread: str
    # Memory for writes under way, unless it is the default
    write_behind: Optional[int]

    def behind(self) -> Json:
        """The same as an option of a primary node."""
        if self.write_behind is None:
            return {}
        return {'write-behind': self.write_behind}

    @classmethod
    def random(cls, rng: Random) -> 'Layout':
        """Any of all the ways."""
        size = rng.choice(SIZES)
        disk_format = rng.choice(['raw', 'raw', 'raw', 'qcow2'])
        aligns = [0] + [align for align in (SECTOR, 4096)
                        if disk_format == 'raw' and size % align == 0]
        align = rng.choice(aligns)
        short = disk_format == 'raw' and not align and rng.random() < 0.3
        return cls(
            size=size, short=rng.randrange(1, SECTOR) if short else 0,
            disk_format=disk_format, active=rng.choice(OVERLAYS),
            hidden=rng.choice(OVERLAYS),
            top=rng.choice(['quorum', 'quorum', 'raw']),
            discard=rng.choice(['unmap', 'unmap', 'ignore']),
            link_discard=rng.choice(['unmap', 'unmap', 'unmap', 'ignore']),
            align=align,
            iothread=rng.choice(['', '', 'export', 'node']),
            write_behind=rng.choice([0, 128 * KIB, None]))


class Image:
    """
    A file below filters: some can be made to fail, one can be made slow.

    A fault is switched by a read through another node, the door.  Debug
    events of other nodes do not get through the throttle filter.
    """

    def __init__(self, name: str, path: Path, rng: Random,
                 align: int = 0) -> None:
        self.name = name
        self.path = path
        self.failing = False
        self.slow = False
        self.kinds = rng.choice(FAULTS)
        # What else can be made to fail, by the end of the filter's name
        self.more: Dict[str, List[str]] = {}
        self._align = align
        self._errno = rng.choice([EIO, ENOSPC])
        # Perhaps only requests that touch this sector
        self._sector = rng.randrange(64) if rng.random() < 0.2 else None

    def _rules(self, kinds: List[str], number: Optional[int]) -> Json:
        sector = {} if number is None else {'sector': number}
        faults = [{'event': 'read_aio', 'state': 1, 'iotype': kind,
                   'errno': self._errno, **sector} for kind in kinds]
        # Rules stay active until others are; this one hits nothing
        nothing = {'event': 'read_aio', 'state': 2, 'iotype': 'block-status',
                   'sector': 1 << 40}
        return {'inject-error': [*faults, nothing],
                'set-state': [
                    {'event': 'read_aio', 'state': 1, 'new_state': 2},
                    {'event': 'read_aio', 'state': 2, 'new_state': 1}]}

    def options(self) -> Json:
        """What blockdev-add needs for the file and its filters."""
        file = {'driver': 'file', 'filename': str(self.path),
                # nobody pulls the plug of this host
                'cache': {'no-flush': True}}
        below: Json = {'driver': 'blkdebug',
                       'node-name': f'{self.name}-fault',
                       'image': file, **self._rules(self.kinds, self._sector)}
        if self._align:
            # blkdebug divides by opt-discard when a discard is not aligned
            below.update({'align': self._align, 'opt-discard': self._align})
        for name, kinds in self.more.items():
            below = {'driver': 'blkdebug', 'node-name': f'{self.name}-{name}',
                     'image': below, **self._rules(kinds, None)}
        return {'driver': 'throttle', 'throttle-group': self.name,
                'file': below}


class Images:
    """Creates images, and keeps empty ones to copy."""

    def __init__(self, build: Path, folder: Path) -> None:
        self._build = build
        self._folder = folder / 'templates'
        self._folder.mkdir()
        self._templates: Dict[str, Path] = {}

    def _run(self, tool: str, *args: str) -> None:
        subprocess.run([str(self._build / tool), *args], check=True,
                       stdout=subprocess.DEVNULL)

    def overlay(self, path: Path, size: int, options: str) -> None:
        """An overlay with stale data, which start has to throw away."""
        key = f'{size}-{options}'
        template = self._templates.get(key)
        if template is None:
            template = self._folder / f'{len(self._templates)}.qcow2'
            self._run('qemu-img', 'create', '-q', '-f', 'qcow2',
                      *(['-o', options] if options else []),
                      str(template), str(size))
            self._run('qemu-io', '-f', 'qcow2', '-c',
                      'write -P 0x5a 200k 4k', str(template))
            self._templates[key] = template
        shutil.copyfile(template, path)

    def disk(self, path: Path, data: bytes, layout: Optional[Layout] = None
             ) -> None:
        """A disk that has this data."""
        short = layout.short if layout else 0
        if not layout or layout.disk_format == 'raw':
            path.write_bytes(data[:len(data) - short])
            return
        raw = self._folder / 'raw'
        raw.write_bytes(data)
        self._run('qemu-img', 'convert', '-f', 'raw', '-O',
                  layout.disk_format, str(raw), str(path))


def pattern(size: int, rng: Random) -> bytes:
    """Data in which neighbouring sectors differ, and some are zero."""
    sectors = [bytes(SECTOR)] + [rng.randbytes(SECTOR) for _ in range(40)]
    return b''.join(rng.choices(sectors, k=size // SECTOR))
