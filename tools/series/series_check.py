#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Do with each series what a maintainer would do with it.

Each is applied alone, or with what its cover letter says that it is based on,
to QEMU's plain source, without a merge.  Each patch has to please checkpatch;
the objects that it touches are built after it.  Where the series ends, all
that its tests need is built, and they are run.

Then all are applied in their order.  The block layer is built and its unit
tests are run where each of them ends.  What comes out at the last one is what
./run build builds; there, everything else is tested.
"""

import argparse
import fcntl
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import List, NamedTuple, Optional, Set

from apply import apply_series
from branch import Branches, Work, branches_of
from series import Writer, add_arguments, differing
from tree import Tree
from bases import Base, Failure, REFERENCE, Series, read_reasons

EXPECTED = Path(__file__).with_name('checkpatch-expected')

# All of the block layer is in these, and in the unit tests
PROGRAMS = ('qemu-img', 'qemu-io', 'qemu-nbd',
            'storage-daemon/qemu-storage-daemon')
SYSTEM = 'qemu-system-x86_64'
UNIT_TESTS = ('test-replication', 'test-replication-changes',
              'test-replication-log', 'test-replication-meta',
              'test-write-behind', 'test-bdrv-drain', 'test-bdrv-graph-mod',
              'test-block-iothread', 'test-blockjob')
TEST_SECONDS = 120
IOTEST = re.compile(r'tests/qemu-iotests/tests/([^/.]+)')
IOTESTS_SECONDS = 1800

# What more objects than this depend on is built where the series ends
OBJECTS_MAX = 100

PROGRESS_SECONDS = 10

WARNING = re.compile(r'^(?:\.\./)*tree/(\S+?):\d+:\d+: warning: ',
                     re.MULTILINE)


class Tally:
    """Counts what passed and failed, and says what failed."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0

    def count(self, what: str, complaint: str) -> bool:
        """Count one check; an empty complaint is a success."""
        if complaint:
            self.failed += 1
            print(f'failed: {what}\n{complaint}', flush=True)
        else:
            self.passed += 1
        return not complaint


class BuildPlace(NamedTuple):
    """Where one tree after the other is built."""
    tree: Tree
    build: Path

    @property
    def source(self) -> Path:
        """The folder of the tree."""
        return self.tree.folder


def checkpatch(place: BuildPlace, patch: Path) -> str:
    """What checkpatch has to say, apart from what is known to be wrong."""
    result = subprocess.run(
        [place.source / 'scripts/checkpatch.pl', '--quiet', '--no-summary',
         '--terse', '--strict', '--no-signoff', f'--root={place.source}',
         patch], check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    expected = read_reasons(EXPECTED)
    lines = [line for line in result.stdout.splitlines()
             if not any(re.search(known, line) for known in expected)]
    return '\n'.join(lines)


def run_quietly(command: List[str], cwd: Path, title: str,
                seconds: Optional[int] = None) -> str:
    """Run a command; say now and then that it runs; return its output.

    If it fails, the output is what Failure says.
    """
    begin = time.monotonic()
    with tempfile.TemporaryFile('w+', encoding='utf-8',
                                errors='replace') as log:
        with subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL,
                              stdout=log, stderr=log) as process:
            while process.poll() is None:
                passed = time.monotonic() - begin
                if seconds and passed > seconds:
                    process.kill()
                try:
                    process.wait(PROGRESS_SECONDS)
                except subprocess.TimeoutExpired:
                    print(f'[series] {title} {passed:.0f} s', flush=True)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise Failure('\n'.join(output.splitlines()[-40:]))
    return output


def objects_of(place: BuildPlace, names: Set[str]) -> Set[str]:
    """The objects that are made of these sources, and that include them."""
    database = json.loads((place.build / 'compile_commands.json').read_text())
    paths = {os.path.normpath(place.source / name) for name in names}
    found = {entry['output'] for entry in database
             if os.path.normpath(place.build / entry['file']) in paths}
    wanted = {os.path.relpath(path, place.build) for path in paths}
    listed = subprocess.run(['ninja', '-t', 'deps'], cwd=place.build,
                            check=True, text=True, stdout=subprocess.PIPE)
    for part in listed.stdout.split('\n\n'):
        name, *lines = part.strip().splitlines() or ['']
        if wanted.intersection(line.strip() for line in lines):
            found.add(name.partition(':')[0])
    return found


def unit_tests(place: BuildPlace) -> List[str]:
    """The unit tests that the tree has."""
    return [f'tests/unit/{name}' for name in UNIT_TESTS
            if (place.source / f'tests/unit/{name}.c').exists()]


def compile_targets(place: BuildPlace, names: Set[str], targets: List[str],
                    title: str) -> str:
    """Build targets; return a complaint, also of warnings in some files."""
    try:
        output = run_quietly(['ninja', *targets], place.build, title)
    except Failure as failure:
        return str(failure)
    warned = sorted(set(WARNING.findall(output)) & names)
    return f'the compiler warns about {warned}' if warned else ''


def compile_patch(place: BuildPlace, names: Set[str], title: str) -> str:
    """Build what a patch has changed, as far as that is not nearly all."""
    try:
        # meson first: it tells which objects there are
        run_quietly(['ninja', 'build.ninja'], place.build, title)
    except Failure as failure:
        return str(failure)
    objects = objects_of(place, names)
    if len(objects) > OBJECTS_MAX:
        objects = objects_of(place, {name for name in names
                                     if name.endswith('.c')})
        return compile_targets(place, names, sorted(objects), title)
    return compile_targets(place, names, [*sorted(objects), *PROGRAMS], title)


def run_unit_tests(place: BuildPlace) -> str:
    """Run the unit tests; return a complaint."""
    complaints = []
    for name in unit_tests(place):
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = subprocess.run(
                    [place.build / name, '--tap', '-k'], cwd=folder,
                    timeout=TEST_SECONDS, check=False, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    env=dict(os.environ, TMPDIR=folder))
            except subprocess.TimeoutExpired:
                complaints.append(f'{name}: no end after {TEST_SECONDS} s')
                continue
        if result.returncode:
            complaints.append(f'{name}:\n{result.stdout}')
    return '\n'.join(complaints)


def run_iotests(place: BuildPlace, names: List[str], title: str) -> str:
    """Run iotests by QEMU's runner; return a complaint."""
    try:
        run_quietly([sys.executable, 'check', '-qcow2', *names],
                    place.build / 'tests/qemu-iotests', title,
                    IOTESTS_SECONDS)
    except Failure as failure:
        return str(failure)
    return ''


def configure(place: BuildPlace, options: List[str]) -> None:
    """Configure a build of the tree."""
    shutil.rmtree(place.build, ignore_errors=True)
    place.build.mkdir()
    command = [str(place.source / 'configure'), *options]
    if shutil.which('ccache'):
        command.append('--cc=ccache cc')
    run_quietly(command, place.build, 'configuring')


class SeriesPlan(NamedTuple):
    """A series, between which commits it is, and its mails."""
    series: Series
    begin: str
    end: str
    mails: List[Path]


def taken(branches: Branches, plan: SeriesPlan) -> str:
    """Take the mails as who gets them would; is it the same?"""
    work = Work(branches.repository, plan.begin)
    try:
        work.take(plan.mails, '--no-3way')
    except Failure as failure:
        return str(failure)
    differ = branches.repository.run('diff-tree', '-r', '--name-only',
                                     work.git('rev-parse', 'HEAD'), plan.end)
    work.remove()
    return f'these files differ: {differ.split()}' if differ else ''


def plan_alone(branches: Branches, series: Series, folder: Path,
               tally: Tally) -> SeriesPlan:
    """Write a series against QEMU's plain source, and take it."""
    begin, end = branches.alone(series)
    print(f'[series] writing {series.title}', flush=True)
    mails = Writer(branches).write_alone(series, folder).mails
    plan = SeriesPlan(series, begin, end, mails)
    tally.count(f'{series.title}: git am, without a merge',
                taken(branches, plan))
    return plan


def plan_in_order(branches: Branches, tally: Tally) -> List[SeriesPlan]:
    """All series on top of each other."""
    chosen = branches.base.series()
    ends = branches.ends(chosen, branches.ours())
    tally.count('the end is what ./run build builds', '' if
                ends[-1] == branches.all_of_it() else 'it is another commit')
    return [SeriesPlan(series, ends[0], end, [])
            for series, end in zip(chosen, ends[1:])]


def check_kept(branches: Branches, tally: Tally) -> None:
    """Are patches/ as git writes them, so that it can merge them?"""
    chosen = branches.base.series()
    ends = branches.ends(chosen)
    for series, begin, end in zip(chosen, ends, ends[1:]):
        wrong = sorted(path.name for path in
                       differing(branches, series.cover.parent, begin, end))
        tally.count(f'patches/{series.name}: as git has them',
                    f'./run series --edit and --keep would change: {wrong}'
                    if wrong else '')


class Check:
    """The checks of what is built."""

    def __init__(self, place: BuildPlace, tally: Tally) -> None:
        self.place = place
        self.tally = tally
        self.repository = place.tree.repository

    def changed(self, begin: str, end: str) -> Set[str]:
        """The files that differ between commits."""
        return set(self.repository.run('diff-tree', '-r', '--name-only',
                                       begin, end).splitlines())

    def go_to(self, commit: str) -> None:
        """Have the tree at a commit."""
        self.place.tree.read()
        self.place.tree.update(commit)

    def configure(self, commit: str, options: List[str]) -> None:
        """Begin with a fresh build of a commit."""
        self.go_to(commit)
        configure(self.place, options)

    def alone(self, plan: SeriesPlan) -> None:
        """Check a series on QEMU's plain source."""
        start = time.monotonic()
        commits = self.repository.run(
            'rev-list', '--reverse', f'{plan.begin}..{plan.end}').splitlines()
        parent = plan.begin
        title = f'what {plan.series.title} is based on'
        self.go_to(parent)
        self.tally.count(f'{title} builds', compile_targets(
            self.place, set(), [*PROGRAMS, *unit_tests(self.place)], title))
        for commit, mail in zip(commits, plan.mails):
            title = f'{plan.series.title}/{mail.stem}'
            self.go_to(commit)
            self.tally.count(f'{title}: checkpatch',
                             checkpatch(self.place, mail))
            self.tally.count(f'{title}: build', compile_patch(
                self.place, self.changed(parent, commit), title))
            parent = commit
        if self.end(plan, f'{plan.series.title}, its end,', [SYSTEM]):
            self.iotests(plan)
        print(f'[series] {plan.series.title}: {time.monotonic() - start:.0f} '
              f's', flush=True)

    def end(self, plan: SeriesPlan, title: str, targets: List[str]) -> bool:
        """Build and test the block layer where a series ends."""
        self.go_to(plan.end)
        targets = [*targets, *PROGRAMS, *unit_tests(self.place)]
        if not self.tally.count(f'{title} build', compile_targets(
                self.place, self.changed(plan.begin, plan.end), targets,
                title)):
            return False
        self.tally.count(f'{title} unit tests', run_unit_tests(self.place))
        return True

    def iotests(self, plan: SeriesPlan) -> None:
        """Run the iotests that a series brings."""
        changed = self.changed(plan.begin, plan.end)
        tests = sorted({match[1] for match in map(IOTEST.fullmatch, changed)
                        if match})
        if tests:
            title = f'{plan.series.title}: iotests {" ".join(tests)}'
            self.tally.count(title, run_iotests(self.place, tests, title))


def refusal(branches: Branches, tree: Path) -> str:
    """Why ./run apply refuses a tree; it must."""
    try:
        apply_series(branches, tree)
    except Failure as failure:
        return str(failure)
    return 'it was applied'


def check_apply(branches: Branches, folder: Path, tally: Tally) -> None:
    """What ./run apply does to trees with and without git."""
    repository = branches.repository
    tree = folder / 'applied'
    plain, wanted = branches.plain(), branches.all_of_it()

    def expect(what: str, words: str) -> None:
        said = refusal(branches, tree)
        tally.count(f'apply: {what} is refused', '' if words in said else said)

    def git(*words: str) -> str:
        return repository.run(*words, top=tree,
                              extra={'GIT_DIR': str(tree / '.git')})

    for kind in ('git', 'plain'):
        shutil.rmtree(tree, ignore_errors=True)
        repository.run('clone', '--quiet', '--shared', '--no-checkout',
                       repository.folder, tree)
        git('checkout', '--quiet', '--detach', plain)
        if kind == 'git':
            with open(tree / 'block.c', 'a', encoding='utf-8') as file:
                file.write('\n')
            expect('a dirty tree', 'not committed')
            git('checkout', '--quiet', 'block.c')
        else:
            shutil.rmtree(tree / '.git')
        complaint = ''
        try:
            apply_series(branches, tree)
            applied = Tree(repository, tree)
            applied.index.unlink(missing_ok=True)
            applied.read()
            differ = applied.differences(wanted)
            if differ:
                complaint = f'these files differ: {differ}'
        except Failure as failure:
            complaint = str(failure)
        tally.count(f'apply: to a {kind} tree', complaint)
        expect(f'a {kind} tree that has the series', 'has this series')
    (tree / 'VERSION').write_text('9.2.0\n', 'utf-8')
    expect('another version', 'is QEMU 9.2.0')
    shutil.rmtree(tree)


def check(args: argparse.Namespace, tally: Tally) -> None:
    """Check some series, or all and what they are together."""
    folder = args.cache / 'series-check'
    shutil.rmtree(folder / 'patches', ignore_errors=True)
    with branches_of(args.cache, Base(args.base, args.pristine)) as branches:
        chosen = ([branches.find(name) for name in args.series] or
                  branches.base.series())
        plans = [plan_alone(branches, series, folder / 'patches', tally)
                 for series in chosen]
        order = [] if args.series else plan_in_order(branches, tally)
        if not args.series:
            check_apply(branches, folder, tally)
        if args.base == REFERENCE:
            check_kept(branches, tally)
    # others may build meanwhile
    this = Check(BuildPlace(Tree(branches.repository, folder / 'tree'),
                            folder / 'build'), tally)
    this.configure(plans[0].begin, args.options)
    for plan in plans:
        this.alone(plan)
    for plan in order:
        this.end(plan, f'in order, up to {plan.series.title},', [])


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument('series', nargs='*', help='by default all')
    parser.add_argument('--options', nargs=argparse.REMAINDER, default=[],
                        help='for configure')
    args = parser.parse_args()
    tally = Tally()
    begin = time.monotonic()
    lock_file = args.cache / 'series-check/use.lock'
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_file, 'w', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print('[series] waiting for another check of a series',
                  flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            check(args, tally)
        except Failure as failure:
            tally.count('check', str(failure))
    print(f'[series] {time.monotonic() - begin:.0f} s')
    print(f'{tally.passed} passed, {tally.failed} failed')
    return 1 if tally.failed else 0


if __name__ == '__main__':
    sys.exit(main())
