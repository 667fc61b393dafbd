# SPDX-License-Identifier: GPL-2.0-or-later
"""What is broken in a round, and when: all of it follows from the seed."""

import random
from dataclasses import dataclass
from enum import Enum
from typing import List, Tuple

from guesthost import Disks, MIB

# Rounds that one guest lives through: a survivor gets a new secondary.
GENERATIONS = 5
# How the disks of one guest after the other are put together.
FORMS = ('standby', 'quorum', 'standby', 'holder')


class Kind(Enum):
    """What is broken."""
    PRIMARY = 'kill the primary'
    SECONDARY = 'kill the secondary'
    MUTE_PRIMARY = 'silence the primary'
    MUTE_SECONDARY = 'silence the secondary'
    LINK = 'cut the link'
    LINK_THEN_PRIMARY = 'cut the link, then kill the primary'
    LINK_EXIT_PRIMARY = 'cut the link, kill the primary at COLO_EXIT'


class Moment(Enum):
    """When it is broken."""
    BETWEEN = 'between two checkpoints'
    SECONDARY_STOPS = 'a checkpoint has stopped the secondary'
    PRIMARY_STOPS = 'a checkpoint has stopped the primary'
    SECONDARY_RESUMES = 'the secondary has loaded a checkpoint'
    PRIMARY_RESUMES = 'a checkpoint is complete'
    SLOW_MERGE = 'between two; the merge is slow'
    COPYING = 'the disks are being copied'
    MIGRATING = 'the memory is being migrated'


class Cut(Enum):
    """How the link that carries the disk writes is cut."""
    SERVER = 'nbd-server-stop'
    EXPORT = 'block-export-del'
    YANK = 'yank'


# Who loses the primary before the guest is protected has lost the guest.
DECK: List[Tuple[Kind, Moment]] = [
    (Kind.PRIMARY, Moment.BETWEEN),
    (Kind.PRIMARY, Moment.SECONDARY_STOPS),
    (Kind.PRIMARY, Moment.PRIMARY_STOPS),
    (Kind.PRIMARY, Moment.SECONDARY_RESUMES),
    (Kind.PRIMARY, Moment.PRIMARY_RESUMES),
    (Kind.PRIMARY, Moment.SLOW_MERGE),
    (Kind.SECONDARY, Moment.BETWEEN),
    (Kind.SECONDARY, Moment.SECONDARY_STOPS),
    (Kind.SECONDARY, Moment.PRIMARY_STOPS),
    (Kind.SECONDARY, Moment.SECONDARY_RESUMES),
    (Kind.SECONDARY, Moment.PRIMARY_RESUMES),
    (Kind.SECONDARY, Moment.COPYING),
    (Kind.SECONDARY, Moment.MIGRATING),
    (Kind.MUTE_PRIMARY, Moment.BETWEEN),
    (Kind.MUTE_PRIMARY, Moment.PRIMARY_STOPS),
    (Kind.MUTE_PRIMARY, Moment.PRIMARY_RESUMES),
    (Kind.MUTE_SECONDARY, Moment.BETWEEN),
    (Kind.MUTE_SECONDARY, Moment.SECONDARY_STOPS),
    (Kind.MUTE_SECONDARY, Moment.PRIMARY_STOPS),
    (Kind.MUTE_SECONDARY, Moment.COPYING),
    (Kind.LINK, Moment.BETWEEN),
    (Kind.LINK, Moment.SECONDARY_STOPS),
    (Kind.LINK, Moment.PRIMARY_STOPS),
    (Kind.LINK, Moment.PRIMARY_RESUMES),
    (Kind.LINK, Moment.COPYING),
    (Kind.LINK_THEN_PRIMARY, Moment.BETWEEN),
    (Kind.LINK_THEN_PRIMARY, Moment.SECONDARY_STOPS),
    (Kind.LINK_THEN_PRIMARY, Moment.PRIMARY_STOPS),
    (Kind.LINK_EXIT_PRIMARY, Moment.BETWEEN),
    (Kind.LINK_EXIT_PRIMARY, Moment.SECONDARY_STOPS),
    (Kind.LINK_EXIT_PRIMARY, Moment.PRIMARY_STOPS),
]


@dataclass(frozen=True)
class GuestPlan:
    """The guest that a group of rounds shares."""
    disks: Disks
    checkpoint_ms: int
    # Whether its writes do not wait for the secondary.
    behind: bool
    form: str
    # With metadata: how much of it may be copied again for nothing.
    log_size: int


@dataclass(frozen=True)
class RoundPlan:
    """One round; all times are in seconds."""
    index: int
    kind: Kind
    moment: Moment
    # How many checkpoints are made before.
    checkpoints: int
    # From the event of the moment to the blow.
    delay: float
    # How long a host is silent before it is given up.
    silence: float
    # Whether it speaks again, too late, before it is killed.
    wakes: bool
    cut: Cut
    # Whether the primary is held up meanwhile, as by a slow network.
    held_up: bool
    # Picks the disk whose link is cut, where one can be cut alone.
    disk: int
    # From the cut to the death of the primary.
    gap: float


def plan_guest(seed: int, group: int) -> GuestPlan:
    """Return what the guest of a group of rounds is like."""
    rng = random.Random(f'{seed}/guest/{group}')
    disks = Disks(count=rng.choice((1, 2, 2, 3)),
                  size=rng.choice((40, 48, 64)) * MIB, fs_size=32 * MIB)
    return GuestPlan(disks, rng.choice((400, 800, 1200)),
                     behind=rng.random() < 0.7,
                     form=FORMS[group % len(FORMS)],
                     log_size=rng.choice((MIB, 16 * MIB, 16 << 30)))


def plan_round(seed: int, index: int, guest: GuestPlan) -> RoundPlan:
    """Return a round: the deck, dealt in another order each time."""
    lap, card = divmod(index, len(DECK))
    deck = list(DECK)
    random.Random(f'{seed}/deck/{lap}').shuffle(deck)
    kind, moment = deck[card]
    if guest.form == 'quorum' and moment is Moment.COPYING:
        moment = Moment.BETWEEN
    rng = random.Random(f'{seed}/round/{index}')
    period = guest.checkpoint_ms / 1000
    if moment in (Moment.BETWEEN, Moment.SLOW_MERGE, Moment.COPYING,
                  Moment.MIGRATING):
        delay = rng.uniform(0, 0.6 * period)
    else:
        delay = rng.choice((0, 1)) * rng.uniform(0, 0.04)
    return RoundPlan(index=index, kind=kind, moment=moment,
                     checkpoints=rng.randint(1, 3), delay=delay,
                     silence=rng.uniform(0.1, 2), wakes=rng.random() < 0.5,
                     cut=rng.choice(list(Cut)), held_up=rng.random() < 0.5,
                     disk=rng.randrange(guest.disks.count),
                     gap=rng.uniform(0.1, 1) * period)
