# SPDX-License-Identifier: GPL-2.0-or-later
"""A sequence of random steps: QEMU does them, the model foretells them."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Any, Dict, List, Optional, TextIO

from disk import DISK, LOCAL, VIEW, Disk, demand
from modelhost import Difference, ModelHost, named_node
from layout import Image, Images, Layout
from model import Maybe, Node, Op, Stage, Answer, Write

# Bytes in a second
SLOW = 4000000
OUT_OF_DATE = 'out of date', 'cut off'
# What a secondary says that is failing over, and goes on with it
UNFLUSHED = 'Flushing the disk'


@dataclass
class Stats:
    """What has been done."""
    sequences: int = 0
    steps: int = 0
    refused: int = 0
    faults: int = 0
    hits: int = 0
    failovers: int = 0
    checkpoints: int = 0
    checks: int = 0
    compared: int = 0

    def add(self, other: 'Stats') -> None:
        """Take another's counts in."""
        for field in fields(self):
            name = field.name
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def short(self) -> str:
        """What a line has room for."""
        return (f'{self.sequences} sequences, {self.steps} steps, '
                f'{self.hits} faults hit, {self.checks} checks')

    def __str__(self) -> str:
        names = {'refused': 'refused operations', 'faults': 'injected faults',
                 'hits': 'requests that failed for one',
                 'compared': 'compared bytes'}
        return ', '.join(f'{count} {names.get(name, name)}'
                         for name, count in asdict(self).items())


class Walk:
    """Two hosts, and steps that are drawn from a seed."""

    def __init__(self, hosts: Dict[str, ModelHost], images: Images,
                 folder: Path, seed: str, trace: TextIO) -> None:
        self.hosts = hosts
        self.images = images
        self.folder = folder
        self.seed = seed
        self.rng = Random(seed)
        self.stats = Stats()
        self._trace = trace

    def log(self, text: str) -> None:
        """Remember what was done."""
        self._trace.write(f'{text}\n')
        self._trace.flush()

    def new_step(self, number: int) -> None:
        """One step's random numbers do not depend on how others ended."""
        self.rng = Random(f'{self.seed}/{number}')
        self.stats.steps += 1


class Sequence(Walk):
    """The disks and hosts of a sequence, and what can be done with them."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.disks = self._random_disks()

    def _random_disks(self) -> List[Disk]:
        """Any topology, mostly of one disk."""
        kind = self.rng.choice(['secondary', 'secondary', 'pair', 'pair',
                                'remote', 'local'])
        first, second = self.hosts['a'], self.hosts['b']
        disks = []
        for number in range(self.rng.choice([1, 1, 1, 2])):
            disks.append(Disk(
                number, Layout.random(self.rng), self.images, self.folder,
                self.rng, first if kind == 'local' else second,
                None if kind == 'secondary' else first,
                kind in ('secondary', 'pair')))
            self.log(f'{kind}: {disks[-1].layout}')
        return disks

    def expect(self, expected: Maybe, found: bool, what: str) -> None:
        """Compare how something ended with how it had to."""
        self.stats.checks += 1
        if expected is None:
            self.stats.hits += not found
        elif expected != found:
            raise Difference(f"{what} {'succeeded' if found else 'failed'}, "
                             'but must not')

    # The registry

    def call(self, host: ModelHost, op: Op, mode: str) -> bool:
        """Call the registry of a host; return whether that succeeded."""
        allowed = {node: node.allows(op, mode) for node in host.nodes}
        certain = False not in allowed.values()
        strict = all(allowed.values())
        before = host.graph() if not certain and op is Op.START else None
        error = host.call(op, mode)
        self.log(f'{host.name}: {op.value} {mode}: {error or "done"}')
        expected = True if strict else None if certain else False
        if op is Op.FAILOVER:
            expected = True
        self.expect(expected, error is None,
                    f'{host.name}: {op.value} {mode} ({error})')
        self.stats.refused += error is not None
        self._called(host, op, error, allowed)
        if op is Op.FAILOVER:
            self.quiesce()
        if before is not None:
            self.check_graph(host, before)
        return error is None

    def _called(self, host: ModelHost, op: Op, error: Optional[str],
                allowed: Dict[Node, Maybe]) -> None:
        """Tell the models how a call has ended."""
        self._count(op, error, host)
        if error is None:
            for node in host.nodes:
                node.called(op, True)
            return
        culprit = self._find(host, error)
        if allowed[culprit]:
            raise Difference(f'{host.name}: {op.value}: no reason for '
                             f'"{error}"')
        if op is Op.START:
            self._start_failed(host, culprit, allowed[culprit], error)
        elif op is not Op.CHECKPOINT:
            self._visited(host, op, culprit, allowed)
        elif not self._out_of_date(culprit, allowed[culprit], error):
            self._visited(host, op, culprit, allowed)
            for node in host.nodes:
                node.disowned()

    def _visited(self, host: ModelHost, op: Op, culprit: Node,
                 allowed: Dict[Node, Maybe]) -> None:
        """All nodes were called, and the culprit is the first that failed."""
        failed = False
        for node in host.nodes:
            if node is culprit:
                failed = True
                if allowed[node] is None:
                    node.called(op, False)
                if op is Op.CHECKPOINT:
                    # those behind it keep what they have
                    return
            elif allowed[node]:
                node.called(op, True)
            elif allowed[node] is None:
                # only one disk has faults, so that it did not fail later
                assert not failed
                node.called(op, True)
            elif not failed:
                raise Difference(f'{node.name}: {op.value} must not succeed')

    def _count(self, op: Op, error: Optional[str], host: ModelHost) -> None:
        accepted = any(node.answer(op) is Answer.ACCEPT
                       for node in host.nodes)
        if accepted and error is None:
            self.stats.checkpoints += op is Op.CHECKPOINT
            self.stats.failovers += op is Op.FAILOVER

    def _start_failed(self, host: ModelHost, culprit: Node, allowed: Maybe,
                      error: str) -> None:
        """Nothing has changed, unless a first checkpoint failed.

        Then those behind the culprit have what they had.
        """
        if (allowed is None and culprit.mode == 'secondary'
                and 'Cannot start' not in error):
            for node in host.nodes[:host.nodes.index(culprit) + 1]:
                if node.answer(Op.START) is Answer.ACCEPT:
                    node.start_lost()
        elif allowed is None:
            culprit.called(Op.START, False)

    def _out_of_date(self, node: Node, allowed: Maybe, error: str) -> bool:
        """Whether a checkpoint was refused before anything was done."""
        if allowed is False:
            return True
        if not any(words in error for words in OUT_OF_DATE):
            return False
        if node.missed_a_write() is False:
            raise Difference(f'{node.name}: {error}: no reason for that')
        node.status_was(True)
        return True

    def _find(self, host: ModelHost, error: str) -> Node:
        """The node that an error is about."""
        name = named_node(error)
        for node in host.nodes:
            if node.name == name:
                return node
        raise Difference(f'{host.name}: "{error}" names no replication node')

    def check_status(self) -> None:
        """Compare what all hosts say about themselves with the model."""
        self.observe()
        for host in self.hosts.values():
            if host.is_running() and host.nodes:
                self._check_status(host)

    def _check_status(self, host: ModelHost) -> None:
        error = host.status()
        culprit = self._find(host, error) if error else None
        self.stats.checks += 1
        for node in host.nodes:
            bad = node.is_bad()
            if bad is not None and bad is not (node is culprit):
                raise Difference(
                    f'{host.name}: {node.name} ({node.stage.value}) must '
                    f"{'' if bad else 'not '}be reported, but status says "
                    f'{error}')
            if bad is None:
                node.status_was(node is culprit
                                and UNFLUSHED not in str(error))
            node.status_done()
            if node is culprit:
                # the status tells no more
                return

    def settle(self, disk: Disk) -> None:
        """Wait for the end of a failover, unless it is to last."""
        model = disk.secondary.model if disk.secondary else None
        if (not model or model.stage is not Stage.FAILOVER
                or disk.disk_image.slow):
            return
        host = disk.disk_host
        host.wait_until(lambda: not host.has_job(disk.node(DISK)),
                        'end of the merge')
        self._check_status(host)
        if model.stage is Stage.FAILOVER:
            model.merge_ended(True)
            if disk.primary:
                disk.primary.model.target_replaced()
        self.log(f'{host.name}: {model.name} is {model.stage.value}')

    # Requests

    def request(self, disk: Disk, side: str, write: Write,
                flag: str = '') -> None:
        """Write and look at the result from everywhere."""
        expected = self.may_write(disk, side, write)
        error = disk.clients[side].write(write, flag)
        self.log(f'{side}{disk.number}: {write.kind} {flag} {write.offset} '
                 f'+{len(write.data)}: {error or "done"}')
        done: Maybe = error is None
        if flag == 'fast' and disk.forwards(side):
            # refused before either side was touched
            self.expect(False, error is None, f'{side}: fast zeroes')
            return
        if flag == 'fast' and error:
            # not a failure, but what there is now nobody says
            expected, done = None, None
        self.expect(expected, error is None, f'{side}: {write.kind}')
        self.wrote(disk, side, write, done)
        if write.kind == 'trim' and flag == 'fua':
            # the discard may end at the quorum, but the flush goes on
            self.wrote(disk, side, Write('flush'), done)
        if disk.forwards(side) and self.rng.random() < 0.5:
            # it is still under way, perhaps
            return
        disk.drain()
        self.check_status()
        self.check_range(disk, write.offset, len(write.data))

    def may_write(self, disk: Disk, side: str, write: Write) -> Maybe:
        """Whether a write from this side succeeds."""
        if side == VIEW:
            assert disk.secondary
            serves = disk.secondary.model.serves()
            # discards may end at the quorum, and not each flush has something
            # to do
            idle = write.kind in ('trim', 'flush')
            return serves or (None if idle else serves)
        if side == LOCAL:
            return True
        return disk.target.primary_may_write(write.kind)

    def wrote(self, disk: Disk, side: str, write: Write, done: Maybe) -> None:
        """Tell the models that a write has ended."""
        if side == DISK:
            disk.target.primary_wrote(write, done)
        elif side == LOCAL:
            assert disk.primary
            before = write.before(disk.primary.local)
            write.apply(disk.primary.local, True)
            if disk.primary.attached:
                disk.primary.model.guest_wrote(
                    self._passed_on(disk, side, write, before))
        else:
            assert disk.secondary
            before = write.before(disk.secondary.model.view)
            disk.secondary.model.guest_wrote(write, bool(done))
            if disk.secondary.next:
                disk.secondary.next.guest_wrote(
                    self._passed_on(disk, side, write, before))

    def _passed_on(self, disk: Disk, side: str, write: Write,
                   before: Optional[bytes]) -> Write:
        """What a quorum with several children makes of a write.

        A discard becomes zeroes, or nothing, for all of them.
        """
        if write.kind != 'trim':
            return write
        content, _ = disk.expected(side)
        if not content.is_exact(*write.range()):
            self.compare(disk, side, *write.range())
        after = write.before(content)
        if after is None:
            # it cannot be read
            return write
        changed = before is not None and before != after
        return Write('write' if changed else 'idle', write.offset, after)

    # Comparing

    def check_range(self, disk: Disk, offset: int, length: int) -> None:
        """Where a write has left it open what is there now, find out."""
        for side in disk.clients:
            content, _ = disk.expected(side)
            if length and not content.is_exact(offset, length):
                self.compare(disk, side, offset, length)

    def compare(self, disk: Disk, side: str, offset: int,
                length: int) -> None:
        """Read from a side, and compare."""
        if side == DISK and not disk.target.disk_is_known():
            return
        if disk.reads_fenced(side):
            return
        if side in (DISK, VIEW):
            disk.drain()
        content, expected = disk.expected(side)
        data = disk.read(side, offset, length)
        what = f'{side}{disk.number}: read {offset} +{length}'
        self.expect(expected, data is not None, what)
        if data is not None:
            self.stats.compared += length
            demand(what, content, offset, data)
        elif (disk.primary and disk.primary.is_remote()
              and disk.primary.model.link):
            # the other host's NBD server has hung up, perhaps
            self.lose_link(disk, None)

    def compare_all(self, disk: Disk) -> None:
        """Compare every byte from every side."""
        for side in disk.sides():
            self.compare(disk, side, 0, disk.layout.size)

    # Faults

    def lose_link(self, disk: Disk, works: Maybe) -> None:
        """The link is lost, or may be."""
        assert disk.primary
        disk.primary.model.link = works
        self.quiesce()
        self.observe()

    def quiesce(self) -> None:
        """Wait for requests under way, whose client may have gone."""
        for host in self.hosts.values():
            if host.is_running():
                host.cmd('transaction', actions=[])

    def observe(self) -> None:
        """What is under way may fail, if anything can now."""
        for disk in self.disks:
            for _, node, _ in disk.primaries():
                node.observe()

    def host_of(self, disk: Disk, image: Image) -> ModelHost:
        """Where an image is open."""
        if disk.primary and image is disk.primary.image:
            return disk.primary.host
        return disk.disk_host

    @staticmethod
    def knock(host: ModelHost, node: str) -> None:
        """Switch what is behind a door."""
        host.add({'driver': 'raw', 'node-name': 'door', 'read-only': True,
                  'file': node})
        host.qemu_io('door', 'read 0 512')
        host.delete('door')

    def switch_fault(self, disk: Disk, kind: str) -> None:
        """Break the image, or mend it."""
        image = disk.images_of()[kind]
        self.knock(self.host_of(disk, image), f'{image.name}-fault')
        image.failing = not image.failing
        self.log(f"{image.name}: {image.kinds} "
                 f"{'fail' if image.failing else 'work'}")
        self.stats.faults += image.failing
        if kind != 'local':
            self.observe()
            disk.target.set_fault(kind, image.failing)
            self.observe()
        if not image.failing:
            # what has met the fault is not told of later
            disk.drain()

    def switch_speed(self, disk: Disk) -> None:
        """Make writes to the disk slow, or fast again."""
        image = disk.disk_image
        image.slow = not image.slow
        disk.disk_host.cmd('qom-set', {
            'path': f'/objects/{image.name}', 'property': 'limits',
            'value': {'bps-write': SLOW if image.slow else 0}})
        self.log(f"{image.name} is {'slow' if image.slow else 'fast'}")

    def mend(self) -> None:
        """End all faults, and what they have delayed."""
        for disk in self.disks:
            if disk.disk_image.slow:
                self.switch_speed(disk)
            self.settle(disk)
            for kind, image in disk.images_of().items():
                if image.failing:
                    self.switch_fault(disk, kind)
            if disk.secondary and disk.secondary.held:
                disk.secondary.hold(False)

    def may_break(self, disk: Disk) -> bool:
        """Whether a fault of this disk would be seen in the status.

        Only the first node that has an error is told of.
        """
        mine = disk.nodes()
        return not any(
            other.is_troubled() or other.is_suspect()
            for other in self.disks if other is not disk
        ) and all(node.is_bad() is False for host in self.hosts.values()
                  for node in host.nodes if node not in mine)

    def is_healthy(self) -> bool:
        """Whether there is no fault at all."""
        return all(disk.is_healthy() for disk in self.disks)

    def is_alone(self, disk: Disk) -> bool:
        """Whether the primary may still write to the disk."""
        return not disk.secondary or not disk.secondary.model.is_taken()

    def check_graph(self, host: ModelHost, before: List[str]) -> None:
        """What was refused must not leave a trace."""
        after = host.graph()
        lines = [f'-{line}' for line in before if line not in after]
        lines += [f'+{line}' for line in after if line not in before]
        if lines:
            raise Difference(f'{host.name}: the graph is another one:\n'
                             + '\n'.join(lines))
