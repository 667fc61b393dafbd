#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of everything that can happen to replicated disks.

QEMU does each step, a small model foretells what every read returns, which
calls succeed and what the status says.
"""

import argparse
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from random import SystemRandom
from typing import Optional


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build-dir', type=Path, required=True,
                        metavar='DIR', help='folder of the built QEMU')
    parser.add_argument('--qemu-src', type=Path, required=True,
                        metavar='DIR', help='folder of the QEMU source')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='where the random numbers begin')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='how long to run (default: 3)')
    parser.add_argument('--sequences', type=int, metavar='K',
                        help='how many sequences to run, however long it '
                        'takes')
    parser.add_argument('--sequence', type=int, metavar='I',
                        help='begin with this one, and run only one if '
                        'nothing else is asked for')
    parser.add_argument('--jobs', type=int, default=1, choices=(1, 2),
                        help='sequences at a time (default: %(default)s)')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='where images go (default: the system\'s folder '
                        'for temporary files)')
    options = parser.parse_args()
    if options.seed is None:
        options.seed = SystemRandom().randrange(1 << 32)
    return options


def terminate(number: int, _frame: Optional[object]) -> None:
    """End by a signal, but clean up."""
    raise SystemExit(128 + number)


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminate)
    # QEMU's own modules for QMP come with its source.
    sys.path.insert(0, str(options.qemu_src / 'python'))
    # A QEMU that dies is reported here.
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    # pylint: disable=import-outside-toplevel
    from schedule import Schedule
    work = Path(tempfile.mkdtemp(prefix='soak-', dir=options.work_dir))
    try:
        return Schedule(options, work).run()
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
