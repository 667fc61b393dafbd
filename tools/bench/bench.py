#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast disks are that this driver replicates, the stock one, and none.

All three are measured in turn, in each of the runs.  A QEMU without a guest
stands for each host, an NBD client for its guest.
"""

import argparse
import os
import platform
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Callable, Dict, List, Set, Tuple

import command
import failback
import primary
import resync
import secondary
from figures import Cell, Samples, Setting
from host import HostError
from hosts import OURS, STOCK, Place, file_system, make_place
from report import Report, as_chart, as_json, as_text

RUNS = 3
MINUTES = 14.5


def direct_cells(setting: Setting) -> List[Cell]:
    """Some of it on a disk with cache.direct=on."""
    result: List[Cell] = []
    for aio in primary.KINDS:
        found = primary.direct_cells(setting, aio)
        why = primary.refusal(setting.place, setting.place.disk / 'image',
                              aio)
        if why:
            setting.note(f'direct: no rows with aio={aio}: {why}')
        else:
            result += found + secondary.direct_cells(setting, aio)
    return result


GROUPS: Dict[str, Callable[[Setting], List[Cell]]] = {
    'primary': primary.cells, 'quorum': primary.quorum_cells,
    'drain': primary.drain_cells, 'resync': resync.cells,
    'failback': failback.cells, 'metadata': failback.log_cells,
    'memory': resync.memory_cells,
    'zeroes': primary.zeroes_cells, 'secondary': secondary.cells,
    'checkpoint': secondary.checkpoint_cells,
    'failover': secondary.failover_cells, 'direct': direct_cells}


def parse() -> argparse.Namespace:
    """Read the command line; tools/base/commands tells of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('--ours', '--stock', '--cache'):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument('--only', nargs='+', default=list(GROUPS))
    parser.add_argument('--match', nargs='+', default=[])
    parser.add_argument('--runs', type=int)
    parser.add_argument('--minutes', type=float, default=MINUTES)
    parser.add_argument('--quick', action='store_true')
    parser.add_argument('--output', type=Path)
    parser.add_argument('--free', action='store_true')
    parser.add_argument('--memory-dir', type=Path, default=Path('/dev/shm'))
    parser.add_argument('--disk-dir', type=Path)
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else RUNS)
    return options


def chosen(cells: List[Cell], match: List[str]) -> List[Cell]:
    """Those with all texts in their names, and what is the limit of those."""
    found = [cell for cell in cells
             if all(text in cell.name for text in match)]
    limits = [row.limit.split(': ', 1)[-1]
              for cell in found for row in cell.rows if row.limit]
    return [cell for cell in cells if cell in found or not cell.rows and any(
        limit.startswith(cell.name) for limit in limits)]


class Session:
    """A whole run of the benchmark."""

    def __init__(self, options: argparse.Namespace, place: Place) -> None:
        quick = options.quick
        self.notes: List[str] = []
        self.samples = Samples()
        self.failed: List[str] = []
        self.progress = command.Progress(sys.stderr)
        self._options = options
        self._dead: Set[Tuple[str, str]] = set()
        setting = Setting(place, 0.3 if quick else 0.8, 0.1 if quick else 0.25,
                          1024 if quick else 8192, 2 if quick else 3, quick,
                          self.notes.append)
        self._cells: Dict[str, Cell] = {}
        for name in options.only:
            self.progress.show(f'{name}: preparing')
            for cell in chosen(GROUPS[name](setting), options.match):
                self._cells[f'{name}: {cell.name}'] = cell
        if not self._cells:
            raise HostError(f"no name has all of: {', '.join(options.match)}")
        self.rows = [row for cell in self._cells.values()
                     for row in cell.rows]
        # those of a title stand together
        titles = list(dict.fromkeys((row.group, row.title)
                                    for row in self.rows))
        self.rows.sort(key=lambda row: titles.index((row.group, row.title)))

    def run(self) -> int:
        """Measure everything; return in how many runs."""
        begin, done = time.monotonic(), 0
        while done < self._options.runs:
            spent = time.monotonic() - begin
            if done and spent * (done + 1) / done > 60 * self._options.minutes:
                self.notes.append(
                    f'{done} of {self._options.runs} runs: another one would '
                    f'not end in {self._options.minutes:g} minutes')
                break
            for count, (name, cell) in enumerate(self._cells.items()):
                self.progress.show(f'run {done + 1}, '
                                   f'{100 * count // len(self._cells):2d} %  '
                                   f'{name}')
                self._measure(done, name, cell)
            done += 1
        return done

    def _measure(self, run: int, name: str, cell: Cell) -> None:
        """Measure all subjects, one after the other."""
        subjects = list(cell.subjects)
        if run % 2 and subjects[-2:] == [STOCK, OURS]:
            # none of the two is always the second
            subjects[-2:] = [OURS, STOCK]
        for subject in subjects:
            if (name, subject) in self._dead:
                continue
            try:
                self.samples.record(run, subject, cell.measure(subject))
            except (HostError, OSError, subprocess.SubprocessError) as exc:
                # do not wait for it in each run
                self._dead.add((name, subject))
                self.failed.append(f'{name}: {subject}: {exc}')
                self.progress.say(f'failed: {self.failed[-1]}')


def first_line(*words: str) -> str:
    """The first line that a command prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True,
                          timeout=60).stdout.splitlines()[0]


def facts(place: Place) -> Dict[str, str]:
    """Where and with what this was measured."""
    cpu = [line.split(':', 1)[1].strip() for line in Path(
        '/proc/cpuinfo').read_text().splitlines() if 'model name' in line]
    pinned = ('not pinned' if place.near is None else
              f'guest side on {place.near}, other side on {place.far}')
    return {
        'date': datetime.now().strftime('%Y-%m-%d %H:%M'),
        'QEMU': first_line(str(place.build(OURS) / 'qemu-img'), '--version'),
        'fio': first_line('fio', '--version'),
        'kernel': f'{platform.system()} {platform.release()}',
        'CPU': f'{os.cpu_count()} x {[*cpu, platform.machine()][0]}, '
        f'{pinned}',
        'disk': f'{file_system(place.disk)}, folder {place.disk.parent}',
        'load at the start': ' '.join(f'{each:.2f}'
                                      for each in os.getloadavg())}


def run(options: argparse.Namespace, place: Place) -> int:
    """Measure; print and keep the results."""
    known = facts(place)
    session = Session(options, place)
    known['runs'] = str(session.run())
    outcome = Report(session.samples, session.rows, known, session.notes,
                     session.failed)
    session.progress.wipe()
    table = as_text(outcome)
    print(table)
    folder = options.output or options.cache / 'bench' / (
        datetime.now().strftime('%Y%m%d-%H%M%S'))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'result.txt').write_text(table)
    (folder / 'result.json').write_text(as_json(outcome))
    (folder / 'chart.svg').write_text(as_chart(outcome))
    session.progress.say(f'table and chart: {folder}')
    return 1 if session.failed else 0


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    command.begin()
    try:
        with make_place(options.memory_dir, options.disk_dir or options.cache,
                        options.free, options.ours, options.stock) as place:
            return run(options, place)
    except HostError as exc:
        print(f'error: {exc}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
