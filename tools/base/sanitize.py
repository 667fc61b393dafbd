#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a test of a build with sanitizers, and fail it for what they find.

The sanitizers write to files, and leaks change no exit status: a test may
end a QEMU in any way and compare all of its output. The verdict on the
reports is made here, once, and any report is too much: a node that is never
freed was rarely allocated by the code that forgot it.
"""

import argparse
import os
from pathlib import Path
import re
import subprocess
import sys
import tempfile
from typing import Dict, List

SUPPRESSIONS = Path(__file__).with_name('lsan.supp')
PROBE_SECONDS = 60

FINDING = re.compile(r'ERROR: \w+Sanitizer|: runtime error: '
                     r'|Sanitizer has encountered a fatal error')
UNABLE = re.compile(r'Sanitizer has encountered a fatal error'
                    r'|was not suspended')


def environment(report: Path, leaks: bool) -> Dict[str, str]:
    """The variables that make the sanitizers report to files."""
    options = ':'.join((
        f'log_path={report}',
        f'detect_leaks={leaks:d}',
        'exitcode=0',
        # memory errors end the process, whatever exitcode says
        'abort_on_error=1',
        # GLib has no frame pointers, and is what allocates for us
        'fast_unwind_on_malloc=0',
        'print_stacktrace=1',
    ))
    # one set of flags, which either sanitizer sets
    return dict(os.environ, ASAN_OPTIONS=options, UBSAN_OPTIONS=options,
                LSAN_OPTIONS=f'suppressions={SUPPRESSIONS}:'
                             f'print_suppressions=0')


def reports(folder: Path) -> List[str]:
    """What the sanitizers wrote, a text for each process."""
    return [path.read_text('utf-8', 'replace')
            for path in sorted(folder.iterdir())]


def why_no_leaks(build: Path) -> str:
    """Why leaks cannot be looked for on this machine, if they cannot."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([build / 'qemu-img', '--version'], check=False,
                       env=environment(folder / 'report', True),
                       timeout=PROBE_SECONDS, stdout=subprocess.DEVNULL)
        if not any(map(UNABLE.search, reports(folder))):
            return ''
    return 'the leak sanitizer needs ptrace, which is not allowed here'


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--reports', type=Path, required=True)
    parser.add_argument('--no-leaks', action='store_true')
    parser.add_argument('command', nargs=argparse.REMAINDER)
    args = parser.parse_args()

    args.reports.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.reports))
    env = environment(folder / 'report', not args.no_leaks)
    result = subprocess.run(args.command, env=env, check=False)
    findings = [text for text in reports(folder) if FINDING.search(text)]
    print(*findings, sep='\n', file=sys.stderr)
    return result.returncode or bool(findings)


if __name__ == '__main__':
    sys.exit(main())
