#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Break the driver in one way after another, and see which tests notice.

Each patch in this folder breaks a rule of what is written when, and says in
lines "Caught-by: TEST [CASE]..." which iotests, and cases of these, have to
fail then.  They have to pass without it.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List

import command

FOLDER = Path(__file__).resolve().parent
# What the tests run that has the driver in it
TARGET = 'qemu-system-x86_64'
# Most of what is to be noticed is in the images
STATES = '10'
BUILD_SECONDS = 1800
TEST_SECONDS = 900


class Builder:
    """A tree, and where it is built"""

    def __init__(self, tree: Path, build: Path) -> None:
        self.tree = tree
        self.folder = build

    def patch(self, patch: Path, *options: str) -> None:
        """Apply it; the tree is in no repository."""
        env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(self.tree.parent))
        subprocess.run(['git', 'apply', *options, str(patch)], check=True,
                       cwd=self.tree, env=env)

    def build(self) -> None:
        """Only what has changed."""
        result = subprocess.run(['ninja', '-C', str(self.folder), TARGET],
                                stdout=subprocess.PIPE, check=False, text=True,
                                timeout=BUILD_SECONDS)
        if result.returncode:
            sys.exit(f'{result.stdout[-4000:]}\nerror: it does not build')

    def objection(self, catch: str) -> str:
        """What a test, or some cases of it, say is wrong, or nothing."""
        test, *cases = catch.split()
        iotests = self.folder / 'tests/qemu-iotests'
        with tempfile.TemporaryDirectory() as scratch:
            env = dict(os.environ, CRASH_STATES=STATES, TEST_DIR=scratch)
            result = subprocess.run(
                ['./check', '-qcow2', '--', sys.executable,
                 str(self.tree / 'tests/qemu-iotests/tests' / test),
                 *cases], cwd=iotests, check=False, text=True, env=env,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                timeout=TEST_SECONDS)
        if not re.search(r'^Ran [1-9]', result.stdout, re.MULTILINE):
            sys.exit(f'{result.stdout[-4000:]}\nerror: {catch} does not run')
        errors = re.findall(r'^\S*(?:Error|Exception)\b.*', result.stdout,
                            re.MULTILINE)
        return str((errors or ['?'])[0]) if result.returncode else ''


def catches(patch: Path) -> List[str]:
    """What has to notice it."""
    return re.findall(r'^Caught-by: (.*)$', patch.read_text('utf-8'),
                      re.MULTILINE)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = command.parser(__doc__)
    parser.add_argument('patches', nargs='*', type=Path)
    args = parser.parse_args()
    builder = Builder(args.tree, args.build)
    patches = args.patches or sorted(FOLDER.glob('*.patch'))

    failed = 0

    def say(good: bool, what: str) -> None:
        nonlocal failed
        failed += not good
        print(f"{'ok' if good else 'not ok'} - {what}", flush=True)

    for catch in sorted({catch for patch in patches
                         for catch in catches(patch)}):
        say(not builder.objection(catch), f'{catch} passes')
    for patch in patches:
        builder.patch(patch.resolve())
        try:
            builder.build()
            for one in catches(patch):
                objection = builder.objection(one)
                say(bool(objection), f'{patch.stem} is caught by {one}')
                print(f'# {objection[:200]}')
        finally:
            builder.patch(patch.resolve(), '-R')
    builder.build()
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
