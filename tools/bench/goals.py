# SPDX-License-Identifier: GPL-2.0-or-later
"""What this driver is to reach, in figures of the same run."""

import statistics
from typing import Callable, List, NamedTuple, Optional, Tuple

from figures import Row, Samples
from subject import OURS, STOCK, UNPROTECTED, WRITE_BEHIND


class Goal(NamedTuple):
    """What each of some rows is to be, of another subject."""
    text: str
    applies: Callable[[Row], bool]
    of: str
    least: float


class Verdict(NamedTuple):
    """How a goal was met."""
    text: str
    worst: float
    bound: str
    met: bool
    where: str


def _is(group: str, title: str, line: str = '', marks: Tuple[str, ...] = ()
        ) -> Callable[[Row], bool]:
    """A test for rows: their group, beginning and end of texts, marks."""
    return lambda row: (row.group == group and row.title.startswith(title)
                        and line in row.line
                        and (not marks or row.mark in marks)
                        and WRITE_BEHIND not in row.line)


def _depth_1(row: Row) -> bool:
    return (row.title == '4 KiB random, depth 1' and '1 ms' in row.line
            and row.mark == 'burst')


def _queue_full(row: Row) -> bool:
    # what takes no time at all never has a queue
    return (row.group == 'primary' and row.mark == 'steady'
            and row.line != 'null-co 0 ms' and WRITE_BEHIND not in row.line)


def _idle(row: Row) -> bool:
    return row.title.endswith(', idle') and '8 disks' in row.line


GOALS: List[Goal] = [
    Goal('primary, 1 ms, depth 1, burst: part of unprotected', _depth_1,
         UNPROTECTED, 0.9),
    Goal('primary, queue full: not slower than stock', _queue_full, STOCK, 1),
    Goal('secondary, 4 KiB fresh in step: times as fast as stock',
         _is('secondary', '4 KiB', marks=('fresh, in step',)), STOCK, 2),
    Goal('secondary, all else that arrives: not slower than stock',
         _is('secondary', '', marks=('fresh', 'again')), STOCK, 1),
    Goal('checkpoint, 8 disks idle: times as fast as stock', _idle, STOCK,
         10),
    Goal('checkpoint, 8 disks dirty, on disk: times as fast as stock',
         _is('checkpoint', 'disk, dirty', '8 disks'), STOCK, 5),
    Goal('checkpoint, 64 MiB dirty, on disk: times as fast as stock',
         _is('checkpoint', 'disk, 64 MiB dirty'), STOCK, 10),
]
GROWTH = 'checkpoint, dirty: 1 TiB takes, times as long as 1 GiB'
MOST_GROWTH = 1.2
# A ratio this far from another is noise
NOISE = 0.05


def _verdict(goal: Goal, samples: Samples, rows: List[Row]
             ) -> Optional[Verdict]:
    """The worst row's.  Rows that are as good as equal differ by noise."""
    found = []
    for row in filter(goal.applies, rows):
        gains = samples.gains(row, OURS, goal.of)
        if gains:
            median = statistics.median(gains)
            met = median >= goal.least
            if goal.least == 1:
                # slower is what is so in every run
                met = met or median >= 1 - NOISE or max(gains) >= 1
            found.append((met, median, row.name))
    if not found:
        return None
    met, worst, where = min(found)
    return Verdict(goal.text, worst, f'at least {goal.least:g}', met, where)


def _growth(samples: Samples, rows: List[Row]) -> Optional[Verdict]:
    """Whether a checkpoint of large disks takes longer."""
    dirty = [row for row in rows
             if row.group == 'checkpoint' and 'dirty' in row.title]
    large = {(row.title, row.line.replace('1 TiB', '1 GiB')): row
             for row in dirty if '1 TiB' in row.line}
    found = []
    for row in dirty:
        other = large.get((row.title, row.line))
        if other is None or other is row:
            continue
        small, big = samples.median(row, OURS), samples.median(other, OURS)
        if small and big:
            found.append((big.value / small.value, row.name))
    if not found:
        return None
    worst, where = max(found)
    return Verdict(GROWTH, worst, f'at most {MOST_GROWTH}',
                   worst <= MOST_GROWTH, where)


def verdicts(samples: Samples, rows: List[Row]) -> List[Verdict]:
    """All goals that this run says something about."""
    found = [_verdict(goal, samples, rows) for goal in GOALS]
    found.append(_growth(samples, rows))
    return [each for each in found if each]
