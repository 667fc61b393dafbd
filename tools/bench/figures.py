# SPDX-License-Identifier: GPL-2.0-or-later
"""What was measured, and the rows that show it."""

import statistics
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from hosts import SUBJECTS, UNPROTECTED, Place

# Marks of rows: what fits in a queue, and what goes on
BURST, STEADY = 'burst', 'steady'
# By the name of a figure
Values = Dict[str, float]


class Unit(NamedTuple):
    """Of a figure, and whether more of it is better."""
    name: str
    more_is_better: bool = False


IOPS, MIBPS = Unit('IOPS', True), Unit('MiB/s', True)
MS, BYTES, MIBS = Unit('ms'), Unit('bytes'), Unit('MiB')
SECONDS = Unit('s')
PER_BYTE = Unit('bytes/byte')


class Row(NamedTuple):
    """A line of the table."""
    group: str
    title: str
    line: str
    unit: Unit
    # of a line with more rows than one
    mark: str = ''
    # the figure of the same disk unprotected, which may be that of many rows
    limit: str = ''
    # whether a fraction of the unprotected speed says something
    charted: bool = True

    @property
    def label(self) -> str:
        """What differs between the rows of a title."""
        return f'{self.line}, {self.mark}' if self.mark else self.line

    @property
    def name(self) -> str:
        """The name of its figures."""
        return f'{self.group}: {self.title}, {self.label}'

    def figure(self, subject: str) -> str:
        """The name of a subject's figure."""
        return self.limit if subject == UNPROTECTED and self.limit \
            else self.name


class Cell(NamedTuple):
    """What is measured at one go for a subject."""
    name: str
    measure: Callable[[str], Values]
    rows: Tuple[Row, ...] = ()
    subjects: Tuple[str, ...] = SUBJECTS


class Setting(NamedTuple):
    """What a group needs to know: where, and how long to measure."""
    place: Place
    # Seconds at full speed, and before that
    steady: float
    ramp: float
    # First writes to clusters
    blocks: int
    checkpoints: int
    quick: bool
    note: Callable[[str], None]


class Median(NamedTuple):
    """Of some samples, with a mark for how far they are apart."""
    value: float
    mark: str


def median(samples: List[float]) -> Optional[Median]:
    """The median, if there are samples."""
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

    def of_row(self, row: Row, subject: str) -> List[Optional[float]]:
        """A row's samples."""
        return self.all.get(row.figure(subject), {}).get(subject, [])

    def median(self, row: Row, subject: str) -> Optional[Median]:
        """The median of a row."""
        return median([each for each in self.of_row(row, subject)
                       if each is not None])

    def ratios(self, row: Row, subject: str, other: str) -> List[float]:
        """The ratio of two subjects in each run."""
        return [first / second for first, second in zip(
            self.of_row(row, subject), self.of_row(row, other))
            if first is not None and second]

    def gains(self, row: Row, subject: str, other: str) -> List[float]:
        """How many times better one is than another, in each run."""
        ratios = self.ratios(row, subject, other)
        return ratios if row.unit.more_is_better else [
            1 / ratio for ratio in ratios if ratio]

    def gain(self, row: Row, subject: str, other: str) -> Optional[float]:
        """The median of those."""
        gains = self.gains(row, subject, other)
        return statistics.median(gains) if gains else None
