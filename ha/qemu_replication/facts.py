# SPDX-License-Identifier: GPL-2.0-or-later
"""What a keeper must not forget, and files that are there or not."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO, List

from .config import Json
from .errors import Failed
from .states import REPLICA, SHARED, SOLE

LOG_BYTES = 1 << 20


def write_whole(path: Path, value: Json, durable: bool) -> None:
    """Replace a file, so that whoever reads it finds all of it."""
    fresh = path.with_name(path.name + '.new')
    with open(fresh, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1)
        file.write('\n')
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(fresh, path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def open_log(path: Path) -> BinaryIO:
    """To add to."""
    bound_log(path)
    return open(path, 'ab')


def bound_log(path: Path) -> None:
    """Put the end of a long one aside, for the last such end.

    Whoever has it open to add to it goes on at its begin.
    """
    if not path.exists() or path.stat().st_size <= LOG_BYTES:
        return
    with open(path, 'r+b') as log:
        log.seek(-LOG_BYTES, os.SEEK_END)
        end = log.read(LOG_BYTES)
        # first: there may be no more room
        log.truncate(0)
    path.with_suffix('.old.log').write_bytes(end)


@dataclass
class Facts:
    """About the disks of this host."""
    # grows whenever a standby takes the VM
    generation: int = 0
    # as in states; nothing on a host where nothing was done yet
    data: str = ''
    # the metadata was wiped: no disk of a peer is known by it any more
    wiped: bool = False
    # a person has said that whatever these disks have may be overwritten
    overwrite: bool = False
    # and that the VM is not to be protected
    held: bool = False
    # files of the VM's disks that have been there
    files: List[str] = field(default_factory=list)
    # from when on the peer may have been in step, for who runs the VM; or this
    # host, for who stands by: what fences the other one later counts
    since: float = field(default_factory=time.time, compare=False)

    @classmethod
    def read(cls, path: Path) -> 'Facts':
        """From a file, if there is one."""
        if not path.exists():
            return cls()
        try:
            facts = cls(**json.loads(path.read_text('utf-8')))
            if facts.data not in ('', SOLE, SHARED, REPLICA):
                raise ValueError(f'data is {facts.data!r}')
        except (TypeError, ValueError) as exc:
            raise Failed(f'{path}: {exc}: remove this file, and say "standby '
                         '--force" on the host that has not the VM, nor its '
                         'newest data') from exc
        return facts

    def save(self, path: Path) -> None:
        """To a file, for good."""
        write_whole(path, asdict(self), True)
