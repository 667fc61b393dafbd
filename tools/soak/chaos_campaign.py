# SPDX-License-Identifier: GPL-2.0-or-later
"""Many rounds on many guests, and the table of what they led to."""

import argparse
import asyncio
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Tuple

from qemu.machine.machine import QEMUMachineError
from qemu.qmp import QMPError

from autopsy import backtrace, colo_gave_up
from chaos_plan import (GENERATIONS, Kind, Moment, RoundPlan, plan_guest,
                        plan_round)
from chaos_round import ChaosPair, Result, Round, wrong_blocks
from guest import Guest, get_guest
from machine import MIB, PairError, Setup, Side, kvm_works
from verify import judge

LOG_TAIL = 15
# What a step raises when QEMU does not do what it should.
FAILURES = (PairError, QMPError, QEMUMachineError, asyncio.TimeoutError,
            OSError)


class Campaign:
    """Runs the rounds; stops at the first that went wrong."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.results: List[Result] = []
        self.guests = 0
        self.blocks = 0
        self.good = True
        self._guest: Optional[Guest] = None
        self._pair: Optional[ChaosPair] = None
        self._group = -1

    def run(self) -> bool:
        """Run them all; return whether nothing was lost."""
        for name in ('qemu-system-x86_64', 'qemu-img'):
            if not (self.options.build_dir / name).exists():
                raise PairError(
                    f'there is no {name} in {self.options.build_dir}')
        for index in self._indices():
            if self._pair is None or index // GENERATIONS != self._group:
                self._finish_guest()
            if self.good:
                self._round(index)
            if not self.good:
                break
        self._finish_guest()
        self._show_table()
        return self.good

    def close(self) -> None:
        """End what runs."""
        if self._pair is not None:
            self._pair.close()
            self._pair = None

    def _indices(self) -> Iterator[int]:
        """Return the rounds to run, for as long as there is time."""
        options = self.options
        if options.round is not None:
            yield options.round
            return
        end = time.monotonic() + 60 * (options.minutes or float('inf'))
        index = 0
        while time.monotonic() < end and (options.kills is None
                                          or index < options.kills):
            yield index
            index += 1

    # Guests

    def _start_guest(self, group: int) -> ChaosPair:
        if self._guest is None:
            self._guest = get_guest(self.options.cache, say)
        plan = plan_guest(self.options.seed, group)
        self.guests += 1
        folder = self.work / f'g{self.guests}'
        folder.mkdir()
        accel = self.options.accel
        if accel == 'auto':
            accel = 'kvm' if kvm_works() else 'tcg'
        pair = ChaosPair(Setup(
            build_dir=self.options.build_dir, guest=self._guest,
            work_dir=folder, layout=plan.layout, accel=accel,
            checkpoint_ms=plan.checkpoint_ms))
        self._pair, self._group = pair, group
        pair.start_primary()
        pair.wait_for_work()
        say(f'guest {self.guests}: {plan.layout.disks} x '
            f'{plan.layout.disk_size // MIB} MiB, a checkpoint every '
            f'{plan.checkpoint_ms} ms')
        return pair

    def _finish_guest(self) -> None:
        """Have the guest checked in full; it has survived all its rounds."""
        pair = self._pair
        if pair is None:
            return
        try:
            if self.good:
                self._judge(pair)
        except FAILURES as exc:
            self._fail(f'the check of the guest: {describe(exc)}')
        finally:
            self._drop_guest()

    def _judge(self, pair: ChaosPair) -> None:
        report = pair.finish()
        verdict = judge(report, pair.images(), pair.setup.layout,
                        pair.setup.work_dir)
        self.blocks += verdict.blocks
        last = self.results[-1]
        last.wrong = max(last.wrong, verdict.wrong + verdict.host_wrong)
        say(f'guest {self.guests}: {verdict.blocks} blocks checked by the '
            f'guest, {verdict.host_blocks} in the images, '
            f'{verdict.wrong + verdict.host_wrong} wrong; {verdict.rows} of '
            f'{verdict.committed} transactions, integrity_check '
            f'{verdict.integrity}, e2fsck {verdict.e2fsck}')
        if verdict.problems:
            last.problems += verdict.problems
            self._fail('\n'.join(verdict.problems))

    def _drop_guest(self) -> None:
        pair = self._pair
        self.close()
        if pair and self.good:
            shutil.rmtree(pair.setup.work_dir)

    def _fail(self, problem: str) -> None:
        """Note a problem, with all that may explain it."""
        self.good = False
        say(f'FAIL: {problem}')
        assert self._pair
        show_logs(self._pair.sides)

    # Rounds

    def _round(self, index: int) -> None:
        group = index // GENERATIONS
        plan = plan_round(self.options.seed, index,
                          plan_guest(self.options.seed, group))
        if self.options.write_behind != 'random':
            plan = replace(plan, behind=self.options.write_behind == 'on')
        try:
            pair = self._pair or self._start_guest(group)
        except FAILURES as exc:
            self._fail(f'the start of the guest: {describe(exc)}')
            return
        this = Round(pair, plan)
        self.results.append(this.result)
        try:
            this.run()
        except FAILURES as exc:
            this.result.wrong = wrong_blocks(pair)
            self._explain(this, describe(exc))
        say(round_line(this.result))
        if this.result.wrong or this.result.problems:
            self._fail('\n'.join(this.result.problems)
                       or 'the guest read wrong blocks')
        elif this.result.gave_up:
            self._drop_guest()

    def _explain(self, this: Round, error: str) -> None:
        """Find out why a round did not come to its end."""
        assert self._pair
        traces: Dict[str, str] = {}
        for side in self._pair.sides:
            pid = side.vm.get_pid()
            if side.vm.is_running() and pid is not None:
                traces[side.name] = backtrace(pid)
                path = side.path('backtrace')
                path.write_text(traces[side.name])
                say(f'{side.name}: the stacks of its threads are in {path}')
        if this.survivor and this.survivor.name in traces \
                and not this.result.took_over and not this.result.wrong:
            where = colo_gave_up(traces[this.survivor.name])
            if where:
                this.result.gave_up = f'{error}; COLO waits in {where}()'
                return
        this.result.problems.append(error)

    # The end

    def _show_table(self) -> None:
        rows: Dict[Tuple[Kind, Moment], List[Result]] = {}
        for result in self.results:
            key = (result.plan.kind, result.plan.moment)
            rows.setdefault(key, []).append(result)
        print(f'\n{"what":<44}{"when":<40}{"kills":>6}{"took over":>10}'
              f'{"gave up":>8}{"wrong":>6}')
        for kind in Kind:
            for moment in Moment:
                if (kind, moment) in rows:
                    print(f'{kind.value:<44}{moment.value:<40}'
                          + counts(rows[kind, moment]))
        print(f'{"all":<84}' + counts(self.results))
        self._show_times()
        for reason, times in Counter(
                result.gave_up for result in self.results
                if result.gave_up).items():
            print(f'COLO itself gave up {times} times: {reason}')
        blocks = self.blocks + sum(r.blocks for r in self.results)
        print(f'{self.guests} guests; {blocks} blocks checked; '
              f'seed {self.options.seed}')
        print('PASS' if self.good else 'FAIL', flush=True)

    def _show_times(self) -> None:
        times = sorted(result.running_ms for result in self.results
                       if result.running_ms is not None)
        if times:
            print(f'guest running again: median {times[len(times) // 2]:.0f} '
                  f'ms, longest {times[-1]:.0f} ms (with the time that a '
                  'silent side was waited for)')


def counts(results: Iterable[Result]) -> str:
    """Return the numbers of a row of the table."""
    many = list(results)
    return (f'{len(many):>6}{sum(r.took_over for r in many):>10}'
            f'{sum(bool(r.gave_up) for r in many):>8}'
            f'{sum(r.wrong for r in many):>6}')


def round_line(result: Result) -> str:
    """Say how a round went."""
    plan: RoundPlan = result.plan
    head = (f'round {plan.index:3}  {plan.kind.value}, {plan.moment.value} '
            f'({"; ".join(result.notes)}): ')
    if result.gave_up:
        return head + f'COLO GAVE UP: {result.gave_up}'
    if result.running_ms is None:
        return head + f'FAILED, {result.wrong} wrong'
    return head + (f'guest runs after {result.running_ms:.0f} ms, '
                   f'{result.checkpoints} checkpoints, {result.blocks} blocks '
                   f'checked, {result.wrong} wrong')


def describe(exc: BaseException) -> str:
    """Say what was raised."""
    return f'{type(exc).__name__}: {exc}'


def say(text: str) -> None:
    """Print a line at once."""
    print(f'{time.strftime("%H:%M:%S")}  {text}', flush=True)


def show_logs(sides: List[Side]) -> None:
    """Show the ends of the logs of the last sides."""
    for side in sides[-2:]:
        for name in (f'{side.name}.log', 'guest.log'):
            path = side.path(name)
            lines = path.read_text(errors='replace').splitlines() \
                if path.exists() else []
            if lines:
                say(f'{path}, its end:')
                print('\n'.join(lines[-LOG_TAIL:]), flush=True)
