# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that would take a secondary's chain apart while it is in use."""

from typing import List, NamedTuple

from disk import DISK, VIEW, Disk
from host import Json
from layout import MIB
from model import Maybe, Stage
from sequence import Sequence

JOB = 'job'
SPARE = 'spare-node'
EXPORT = 'export-other'


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


def inserts(node: str, expected: Maybe) -> List[Command]:
    """Jobs that put a filter above the node."""
    return [
        Command('blockdev-backup', {
            'job-id': JOB, 'device': node, 'target': SPARE, 'sync': 'full'},
            expected),
        Command('block-stream', {'job-id': JOB, 'device': node}, expected),
    ]


def writers(node: str) -> List[Command]:
    """What would write to a node, or take it for something else."""
    return [
        Command('block-export-add', {
            'type': 'nbd', 'id': EXPORT, 'name': EXPORT, 'node-name': node,
            'writable': True}),
        Command('blockdev-snapshot-internal-sync', {
            'device': node, 'name': 'snapshot'}),
        Command('blockdev-backup', {
            'job-id': JOB, 'device': SPARE, 'target': node, 'sync': 'full'}),
        Command('blockdev-mirror', {
            'job-id': JOB, 'device': SPARE, 'target': node, 'sync': 'full'}),
        Command('blockdev-add', {
            'driver': 'raw', 'node-name': EXPORT, 'file': node}, None),
    ]


def on_guard(disk: Disk) -> List[Command]:
    """What would write to the filter above the disk, or take it out."""
    guard = disk.disk_host.children(disk.node('hidden'))['backing']
    active = {'job-id': JOB, 'device': disk.node('active')}
    return [Command('block-commit', {**active, 'base-node': guard}),
            Command('block-commit', {**active, 'base-node': guard,
                                     'top-node': disk.node('hidden')}),
            Command('block-commit', {'job-id': JOB, 'device': guard,
                                     'base-node': disk.node(DISK)}),
            Command('block-stream', {**active, 'base-node': guard}),
            Command('blockdev-del', {'node-name': guard})]


def commands(disk: Disk, running: bool) -> List[Command]:
    """All of them."""
    top = disk.node(VIEW)
    lower = [disk.nodes()[0].name,
             *(disk.node(kind) for kind in ('active', 'hidden', DISK))]
    result = [Command('blockdev-reopen', {'options': [options]})
              for options in reopens(disk)]
    if running:
        for node in (disk.node('active'), disk.node('hidden')):
            result += writers(node)
    for node in [top, *lower]:
        # the replication node's place is not what replication depends on
        jobs: Maybe = False if running and node != lower[0] else None
        result += [
            Command('blockdev-del', {'node-name': node}),
            Command('block_resize', {'node-name': node, 'size': 8 * MIB}),
            Command('blockdev-mirror', {
                'job-id': JOB, 'device': node, 'target': SPARE,
                'sync': 'full'}, jobs),
            Command('x-blockdev-set-iothread', {
                'node-name': node, 'iothread': 'iothread0'}, None),
            Command('x-blockdev-set-iothread', {
                'node-name': node, 'iothread': None}, None),
        ]
        result += inserts(node, jobs)
    if running:
        result += on_guard(disk)
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
    command = seq.rng.choice(commands(
        disk, disk.nodes()[0].stage is Stage.RUNNING))
    seq.log(f'{command.name} {command.args}')
    error = host.attempt(command.name, command.args)
    seq.log(f'{command.name}: {error or "done"}')
    seq.stats.refused += error is not None
    seq.expect(command.expected, error is None, command.name)
    host.end_job(JOB)
    if not error and command.name == 'blockdev-add':
        host.delete(EXPORT)
    seq.check_graph(host, before)
    host.delete(SPARE)
    seq.compare_all(disk)
