# SPDX-License-Identifier: GPL-2.0-or-later
"""A secondary: the writes that arrive, and what its guest does."""

from functools import partial
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from figures import IOPS, MIB, PER_BYTE, Cell, Row, Setting, Values, row
from fio import Blocks, Job, load
from nodes import GIB, RECOMMENDED, Layout, Secondary, open_secondary
from primary import speeds
from server import Server
from subject import OURS, STOCK, UNPROTECTED, Subject

GROUP = 'secondary'
GUEST = 'guest'
CLUSTER = 65536
SEQUENTIAL_DATA = 256 * MIB
FRESH, AGAIN, IN_STEP = 'fresh', 'again', 'fresh, in step'
MOVED = 'moved per byte'
OVERLAYS = {'': 'default overlays', RECOMMENDED: 'recommended overlays'}


class Arrival(NamedTuple):
    """What arrives from the primary."""
    title: str
    depth: int
    # None: 64 KiB blocks in a row; else one small block in each cluster
    blocks: Optional[Blocks]

    def job(self, name: str) -> Job:
        """The same for fio."""
        if self.blocks:
            return self.blocks.write(name, self.depth)
        options: Dict[str, Any] = {
            'rw': 'write', 'bs': CLUSTER, 'iodepth': self.depth,
            'size': SEQUENTIAL_DATA}
        return Job(name, options)

    @property
    def data(self) -> int:
        """How many bytes it is."""
        return self.blocks.data if self.blocks else SEQUENTIAL_DATA


def moved(server: Server) -> int:
    """How many bytes the server's files were read and written."""
    counts = {}
    for line in Path(f'/proc/{server.pid}/io').read_text().splitlines():
        name, count = line.split(':')
        counts[name] = int(count)
    return counts['rchar'] + counts['wchar']


def make_blocks(setting: Setting) -> Blocks:
    """A small block in half of all clusters, at most."""
    return Blocks(setting.place.memory, GIB, CLUSTER, 4096,
                  setting.pace.blocks)


# Writes that arrive

def unprotected_name(arrival: Arrival) -> str:
    """Of the figure that is the limit."""
    return f'{GROUP}: {arrival.title}, unprotected'


def arrival_rows(arrival: Arrival, overlays: str) -> Dict[str, Row]:
    """The rows of what arrives."""
    limit = unprotected_name(arrival)
    names = OVERLAYS[overlays]
    rows = {name: row(GROUP, arrival.title, names, IOPS, name,
                      others={UNPROTECTED: limit})
            for name in (FRESH, AGAIN, IN_STEP)}
    for name in FRESH, IN_STEP:
        mark = f'{name}: {MOVED}'
        rows[mark] = row(GROUP, arrival.title, names, PER_BYTE, mark,
                         charted=False,
                         others={UNPROTECTED: f'{limit}: {MOVED}'})
    return rows


def measure_arrival(setting: Setting, arrival: Arrival, layout: Layout,
                    subject: Subject) -> Values:
    """Let writes arrive: where the guest was before, fresh, and again."""
    place, rows = setting.place, arrival_rows(arrival, layout.active)
    own = {name: each.figures[OURS] for name, each in rows.items()}
    with open_secondary(place, subject, layout) as host:
        if not subject.protected:
            return measure_limit(setting, arrival, host)
        # The first touch of memory is slow: throw the passes away that grow
        # the overlays to what they need.
        arrive_in_step(setting, arrival, host, own)
        host.server.checkpoint()
        load(place, host.disks[0], [arrival.job('warm')])
        host.server.checkpoint()
        values = arrive_in_step(setting, arrival, host, own)
        host.server.checkpoint()
        before = moved(host.server)
        # all of them were copied when they come again
        result = load(place, host.disks[0],
                      [arrival.job(FRESH), arrival.job(AGAIN)])
        values.update(speeds({name: own[name] for name in (FRESH, AGAIN)},
                             result))
        # what comes again is written, and nothing else
        values[own[f'{FRESH}: {MOVED}']] = (
            moved(host.server) - before) / arrival.data - 1
    return values


def measure_limit(setting: Setting, arrival: Arrival, host: Secondary
                  ) -> Values:
    """The same writes on a plain disk."""
    load(setting.place, host.disks[0], [arrival.job('warm')])
    before = moved(host.server)
    result = load(setting.place, host.disks[0], [arrival.job(FRESH)])
    limit = unprotected_name(arrival)
    return {**speeds({FRESH: limit}, result), f'{limit}: {MOVED}':
            (moved(host.server) - before) / arrival.data}


def arrive_in_step(setting: Setting, arrival: Arrival, host: Secondary,
                   own: Dict[str, str]) -> Values:
    """The secondary guest writes first what then arrives."""
    load(setting.place, host.guests[0], [arrival.job('guest')])
    before = moved(host.server)
    result = load(setting.place, host.disks[0], [arrival.job(IN_STEP)])
    return {**speeds({IN_STEP: own[IN_STEP]}, result),
            own[f'{IN_STEP}: {MOVED}']:
            (moved(host.server) - before) / arrival.data}


def cells(setting: Setting, image: Path, blocks: Blocks) -> List[Cell]:
    """All cells of what arrives."""
    small = [Arrival(f'4 KiB random, depth {depth}', depth, blocks)
             for depth in (1, 16)]
    large = [Arrival(f'64 KiB sequential, depth {depth}', depth, None)
             for depth in (1, 4)]
    arrivals = small[:1] if setting.pace.quick else small + large
    result = []
    for arrival in arrivals:
        # the overlays matter most to small blocks one at a time
        for overlays in OVERLAYS if arrival is small[0] else ['']:
            layout = Layout(setting.place.memory, GIB, active=overlays,
                            disk=image)
            result.append(Cell(
                f'{arrival.title}, {OVERLAYS[overlays]}',
                partial(measure_arrival, setting, arrival, layout),
                tuple(arrival_rows(arrival, overlays).values()),
                (STOCK, OURS) if overlays else
                (UNPROTECTED, STOCK, OURS)))
    return result


# What the guest does

WRITE_FRESH, WRITE_AGAIN = 'write fresh', 'write again'
READ_OWN, READ_OTHER = 'read own', 'read unwritten'


def guest_jobs(blocks: Blocks, depth: int) -> List[Job]:
    """All that the guest does."""
    return [blocks.write(WRITE_FRESH, depth),
            blocks.write(WRITE_AGAIN, depth),
            blocks.read(READ_OWN, depth),
            blocks.read_others(READ_OTHER, depth)]


def guest_rows(title: str, overlays: str) -> Dict[str, Row]:
    """The rows of what the guest does."""
    return {name: row(GUEST, title, OVERLAYS[overlays], IOPS, name, others={
                UNPROTECTED: f'{GUEST}: {title}, {name}, unprotected'})
            for name in (WRITE_FRESH, WRITE_AGAIN, READ_OWN, READ_OTHER)}


def measure_guest(setting: Setting, blocks: Blocks, depth: int, title: str,
                  layout: Layout, subject: Subject) -> Values:
    """Let the guest write and read, just after a checkpoint."""
    rows = guest_rows(title, layout.active)
    with open_secondary(setting.place, subject, layout) as host:
        load(setting.place, host.guests[0], [blocks.write('warm', depth)])
        if subject.protected:
            host.server.checkpoint()
        result = load(setting.place, host.guests[0],
                      guest_jobs(blocks, depth))
        return speeds({name: each.figures[subject.name]
                       for name, each in rows.items()}, result)


def guest_cells(setting: Setting, image: Path, blocks: Blocks) -> List[Cell]:
    """All cells of the guest."""
    result = []
    for depth in (1,) if setting.pace.quick else (1, 16):
        title = f'4 KiB random, depth {depth}'
        for overlays, name in OVERLAYS.items():
            layout = Layout(setting.place.memory, GIB, active=overlays,
                            disk=image)
            result.append(Cell(
                f'{title}, {name}',
                partial(measure_guest, setting, blocks, depth, title, layout),
                tuple(guest_rows(title, overlays).values()),
                (STOCK, OURS) if overlays else
                (UNPROTECTED, STOCK, OURS)))
    return result
