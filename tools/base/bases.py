# SPDX-License-Identifier: GPL-2.0-or-later
"""What bases/VERSION of the checkout says of one version of QEMU.

The checkout itself is for the reference base. Any file of bases/VERSION may
be missing:

patches/    take the place of the files of patches/ that have the same name, or
            are there besides
without     files of patches/ that the base does not get, and why
own/        patches to our own files
tests       SUITE/TEST that the base cannot pass, and why
source      where it comes from (see source.sh)
"""

from pathlib import Path
from typing import Dict, List, NamedTuple

CHECKOUT = Path(__file__).resolve().parents[2]
REFERENCE = '10.0'
PATCHES = 'patches'


class Failure(Exception):
    """Something that the user has to put right; says what."""


def read_lines(path: Path) -> Dict[str, str]:
    """The lines of a file, and what stands behind a # on each."""
    if not path.exists():
        return {}
    lines = {}
    for line in path.read_text('utf-8').splitlines():
        name, _, reason = line.partition('#')
        if name.strip():
            lines[name.strip()] = reason.strip()
    return lines


def read_reasons(path: Path) -> Dict[str, str]:
    """The same where each line has to give a reason."""
    lines = read_lines(path)
    silent = [name for name, reason in lines.items() if not reason]
    if silent:
        raise Failure(f'{path} gives no reason for: {silent}')
    return lines


class Base(NamedTuple):
    """A version of QEMU that the driver is built into."""
    name: str
    # its source as it came
    pristine: Path

    @property
    def folder(self) -> Path:
        """Where the checkout keeps what is different for this base."""
        return CHECKOUT / 'bases' / self.name

    def patches(self) -> Dict[str, Path]:
        """The patches to QEMU by their names in patches/, in their order."""
        found = {path.name: path
                 for path in (CHECKOUT / PATCHES).glob('*.patch')}
        without = read_reasons(self.folder / 'without')
        other = {path.name: path
                 for path in (self.folder / PATCHES).glob('*.patch')}
        wrong = sorted(without.keys() - found.keys()
                       | without.keys() & other.keys())
        if wrong:
            raise Failure(f'{self.folder}/without names what there is not, '
                          f'or is there for this base: {wrong}')
        found.update(other)
        return {f'{PATCHES}/{name}': found[name]
                for name in sorted(found.keys() - without.keys())}

    def own_patches(self) -> List[Path]:
        """The patches to our own files, in their order."""
        return sorted((self.folder / 'own').glob('*.patch'))

    def broken_tests(self) -> Dict[str, str]:
        """The tests that it cannot pass as SUITE/TEST, and why."""
        return read_reasons(self.folder / 'tests')
