# SPDX-License-Identifier: GPL-2.0-or-later
"""A primary that holds both disks, while its replicas come and go.

Whoever dies and whatever breaks, in whatever order: what is in step is equal,
what is not is told of, a resync brings all of it, and a secondary that takes
over has the last checkpoint and what its own guest wrote.
"""

import signal
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import nodes
from disk import demand
from host import Json
from layout import KIB, MIB, SECTOR, Image, pattern
from model import Content, Op, Write
from modelhost import Difference
from nbdio import Client
from sequence import Sequence, Walk
from steps import random_flag, random_range, random_write

SIZES = [MIB, 2 * MIB - 3 * SECTOR]
TOP, LOCAL, LINK, DISK, VIEW = 'top0', 'local0', 'link0', 'disk0', 'view0'
JOB = 'sync'
MIN_STEPS, MAX_STEPS = 10, 50


class HolderWalk(Walk):
    """A pair of hosts with one disk: the primary is a, the secondary b."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.a, self.b = self.hosts['a'], self.hosts['b']
        self.size = self.rng.choice(SIZES)
        self.timeout = self.rng.choice([0, 0, 300])
        self.queue = self.rng.choice([256 * KIB, 256 * KIB, 64 * MIB,
                                      0 if self.timeout else 256 * KIB])
        self.local = Content(pattern(self.size, self.rng))
        # What the secondary's guest sees, while it runs
        self.own: Optional[Content] = None
        # It has its node, and can be reached
        self.serves = False
        # All that the last replica lacks is known: None if it may be
        self.had: Optional[bool] = False
        # Something happened that a replica may be lost for
        self.excuse = False
        self.clients: Dict[str, Client] = {}

    def demand(self, condition: bool, what: str) -> None:
        """It must be so."""
        self.stats.checks += 1
        if not condition:
            raise Difference(f'{what}: {self.told()}')

    # What there is

    def path(self, kind: str) -> Path:
        """An image."""
        return self.folder / kind

    def told(self) -> Json:
        """The statistics of the primary's node."""
        return self.a.statistics()[0]

    def state(self) -> str:
        """That of the replica."""
        state = str(self.told()['replica-state'])
        self.demand(state != 'lost' or self.may_lose(), 'lost for no reason')
        return state

    def may_lose(self) -> bool:
        """Whether the replica may be lost: a slow machine is one that hangs"""
        return self.excuse or bool(self.timeout)

    def runs(self) -> bool:
        """Whether the primary does."""
        return bool(self.told()['stage'] == 'running')

    def has_job(self) -> bool:
        """Whether the replica is being brought in step."""
        return bool(self.a.cmd('query-jobs'))

    def open(self) -> None:
        """All of it, with a secondary that has something else."""
        self.path('local').write_bytes(self.local.data)
        self.path('remote').write_bytes(pattern(self.size - SECTOR, self.rng)
                                        + b'x' * SECTOR)
        image = Image(LOCAL, self.path('local'), self.rng)
        image.kinds, image.more['write-fault'] = ['read'], ['write',
                                                            'write-zeroes']
        self.a.add(nodes.primary(
            TOP, nodes.image('raw', LOCAL, image.options(), discard='unmap'),
            replica=None, discard='unmap',
            **{'replica-timeout': self.timeout, 'write-behind': self.queue}))
        self.log(f'{self.size} timeout {self.timeout} queue {self.queue}')
        self.a.export(TOP, iothread=self.rng.choice([None, 'iothread0']))
        self.clients[TOP] = self.a.connect(TOP)
        self.open_secondary()

    def open_secondary(self) -> None:
        """On the disk as it is, with new overlays."""
        below: nodes.Below = DISK
        self.b.add(nodes.image('raw', DISK, nodes.file(self.path('remote'))))
        for kind in 'hidden', 'active':
            self.images.overlay(self.path(kind), self.size, '')
            below = nodes.image('qcow2', f'{kind}0',
                                nodes.file(self.path(kind)), backing=below)
        self.b.export(DISK)
        self.b.add(nodes.quorum(VIEW, nodes.secondary('secondary0', VIEW,
                                                      below)))
        self.b.export(VIEW)
        self.clients[VIEW] = self.b.connect(VIEW)
        self.serves = True

    def close_primary(self) -> None:
        """All of it."""
        self.a.unexport(TOP)
        self.a.delete(TOP)
        self.a.query('blockdev-del', {'node-name': LINK})

    def close_secondary(self) -> None:
        """It keeps its disk."""
        for node in VIEW, DISK:
            self.b.unexport(node)
            self.b.delete(node)

    def relaunch(self) -> None:
        """The secondary's host dies, and comes back with its disk."""
        self.log('kill b')
        self.excuse = True
        self.drop_view()
        self.b.kill()
        self.b.launch()
        self.open_secondary()

    def drop_view(self) -> None:
        """The secondary's guest is gone."""
        self.own = None
        if VIEW in self.clients:
            self.clients.pop(VIEW).close()

    # What the guests do

    def reread(self, offset: int, length: int) -> None:
        """Believe what is there, which nobody could foretell."""
        data = self.clients[TOP].read(offset, length)
        self.demand(data is not None, 'a read fails')
        self.local.write(offset, data or b'')

    def write(self) -> None:
        """One request after another."""
        for _ in range(self.rng.randrange(1, 6)):
            write = random_write(self.rng, *random_range(self.rng, self.size))
            flag = random_flag(self.rng, write)
            error = self.clients[TOP].write(write, flag)
            self.log(f'{write.kind} {flag} {write.range()}: {error}')
            self.demand(not error or flag == 'fast', f'a write fails: {error}')
            if write.kind == 'trim' or error:
                self.reread(*write.range())
            else:
                write.apply(self.local, True)

    def overlap(self) -> None:
        """Many requests at once, one over the other."""
        client = self.clients[TOP]
        first = self.rng.randrange(self.size // 2)
        writes = []
        for _ in range(self.rng.randrange(2, 17)):
            offset = self.rng.randrange(first, first + 200 * KIB)
            length = self.rng.randrange(1, 100 * KIB)
            writes.append(Write('write', offset, self.rng.randbytes(length)))
        self.log(f'overlap {[write.range() for write in writes]}')
        requests = [client.submit(write) for write in writes]
        for request in requests:
            error = client.wait(request)
            self.demand(not error, f'a write fails: {error}')
        self.reread(first, 300 * KIB)

    def fail_to_write(self) -> None:
        """The local disk does, which is the guest's error."""
        Sequence.knock(self.a, f'{LOCAL}-write-fault')
        write = Write('write', *self.some_data())
        error = self.clients[TOP].write(write)
        Sequence.knock(self.a, f'{LOCAL}-write-fault')
        self.log(f'write {write.range()} fails: {error}')
        self.demand(bool(error), 'a write to a bad disk succeeds')
        self.stats.hits += 1
        self.reread(*write.range())

    def some_data(self) -> Tuple[int, bytes]:
        """Where, and what to write there."""
        offset, length = random_range(self.rng, self.size)
        return offset, self.rng.randbytes(length)

    def fail_to_read(self) -> None:
        """The replica is read, if it is in step."""
        certain = self.is_settled() and not self.may_lose()
        Sequence.knock(self.a, f'{LOCAL}-fault')
        # what is being copied cannot be
        self.excuse |= not certain
        offset, length = random_range(self.rng, self.size)
        data = self.clients[TOP].read(offset, length)
        Sequence.knock(self.a, f'{LOCAL}-fault')
        self.log(f'read {offset} +{length} fails: {data is None}')
        if data is not None:
            demand('the replica', self.local, offset, data)
        self.demand(data is not None or not certain, 'the replica is not read')

    def write_own(self) -> None:
        """The secondary's guest writes."""
        if self.own:
            write = Write('write', *self.some_data())
            error = self.clients[VIEW].write(write)
            self.log(f'own {write.range()}: {error}')
            self.demand(not error, f'a write of the secondary fails: {error}')
            write.apply(self.own, True)

    # The replica

    def sync(self) -> None:
        """Attach it, or another, if that may be."""
        if self.runs() or self.has_job() or self.state() == 'synced':
            return
        self.a.query('x-block-replica-detach', {'node-name': TOP,
                                                'force': True})
        self.a.query('blockdev-del', {'node-name': LINK})
        if not self.serves:
            self.relaunch()
        self.a.add(nodes.link(LINK, self.b.socket, DISK, discard='unmap'))
        how = self.rng.choice(['full', 'changed', 'changed'])
        error = self.a.attempt('x-block-replica-sync', {
            'job-id': JOB, 'node-name': TOP, 'replica': LINK, 'sync': how,
            'speed': self.rng.choice([0, 0, 256 * KIB, MIB])})
        self.log(f'sync {how}: {error}')
        if how == 'changed' and self.had is not None:
            self.demand((error is None) == self.had, f'sync: {error}')
        else:
            self.demand(how == 'changed' or error is None, f'sync: {error}')
        if error is None:
            self.excuse = False
            if how == 'full':
                self.had = None

    def wait(self) -> None:
        """For the job, with or without a limit of speed."""
        if self.has_job() and self.rng.random() < 0.7:
            self.a.query('block-job-set-speed', device=JOB, speed=0)
            self.a.wait_until(lambda: not self.has_job(), 'the job')
        self.look()

    def disturb_job(self) -> None:
        """Cancel it, hold it up, or have it go on."""
        if self.has_job():
            command: str = self.rng.choice([
                'block-job-cancel', 'block-job-pause', 'block-job-resume'])
            self.log(f'{command}: {self.a.attempt(command, device=JOB)}')
            if command == 'block-job-cancel':
                self.a.wait_until(lambda: not self.has_job(), 'the job')
            elif command == 'block-job-pause':
                self.write()
                self.a.query('block-job-resume', device=JOB)

    def detach(self) -> None:
        """Let go of it, whatever it lacks."""
        if not self.runs() and not self.has_job():
            self.look()
            force = self.rng.random() < 0.5
            self.log(f'detach {force}')
            self.a.cmd('x-block-replica-detach', {'node-name': TOP,
                                                  'force': force})

    def break_link(self) -> None:
        """For good."""
        if self.state() != 'none':
            self.log('yank')
            self.excuse = True
            self.a.yank([{'type': 'block-node', 'node-name': LINK}])

    def stall(self) -> None:
        """The other host stands still, and the guest does not."""
        self.log('stall')
        if self.runs() and not self.timeout:
            # as long as it runs the guest waits for it, if there is no limit
            return
        self.b.send_signal(signal.SIGSTOP)
        for _ in range(3):
            self.rng.choice([self.write, self.overlap])()
            self.check_told()
        self.b.send_signal(signal.SIGCONT)

    # The registry

    def start(self) -> None:
        """As COLO does, if the replica is in step."""
        if self.runs() or not self.serves:
            return
        self.look()
        if self.b.call(Op.START, 'secondary'):
            return
        ready = self.is_settled()
        error = self.a.call(Op.START, 'primary')
        self.log(f'start: {error}')
        self.demand(error is None or not ready or self.may_lose(),
                    f'start: {error}')
        if error:
            self.b.call(Op.STOP, 'secondary')
        else:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Of both, or the secondary is lost."""
        if not self.runs():
            return
        error = self.a.call(Op.CHECKPOINT, 'primary')
        self.log(f'checkpoint: {error}')
        self.demand(error is None or self.may_lose(), f'checkpoint: {error}')
        if not error and self.rng.random() < 0.1:
            self.relaunch()
        if error or self.b.call(Op.CHECKPOINT, 'secondary'):
            self.demand(self.may_lose(), 'a checkpoint of the secondary fails')
            self.fail_over()
            return
        self.stats.checkpoints += 1
        self.own = Content(bytes(self.local.data))
        self.check_equal()

    def stop(self) -> None:
        """In peace."""
        if self.runs():
            self.log('stop')
            for host, mode in (self.a, 'primary'), (self.b, 'secondary'):
                error = host.call(Op.STOP, mode)
                self.demand(not error or self.may_lose(), f'stop: {error}')
            self.own = None

    def fail_over(self) -> None:
        """The primary goes on alone."""
        if self.runs():
            self.log('fail over')
            self.stats.failovers += 1
            self.a.call(Op.FAILOVER, 'primary')
            self.demand(self.told()['replica-state'] == 'none', 'failover')
            self.b.call(Op.STOP, 'secondary')
            self.own = None

    def lose_secondary(self) -> None:
        """It dies, wherever it stands."""
        self.relaunch()
        if self.rng.random() < 0.5:
            self.write()
        self.fail_over()

    def take_over(self) -> None:
        """The primary dies, and the secondary goes on."""
        self.log('take over')
        self.clients.pop(TOP).close()
        self.a.kill()
        self.a.launch()
        self.b.call(Op.FAILOVER, 'secondary')
        self.b.wait_until(lambda: not self.b.has_job(DISK), 'the merge')
        assert self.own
        data = self.clients[VIEW].read(0, self.size)
        demand('the secondary that takes over', self.own, 0, data or b'')
        self.drop_view()
        self.close_secondary()
        demand('its disk', Content(data or b''), 0,
               self.path('remote').read_bytes())

    # Comparing

    def is_settled(self) -> bool:
        """Whether it is in step, and nothing is on the way."""
        told = self.told()
        return (told['replica-state'] == 'synced'
                and not told['pending-requests']
                and not told['out-of-sync-bytes'])

    def check_told(self) -> None:
        """What is out of sync is never less than the truth."""
        told = self.told()['out-of-sync-bytes']
        local = self.path('local').read_bytes()
        remote = self.path('remote').read_bytes()
        truth = sum(x != y for x, y in zip(local, remote))
        self.demand(told >= truth, f'{truth} bytes are out of sync')

    def look(self) -> None:
        """At everything, from everywhere."""
        data = self.clients[TOP].read(0, self.size)
        self.demand(data is not None, 'the guest cannot read')
        demand('the guest\'s disk', self.local, 0, data or b'')
        if self.own:
            view = self.clients[VIEW].read(0, self.size)
            demand('the view', self.own, 0, view or b'')
        if self.serves:
            self.b.send_signal(signal.SIGSTOP)
            self.check_told()
            self.b.send_signal(signal.SIGCONT)
        if self.state() == 'synced':
            self.a.wait_until(
                lambda: self.is_settled() or self.state() == 'lost',
                'what is forwarded')
        if self.is_settled():
            self.had = True
            self.check_equal()

    def check_equal(self) -> None:
        """All has arrived."""
        self.stats.compared += self.size
        demand('the replica', Content(self.path('local').read_bytes()), 0,
               self.path('remote').read_bytes())

    # The walk

    def steps(self) -> List[Callable[[], None]]:
        """What can happen, as often as it is likely."""
        return [
            *[self.write, self.overlap] * 6, self.fail_to_write,
            self.fail_to_read, *[self.write_own] * 3,
            *[self.sync] * 6, *[self.wait] * 6, self.disturb_job, self.detach,
            self.break_link, *[self.stall] * 2,
            *[self.start] * 6, *[self.checkpoint] * 6, self.stop,
            self.fail_over, self.lose_secondary, *[self.look] * 3]

    def play(self) -> None:
        """Open, walk, and end in one of the ways."""
        self.open()
        for number in range(self.rng.randrange(MIN_STEPS, MAX_STEPS)):
            self.new_step(number)
            self.rng.choice(self.steps())()
        self.log('end')
        if self.own and self.rng.random() < 0.5:
            self.take_over()
            return
        self.look()
        self.end()

    def end(self) -> None:
        """Nobody dies, and nothing is left."""
        if self.has_job():
            self.a.query('job-cancel', id=JOB)
            self.a.wait_until(lambda: not self.has_job(), 'the job')
        self.fail_over()
        for client in self.clients.values():
            client.close()
        self.close_primary()
        demand('the local disk', self.local, 0,
               self.path('local').read_bytes())
        self.close_secondary()
