# SPDX-License-Identifier: GPL-2.0-or-later
"""Who says that the peer cannot run the VM any more."""

import asyncio
from enum import Enum
from typing import TYPE_CHECKING, Callable, Optional

from . import cluster
from .errors import Failed, Unreachable
from .states import REPLICA

if TYPE_CHECKING:
    from .work import Works

RETRY_SECONDS = 0.3


class Verdict(Enum):
    """On the peer."""
    UNKNOWN = 'unknown'
    # it cannot take the VM, unless it is brought in step again
    OUT = 'out'
    # it has taken it
    PROMOTED = 'promoted'


class Judge:
    """Takes the word of the peer's keeper; else a person has to vouch."""

    def __init__(self, works: 'Works') -> None:
        self._works = works
        # the scores, which could not be set yet, or may not be right
        self.owes = False

    async def of_peer(self, since: float) -> Verdict:
        """Have the peer give up its claim to the VM; lost at a time."""
        works = self._works
        try:
            told = await works.peer.ask('yield',
                                        generation=works.facts.generation)
        except Unreachable as exc:
            return await self._of_silent_peer(str(exc), since)
        if told['yields']:
            return Verdict.OUT
        works.problem = f'{works.config.peer}: {told["because"]}'
        if told['generation'] > works.facts.generation \
                and told.get('data') != REPLICA:
            return Verdict.PROMOTED
        return Verdict.UNKNOWN

    async def _of_silent_peer(self, why: str, _since: float) -> Verdict:
        """Nobody there can be asked."""
        self._works.problem = (
            f'{why}: make sure that {self._works.config.peer} is down, and '
            'say "alone --peer-is-down"')
        return Verdict.UNKNOWN

    async def in_step(self) -> None:
        """From now on the peer may take the VM."""

    async def promoted(self) -> None:
        """The VM runs here now."""
        self.owes = False

    async def gives_way(self) -> None:
        """The VM does not run here any more, but there, if that can be."""

    async def has_died(self) -> None:
        """QEMU has ended where the VM ran."""

    async def stopped(self) -> None:
        """QEMU is about to be ended here."""

    async def watch(self, _lost: Callable[[str], None]) -> None:
        """Say so when the peer is lost, for ever."""


class ClusterJudge(Judge):
    """Pacemaker's scores say who may be promoted.

    The peer's is there only while the peer is in step, and is deleted before
    this side goes on alone.  Nothing is deleted without quorum: that counts
    for nothing, but may be taken for the latest when the cluster is whole.
    """

    def __init__(self, works: 'Works') -> None:
        super().__init__(works)
        self._last: Optional['asyncio.Task[None]'] = None

    @property
    def _resource(self) -> str:
        return self._works.config.cluster.resource

    async def _change(self, how: Callable[..., None], *words: object) -> None:
        """Scores change in this order, though nobody waits for it any more."""
        async def after(last: Optional['asyncio.Task[None]']) -> None:
            if last and not last.done():
                await asyncio.wait({last})
            await asyncio.to_thread(how, self._resource, *words)

        self._last = asyncio.create_task(after(self._last))
        await asyncio.shield(self._last)

    async def _delete(self, host: str) -> None:
        if (await asyncio.to_thread(cluster.membership)).quorate:
            await self._change(cluster.delete_score, host)

    async def of_peer(self, since: float) -> Verdict:
        try:
            peer = self._works.config.peer
            await self._delete(peer)
            now = await asyncio.to_thread(cluster.membership)
            if peer not in now.members or not now.quorate:
                # its word would not count where its score is still there
                return await self._of_silent_peer(
                    f'the cluster has lost {peer}', since)
            word = asyncio.ensure_future(super().of_peer(since))
            try:
                # a peer that is down does not answer, for long
                while not (await asyncio.wait({word},
                                              timeout=RETRY_SECONDS))[0]:
                    if await asyncio.to_thread(self._is_down, since):
                        return Verdict.OUT
                return await word
            finally:
                word.cancel()
        except Failed as exc:
            self._works.problem = str(exc)
            return Verdict.UNKNOWN

    def _is_down(self, since: float) -> bool:
        """Says so who has quorum, and has fenced it or never fences?"""
        peer, now = self._works.config.peer, cluster.membership()
        return now.quorate and (
            cluster.was_fenced(peer, since)
            or peer not in now.members and not cluster.fences())

    async def _of_silent_peer(self, why: str, since: float) -> Verdict:
        """The score is gone.  Is that so where the peer would ask?"""
        works, peer = self._works, self._works.config.peer
        before = await asyncio.to_thread(cluster.membership)
        if peer in before.members \
                or await asyncio.to_thread(self._is_down, since):
            # again: it has to be so in the part of the cluster that is asked
            await self._delete(peer)
            if before.quorate and before == await asyncio.to_thread(
                    cluster.membership):
                return Verdict.OUT
        works.problem = (f'{why}: waits until the cluster has quorum, and '
                         f'{peer} is in it or has been fenced')
        return Verdict.UNKNOWN

    async def watch(self, lost: Callable[[str], None]) -> None:
        config = self._works.config
        while True:
            try:
                async for members in cluster.memberships():
                    if config.peer not in members:
                        lost(f'the cluster has lost {config.peer}')
            except OSError:
                # there are not enough files or processes at the moment
                pass
            # or Corosync has ended
            await asyncio.sleep(RETRY_SECONDS)

    async def in_step(self) -> None:
        await self._change(cluster.set_score, self._works.config.peer,
                           cluster.PEER_SCORE)

    async def promoted(self) -> None:
        config = self._works.config
        self.owes = True
        try:
            await self._change(cluster.delete_score, config.peer)
            await self._change(cluster.set_score, config.here,
                               cluster.OWN_SCORE)
            self.owes = False
        except Failed as exc:
            # the VM is worth more
            self._works.problem = str(exc)

    async def gives_way(self) -> None:
        """With the peer in step, that goes on: no start from the disks."""
        config = self._works.config
        while self._works.facts.data == 'shared':
            try:
                await self._delete(config.here)
                break
            except Failed as exc:
                self._works.problem = str(exc)
                await asyncio.sleep(RETRY_SECONDS)

    async def stopped(self) -> None:
        """There will be no checkpoint to promote any more."""
        if self._works.facts.data == 'replica':
            await self._delete(self._works.config.here)

    async def has_died(self) -> None:
        """The peer's turn, if it is in step; a failure is slower."""
        await self.gives_way()
        if self._works.facts.data == 'sole':
            await asyncio.to_thread(cluster.fail, self._resource,
                                    self._works.config.here)


def new_judge(works: 'Works') -> Judge:
    """As the configuration has it."""
    return ClusterJudge(works) if works.config.cluster.resource \
        else Judge(works)
