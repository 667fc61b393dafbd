# SPDX-License-Identifier: GPL-2.0-or-later
"""The QEMU beside a keeper.  It outlives the keeper, which finds it again."""

import asyncio
import os
import signal
import subprocess
from pathlib import Path
from typing import Callable, List, Optional

from . import graph
from .check import running_qemu
from .config import Config, Json
from .errors import Failed, last_line
from .facts import open_log
from .monitor import Monitor

KILL_SECONDS = 20.0
LOG_BYTES = 1000


class Machine:
    """QEMU's process."""

    def __init__(self, config: Config, on_event: Callable[[Json], None],
                 on_death: Callable[[], None]) -> None:
        self._config = config
        self._on_event = on_event
        self._on_death = on_death
        self._child: Optional['subprocess.Popen[bytes]'] = None
        self._pidfd = -1
        self.dead = asyncio.Event()
        self.dead.set()
        self._ending = False
        self.pid = 0
        # how the last one did
        self.ended = ''
        self.monitor = self._new_monitor()

    def _new_monitor(self) -> Monitor:
        return Monitor(self.path('qmp.sock'), self._config.limits.answer,
                       self._on_event)

    def path(self, name: str) -> Path:
        """One of its files."""
        return self._config.run / name

    @property
    def runs(self) -> bool:
        """Whether it has not ended."""
        return not self.dead.is_set()

    def _words(self, primary: bool) -> List[str]:
        vm = self._config.vm
        words = [vm.qemu, '-name', vm.name, '-no-user-config',
                 '-pidfile', str(self.path('qemu.pid'))]
        for name in ('qmp', 'top'):
            words += ['-qmp', f'unix:{self.path(name)}.sock,server=on,'
                      'wait=off']
        if not {'-display', '-vnc', '-nographic'} & set(vm.arguments):
            words += ['-display', 'none']
        return [*words, *vm.arguments,
                *graph.arguments(self._config, primary)]

    async def start(self, primary: bool) -> None:
        """Start it, and wait until it answers."""
        assert not self.runs
        with open_log(self.path('qemu.log')) as log:
            # pylint: disable=consider-using-with
            child = subprocess.Popen(
                self._words(primary), stdin=subprocess.DEVNULL,
                env={**os.environ, graph.BRIDGE: self._config.network.bridge},
                stdout=log, stderr=log, start_new_session=True)
        try:
            self._follow(child.pid)
        except OSError:
            # nobody would see what becomes of it
            child.kill()
            child.wait()
            raise
        self._child = child
        await self.connect()

    def find(self) -> bool:
        """Find one that an earlier keeper has started."""
        pid = running_qemu(self._config)
        if pid:
            self._follow(pid)
        return bool(pid)

    def _follow(self, pid: int) -> None:
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._died)
        self.pid = pid
        # each has its own: who waits for an older one's end is not misled
        self.dead = asyncio.Event()
        self._ending = False

    def _died(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        # of one that an earlier keeper has started nothing is known
        self.ended = 'QEMU has ended'
        if self._child:
            status = self._child.wait()
            self._child = None
            self.ended += f' by signal {-status}' if status < 0 \
                else f' with status {status}: {self.last_words()}'
        self.dead.set()
        if not self._ending:
            self._on_death()

    async def connect(self) -> None:
        """Talk to it, once it answers."""
        self.monitor = self._new_monitor()
        ways = [asyncio.ensure_future(self.monitor.connect()),
                asyncio.ensure_future(self.dead.wait())]
        try:
            await asyncio.wait(ways, timeout=self._config.limits.start,
                               return_when=asyncio.FIRST_COMPLETED)
            if not self.runs:
                raise Failed(self.ended)
            if not ways[0].done():
                raise Failed('QEMU did not answer after its start for '
                             f'{self._config.limits.start:g} s')
            ways[0].result()
        finally:
            for way in ways:
                way.cancel()

    def last_words(self) -> str:
        """The last line of its log, which may be long, or not there."""
        try:
            with open(self.path('qemu.log'), 'rb') as log:
                size = os.fstat(log.fileno()).st_size
                log.seek(max(0, size - LOG_BYTES))
                return last_line(log.read().decode(errors='replace'))
        except OSError as exc:
            return str(exc)

    async def end(self, quit_seconds: float = 0) -> None:
        """End it; it may quit by itself for a while, and is killed then."""
        self._ending = True
        if self.runs and quit_seconds:
            try:
                await self.monitor.cmd('quit')
                await asyncio.wait_for(self.dead.wait(), quit_seconds)
            except (Failed, asyncio.TimeoutError):
                # the hard way
                pass
        if self.runs:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            try:
                await asyncio.wait_for(self.dead.wait(), KILL_SECONDS)
            except asyncio.TimeoutError as exc:
                raise Failed(f'QEMU {self.pid} cannot be killed') from exc
        await self.monitor.close()
