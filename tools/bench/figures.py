# SPDX-License-Identifier: GPL-2.0-or-later
"""What was measured, and the rows that show it."""

import statistics
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from place import Place
from subject import NAMES, OURS, STOCK, UNPROTECTED, Subject

MIB = 1 << 20

# By the name of a figure
Values = Dict[str, float]


class Unit(NamedTuple):
    """Of a figure, and whether more of it is better."""
    name: str
    more_is_better: bool


IOPS = Unit('IOPS', True)
MS = Unit('ms', False)
MIB_UNIT = Unit('MiB', False)
MB_PER_S = Unit('MB/s', True)
PER_BYTE = Unit('bytes/byte', False)
LINK_BYTES = Unit('bytes', False)


class Row(NamedTuple):
    """
    A line of the table.

    The figure of each subject is found by a name of its own: the same disk
    unprotected is the limit of many rows.
    """
    group: str
    title: str
    line: str
    unit: Unit
    figures: Dict[str, str]
    # of a line with more rows than one
    mark: str = ''
    # whether a fraction of the unprotected speed says something
    charted: bool = True

    @property
    def name(self) -> str:
        """The whole of it, but for the group."""
        return ', '.join(filter(None, (self.title, self.line, self.mark)))


def row(group: str, title: str, line: str, unit: Unit, mark: str = '',
        charted: bool = True, others: Optional[Dict[str, str]] = None
        ) -> Row:
    """A row whose figures have its own name, but for the others."""
    own = f'{group}: {title}, {line}, {mark}'
    return Row(group, title, line, unit,
               {**{name: own for name in NAMES}, **(others or {})}, mark,
               charted)


class Cell(NamedTuple):
    """What is measured at one go for a subject."""
    name: str
    measure: Callable[[Subject], Values]
    rows: Tuple[Row, ...] = ()
    subjects: Tuple[str, ...] = NAMES


class Pace(NamedTuple):
    """How long to measure."""
    runs: int
    minutes: float
    # Seconds at full speed, and before that
    steady: float
    ramp: float
    # First writes to clusters
    blocks: int
    checkpoints: int
    quick: bool


class Setting(NamedTuple):
    """What a group needs to know."""
    place: Place
    pace: Pace
    subjects: Dict[str, Subject]
    note: Callable[[str], None]


class Median(NamedTuple):
    """Of a figure, with the spread of the runs."""
    value: float
    mark: str


def median(samples: List[float]) -> Optional[Median]:
    """The median; its mark says how far the samples are apart."""
    if not samples:
        return None
    value = statistics.median(samples)
    spread = max(samples) - min(samples)
    if spread <= 0.1 * abs(value):
        return Median(value, '')
    return Median(value, '~' if spread <= 0.25 * abs(value) else '?')


class Samples:
    """All figures of all runs, in the order of the runs."""

    def __init__(self) -> None:
        self.all: Dict[str, Dict[str, List[Optional[float]]]] = {}

    def record(self, run: int, subject: str, values: Values) -> None:
        """Keep what was measured."""
        for name, value in values.items():
            samples = self.all.setdefault(name, {}).setdefault(subject, [])
            samples += [None] * (run + 1 - len(samples))
            samples[run] = value

    def of_row(self, of: Row, subject: str) -> List[Optional[float]]:
        """A row's samples."""
        return self.all.get(of.figures[subject], {}).get(subject, [])

    def median(self, of: Row, subject: str) -> Optional[Median]:
        """The median of a row."""
        return median([sample for sample in self.of_row(of, subject)
                       if sample is not None])

    def ratio(self, of: Row, subject: str, other: str) -> Optional[Median]:
        """The median of the ratios in each run."""
        return median([
            first / second for first, second in zip(
                self.of_row(of, subject), self.of_row(of, other))
            if first is not None and second])

    def gains(self, of: Row, subject: str, other: str) -> List[float]:
        """How many times better one is than another, in each run."""
        ratios = [first / second for first, second in zip(
            self.of_row(of, subject), self.of_row(of, other))
            if first and second]
        if of.unit.more_is_better:
            return ratios
        return [1 / ratio for ratio in ratios]

    def gain(self, of: Row) -> Optional[float]:
        """How many times better than the stock driver this one is."""
        gains = self.gains(of, OURS, STOCK)
        return statistics.median(gains) if gains else None

    def part(self, of: Row, subject: str) -> Optional[float]:
        """What part of the unprotected speed is left."""
        parts = self.gains(of, subject, UNPROTECTED)
        return statistics.median(parts) if parts else None
