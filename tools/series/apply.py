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

import compose
from gitrepo import Failure, NOBODY, clean_environment, configured, run
from manifest import HERE

sys.path.insert(0, str(HERE.parent / 'base'))
# pylint: disable=wrong-import-position
import bases  # noqa: E402
from bases import Base  # noqa: E402
import overlay  # noqa: E402


class Tree:
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
        have = compose.version_of(self.folder)
        want = compose.series_of(compose.version_of(base.pristine))
        other = compose.series_of(have)
        if other != want:
            hint = ''
            if base._replace(name=other).folder.exists():
                hint = f': use --base {other}'
            raise Failure(f'{self.folder} is QEMU {have}, and the series is '
                          f'for {want}{hint}')

    def refuse_applied(self, base: Base, names: List[str]) -> None:
        """Refuse a tree that the series, or another one, was applied to."""
        added = [name for name in names
                 if not (base.pristine / name).exists()]
        there = [name for name in added if (self.folder / name).exists()]
        if not there:
            return
        if there != added:
            raise Failure(f'{self.folder} has a part of this series or '
                          f'another version of it: {there[0]}')
        with tempfile.TemporaryDirectory() as staging:
            wanted = overlay.contents(overlay.FLAVOURS['ours'], base,
                                      Path(staging)).wanted
            if all((self.folder / name).read_bytes()
                   == wanted[name].read_bytes() for name in names):
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

    def apply_commits(self, patches: List[Path]) -> str:
        """Add the series to the current branch; say what was done."""
        extra = {}
        if configured(self.folder) is None:
            extra = NOBODY.environment()
            del extra['GIT_AUTHOR_NAME'], extra['GIT_AUTHOR_EMAIL']
        before = self.git('rev-parse', 'HEAD')
        try:
            self.git('am', '--quiet', '--no-3way', *map(str, patches),
                     extra=extra)
        except Failure as failure:
            self.git('am', '--abort')
            raise self.changed_nothing(failure) from None
        branch = self.git('rev-parse', '--abbrev-ref', 'HEAD')
        after = self.git('rev-parse', 'HEAD')
        where = 'a detached HEAD' if branch == 'HEAD' else f'branch {branch}'
        return (f'{len(patches)} commits on {where} of {self.folder}:\n'
                f'    git log {before[:12]}..{after[:12]}\n'
                f'To take them back:\n'
                f'    git reset --keep {before[:12]}')

    def apply_changes(self, patches: List[Path]) -> str:
        """Change the files of a tree without git; say what was done."""
        # all or nothing, but only within one input
        data = b''.join(patch.read_bytes() for patch in patches)
        try:
            self.git('apply', '-', data=data)
        except Failure as failure:
            raise self.changed_nothing(failure) from None
        names = {name for patch in patches
                 for name in overlay.touched_by(patch)}
        return (f'{len(patches)} patches, which change {len(names)} files of '
                f'{self.folder}')


def apply_series(series: compose.Series, base: Base, folder: Path) -> str:
    """Apply the series to a tree, or refuse; say what was done."""
    tree = Tree(folder)
    tree.refuse_version(base)
    tree.refuse_applied(base, sorted({
        name for patch in series.patches
        for name in overlay.touched_by(patch)}))
    tree.refuse_dirty()
    if tree.is_git:
        return tree.apply_commits(series.patches)
    return tree.apply_changes(series.patches)


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog='./run apply', description=__doc__)
    compose.add_arguments(parser)
    parser.add_argument('dir', type=Path, metavar='DIR',
                        help='a QEMU source tree, with or without git')
    args = parser.parse_args()
    try:
        target = Path(os.path.realpath(args.dir))
        compose.version_of(target)
        with tempfile.TemporaryDirectory() as folder:
            base = compose.base_of(args)
            series = compose.make(args.cache, base, Path(folder))
            done = apply_series(series, base, target)
    except (Failure, bases.Failure) as failure:
        print(f'error: {failure}', file=sys.stderr)
        return 1
    print(f'[series] {done}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
