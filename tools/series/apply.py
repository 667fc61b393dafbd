#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Apply the series to a QEMU source tree: all of it or nothing."""

import argparse
import os
from pathlib import Path
import re
import sys
import tempfile
from typing import Dict, List, Optional

from branch import Branches, Files, branches_of, version_of
from repository import NOBODY, clean_environment, configured, run
from series import Writer, add_arguments
from bases import Base, Failure


def series_of(version: str) -> str:
    """10.0 of 10.0.13."""
    return '.'.join(version.split('.')[:2])


class UserTree:
    """The tree that the series is applied to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # a repository further up that merely contains the tree is not its own
        self.env = dict(clean_environment(), LC_ALL='C',
                        GIT_CEILING_DIRECTORIES=str(folder.parent))
        self.is_git = (folder / '.git').exists()

    def git(self, *words: str, extra: Optional[Dict[str, str]] = None,
            data: Optional[bytes] = None) -> str:
        """Run git in the tree."""
        return run(list(words), self.folder, dict(self.env, **(extra or {})),
                   data)

    def refuse_version(self, base: Base) -> None:
        """Refuse another QEMU than the series is for."""
        have = version_of(self.folder)
        want = series_of(version_of(base.pristine))
        other = series_of(have)
        if other != want:
            hint = ''
            if base._replace(name=other).folder.exists():
                hint = f': use --base {other}'
            raise Failure(f'{self.folder} is QEMU {have}, and the series is '
                          f'for {want}{hint}')

    def refuse_applied(self, added: Files) -> None:
        """Refuse a tree that the series, or another one, was applied to."""
        there = [name for name in added if (self.folder / name).exists()]
        if not there:
            return
        if len(there) < len(added):
            raise Failure(f'{self.folder} has a part of this series or '
                          f'another version of it: {there[0]}')
        blobs = self.git('hash-object', '--no-filters', *there).split()
        if blobs == [added[name].split()[-1] for name in there]:
            raise Failure(f'{self.folder} has this series already')
        raise Failure(f'{self.folder} has another version of this series')

    def refuse_dirty(self) -> None:
        """Refuse a git tree with changes that are not committed."""
        if not self.is_git:
            return
        changed = self.git('status', '--porcelain', '--untracked-files=no')
        if changed:
            raise Failure(f'{self.folder} has changes that are not '
                          f'committed:\n{changed}')
        folder = Path(self.git('rev-parse', '--absolute-git-dir'))
        for name in ('rebase-apply', 'rebase-merge', 'MERGE_HEAD'):
            if (folder / name).exists():
                raise Failure(f'{self.folder} is in the middle of a rebase, '
                              f'a merge or git am')

    def changed_nothing(self, failure: Failure) -> Failure:
        """What to say when the series does not apply."""
        lines = [line for line in str(failure).splitlines()
                 if re.match(r'(git \w+: )?(error|fatal|Patch failed)', line)]
        return Failure('\n'.join([*lines, f'{self.folder} was not changed: '
                                  f'it differs where the series changes it']))

    def apply_commits(self, mails: List[Path]) -> str:
        """Add the series to the current branch; say what was done."""
        extra = {}
        if configured(self.folder) is None:
            extra = NOBODY.environment()
            del extra['GIT_AUTHOR_NAME'], extra['GIT_AUTHOR_EMAIL']
        before = self.git('rev-parse', 'HEAD')
        try:
            self.git('am', '--quiet', '--no-3way', *map(str, mails),
                     extra=extra)
        except Failure as failure:
            self.git('am', '--abort')
            raise self.changed_nothing(failure) from None
        branch = self.git('rev-parse', '--abbrev-ref', 'HEAD')
        after = self.git('rev-parse', 'HEAD')
        where = 'a detached HEAD' if branch == 'HEAD' else f'branch {branch}'
        return (f'{len(mails)} commits on {where} of {self.folder}:\n'
                f'    git log {before[:12]}..{after[:12]}\n'
                f'To take them back:\n'
                f'    git reset --keep {before[:12]}')

    def apply_changes(self, mails: List[Path]) -> str:
        """Change the files of a tree without git; say what was done."""
        # all or nothing, but only within one input
        data = b''.join(mail.read_bytes() for mail in mails)
        try:
            self.git('apply', '-', data=data)
        except Failure as failure:
            raise self.changed_nothing(failure) from None
        return f'{len(mails)} patches to the files of {self.folder}'


def added_files(branches: Branches) -> Files:
    """The files that the series adds."""
    plain = branches.repository.blobs(branches.plain())
    return {name: what for name, what in
            branches.repository.blobs(branches.all_of_it()).items()
            if name not in plain}


def apply_series(branches: Branches, folder: Path) -> str:
    """Apply all series to a tree, or refuse; say what was done."""
    target = UserTree(folder)
    target.refuse_version(branches.base)
    target.refuse_applied(added_files(branches))
    target.refuse_dirty()
    with tempfile.TemporaryDirectory() as staging:
        written = Writer(branches).write_all(Path(staging))
        mails = [mail for part in written for mail in part.mails]
        if target.is_git:
            return target.apply_commits(mails)
        return target.apply_changes(mails)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument('dir', type=Path)
    args = parser.parse_args()
    try:
        folder = Path(os.path.realpath(args.dir))
        version_of(folder)
        with branches_of(args.cache,
                         Base(args.base, args.pristine)) as branches:
            done = apply_series(branches, folder)
    except Failure as failure:
        print(f'error: {failure}', file=sys.stderr)
        return 1
    print(f'[series] {done}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
