# SPDX-License-Identifier: GPL-2.0-or-later
"""Zeroes and discards of a primary: how long they take, what they send."""

from contextlib import ExitStack
from functools import partial
from typing import Dict, List, NamedTuple

from figures import LINK_BYTES, MIB, MIB_UNIT, MS, Cell, Row, Setting, Unit
from figures import Values, row
from link import counted
from nodes import disk_node, nbd_node, open_primary
from place import allocated, fill
from server import launch_daemon
from subject import OURS, STOCK, UNPROTECTED, Subject

GROUP = 'zeroes'
SIZE = 256 * MIB


class Request(NamedTuple):
    """Something that need not cross the link as data."""
    title: str
    command: str
    # who drops it is the fastest
    charted: bool = True


REQUESTS = [Request('256 MiB of zeroes', f'write -z 0 {SIZE}'),
            Request('256 MiB of zeroes, unmapped', f'write -z -u 0 {SIZE}'),
            Request('256 MiB discarded', f'discard 0 {SIZE}', False)]
TIME, ARRIVED = 'done', 'done, and a checkpoint after it'
BYTES, LEFT = 'bytes on the link', 'left allocated on both sides'


def rows_of(request: Request) -> Dict[str, Row]:
    """All rows of a request."""
    def new(line: str, unit: Unit, charted: bool, limit: str = '') -> Row:
        return row(GROUP, request.title, line, unit, charted=charted,
                   others={UNPROTECTED: limit} if limit else None)

    first = new(TIME, MS, request.charted)
    return {
        TIME: first,
        ARRIVED: new(ARRIVED, MS, request.charted,
                     first.figures[UNPROTECTED]),
        BYTES: new(BYTES, LINK_BYTES, False),
        LEFT: new(LEFT, MIB_UNIT, False)}


def measure(setting: Setting, request: Request, counting: bool,
            subject: Subject) -> Values:
    """Do a request; its time, or the bytes that it sends."""
    place, rows = setting.place, rows_of(request)
    local, target = place.memory / 'zeroes-local', place.memory / 'zeroes'
    own = {name: each.figures[OURS] for name, each in rows.items()}
    images = [local, target] if subject.protected else [local]
    values: Values = {}
    with ExitStack() as stack:
        for image in images:
            fill(image, SIZE)
            stack.callback(image.unlink)
        remote = link = None
        if subject.protected:
            daemon = stack.enter_context(launch_daemon(place, subject))
            daemon.add(disk_node('remote', target))
            daemon.serve()
            socket = daemon.export('remote').socket
            if counting:
                path = place.memory / 'link'
                link = stack.enter_context(counted(path, socket))
                socket = path
            remote = nbd_node(socket)
        host = stack.enter_context(open_primary(
            place, subject, disk_node('local', local), remote))
        before = link.bytes if link else 0
        took = host.server.qemu_io(host.guest.name, request.command)
        with_checkpoint = took
        if subject.protected:
            with_checkpoint += host.server.checkpoint()
        if link:
            return {own[BYTES]: link.bytes - before}
        values[own[TIME]] = took
        if subject.protected:
            values[own[ARRIVED]] = with_checkpoint
        values[own[LEFT]] = sum(allocated(image) for image in images)
    return values


def cells(setting: Setting) -> List[Cell]:
    """All cells of the group."""
    result = []
    for request in REQUESTS:
        rows = rows_of(request)
        result.append(Cell(f'{request.title}, time',
                           partial(measure, setting, request, False),
                           (rows[TIME], rows[ARRIVED], rows[LEFT])))
        result.append(Cell(f'{request.title}, bytes',
                           partial(measure, setting, request, True),
                           (rows[BYTES],), (STOCK, OURS)))
    return result
