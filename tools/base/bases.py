# SPDX-License-Identifier: GPL-2.0-or-later
"""What the checkout says of a version of QEMU that it is built into.

patches/ has folders, in the order of their names; each is a series of its own:
mails in the format of git, and the cover letter, in the file "cover".  The
checkout itself is for the reference base.  Any file of bases/VERSION may be
missing:

patches/    take the place of the files of patches/ that have the same name but
            for its number, or are there besides
without     files of patches/ that the base does not get, without their number,
            and why
own/        patches to our own files
source      where it comes from (see source.sh)
"""

import os
from pathlib import Path
import re
from typing import Dict, FrozenSet, Iterator, List, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
REFERENCE = '10.0'
PATCHES = 'patches'

# Where QEMU keeps what this project replaces or adds. Everything else in
# the checkout (tools, the root's meson.build, ...) is not part of QEMU.
OURS = ('block', 'docs/block-replication.txt',
        'docs/replication-metadata.txt', 'include', 'qapi', 'tests',
        'replication.c')

# Left behind by editors, patch and Python: never part of anything.
LITTER = re.compile(r'\..*|__pycache__|.*(~|\.orig|\.rej|\.pyc|\.swp)')


class Failure(Exception):
    """Something that the user has to put right; says what."""


def walk(top: Path, without: FrozenSet[str] = frozenset()) -> Iterator[str]:
    """The files under top, relative to it; without some of its entries.

    A folder with a build.ninja is somebody's build, not source; Python
    leaves its caches where tests run.
    """
    for folder, subfolders, files in os.walk(top):
        if folder == str(top):
            subfolders[:] = [name for name in subfolders
                             if name not in without]
            files = [name for name in files if name not in without]
        subfolders[:] = [
            name for name in subfolders if name not in ('__pycache__', '.git')
            and not os.path.exists(os.path.join(folder, name, 'build.ninja'))]
        links = [name for name in subfolders
                 if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            yield os.path.relpath(os.path.join(folder, name), top)


def our_files() -> List[str]:
    """Our files by their path in QEMU's tree, which is that here."""
    found = []
    for top in OURS:
        path = CHECKOUT / top
        names = ['.'] if path.is_file() else walk(path)
        for name in names:
            relative = os.path.normpath(os.path.join(top, name))
            if not any(map(LITTER.fullmatch, relative.split('/'))):
                found.append(relative)
    return sorted(found)


def numbers(version: str) -> List[int]:
    """A version, so that it can be compared."""
    return [int(part) for part in re.findall(r'\d+', version)]


def read_reasons(path: Path) -> Dict[str, str]:
    """The lines of a file, and what stands behind a # on each."""
    if not path.exists():
        return {}
    lines = {}
    for line in path.read_text('utf-8').splitlines():
        name, _, reason = line.partition('#')
        if name.strip():
            lines[name.strip()] = reason.strip()
    silent = [name for name, reason in lines.items() if not reason]
    if silent:
        raise Failure(f'{path} gives no reason for: {silent}')
    return lines


def mails_of(folder: Path) -> Dict[str, Path]:
    """The patches in the folders of a folder, as FOLDER/FILE.

    Their numbers may change: they are called without.
    """
    return {f'{path.parent.name}/' + re.sub(r'^\d+-', '', path.name): path
            for path in folder.glob('*/*.patch')}


class Series(NamedTuple):
    """A folder of patches, as one base gets it."""
    name: str
    mails: List[Path]

    @property
    def cover(self) -> Path:
        """Its cover letter: the subject, an empty line and the text."""
        return CHECKOUT / PATCHES / self.name / 'cover'

    @property
    def title(self) -> str:
        """Its name, without what gives the order."""
        return self.name.partition('-')[2]


class Base(NamedTuple):
    """A version of QEMU that the driver is built into."""
    name: str
    # its source as it came
    pristine: Path

    @property
    def is_known(self) -> bool:
        """Does the checkout have something for this base?"""
        return (CHECKOUT / 'bases' / self.name).is_dir()

    @property
    def folder(self) -> Path:
        """Where the checkout keeps what is different for this base.

        To begin with, a new one gets what the one before it has.
        """
        before = [path for path in (CHECKOUT / 'bases').iterdir()
                  if numbers(path.name) <= numbers(self.name)]
        return max(before, key=lambda path: numbers(path.name),
                   default=CHECKOUT / 'bases' / REFERENCE)

    def without(self) -> Dict[str, str]:
        """The patches that it does not get, and why."""
        return read_reasons(self.folder / 'without')

    def series(self) -> List[Series]:
        """All patches to QEMU, in their order."""
        found = mails_of(CHECKOUT / PATCHES)
        other = mails_of(self.folder / PATCHES)
        without = self.without().keys()
        wrong = sorted(without - found.keys() | without & other.keys())
        if wrong:
            raise Failure(f'{self.folder}/without names what there is not, '
                          f'or is there for this base: {wrong}')
        order = {**other, **found}
        made: Dict[str, Series] = {}
        for name in sorted(order.keys() - without,
                           key=lambda name: order[name].parts[-2:]):
            folder = name.partition('/')[0]
            made.setdefault(folder, Series(folder, [])).mails.append(
                other.get(name, order[name]))
        return list(made.values())

    def own_patches(self) -> List[Path]:
        """The patches to our own files, in their order."""
        return sorted((self.folder / 'own').glob('*.patch'))
