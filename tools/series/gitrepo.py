# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs git as the series needs it: the same wherever it runs."""

import os
from pathlib import Path
import subprocess
from typing import Dict, List, NamedTuple, Optional, Union

NOBODY_NAME = 'Block replication'
NOBODY_EMAIL = 'block-replication@localhost'

Word = Union[str, Path]


class Failure(Exception):
    """Something that the user has to put right; says what."""


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


NOBODY = Identity(NOBODY_NAME, NOBODY_EMAIL)


def clean_environment() -> Dict[str, str]:
    """Without what tells git of another repository."""
    return {name: value for name, value in os.environ.items()
            if not name.startswith('GIT_')}


def reproducible_environment() -> Dict[str, str]:
    """Without the user's configuration, which can change all output."""
    return dict(clean_environment(), GIT_CONFIG_NOSYSTEM='1',
                GIT_CONFIG_GLOBAL='/dev/null', LC_ALL='C')


def run(command: List[Word], cwd: Optional[Path] = None,
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
    """A bare repository, and an index that commits are made from.

    There is no work tree: patches are applied to the index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / 'HEAD').exists():
            folder.mkdir(parents=True, exist_ok=True)
            run(['init', '--quiet', '--bare', folder])

    def run(self, command: List[Word], data: Optional[bytes] = None,
            extra: Optional[Dict[str, str]] = None,
            cwd: Optional[Path] = None) -> str:
        """Run git on this repository."""
        env = dict(reproducible_environment(), GIT_DIR=str(self.folder),
                   **(extra or {}))
        return run(command, cwd, env, data)

    def read_names(self, top: Path, names: List[str]) -> None:
        """Make the index hold these files of top and nothing else."""
        extra = {'GIT_WORK_TREE': str(top)}

        def update(option: str, which: List[str]) -> None:
            self.run(['update-index', option, '-z', '--stdin'],
                     '\0'.join(which).encode(), extra, top)

        have = self.run(['ls-files', '-z'])
        update('--force-remove', sorted(set(have.split('\0')[:-1])
                                        - set(names)))
        update('--add', names)

    def put(self, name: str, source: Path) -> None:
        """Put one file from elsewhere into the index."""
        blob = self.run(['hash-object', '-w', '--no-filters', source])
        mode = '100755' if os.access(source, os.X_OK) else '100644'
        self.run(['update-index', '--add', '--cacheinfo',
                  f'{mode},{blob},{name}'])

    def commit(self, message: str, parent: str, who: Identity,
               date: str) -> str:
        """Make a commit of the index; return its name."""
        dates = {'GIT_AUTHOR_DATE': date, 'GIT_COMMITTER_DATE': date}
        tree = self.run(['write-tree'])
        parents: List[Word] = ['-p', parent] if parent else []
        return self.run(['commit-tree', tree, *parents], message.encode(),
                        dict(who.environment(), **dates))
