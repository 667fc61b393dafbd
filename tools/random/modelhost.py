# SPDX-License-Identifier: GPL-2.0-or-later
"""A host of the random test, and the replication nodes it should have."""

import re
from pathlib import Path
from typing import List, Optional

from host import NO_GUEST, Host, replicate
from model import Node, Op
from nbdio import Client

SECONDS = 30.0
# Of the filters whose speed can be set, one for each image of two disks
THROTTLE_GROUPS = [f'{kind}{number}' for number in range(2)
                   for kind in ('active', 'hidden', 'disk', 'local', 'spare',
                                'fresh')]


class Difference(Exception):
    """QEMU has done something that the model does not allow."""


class ModelHost(Host):
    """A QEMU without a guest, whose registry is driven by QMP."""

    def __init__(self, build: Path, folder: Path, name: str) -> None:
        super().__init__(build, folder, name, *NO_GUEST, seconds=SECONDS)
        for group in THROTTLE_GROUPS:
            self.add_args('-object', f'throttle-group,id={group}')
        # In the order in which they were opened
        self.nodes: List[Node] = []
        # Sequences since the launch
        self.served = 0

    def launch(self) -> None:
        self.nodes.clear()
        self.served = 0
        super().launch()
        self.serve()

    def call(self, op: Op, mode: str) -> Optional[str]:
        """Call the registry; return the error.  A failover tells none."""
        if op is Op.CHECKPOINT:
            return self.attempt('xen-colo-do-checkpoint')
        if op is Op.START:
            return replicate(self, True, mode)
        return replicate(self, False, mode, op is Op.FAILOVER)

    def status(self) -> Optional[str]:
        """What the status says is wrong."""
        reply = self.cmd('query-xen-replication-status')
        return str(reply['desc']) if reply['error'] else None

    def connect(self, export: str) -> Client:
        """Become a client of an export."""
        return Client(str(self.socket), export)

    def end_job(self, job: str) -> None:
        """Cancel a job of ours, if it runs, and wait for its end."""
        def ended() -> bool:
            jobs = [info['id'] for info in self.cmd('query-jobs')]
            if job in jobs:
                self.query('job-cancel', id=job)
            return job not in jobs
        self.wait_until(ended, f'the end of job {job}')

    def mirror(self, node: str, target: str, replaces: str) -> None:
        """Copy a node; the copy then takes the place of one below."""
        self.cmd('blockdev-mirror', {
            'job-id': 'mirror', 'device': node, 'target': target,
            'replaces': replaces, 'sync': 'full'})

        def is_ready() -> bool:
            jobs = self.cmd('query-block-jobs')
            return all(job['ready'] for job in jobs)

        self.wait_until(is_ready, 'the copy')
        self.cmd('block-job-complete', device='mirror')
        self.wait_until(lambda: not self.cmd('query-block-jobs'),
                        'the end of the copy')

    def graph(self) -> List[str]:
        """Nodes, edges, permissions, read-only flags, as lines."""
        # an overlay that could not be emptied fails the query as a whole
        known = self.query('query-named-block-nodes', flat=True)
        return sorted([*map(str, self.edges()), *(
            f"{node['node-name']} ro={node['ro']}"
            for node in known.get('return', []))])


def named_node(error: str) -> Optional[str]:
    """The replication node that an error is about."""
    match = re.search(r"[Rr]eplication node '([^']*)'", error)
    return match[1] if match else None
