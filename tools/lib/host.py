# SPDX-License-Identifier: GPL-2.0-or-later
"""A QEMU as all tools run it: it ends with them, and no wait is for ever."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from qemu.machine import QEMUMachine
from qemu.machine.machine import AbnormalShutdown

from command import held

SECONDS = 60.0
POLL = 0.002
# A QEMU that runs no guest: commands do what a guest and COLO would
NO_GUEST = ('-machine', 'none', '-accel', 'qtest', '-S', '-nodefaults',
            '-object', 'iothread,id=iothread0')

Json = Dict[str, Any]


class HostError(Exception):
    """A QEMU did not do what it had to."""


class Hang(HostError):
    """It did not do it in time."""


class Edge(NamedTuple):
    """From a user of a node to the node."""
    parent: str
    name: str
    node: str
    perm: str
    parent_type: str


class Host(QEMUMachine):
    """A QEMU, and what is asked of it."""

    def __init__(self, build: Path, folder: Path, name: str,
                 *args: str, cpu: Optional[int] = None,
                 seconds: float = SECONDS) -> None:
        pin = [] if cpu is None else ['taskset', '-c', str(cpu)]
        super().__init__(str(build / 'qemu-system-x86_64'), args, name=name,
                         wrapper=['setpriv', '--pdeathsig', 'KILL', *pin],
                         base_temp_dir=str(folder), log_dir=str(folder),
                         qmp_timer=seconds)
        self.name = name
        self.folder = folder
        self.seconds = seconds
        self.socket = folder / f'{name}.nbd'
        self.events: List[Json] = []

    def __enter__(self) -> 'Host':
        self.launch()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.kill()

    def launch(self) -> None:
        with held():
            super().launch()
            # QEMUMachine cannot be told how long a command may take
            self._qmp.settimeout(self.seconds)

    def kill(self) -> None:
        with held():
            super().kill()
        self.socket.unlink(missing_ok=True)

    def end(self) -> None:
        """Quit, which has to work in any state and to leave no core."""
        try:
            self.shutdown(timeout=int(self.seconds))
        except AbnormalShutdown:
            # the exit status says the same
            pass
        if self.exitcode() != 0:
            raise HostError(f'{self.name}: QEMU ended with status '
                            f'{self.exitcode()}')

    def log_text(self) -> str:
        """What it has printed."""
        path = self.folder / f'{self.name}.log'
        return path.read_text(errors='replace') if path.exists() else ''

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal.  Any thread may do it."""
        pid = self.get_pid()
        if pid is None:
            raise HostError(f'{self.name}: QEMU has ended already')
        os.kill(pid, number)

    # Commands and events

    def query(self, command: str, options: Optional[Json] = None,
              **arguments: Any) -> Json:
        """Give a command; return the answer or the error.

        Its arguments are as they are, or keywords with underscores for
        hyphens.
        """
        try:
            with held():
                return self.qmp(command, options, **arguments)
        except asyncio.TimeoutError as exc:
            raise Hang(f'{self.name}: no answer to {command}') from exc

    def attempt(self, command: str, options: Optional[Json] = None,
                **arguments: Any) -> Optional[str]:
        """Give a command; return what it objects to."""
        reply = self.query(command, options, **arguments)
        return str(reply['error']['desc']) if 'error' in reply else None

    def cmd(self, cmd: str, args_dict: Optional[Json] = None,
            conv_keys: Optional[bool] = None, **args: Any) -> Any:
        """Give a command that has to succeed; return what it tells."""
        reply = self.query(cmd, args_dict, **args)
        if 'error' in reply:
            raise HostError(f'{self.name}: {cmd} {args_dict or args}: '
                            f"{reply['error']['desc']}")
        return reply['return']

    def yank(self, instances: List[Json]) -> None:
        """Cut connections, even of a QEMU whose main loop hangs on them."""
        with held():
            reply = self._qmp.cmd_obj({
                'exec-oob': 'yank', 'id': 'yank',
                'arguments': {'instances': instances}})
        if 'error' in reply:
            raise HostError(f'{self.name}: yank: {reply["error"]}')

    def qemu_io(self, device: str, command: str) -> str:
        """Run a command of qemu-io on a node or a device."""
        return str(self.cmd('human-monitor-command', {
            'command-line': f'qemu-io {device} "{command}"'}))

    def pump(self, wait: float = 0) -> None:
        """Take the new events; if there is none, wait for one so long."""
        try:
            with held():
                new = self._qmp.get_events(wait=wait)
        except asyncio.TimeoutError:
            new = []
        for event in new:
            event['when'] = (event['timestamp']['seconds']
                             + event['timestamp']['microseconds'] / 1e6)
        self.events += new

    def seen(self, name: str, since: float = 0) -> List[Json]:
        """The events of a name, oldest first, from a time on."""
        return [event for event in self.events
                if event['event'] == name and event['when'] >= since]

    # Waiting

    def check_alive(self, what: str) -> None:
        """It must run until something has happened."""
        if not self.is_running():
            raise HostError(f'{self.name}: QEMU ended (status '
                            f'{self.exitcode()}) before {what}')

    def pause(self) -> None:
        """Let some time pass between two looks."""
        time.sleep(POLL)

    def wait_until(self, done: Callable[[], bool], what: str,
                   seconds: float = 0) -> None:
        """Wait for something that can be asked for."""
        seconds = seconds or self.seconds
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise Hang(f'{self.name}: {what} took more than '
                           f'{seconds:.0f} s')
            self.check_alive(what)
            self.pause()

    # Nodes, and ways to them

    def add(self, *nodes: Json) -> None:
        """Add nodes."""
        for node in nodes:
            self.cmd('blockdev-add', node)

    def delete(self, *nodes: str) -> None:
        """Delete nodes."""
        for node in nodes:
            self.cmd('blockdev-del', {'node-name': node})

    def serve(self, **server: str) -> None:
        """Take NBD clients, at its socket or another address."""
        self.server = server or {'type': 'unix', 'path': str(self.socket)}
        data = dict(self.server)
        self.cmd('nbd-server-start', addr={'type': data.pop('type'),
                                           'data': data})

    def export(self, node: str, name: str = '', writable: bool = True,
               iothread: Optional[str] = None) -> None:
        """Let clients use a node, by its name or another."""
        name = name or node
        thread = {'iothread': iothread} if iothread else {}
        self.cmd('block-export-add', {
            'type': 'nbd', 'id': f'export-{name}', 'name': name,
            'node-name': node, 'writable': writable, **thread})

    def unexport(self, name: str) -> None:
        """End an export, and cut its clients off."""
        self.cmd('block-export-del', id=f'export-{name}', mode='hard')
        self.wait_until(lambda: f'export-{name}' not in self.exports(),
                        f'the end of export {name}')

    def exports(self) -> Dict[str, str]:
        """The node behind each export: a job puts filters in between."""
        return {export['id']: export['node-name']
                for export in self.cmd('query-block-exports')}

    # What it tells of itself

    def edges(self) -> List[Edge]:
        """All edges of the graph."""
        graph = self.cmd('x-debug-query-block-graph')
        nodes = {node['id']: node for node in graph['nodes']}
        return [Edge(nodes[edge['parent']]['name'], edge['name'],
                     nodes[edge['child']]['name'],
                     f"{','.join(sorted(edge['perm']))} / "
                     f"{','.join(sorted(edge['shared-perm']))}",
                     nodes[edge['parent']]['type'])
                for edge in graph['edges']]

    def node_names(self) -> List[str]:
        """The names of all nodes."""
        return [node['node-name'] for node in
                self.cmd('query-named-block-nodes', flat=True)]

    def children(self, node: str) -> Dict[str, str]:
        """The node names of a node's children, by child name."""
        return {edge.name: edge.node for edge in self.edges()
                if edge.parent == node}

    def has_job(self, node: str) -> bool:
        """Whether a block job uses the node, internal ones too."""
        return any(edge.node == node and edge.parent_type == 'block-job'
                   for edge in self.edges())

    def statistics(self) -> List[Json]:
        """What each replication node tells of itself."""
        told = [node.get('driver-specific', {}) for node in
                self.cmd('query-blockstats', query_nodes=True)]
        return [stats for stats in told
                if stats.get('driver') == 'replication']


def replicate(host: Host, enable: bool, mode: str,
              failover: Optional[bool] = None) -> Optional[str]:
    """Have the registry start or stop; return the error.

    A failover tells none.
    """
    more: Json = {} if failover is None else {'failover': failover}
    return host.attempt('xen-set-replication', {
        'enable': enable, 'primary': mode == 'primary', **more})
