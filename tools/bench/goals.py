# SPDX-License-Identifier: GPL-2.0-or-later
"""What this driver is to reach, in figures of the same run."""

from typing import Callable, Iterator, List, NamedTuple

from figures import BURST, STEADY, Row, Samples
from hosts import OURS, STOCK, UNPROTECTED

# A ratio this far from another is noise
NOISE = 0.05
GROWTH = 'checkpoint, dirty: 1 TiB takes, times as long as 1 GiB'
MOST_GROWTH = 1.2


# Of a disk of which so much was changed, the log may have this in addition
LOG_SIZE = 16


class Goal(NamedTuple):
    """What each of some rows is to be, of another subject."""
    text: str
    applies: Callable[[Row], bool]
    of: str
    least: float


def _checkpoint(title: str, line: str) -> Callable[[Row], bool]:
    return lambda row: (row.group == 'checkpoint'
                        and row.title.endswith(title) and line in row.line)


def _primary(title: str, *marks: str) -> Callable[[Row], bool]:
    return lambda row: (row.group == 'primary' and row.title == title
                        and row.line.endswith(' 1 ms') and row.mark in marks)


def _resync(row: Row) -> bool:
    return row.group == 'resync'


def _queue_full(row: Row) -> bool:
    # what takes no time at all never has a queue
    return (row.group == 'primary' and row.mark == 'steady'
            and row.line != 'null-co 0 ms')


def _in_step(row: Row) -> bool:
    return (row.group == 'secondary' and row.mark == 'fresh, in step'
            and row.title.startswith('4 KiB'))


def _arrives(row: Row) -> bool:
    return row.group == 'secondary' and row.mark in ('fresh', 'again')


GOALS: List[Goal] = [
    Goal('primary, 1 ms, depth 1: part of unprotected',
         _primary('4 KiB random, depth 1', BURST, STEADY), UNPROTECTED, 0.95),
    Goal('primary, 1 ms, depth 16: part of unprotected',
         _primary('4 KiB random, depth 16', BURST, STEADY), UNPROTECTED, 0.85),
    Goal('primary, 1 ms, 64 KiB, burst: part of unprotected',
         _primary('64 KiB sequential, depth 4', BURST), UNPROTECTED, 0.75),
    Goal('resync: part of what there is without', _resync, UNPROTECTED, 0.8),
    Goal('primary, queue full: not slower than stock', _queue_full, STOCK, 1),
    Goal('secondary, 4 KiB fresh in step: times as fast as stock', _in_step,
         STOCK, 2),
    Goal('secondary, all else that arrives: not slower than stock', _arrives,
         STOCK, 1),
    Goal('checkpoint, 8 disks idle: times as fast as stock',
         _checkpoint(', idle', '8 disks'), STOCK, 10),
    Goal('checkpoint, 8 disks dirty, on disk: times as fast as stock',
         _checkpoint('disk, dirty', '8 disks'), STOCK, 5),
    Goal('checkpoint, 64 MiB dirty, on disk: times as fast as stock',
         _checkpoint('disk, 64 MiB dirty', ''), STOCK, 10),
]


class Bound(NamedTuple):
    """What each of some rows is to be at most, whatever others take."""
    text: str
    applies: Callable[[Row], bool]
    most: float


def _fail_back(mark: str, who: str = '') -> Callable[[Row], bool]:
    return lambda row: (row.group == 'failback' and row.mark.startswith(mark)
                        and row.title.endswith(f'{who} died'))


BOUNDS: List[Bound] = [
    Bound('failback: protected within so many seconds', _fail_back('until'),
          30),
    Bound('failback, the secondary died: copied, times what changed',
          _fail_back('copied', 'secondary'), 1.5),
    Bound('failback, the primary died: the same, and what the log may have',
          _fail_back('copied', 'primary'), 1.5 + LOG_SIZE),
]


def _growths(samples: Samples, rows: List[Row]) -> Iterator[float]:
    """How much longer a checkpoint of large disks takes."""
    large = {(row.title, row.line.replace('1 TiB', '1 GiB')): row
             for row in rows if '1 TiB' in row.line and 'dirty' in row.title}
    for row in rows:
        other = large.get((row.title, row.line))
        if other and other is not row:
            small, big = (samples.median(row, OURS),
                          samples.median(other, OURS))
            if small and big:
                yield big.value / small.value


def verdicts(samples: Samples, rows: List[Row]) -> Iterator[str]:
    """All goals that this run says something about, by their worst row.

    Rows that are as good as equal differ by noise.
    """
    for goal in GOALS:
        found = []
        for row in filter(goal.applies, rows):
            gain = samples.gain(row, OURS, goal.of)
            if gain is not None:
                met = gain >= goal.least
                if goal.least == 1:
                    # slower is what is so in every run
                    met = met or gain >= 1 - NOISE or max(
                        samples.gains(row, OURS, goal.of)) >= 1
                found.append((met, gain, row.name))
        if found:
            met, worst, where = min(found)
            yield (f'{"reached" if met else "MISSED"}: {goal.text}: '
                   f'{worst:.3g} (at least {goal.least:g}; worst: {where})')
    for bound in BOUNDS:
        values = [(value.value, row.name) for row in filter(
            bound.applies, rows) if (value := samples.median(row, OURS))]
        if values:
            most, where = max(values)
            yield (f'{"reached" if most <= bound.most else "MISSED"}: '
                   f'{bound.text}: {most:.3g} (at most {bound.most:g}; worst: '
                   f'{where})')
    growth = max(_growths(samples, rows), default=None)
    if growth is not None:
        yield (f'{"reached" if growth <= MOST_GROWTH else "MISSED"}: '
               f'{GROWTH}: {growth:.3g} (at most {MOST_GROWTH})')
