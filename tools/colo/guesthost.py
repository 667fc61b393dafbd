# SPDX-License-Identifier: GPL-2.0-or-later
"""A host that runs the guest, and what the guest says on its serial port."""

import json
import os
import re
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional

from guest import Guest
from host import Host, HostError, Json

MIB = 1024 * 1024
BLOCK = 4096
# No step takes this long, even with a busy machine and no KVM.
STEP_SECONDS = 120.0
# But for the guest's start and its check of all that it has, which want much
# of the CPU.
CHECK_SECONDS = 400.0
POLL = 0.02
LOG_TAIL = 15
# The throttle group of nodes that are there to be replaced
NO_LIMITS = 'no-limits'

_BEAT = re.compile(r'BEAT n=(\d+) ready=([01]) tx=(\d+) writes=(\d+) '
                   r'reads=(\d+) wrong=(\d+)')


def accelerator() -> str:
    """KVM, if it runs guests: its device alone does not say so."""
    flags = Path('/proc/cpuinfo').read_text().split()
    works = (('vmx' in flags or 'svm' in flags)
             and os.access('/dev/kvm', os.R_OK | os.W_OK))
    return 'kvm' if works else 'tcg'


@dataclass(frozen=True)
class Disks:
    """How the guest divides its disks.

    Disk 0 begins with the file system; all the rest are numbered blocks.
    """
    count: int = 2
    size: int = 96 * MIB
    fs_size: int = 48 * MIB
    # How much of each disk is written again and again, or all of it
    busy: Optional[int] = None

    @property
    def regions(self) -> List[str]:
        """The worker's DEVICE:FIRST:BLOCKS:BUSY for each disk."""
        end = self.size // BLOCK
        first = [self.fs_size // BLOCK] + [0] * (self.count - 1)
        busy = (self.busy or self.size) // BLOCK
        return [f'/dev/vd{chr(ord("a") + disk)}:{first[disk]}:'
                f'{end - first[disk]}:{min(busy, end - first[disk])}'
                for disk in range(self.count)]

    @property
    def kernel_arguments(self) -> str:
        """What the guest's init reads."""
        return (f'demo.fs={self.fs_size // BLOCK} '
                f'demo.regions={",".join(self.regions)}')


def guest_arguments(guest: Guest, disks: Disks, accel: str, folder: str,
                    words: str = '') -> List[str]:
    """How QEMU runs the guest, which says what it does in a folder."""
    return [
        '-nodefaults', '-machine', f'pc,accel={accel}', '-m', '160',
        '-cpu', 'host' if accel == 'kvm' else 'qemu64',
        '-kernel', str(guest.kernel), '-initrd', str(guest.initramfs),
        '-append', 'console=ttyS0 quiet panic=-1 '
        f'{disks.kernel_arguments} {words}',
        '-chardev', f'file,id=log,path={folder}/guest.log',
        '-serial', 'chardev:log',
        '-chardev', f'file,id=work,path={folder}/work.out,append=on,'
        f'input-path={folder}/work.in',
        '-serial', 'chardev:work']


@dataclass(frozen=True)
class Setup:
    """What both hosts have in common."""
    build: Path
    guest: Guest
    folder: Path
    disks: Disks = Disks()
    accel: str = 'tcg'
    checkpoint_ms: int = 1500


@dataclass(frozen=True)
class Beat:
    """One of the worker's regular lines, with the time it arrived.

    A secondary's first line after a checkpoint may be cut: it is no beat.
    """
    when: float
    number: int
    ready: bool
    tx: int
    writes: int
    reads: int
    wrong: int

    def __str__(self) -> str:
        return (f'{self.tx} transactions, {self.writes} blocks, '
                f'{self.wrong} wrong')


class Console:
    """Reads all that a guest says on its port, in a folder's work.out.

    A file takes everything at once.  A socket has room for some 300 bytes if
    they are written one by one, and then the port waits, with a state that no
    checkpoint should have.
    """

    def __init__(self, folder: Path) -> None:
        self._out = folder / 'work.out'
        self._out.touch()
        (folder / 'work.in').unlink(missing_ok=True)
        os.mkfifo(folder / 'work.in')
        # for QEMU there is always a writer
        self._in = os.open(folder / 'work.in', os.O_RDWR)
        self._news = threading.Condition()
        self._closing = threading.Event()
        self._lines: List[str] = []
        self._beats: List[Beat] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        left, last = b'', False
        with open(self._out, 'rb') as stream:
            while not last:
                last = self._closing.wait(POLL)
                *whole, left = (left + stream.read()).split(b'\n')
                for line in whole:
                    self._take(line.decode(errors='replace').strip('\r'))

    def _take(self, line: str) -> None:
        found = _BEAT.fullmatch(line)
        with self._news:
            if found:
                number, ready, *counts = map(int, found.groups())
                self._beats.append(Beat(time.time(), number, bool(ready),
                                        *counts))
            else:
                self._lines.append(line)
            self._news.notify_all()

    @property
    def beat(self) -> Optional[Beat]:
        """The last beat, if there was one."""
        with self._news:
            return self._beats[-1] if self._beats else None

    def beats(self) -> List[Beat]:
        """All beats so far."""
        with self._news:
            return list(self._beats)

    def last_before(self, when: float) -> Optional[Beat]:
        """The last beat that had arrived at the given time."""
        return next((beat for beat in reversed(self.beats())
                     if beat.when <= when), None)

    def lines(self, *kinds: str) -> List[str]:
        """All other lines that begin with one of some words, word by word."""
        with self._news:
            return [line for word in kinds for line in self._lines
                    if line.split(' ', 1)[0] == word]

    def wait(self, timeout: float) -> None:
        """Return at the next line, or after timeout seconds."""
        with self._news:
            self._news.wait(timeout)

    def send(self, line: str) -> None:
        """Type a line."""
        os.write(self._in, line.encode() + b'\n')

    def close(self) -> None:
        """Read what is there, and no more."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join(STEP_SECONDS)
            os.close(self._in)


def fields(line: str) -> Dict[str, str]:
    """Return the name=value words of a line."""
    return dict(word.split('=', 1) for word in line.split() if '=' in word)


class GuestHost(Host):
    """A QEMU with the guest."""

    def __init__(self, setup: Setup, name: str, nodes: List[List[Json]],
                 images: List[Path], incoming: bool, args: List[str]) -> None:
        """Start it with the nodes of each disk; the guest uses the last."""
        folder = setup.folder / name
        super().__init__(setup.build, folder, name, *args,
                         seconds=STEP_SECONDS)
        self.images = images
        self._killed_at: Optional[float] = None
        self.add_args(
            '-no-user-config', '-name', name,
            *guest_arguments(setup.guest, setup.disks, setup.accel,
                             str(folder)),
            # for ./run top
            '-chardev', 'socket,id=top,server=on,wait=off,'
            f'path={self.path("top.sock")}',
            '-mon', 'chardev=top,mode=control')
        self.add_args('-object', f'throttle-group,id={NO_LIMITS}')
        for disk, chain in enumerate(nodes):
            for node in chain:
                self.add_args('-blockdev', json.dumps(node))
            self.add_args('-device', f'virtio-blk-pci,id=vd{disk},'
                          f'drive={chain[-1]["node-name"]}')
        if incoming:
            self.add_args('-incoming', 'defer')
        self.console = Console(folder)
        self.launch()

    def path(self, name: str) -> Path:
        """The path of one of this host's files."""
        return self.folder / name

    @property
    def beat(self) -> Beat:
        """The guest's last beat; it must have had one."""
        beat = self.console.beat
        if beat is None:
            raise HostError(f'{self.name}: the guest has said nothing')
        return beat

    def pause(self) -> None:
        self.console.wait(POLL)
        self.pump()

    def check_alive(self, what: str) -> None:
        super().check_alive(what)
        failed = self.console.lines('FAIL')
        if failed:
            raise HostError(f'{self.name}: the guest says: {failed[0]}')

    def sigkill(self) -> None:
        """Kill QEMU the hard way, and know when.  Any thread may do it."""
        self._killed_at = time.time()
        self.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        super().kill()
        self.console.close()
        # a host that is replaced is not to be watched
        self.path('top.sock').unlink(missing_ok=True)

    @property
    def died(self) -> float:
        """When QEMU was killed."""
        assert self._killed_at is not None
        return self._killed_at

    def last_words(self) -> str:
        """The ends of its logs."""
        shown = []
        for name in (f'{self.name}.log', 'guest.log'):
            lines = self.path(name).read_text(errors='replace').splitlines() \
                if self.path(name).exists() else []
            if lines:
                shown += [f'{self.path(name)}, its end:', *lines[-LOG_TAIL:]]
        return '\n'.join(shown)
