# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs git as the series needs it: the same wherever it runs."""

import os
from pathlib import Path
import subprocess
import sys
from typing import Dict, Iterable, List, NamedTuple, Optional, Union

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / 'base'))
# pylint: disable=wrong-import-position
from bases import Failure  # noqa: E402

Word = Union[str, Path]


class Identity(NamedTuple):
    """Somebody who makes commits."""
    name: str
    email: str

    def environment(self) -> Dict[str, str]:
        """What makes git use this identity."""
        return {f'GIT_{role}_{what}': value
                for role in ('AUTHOR', 'COMMITTER')
                for what, value in (('NAME', self.name),
                                    ('EMAIL', self.email))}


NOBODY = Identity('Block replication', 'block-replication@localhost')


def clean_environment() -> Dict[str, str]:
    """Without what tells git of another repository."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith('GIT_')}


def reproducible_environment() -> Dict[str, str]:
    """Without the user's configuration, which can change all output."""
    return dict(clean_environment(), GIT_CONFIG_NOSYSTEM='1',
                GIT_CONFIG_GLOBAL='/dev/null', LC_ALL='C',
                **NOBODY.environment())


def run(command: Iterable[Word], cwd: Optional[Path] = None,
        env: Optional[Dict[str, str]] = None,
        data: Optional[bytes] = None) -> str:
    """Run git; return what it prints, without the last newline."""
    words = ['git', *map(str, command)]
    result = subprocess.run(words, cwd=cwd, input=data, check=False,
                            env=env or reproducible_environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if result.returncode:
        output = (result.stdout + result.stderr).decode('utf-8', 'replace')
        raise Failure(f'git {words[1]}: {output.strip()}')
    return result.stdout.decode('utf-8').rstrip('\n')


def configured(folder: Path) -> Optional[Identity]:
    """Who the user is by git's configuration, if it says so."""
    values = []
    for key in ('user.name', 'user.email'):
        try:
            values.append(run(['config', key], folder, clean_environment()))
        except Failure:
            return None
    return Identity(*values)


class Repository:
    """A bare repository in the cache, that all sources are brought into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / 'HEAD').exists():
            folder.mkdir(parents=True, exist_ok=True)
            run(['init', '--quiet', '--bare', folder])
            # nothing is in the way of a build, and nothing goes away
            self.run('config', 'gc.auto', '0')

    def run(self, *command: Word, data: Optional[bytes] = None,
            index: Optional[Path] = None, top: Optional[Path] = None,
            extra: Optional[Dict[str, str]] = None) -> str:
        """Run git on this repository, maybe with an index and a work tree."""
        env = {**reproducible_environment(), 'GIT_DIR': str(self.folder),
               **(extra or {})}
        if index:
            env['GIT_INDEX_FILE'] = str(index)
            # of a git that was killed: nobody else is here
            index.with_name(index.name + '.lock').unlink(missing_ok=True)
        if top:
            env['GIT_WORK_TREE'] = str(top)
        return run(command, top, env, data)

    def tree_of(self, top: Path, names: List[str], index: Path) -> str:
        """The tree of these files of top.

        The index belongs to top: what has not changed is not read again.
        """
        def update(option: str, which: List[str]) -> None:
            self.run('update-index', option, '-z', '--stdin', index=index,
                     top=top, data='\0'.join(which).encode())

        have = self.run('ls-files', '-z', index=index)
        update('--force-remove', sorted(set(have.split('\0')[:-1])
                                        - set(names)))
        update('--add', names)
        return self.run('write-tree', index=index)

    def commit(self, tree: str, message: str, *parents: str,
               extra: Optional[Dict[str, str]] = None) -> str:
        """Commit a tree; return the commit's name."""
        words = [word for parent in parents for word in ('-p', parent)]
        return self.run('commit-tree', tree, *words, extra=extra,
                        data=message.encode())

    def blobs(self, commit: str) -> Dict[str, str]:
        """The files of a commit, and what git has of each."""
        listed = self.run('ls-tree', '-r', '-z', commit).split('\0')
        return {name: what for what, _, name in
                (line.partition('\t') for line in listed if line)}

    def find(self, name: str) -> str:
        """The commit that a name stands for; empty if none."""
        return self.run('for-each-ref', '--format=%(objectname)', name)
