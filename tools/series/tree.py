#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the source tree that is built: a checkout of one branch.

It is a function of QEMU's source, our files and the patches, and of nothing
else. Git writes only what differs, so that a rebuild after a small change is
small, a file or patch that went away is noticed and an interrupted run is
repaired by the next.
"""

import argparse
from pathlib import Path
import sys
from typing import List

from branch import Branches, branches_of
from repository import Repository
from series import add_arguments
from bases import Base, Failure

# QEMU's own driver, for comparisons. COLO under TCG deadlocks at the first
# checkpoint unless QEMU itself is mended: that is no difference between the
# drivers, so this tree gets that series, and only that.
STOCK_SERIES = 'colo'
FLAVOURS = ('mutations', 'ours', 'sanitize', 'stock')


class Tree:
    """The tree, with an index that stays beside it."""

    def __init__(self, repository: Repository, folder: Path) -> None:
        self.repository = repository
        self.folder = folder
        self.index = folder.with_name(folder.name + '.index')

    def git(self, *words: str) -> str:
        """Run git on the tree."""
        return self.repository.run(*words, index=self.index, top=self.folder)

    def read(self) -> None:
        """Have the index tell what is there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.index.exists():
            self.git('add', '--all', '--force', '.')
        self.git('update-index', '-q', '--really-refresh')

    def surplus(self) -> List[str]:
        """The files that the index does not have."""
        return [name for name in
                self.git('ls-files', '--others', '-z').split('\0')
                if name and '__pycache__' not in name]

    def differences(self, commit: str) -> List[str]:
        """The files that differ from a commit."""
        changed = self.git('diff-index', '--name-only', '-z', commit)
        return changed.split('\0')[:-1] + self.surplus()

    def update(self, commit: str) -> None:
        """Make it what a commit has."""
        self.git('read-tree', '--reset', '-u', commit)
        for name in self.surplus():
            (self.folder / name).unlink()


def wanted(branches: Branches, flavour: str) -> str:
    """The commit that a flavour is built from."""
    if flavour == 'stock':
        return branches.ends([branches.find(STOCK_SERIES)])[-1]
    return branches.all_of_it()


def report(names: List[str], is_new: bool) -> str:
    """A short line on what is about to be done."""
    if is_new:
        return f'copying {len(names)} files of QEMU and of ours'
    shown = ', '.join(names[:4])
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return f'changed: {shown}{more}'


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument('--flavour', choices=FLAVOURS, required=True)
    parser.add_argument('--tree', type=Path, required=True)
    parser.add_argument('--is-current', action='store_true',
                        help='change nothing, fail if the tree is stale')
    parser.add_argument('--list', action='store_true',
                        help='print the files that do not come from QEMU')
    args = parser.parse_args()
    try:
        with branches_of(args.cache,
                         Base(args.base, args.pristine)) as branches:
            commit = wanted(branches, args.flavour)
            if args.list:
                print(branches.repository.run(
                    'diff-tree', '-r', '--name-only', branches.plain(),
                    commit))
                return 0
            is_new = not args.tree.exists()
            tree = Tree(branches.repository, args.tree)
            tree.read()
            names = tree.differences(commit)
            if args.is_current:
                return 1 if names else 0
            if names:
                print(f'[source] {report(names, is_new)}', file=sys.stderr)
            tree.update(commit)
    except Failure as failure:
        print(f'error: {failure}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
