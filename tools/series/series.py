#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the patches to QEMU and this project's driver for git am."""

import argparse
from pathlib import Path
import sys
import tempfile
import textwrap
from typing import Dict, List, NamedTuple, Optional

from branch import Branches, branches_of, version_of
from repository import NOBODY, configured
from bases import Base, CHECKOUT, Failure, PATCHES, REFERENCE, Series


class Written(NamedTuple):
    """A series that was written: its folder and mails, without the cover."""
    series: Series
    mails: List[Path]


class Writer:
    """Writes series for one base, as somebody's."""

    def __init__(self, branches: Branches, signed_off: bool = False) -> None:
        self.branches = branches
        self.repository = branches.repository
        self.who = configured(Path.cwd()) or NOBODY
        self.options = ['--signoff'] if signed_off else []
        if signed_off and self.who == NOBODY:
            raise Failure("-s signs off as git's user.name and user.email, "
                          'which are not set')

    def own(self, commit: str, parent: str) -> str:
        """The same commit by who writes the series, on another parent."""
        said = self.repository.run('log', '-1', '--format=%aI%n%B', commit)
        date, _, message = said.partition('\n')
        dates = {f'GIT_{role}_DATE': date for role in ('AUTHOR', 'COMMITTER')}
        return self.repository.commit(f'{commit}^{{tree}}', message + '\n',
                                      parent, extra={**dates,
                                                     **self.who.environment()})

    def write(self, series: Series, begin: str, end: str,
              top: Path) -> Written:
        """Write one series into a folder of its own."""
        folder = top / series.name
        if folder.exists() and any(folder.glob('*.patch')):
            raise Failure(f'{folder} has patches already')
        tip = begin
        for commit in self.repository.run('rev-list', '--reverse',
                                          f'{begin}..{end}').splitlines():
            tip = self.own(commit, tip)
        # -B: a file that is replaced is removed and added, not mixed line by
        # line
        self.repository.run(
            'format-patch', '--quiet', '--cover-letter', '--no-signature',
            '--zero-commit', '--no-renames', '-B', '--stat=72', *self.options,
            '-o', folder.resolve(), f'{begin}..{tip}',
            extra=self.who.environment())
        paths = sorted(folder.glob('*.patch'))
        write_cover(paths[0], series, self.branches.base)
        return Written(series, paths[1:])

    def write_all(self, top: Path) -> List[Written]:
        """Write all series, on top of each other."""
        chosen = self.branches.base.series()
        ends = self.branches.ends(chosen, self.branches.ours())
        return [self.write(series, begin, end, top)
                for series, begin, end in zip(chosen, ends, ends[1:])]

    def write_alone(self, series: Series, top: Path) -> Written:
        """Write one series, on top of what it is based on."""
        begin, end = self.branches.alone(series)
        return self.write(series, begin, end, top)


def about_base(series: Series, base: Base) -> str:
    """What a cover letter tells of a base that is not the reference."""
    text = textwrap.fill(
        f'This is for QEMU {base.name}.  It was made for {REFERENCE}, and is '
        f'changed where {base.name} is different.', 72)
    left_out = [textwrap.fill(f'* {Path(name).stem}: {reason}', 72,
                              subsequent_indent='  ')
                for name, reason in base.without().items()
                if name.startswith(series.name + '/')]
    if left_out:
        text += '  It lacks these patches:\n\n' + '\n'.join(left_out)
    return text


def write_cover(path: Path, series: Series, base: Base) -> None:
    """Fill in what git leaves open in a cover letter."""
    subject, _, blurb = series.cover.read_text('utf-8').partition('\n\n')
    if base.name != REFERENCE:
        blurb = f'{blurb.rstrip()}\n\n{about_base(series, base)}\n'
    text = path.read_text('utf-8')
    text = text.replace('*** SUBJECT HERE ***', subject.strip())
    path.write_text(text.replace('*** BLURB HERE ***', blurb.strip() + '\n'),
                    'utf-8')


def keep(branches: Branches, repository: Path) -> None:
    """Take the patches from a repository that has a branch for each folder.

    Each branch is on top of that of the folder before, the first on the
    branch "plain", of QEMU's source.  A folder has a cover letter.
    """
    if branches.base.name != REFERENCE:
        raise Failure(f'patches/ are for {REFERENCE}')
    branches.repository.run('fetch', '--quiet', '--no-tags', repository,
                            '+refs/heads/*:refs/edited/*')
    begin = 'refs/edited/plain'
    for cover in sorted((CHECKOUT / PATCHES).glob('*/cover')):
        end = f'refs/edited/{cover.parent.name}'
        for path, content in differing(branches, cover.parent, begin,
                                       end).items():
            if content is None:
                path.unlink()
            else:
                path.write_bytes(content)
        begin = end


def as_kept(branches: Branches, begin: str, end: str) -> Dict[str, bytes]:
    """Commits as the mails of a folder of patches/."""
    with tempfile.TemporaryDirectory() as folder:
        branches.repository.run(
            'format-patch', '--quiet', '--no-signature', '--zero-commit', '-N',
            '--full-index', '--no-stat', '--no-renames', '--always',
            '--filename-max-length=100', '-o', folder, f'{begin}..{end}')
        return {path.name: path.read_bytes()
                for path in Path(folder).iterdir()}


def differing(branches: Branches, folder: Path, begin: str,
              end: str) -> Dict[Path, Optional[bytes]]:
    """The mails of a folder that are to be others, or not there."""
    wanted: Dict[Path, Optional[bytes]] = {
        folder / name: content
        for name, content in as_kept(branches, begin, end).items()}
    have = {path: path.read_bytes() for path in folder.glob('*.patch')}
    return {path: wanted.get(path) for path in have.keys() | wanted.keys()
            if have.get(path) != wanted.get(path)}


def edit(branches: Branches, folder: Path) -> None:
    """Make a repository of the patches, a branch for each folder."""
    if folder.exists() and any(folder.iterdir()):
        raise Failure(f'{folder} is not empty')
    names = [series.name for series in branches.base.series()]
    ends = branches.ends(branches.base.series())
    branches.repository.run('init', '--quiet', folder,
                            extra={'GIT_DIR': str(folder / '.git')})
    branches.repository.run(
        'push', '--quiet', folder,
        *(f'{end}:refs/heads/{name}'
          for name, end in zip(['plain', *names], ends)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ./run tells each program about the base."""
    parser.add_argument('--cache', type=Path, required=True)
    parser.add_argument('--base', default=REFERENCE)
    parser.add_argument('--pristine', type=Path, required=True)


def main() -> int:
    """Do what the command line says; tools/base/commands tells of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    for name in ('--output', '--edit', '--keep'):
        parser.add_argument(name, type=Path)
    parser.add_argument('--signoff', action='store_true')
    parser.add_argument('series', nargs='*')
    args = parser.parse_args()
    base = Base(args.base, args.pristine)
    try:
        with branches_of(args.cache, base) as branches:
            if args.edit:
                edit(branches, args.edit)
                return 0
            if args.keep:
                keep(branches, args.keep)
                return 0
            write_chosen(branches, args)
    except Failure as failure:
        print(f'error: {failure}', file=sys.stderr)
        return 1
    print(args.output)
    return 0


def write_chosen(branches: Branches, args: argparse.Namespace) -> None:
    """Write all, or what the user wants."""
    writer = Writer(branches, args.signoff)
    if args.series:
        written = [writer.write_alone(series, args.output)
                   for series in map(branches.find, args.series)]
    else:
        branches.all_of_it()
        written = writer.write_all(args.output)
    for series, mails in written:
        print(f'[series] {series.title}: {len(mails)} patches and a cover '
              f'letter for QEMU {version_of(args.pristine)}', file=sys.stderr)


if __name__ == '__main__':
    sys.exit(main())
