# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that would take a secondary's chain apart while it is in use."""

from typing import List, NamedTuple

from disk import DISK, VIEW, Disk
from host import Json
from layout import MIB
from model import Maybe
from sequence import Sequence

JOB = 'job'
SPARE = 'spare-node'


class Command(NamedTuple):
    """A command, and whether it succeeds."""
    name: str
    args: Json
    expected: Maybe = False


def reopens(disk: Disk) -> List[Json]:
    """Options that would make the chain another one."""
    assert disk.secondary
    active, hidden = disk.node('active'), disk.node('hidden')
    replication = disk.secondary.replication()
    overlays = disk.secondary.overlays()
    below = overlays.pop('backing')
    return [{**overlays, 'backing': None},
            {**overlays, 'backing': disk.node(DISK)},
            {**overlays, 'backing': hidden, 'read-only': True},
            {**below, 'backing': None},
            {**below, 'backing': SPARE},
            {**replication, 'file': SPARE},
            {**replication, 'file': active, 'top-id': 'other'},
            {**replication, 'file': active, 'mode': 'primary'}]


def inserts(node: str) -> List[Command]:
    """Jobs that put a filter above the node."""
    return [
        Command('blockdev-backup', {
            'job-id': JOB, 'device': node, 'target': SPARE, 'sync': 'full'},
            None),
        Command('block-stream', {'job-id': JOB, 'device': node}, None),
    ]


def commands(disk: Disk, in_iothread: bool) -> List[Command]:
    """All of them."""
    top = disk.node(VIEW)
    lower = [disk.nodes()[0].name,
             *(disk.node(kind) for kind in ('active', 'hidden', DISK))]
    result = [Command('blockdev-reopen', {'options': [options]})
              for options in reopens(disk)]
    for node in [top, *lower]:
        result += [
            Command('blockdev-del', {'node-name': node}),
            Command('block_resize', {'node-name': node, 'size': 8 * MIB}),
            Command('blockdev-mirror', {
                'job-id': JOB, 'device': node, 'target': SPARE,
                'sync': 'full'}, None),
            Command('x-blockdev-set-iothread', {
                'node-name': node, 'iothread': 'iothread0'}, None),
            Command('x-blockdev-set-iothread', {
                'node-name': node, 'iothread': None}, None),
        ]
        if not in_iothread:
            # There QEMU 10.0 crashes in bdrv_insert_node(), replicated or not
            result += inserts(node)
    result += [
        Command('block-commit', {
            'job-id': JOB, 'device': top, 'top-node': disk.node('active'),
            'base-node': disk.node('hidden')}),
        Command('block-commit', {
            'job-id': JOB, 'device': disk.node('active'),
            'top-node': disk.node('hidden'), 'base-node': disk.node(DISK)}),
        Command('x-blockdev-change', {'parent': top, 'child': 'children.0'}),
    ]
    return result


def disturb(seq: Sequence, disk: Disk) -> None:
    """One of them, which must be refused or leave everything in place."""
    host = disk.disk_host
    host.add({'driver': 'null-co', 'node-name': SPARE, 'read-zeroes': True,
              'size': disk.layout.size})
    before = host.graph()
    command = seq.rng.choice(commands(disk, seq.uses_iothread()))
    seq.log(f'{command.name} {command.args}')
    error = host.attempt(command.name, command.args)
    seq.log(f'{command.name}: {error or "done"}')
    seq.stats.refused += error is not None
    seq.moved |= command.name == 'x-blockdev-set-iothread'
    seq.expect(command.expected, error is None, command.name)
    host.end_job(JOB)
    seq.check_graph(host, before)
    host.delete(SPARE)
    seq.compare_all(disk)
