#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""How fast disks are that this driver replicates, the stock one, and none.

All three are measured in turn, in each of the runs.  A QEMU without a guest
stands for each host, an NBD client for its guest.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path
from typing import Dict, List

import command
from chart import draw
from figures import Pace, Setting
from groups import GROUPS
from monitor import BenchError
from place import Place, make_place
from report import Outcome, as_json, as_markdown, as_text, facts
from server import launch_qemu
from session import Progress, Session
from subject import NAMES, OURS, STOCK, UNPROTECTED, Subject, driver_options

PACE = Pace(runs=3, minutes=14.5, steady=0.8, ramp=0.25, blocks=8192,
            checkpoints=3, quick=False)
QUICK = Pace(runs=1, minutes=14.5, steady=0.3, ramp=0.1, blocks=1024,
             checkpoints=2, quick=True)


class ListGroups(argparse.Action):
    """An option that prints the groups and ends."""

    def __call__(self, *_args: object) -> None:
        for name, group in GROUPS.items():
            print(f'{name:<12}{group.about}')
        sys.exit()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, prog='./run bench')
    parser.add_argument('--ours', type=Path, required=True,
                        help=argparse.SUPPRESS)
    parser.add_argument('--stock', type=Path, required=True,
                        help=argparse.SUPPRESS)
    parser.add_argument('--cache', type=Path, required=True,
                        help=argparse.SUPPRESS)
    parser.add_argument('--runs', type=int, metavar='N',
                        help=f'how often to measure (default: {PACE.runs})')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='begin no run that would not end in this time '
                        f'(default: {PACE.minutes:g})')
    parser.add_argument('--only', nargs='+', metavar='GROUP',
                        choices=list(GROUPS), help='only these groups')
    parser.add_argument('--match', nargs='+', metavar='TEXT', default=[],
                        help='only what has all these texts in its name, as '
                        'the progress shows it, and what it is compared with')
    parser.add_argument('--list', action=ListGroups, nargs=0,
                        help='print the groups')
    parser.add_argument('--quick', action='store_true',
                        help='few and short measurements, to see that they '
                        'work')
    parser.add_argument('--output', type=Path, metavar='DIR',
                        help='where the table and the chart go (default: a '
                        'new folder in the cache)')
    parser.add_argument('--free', action='store_true',
                        help='let the kernel choose the CPUs')
    parser.add_argument('--memory-dir', type=Path, metavar='DIR',
                        default=Path('/dev/shm'),
                        help='a tmpfs (default: %(default)s)')
    parser.add_argument('--disk-dir', type=Path, metavar='DIR',
                        help='a folder on a disk (default: the cache)')
    return parser.parse_args()


def find_subjects(options: argparse.Namespace, place: Place
                  ) -> Dict[str, Subject]:
    """Ask both builds what they can."""
    # what is faster in QEMU itself is no merit of the driver
    builds = {UNPROTECTED: options.ours, STOCK: options.stock,
              OURS: options.ours}
    subjects = {}
    for name in NAMES:
        subject = Subject(name, builds[name])
        with launch_qemu(place, subject) as server:
            schema = server.monitor.cmd('query-qmp-schema')
        subjects[name] = subject._replace(
            options=driver_options(schema, 'replication'))
    return subjects


def write_files(folder: Path, outcome: Outcome) -> None:
    """Keep the results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'result.md').write_text(as_markdown(outcome))
    (folder / 'result.json').write_text(as_json(outcome))
    draw(folder / 'chart.svg', outcome)


def run(options: argparse.Namespace, place: Place) -> int:
    """Measure; print and keep the results."""
    pace = QUICK if options.quick else PACE
    pace = pace._replace(runs=options.runs or pace.runs,
                         minutes=options.minutes or pace.minutes)
    notes: List[str] = []
    subjects = find_subjects(options, place)
    setting = Setting(place, pace, subjects, notes.append)
    known = facts(place, subjects)
    progress = Progress()
    session = Session(setting, options.only or list(GROUPS), options.match,
                      progress)
    known['runs'] = str(session.run())
    outcome = Outcome(session.samples, session.rows, known, notes,
                      session.failed)
    print(as_text(outcome))
    folder = options.output or options.cache / 'bench' / (
        datetime.now().strftime('%Y%m%d-%H%M%S'))
    write_files(folder, outcome)
    spent = ', '.join(f'{name} {seconds:.0f} s'
                      for name, seconds in session.seconds.items())
    progress.say(f'took {progress.seconds:.0f} s: {spent}')
    progress.say(f'table and chart: {folder}')
    return 1 if session.failed else 0


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    command.begin()
    disk = options.disk_dir or options.cache
    try:
        with make_place(options.memory_dir, disk, options.free) as place:
            return run(options, place)
    except BenchError as exc:
        print(f'error: {exc}', file=sys.stderr)
        return 1


if __name__ == '__main__':
    sys.exit(main())
