# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs sequences at a time, tells how far they are, stops at a difference."""

import argparse
import multiprocessing
import queue
import signal
import sys
import time
from pathlib import Path
from typing import Any, List, Optional

from host import Setup
from play import Player, Result
from sequence import Stats

MINUTES = 3.0
PROGRESS_SECONDS = 10.0
REDRAW_SECONDS = 0.5


class Schedule:
    """A run of the program."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self._options = options
        self._work = work
        self._stats = Stats()
        self._begin = time.monotonic()
        self._tty = sys.stdout.isatty()
        self._told = 0.0
        self._first = options.sequence or 0
        self._end = sys.maxsize
        self._deadline: Optional[float] = None
        if options.sequences is not None:
            self._end = self._first + options.sequences
        elif options.sequence is not None and options.minutes is None:
            self._end = self._first + 1
        else:
            minutes = MINUTES if options.minutes is None else options.minutes
            self._deadline = self._begin + 60 * minutes

    def run(self) -> int:
        """Run all sequences; return the exit status."""
        print(f'seed {self._options.seed}', flush=True)
        context = multiprocessing.get_context('fork')
        results: Any = context.Queue()
        number: Any = context.Value('q', self._first)
        workers = [context.Process(target=self._work_on,
                                   args=(job, number, results), daemon=True)
                   for job in range(self._options.jobs)]
        for worker in workers:
            worker.start()
        try:
            failure = self._collect(results, workers)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join(60)
        self._wipe()
        if failure:
            print(failure, flush=True)
        print(self._stats, flush=True)
        return 1 if failure else 0

    def _work_on(self, job: int, number: Any, results: Any) -> None:
        """What each worker does."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        folder = self._work / str(job)
        folder.mkdir()
        player = Player(Setup(self._options.build_dir, folder),
                        self._options.seed)
        try:
            failed = False
            while not failed and not self._is_late():
                with number.get_lock():
                    mine = number.value
                    number.value += 1
                if mine >= self._end:
                    break
                result = player.play(mine)
                results.put(result)
                failed = result.failure is not None
        finally:
            player.close()
            results.put(None)

    def _is_late(self) -> bool:
        return (self._deadline is not None
                and time.monotonic() > self._deadline)

    def _collect(self, results: Any, workers: List[Any]) -> Optional[str]:
        """Add up what the workers do until all end; return a failure."""
        running = len(workers)
        while running:
            self._tell_progress()
            dead = [job for job, worker in enumerate(workers)
                    if worker.exitcode]
            try:
                result = results.get(timeout=REDRAW_SECONDS)
            except queue.Empty:
                if dead:
                    return self._post_mortem(dead[0])
                continue
            if result is None:
                running -= 1
                continue
            self._stats.add(result.stats)
            if result.failure is not None:
                return self._describe(result)
        return None

    def _post_mortem(self, job: int) -> str:
        """What is known of a worker that ended in the middle."""
        trace = self._work / str(job) / 'trace'
        return f"the test itself has ended:\n{trace.read_text('utf-8')}"

    def _tell_progress(self) -> None:
        now = time.monotonic()
        if now - self._told < (REDRAW_SECONDS if self._tty
                               else PROGRESS_SECONDS):
            return
        self._told = now
        stats = self._stats
        line = (f'{now - self._begin:6.0f} s  {stats.sequences} sequences, '
                f'{stats.steps} steps, {stats.hits} faults hit, '
                f'{stats.checks} checks')
        print(f'\r{line:<78}' if self._tty else line,
              end='' if self._tty else '\n', flush=True)

    def _wipe(self) -> None:
        if self._tty:
            print(f"\r{'':<78}\r", end='', flush=True)

    def _describe(self, result: Result) -> str:
        seed, number = self._options.seed, result.number
        lines: List[str] = [
            f'sequence {number} differs; to repeat it:',
            f'  --seed {seed} --sequence {number}']
        if result.before:
            lines += [
                'if that shows nothing, with those before in the same QEMU:',
                f'  --seed {seed} --sequence {number - result.before} '
                f'--sequences {result.before + 1}']
        return '\n'.join([*lines, '', str(result.failure)])
