# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the series out of the checkout: commits, then files to send."""

import argparse
from datetime import datetime, timezone
import fcntl
import hashlib
from pathlib import Path
import re
import sys
import tempfile
import textwrap
from typing import Dict, List, NamedTuple, Optional

from gitrepo import (Failure, Identity, NOBODY, Repository, clean_environment,
                     configured, run)
from manifest import HERE, Step, read_steps

sys.path.insert(0, str(HERE.parent / 'base'))
# pylint: disable=wrong-import-position
from bases import Base, CHECKOUT, REFERENCE  # noqa: E402
import bases  # noqa: E402
import overlay  # noqa: E402

COVER = HERE / 'cover'
MEASURED = HERE / 'measured.txt'

# The same commit for the same base
BASE_DATE = '2025-01-01T00:00:00Z'


class Commits(NamedTuple):
    """The commits of a series."""
    base: str
    tip: str


class Series(NamedTuple):
    """A series that was written."""
    # bare; branch base is what the series is against
    repository: Path
    patches: List[Path]


def series_of(version: str) -> str:
    """10.0 of 10.0.13."""
    return '.'.join(version.split('.')[:2])


def version_of(tree: Path) -> str:
    """The version of a QEMU source tree."""
    try:
        return (tree / 'VERSION').read_text('utf-8').strip()
    except FileNotFoundError:
        raise Failure(f'{tree} is not a QEMU source tree') from None


def read_message(path: Path, signed_off: Optional[Identity]) -> str:
    """The message of a commit, from a patch or from a file of its own."""
    text = path.read_text('utf-8')
    if path.suffix == '.patch':
        text = re.split('^---$', text, 1, re.MULTILINE)[0]
        text = re.sub(r'^Subject: \[PATCH\] ', '', text)
    text = text.strip() + '\n'
    if not re.match(r'\S.*\n\n\S', text):
        raise Failure(f'{path}: a message is a subject, an empty line and '
                      f'why')
    if signed_off:
        text += f'\nSigned-off-by: {signed_off.name} <{signed_off.email}>\n'
    return text


def last_change() -> str:
    """When the checkout was last committed to: the date of the series."""
    try:
        return run(['log', '-1', '--format=%cI'], CHECKOUT,
                   clean_environment())
    except Failure:
        return datetime.now(timezone.utc).isoformat(timespec='seconds')


def apply_step(repository: Repository, step: Step,
               files: Dict[str, Path]) -> None:
    """Bring one step into the index."""
    for name in step.patches:
        repository.run(['apply', '--cached', files[name]])
    for name in step.files:
        repository.put(name, files[name])


class Composer:
    """Makes the commits for one base."""

    def __init__(self, cache: Path, base: Base, who: Identity,
                 signed_off: bool) -> None:
        self.base = base
        self.pristine = base.pristine
        self.who = who
        self.signed_off = who if signed_off else None
        key = hashlib.sha256(str(self.pristine).encode()).hexdigest()[:8]
        folder = cache / f'series/{version_of(self.pristine)}-{key}.git'
        self.repository = Repository(folder)

    def commit_base(self) -> str:
        """A commit of the pristine source, without firmware's."""
        names = list(overlay.walk(self.pristine, set(overlay.UNUSED)))
        self.repository.read_names(self.pristine, names)
        commit = self.repository.commit(
            f'QEMU {version_of(self.pristine)}\n', '', NOBODY, BASE_DATE)
        self.repository.run(['branch', '--force', 'base', commit])
        return commit

    def commits(self, staging: Path) -> Commits:
        """The series on top of the base."""
        contents = overlay.contents(overlay.FLAVOURS['ours'], self.base,
                                    staging)
        changed = {name: source for name, source in contents.wanted.items()
                   if self.pristine not in source.parents}
        files = dict(contents.ours, MAINTAINERS=changed['MAINTAINERS'])
        files.update(self.base.patches())
        steps = read_steps(files, self.base.name == REFERENCE)
        base = tip = self.commit_base()
        for step in steps:
            apply_step(self.repository, step, files)
            tip = self.repository.commit(
                read_message(step.message, self.signed_off), tip, self.who,
                last_change())
        self.compare(tip, changed)
        return Commits(base, tip)

    def compare(self, tip: str, changed: Dict[str, Path]) -> None:
        """Refuse a series that does not end in what ./run build builds."""
        for name, source in changed.items():
            self.repository.put(name, source)
        different = self.repository.run(['diff-index', '--cached',
                                         '--name-only', tip])
        if different:
            raise Failure(f'the series and the build differ in: '
                          f'{different.split()}')


def about_base(base: Base) -> str:
    """What the cover letter tells of a base that is not the reference."""
    left_out = ''
    for name, reason in bases.read_reasons(base.folder / 'without').items():
        subject = read_message(CHECKOUT / bases.PATCHES / name, None)
        text = f'{subject.splitlines()[0]}: {reason}'
        left_out += '\n' + textwrap.fill(text, 72, initial_indent='* ',
                                         subsequent_indent='  ')
    text = textwrap.fill(
        f'This is the series for QEMU {base.name}.  It was made for '
        f'{REFERENCE}, which the figures are of, and is changed where '
        f'{base.name} is different.', 76)
    if left_out:
        text += f'  It lacks these patches:\n{left_out}'
    return f'For QEMU {base.name}\n{"-" * (9 + len(base.name))}\n\n{text}\n'


def write_cover(path: Path, base: Base) -> None:
    """Fill in what git leaves open in a cover letter."""
    subject, _, blurb = COVER.read_text('utf-8').partition('\n\n')
    blurb = blurb.strip() + '\n'
    if base.name != REFERENCE:
        blurb += f'\n\n{about_base(base)}'
    if MEASURED.exists():
        blurb += '\n\n' + MEASURED.read_text('utf-8').strip() + '\n'
    text = path.read_text('utf-8')
    text = text.replace('*** SUBJECT HERE ***', subject.strip())
    path.write_text(text.replace('*** BLURB HERE ***', blurb), 'utf-8')


def write(composer: Composer, commits: Commits,
          folder: Path) -> List[Path]:
    """Write the series as mails; return the patches without the cover."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.glob('*.patch'))
    if there:
        raise Failure(f'{folder} has patches already: {there[0]}, ...')
    # -B: a file that is replaced is removed and added, not mixed line by line
    composer.repository.run(
        ['format-patch', '--quiet', '--cover-letter', '--no-signature',
         '--zero-commit', '--no-renames', '-B', '--stat=72',
         '-o', folder.resolve(), f'{commits.base}..{commits.tip}'],
        extra=dict(composer.who.environment(),
                   GIT_COMMITTER_DATE=last_change()))
    paths = sorted(folder.glob('*.patch'))
    write_cover(paths[0], composer.base)
    return paths[1:]


def identity(signed_off: bool) -> Identity:
    """Who the series is from."""
    who = configured(Path.cwd())
    if who is None and signed_off:
        raise Failure("-s signs off as git's user.name and user.email, which "
                      'are not set')
    return who or NOBODY


def make(cache: Path, base: Base, folder: Path,
         signed_off: bool = False) -> Series:
    """Write the series for a base into a folder."""
    (cache / 'series').mkdir(parents=True, exist_ok=True)
    with open(cache / 'series/use.lock', 'w', encoding='utf-8') as lock, \
            tempfile.TemporaryDirectory() as staging:
        # the index is one
        fcntl.flock(lock, fcntl.LOCK_EX)
        who = identity(signed_off)
        composer = Composer(cache, base, who, signed_off)
        try:
            commits = composer.commits(Path(staging))
            return Series(composer.repository.folder,
                          write(composer, commits, folder))
        except bases.Failure as failure:
            raise Failure(str(failure)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ./run tells each program about the base."""
    parser.add_argument('--cache', type=Path, required=True,
                        help=argparse.SUPPRESS)
    parser.add_argument('--base', metavar='VERSION', default=REFERENCE,
                        help=f'the QEMU that the series is for: one of '
                        f'bases/, by default {REFERENCE}')
    parser.add_argument('--pristine', type=Path, required=True,
                        help=argparse.SUPPRESS)


def base_of(args: argparse.Namespace) -> Base:
    """The base that the arguments name."""
    return Base(args.base, args.pristine)
