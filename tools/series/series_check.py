#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Apply the series to a copy of QEMU, patch by patch, and build each time.

Every patch has to apply as it is, to please checkpatch and to leave a tree
that builds and whose unit tests pass. In the end the tree must be what
./run build makes by other means; there, everything else is built and tested.
"""

import argparse
import fcntl
import filecmp
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, NamedTuple, Set

from apply import apply_series
import compose
from gitrepo import Failure, NOBODY, reproducible_environment, run
from manifest import HERE

sys.path.insert(0, str(HERE.parent / 'base'))
# pylint: disable=wrong-import-position
import bases  # noqa: E402
from bases import Base  # noqa: E402
import overlay  # noqa: E402

EXPECTED = HERE / 'checkpatch-expected'

# All of the block layer is in these, and in the unit tests
PROGRAMS = ('qemu-img', 'qemu-io', 'qemu-nbd',
            'storage-daemon/qemu-storage-daemon')
UNIT_TESTS = ('test-replication', 'test-write-behind', 'test-bdrv-drain',
              'test-bdrv-graph-mod', 'test-block-iothread', 'test-blockjob')
TEST_SECONDS = 120

# No build looks at these
NOT_BUILT = ('docs/', 'tests/qemu-iotests/', 'MAINTAINERS')
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


class Tools(NamedTuple):
    """What is the same for all patches."""
    tree: Path
    build: Path
    expected: List[str]
    ours: Set[str]


def read_expected() -> List[str]:
    """The messages of checkpatch that are known to be wrong."""
    return [line.split(' # ')[0].strip()
            for line in EXPECTED.read_text('utf-8').splitlines()
            if line.strip() and not line.startswith('#')]


def git(tree: Path, *words: str) -> str:
    """Run git in the copy of QEMU."""
    env = dict(reproducible_environment(), **NOBODY.environment())
    return run(list(words), tree, env)


def take(tree: Path, patch: Path) -> str:
    """Apply a patch as who got it by mail would."""
    try:
        git(tree, 'am', '--quiet', str(patch))
    except Failure as failure:
        return str(failure)
    return ''


def checkpatch(tools: Tools, patch: Path) -> str:
    """What checkpatch has to say, apart from what is known to be wrong."""
    result = subprocess.run(
        [tools.tree / 'scripts/checkpatch.pl', '--quiet', '--no-summary',
         '--terse', '--strict', '--no-signoff', f'--root={tools.tree}',
         patch], check=False, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT)
    lines = [line for line in result.stdout.splitlines()
             if not any(re.search(known, line) for known in tools.expected)]
    return '\n'.join(lines)


def run_quietly(command: List[str], cwd: Path, title: str) -> str:
    """Run a command; say now and then that it runs; return its output.

    If it fails, the output is what Failure says.
    """
    begin = told = time.monotonic()
    with tempfile.TemporaryFile('w+', encoding='utf-8',
                                errors='replace') as log:
        with subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL,
                              stdout=log, stderr=log) as process:
            while True:
                try:
                    status = process.wait(PROGRESS_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    told = time.monotonic()
                    print(f'[series] {title} {told - begin:.0f} s',
                          flush=True)
        log.seek(0)
        output = log.read()
    if status:
        raise Failure('\n'.join(output.splitlines()[-40:]))
    return output


def objects_of(tools: Tools, names: List[str]) -> List[str]:
    """The objects that are made of these sources."""
    database = json.loads((tools.build / 'compile_commands.json').read_text())
    sources = {os.path.normpath(tools.tree / name) for name in names}
    return sorted(entry['output'] for entry in database
                  if os.path.normpath(tools.build / entry['file']) in sources)


def unit_tests(tree: Path) -> List[str]:
    """The unit tests that this tree has."""
    return [f'tests/unit/{name}' for name in UNIT_TESTS
            if (tree / f'tests/unit/{name}.c').exists()]


def compile_tree(tools: Tools, names: List[str], title: str) -> str:
    """Build what these files matter for; return a complaint."""
    try:
        # meson first: it tells which objects there are
        run_quietly(['ninja', 'build.ninja'], tools.build, title)
        output = run_quietly(
            ['ninja', *PROGRAMS, *unit_tests(tools.tree),
             *objects_of(tools, names)], tools.build, title)
    except Failure as failure:
        return str(failure)
    warned = sorted(set(WARNING.findall(output)) & tools.ours)
    return f'the compiler warns about {warned}' if warned else ''


def run_unit_tests(tools: Tools) -> str:
    """Run the unit tests; return a complaint."""
    complaints = []
    for name in unit_tests(tools.tree):
        with tempfile.TemporaryDirectory() as folder:
            try:
                result = subprocess.run(
                    [tools.build / name, '--tap', '-k'], cwd=folder,
                    timeout=TEST_SECONDS, check=False, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    env=dict(os.environ, TMPDIR=folder))
            except subprocess.TimeoutExpired:
                complaints.append(f'{name}: no end after {TEST_SECONDS} s')
                continue
        if result.returncode:
            complaints.append(f'{name}:\n{result.stdout}')
    return '\n'.join(complaints)


def copy_base(repository: Path, tree: Path) -> None:
    """A fresh work tree of the base, with a history that begins there."""
    shutil.rmtree(tree, ignore_errors=True)
    run(['clone', '--quiet', '--shared', '--branch', 'base', repository,
         tree])


def configure(tools: Tools, options: List[str]) -> None:
    """Configure a build of the base."""
    shutil.rmtree(tools.build, ignore_errors=True)
    tools.build.mkdir()
    command = [str(tools.tree / 'configure'), *options]
    if shutil.which('ccache'):
        command.append('--cc=ccache cc')
    run_quietly(command, tools.build, 'configuring')


def wanted_files(base: Base, keep: Path) -> Dict[str, Path]:
    """What ./run build builds: each file, and where its content is.

    What does not come from QEMU is copied: the checkout may change before
    the end.
    """
    shutil.rmtree(keep, ignore_errors=True)
    with tempfile.TemporaryDirectory() as staging:
        wanted = overlay.contents(overlay.FLAVOURS['ours'], base,
                                  Path(staging)).wanted
        for name, source in wanted.items():
            if base.pristine not in source.parents:
                overlay.copy(source, keep / name, False)
                wanted[name] = keep / name
    return wanted


def is_same(here: Path, there: Path) -> bool:
    """Are these the same file for git?"""
    if here.is_symlink() or there.is_symlink():
        return (here.is_symlink() and there.is_symlink()
                and os.readlink(here) == os.readlink(there))
    return (os.access(here, os.X_OK) == os.access(there, os.X_OK)
            and filecmp.cmp(here, there, shallow=False))


def tree_complaint(tree: Path, wanted: Dict[str, Path]) -> str:
    """How a tree differs from what is wanted."""
    have = set(overlay.walk(tree, {'.git'}))
    different = sorted(have ^ wanted.keys()) + sorted(
        name for name in have & wanted.keys()
        if not is_same(tree / name, wanted[name]))
    return f'these files differ: {different}' if different else ''


def refusal(series: compose.Series, base: Base, tree: Path) -> str:
    """Why ./run apply refuses a tree; it must."""
    try:
        apply_series(series, base, tree)
    except Failure as failure:
        return str(failure)
    return 'it was applied'


def check_apply(series: compose.Series, args: argparse.Namespace,
                wanted: Dict[str, Path], tally: Tally) -> None:
    """What ./run apply does to trees with and without git."""
    base = compose.base_of(args)
    tree = args.cache / 'series-check/applied'
    changed = 'block.c'

    def expect(what: str, words: str) -> None:
        said = refusal(series, base, tree)
        tally.count(f'apply: {what} is refused',
                    '' if words in said else said)

    for kind in ('git', 'plain'):
        copy_base(series.repository, tree)
        if kind == 'git':
            with open(tree / changed, 'a', encoding='utf-8') as file:
                file.write('\n')
            expect('a dirty tree', 'not committed')
            git(tree, 'checkout', '--quiet', changed)
        else:
            shutil.rmtree(tree / '.git')
        try:
            apply_series(series, base, tree)
            complaint = tree_complaint(tree, wanted)
        except Failure as failure:
            complaint = str(failure)
        tally.count(f'apply: to a {kind} tree', complaint)
        expect(f'a {kind} tree that has the series', 'has this series')
    (tree / 'VERSION').write_text('9.2.0\n', 'utf-8')
    expect('another version', 'is QEMU 9.2.0')
    shutil.rmtree(tree)


def check_patches(tools: Tools, patches: List[Path], tally: Tally) -> bool:
    """Check each patch in turn; were all applied?"""
    for number, patch in enumerate(patches, 1):
        begin = time.monotonic()
        title = f'{number}/{len(patches)} {patch.stem[5:]}'
        if not tally.count(f'{title}: git am', take(tools.tree, patch)):
            return False
        tally.count(f'{title}: checkpatch', checkpatch(tools, patch))
        names = overlay.touched_by(patch)
        if not all(name.startswith(NOT_BUILT) for name in names):
            built = compile_tree(tools, names, title)
            if tally.count(f'{title}: build', built):
                tally.count(f'{title}: unit tests', run_unit_tests(tools))
        print(f'[series] {title}: {time.monotonic() - begin:.0f} s',
              flush=True)
    return True


def check(args: argparse.Namespace, tally: Tally) -> None:
    """Write the series and check it."""
    work = args.cache / 'series-check'
    base = compose.base_of(args)
    patches = work / 'patches'
    shutil.rmtree(patches, ignore_errors=True)
    wanted = wanted_files(base, work / 'wanted')
    series = compose.make(args.cache, base, patches)
    tally.count('the series can be made of the checkout', '')
    tools = Tools(work / 'tree', work / 'build', read_expected(),
                  {name for patch in series.patches
                   for name in overlay.touched_by(patch)})
    copy_base(series.repository, tools.tree)
    configure(tools, args.options)
    built = compile_tree(tools, [], 'the base, without patches,')
    if not tally.count('the base builds', built):
        return
    if check_patches(tools, series.patches, tally):
        tally.count('the tree is what ./run build builds',
                    tree_complaint(tools.tree, wanted))
    check_apply(series, args, wanted, tally)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    compose.add_arguments(parser)
    parser.add_argument('options', nargs='*',
                        help='for configure, after --')
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
        except (Failure, bases.Failure) as failure:
            tally.count('check', str(failure))
    print(f'[series] {time.monotonic() - begin:.0f} s')
    print(f'{tally.passed} passed, {tally.failed} failed')
    return 1 if tally.failed else 0


if __name__ == '__main__':
    sys.exit(main())
