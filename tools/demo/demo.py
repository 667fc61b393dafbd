#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Protect a running VM, kill one of its two hosts, and look for damage."""

import argparse
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from signals import held, install

# A unix socket's path has room for 107 bytes; ours adds a folder and a name.
MAX_WORK_DIR = 80


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog='./run demo', description=__doc__)
    parser.add_argument('--build-dir', type=Path, required=True,
                        metavar='DIR', help='folder of the built QEMU')
    parser.add_argument('--qemu-src', type=Path, required=True,
                        metavar='DIR', help='folder of the QEMU source')
    parser.add_argument('--cache', type=Path, required=True, metavar='DIR',
                        help='folder that keeps the guest between runs')
    parser.add_argument('--seconds', type=float, default=15, metavar='N',
                        help='time under protection before the kill '
                        '(default: %(default)s)')
    parser.add_argument('--after', type=int, default=3, metavar='N',
                        help="the guest's time after the failover "
                        '(default: %(default)s)')
    parser.add_argument('--disks', type=int, default=2, metavar='N',
                        choices=range(1, 9),
                        help='number of disks, 1 to 8 (default: %(default)s)')
    parser.add_argument('--kill', choices=('primary', 'secondary'),
                        default='primary',
                        help='the side that dies (default: %(default)s)')
    parser.add_argument('--checkpoint-ms', type=int, default=1500,
                        metavar='N', help='time between two checkpoints '
                        '(default: %(default)s)')
    parser.add_argument('--accel', choices=('auto', 'kvm', 'tcg'),
                        default='auto', help='default: KVM where it works')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='where the images go (default: the system\'s '
                        'folder for temporary files)')
    parser.add_argument('--picture', type=Path, metavar='FILE',
                        help='where a picture of it goes, as SVG (default: '
                        'demo/SIDE-killed.svg in the cache)')
    parser.add_argument('--keep', action='store_true',
                        help='leave images and logs, and say where')
    return parser.parse_args()


def run(options: argparse.Namespace, work: Path) -> int:
    """Run the demo in a folder; return the exit status."""
    # QEMU's own modules for QMP come with its source.
    sys.path.insert(0, str(options.qemu_src / 'python'))
    # They log a QEMU that was killed with its whole command line.
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    # pylint: disable=import-outside-toplevel
    from screen import Screen
    from story import Story

    screen = Screen()
    story = Story(options, work, screen)
    try:
        if story.run():
            return 0
        story.show_logs()
        return 1
    except Exception as exc:  # pylint: disable=broad-except
        screen.end_progress()
        story.show_logs()
        # A launch that failed has its whole command line below this.
        first = str(exc).split('\n\tExit code:')[0]
        screen.heading(f'FAIL: {type(exc).__name__}: {first}')
        return 1
    finally:
        screen.end_progress()
        with held():
            story.close()


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    install()
    if options.picture is None:
        options.picture = options.cache / 'demo' / f'{options.kill}-killed.svg'
    try:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.unlink(missing_ok=True)
    except OSError as exc:
        print(f'error: no room for the picture: {exc}', file=sys.stderr)
        return 2
    work = Path(tempfile.mkdtemp(prefix='colo-demo-', dir=options.work_dir))
    try:
        if len(str(work)) > MAX_WORK_DIR:
            print(f'error: {work} is too long for the path of a socket',
                  file=sys.stderr)
            return 2
        return run(options, work)
    finally:
        if options.keep:
            print(f'images and logs: {work}')
        else:
            with held():
                shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
