# SPDX-License-Identifier: GPL-2.0-or-later
"""A replica that is brought in step while the guest writes, and memory."""

import statistics
import subprocess
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Iterator, List, Tuple

import nodes
from figures import IOPS, MIBPS, MIBS, STEADY, Cell, Row, Setting, Values
from host import SECONDS, HostError
from hosts import (GIB, MIB, OURS, SUBJECTS, UNPROTECTED, NULL, Remote,
                   TimedHost, disk_node, fill, open_primary, serving)
from load import load
from primary import DEPTH_1, DEPTH_16, Task

# A copy has to take longer than what is measured beside it
COPIED = 2 * GIB
SYNC = 'sync0'
LARGE = 1024 * GIB


@contextmanager
def open_pair(setting: Setting, subject: str, image: Path
              ) -> Iterator[Tuple[TimedHost, TimedHost]]:
    """A disk without a replica, and another host with an empty one."""
    place = setting.place
    remote = place.memory / 'remote'
    nodes.sparse(remote, image.stat().st_size)
    with ExitStack() as stack:
        stack.callback(remote.unlink)
        far = stack.enter_context(serving(place, subject,
                                          disk_node('remote', remote)))
        near = stack.enter_context(TimedHost(place, subject))
        near.add(disk_node('local', image))
        if subject == OURS:
            near.add(nodes.holder('top', 'local'))
        near.serve()
        yield near, far


def begin_copy(near: TimedHost, far: TimedHost, subject: str) -> None:
    """With what each driver has for it."""
    near.add(nodes.link('link', far.server, 'remote'))
    if subject == OURS:
        near.cmd('x-block-replica-sync', job_id=SYNC, node_name='top',
                 replica='link')
    else:
        near.cmd('blockdev-mirror', job_id=SYNC, device='local',
                 target='link', sync='full')


def is_copied(near: TimedHost) -> bool:
    """Whether the other disk is a copy from now on."""
    near.pump()
    return bool(near.seen('BLOCK_JOB_READY') or
                near.seen('BLOCK_JOB_COMPLETED'))


def convert(near: TimedHost, far: TimedHost, image: Path) -> None:
    """Copy a disk that nobody uses."""
    subprocess.run([*near.pinned, near.tool('qemu-img'), 'convert', '-n',
                    '-f', 'raw', '-O', 'raw', str(image), far.uri('remote')],
                   check=True, capture_output=True, timeout=SECONDS)


def measure_copy(setting: Setting, image: Path, row: Row, subject: str
                 ) -> Values:
    """Copy a whole disk."""
    with open_pair(setting, subject, image) as (near, far):
        begin = time.perf_counter()
        if subject == UNPROTECTED:
            convert(near, far, image)
        else:
            begin_copy(near, far, subject)
            near.wait_until(lambda: is_copied(near), 'the copy')
        took = time.perf_counter() - begin
        return {row.name: image.stat().st_size / MIB / took}


def measure_writes(setting: Setting, image: Path, work: Task, row: Row,
                   subject: str) -> Values:
    """Write while the disk is copied; unprotected, while it is not."""
    with open_pair(setting, OURS, image) as (near, far):
        near.export('top', iothread='iothread0')
        if subject == OURS:
            begin_copy(near, far, OURS)
        speed = load(setting.place, near, 'top', work.jobs(setting)[-1])
        if subject == OURS and is_copied(near):
            raise HostError('the copy has ended before the writes')
        return {row.name: speed[STEADY]}


def cells(setting: Setting) -> List[Cell]:
    """A replica that is brought in step."""
    image = fill(setting.place.memory / 'copied', COPIED)
    row = Row('resync', f'{COPIED // GIB} GiB of data',
              'of a copy by qemu-img convert; stock: blockdev-mirror', MIBPS)
    result = [Cell('all of it', partial(measure_copy, setting, image, row),
                   (row,), SUBJECTS)]
    for work in (DEPTH_1, DEPTH_16):
        row = Row('resync', 'writes meanwhile, of those without',
                  work.title, IOPS)
        result.append(Cell(work.title, partial(
            measure_writes, setting, image, work, row), (row,),
            (UNPROTECTED, OURS)))
    return result


def measure_memory(setting: Setting, image: Path, work: Task, row: Row,
                   subject: str) -> Values:
    """What the process has in memory, of a large disk."""
    local = disk_node('local', image)
    with open_primary(setting.place, subject, local,
                      Remote(NULL, 0).null(LARGE)) as (host, guest):
        load(setting.place, host, guest, work.jobs(setting)[0])
        if subject != UNPROTECTED:
            host.checkpoint()
        return {row.name: statistics.median(
            host.resident / MIB for _ in range(3))}


def memory_cells(setting: Setting) -> List[Cell]:
    """Memory that a primary takes."""
    image = setting.place.memory / 'large'
    nodes.sparse(image, LARGE)
    work = DEPTH_1._replace(options={**DEPTH_1.options, 'size': LARGE})
    row = Row('memory', 'a primary, random writes', '1 TiB', MIBS,
              charted=False)
    return [Cell('1 TiB', partial(measure_memory, setting, image, work, row),
                 (row,))]
