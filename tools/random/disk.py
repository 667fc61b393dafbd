# SPDX-License-Identifier: GPL-2.0-or-later
"""A replicated disk: its nodes on one host or two, and the model of it."""

from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Dict, Iterator, List, Optional, Tuple

import nodes
from host import Json
from layout import Image, Images, Layout, pattern
from model import (Content, Maybe, Node, PrimaryNode, SecondaryNode, Stage,
                   Target, Write)
from modelhost import Difference, ModelHost
from nbdio import Client

# From where a disk can be read and written, by the name of the exported node:
# as the secondary guest, past it, as the primary guest, below that one's
# quorum
VIEW, DISK, LOCAL, FORWARD = 'view', 'disk', 'local', 'forward'
# Bytes to show of a difference
SHOWN = 16


def demand(what: str, content: Content, offset: int, found: bytes) -> None:
    """Compare what was read with the model."""
    wrong = content.find_wrong(offset, found)
    if wrong is None:
        return
    end = wrong + SHOWN
    expected = [bytes(content.data[wrong:end]).hex()]
    if content.other[wrong:end] != content.data[wrong:end]:
        expected.append(bytes(content.other[wrong:end]).hex())
    raise Difference(
        f'{what} differs first at offset {wrong} ({wrong:#x}): '
        f"expected {' or '.join(expected)}, "
        f'found {found[wrong - offset:end - offset].hex()}')


class SecondaryChain:
    """The chain of the secondary: top, replication, active, hidden, disk."""

    def __init__(self, disk: 'Disk') -> None:
        self.disk = disk
        self.model = disk.secondary_model()
        self.images = {kind: disk.image(kind) for kind in ('active', 'hidden')}
        self.held = False
        # A copy-on-read node stays above active
        self.copier = False
        # The target of the primary node that a promoted secondary gets
        self.next: Optional[PrimaryNode] = None

    def overlay(self, kind: str, backing: nodes.Below) -> Json:
        """An overlay."""
        return nodes.image(
            'qcow2', self.disk.node(kind), self.images[kind].options(),
            backing=backing, discard=self.disk.layout.discard,
            # QEMU 10.0 forgets to delete this timer of an overlay that
            # could not be emptied; an iothread then fails to end
            **{'cache-clean-interval': 0})

    def overlays(self) -> Json:
        """Active and hidden, over the disk."""
        return self.overlay('active', self.overlay('hidden',
                                                   self.disk.node(DISK)))

    def replication(self) -> Json:
        """The replication node."""
        return nodes.secondary(self.model.name, self.disk.node(VIEW),
                               self.overlays(),
                               discard=self.disk.layout.discard)

    def top(self) -> Json:
        """The guest's node."""
        layout, name = self.disk.layout, self.disk.node(VIEW)
        if layout.top == 'raw':
            return nodes.image('raw', name, self.replication(),
                               discard=layout.discard)
        return nodes.quorum(name, self.replication(), discard=layout.discard)

    def create_images(self) -> None:
        """New overlays."""
        for kind, image in self.images.items():
            options = getattr(self.disk.layout, kind)
            self.disk.images.overlay(image.path, self.disk.layout.size,
                                     options)

    def open(self) -> None:
        """Add the nodes above the disk."""
        host = self.disk.disk_host
        host.add(self.top())
        host.nodes.append(self.model)
        if self.disk.layout.iothread == 'node':
            host.cmd('x-blockdev-set-iothread', {
                'node-name': self.disk.node(VIEW), 'iothread': 'iothread0'})

    def attach_next(self) -> None:
        """The promoted secondary becomes a primary."""
        disk, host = self.disk, self.disk.disk_host
        image = disk.image('fresh')
        disk.images.disk(image.path, bytes(self.model.view.data))
        target = Target(bytes(self.model.view.data))
        self.next = PrimaryNode(disk.node('next'), self.model.view, target,
                                disk.layout.write_behind != 0)
        host.add(
            nodes.image('raw', disk.node('fresh'), image.options()),
            nodes.primary(self.next.name, disk.node('fresh'),
                          **disk.layout.behind()))
        host.cmd('x-blockdev-change', parent=disk.node(VIEW),
                 node=self.next.name)
        host.nodes.append(self.next)

    def hold(self, on: bool) -> None:
        """Keep hidden in use such that a merge cannot begin, or let go."""
        host, hidden = self.disk.disk_host, self.disk.node('hidden')
        if on:
            host.export(hidden, writable=False)
        elif f'export-{hidden}' in host.exports():
            # it ends by itself when hidden becomes unusable
            host.unexport(hidden)
        self.held = on
        self.model.set_fault('hold', on)

    def detach_next(self) -> None:
        """Take that primary away again."""
        assert self.next
        disk, host = self.disk, self.disk.disk_host
        host.cmd('x-blockdev-change', parent=disk.node(VIEW),
                 child='children.1')
        host.delete(self.next.name, disk.node('fresh'))
        host.nodes.remove(self.next)
        self.next = None

    def keep_copier(self) -> Optional[str]:
        """Put a copy-on-read node above active; return what is in the way."""
        error = self.disk.disk_host.attempt('blockdev-add', nodes.image(
            'copy-on-read', self.disk.node('copier'),
            self.disk.node('active')))
        self.copier = self.model.crowded = error is None
        return error

    def drop_copier(self) -> None:
        """Take it away again."""
        self.disk.disk_host.delete(self.disk.node('copier'))
        self.copier = self.model.crowded = False

    def close(self) -> None:
        """Delete the nodes above the disk."""
        host = self.disk.disk_host
        if self.copier:
            self.drop_copier()
        if self.held:
            self.hold(False)
        if self.next:
            self.detach_next()
        host.delete(self.disk.node(VIEW))
        host.nodes.remove(self.model)


class PrimaryChain:
    """The primary's quorum over its local disk and the way to the target."""

    def __init__(self, disk: 'Disk', host: ModelHost, data: bytes) -> None:
        self.disk = disk
        self.host = host
        self.local = Content(data)
        self.image = self.new_image('local')
        # The local disk lacks what the guest was told has been written
        self.stale = False
        # Where the way to the target leads, by a name of its own
        self.address = disk.folder / disk.node('address')
        self.attached = False
        self.model = self.new_model()

    def new_model(self) -> PrimaryNode:
        """A node that forwards everything so far."""
        return PrimaryNode(self.disk.node(FORWARD), self.local,
                           self.disk.target,
                           self.disk.layout.write_behind != 0,
                           self.is_remote())

    def new_image(self, kind: str) -> Image:
        """A local disk."""
        image = self.disk.image(kind)
        # The only faults by chance: the guest would see others
        image.kinds = ['read']
        image.more['write-fault'] = ['write', 'write-zeroes']
        return image

    def local_disk(self) -> Json:
        """The node of the local disk."""
        return nodes.image('raw', f'{self.image.name}-file',
                           self.image.options(), discard='unmap')

    def lead_to(self, host: ModelHost) -> None:
        """Have connections that are made from now on go to a host."""
        self.address.unlink(missing_ok=True)
        self.address.symlink_to(host.socket)

    def is_remote(self) -> bool:
        """Whether the target is on another host."""
        return self.host is not self.disk.disk_host

    def open(self) -> None:
        """Add the local disk and the quorum."""
        self.disk.images.disk(self.image.path, bytes(self.local.data))
        self.host.add(
            self.local_disk(),
            nodes.quorum(self.disk.node(LOCAL), f'{self.image.name}-file',
                         discard=self.disk.layout.discard))

    def attach(self) -> None:
        """Forward from now on."""
        disk = self.disk
        if self.is_remote():
            self.lead_to(disk.disk_host)
            self.host.add(nodes.link(
                disk.node('link'), self.address, disk.node(DISK),
                discard=disk.layout.link_discard))
        self.model = self.new_model()
        self.host.add(nodes.primary(
            self.model.name, self.child(), discard='unmap',
            **disk.layout.behind()))
        self.host.cmd('x-blockdev-change', parent=disk.node(LOCAL),
                      node=self.model.name)
        self.host.nodes.append(self.model)
        self.attached = True

    def child(self) -> str:
        """The node that leads to the target."""
        return self.disk.node('link' if self.is_remote() else DISK)

    def detach(self) -> None:
        """Forward no more, and forget that something was not."""
        self.host.cmd('x-blockdev-change', parent=self.disk.node(LOCAL),
                      child='children.1')
        self.delete_forward()

    def delete_forward(self) -> None:
        """Delete what nobody uses any more."""
        self.host.delete(self.model.name)
        if self.is_remote():
            self.host.delete(self.child())
        self.host.nodes.remove(self.model)
        self.attached = False

    def close(self) -> None:
        """Delete all nodes."""
        if self.attached:
            self.detach()
        self.host.delete(self.disk.node(LOCAL), f'{self.image.name}-file')
        self.check_file()

    def replace_local(self) -> None:
        """A copy of all data takes the place of the local disk."""
        old, disk = self.image.name, self.disk
        self.image = self.new_image(
            'spare' if old == disk.node('local') else 'local')
        disk.images.disk(self.image.path, bytes(disk.layout.size))
        self.host.add(self.local_disk())
        self.host.mirror(disk.node(LOCAL), f'{self.image.name}-file',
                         f'{old}-file')
        self.host.delete(f'{old}-file')
        self.stale = False

    def give_up(self) -> None:
        """Delete all nodes of a disk that nobody can read any more."""
        self.host.delete(self.disk.node(LOCAL), f'{self.image.name}-file')
        self.delete_forward()

    def check_file(self) -> None:
        """The primary has all that its guest wrote, whatever happened."""
        demand('the local disk', self.local, 0,
               self.image.path.read_bytes())


class Disk:
    """One disk of the VM: a primary, a secondary, or both."""

    def __init__(self, number: int, layout: Layout, images: Images,
                 folder: Path, rng: Random, disk_host: ModelHost,
                 primary_host: Optional[ModelHost], protected: bool) -> None:
        self.number = number
        self.layout = layout
        self.images = images
        self.disk_host = disk_host
        self.folder = folder
        self._rng = rng
        self.exported = False
        self.clients: Dict[str, Client] = {}
        self.data = pattern(layout.size - 512, rng) + bytes(512)
        self.disk_image = self.image('disk', layout.align)
        self.target = Target(self.data)
        self.secondary: Optional[SecondaryChain] = None
        if protected:
            self.secondary = SecondaryChain(self)
        self.primary: Optional[PrimaryChain] = None
        if primary_host:
            self.primary = PrimaryChain(self, primary_host, self.data)

    def node(self, kind: str) -> str:
        """A node's name."""
        return f'{kind}{self.number}'

    def image(self, kind: str, align: int = 0) -> Image:
        """An image of this disk."""
        return Image(self.node(kind), self.folder / self.node(kind),
                     self._rng, align)

    def secondary_model(self) -> SecondaryNode:
        """A new secondary over the disk as it is."""
        model = SecondaryNode(self.node('secondary'), self.data)
        model.disk = self.target.disk
        model.exported = self.exported
        self.target = model
        return model

    # Open and close

    def open(self) -> None:
        """Create all images and add all nodes."""
        self.images.disk(self.disk_image.path, self.data, self.layout)
        self.open_disk()
        self.export_disk()
        if self.secondary:
            self.secondary.create_images()
            self.secondary.open()
            self.export_node(VIEW, self.disk_host)
        if self.primary:
            self.primary.open()
            self.primary.attach()
            self.export_node(LOCAL, self.primary.host)
            self.export_forward()

    def open_disk(self) -> None:
        """Add the node of the disk."""
        self.disk_host.add(nodes.image(
            self.layout.disk_format, self.node(DISK),
            self.disk_image.options(), discard=self.layout.discard))

    def export_node(self, kind: str, host: ModelHost) -> None:
        """Export a node for writing and connect to it."""
        thread = 'iothread0' if self.layout.iothread == 'export' else None
        host.export(self.node(kind), iothread=thread)
        self.clients[kind] = host.connect(self.node(kind))

    def export_forward(self) -> None:
        """To read what the guest would if its local disk failed."""
        assert self.primary
        self.primary.host.export(self.node(FORWARD), writable=False)
        self.clients[FORWARD] = self.primary.host.connect(self.node(FORWARD))

    def export_disk(self) -> None:
        """Let the primary in, unless it is on the same host."""
        if self.primary and not self.primary.is_remote():
            return
        self.export_node(DISK, self.disk_host)
        self.set_exported(True)

    def unexport_disk(self) -> None:
        """Cut the primary off."""
        self.unexport(DISK, self.disk_host)
        self.set_exported(False)

    def set_exported(self, exported: bool) -> None:
        """The same for the model.  A link that is lost stays lost."""
        self.exported = exported
        if self.secondary:
            self.secondary.model.set_exported(exported)
        if self.primary and not exported:
            self.primary.model.link = False

    def unexport(self, kind: str, host: ModelHost) -> None:
        """End an export and its client."""
        if kind in self.clients:
            self.clients.pop(kind).close()
            host.unexport(self.node(kind))

    def replace_secondary(self) -> None:
        """Close the chain, and open one with new overlays."""
        self.close_secondary()
        self.secondary = SecondaryChain(self)
        self.secondary.create_images()
        self.secondary.open()
        self.export_node(VIEW, self.disk_host)

    def close_secondary(self) -> None:
        """Delete the chain above the disk, which keeps what it has."""
        assert self.secondary
        self.unexport(VIEW, self.disk_host)
        self.secondary.close()
        if not self.target.disk_is_known():
            self.check_chain()

    def check_chain(self) -> None:
        """After a merge that was cut short, chain or disk has everything."""
        assert self.secondary
        view = self.secondary.model.view
        name = self.node('chain')
        self.disk_host.add({**self.secondary.overlays(), 'node-name': name,
                            'read-only': True})
        data = self.look(name)
        self.disk_host.delete(name)
        disk = self.look(self.node(DISK))
        if view.find_wrong(0, data) is not None:
            demand('the chain, and the disk alone', view, 0, disk)
        self.target.disk = Content(disk)

    def detach(self) -> None:
        """Take the primary node out."""
        assert self.primary
        self.unexport(FORWARD, self.primary.host)
        self.primary.detach()

    def renew_primary(self) -> None:
        """The VM begins anew on the primary, with what the target has."""
        assert self.primary
        host = self.primary.host
        self.unexport(LOCAL, host)
        self.unexport(FORWARD, host)
        self.primary.give_up()
        self.primary = PrimaryChain(self, host, self.look(self.node(DISK)))
        self.primary.open()
        self.export_node(LOCAL, host)

    def attach(self) -> None:
        """Put a new primary node in."""
        assert self.primary
        self.primary.attach()
        self.export_forward()

    def close(self) -> None:
        """Delete all nodes, and look at the file that is left."""
        if self.primary:
            self.unexport(LOCAL, self.primary.host)
            if self.primary.attached:
                self.unexport(FORWARD, self.primary.host)
            self.primary.close()
        if self.secondary:
            self.close_secondary()
        if self.exported:
            self.unexport_disk()
        self.disk_host.delete(self.node(DISK))
        if self.layout.disk_format == 'raw':
            data = self.disk_image.path.read_bytes()
            data += bytes(self.layout.size - len(data))
            demand(f'the file of {self.node(DISK)}', self.target.disk, 0,
                   data)

    def overwrite(self, write: Write) -> None:
        """Copy data to the disk past everything above it."""
        if DISK in self.clients:
            error = self.clients[DISK].write(write)
        else:
            with self.visit(self.node(DISK), writable=True) as client:
                error = client.write(write)
        if error:
            raise Difference(f'{self.node(DISK)}: {error}')
        self.target.primary_wrote(write, True)

    def check_after_quit(self) -> None:
        """Nothing is lost when the hosts were shut down in any stage."""
        self.open_disk()
        if self.target.disk_is_known():
            demand(f'{self.node(DISK)} after quit', self.target.disk, 0,
                   self.look(self.node(DISK)))
        else:
            self.check_chain()
        self.disk_host.delete(self.node(DISK))
        if self.primary:
            self.primary.check_file()

    # Images

    def images_of(self) -> Dict[str, Image]:
        """All images that can be made to fail, by their kind."""
        images = {'disk': self.disk_image}
        # a merge ends with the overlays being closed, nobody knows when
        if self.secondary and self.secondary.model.stage not in (
                Stage.FAILOVER, Stage.DONE):
            images.update(self.secondary.images)
        if self.primary:
            images['local'] = self.primary.image
        return images

    def forwards(self, side: str) -> bool:
        """Whether what is written here goes through a primary node."""
        return any(above == side for _, _, above in self.primaries())

    def nodes(self) -> List[Node]:
        """All replication nodes of this disk."""
        nodes: List[Node] = [node for _, node, _ in self.primaries()]
        return [self.secondary.model, *nodes] if self.secondary else nodes

    def primaries(self) -> List[Tuple[ModelHost, PrimaryNode, str]]:
        """The nodes that forward the guests' writes, and those above them."""
        nodes: List[Tuple[ModelHost, PrimaryNode, str]] = []
        if self.secondary and self.secondary.next:
            nodes.append((self.disk_host, self.secondary.next, VIEW))
        if self.primary and self.primary.attached:
            nodes.append((self.primary.host, self.primary.model, LOCAL))
        return nodes

    def drain(self) -> None:
        """See that nothing is under way: block status waits for that."""
        for host, node, _ in self.primaries():
            if not node.quiet:
                host.qemu_io(node.name, f'alloc 0 {self.layout.size}')
                node.drained()

    def is_troubled(self) -> bool:
        """Whether something may fail or not."""
        return (not self.is_healthy()
                or bool(self.primary and self.primary.model.link is None))

    def is_healthy(self) -> bool:
        """Whether there is no fault."""
        return not self.target.faults and not any(
            image.failing for image in self.images_of().values())

    def is_suspect(self) -> bool:
        """Whether an old fault may have left something unusable."""
        return bool(self.secondary and self.secondary.model.suspect)

    # Reads

    @contextmanager
    def visit(self, node: str, writable: bool = False) -> Iterator[Client]:
        """A client of a node that is not exported for good."""
        self.disk_host.export(node, 'visit', writable)
        client = self.disk_host.connect('visit')
        try:
            yield client
        finally:
            client.close()
        self.disk_host.unexport('visit')

    def look(self, node: str) -> bytes:
        """Read all of a node that must be readable."""
        with self.visit(node) as client:
            data = client.read(0, self.layout.size)
        if data is None:
            raise Difference(f'{node} cannot be read')
        return data

    def sides(self) -> List[str]:
        """From where the disk can be read."""
        return [DISK] + [side for side in self.clients if side != DISK]

    def expected(self, side: str) -> Tuple[Content, Maybe]:
        """What there is to read, and whether that succeeds."""
        if side == VIEW:
            assert self.secondary
            return self.secondary.model.view, self.secondary.model.serves()
        if side == DISK:
            fails = 'disk' in self.target.faults
            return self.target.disk, None if fails else True
        assert self.primary
        mirrored = self.primary.model.serves_reads()
        if side == FORWARD:
            return self.primary.local, mirrored
        # the quorum reads from its other child where the first one fails
        if self.primary.stale:
            return self.primary.local, mirrored
        fails = self.primary.image.failing and not mirrored
        return self.primary.local, None if fails else True

    def reads_fenced(self, side: str) -> bool:
        """Whether the primary may read what a promoted guest has written.

        The fence refuses changes only, and the primary does not know yet.
        """
        if not self.primary or side not in (LOCAL, FORWARD):
            return False
        return (isinstance(self.target, SecondaryNode)
                and self.target.is_taken()
                and self.primary.model.serves_reads() is not False
                and (side == FORWARD or self.primary.stale
                     or self.primary.image.failing))

    def read(self, side: str, offset: int, length: int) -> Optional[bytes]:
        """Read from a side."""
        if side in self.clients:
            return self.clients[side].read(offset, length)
        with self.visit(self.node(side)) as client:
            return client.read(offset, length)
