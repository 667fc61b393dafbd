# SPDX-License-Identifier: GPL-2.0-or-later
"""One QEMU without a guest, whose registry is driven by QMP."""

import re
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from qemu.machine import QEMUMachine
from qemu.machine.machine import AbnormalShutdown

from autopsy import backtrace
from model import Node, Op
from nbdio import Client, Hang

SECONDS = 30.0
POLL = 0.002

Json = Dict[str, Any]

# Of the filters whose speed can be set, one for each image of two disks
THROTTLE_GROUPS = [f'{kind}{number}' for number in range(2)
                   for kind in ('active', 'hidden', 'disk', 'local', 'spare')]


class Difference(Exception):
    """QEMU has done something that the model does not allow."""


class Setup(NamedTuple):
    """What all hosts have in common."""
    build_dir: Path
    work_dir: Path

    def tool(self, name: str) -> str:
        """The path of a program of the build."""
        return str(self.build_dir / name)


class Host:
    """A QEMU, and the replication nodes that it should have."""

    def __init__(self, setup: Setup, name: str) -> None:
        self.name = name
        self.socket = str(setup.work_dir / f'nbd-{name}')
        # In the order in which they were opened
        self.nodes: List[Node] = []
        # Sequences since the launch
        self.served = 0
        self.vm = QEMUMachine(setup.tool('qemu-system-x86_64'), name=name,
                              # no QEMU outlives the test, however that ends
                              wrapper=['setpriv', '--pdeathsig', 'KILL'],
                              base_temp_dir=str(setup.work_dir),
                              log_dir=str(setup.work_dir), qmp_timer=SECONDS)
        self.vm.add_args('-machine', 'none', '-accel', 'qtest', '-S',
                         '-nodefaults', '-display', 'none',
                         '-object', 'iothread,id=iothread0')
        for group in THROTTLE_GROUPS:
            self.vm.add_args('-object', f'throttle-group,id={group}')

    def launch(self) -> None:
        """Start QEMU and its NBD server."""
        self.nodes.clear()
        self.served = 0
        self.vm.launch()
        # Each command has to end in time; QEMUMachine cannot be told so
        self.vm._qmp.settimeout(SECONDS)  # pylint: disable=protected-access
        self.cmd('nbd-server-start', addr={
            'type': 'unix', 'data': {'path': self.socket}})

    def is_running(self) -> bool:
        """Whether there is a process."""
        return self.vm.is_running()

    def end(self) -> None:
        """Quit, which has to work in any stage and to leave no core."""
        try:
            self.vm.shutdown(timeout=int(SECONDS))
        except AbnormalShutdown:
            # the exit status says the same
            pass
        if self.vm.exitcode() != 0:
            raise Difference(f'{self.name}: QEMU ended with status '
                             f'{self.vm.exitcode()}')

    def log(self) -> str:
        """What QEMU has written; it ends with that."""
        if self.vm.is_running():
            self.vm.kill()
        return self.vm.get_log() or ''

    def stacks(self) -> str:
        """What its threads are doing, if it still runs."""
        pid = self.vm.get_pid()
        return backtrace(pid) if pid and self.vm.is_running() else ''

    # Commands

    def query(self, command: str, args: Optional[Json] = None,
              **kwargs: Any) -> Json:
        """Give a command; return the answer or the error."""
        return self.vm.qmp(command, args, **kwargs)

    def attempt(self, command: str, args: Optional[Json] = None,
                **kwargs: Any) -> Optional[str]:
        """Give a command; return what it objects to."""
        return error_of(self.query(command, args, **kwargs))

    def cmd(self, command: str, args: Optional[Json] = None,
            **kwargs: Any) -> Any:
        """Give a command that has to succeed."""
        reply = self.query(command, args, **kwargs)
        if 'error' in reply:
            raise Difference(f'{self.name}: {command} {args or kwargs}: '
                             f"{reply['error']['desc']}")
        return reply['return']

    def qemu_io(self, node: str, command: str) -> str:
        """Run a command of qemu-io on a node."""
        return str(self.cmd('human-monitor-command', {
            'command-line': f'qemu-io {node} "{command}"'}))

    def wait_until(self, done: Callable[[], bool], what: str) -> None:
        """Wait for something that QEMU can be asked for."""
        deadline = time.monotonic() + SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise Hang(f'{self.name}: waited too long for {what}')
            time.sleep(POLL)

    # The registry

    def call(self, op: Op, mode: str) -> Optional[str]:
        """Call the registry; return the error.  A failover tells none."""
        primary = mode == 'primary'
        if op is Op.CHECKPOINT:
            return self.attempt('xen-colo-do-checkpoint')
        if op is Op.START:
            return self.attempt('xen-set-replication', enable=True,
                                primary=primary)
        return self.attempt('xen-set-replication', enable=False,
                            primary=primary, failover=op is Op.FAILOVER)

    def status(self) -> Optional[str]:
        """What the status says is wrong."""
        reply = self.cmd('query-xen-replication-status')
        return str(reply['desc']) if reply['error'] else None

    # Exports

    def export(self, node: str, writable: bool = True,
               iothread: Optional[str] = None) -> None:
        """Let clients use a node."""
        thread = {'iothread': iothread} if iothread else {}
        self.cmd('block-export-add', {
            'type': 'nbd', 'id': f'export-{node}', 'name': node,
            'node-name': node, 'writable': writable, **thread})

    def unexport(self, node: str) -> None:
        """End an export, and cut its clients off."""
        self.cmd('block-export-del', id=f'export-{node}', mode='hard')
        self.wait_until(lambda: f'export-{node}' not in self.exports(),
                        f'end of export {node}')

    def exports(self) -> List[str]:
        """The ids of all exports."""
        return [export['id'] for export in self.cmd('query-block-exports')]

    def connect(self, node: str) -> Client:
        """Become a client of an export."""
        return Client(self.socket, node)

    # The graph

    def add(self, options: Json) -> None:
        """Add a node."""
        self.cmd('blockdev-add', options)

    def delete(self, node: str) -> None:
        """Delete a node."""
        self.cmd('blockdev-del', {'node-name': node})

    def has_job(self, node: str) -> bool:
        """Whether a block job uses the node, internal ones too."""
        graph = self.cmd('x-debug-query-block-graph')
        jobs = {each['id'] for each in graph['nodes']
                if each['type'] == 'block-job'}
        used = {edge['child'] for edge in graph['edges']
                if edge['parent'] in jobs}
        return any(each['name'] == node and each['id'] in used
                   for each in graph['nodes'])

    def end_job(self, job: str) -> None:
        """Cancel a job of ours, if it runs, and wait for its end."""
        def ended() -> bool:
            jobs = [info['id'] for info in self.cmd('query-jobs')]
            if job in jobs:
                self.query('job-cancel', id=job)
            return job not in jobs
        self.wait_until(ended, f'end of job {job}')

    def graph(self) -> List[str]:
        """Nodes, edges, permissions, read-only flags and jobs, as lines."""
        graph = self.cmd('x-debug-query-block-graph')
        names = {node['id']: f"{node['type']} '{node['name']}'"
                 for node in graph['nodes']}
        lines = list(names.values())
        for edge in graph['edges']:
            perms = ','.join(sorted(edge['perm']))
            shared = ','.join(sorted(edge['shared-perm']))
            lines.append(f"{names[edge['parent']]} -{edge['name']}-> "
                         f"{names[edge['child']]} {perms} / {shared}")
        # an overlay that could not be emptied fails the query as a whole
        nodes = self.query('query-named-block-nodes', flat=True)
        for node in nodes.get('return', []):
            lines.append(f"{node['node-name']} ro={node['ro']}")
        return sorted(lines)


def error_of(reply: Json) -> Optional[str]:
    """What an answer complains about."""
    return str(reply['error']['desc']) if 'error' in reply else None


def named_node(error: str) -> Optional[str]:
    """The replication node that an error is about."""
    match = re.search(r"[Rr]eplication node '([^']*)'", error)
    return match[1] if match else None
