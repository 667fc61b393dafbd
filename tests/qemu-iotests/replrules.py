# SPDX-License-Identifier: GPL-2.0-or-later
"""
What may be done with two disks, as their metadata has it.

Shares nothing with the driver, so that one tests the other.
"""

import uuid
from typing import NamedTuple, Optional, Set

import replmeta

QUICK, FULL = 'quick', 'full'


class Verdict(NamedTuple):
    """Of a sync: how much is copied, or why it is refused"""
    copy: str
    refused: str = ''
    # what is copied with discard-peer, or nothing if that is refused as well
    discard: str = ''


class Metadata:
    """Of one side, in bytes"""

    def __init__(self, data: bytes) -> None:
        self.own = replmeta.parse_own(data)
        self.peer = replmeta.parse_peer(data)
        self.log = replmeta.parse_log(data)

    def announced(self) -> Optional[replmeta.Peer]:
        """What counts of what the peer has said"""
        own = self.own
        if not self.peer or (own and (own.role == replmeta.PRIMARY or
                                      self.peer.sequence <= own.absorbed)):
            return None
        return self.peer

    def unusable(self) -> str:
        """Why no guest may be started on the disk; a word of the message"""
        announced = self.announced()
        if self.own and self.own.state == replmeta.MERGING:
            return 'overlays'
        if announced:
            return ('mixture' if announced.kind == replmeta.SYNC else
                    'overwritten')
        return ''

    def is_started(self) -> bool:
        announced = self.announced()
        return bool(announced and announced.kind == replmeta.STARTED)


def _verdict(source: Metadata, target: Metadata) -> Verdict:
    """Which of the two has what the other lacks"""
    own, other, announced = source.own, target.own, target.announced()
    assert own
    disk_id, current, base = replmeta.NONE, replmeta.NONE, replmeta.NONE
    if announced:
        disk_id = announced.disk_id
        current = base = announced.generation
    elif other:
        disk_id, current, base = other.disk_id, other.current, other.base
    if current == replmeta.NONE:
        return Verdict(FULL)
    if disk_id != own.disk_id:
        return Verdict('', 'another disk')

    void = own.log_void or own.base == replmeta.NONE or bool(
        other and other.log_void and not target.is_started() or
        announced and announced.log_void)
    known: Set[uuid.UUID] = {own.current, own.base} - {replmeta.NONE}
    if other and other.state == replmeta.MERGING:
        return Verdict('', 'overlays', FULL)
    if announced and announced.kind == replmeta.SYNC:
        quick, refused = current in known, ''
    elif current in known:
        quick, refused = True, ''
    elif base in known:
        quick = True
        if base == own.current:
            refused = 'stale'
        else:
            refused = ('both have changed' if target.log or
                       (other and other.log_void) else '')
    else:
        quick, refused = False, ''
    if not quick and current not in own.history:
        return Verdict('', 'nothing is known')
    copy = QUICK if quick and not void else FULL
    return Verdict('', refused, copy) if refused else Verdict(copy)


def judge(source: Metadata, target: Metadata) -> Verdict:
    """
    Of a sync from one disk to the other, when they have been opened; the
    source is usable
    """
    if not source.own or source.own.current == replmeta.NONE:
        # it is given a name
        fresh = target.announced() is None and (
            not target.own or target.own.current == replmeta.NONE)
        return Verdict(FULL) if fresh else Verdict('', 'another disk')
    return _verdict(source, target)


def union(source: Metadata, target: Metadata) -> Set[int]:
    """The regions that a quick sync copies"""
    return source.log | (set() if target.is_started() else target.log)
