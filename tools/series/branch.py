# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes branches of QEMU: its source, the patches and our own files.

A mail may have lines "Adds: PATTERN" at the end of its message: its commit
has the files of ours that match besides what the mail changes.  What an
earlier one has added is not added again, and a mail that changes nothing for
this reason gives no commit: so each of several series can bring what it needs.
"""

from contextlib import contextmanager
import fcntl
from fnmatch import fnmatchcase
import hashlib
from pathlib import Path
import re
import shutil
import subprocess
import sys
from typing import Callable, Dict, Iterator, List, Optional, Tuple

from repository import Repository

# from tools/base, which repository.py has added to the path
from bases import (Base, CHECKOUT, Failure, REFERENCE, Series, our_files,
                   walk)

# QEMU's own replication driver: the files that ours take the place of.
REPLACED = frozenset((
    'block/replication.c',
    'docs/block-replication.txt',
    'include/block/replication.h',
    'replication.c',
    'tests/unit/test-replication.c',
))

# Not needed to build: sources of firmware, which is most of the tree, and
# Debian's packaging.
UNUSED = frozenset(('roms', 'debian', '.pc', '.git'))

# The same commit for the same source
BASE_DATE = '2025-01-01T00:00:00Z'

ADDS = re.compile(r'^Adds: (\S+)\n', re.MULTILINE)
BASED_ON = re.compile(r'^Based-on: (\S+)$', re.MULTILINE)

NO_BLOBS = 'Repository lacks necessary blobs'

# What git has of each file: its mode, its type and its name
Files = Dict[str, str]


def version_of(tree: Path) -> str:
    """The version of a QEMU source tree."""
    try:
        return (tree / 'VERSION').read_text('utf-8').strip()
    except FileNotFoundError:
        raise Failure(f'{tree} is not a QEMU source tree') from None


def added_by(mail: Path, ours: Files) -> Files:
    """The files of ours that a mail adds."""
    head = mail.read_text('utf-8').partition('\n---\n')[0] + '\n'
    patterns = ADDS.findall(head)
    found = {pattern: {name: what for name, what in ours.items()
                       if fnmatchcase(name, pattern)} for pattern in patterns}
    empty = [pattern for pattern, files in found.items() if not files]
    if empty:
        raise Failure(f'{mail} adds what there is not: {empty}')
    return {name: what for files in found.values()
            for name, what in files.items()}


class Work:
    """A work tree in which mails are applied; it has only what they touch"""

    def __init__(self, repository: Repository, commit: str) -> None:
        self.repository = repository
        self.folder = repository.folder / 'work'
        self.by_three_way: List[str] = []
        # one that was interrupted
        self.remove()
        repository.run('worktree', 'add', '--quiet', '--no-checkout',
                       '--detach', self.folder, commit)
        self.git('read-tree', 'HEAD')

    def remove(self) -> None:
        """Remove the work tree, not what was committed in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.repository.run('worktree', 'prune')

    def git(self, *words: str, data: Optional[bytes] = None,
            extra: Optional[Dict[str, str]] = None) -> str:
        """Run git there."""
        folder = self.repository.folder / 'worktrees/work'
        return self.repository.run(*words, data=data, top=self.folder,
                                   extra={'GIT_DIR': str(folder),
                                          **(extra or {})})

    def take(self, mails: List[Path], *options: str) -> None:
        """Apply mails; know which need a merge."""
        if not mails:
            return
        self.check_out(mails)
        try:
            said = self.git('am', '--empty=keep', '--keep-cr',
                            '--committer-date-is-author-date', *options,
                            *map(str, mails))
        except Failure as failure:
            raise self.why_not(failure) from None
        for part in re.split(r'^Applying: ', said, flags=re.MULTILINE)[1:]:
            if '3-way merge' in part or 'already applied' in part:
                self.by_three_way.append(part.splitlines()[0])

    def check_out(self, mails: List[Path]) -> None:
        """Have the files that mails touch: git am is lost without them."""
        names = {name for mail in mails for name in
                 re.findall(r'^--- a/(\S+)$', mail.read_text('utf-8'),
                            re.MULTILINE)}
        self.git('checkout-index', '--index', '--quiet', '-z', '--stdin',
                 data='\0'.join(sorted(names)).encode())

    def why_not(self, failure: Failure) -> Failure:
        """What git says of a patch that does not apply."""
        lines = [line for line in str(failure).splitlines()
                 if re.match(r'error|fatal|CONFLICT|Patch failed|\s', line)
                 or NO_BLOBS in line]
        return Failure('\n'.join(lines or [str(failure)]))

    def add(self, files: Files) -> None:
        """Put files of ours into the last commit; drop it if it is empty."""
        listed = ''.join(f'{what}\t{name}\n' for name, what in files.items())
        self.git('update-index', '--add', '--index-info',
                 data=listed.encode())
        if self.git('write-tree') == self.git('rev-parse', 'HEAD^^{tree}'):
            self.git('update-ref', 'HEAD', 'HEAD^')
            return
        date, _, message = self.git('log', '-1', '--format=%aI%n%B'
                                    ).partition('\n')
        message = ADDS.sub('', message + '\n').rstrip() + '\n'
        self.git('commit', '--amend', '--quiet', '--cleanup=verbatim', '-F-',
                 data=message.encode(), extra={'GIT_COMMITTER_DATE': date})


class Branches:
    """The branches that can be made of one base."""

    def __init__(self, repository: Repository, cache: Path,
                 base: Base) -> None:
        self.repository = repository
        self.cache = cache
        self.base = base
        key = hashlib.sha256(str(base.pristine).encode()).hexdigest()[:8]
        self.index = repository.folder / f'index-{key}'

    def plain(self) -> str:
        """A commit of QEMU's source, without firmware's."""
        names = list(walk(self.base.pristine, UNUSED))
        tree = self.repository.tree_of(self.base.pristine, names, self.index)
        dates = {f'GIT_{role}_DATE': BASE_DATE
                 for role in ('AUTHOR', 'COMMITTER')}
        commit = self.repository.commit(
            tree, f'QEMU {version_of(self.base.pristine)}\n', extra=dates)
        self.repository.run('update-ref', f'refs/plain/{commit}', commit)
        return commit

    def ours(self) -> Files:
        """Our own files, as the base needs them."""
        tree = self.repository.tree_of(
            CHECKOUT, our_files(),
            self.repository.folder / 'index-ours')
        commit = self.repository.commit(tree, 'Our files\n', extra={
            f'GIT_{role}_DATE': BASE_DATE for role in ('AUTHOR', 'COMMITTER')})
        files = self.repository.blobs(
            self.grow(commit, self.base.own_patches()))
        lacking = sorted(REPLACED - files.keys())
        if lacking:
            raise Failure(f"the driver's sources are missing: {lacking}")
        return files

    def grow(self, parent: str, mails: List[Path],
             ours: Optional[Files] = None) -> str:
        """The commit that mails lead to; with our files if there are some."""
        if not mails:
            return parent
        adds = {mail: added_by(mail, ours) for mail in mails} if ours else {}
        key = hashlib.sha256(parent.encode())
        for mail in mails:
            key.update(mail.read_bytes() + repr(adds.get(mail)).encode())
        name = f'refs/grown/{key.hexdigest()}'
        commit = self.repository.find(name)
        if not commit:
            commit = self.with_reference(
                lambda: self.apply(parent, mails, adds))
            self.repository.run('update-ref', name, commit)
        return commit

    def apply(self, parent: str, mails: List[Path],
              adds: Dict[Path, Files]) -> str:
        """Apply mails, and add the files that they say."""
        work = Work(self.repository, parent)
        pending: List[Path] = []
        for mail in mails:
            pending.append(mail)
            if adds.get(mail):
                work.take(pending, '--3way')
                work.add(adds[mail])
                pending = []
        work.take(pending, '--3way')
        if work.by_three_way:
            print(f'[source] merged into QEMU '
                  f'{version_of(self.base.pristine)}:', *work.by_three_way,
                  sep='\n    ', file=sys.stderr)
        commit = work.git('rev-parse', 'HEAD')
        work.remove()
        return commit

    def with_reference(self, make: Callable[[], str]) -> str:
        """Do it again with what the patches are against, if git wants it."""
        try:
            return make()
        except Failure as failure:
            if NO_BLOBS not in str(failure):
                raise
            # what the base before a new one has is against that
            known = {REFERENCE, self.base.folder.name} - {self.base.name}
            if not all([self.bring(name) for name in sorted(known)]):
                raise
        return make()

    def bring(self, name: str) -> bool:
        """Make the branch of another base, if its source can be had."""
        # it says itself what is wrong
        found = subprocess.run(
            [CHECKOUT / 'tools/base/source.sh', 'qemu', self.cache, name],
            check=False, text=True, stdout=subprocess.PIPE)
        pristine = Path(found.stdout.strip())
        if found.returncode or pristine == self.base.pristine:
            return False
        other = Branches(self.repository, self.cache, Base(name, pristine))
        other.ends(other.base.series(), other.ours())
        return True

    def ends(self, chosen: List[Series],
             ours: Optional[Files] = None) -> List[str]:
        """The base, and where each of some series on top of it ends."""
        commits = [self.plain()]
        for series in chosen:
            try:
                commits.append(self.grow(commits[-1], series.mails, ours))
            except Failure as failure:
                what = f'{failure}'
                if not self.base.is_known:
                    what = self.in_the_way(commits[0], chosen)
                raise Failure(f'patches/{series.name} does not apply to QEMU '
                              f'{version_of(self.base.pristine)}:\n{what}'
                              ) from None
        return commits

    def in_the_way(self, commit: str, chosen: List[Series]) -> str:
        """What does not apply to a new base, each without those before it."""
        bad = []
        for series in chosen:
            for mail in series.mails:
                try:
                    commit = self.grow(commit, [mail])
                except Failure as failure:
                    bad += [f'{series.name}/{mail.name}',
                            *re.findall('^CONFLICT.*', str(failure),
                                        re.MULTILINE)]
        total = sum(len(series.mails) for series in chosen)
        return '\n'.join([f'of {total} patches these:', *bad])

    def find(self, name: str) -> Series:
        """The series of a name, with or without its number."""
        for series in self.base.series():
            if name in (series.name, series.title):
                return series
        names = ', '.join(series.title for series in self.base.series())
        raise Failure(f'no series is called {name}; there are: {names}')

    def alone(self, series: Series) -> Tuple[str, str]:
        """A series on QEMU and what its cover letter says it is based on."""
        names = BASED_ON.findall(series.cover.read_text('utf-8'))
        below = {self.find(name).name for name in names}
        chosen = [other for other in self.base.series() if other.name in below]
        begin, end = self.ends([*chosen, series], self.ours())[-2:]
        return begin, end

    def all_of_it(self) -> str:
        """The commit with all series, which is what ./run build builds."""
        ours = self.ours()
        commits = self.ends(self.base.series(), ours)
        self.refuse_hidden(ours, commits[0])
        have = self.repository.blobs(commits[-1])
        wrong = sorted(name for name, what in ours.items()
                       if have.get(name) != what)
        if wrong:
            raise Failure(f'no patch adds these, or one changes them after '
                          f'that: {wrong}')
        return commits[-1]

    def refuse_hidden(self, ours: Files, plain: str) -> None:
        """Refuse files of ours that hide files of QEMU."""
        hiding = sorted(self.repository.blobs(plain).keys() & ours.keys()
                        - REPLACED)
        if hiding:
            raise Failure(f'these are files of QEMU, change them with a patch '
                          f'instead: {hiding}')


@contextmanager
def branches_of(cache: Path, base: Base) -> Iterator[Branches]:
    """The branches of a base, and nobody else makes some meanwhile."""
    folder = cache / 'series'
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'use.lock', 'w', encoding='utf-8') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Branches(Repository(folder / 'qemu.git'), cache, base)
