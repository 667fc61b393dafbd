# SPDX-License-Identifier: GPL-2.0-or-later
"""All groups of measurements, and the images that they need."""

from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

import checkpoint
import direct
import failover
import memory
import primary
import secondary
import zeroes
from figures import Cell, Setting
from nodes import GIB
from place import fill


class Images:
    """Disks that have data all over, made when they are first needed."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting

    def _get(self, path: Path, sync: bool) -> Path:
        if not path.exists():
            fill(path, GIB, sync)
        return path

    @property
    def memory(self) -> Path:
        """One in memory."""
        return self._get(self._setting.place.memory / 'image', False)

    @property
    def disk(self) -> Path:
        """One on a disk."""
        return self._get(self._setting.place.disk / 'image', True)


class Group(NamedTuple):
    """Measurements of one kind."""
    about: str
    cells: Callable[[Setting, Images], List[Cell]]


GROUPS: Dict[str, Group] = {
    primary.GROUP: Group(
        'writes of the primary guest, by the latency of the secondary',
        lambda setting, images: primary.cells(setting, images.memory)),
    primary.DRAIN: Group(
        'a checkpoint on the primary right after a burst',
        lambda setting, images: primary.drain_cells(setting, images.memory)),
    zeroes.GROUP: Group(
        'zeroes and discards of the primary guest',
        lambda setting, images: zeroes.cells(setting)),
    secondary.GROUP: Group(
        'writes that arrive at the secondary disk',
        lambda setting, images: secondary.cells(
            setting, images.memory, secondary.make_blocks(setting))),
    secondary.GUEST: Group(
        'writes and reads of the secondary guest',
        lambda setting, images: secondary.guest_cells(
            setting, images.memory, secondary.make_blocks(setting))),
    checkpoint.GROUP: Group(
        'checkpoints on the secondary',
        lambda setting, images: checkpoint.cells(setting)),
    failover.GROUP: Group(
        'a failover on the secondary',
        lambda setting, images: failover.cells(
            setting, images.memory, images.disk)),
    direct.GROUP: Group(
        'some of it on a disk with cache.direct=on',
        lambda setting, images: direct.cells(setting, images.disk)),
    memory.GROUP: Group(
        'memory of both hosts while much is written',
        lambda setting, images: memory.cells(setting, images.memory)),
}
