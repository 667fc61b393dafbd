# SPDX-License-Identifier: GPL-2.0-or-later
"""Two disks with metadata: whoever dies comes back, in either role.

What is written while the other is away is never thrown away unasked, what was
never written alone is never refused, a disk in the midst of a copy is no
primary's, and what a secondary takes over with is the last checkpoint, or what
its disk had before it was brought in step.
"""

from pathlib import Path
from typing import Any, Callable, List, Optional

import nodes
from disk import demand
from holder import DISK, JOB, LINK, TOP, VIEW, HolderWalk
from layout import KIB, MIB, SECTOR, pattern
from model import Content, Op
from modelhost import Difference, ModelHost

REPLICA, META, LINK_META = 'replica0', 'meta0', 'link-meta0'
# Regions of 1 MiB, of which some stay clean
SIZES = [6 * MIB, 24 * MIB - 3 * SECTOR]
META_SIZE = 64 * KIB
# So many generations back, what a disk had is known for sure
QUICK = 4
FULL = 'copies all of its disk'


class Past:
    """What is known of the disk of a host."""

    def __init__(self) -> None:
        # It was changed since both had the same, by nobody but its own guest;
        # None: it may count as if it was
        self.alone: Optional[bool] = None
        # A primary is copying to it, or has copied and not started
        self.mixed = False
        # What a failover brings back while it is, if that is certain
        self.kept: Optional[bytes] = None
        # What nobody has used is not kept
        self.used = False


class Failback(HolderWalk):
    """A pair whose primary is a, whoever that is now, its secondary b."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.size = self.rng.choice(SIZES)
        self.timeout = 0
        self.queue = self.rng.choice([256 * KIB, 64 * MIB])
        self.log_size = self.rng.choice([MIB, 4 * MIB, 64 * MIB])
        self.local = Content(pattern(self.size, self.rng))
        # How many generations ago both had the same
        self.apart: Optional[int] = None
        self.pasts = {self.a.name: Past(), self.b.name: Past()}
        self.past(self.a).used = True

    def image(self, host: ModelHost) -> Path:
        """The disk of a host."""
        return self.folder / f'{host.name}.img'

    def path(self, kind: str) -> Path:
        return self.image(self.a if kind == 'local' else self.b)

    def past(self, host: ModelHost) -> Past:
        """That of its disk."""
        return self.pasts[host.name]

    # Nodes

    def open(self) -> None:
        self.path('local').write_bytes(self.local.data)
        self.path('remote').write_bytes(pattern(self.size, self.rng))
        for host in self.a, self.b:
            nodes.sparse(self.folder / f'{host.name}.meta', META_SIZE)
        self.log(f'{self.size} queue {self.queue} log {self.log_size}')
        self.open_primary()
        self.open_secondary()

    def add(self, host: ModelHost, node: nodes.Json) -> Optional[str]:
        """The disk, the metadata and the node above."""
        host.add(nodes.image('raw', DISK, nodes.file(
                     self.image(host), discard='unmap'), discard='unmap'),
                 nodes.image('raw', META, nodes.file(
                     self.folder / f'{host.name}.meta')))
        return host.attempt('blockdev-add', {
            **node, 'metadata': META, 'discard': 'unmap',
            'write-behind': self.queue, 'log-size': self.log_size,
            'replica-timeout': 0})

    def open_primary(self) -> None:
        """On its disk, which is whole."""
        error = self.add(self.a, nodes.holder(TOP, DISK))
        self.demand(error is None, f'a primary cannot be opened: {error}')
        self.a.export(TOP)
        self.a.export(META)
        self.clients[TOP] = self.a.connect(TOP)

    def open_secondary(self) -> None:
        error = self.add(self.b, nodes.standby(TOP, REPLICA, DISK))
        self.demand(error is None, f'a secondary cannot be opened: {error}')
        for node in REPLICA, META, TOP:
            self.b.export(node)
        self.clients[VIEW] = self.b.connect(TOP)
        self.serves = True

    def close(self, host: ModelHost) -> None:
        """All of it."""
        for export in host.exports():
            host.unexport(export[len('export-'):])
        host.delete(TOP)
        for node in LINK, LINK_META:
            host.query('blockdev-del', {'node-name': node})
        host.delete(DISK, META)

    def close_primary(self) -> None:
        self.close(self.a)

    def close_secondary(self) -> None:
        self.close(self.b)

    def kill(self, host: ModelHost, client: str) -> None:
        """It dies, and its disk is what it was."""
        if client in self.clients:
            self.clients.pop(client).close()
        host.kill()
        host.launch()

    def relaunch(self) -> None:
        """The secondary's host dies, and comes back with its disk."""
        self.log('kill b')
        self.excuse = True
        past = self.past(self.b)
        past.mixed |= self.own is not None
        self.own = None
        self.kill(self.b, VIEW)
        if past.mixed:
            past.alone, past.kept = False, None
        if past.mixed and self.rng.random() < 0.3:
            self.refuse_primary()
        self.open_secondary()

    def refuse_primary(self) -> None:
        """A mixture is not a guest's."""
        error = self.add(self.b, nodes.holder(TOP, DISK))
        self.log(f'open a mixture: {error}')
        self.demand(error is not None, 'a primary opens a mixture')
        self.b.delete(DISK, META)

    # What the guests do

    def write_alone(self, write: Callable[[], None]) -> None:
        """Nobody else has that, unless it runs."""
        before = bytes(self.local.data)
        alone = not self.runs()
        write()
        past = self.past(self.a)
        if alone and self.local.data != before:
            past.alone = True
        elif alone:
            # a flush, or what was there
            past.alone = past.alone or None

    def write(self) -> None:
        self.write_alone(super().write)

    def overlap(self) -> None:
        self.write_alone(super().overlap)

    # The replica

    def told_b(self) -> nodes.Json:
        """The statistics of the secondary's node."""
        return self.b.statistics()[0]

    def attach(self, **options: Any) -> Optional[str]:
        """As the metadata of both says."""
        return self.a.attempt('x-block-replica-sync', {
            'job-id': JOB, 'node-name': TOP, 'replica': LINK,
            'replica-metadata': LINK_META, 'sync': 'auto',
            'speed': self.rng.choice([0, 0, MIB, 4 * MIB]), **options})

    def sync(self) -> None:
        if self.runs() or self.has_job() or self.state() == 'synced':
            return
        self.a.query('x-block-replica-detach', {'node-name': TOP,
                                                'force': True})
        for node in LINK, LINK_META:
            self.a.query('blockdev-del', {'node-name': node})
        self.a.add(nodes.link(LINK, self.b.socket, REPLICA, discard='unmap'),
                   nodes.link(LINK_META, self.b.socket, META))
        past = self.past(self.b)
        before = None if past.mixed else self.path('remote').read_bytes()
        # what is being overwritten was thrown away before
        alone = False if past.mixed else past.alone
        full = self.a.log_text().count(FULL)
        error = self.attach()
        self.log(f'sync: {error}')
        self.demand(alone is not True or error is not None,
                    'what was written alone is thrown away unasked')
        self.demand(alone is not False or error is None,
                    f'nothing was written alone: {error}')
        if error:
            self.stats.refused += 1
            if self.rng.random() < 0.3:
                return
            how = 'full' if 'another disk' in error else 'auto'
            error = self.attach(sync=how, **{'discard-peer': True})
            self.log(f'sync {how}, discard peer: {error}')
            self.demand(error is None, f'cannot discard: {error}')
        quick = self.a.log_text().count(FULL) == full
        self.demand(quick or self.apart is None or self.apart > QUICK,
                    'everything is copied')
        if self.apart is not None:
            self.apart += 1
        if before is not None and past.used:
            past.kept = before if self.told_b()['rollback-available'] else None
        past.mixed = True
        if not self.past(self.a).alone:
            self.past(self.a).alone = None
        self.excuse = False

    def start(self) -> None:
        super().start()
        if not self.runs():
            # the secondary may have started
            self.past(self.b).kept = None
        if self.own:
            self.apart = 0
            for host in self.a, self.b:
                self.past(host).alone = False
            self.past(self.b).mixed = False

    def fail_over(self) -> None:
        """The primary goes on alone, and its secondary has what it has."""
        if self.runs():
            past = self.past(self.b)
            past.mixed, past.kept = True, None
            self.past(self.a).alone = None
            super().fail_over()

    def stop(self) -> None:
        if self.runs():
            super().stop()
            # it has all, or was cut off
            past = self.past(self.b)
            past.mixed, past.alone = False, None
            past.kept, past.used = None, True
            self.past(self.a).alone = None

    def detach(self) -> None:
        if not self.runs() and not self.has_job():
            super().detach()

    def check_told(self) -> None:
        """What the other guest changed is not known before."""
        if self.state() != 'none':
            super().check_told()

    # Who dies

    def lose_primary(self) -> None:
        """It comes back as one, or the other has taken its place."""
        self.log('kill a')
        self.excuse = True
        self.kill(self.a, TOP)
        if self.own:
            self.inherit()
        elif self.rng.random() < 0.5 and self.may_roll_back():
            self.roll_back()
        else:
            self.open_primary()

    def may_roll_back(self) -> bool:
        """Whether the secondary says so; what was kept must be there."""
        told = bool(self.told_b()['rollback-available'])
        past = self.past(self.b)
        if past.kept and not told:
            raise Difference('what was kept is gone')
        return told

    def promote(self) -> None:
        """The secondary becomes the primary, the primary's host is dead."""
        self.stats.failovers += 1
        if self.told_b()['stage'] in ('running', 'syncing'):
            self.b.call(Op.FAILOVER, 'secondary')
        else:
            self.b.cmd('x-block-replica-detach', {'node-name': TOP})
        self.b.wait_until(lambda: bool(self.told_b()['mode'] == 'primary'),
                          'the merge')
        self.a, self.b = self.b, self.a
        self.own = None
        self.clients[TOP] = self.clients.pop(VIEW)
        data = self.clients[TOP].read(0, self.size)
        self.demand(data is not None, 'the guest cannot read')
        self.local = Content(data or b'')
        past = self.past(self.a)
        past.mixed, past.kept, past.used = False, None, True

    def inherit(self) -> None:
        """The last checkpoint, and what its own guest has written."""
        self.log('take over')
        assert self.own
        own = self.own
        self.promote()
        demand('the secondary that takes over', own, 0, bytes(self.local.data))
        self.past(self.a).alone = None
        self.open_secondary()

    def take_over(self) -> None:
        self.kill(self.a, TOP)
        self.inherit()
        self.end()

    def roll_back(self) -> None:
        """To what it had before it was brought in step."""
        self.log('roll back')
        kept = self.past(self.b).kept
        self.promote()
        if kept:
            demand('what was rolled back', Content(kept), 0,
                   bytes(self.local.data))
        past = self.past(self.a)
        past.alone = past.alone or None
        self.open_secondary()

    def part(self) -> None:
        """Both live, and each thinks that the other is dead."""
        if not self.own:
            return
        self.log('part')
        self.excuse = True
        own = self.own
        self.a.yank([{'type': 'block-node', 'node-name': LINK}])
        self.a.call(Op.FAILOVER, 'primary')
        self.past(self.a).alone = None
        if self.rng.random() < 0.7:
            self.write()
        theirs = self.local
        self.clients['other'] = self.clients.pop(TOP)
        self.promote()
        demand('the secondary that takes over', own, 0,
               bytes(self.local.data))
        self.past(self.a).alone = None
        if self.rng.random() < 0.7:
            self.write()
        if self.rng.random() < 0.5:
            # the one that was the primary wins
            self.a, self.b = self.b, self.a
            self.clients[TOP], self.clients['other'] = (
                self.clients['other'], self.clients[TOP])
            self.local = theirs
        self.kill(self.b, 'other')
        self.open_secondary()

    # The walk

    def steps(self) -> List[Callable[[], None]]:
        return [
            *[self.write, self.overlap] * 5, *[self.write_own] * 4,
            *[self.sync] * 8, *[self.wait] * 8, self.disturb_job, self.detach,
            self.break_link, *[self.start] * 8, *[self.checkpoint] * 8,
            self.stop, self.fail_over, self.lose_secondary,
            *[self.lose_primary] * 2, *[self.part] * 2, *[self.look] * 3]
