# SPDX-License-Identifier: GPL-2.0-or-later
"""The table and the chart of a run."""

import json
from math import floor, log10
from typing import Dict, List, NamedTuple, Optional

from figures import Median, Row, Samples, median
from goals import NOISE, verdicts
from hosts import OURS, STOCK, SUBJECTS, UNPROTECTED
from svg import Picture, Scale

COLUMNS = ['unprotected', 'stock', 'ours', 'ours/stock', 'ours/unprotected']
WIDTHS = [12, 13, 13, 11, 17]
LABEL, UNIT = 54, 12
LEGEND = ('Medians of the runs, ratios by run.  No mark: the runs are within '
          '10 % of the median, ~ 25 %, ? further apart.  + more is better, '
          '- less is better.')

# The chart, in pixels
LEFT, RIGHT, TOP, LINE = 330, 780, 110, 16
INK, MUTED, GRID = '#1f2328', '#59636e', '#e6e9ed'
STOCK_COLOUR, OURS_COLOUR, WORSE = '#e08214', '#1f5fa8', '#c0182b'


class Report(NamedTuple):
    """All that a run has to tell."""
    samples: Samples
    rows: List[Row]
    facts: Dict[str, str]
    notes: List[str]
    failed: List[str]


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 10:
        return f'{value:,.{0 if abs(value) >= 100 else 1}f}'
    return f'{value:.2f}' if abs(value) >= 0.1 else f'{value:.3g}'


def shown(value: Optional[Median], unit: str = '') -> str:
    """A figure with its mark."""
    if value is None:
        return '-'
    return f'{number(value.value)}{unit} {value.mark}'.rstrip()


def as_text(outcome: Report) -> str:
    """The table."""
    samples = outcome.samples
    lines = [f'{name}: {value}' for name, value in outcome.facts.items()]
    lines += ['', LEGEND]
    group = title = ''
    for row in outcome.rows:
        if row.group != group:
            group, title = row.group, ''
            lines += ['', f'{group:<{4 + LABEL + UNIT}}' + ''.join(
                f'{column:>{width}}'
                for column, width in zip(COLUMNS, WIDTHS))]
        if row.title != title:
            title = row.title
            lines.append(f'  {title}')
        figures = [shown(samples.median(row, name)) for name in SUBJECTS]
        figures += [shown(median(samples.ratios(row, OURS, other)), 'x')
                    for other in (STOCK, UNPROTECTED)]
        unit = f"{row.unit.name} {'+' if row.unit.more_is_better else '-'}"
        lines.append(f'    {row.label:<{LABEL}}{unit:<{UNIT}}' + ''.join(
            f'{figure:>{width}}' for figure, width in zip(figures, WIDTHS)))
    for head, remarks in (
            ('Goals', list(verdicts(samples, outcome.rows))),
            ('Notes', outcome.notes), ('Failed', outcome.failed)):
        if remarks:
            lines += ['', head, *(f'  {each}' for each in remarks)]
    return '\n'.join(lines) + '\n'


def as_json(outcome: Report) -> str:
    """Every sample, for programs."""
    return json.dumps({'facts': outcome.facts, 'notes': outcome.notes,
                       'failed': outcome.failed, 'rows': [
                           {**row._asdict(), 'samples': {
                               name: outcome.samples.of_row(row, name)
                               for name in SUBJECTS}}
                           for row in outcome.rows]}, indent=1) + '\n'


def _draw_row(picture: Picture, scale: Scale, y: float, row: Row,
              samples: Samples) -> None:
    picture.text((LEFT - 12, y + 4), row.label, INK, 11, 'end')
    picture.line((LEFT, y), (RIGHT, y), GRID)
    points = {}
    for name, colour in ((STOCK, STOCK_COLOUR), (OURS, OURS_COLOUR)):
        part = samples.gain(row, name, UNPROTECTED)
        if part:
            points[name] = (scale.at(log10(part)), y)
            picture.dot(points[name], colour, 4.5, f'{name}: {100 * part:.3g} '
                        '%')
    gain = samples.gain(row, OURS, STOCK)
    if gain:
        colour = MUTED if abs(gain - 1) <= NOISE else \
            OURS_COLOUR if gain > 1 else WORSE
        if len(points) == 2:
            picture.line(points[STOCK], points[OURS], colour, 2)
        picture.text((RIGHT + 10, y + 4), f'{gain:.2g}x', colour, 11)


def as_chart(outcome: Report) -> str:
    """What each driver leaves of the unprotected speed."""
    samples = outcome.samples
    rows = [row for row in outcome.rows if row.charted
            and samples.gain(row, OURS, UNPROTECTED)]
    titles = list(dict.fromkeys((row.group, row.title) for row in rows))
    parts = [part for row in rows for name in (STOCK, OURS)
             if (part := samples.gain(row, name, UNPROTECTED))]
    scale = Scale(floor(log10(min([*parts, 0.5]))),
                  log10(max([*parts, 1.5]) * 1.2), LEFT, RIGHT)
    height = TOP + LINE * (len(rows) + len(titles)) + 20
    what = 'QEMU block replication: what is left of the unprotected speed'
    picture = Picture(RIGHT + 80, height, what)
    picture.text((20, 30), what, INK, 18, bold=True)
    picture.text((20, 50), 'In % of the same disk unprotected (of a '
                 'checkpoint: of one without disks), logarithmic; right is '
                 'better.', MUTED, 12)
    picture.text((20, 68), ', '.join(
        f'{name}: {outcome.facts[name]}' for name in ('date', 'QEMU', 'runs')),
        MUTED, 12)
    for x, name, colour in ((LEFT, 'stock driver', STOCK_COLOUR),
                            (LEFT + 110, 'this driver', OURS_COLOUR)):
        picture.dot((x, 86), colour, 4.5)
        picture.text((x + 10, 90), name, INK, 12)
    picture.text((RIGHT + 10, TOP - 8), 'ours : stock', MUTED, 10)
    for power in range(int(scale.low), int(scale.high) + 1):
        place = scale.at(power)
        picture.line((place, TOP), (place, height - 20),
                     GRID if power else INK)
        picture.text((place, TOP - 8), f'{100 * 10.0 ** power:g} %', MUTED, 11,
                     'middle')
    y: float = TOP + LINE / 2
    for group, title in titles:
        picture.text((20, y + 4), f'{group}: {title}', INK, 12, bold=True)
        y += LINE
        for row in rows:
            if (row.group, row.title) == (group, title):
                _draw_row(picture, scale, y, row, samples)
                y += LINE
    return picture.whole()
