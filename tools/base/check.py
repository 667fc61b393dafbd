#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Run suites of the root's meson.build and count what passed and failed."""

import argparse
import fcntl
import hashlib
import json
import os
from pathlib import Path
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, TextIO

import sanitize

ROOT = Path(__file__).resolve().parents[2]
MESON = [sys.executable, '-m', 'mesonbuild.mesonmain']

# Say that tests still run after so long without a word from them.
QUIET_SECONDS = 10

# Of what a failed test has said, so many lines stand at the end of the run: in
# between they are far above, and a log may be kept in part only.
SAID_LINES = 60

# How many times longer a test may take in a build with sanitizers.
SANITIZE_TIMES = 5


class Result(NamedTuple):
    """One case: a line of TAP, or a test without them."""
    outcome: str
    name: str
    reason: str = ''


def lock(path: Path) -> TextIO:
    """Keep other runs of this checkout's tests out until this one ends."""
    file = open(path, 'w', encoding='utf-8')
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print('[check] waiting for another check of this checkout',
              file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def setup(folder: Path, args: argparse.Namespace) -> None:
    """Configure the tests from scratch: it takes a second."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [*MESON, 'setup', str(folder), str(ROOT),
               f'-Dqemu_build={args.build}', f'-Dqemu_tree={args.tree}',
               f'-Dqemu_pristine={args.pristine}', f'-Dcache={args.cache}',
               f'-Dseed={args.seed}']
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, check=False)
    if result.returncode:
        sys.exit(f'{result.stdout}\nerror: meson setup failed')


def relay(source: int) -> None:
    """Pass output on as it comes, and break long silences."""
    start = time.monotonic()
    while True:
        if not select.select([source], [], [], QUIET_SECONDS)[0]:
            print(f'[check] running for {time.monotonic() - start:.0f} s',
                  flush=True)
            continue
        data = os.read(source, 65536)
        if not data:
            return
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def sanitizing(folder: Path, build: Path) -> List[str]:
    """Options of meson test for a build with sanitizers."""
    wrapper = [sys.executable, sanitize.__file__,
               '--reports', str(folder / 'sanitizers')]
    reason = sanitize.why_no_leaks(build)
    if reason:
        print(f'[check] leaks are not looked for: {reason}', flush=True)
        wrapper.append('--no-leaks')
    return ['--wrapper', shlex.join(wrapper),
            '--timeout-multiplier', str(SANITIZE_TIMES)]


def run_tests(folder: Path, args: argparse.Namespace) -> None:
    """Run meson test; its verdict is read from its log afterwards."""
    command = [*MESON, 'test', '-C', str(folder), '--print-errorlogs',
               '--no-rebuild', *(f'--suite={name}' for name in args.suites)]
    if args.sanitize:
        command += sanitizing(folder, args.build)
    if sys.stdout.isatty():
        # meson shows its own progress there
        subprocess.run(command, check=False)
        return
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        relay(process.stdout.fileno())


TAP_LINE = re.compile(r'(?P<bad>not )?ok\b *\d* *-? *(?P<name>[^#]*?) *'
                      r'(?:# *SKIP\w*:? *(?P<reason>.*))?', re.IGNORECASE)


def tap_results(test: str, output: str) -> Iterator[Result]:
    """The cases of a test that speaks TAP."""
    for line in output.splitlines():
        match = TAP_LINE.fullmatch(line.strip())
        if match and line[:1] != ' ':
            name = f"{test}: {match['name']}"
            if match['reason'] is not None:
                yield Result('skipped', name, match['reason'])
            else:
                yield Result('failed' if match['bad'] else 'passed', name)


def results(entry: Dict[str, Any]) -> List[Result]:
    """The cases of one test in meson's log."""
    # "project:suite / test"
    name = entry['name'].split(' / ')[-1]
    cases = list(tap_results(name, entry.get('stdout', '')))
    outcomes = {case.outcome for case in cases}
    if entry['result'] == 'SKIP' and not cases:
        return [Result('skipped', name, entry.get('stdout', '').strip())]
    if entry['result'] not in ('OK', 'SKIP') and 'failed' not in outcomes:
        # it crashed, or took too long
        cases.append(Result('failed', f"{name}: {entry['result']}"))
    return cases or [Result('passed', name)]


def last_words(entry: Dict[str, Any]) -> str:
    """What a failed test has said last."""
    said = entry.get('stdout', '') + entry.get('stderr', '')
    lines = said.splitlines()[-SAID_LINES:]
    return '\n'.join([f"--- {entry['name']}:", *lines])


def summarise(folder: Path) -> int:
    """Print what was skipped and how many passed and failed."""
    # the log is called after the wrapper too, if there is one
    entries = [json.loads(line)
               for log in folder.glob('meson-logs/testlog*.json')
               for line in log.read_text('utf-8').splitlines()]
    cases: List[Result] = []
    for entry in entries:
        outcome = results(entry)
        cases += outcome
        if any(case.outcome == 'failed' for case in outcome):
            print(last_words(entry))
    count = {outcome: sum(case.outcome == outcome for case in cases)
             for outcome in ('passed', 'failed', 'skipped')}
    for case in cases:
        if case.outcome == 'skipped':
            print(f'skipped: {case.name}: {case.reason}')
    for case in cases:
        if case.outcome == 'failed':
            print(f'failed: {case.name}')
    if not count['skipped']:
        del count['skipped']
    print(', '.join(f'{number} {what}' for what, number in count.items()))
    return 0 if count['passed'] and not count['failed'] else 1


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ('--build', '--tree', '--pristine', '--cache'):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument('--seed', default='1')
    parser.add_argument('--sanitize', action='store_true',
                        help='the build is one with sanitizers')
    parser.add_argument('suites', nargs='+')
    args = parser.parse_args()

    # one folder per checkout: the cache may serve several
    digest = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
    folder = args.cache / f'check-{digest}'
    with lock(args.cache / f'check-{digest}.lock'):
        setup(folder, args)
        run_tests(folder, args)
        return summarise(folder)


if __name__ == '__main__':
    sys.exit(main())
