# SPDX-License-Identifier: GPL-2.0-or-later
"""The table and the files of a run."""

import json
import os
import platform
import subprocess
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

from figures import Median, Row, Samples
from goals import verdicts
from place import Place, file_system
from subject import NAMES, OURS, STOCK, UNPROTECTED, Subject

COLUMNS = ['unprotected', 'stock', 'ours', 'ours/stock', 'ours/unprotected']
WIDTHS = [12, 13, 13, 11, 17]
LINE_WIDTH, UNIT_WIDTH = 48, 12
LEGEND = ('Medians of the runs, ratios by run.  No mark: the runs are within '
          '10 % of the median, ~ 25 %, ? further apart.  + more is better, '
          '- less is better.')


class Outcome(NamedTuple):
    """All that a run has to tell."""
    samples: Samples
    rows: Dict[str, List[Row]]
    facts: Dict[str, str]
    notes: List[str]
    failed: List[str]

    @property
    def all_rows(self) -> List[Row]:
        """The rows of all groups."""
        return [row for rows in self.rows.values() for row in rows]


def _cpu() -> str:
    for line in Path('/proc/cpuinfo').read_text().splitlines():
        if line.startswith('model name'):
            return line.split(':', 1)[1].strip()
    return platform.machine()


def _output(command: List[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True,
                          timeout=60).stdout.splitlines()[0]


def facts(place: Place, subjects: Dict[str, Subject]) -> Dict[str, str]:
    """Where and with what this was measured."""
    pinned = ('not pinned' if place.near is None else
              f'guest side on {place.near}, other side on {place.far}')
    return {
        'date': datetime.now().strftime('%Y-%m-%d %H:%M'),
        'QEMU': _output([str(subjects[OURS].tool('qemu-img')), '--version']),
        'fio': _output(['fio', '--version']),
        'kernel': f'{platform.system()} {platform.release()}',
        'CPU': f'{os.cpu_count()} x {_cpu()}, {pinned}',
        'disk': f'{file_system(place.disk)}, folder {place.disk.parent}',
        'load at the start': ' '.join(f'{each:.2f}'
                                      for each in os.getloadavg()),
    }


def number(value: float) -> str:
    """Three digits that count."""
    if abs(value) >= 100:
        return f'{value:,.0f}'
    if abs(value) >= 10:
        return f'{value:.1f}'
    return f'{value:.2f}' if abs(value) >= 0.1 else f'{value:.3g}'


def _shown(median: Optional[Median], unit: str = '') -> str:
    if median is None:
        return '-'
    mark = f' {median.mark}' if median.mark else ''
    return f'{number(median.value)}{unit}{mark}'


def _figures(samples: Samples, row: Row) -> List[str]:
    return [*(_shown(samples.median(row, name)) for name in NAMES),
            _shown(samples.ratio(row, OURS, STOCK), 'x'),
            _shown(samples.ratio(row, OURS, UNPROTECTED), 'x')]


def _line_name(row: Row) -> str:
    return f'{row.line}, {row.mark}' if row.mark else row.line


def _unit(row: Row) -> str:
    return f"{row.unit.name} {'+' if row.unit.more_is_better else '-'}"


def _by_title(outcome: Outcome) -> List[Any]:
    return [(group, title, list(rows))
            for group, of_group in outcome.rows.items()
            for title, rows in groupby(
                sorted(of_group, key=lambda row: [
                    each.title for each in of_group].index(row.title)),
                key=lambda row: row.title)]


def _verdict_lines(outcome: Outcome) -> List[str]:
    lines = []
    for each in verdicts(outcome.samples, outcome.all_rows):
        met = 'reached' if each.met else 'MISSED'
        lines.append(f'{met}: {each.text}: {number(each.worst)} '
                     f'({each.bound}; worst: {each.where})')
    return lines


def _remarks(outcome: Outcome) -> Dict[str, List[str]]:
    return {title: lines for title, lines in {
        'Goals': _verdict_lines(outcome),
        'Notes': outcome.notes,
        'Failed': outcome.failed}.items() if lines}


def as_text(outcome: Outcome) -> str:
    """For the terminal."""
    lines = [f'{name}: {value}' for name, value in outcome.facts.items()]
    lines += ['', LEGEND]
    group = None
    for name, title, rows in _by_title(outcome):
        if name != group:
            group = name
            lines += ['', f'{group:<{4 + LINE_WIDTH + UNIT_WIDTH}}' + ''.join(
                f'{column:>{width}}'
                for column, width in zip(COLUMNS, WIDTHS))]
        lines.append(f'  {title}')
        for row in rows:
            figures = ''.join(f'{figure:>{width}}' for figure, width in zip(
                _figures(outcome.samples, row), WIDTHS))
            lines.append(f'    {_line_name(row):<{LINE_WIDTH}}'
                         f'{_unit(row):<{UNIT_WIDTH}}{figures}')
    for title, remarks in _remarks(outcome).items():
        lines += ['', title, *(f'  {each}' for each in remarks)]
    return '\n'.join(lines)


def as_markdown(outcome: Outcome) -> str:
    """The same as a document."""
    lines = ['# Block replication: ours and the stock driver', '',
             '![chart](chart.svg)', '']
    lines += [f'* {name}: {value}' for name, value in outcome.facts.items()]
    lines += ['', LEGEND]
    group = None
    for name, title, rows in _by_title(outcome):
        if name != group:
            group = name
            lines += ['', f'## {group}']
        lines += ['', f'### {title}', '',
                  f"| | unit | {' | '.join(COLUMNS)} |",
                  '|---|---|' + '---:|' * len(COLUMNS)]
        for row in rows:
            cells = ' | '.join(_figures(outcome.samples, row))
            lines.append(f'| {_line_name(row)} | {_unit(row)} | {cells} |')
    for title, remarks in _remarks(outcome).items():
        lines += ['', f'## {title}', '', *(f'* {each}' for each in remarks)]
    return '\n'.join(lines) + '\n'


def as_json(outcome: Outcome) -> str:
    """The same for programs, with each sample."""
    rows = []
    for row in outcome.all_rows:
        medians = {name: outcome.samples.median(row, name) for name in NAMES}
        rows.append({
            'group': row.group, 'title': row.title, 'line': row.line,
            'mark': row.mark, 'unit': row.unit.name,
            'more_is_better': row.unit.more_is_better,
            'medians': {name: each.value for name, each in medians.items()
                        if each},
            'samples': {name: outcome.samples.of_row(row, name)
                        for name in NAMES},
            'gain': outcome.samples.gain(row)})
    goals = [each._asdict()
             for each in verdicts(outcome.samples, outcome.all_rows)]
    return json.dumps({'facts': outcome.facts, 'rows': rows, 'goals': goals,
                       'notes': outcome.notes, 'failed': outcome.failed,
                       'figures': outcome.samples.all}, indent=1) + '\n'
