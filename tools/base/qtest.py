#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a qtest of the build, with the firmware of Debian's packages.

The build has no firmware of its own, and qtests do not tell QEMU where else
there is some: they run a script that does.
"""

import argparse
import os
from pathlib import Path

FIRMWARE = ('/usr/share/seabios', '/usr/share/qemu')
PROGRAM = 'qemu-system-x86_64'


def make_program(build: Path, work: Path) -> Path:
    """Leave a QEMU that finds its firmware in work."""
    program = work / PROGRAM
    folders = ' '.join(f'-L {folder}' for folder in FIRMWARE)
    work.mkdir(parents=True, exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec "{build / PROGRAM}" {folders} "$@"\n',
                       encoding='utf-8')
    program.chmod(0o755)
    return program


def main() -> None:
    """Become the test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build', type=Path, required=True)
    parser.add_argument('--work', type=Path, required=True)
    parser.add_argument('test')
    args, rest = parser.parse_known_args()
    test = args.build / 'tests/qtest' / args.test
    os.environ['QTEST_QEMU_BINARY'] = str(make_program(args.build, args.work))
    os.environ['QTEST_QEMU_IMG'] = str(args.build / 'qemu-img')
    os.execv(test, [str(test), *rest])


if __name__ == '__main__':
    main()
