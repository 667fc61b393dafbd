# SPDX-License-Identifier: GPL-2.0-or-later
"""Where a benchmark runs: folders for images, and a CPU for each host."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, NamedTuple, Optional

from monitor import BenchError

MIB = 1 << 20
# What the images take at most
NEEDED = 5 << 30


class Place(NamedTuple):
    """
    Two folders and two CPUs.

    Waking another CPU costs a virtual machine an exit.  So a QEMU and its
    load share a CPU, and what stands for the other host has the other one.
    """
    memory: Path
    disk: Path
    near: Optional[int]
    far: Optional[int]

    def command(self, words: List[str], cpu: Optional[int]) -> List[str]:
        """A command that has its CPU, and that ends with us."""
        pin = [] if cpu is None else ['taskset', '-c', str(cpu)]
        return ['setpriv', '--pdeathsig', 'KILL', *pin, *words]


def file_system(path: Path) -> str:
    """The type of a file system, as stat calls it."""
    return subprocess.run(['stat', '-f', '-c', '%T', str(path)], check=True,
                          capture_output=True, text=True).stdout.strip()


def check_space(path: Path) -> None:
    """See that the images fit."""
    free = shutil.disk_usage(path).free
    if free < NEEDED:
        raise BenchError(f'{path} has {free // MIB} MiB free, but up to '
                         f'{NEEDED // MIB} MiB are needed')


@contextmanager
def make_place(memory: Path, disk: Path, free: bool) -> Iterator[Place]:
    """Folders for a run, in memory and on a disk."""
    for folder in (memory, disk):
        check_space(folder)
    if file_system(memory) != 'tmpfs':
        raise BenchError(f'{memory} is not a tmpfs')
    cpus = sorted(os.sched_getaffinity(0))
    near, far = (None, None) if free else (cpus[0], cpus[-1])
    folders = []
    try:
        for folder in (memory, disk):
            folders.append(Path(tempfile.mkdtemp(prefix='bench-',
                                                 dir=folder)))
        if near is not None:
            # we are the one who waits for answers of the monitor
            os.sched_setaffinity(0, {near})
        yield Place(folders[0], folders[1], near, far)
    finally:
        os.sched_setaffinity(0, cpus)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def fill(path: Path, size: int, sync: bool = False) -> None:
    """Give all of a file data, in place if it is there."""
    block = os.urandom(MIB)
    flags = os.O_RDWR | os.O_CREAT
    fd = os.open(path, flags, 0o600)
    try:
        for offset in range(0, size, MIB):
            os.pwrite(fd, block, offset)
        os.ftruncate(fd, size)
        if sync:
            os.fdatasync(fd)
    finally:
        os.close(fd)


def allocated(path: Path) -> float:
    """How many MiB of a file take room."""
    return path.stat().st_blocks * 512 / MIB
