# SPDX-License-Identifier: GPL-2.0-or-later
"""One side of the pair: a QEMU process, its guest and its disks."""

import asyncio
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from qemu.machine import QEMUMachine

from console import Console
from guest import Guest
from signals import held

MIB = 1024 * 1024
BLOCK = 4096
# No step takes this long, even with a busy host and no KVM.
STEP_TIMEOUT = 120
POLL = 0.02

Json = Dict[str, Any]


class PairError(Exception):
    """A step did not succeed."""


def kvm_works() -> bool:
    """Tell whether KVM runs guests: its device alone does not say so."""
    flags = Path('/proc/cpuinfo').read_text().split()
    return (('vmx' in flags or 'svm' in flags)
            and os.access('/dev/kvm', os.R_OK | os.W_OK))


@dataclass(frozen=True)
class Layout:
    """How the guest divides its disks.

    Disk 0 begins with the file system; all the rest are numbered blocks.
    """
    disks: int = 2
    disk_size: int = 96 * MIB
    fs_size: int = 48 * MIB

    @property
    def regions(self) -> List[str]:
        """The worker's DEVICE:FIRST:BLOCKS for each disk."""
        end = self.disk_size // BLOCK
        first = [self.fs_size // BLOCK] + [0] * (self.disks - 1)
        return [f'/dev/vd{chr(ord("a") + disk)}:{first[disk]}:'
                f'{end - first[disk]}' for disk in range(self.disks)]

    @property
    def kernel_arguments(self) -> str:
        """What the guest's init reads."""
        return (f'demo.fs={self.fs_size // BLOCK} '
                f'demo.regions={",".join(self.regions)}')


@dataclass(frozen=True)
class Setup:
    """What both sides have in common."""
    build_dir: Path
    guest: Guest
    work_dir: Path
    layout: Layout = field(default_factory=Layout)
    memory_mib: int = 160
    accel: str = 'tcg'
    checkpoint_ms: int = 1500

    def tool(self, name: str) -> str:
        """Return the path of a program of the build."""
        return str(self.build_dir / name)


class Machine(QEMUMachine):
    """A QEMU whose events can be waited for, and which can be yanked."""

    def events_within(self, timeout: float) -> List[Json]:
        """Return the new events; wait for one if there is none."""
        try:
            return self._qmp.get_events(wait=timeout)
        except asyncio.TimeoutError:
            return []

    def yank(self, instances: List[Json]) -> None:
        """Cut connections, even of a QEMU whose main loop hangs on them."""
        reply = self._qmp.cmd_obj({'exec-oob': 'yank', 'id': 'yank',
                                   'arguments': {'instances': instances}})
        if 'error' in reply:
            raise PairError(f'{self._name}: yank: {reply["error"]}')


class Side:
    """A running QEMU with its guest."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.setup = setup
        self.name = name
        self.folder = setup.work_dir / name
        self.folder.mkdir()
        self.events: List[Json] = []
        self._killed_at: Optional[float] = None
        self._console: Optional[Console] = None
        # No QEMU outlives the demo, however that ends.
        self.vm = Machine(setup.tool('qemu-system-x86_64'),
                          wrapper=['setpriv', '--pdeathsig', 'KILL'],
                          name=name, base_temp_dir=str(self.folder),
                          log_dir=str(self.folder), qmp_timer=60)

    def path(self, name: str) -> Path:
        """Return the path of one of this side's files."""
        return self.folder / name

    @property
    def console(self) -> Console:
        """The guest's second serial port."""
        assert self._console is not None
        return self._console

    def launch(self, nodes: List[Json], incoming: bool) -> None:
        """Start QEMU with these block nodes and a device on each quorum."""
        setup = self.setup
        self.vm.add_args(
            '-no-user-config', '-nodefaults',
            '-L', '/usr/share/seabios', '-L', '/usr/share/qemu',
            '-name', self.name,
            '-machine', f'pc,accel={setup.accel}',
            '-cpu', 'host' if setup.accel == 'kvm' else 'qemu64',
            '-m', str(setup.memory_mib),
            '-kernel', str(setup.guest.kernel),
            '-initrd', str(setup.guest.initramfs),
            '-append', 'console=ttyS0 quiet panic=-1 '
            + setup.layout.kernel_arguments,
            '-chardev', f'file,id=log,path={self.path("guest.log")}',
            '-chardev', f'socket,id=work,path={self.path("work.sock")},'
            'server=on,wait=off',
            '-serial', 'chardev:log', '-serial', 'chardev:work',
            # for ./run top
            '-chardev', f'socket,id=top,path={self.path("top.sock")},'
            'server=on,wait=off',
            '-mon', 'chardev=top,mode=control')
        for node in nodes:
            self.vm.add_args('-blockdev', json.dumps(node))
        for disk in range(setup.layout.disks):
            self.vm.add_args('-device',
                             f'virtio-blk-pci,id=vd{disk},drive={top(disk)}')
        if incoming:
            self.vm.add_args('-incoming', 'defer')
        with held():
            self.vm.launch()
        self._console = Console(self.path('work.sock'))

    def cmd(self, command: str, options: Optional[Json] = None,
            **arguments: Any) -> Any:
        """Run a QMP command, its arguments as they are or as keywords.

        Underscores in keywords stand for hyphens.
        """
        with held():
            return self.vm.cmd(command, options, **arguments)

    def yank(self, instances: List[Json]) -> None:
        """Cut connections, even when no other command would be answered."""
        with held():
            self.vm.yank(instances)

    def pump(self, wait: float = 0) -> List[Json]:
        """Take QMP's new events into self.events and return them.

        If there is none, one may come for so many seconds.
        """
        with held():
            new = self.vm.events_within(wait)
        for event in new:
            event['when'] = (event['timestamp']['seconds']
                             + event['timestamp']['microseconds'] / 1e6)
        self.events += new
        return new

    def seen(self, name: str, since: float = 0) -> List[Json]:
        """Return the events of a name, oldest first, from a time on."""
        return [event for event in self.events
                if event['event'] == name and event['when'] >= since]

    def wait_until(self, done: Callable[[], bool], what: str,
                   timeout: float = STEP_TIMEOUT) -> None:
        """Wait for a condition, taking events and watching QEMU."""
        deadline = time.monotonic() + timeout
        while not done():
            if time.monotonic() > deadline:
                raise PairError(f'{self.name}: {what} took more than '
                                f'{timeout:.0f} s')
            self.check_alive(what)
            self.console.wait(POLL)
            self.pump()

    def check_alive(self, what: str) -> None:
        """Raise an error when QEMU has ended or the guest has given up."""
        if not self.vm.is_running():
            raise PairError(f'{self.name}: QEMU ended (status '
                            f'{self.vm.exitcode()}) before {what}')
        failed = self.console.lines('FAIL')
        if failed:
            raise PairError(f'{self.name}: the guest says: {failed[0]}')

    def send_signal(self, number: signal.Signals) -> None:
        """Send QEMU a signal.  Any thread may do it."""
        pid = self.vm.get_pid()
        if pid is None:
            raise PairError(f'{self.name}: QEMU has ended already')
        os.kill(pid, number)

    def sigkill(self) -> None:
        """Kill QEMU the hard way, and know when.  Any thread may do it."""
        self._killed_at = time.time()
        self.send_signal(signal.SIGKILL)

    def died(self) -> float:
        """Return when QEMU was killed."""
        if self._killed_at is None:
            raise PairError(f'{self.name} was not killed')
        return self._killed_at

    def end(self) -> None:
        """End QEMU, if it runs, and what reads from it."""
        if self._console is not None:
            self._console.close()
            self._console = None
        self.vm.kill()

    def statistics(self) -> List[Json]:
        """Return what each replication node tells of itself."""
        told = [node.get('driver-specific', {}) for node in
                self.cmd('query-blockstats', query_nodes=True)]
        return [stats for stats in told
                if stats.get('driver') == 'replication']

    def children(self, node: str) -> Dict[str, str]:
        """Return the node names of a node's children, by child name."""
        graph = self.cmd('x-debug-query-block-graph')
        names = {n['id']: n['name'] for n in graph['nodes']}
        return {edge['name']: names[edge['child']] for edge in graph['edges']
                if names[edge['parent']] == node}


def top(disk: int) -> str:
    """Return the name of the root node, which the guest's device uses."""
    return f'colo-disk{disk}'
