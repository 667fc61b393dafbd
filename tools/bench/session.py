# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures all cells some times over, and tells how far it is."""

import sys
import time
from subprocess import SubprocessError
from typing import Dict, List, Set, Tuple

from figures import Cell, Row, Samples, Setting
from groups import GROUPS, Images
from monitor import BenchError
from subject import OURS, STOCK, UNPROTECTED

PROGRESS_SECONDS = 10.0
WIDTH = 78


class Progress:
    """One line that is redrawn, or a line now and then."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._tty = sys.stderr.isatty()
        self._told = 0.0

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._begin

    def show(self, text: str) -> None:
        """Say what is being done."""
        line = f'[bench] {self.seconds:4.0f} s  {text}'
        if self._tty:
            print(f'\r{line[:WIDTH]:<{WIDTH}}', end='', file=sys.stderr,
                  flush=True)
        elif self.seconds >= self._told:
            self._told = self.seconds + PROGRESS_SECONDS
            print(line, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Say something that stays."""
        self.wipe()
        print(f'[bench] {text}', file=sys.stderr, flush=True)

    def wipe(self) -> None:
        """Remove the line that is being redrawn."""
        if self._tty:
            print(f"\r{'':<{WIDTH}}\r", end='', file=sys.stderr, flush=True)


def chosen(group: str, cells: List[Cell], match: List[str]) -> List[Cell]:
    """Those with all texts in their names, and what is the limit of those."""
    found = [cell for cell in cells
             if all(text in cell.name for text in match)]
    limits = [row.figures[UNPROTECTED] for cell in found for row in cell.rows]
    return [cell for cell in cells if cell in found or not cell.rows and any(
        limit.startswith(f'{group}: {cell.name}') for limit in limits)]


class Session:
    """A whole run of the benchmark."""

    def __init__(self, setting: Setting, names: List[str],
                 match: List[str], progress: Progress) -> None:
        self._setting = setting
        self._progress = progress
        self.samples = Samples()
        self.failed: List[str] = []
        self.seconds: Dict[str, float] = {}
        self._dead: Set[Tuple[str, str, str]] = set()
        images = Images(setting)
        self._cells: Dict[str, List[Cell]] = {}
        for name in names:
            progress.show(f'{name}: preparing')
            self._cells[name] = chosen(
                name, GROUPS[name].cells(setting, images), match)
        if not any(self._cells.values()):
            raise BenchError(f"no name has all of: {', '.join(match)}")

    @property
    def rows(self) -> Dict[str, List[Row]]:
        """The rows of each group."""
        return {name: [row for cell in cells for row in cell.rows]
                for name, cells in self._cells.items()}

    def run(self) -> int:
        """Measure everything; return in how many runs."""
        done = 0
        while done < self._setting.pace.runs and self._has_time(done):
            self._run(done)
            done += 1
        self._progress.wipe()
        return done

    def _has_time(self, done: int) -> bool:
        """Whether another run ends in time, if it is like those before."""
        pace = self._setting.pace
        if not done or (self._progress.seconds * (done + 1) / done
                        <= 60 * pace.minutes):
            return True
        self._setting.note(f'{done} of {pace.runs} runs: another one would '
                           f'not end in {pace.minutes:g} minutes')
        return False

    def _run(self, run: int) -> None:
        """Measure everything once."""
        runs = self._setting.pace.runs
        total = sum(map(len, self._cells.values())) * runs
        done = run * total // runs
        for name, cells in self._cells.items():
            begin = time.monotonic()
            for cell in cells:
                self._progress.show(f'{100 * done // total:2d} %  run '
                                    f'{run + 1}  {name}: {cell.name}')
                self._measure(run, name, cell)
                done += 1
            self.seconds[name] = (self.seconds.get(name, 0)
                                  + time.monotonic() - begin)

    def _measure(self, run: int, group: str, cell: Cell) -> None:
        """Measure all subjects, one after the other."""
        subjects = list(cell.subjects)
        if run % 2 and subjects[-2:] == [STOCK, OURS]:
            # none of the two is always the second
            subjects[-2:] = [OURS, STOCK]
        for name in subjects:
            key = (group, cell.name, name)
            if key in self._dead:
                continue
            try:
                self.samples.record(run, name, cell.measure(
                    self._setting.subjects[name]))
            except (BenchError, OSError, SubprocessError) as exc:
                # do not wait for it in each run
                self._dead.add(key)
                self.failed.append(f'{group}: {cell.name}: {name}: {exc}')
                self._progress.say(f'failed: {self.failed[-1]}')
