#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Run QEMU's own unit test of replication against our driver.

The test is compiled from the pristine source in the way that the build
compiles ours, and linked with the same objects. Each case runs in a process
of its own: a crash in one does not hide the others. The output is TAP.
"""

import argparse
import json
from pathlib import Path
import re
import shlex
import subprocess
import sys
from typing import Dict, List

from bases import read_reasons

TEST = 'tests/unit/test-replication'
OBJECT = TEST + '.p/test-replication.c.o'
DEVIATIONS = Path(__file__).with_name('stock-unit-deviations')
CASE_SECONDS = 60


def build_commands(build: Path) -> Dict[str, List[str]]:
    """The commands that the build runs, by what they make."""
    result = subprocess.run(['ninja', '-C', str(build), '-t', 'compdb', '-x'],
                            stdout=subprocess.PIPE, text=True, check=True)
    # ninja says which folder it enters before it prints the list
    entries = json.loads(result.stdout[result.stdout.index('[\n'):])
    return {entry['output']: shlex.split(entry['command'])
            for entry in entries if entry['output'] in (TEST, OBJECT)}


def compile_test(build: Path, source: Path, work: Path) -> Path:
    """Build the test from another source; return the executable."""
    work.mkdir(parents=True, exist_ok=True)
    swap = {TEST: str(work / 'test-replication'),
            OBJECT: str(work / 'test-replication.o'),
            OBJECT + '.d': str(work / 'test-replication.d')}
    commands = build_commands(build)
    swap[commands[OBJECT][-1]] = str(source)
    for output in (OBJECT, TEST):
        command = [swap.get(word, word) for word in commands[output]]
        subprocess.run(command, cwd=build, check=True)
    return Path(swap[TEST])


def list_cases(test: Path) -> List[str]:
    """The paths of the test's cases."""
    listed = subprocess.run([test, '-l'], stdout=subprocess.PIPE, text=True,
                            check=True)
    # newer versions of GLib print each as a comment of TAP
    cases = re.findall(r'^(?:# )?(/\S+)$', listed.stdout, re.MULTILINE)
    if not cases:
        sys.exit(f'{test} lists no case')
    return cases


def passes(test: Path, case: str, work: Path) -> bool:
    """Run one case; say on stderr, which is no TAP, what it said."""
    try:
        result = subprocess.run(
            [test, '-p', case], cwd=work, timeout=CASE_SECONDS, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except subprocess.TimeoutExpired:
        print(f'{case}: no end after {CASE_SECONDS} s', file=sys.stderr)
        return False
    if result.returncode:
        print(f'{case}: exit status {result.returncode}\n{result.stdout}',
              file=sys.stderr)
    return result.returncode == 0


def verdict(passed: bool, reason: str) -> str:
    """The first and last words of a TAP line, {} between them."""
    if reason:
        if passed:
            return 'not ok {} (passes: take it off the list of deviations)'
        return f'ok {{}} # SKIP differs on purpose: {reason}'
    return 'ok {}' if passed else 'not ok {}'


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build', type=Path, required=True)
    parser.add_argument('--pristine', type=Path, required=True)
    parser.add_argument('--work', type=Path, required=True)
    args = parser.parse_args()

    test = compile_test(args.build, args.pristine / f'{TEST}.c', args.work)
    cases = list_cases(test)
    deviations = read_reasons(DEVIATIONS)
    unknown = sorted(deviations.keys() - set(cases))
    print(f'1..{len(cases) + len(unknown)}')
    for number, case in enumerate(cases, 1):
        passed = passes(test, case, args.work)
        line = verdict(passed, deviations.get(case, ''))
        print(line.format(f'{number} {case}'), flush=True)
    for number, case in enumerate(unknown, len(cases) + 1):
        print(f'not ok {number} {case} (listed as deviation, but no case)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
