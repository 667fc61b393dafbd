# SPDX-License-Identifier: GPL-2.0-or-later
"""Who says that the peer cannot run the VM any more."""

from enum import Enum
from typing import TYPE_CHECKING

from .peer import Unreachable

if TYPE_CHECKING:
    from .work import Works


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

    async def of_peer(self) -> Verdict:
        """Have the peer give up its claim to the VM."""
        works = self._works
        try:
            told = await works.peer.ask('yield',
                                        generation=works.facts.generation)
        except Unreachable as exc:
            return await self.of_silent_peer(str(exc))
        if told['yields']:
            return Verdict.OUT
        works.problem = f'{works.config.peer}: {told["because"]}'
        if told['generation'] > works.facts.generation:
            return Verdict.PROMOTED
        return Verdict.UNKNOWN

    async def of_silent_peer(self, why: str) -> Verdict:
        """Nobody there can be asked."""
        self._works.problem = (
            f'{why}: make sure that {self._works.config.peer} is down, and '
            'say "alone --peer-is-down"')
        return Verdict.UNKNOWN

    async def in_step(self) -> None:
        """From now on the peer may take the VM."""

    def died_in_step(self) -> None:
        """QEMU died while the peer was in step."""
