# SPDX-License-Identifier: GPL-2.0-or-later
"""
What a pair of hosts has to do, after docs/block-replication.txt.

The model knows what every read must return, which calls must succeed and what
the status must say.  Where a fault leaves open how something ended, the model
allows both until it is told which it was.
"""

import enum
from typing import Dict, List, NamedTuple, Optional, Set, Tuple

# Compared at a time
BLOCK = 4096

# True: it must be so.  False: it must not.  None: either is right.
Maybe = Optional[bool]


class Stage(enum.Enum):
    """Where a replication node stands."""
    NONE = 'none'
    RUNNING = 'running'
    STOPPED = 'stopped'
    BROKEN = 'broken'
    FAILOVER = 'failover'
    FAILED = 'failover failed'
    DONE = 'done'


class Op(enum.Enum):
    """What the registry is asked for."""
    START = 'start'
    CHECKPOINT = 'checkpoint'
    STOP = 'stop'
    FAILOVER = 'failover'


class Answer(enum.Enum):
    """What a node does with a call."""
    REFUSE = 'refuse'
    ACCEPT = 'accept'
    IGNORE = 'ignore'


# Stages in which a call is accepted, and in which it succeeds without effect;
# it is refused in all others.
ACCEPTED: Dict[Op, Set[Stage]] = {
    Op.START: {Stage.NONE, Stage.STOPPED},
    Op.CHECKPOINT: {Stage.RUNNING},
    Op.STOP: {Stage.RUNNING, Stage.BROKEN},
    Op.FAILOVER: {Stage.RUNNING, Stage.FAILED},
}
IGNORED: Dict[Op, Set[Stage]] = {
    Op.START: {Stage.FAILOVER, Stage.DONE},
    Op.CHECKPOINT: {Stage.FAILOVER, Stage.DONE},
    Op.STOP: {Stage.FAILOVER, Stage.DONE, Stage.STOPPED},
    Op.FAILOVER: {Stage.FAILOVER, Stage.DONE, Stage.STOPPED},
}


# Of these, nobody can tell whether they are sent
IDLE = 'flush', 'idle', 'trim'


def either(one: Maybe, other: Maybe) -> Maybe:
    """Whether one of two is so."""
    return one or other or (None if None in (one, other) else False)


class Content:
    """Bytes, some of which may be one of two values, or anything."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self.other = bytearray(data)
        self.loose = bytearray(len(data))

    def assign(self, source: 'Content') -> None:
        """Become the same as another."""
        self.data[:] = source.data
        self.other[:] = source.other
        self.loose[:] = source.loose

    def write(self, offset: int, data: bytes) -> None:
        """From now on this is what has to be there."""
        end = offset + len(data)
        self.data[offset:end] = data
        self.other[offset:end] = data
        self.loose[offset:end] = bytes(len(data))

    def maybe(self, offset: int, data: bytes) -> None:
        """This may be there now, or what was there before."""
        if self.is_exact(offset, len(data)):
            self.other[offset:offset + len(data)] = data
            return
        for i, new in enumerate(data, offset):
            if self.data[i] == self.other[i]:
                self.other[i] = new
            elif new not in (self.data[i], self.other[i]):
                self.loose[i] = 1

    def is_exact(self, offset: int, length: int) -> bool:
        """Whether there is only one right value for each of these bytes."""
        end = offset + length
        return (self.data[offset:end] == self.other[offset:end]
                and not any(self.loose[offset:end]))

    def find_wrong(self, offset: int, found: bytes) -> Optional[int]:
        """Where what was read is not what may be there; else believe it."""
        for start in range(0, len(found), BLOCK):
            block = found[start:start + BLOCK]
            wrong = self._find_wrong(offset + start, block)
            if wrong is not None:
                return wrong
        self.write(offset, found)
        return None

    def _find_wrong(self, offset: int, found: bytes) -> Optional[int]:
        end = offset + len(found)
        if found in (self.data[offset:end], self.other[offset:end]):
            return None
        for i, byte in enumerate(found, offset):
            if (byte not in (self.data[i], self.other[i])
                    and not self.loose[i]):
                return i
        return None


class Write(NamedTuple):
    """
    A request that changes a disk.  A flush changes no byte of it.

    Idle is a discard that found there already what it left.
    """
    kind: str
    offset: int = 0
    data: bytes = b''

    def range(self) -> Tuple[int, int]:
        """Offset and length."""
        return self.offset, len(self.data)

    def before(self, content: Content) -> Optional[bytes]:
        """What there is in its range, if that is known."""
        if not content.is_exact(*self.range()):
            return None
        return bytes(content.data[self.offset:self.offset + len(self.data)])

    def apply(self, content: Content, done: Maybe) -> None:
        """Nobody promises what a discard leaves there."""
        if self.kind == 'trim' or not done:
            content.maybe(self.offset, self.data)
            if self.kind == 'write':
                # qcow2 may zero a cluster before it writes to it
                content.maybe(self.offset, bytes(len(self.data)))
        else:
            content.write(self.offset, self.data)


class Target:
    """A disk that the primary's writes go to."""

    def __init__(self, data: bytes) -> None:
        self.disk = Content(data)
        # Which of the nodes below may fail now
        self.faults: Set[str] = set()

    def primary_may_write(self, _kind: str = 'write') -> Maybe:
        """Whether a write of the primary succeeds."""
        return None if 'disk' in self.faults else True

    def primary_wrote(self, write: Write, done: Maybe) -> None:
        """The primary has written, or tried to."""
        write.apply(self.disk, done)

    def primary_began(self, write: Write) -> None:
        """A write is under way that primary_wrote() will tell of."""
        write.apply(self.disk, None)

    def disk_is_known(self) -> bool:
        """Whether the model can tell what the disk has."""
        return True

    def set_fault(self, name: str, on: bool) -> None:
        """From now on something may fail, or nothing of that name does."""
        if on:
            self.faults.add(name)
        else:
            self.faults.discard(name)


class Node:
    """A replication node, of either mode."""
    mode = ''

    def __init__(self, name: str) -> None:
        self.name = name
        self.stage = Stage.NONE

    def answer(self, op: Op) -> Answer:
        """What this stage does with a call."""
        if self.stage in ACCEPTED[op]:
            return Answer.ACCEPT
        if self.stage in IGNORED[op]:
            return Answer.IGNORE
        return Answer.REFUSE

    def allows(self, op: Op, mode: str) -> Maybe:
        """Whether a call succeeds."""
        answer = self.answer(op)
        if answer is not Answer.ACCEPT:
            return answer is Answer.IGNORE
        if op is Op.START and mode != self.mode:
            return False
        return self.allows_here(op)

    def called(self, op: Op, done: bool) -> None:
        """A call has been made and ended so."""
        if self.answer(op) is Answer.ACCEPT:
            self.called_here(op, done)

    def allows_here(self, op: Op) -> Maybe:
        """The same for a call that the stage accepts."""
        raise NotImplementedError

    def called_here(self, op: Op, done: bool) -> None:
        """The same for a call that the stage accepts."""
        raise NotImplementedError

    def start_lost(self) -> None:
        """Started, but the first checkpoint of some disk failed."""

    def disowned(self) -> None:
        """The checkpoint of another disk failed half-way."""

    def missed_a_write(self) -> Maybe:
        """Whether what the primary wrote is not on the target."""
        raise NotImplementedError

    def is_bad(self) -> Maybe:
        """Whether the status names this node."""
        raise NotImplementedError

    def status_was(self, bad: bool) -> None:
        """The status has told, where either was right."""
        raise NotImplementedError

    def status_done(self) -> None:
        """The status has been asked for."""


class PrimaryNode(Node):
    """Forwards the guest's writes to a target."""
    mode = 'primary'

    def __init__(self, name: str, local: Content, target: Target,
                 behind: bool = False, remote: bool = False) -> None:
        super().__init__(name)
        self.local = local
        self.target = target
        self.remote = remote
        # Whether writes end before they have arrived; which of them are not
        # known to have, and whether they have all arrived or failed
        self.behind = behind
        self.under_way: List[Write] = []
        self.quiet = True
        # Some of them cannot arrive
        self.doomed = False
        # Whether a request was not forwarded: it failed, or was not tried
        self.failed: Maybe = False
        self.missed: Maybe = False
        # Whether the guest's data was nowhere else for a while: then it can
        # be read after a stop, too
        self.relied_on = False
        # Whether the link works: it must, may not or does not, for good
        self.link: Maybe = True
        # Writes of which we will hear whether all of them have arrived
        self.pending: List[Write] = []
        # Whether writes under way, by their range, could arrive at first
        self.began: Dict[Tuple[int, int], Maybe] = {}

    def forwards(self) -> bool:
        """Whether writes go to the target in this stage."""
        return self.stage in (Stage.NONE, Stage.RUNNING)

    def takes(self, write: Write) -> bool:
        """Whether the stage has a request sent on."""
        return self.forwards() or write.kind == 'flush'

    def guest_wrote(self, write: Write) -> None:
        """The guest has written, and a failure of the target is no matter."""
        done = self.arrives(write.kind)
        if self.began.pop(write.range(), done) is not done:
            done = None
        if write.kind in IDLE and not done:
            done = None
        if not self.takes(write):
            # refused, so that the quorum leaves this node behind
            self.missed = self.missed or (
                None if write.kind in ('idle', 'trim') else True)
            return
        if self.failed or self.missed:
            # nothing is sent any more
            return
        if self.behind:
            self.sent(write, done)
            return
        if self.failed is None and done:
            # unless another had failed
            done = None
        if done is None and self.failed is False:
            self.failed = None
        if done is None and self.failed is None:
            self.pending.append(write)
        if done is False:
            self.failed = True
            return
        self.target.primary_wrote(write, done)

    def sent(self, write: Write, done: Maybe) -> None:
        """A write that has ended for the guest is under way."""
        self.under_way.append(write)
        self.quiet = False
        self.doomed |= done is False
        if done is None:
            self.failed = self.failed or None
        self.target.primary_began(write)
        self.observe()

    def observe(self) -> None:
        """Something may fail from now on, or still: what is under way, too."""
        if self.quiet or self.arrives():
            return
        self.failed = self.failed or None
        for write in self.under_way:
            self.target.primary_began(write)

    def drained(self) -> None:
        """Nothing is under way any more."""
        self.quiet = True
        if self.doomed:
            self.failed, self.doomed = True, False
        if self.failed is False:
            self.all_arrived()

    def all_arrived(self) -> None:
        """No write under way has failed."""
        for write in self.under_way:
            self.target.primary_wrote(write, True)
        self.under_way.clear()

    def target_replaced(self) -> None:
        """A failover has undone what arrived and what, perhaps, did not."""
        self.under_way.clear()
        self.pending.clear()

    def guest_began(self, write: Write) -> None:
        """A write is under way that guest_wrote() will tell of."""
        if not self.takes(write) or self.failed or self.missed:
            return
        arrives = self.began[write.range()] = self.arrives(write.kind)
        if not arrives and self.failed is False:
            self.failed = None
        if arrives is not False:
            self.target.primary_began(write)

    def arrives(self, kind: str = 'write') -> Maybe:
        """Whether a forwarded write is done."""
        may = False if self.link is False else self.target.primary_may_write(
            'zero' if kind == 'idle' else kind)
        return may if self.link is not None or may is False else None

    def serves_reads(self) -> Maybe:
        """Whether the target has the guest's data and it can be had."""
        serves = self.stage is Stage.RUNNING or (
            self.stage is Stage.STOPPED and self.relied_on)
        if not serves or self.failed or self.missed or self.link is False:
            return False
        if self.failed is None or not self.link or self.target.faults:
            return None
        return True

    def allows_here(self, op: Op) -> Maybe:
        if op in (Op.STOP, Op.FAILOVER):
            return True
        if self.missed or self.failed or self.doomed:
            return False
        return None if None in (self.missed, self.failed) else True

    def called_here(self, op: Op, done: bool) -> None:
        if op in (Op.START, Op.CHECKPOINT):
            self.told(done)
        if op is Op.FAILOVER:
            # what was not sent is dropped, and the connection is cut
            self.under_way.clear()
            self.doomed = False
            self.missed = True
            if self.remote:
                self.link = False
        self.drained()
        if op is Op.FAILOVER:
            self.stage = Stage.DONE
        elif op is Op.STOP:
            self.stage = Stage.STOPPED
        elif done:
            self.stage = Stage.RUNNING

    def told(self, done: bool) -> None:
        """A call has told whether the target has everything."""
        if done:
            self.failed = self.missed = False
        elif self.missed is False:
            self.failed = True
        elif self.missed is None and self.failed is False:
            self.missed = True

    def missed_a_write(self) -> Maybe:
        return either(self.missed, self.failed)

    def is_bad(self) -> Maybe:
        if self.stage is Stage.RUNNING:
            return either(self.missed, self.failed)
        return self.stage is Stage.NONE or self.failed

    def status_was(self, bad: bool) -> None:
        if not bad and not self.quiet:
            # a failure may come to light later
            return
        self.failed = bad
        if not bad:
            if any(write.kind not in IDLE
                   for write in self.pending + self.under_way):
                # a link that was lost would not have carried them
                self.link = self.link is not False
            for write in self.pending:
                self.target.primary_wrote(write, True)
            self.all_arrived()

    def status_done(self) -> None:
        self.pending.clear()
        if self.quiet:
            self.under_way.clear()


class SecondaryNode(Node, Target):
    """Shows the disk as it was at the last checkpoint, plus own writes."""
    mode = 'secondary'

    def __init__(self, name: str, data: bytes) -> None:
        Node.__init__(self, name)
        Target.__init__(self, data)
        self.view = Content(data)
        # Whether the primary can write: the disk has a block backend
        self.exported = False
        # Whether a write of the primary has failed since start, or none can
        # come any more
        self.out_of_date: Maybe = False
        self.cut_off = False
        # An overlay failed to be emptied and may be unusable for good
        self.suspect = False
        # In stage STOPPED: the guest has written
        self.shadowed = False
        # Somebody else has active open, which may be in the way of a start
        self.crowded = False
        # Counts when what the guest wrote is, or may be, thrown away
        self.epoch = 0
        # In stage FAILOVER: something could fail
        self.merge_may_fail = False

    def set_fault(self, name: str, on: bool) -> None:
        super().set_fault(name, on)
        self.merge_may_fail |= on

    def set_exported(self, exported: bool) -> None:
        """The way for the primary's writes is there, or not."""
        self.exported = exported
        if not exported and self.stage is Stage.RUNNING:
            self.cut_off = True

    # What the guest does

    def serves(self) -> Maybe:
        """Whether the guest can read and write."""
        if self.stage in (Stage.NONE, Stage.BROKEN):
            return False
        if self.stage is Stage.DONE:
            return None if 'disk' in self.faults else True
        return None if self.suspect or self.faults - {'hold'} else True

    def guest_wrote(self, write: Write, done: bool) -> None:
        """The secondary guest has written, or tried to."""
        if self.serves() is False:
            return
        write.apply(self.view, done)
        if self.stage is Stage.DONE:
            write.apply(self.disk, done)
        self.shadowed |= self.stage is Stage.STOPPED

    # What the primary does

    def is_taken(self) -> bool:
        """Whether the disk belongs to the guest: a fence keeps others out."""
        return self.stage in (Stage.FAILOVER, Stage.FAILED, Stage.DONE)

    def primary_may_write(self, kind: str = 'write') -> Maybe:
        if self.is_taken() and kind != 'flush':
            # a discard may be ignored before
            return None if kind == 'trim' else False
        needed = {'disk'}
        if self.stage is Stage.RUNNING:
            needed.add('hidden')
        return None if needed & self.faults else True

    def primary_wrote(self, write: Write, done: Maybe) -> None:
        if self.is_taken():
            # what came before is undone
            return
        super().primary_wrote(write, done)
        if not done:
            self.may_be_out_of_date(True if done is False else None)
        if self.stage is Stage.STOPPED:
            write.apply(self.view, None if self.shadowed else done)

    def primary_began(self, write: Write) -> None:
        if self.is_taken():
            return
        super().primary_began(write)
        if self.stage is Stage.STOPPED:
            write.apply(self.view, None)
        if not self.primary_may_write():
            self.may_be_out_of_date(None)

    def may_be_out_of_date(self, failed: Maybe) -> None:
        """A write of the primary has failed, or who knows."""
        if self.stage is Stage.RUNNING:
            self.out_of_date = self.out_of_date or failed

    def disk_is_known(self) -> bool:
        """A merge moves the guest's blocks there, nobody knows when."""
        return self.stage not in (Stage.FAILOVER, Stage.FAILED)

    # What the registry does

    def allows(self, op: Op, mode: str) -> Maybe:
        if self.stage is Stage.FAILOVER and self.merge_may_fail:
            # it may have failed since we last asked
            return True if op is Op.FAILOVER else None
        return super().allows(op, mode)

    def called(self, op: Op, done: bool) -> None:
        if self.stage is Stage.FAILOVER and not done:
            self.merge_ended(False)
        super().called(op, done)

    def allows_here(self, op: Op) -> Maybe:
        if op is Op.START and not self.exported:
            return False
        if op is Op.CHECKPOINT and self.out_of_date:
            return False
        if op is Op.FAILOVER:
            # QMP does not tell
            return True
        if self.faults or self.suspect or self.out_of_date is None:
            return None
        if op is Op.START and self.crowded:
            return None
        return True

    def called_here(self, op: Op, done: bool) -> None:
        if op is Op.FAILOVER:
            self.stage = Stage.FAILOVER
            self.merge_may_fail = bool(self.faults or self.suspect)
        elif done:
            self.renew_view()
            self.out_of_date = False
            # a checkpoint does not bring the export back
            self.cut_off &= op is Op.CHECKPOINT
            self.stage = Stage.STOPPED if op is Op.STOP else Stage.RUNNING
        elif op is not Op.START:
            self.stage = Stage.BROKEN
            self.suspect |= bool(self.faults)
            self.out_of_date = False

    def start_lost(self) -> None:
        self.stage = Stage.NONE
        self.suspect |= bool(self.faults)
        self.epoch += 1

    def disowned(self) -> None:
        if self.stage is Stage.RUNNING:
            self.stage = Stage.BROKEN

    def renew_view(self) -> None:
        """The guest sees the disk as it is now."""
        self.view.assign(self.disk)
        self.shadowed = False
        self.epoch += 1

    def merge_ended(self, done: bool) -> None:
        """The commit job of a failover has ended, or did not begin."""
        if done:
            self.disk.assign(self.view)
            self.out_of_date = self.cut_off = False
            # the overlays are gone
            self.faults -= {'active', 'hidden'}
        self.stage = Stage.DONE if done else Stage.FAILED

    def missed_a_write(self) -> Maybe:
        return either(self.cut_off, self.out_of_date)

    def is_bad(self) -> Maybe:
        if self.stage in (Stage.NONE, Stage.BROKEN, Stage.FAILED):
            return True
        if self.stage is Stage.FAILOVER:
            return None if self.merge_may_fail else False
        if self.stage is Stage.RUNNING:
            return self.missed_a_write()
        return False

    def status_was(self, bad: bool) -> None:
        if self.stage is Stage.RUNNING:
            self.out_of_date = bad
        elif bad:
            self.merge_ended(False)
