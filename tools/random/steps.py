# SPDX-License-Identifier: GPL-2.0-or-later
"""What can happen to a pair, and how likely it is to happen next."""

from random import Random
from typing import Callable, List, NamedTuple, Optional, Tuple

import nodes
from disk import DISK, FORWARD, LOCAL, VIEW, Disk, demand
from disturb import disturb
from layout import KIB, MIB, pattern
from model import (Answer, Maybe, Op, PrimaryNode, SecondaryNode, Stage,
                   Write)
from modelhost import Difference, ModelHost
from nbdio import Request, pumped
from sequence import Sequence

KINDS = ['write', 'write', 'write', 'write', 'zero', 'zero', 'trim', 'flush']
ALIGNMENTS = [1, 1, 512, 4 * KIB, 64 * KIB]
LENGTHS = [1, 100, 512, 4 * KIB, 4 * KIB, 64 * KIB, 64 * KIB, 300 * KIB, MIB]
SLOTS = 16
COPIER = 'copier'
# So often a client is asked that may be about to connect again
TRIES = 10
# Bytes in which writes meet
CROWD = 900 * KIB

Weight = Callable[[Sequence, Disk], float]
Run = Callable[[Sequence, Disk], None]


class Choice(NamedTuple):
    """Something that can happen."""
    weight: Weight
    run: Run


STEPS: List[Choice] = []


def step(weight: Weight) -> Callable[[Run], Run]:
    """Make a function a step that is so likely, or impossible with 0."""
    def add(run: Run) -> Run:
        STEPS.append(Choice(weight, run))
        return run
    return add


def choose(seq: Sequence, disk: Disk) -> Run:
    """Any step that is possible now."""
    weights = [step.weight(seq, disk) for step in STEPS]
    return seq.rng.choices(STEPS, weights)[0].run


def model(disk: Disk) -> Optional[SecondaryNode]:
    """The secondary, if there is one."""
    return disk.secondary.model if disk.secondary else None


def stage(disk: Disk) -> Optional[Stage]:
    """The secondary's stage."""
    secondary = model(disk)
    return secondary.stage if secondary else None


def accepts(host: ModelHost, op: Op) -> bool:
    """Whether a node of the host would do something."""
    return any(node.answer(op) is Answer.ACCEPT for node in host.nodes)


def hosts(seq: Sequence) -> List[ModelHost]:
    """The hosts that have replication nodes, the primary first."""
    return [host for _, host in sorted(seq.hosts.items()) if host.nodes]


def mode_of(host: ModelHost) -> str:
    """How this host is started."""
    return host.nodes[-1].mode


# Requests


def random_range(rng: Random, size: int) -> Tuple[int, int]:
    """Offset and length of a request, of any alignment."""
    align = rng.choice(ALIGNMENTS)
    offset = rng.randrange(size) // align * align
    length = rng.randrange(rng.choice(LENGTHS)) + 1
    length = (length + align - 1) // align * align
    return offset, min(length, size - offset)


def random_write(rng: Random, offset: int, length: int) -> Write:
    """A request of any kind."""
    kind = rng.choice(KINDS)
    if kind == 'flush':
        return Write(kind)
    data = rng.randbytes(length) if kind == 'write' else bytes(length)
    return Write(kind, offset, data)


def random_flag(rng: Random, write: Write) -> str:
    """FUA, or a flag that only writes of zeroes know."""
    flags = ['', '', 'fua']
    if write.kind == 'zero':
        flags += ['no-hole', 'fast']
    return '' if write.kind == 'flush' else rng.choice(flags)


def primary_writes(disk: Disk) -> Optional[str]:
    """From where the primary writes."""
    if disk.primary:
        return LOCAL
    return DISK if disk.exported else None


def one_request(seq: Sequence, disk: Disk, side: str) -> None:
    """A request from one side."""
    write = random_write(seq.rng, *random_range(seq.rng, disk.layout.size))
    seq.request(disk, side, write, random_flag(seq.rng, write))


@step(lambda _seq, disk: 0 if not disk.secondary else
      1 if disk.secondary.model.serves() is False else 6)
def guest_writes(seq: Sequence, disk: Disk) -> None:
    """The secondary guest does."""
    one_request(seq, disk, VIEW)


@step(lambda _seq, disk: 6 if primary_writes(disk) else 0)
def primary_guest_writes(seq: Sequence, disk: Disk) -> None:
    """The primary guest does."""
    side = primary_writes(disk)
    assert side
    one_request(seq, disk, side)


@step(lambda _seq, _disk: 2)
def read(seq: Sequence, disk: Disk) -> None:
    """Somebody reads."""
    side = seq.rng.choice(disk.sides())
    offset, length = random_range(seq.rng, disk.layout.size)
    seq.log(f'read {side}{disk.number} {offset} +{length}')
    seq.compare(disk, side, offset, length)


@step(lambda _seq, _disk: 1)
def read_all(seq: Sequence, disk: Disk) -> None:
    """Everybody reads everything."""
    seq.log('read all')
    seq.compare_all(disk)


def covered(writes: List[Write], start: int, data: bytes) -> bytes:
    """What must be there, which is what was found if that can be.

    Writes are done one after another.  So where several meet, there is what
    one of them has.
    """
    right = bytearray(data)
    spans = [(write, write.offset - start,
              write.offset - start + len(write.data)) for write in writes]
    edges = sorted({edge for span in spans for edge in span[1:]})
    for first, last in zip(edges, edges[1:]):
        values = [write.data[first - begin:last - begin]
                  for write, begin, end in spans
                  if begin <= first and last <= end]
        if values and data[first:last] not in values:
            right[first:last] = values[0]
    return bytes(right)


def overlaps(disk: Disk) -> bool:
    """Whether the order of writes is all that is not known."""
    primary = disk.primary
    return bool(primary and primary.attached and not primary.image.failing
                and (primary.model.failed or primary.model.missed
                     or primary.model.failed is False
                     and primary.model.arrives()))


@step(lambda _seq, disk: 2 if overlaps(disk) else 0)
def overlap(seq: Sequence, disk: Disk) -> None:
    """Writes of two clients to the same place are in flight at once."""
    assert disk.primary
    seq.compare(disk, LOCAL, 0, disk.layout.size)
    clients = [disk.clients[LOCAL],
               disk.primary.host.connect(disk.node(LOCAL))]
    start = seq.rng.randrange(disk.layout.size - CROWD) // 512 * 512
    writes, requests = [], []
    for number in range(seq.rng.randrange(2, 17)):
        first, last = sorted(seq.rng.sample(range(CROWD + 1), 2))
        kind = seq.rng.choice(['write', 'write', 'zero'])
        data = bytes(last - first)
        if kind == 'write':
            data = seq.rng.randbytes(last - first)
        writes.append(Write(kind, start + first, data))
        client = clients[number % 2]
        requests.append((client, client.submit(writes[-1])))
        seq.log(f'overlap {kind} {writes[-1].offset} +{len(data)}')
    with pumped(clients[1:]):
        errors = [client.wait(request) for client, request in requests[::2]]
    errors += [client.wait(request) for client, request in requests[1::2]]
    clients[1].close()
    seq.expect(True, errors == [None] * len(errors), f'overlapping {errors}')
    data = disk.read(LOCAL, start, CROWD) or b''
    # what both disks must have
    all_of_it = Write('write', start, covered(writes, start, data))
    disk.primary.local.write(start, all_of_it.data)
    disk.primary.model.guest_wrote(all_of_it)
    seq.compare_all(disk)


# The registry


def some_hosts(seq: Sequence) -> List[ModelHost]:
    """All, or one."""
    some = hosts(seq)
    return some if seq.rng.random() < 0.7 else [seq.rng.choice(some)]


@step(lambda seq, _disk: 6 if any(accepts(host, Op.START)
                                  for host in hosts(seq)) else 1)
def start(seq: Sequence, _disk: Disk) -> None:
    """Start, as COLO does, or by mistake in the wrong mode."""
    for host in reversed(some_hosts(seq)):
        mode = mode_of(host)
        if seq.rng.random() < 0.1:
            mode = 'primary' if mode == 'secondary' else 'secondary'
        seq.call(host, Op.START, mode)


@step(lambda seq, _disk: 4 if any(accepts(host, Op.CHECKPOINT)
                                  for host in hosts(seq)) else 1)
def checkpoint(seq: Sequence, _disk: Disk) -> None:
    """A checkpoint, by a primary that gives up when its own part fails."""
    for host in some_hosts(seq):
        if not seq.call(host, Op.CHECKPOINT, mode_of(host)):
            return


@step(lambda _seq, disk: 4 if stage(disk) is Stage.BROKEN else 0.7)
def stop(seq: Sequence, _disk: Disk) -> None:
    """An orderly end."""
    for host in some_hosts(seq):
        seq.call(host, Op.STOP, mode_of(host))


def part(seq: Sequence) -> None:
    """Perhaps the primary has gone already, or cannot write any more."""
    if seq.rng.random() < 0.3 and seq.hosts['a'].nodes:
        seq.call(seq.hosts['a'], Op.FAILOVER, 'primary')
    for disk in seq.disks:
        if disk.exported and seq.rng.random() < 0.3:
            cut_off(seq, disk)


def cut_off(seq: Sequence, disk: Disk) -> None:
    """The way to the secondary's disk is gone, also for what is under way."""
    seq.log(f'unexport disk{disk.number}')
    disk.unexport_disk()
    seq.observe()
    disk.drain()
    seq.check_status()


@step(lambda _seq, disk: 0 if not disk.secondary else
      4 if stage(disk) is Stage.FAILED else 1)
def fail_over(seq: Sequence, _disk: Disk) -> None:
    """The primary is lost."""
    host = seq.hosts['b']
    if accepts(host, Op.FAILOVER):
        part(seq)
    seq.call(host, Op.FAILOVER, 'secondary')


@step(lambda _seq, disk: 0.4 if disk.primary else 0)
def go_on_alone(seq: Sequence, _disk: Disk) -> None:
    """The secondary is lost."""
    seq.call(seq.hosts['a'], Op.FAILOVER, 'primary')


# Writes that race a call


class Racer(NamedTuple):
    """A write under way."""
    side: str
    write: Write
    request: Request
    expected: Maybe


def begin(seq: Sequence, disk: Disk, side: str, slot: int) -> Racer:
    """Send a write within one part of the disk, and do not wait."""
    size = disk.layout.size // SLOTS
    start_, length = random_range(seq.rng, size)
    write = random_write(seq.rng, slot * size + start_, length)
    seq.log(f'race {side}{disk.number}: {write.kind} {write.offset} '
            f'+{len(write.data)}')
    expected = seq.may_write(disk, side, write)
    if side == VIEW:
        assert disk.secondary
        write.apply(disk.secondary.model.view, None)
    elif side == LOCAL:
        assert disk.primary
        write.apply(disk.primary.local, None)
        if disk.primary.attached:
            disk.primary.model.guest_began(write)
    else:
        disk.target.primary_began(write)
    return Racer(side, write, disk.clients[side].submit(write), expected)


def finish(seq: Sequence, disk: Disk, racer: Racer, error: Optional[str],
           renewed: Optional[Op]) -> None:
    """A write has ended that may have come before or after a call.

    If the call was one that empties the overlays, it is in renewed.
    """
    now = seq.may_write(disk, racer.side, racer.write)
    expected = now if now is racer.expected else None
    what = f'{racer.side}: {racer.write.kind} {racer.write.offset}'
    seq.log(f'{what}: {error or "done"}')
    seq.expect(expected, error is None, what)
    if racer.side == VIEW and renewed:
        # the call may have thrown it away
        view = disk.target
        assert isinstance(view, SecondaryNode)
        racer.write.apply(view.view, None)
        view.shadowed |= view.stage is Stage.STOPPED
    else:
        # what failed before the start is not held against the secondary
        failed = None if renewed is Op.START else False
        if renewed is Op.START and disk.primary:
            # and what arrived in the middle of one that failed, may have met
            # a fault of hidden
            disk.primary.model.began[racer.write.range()] = None
        seq.wrote(disk, racer.side, racer.write, error is None or failed)
    if racer.side != VIEW and renewed and disk.secondary:
        racer.write.apply(disk.secondary.model.view, None)


def race_calls(seq: Sequence, disk: Disk) -> List[Tuple[ModelHost, Op]]:
    """Calls that may meet writes under way.

    Not those by which a write could be forwarded or not, as it happens.
    """
    calls: List[Tuple[ModelHost, Op]] = []
    primaries: List[Tuple[ModelHost, PrimaryNode]] = []
    if disk.primary:
        primaries.append((disk.primary.host, disk.primary.model))
    if disk.secondary and disk.secondary.next:
        primaries.append((disk.disk_host, disk.secondary.next))
    elif disk.secondary:
        ops = [Op.START, Op.CHECKPOINT, Op.CHECKPOINT, Op.STOP, Op.FAILOVER]
        calls = [(disk.disk_host, op) for op in ops]
    for host, node in primaries:
        if node.forwards():
            calls += [(host, Op.START), (host, Op.CHECKPOINT)]
    return [call for call in calls if accepts(*call)]


@step(lambda seq, disk: 4 if race_calls(seq, disk) else 0)
def race(seq: Sequence, disk: Disk) -> None:
    """Writes are in flight when a call is made."""
    host, op = seq.rng.choice(race_calls(seq, disk))
    if op is Op.FAILOVER:
        part(seq)
    sides = [VIEW] if disk.secondary and VIEW in disk.clients else []
    primary = primary_writes(disk)
    if primary:
        sides.append(primary)
    slots = seq.rng.sample(range(SLOTS), seq.rng.randrange(1, 8))
    slow = seq.rng.random() < 0.3 and not disk.disk_image.slow
    if slow:
        seq.switch_speed(disk)
    racers = [begin(seq, disk, seq.rng.choice(sides), slot)
              for slot in slots if sides]
    secondary = model(disk)
    epoch = secondary.epoch if secondary else 0
    clients = {racer.side: disk.clients[racer.side] for racer in racers}
    with pumped(clients.values()):
        seq.call(host, op, mode_of(host))
    renewed = secondary is not None and secondary.epoch != epoch
    errors = [disk.clients[racer.side].wait(racer.request)
              for racer in racers]
    for racer, error in zip(racers, errors):
        finish(seq, disk, racer, error, op if renewed else None)
    if slow:
        seq.switch_speed(disk)
    seq.settle(disk)
    seq.check_status()
    for racer in racers:
        seq.check_range(disk, racer.write.offset, len(racer.write.data))


# Faults


def breakable(disk: Disk) -> List[str]:
    """What could fail now, and has a consequence.

    A quorum hides that its local disk fails to write.
    """
    images = disk.images_of()
    if disk.secondary and disk.secondary.next:
        del images['disk']
    return sorted(kind for kind in images if not images[kind].failing)


@step(lambda seq, disk: 1.2 if seq.may_break(disk) and breakable(disk) else 0)
def break_image(seq: Sequence, disk: Disk) -> None:
    """Something fails from now on."""
    seq.switch_fault(disk, seq.rng.choice(breakable(disk)))


@step(lambda _seq, disk: 2 * sum(image.failing for image
                                 in disk.images_of().values()))
def mend_image(seq: Sequence, disk: Disk) -> None:
    """Something works again."""
    failing = [kind for kind, image in disk.images_of().items()
               if image.failing]
    seq.switch_fault(disk, seq.rng.choice(failing))


@step(lambda _seq, disk: 2 if disk.disk_image.slow else
      0.6 if disk.secondary else 0)
def change_speed(seq: Sequence, disk: Disk) -> None:
    """A merge takes long, or no more."""
    seq.switch_speed(disk)


@step(lambda seq, disk: 0.6 if disk.primary and disk.primary.attached
      and disk.primary.is_remote() and disk.primary.model.link
      and seq.may_break(disk) else 0)
def break_link(seq: Sequence, disk: Disk) -> None:
    """The connection breaks, for good."""
    assert disk.primary
    seq.log(f'yank link{disk.number}')
    yank(seq, disk)
    seq.stats.faults += 1


@step(lambda seq, disk: 0.5 if disk.exported and seq.may_break(disk) else 0)
def unexport(seq: Sequence, disk: Disk) -> None:
    """The way to the secondary's disk is gone."""
    cut_off(seq, disk)
    seq.stats.faults += 1


@step(lambda seq, disk: 0 if disk.exported
      or (disk.primary and not disk.primary.is_remote()) else
      3 if seq.is_alone(disk) else 0.5)
def export(seq: Sequence, disk: Disk) -> None:
    """It is there again, unless that would go past the checkpoint."""
    seq.log(f'export disk{disk.number}')
    if seq.is_alone(disk) and stage(disk) is not Stage.RUNNING:
        disk.export_disk()
        return
    host = disk.disk_host
    error = host.attempt('block-export-add', {
        'type': 'nbd', 'id': 'export-past', 'name': 'past',
        'node-name': disk.node(DISK), 'writable': True})
    seq.log(f'export: {error or "done"}')
    # after the merge it is for the guest's device to say who may share it;
    # a slow one may have ended by now
    merged = stage(disk) is Stage.DONE or (
        stage(disk) is Stage.FAILOVER and not host.has_job(disk.node(DISK)))
    expected = None if merged else False
    seq.expect(expected, error is None, 'a second way to the disk')
    if error is None:
        host.unexport('past')


@step(lambda seq, disk: 0 if not disk.secondary else
      3 if disk.secondary.held else
      0.4 if seq.may_break(disk) and not disk.secondary.model.suspect
      and stage(disk) not in (Stage.FAILOVER, Stage.DONE) else 0)
def hold(seq: Sequence, disk: Disk) -> None:
    """Somebody else uses hidden, or lets go."""
    assert disk.secondary
    disk.secondary.hold(not disk.secondary.held)
    seq.log(f'hold hidden{disk.number}: {disk.secondary.held}')


def is_sound(seq: Sequence, disk: Disk) -> bool:
    """Whether all that the primary writes arrives, and is known to."""
    primary = disk.primary
    return bool(primary and primary.attached and seq.is_healthy()
                and not disk.disk_image.slow and seq.may_break(disk)
                and not primary.model.is_bad() and primary.model.forwards()
                and primary.model.failed is primary.model.missed is False
                and not primary.model.doomed and primary.model.arrives())


@step(lambda seq, disk: 1 if is_sound(seq, disk) else 0)
def lose_local_disk(seq: Sequence, disk: Disk) -> None:
    """The local disk fails a write, and the guest goes on with the target."""
    primary = disk.primary
    assert primary
    seq.log(f'writes to {primary.image.name} fail')
    disk.drain()
    seq.check_status()
    seq.knock(primary.host, f'{primary.image.name}-write-fault')
    seq.stats.faults += 1
    offset, length = random_range(seq.rng, disk.layout.size)
    write = Write('write', offset, seq.rng.randbytes(length))
    error = disk.clients[LOCAL].write(write)
    seq.log(f'local: write {offset} +{length}: {error or "done"}')
    # only a copy that can be read is one
    seq.expect(primary.model.stage is Stage.RUNNING, error is None,
               'a write that the local disk fails')
    primary.stale = primary.model.relied_on = error is None
    if error is None:
        seq.wrote(disk, LOCAL, write, True)
        go_on_with_target(seq, disk)
    else:
        # the guest expects either, and who was dropped has it or not
        write.apply(primary.local, None)
        disk.target.primary_began(write)
        primary.model.missed = True
        seq.knock(primary.host, f'{primary.image.name}-write-fault')
    seq.compare_all(disk)


def go_on_with_target(seq: Sequence, disk: Disk) -> None:
    """Writes and checkpoints without the local disk, and what ends that."""
    primary = disk.primary
    assert primary
    for _ in range(seq.rng.randrange(4)):
        one_request(seq, disk, LOCAL)
    if seq.rng.random() < 0.5:
        checkpoint(seq, disk)
    seq.compare_all(disk)
    # what is under way may be lost with the link, but not what was flushed
    seq.request(disk, LOCAL, Write('flush'))
    disk.drain()
    seq.check_status()
    if not primary.is_remote() or not is_sound(seq, disk) \
            or seq.rng.random() < 0.6:
        seq.log(f'replace {primary.image.name}')
        primary.replace_local()
        return
    seq.log(f'yank link{disk.number}')
    yank(seq, disk)
    # old data would be worse than none
    seq.compare(disk, LOCAL, 0, disk.layout.size)
    error = disk.clients[LOCAL].write(Write('write', 0, b'lost'), 'fua')
    seq.expect(False, error is None, 'a write to no disk')
    seq.log(f'begin anew with disk{disk.number}')
    disk.renew_primary()
    disk.attach()


def yank(seq: Sequence, disk: Disk) -> None:
    """The connection breaks, for good."""
    assert disk.primary
    disk.primary.host.cmd('yank', instances=[
        {'type': 'block-node', 'node-name': disk.node('link')}])
    seq.lose_link(disk, False)


def read_lost_link(seq: Sequence, disk: Disk) -> None:
    """Somebody else uses the link, and would have it connect again."""
    assert disk.primary
    host = disk.primary.host
    host.export(disk.primary.child(), 'visit', writable=False)
    client = host.connect('visit')
    found = [client.read(0, 512) for _ in range(TRIES)]
    client.close()
    host.unexport('visit')
    seq.expect(False, any(found), 'a read through a link that was lost')


@step(lambda seq, disk: 1 if is_sound(seq, disk) and disk.exported
      and disk.primary and disk.primary.is_remote() else 0)
def change_server(seq: Sequence, disk: Disk) -> None:
    """The connection breaks, and another disk is where it led to."""
    primary = disk.primary
    assert primary
    host, other, name = primary.host, disk.node('other'), disk.node(DISK)
    seq.log(f'another server for {name}')
    data = pattern(disk.layout.size, seq.rng)
    path = disk.folder / other
    path.write_bytes(data)
    host.add(nodes.image('raw', other, nodes.file(path)))
    host.export(other, name)
    primary.lead_to(host)
    if seq.rng.random() < 0.3:
        yank(seq, disk)
    else:
        cut_off(seq, disk)
    if seq.rng.random() < 0.5:
        read_lost_link(seq, disk)
    for _ in range(seq.rng.randrange(3)):
        one_request(seq, disk, LOCAL)
    if seq.rng.random() < 0.5:
        checkpoint(seq, disk)
    seq.compare_all(disk)
    disk.drain()
    host.unexport(name)
    host.delete(other)
    primary.lead_to(disk.disk_host)
    if path.read_bytes() != data:
        raise Difference(f'{host.name}: another disk was written to')


# The graph


@step(lambda seq, disk: 0.4 if disk.primaries() and seq.may_break(disk) else 0)
def lead_past(seq: Sequence, disk: Disk) -> None:
    """The primary node is taken out, perhaps for a write, and put back."""
    host, node, side = disk.primaries()[0]
    seq.log(f'take {node.name} out')
    disk.drain()
    if side == LOCAL:
        # only who has no parent can be put back
        disk.unexport(FORWARD, host)
    host.cmd('x-blockdev-change', parent=disk.node(side), child='children.1')
    node.missed = True
    seq.check_status()
    for _ in range(seq.rng.randrange(3)):
        write = random_write(seq.rng, *random_range(seq.rng, disk.layout.size))
        seq.request(disk, side, write)
    seq.log(f'put {node.name} back')
    host.cmd('x-blockdev-change', parent=disk.node(side), node=node.name)
    if side == LOCAL:
        disk.export_forward()


@step(lambda _seq, disk: 1.5 if stage(disk) in (Stage.RUNNING, Stage.FAILED)
      else 0)
def take_apart(seq: Sequence, disk: Disk) -> None:
    """A command that would take the chain apart."""
    disturb(seq, disk)


def copies_on_read(disk: Disk) -> bool:
    """Whether reads of the guest's data succeed."""
    secondary = model(disk)
    return (secondary is not None and secondary.serves() is True
            and secondary.stage in (Stage.RUNNING, Stage.STOPPED))


@step(lambda _seq, disk: 1 if copies_on_read(disk) else 0)
def copy_on_read(seq: Sequence, disk: Disk) -> None:
    """A filter copies to the active overlay what is read through it."""
    assert disk.secondary
    secondary, host = disk.secondary.model, disk.disk_host
    kind = seq.rng.choice([VIEW, 'active'])
    error = host.attempt('blockdev-add', {
        'driver': 'copy-on-read', 'node-name': COPIER,
        'file': disk.node(kind)})
    seq.log(f'copy on read above {kind}{disk.number}: {error or "done"}')
    # who comes to an overlay while it is in use may not change it
    allowed = kind == VIEW or secondary.stage is Stage.STOPPED
    seq.expect(allowed or None, error is None, f'a copy-on-read node: {error}')
    if error is not None:
        return
    read_through(seq, disk, COPIER)
    host.delete(COPIER)


@step(lambda _seq, disk: 0.5 if copies_on_read(disk) else
      0.3 if disk.secondary and disk.secondary.copier else 0)
def keep_copying(seq: Sequence, disk: Disk) -> None:
    """A filter stays above active, is read through, or goes."""
    chain = disk.secondary
    assert chain
    if not chain.copier:
        error = chain.keep_copier()
        seq.log(f'a copier of active{disk.number}: {error or "done"}')
        seq.expect(chain.model.stage is Stage.STOPPED or None, error is None,
                   f'a copy-on-read node: {error}')
    elif not copies_on_read(disk) or seq.rng.random() < 0.3:
        seq.log(f'no copier of active{disk.number} any more')
        chain.drop_copier()
    if chain.copier and copies_on_read(disk):
        read_through(seq, disk, disk.node('copier'))


def read_through(seq: Sequence, disk: Disk, node: str) -> None:
    """Read through a copier, which has the guest's data."""
    assert disk.secondary
    secondary = disk.secondary.model
    offset, length = random_range(seq.rng, disk.layout.size)
    seq.log(f'read {offset} +{length} through {node}')
    disk.drain()
    with disk.visit(node) as client:
        data = client.read(offset, length)
    # what it has copied, the primary's writes do not change any more
    secondary.shadowed |= secondary.stage is Stage.STOPPED
    seq.expect(True, data is not None, f'read through {node}')
    demand(f'read through {node}', secondary.view, offset, data or b'')


def change_thread(seq: Sequence, disk: Disk, thread: Optional[str]) -> None:
    """The guest's node goes to another thread."""
    error = disk.disk_host.attempt('x-blockdev-set-iothread', {
        'node-name': disk.node(VIEW), 'iothread': thread, 'force': True})
    seq.log(f'move {VIEW}{disk.number} to {thread}: {error or "done"}')
    seq.expect(None, error is None, 'a move')


@step(lambda _seq, disk: 3 if stage(disk) is Stage.FAILOVER else 0)
def change_thread_once(seq: Sequence, disk: Disk) -> None:
    """It does while the merge goes on."""
    change_thread(seq, disk, seq.rng.choice(['iothread0', None]))
    seq.compare(disk, VIEW, 0, disk.layout.size)


@step(lambda seq, disk: 0.7 if stage(disk) is Stage.RUNNING
      and not disk.disk_image.slow and seq.is_healthy() else 0)
def change_threads(seq: Sequence, disk: Disk) -> None:
    """It does all the time until the merge has ended."""
    size = min(disk.layout.size, MIB)
    seq.request(disk, VIEW, Write('write', 0, seq.rng.randbytes(size)))
    if seq.rng.random() < 0.3:
        seq.switch_speed(disk)
    host = disk.disk_host
    seq.call(host, Op.FAILOVER, mode_of(host))
    moves = seq.rng.randrange(20)

    def ended() -> bool:
        nonlocal moves
        for thread in ('iothread0', None):
            change_thread(seq, disk, thread)
        moves -= 2
        if moves < 0 and disk.disk_image.slow:
            seq.switch_speed(disk)
        return not host.has_job(disk.node(DISK))

    host.wait_until(ended, 'end of the merge')
    if disk.disk_image.slow:
        seq.switch_speed(disk)
    seq.settle(disk)
    seq.compare_all(disk)


def resynchronise(seq: Sequence, disk: Disk) -> None:
    """Copy the primary's disk to the target."""
    assert disk.primary
    seq.compare(disk, LOCAL, 0, disk.layout.size)
    write = Write('write', 0, bytes(disk.primary.local.data))
    seq.log(f'resynchronise disk{disk.number}')
    disk.overwrite(write)


@step(lambda seq, disk: 0 if not seq.is_healthy() or disk.disk_image.slow
      or stage(disk) is Stage.RUNNING and not disk.primary else
      3 if any(node.is_bad() for node in disk.nodes()) else 0.5)
def rebuild(seq: Sequence, disk: Disk) -> None:
    """New nodes, new overlays, and all data copied anew."""
    seq.log(f'rebuild {disk.number}')
    disk.drain()
    if disk.primary and disk.primary.attached:
        disk.detach()
    fenced = not seq.is_alone(disk) and disk.exported
    early = seq.rng.random() < 0.5
    if fenced and early:
        cut_off(seq, disk)
    if disk.secondary and stage(disk) is not Stage.RUNNING:
        disk.replace_secondary()
    if fenced and not early:
        # it outlives the secondary
        cut_off(seq, disk)
    if stage(disk) is Stage.RUNNING and not disk.exported:
        # it can be protected again after a stop
        return
    if not disk.exported:
        disk.export_disk()
    if disk.primary:
        resynchronise(seq, disk)
        disk.attach()


@step(lambda seq, disk: 2 if disk.secondary and disk.layout.top == 'quorum'
      and stage(disk) is Stage.DONE and not disk.secondary.next
      and seq.is_healthy() else 0)
def swap_roles(seq: Sequence, disk: Disk) -> None:
    """The promoted secondary becomes a primary."""
    assert disk.secondary
    seq.log(f'next primary {disk.number}')
    disk.secondary.attach_next()
