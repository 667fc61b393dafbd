# SPDX-License-Identifier: GPL-2.0-or-later
"""A picture of a run: what each driver leaves of the unprotected speed."""

import importlib
from math import ceil, floor, log10
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from figures import Row
from goals import NOISE
from groups import GROUPS
from report import Outcome
from subject import OURS, STOCK

COLUMNS = 3
ROWS_IN_COLUMN = 24
COLUMN_INCHES, LABEL_INCHES, AXES_INCHES = 6.4, 2.7, 2.9
LINE_INCHES = 0.19
HEAD_INCHES, FOOT_INCHES = 1.35, 0.15
STOCK_COLOUR, OURS_COLOUR = '#e08214', '#1f5fa8'
BETTER_COLOUR, WORSE_COLOUR, EVEN_COLOUR = '#1f5fa8', '#c0182b', '#777777'
FONT = {'font.family': 'DejaVu Sans', 'font.size': 8,
        # so that no viewer needs the font
        'svg.fonttype': 'path', 'svg.hashsalt': 'bench'}


class Line(NamedTuple):
    """A line of the picture: a heading, or a row with its two points."""
    heading: str = ''
    strong: bool = False
    label: str = ''
    stock: Optional[float] = None
    ours: Optional[float] = None
    gain: Optional[float] = None


class Block(NamedTuple):
    """Lines that stay together."""
    group: str
    lines: List[Line]


def _line(outcome: Outcome, row: Row) -> Line:
    samples = outcome.samples
    return Line(label=f'{row.line}, {row.mark}' if row.mark else row.line,
                stock=samples.part(row, STOCK), ours=samples.part(row, OURS),
                gain=samples.gain(row))


def _blocks(outcome: Outcome) -> List[Block]:
    """All that can be shown, by the titles of the table."""
    blocks = []
    for group, rows in outcome.rows.items():
        shown = [row for row in rows if row.charted]
        for title in dict.fromkeys(row.title for row in shown):
            lines = [_line(outcome, row) for row in shown
                     if row.title == title]
            lines = [line for line in lines if line.stock or line.ours]
            if lines:
                blocks.append(Block(group, [Line(heading=title), *lines]))
    return blocks


def _columns(blocks: List[Block]) -> List[List[Line]]:
    """The lines of each column, each of about the same height."""
    total = sum(len(block.lines) for block in blocks)
    count = max(1, min(COLUMNS, ceil(total / ROWS_IN_COLUMN)))
    columns: List[List[Line]] = [[]]
    done, group, seen = 0, '', set()
    for block in blocks:
        # a block goes where its middle is
        if (done + len(block.lines) / 2 > total * len(columns) / count
                and columns[-1]):
            columns.append([])
            group = ''
        if block.group != group:
            if columns[-1]:
                columns[-1].append(Line())
            about = GROUPS[block.group].about
            columns[-1].append(Line(
                heading=about[0].upper() + about[1:]
                + (' (continued)' if block.group in seen else ''),
                strong=True))
            group = block.group
            seen.add(group)
        columns[-1] += block.lines
        done += len(block.lines)
    return columns


def _limits(lines: List[Line]) -> Tuple[float, float]:
    """The decades that all points are in."""
    points = [point for line in lines for point in (line.stock, line.ours)
              if point]
    return (10.0 ** floor(log10(min(points + [0.5]) * 0.9)),
            max(points + [1.5]) * 1.4)


def _percent(value: float, _position: object) -> str:
    return f'{100 * value:.10g} %'


def _gain_text(gain: float) -> str:
    return f'{gain:.0f}x' if gain >= 9.95 else f'{gain:.2g}x'


def _gain_colour(gain: Optional[float]) -> str:
    if gain is None or abs(gain - 1) <= NOISE:
        return EVEN_COLOUR
    return BETTER_COLOUR if gain > 1 else WORSE_COLOUR


def _draw_row(axes: Any, y: int, line: Line) -> None:
    colour = _gain_colour(line.gain)
    if line.stock and line.ours:
        axes.plot([line.stock, line.ours], [y, y], color=colour, lw=1.8,
                  alpha=0.45, zorder=2)
    if line.stock:
        axes.plot(line.stock, y, 'o', color=STOCK_COLOUR, ms=5.5, zorder=3)
    if line.ours:
        axes.plot(line.ours, y, 'D', color=OURS_COLOUR, ms=4.5, zorder=4)
    if line.gain:
        axes.annotate(_gain_text(line.gain), (1, y), (5, 0),
                      xycoords=('axes fraction', 'data'),
                      textcoords='offset points', va='center', fontsize=7.5,
                      color=colour, annotation_clip=False)


def _draw_column(axes: Any, lines: List[Line]) -> None:
    axes.set_xscale('log')
    axes.set_xlim(*_limits(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.xaxis.set_major_formatter(_percent)
    axes.xaxis.tick_top()
    axes.tick_params(axis='both', length=0)
    axes.grid(axis='x', which='major', color='#dddddd', lw=0.7)
    axes.axvline(1, color='#222222', lw=1.2, zorder=1)
    for side in axes.spines.values():
        side.set_visible(False)
    labels = [line.label for line in lines]
    axes.set_yticks(range(len(lines)), labels)
    for y, line in enumerate(lines):
        if line.heading:
            axes.annotate(
                line.heading, (0, y), (-72 * LABEL_INCHES, 0), va='center',
                xycoords=('axes fraction', 'data'),
                textcoords='offset points', annotation_clip=False,
                weight='bold', fontsize=9.5 if line.strong else 8,
                color='#000000' if line.strong else '#444444')
        elif line.label:
            axes.axhline(y, color='#f0f0f0', lw=0.6, zorder=0)
            _draw_row(axes, y, line)


def _legend(figure: Any, lines: Any) -> None:
    handles = [lines([], [], marker='o', color=STOCK_COLOUR, ls='', ms=7),
               lines([], [], marker='D', color=OURS_COLOUR, ls='', ms=6),
               lines([], [], color='#222222', lw=1.2)]
    figure.legend(handles, ['stock driver', 'this driver',
                            'the same disk unprotected'], ncol=3,
                  loc='upper right', frameon=False, fontsize=9,
                  bbox_to_anchor=(0.995, 0.995))


def _title(figure: Any, inches: Tuple[float, float], known: Dict[str, str]
           ) -> None:
    left = 0.2 / inches[0]
    figure.text(left, 1 - 0.3 / inches[1], 'QEMU block replication: what is '
                'left of the unprotected speed', fontsize=14, weight='bold',
                va='center')
    lines = ['Speed in % of the same disk unprotected (of a checkpoint: of '
             'one without disks), logarithmic; right is better.',
             f"Median of runs: {known['runs']}.  {known['date']}, QEMU "
             f"{known['QEMU'].split()[-1]}, {known['kernel']}, "
             f"{known['CPU']}."]
    for number, line in enumerate(lines):
        figure.text(left, 1 - (0.58 + 0.17 * number) / inches[1], line,
                    va='center', color='#444444')


def draw(path: Path, outcome: Outcome) -> None:
    """Write the picture, if there is anything to show."""
    matplotlib: Any = importlib.import_module('matplotlib')
    matplotlib.rcParams.update(FONT)
    canvas: Any = importlib.import_module('matplotlib.figure')
    artists: Any = importlib.import_module('matplotlib.lines')
    columns = _columns(_blocks(outcome))
    height = max(len(lines) for lines in columns)
    if not height:
        return
    inches = (max(2, len(columns)) * COLUMN_INCHES,
              height * LINE_INCHES + HEAD_INCHES + FOOT_INCHES)
    figure = canvas.Figure(figsize=inches)
    for number, lines in enumerate(columns):
        left = COLUMN_INCHES * number + 0.2 + LABEL_INCHES
        size = len(lines) * LINE_INCHES
        axes = figure.add_axes((
            left / inches[0], 1 - (HEAD_INCHES + size) / inches[1],
            AXES_INCHES / inches[0], size / inches[1]))
        _draw_column(axes, lines)
        axes.annotate('ours :\nstock', (1, 1), (3, 6), fontsize=7.5,
                      xycoords='axes fraction', textcoords='offset points',
                      color='#444444')
    _title(figure, inches, outcome.facts)
    _legend(figure, artists.Line2D)
    figure.savefig(path, format='svg', metadata={'Date': None})
