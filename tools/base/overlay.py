#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Make a QEMU tree from a pristine source, our files and our patches.

What another base than the reference needs besides is told by bases.py. The
tree is a function of these and of nothing else: whatever differs
from what they give is copied or removed, and only that, so that a rebuild
after a small change is small, a file or patch that went away is noticed and
an interrupted run is repaired by the next.
"""

import argparse
import filecmp
from fnmatch import fnmatchcase
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tempfile
from typing import Dict, Iterable, Iterator, List, NamedTuple, Set

from bases import Base, CHECKOUT, Failure, REFERENCE

# Where QEMU keeps what this project replaces or adds. Everything else in
# the checkout (tools, the root's meson.build, ...) is not part of QEMU.
OVERLAY = ('block', 'docs', 'include', 'qapi', 'tests', 'replication.c')

# QEMU's own replication driver: the files that ours take the place of.
REPLACED = frozenset((
    'block/replication.c',
    'docs/block-replication.txt',
    'include/block/replication.h',
    'replication.c',
    'tests/unit/test-replication.c',
))

# Without these QEMU's meson.build files do not even configure.
REQUIRED = REPLACED - {'docs/block-replication.txt'}

# In the checkout it is one section; in QEMU's file, many others surround it.
MAINTAINERS = 'MAINTAINERS'

# Left behind by editors, patch and Python: never part of anything.
LITTER = re.compile(r'\..*|__pycache__|.*(~|\.orig|\.rej|\.pyc|\.swp)')

# Not needed to build: sources of firmware, which is most of the tree, and
# Debian's packaging.
UNUSED = frozenset(('roms', 'debian', '.pc', '.git'))


class Flavour(NamedTuple):
    """What a tree is made of, apart from the pristine source."""
    overlay: bool
    patches: str


FLAVOURS = {
    'ours': Flavour(overlay=True, patches='*.patch'),
    'sanitize': Flavour(overlay=True, patches='*.patch'),
    # QEMU's own driver, for comparisons. COLO under TCG deadlocks at the
    # first checkpoint unless QEMU itself is mended: that is no difference
    # between the drivers, so this tree gets that patch, and only that.
    'stock': Flavour(overlay=False, patches='*colo*.patch'),
}


class Contents(NamedTuple):
    """What a tree has to hold: files by their names, and where they are."""
    wanted: Dict[str, Path]
    # those of wanted that this project adds
    ours: Dict[str, Path]


def walk(top: Path, skip: Set[str]) -> Iterator[str]:
    """The files under top, relative to it, without those named in skip.

    A folder with a build.ninja is somebody's build, not source; Python
    leaves its caches where tests run.
    """
    for folder, subfolders, files in os.walk(top):
        where = os.path.relpath(folder, top)
        prefix = '' if where == '.' else where + '/'
        subfolders[:] = [
            name for name in subfolders
            if prefix + name not in skip and name != '__pycache__'
            and not os.path.exists(os.path.join(folder, name, 'build.ninja'))]
        links = [name for name in subfolders
                 if os.path.islink(os.path.join(folder, name))]
        for name in files + links:
            if prefix + name not in skip:
                yield prefix + name


def overlay_files() -> Dict[str, Path]:
    """Our files by their path in QEMU's tree, as the checkout has them."""
    found = {}
    for top in OVERLAY:
        path = CHECKOUT / top
        names = ['.'] if path.is_file() else walk(path, set())
        for name in names:
            relative = os.path.normpath(os.path.join(top, name))
            if not any(map(LITTER.fullmatch, relative.split('/'))):
                found[relative] = CHECKOUT / relative
    return found


def check_overlay(ours: Dict[str, Path], pristine: Path) -> None:
    """Refuse an overlay that lacks the driver or hides files of QEMU."""
    lacking = sorted(REQUIRED - ours.keys())
    if lacking:
        raise Failure(f"the driver's sources are missing: {lacking}")
    hiding = sorted(name for name in ours.keys() - REPLACED
                    if (pristine / name).exists())
    if hiding:
        raise Failure(f'these are files of QEMU, change them with a patch '
                      f'instead: {hiding}')


def touched_by(patch: Path) -> List[str]:
    """The files that a patch changes, adds or removes."""
    text = patch.read_text(encoding='utf-8')
    return re.findall(r'^(?:---|\+\+\+) [ab]/(\S+)', text, re.MULTILINE)


def apply_patches(patches: Iterable[Path], sources: Dict[str, Path],
                  staging: Path) -> Set[str]:
    """Leave in staging what the patches make of sources; return the names."""
    staging.mkdir()
    touched = set()
    for patch in patches:
        for name in touched_by(patch):
            target = staging / name
            if name not in touched and sources[name].exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(sources[name], target)
            touched.add(name)
        result = subprocess.run(
            ['patch', '-p1', '--fuzz=0', '--batch', '--no-backup-if-mismatch',
             '-d', str(staging), '-i', str(patch)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, check=False)
        if result.returncode:
            raise Failure(f'{patch} does not apply:\n{result.stdout}')
    return touched


def put_section(source: Path, target: Path) -> None:
    """Put QEMU's MAINTAINERS with our section in it where target is."""
    section = (CHECKOUT / MAINTAINERS).read_text(encoding='utf-8')
    title = re.escape(section.splitlines()[0])
    text, count = re.subn(rf'^{title}\n(?:.+\n)+', lambda _: section,
                          source.read_text(encoding='utf-8'),
                          flags=re.MULTILINE)
    if count != 1:
        raise Failure(f'{source} has {count} sections with the title of ours')
    target.write_text(text, encoding='utf-8')
    shutil.copymode(source, target)


def our_files(base: Base, staging: Path) -> Dict[str, Path]:
    """Our files by their path in QEMU's tree, as the base needs them."""
    ours = overlay_files()
    patches = base.own_patches()
    names = {name for patch in patches for name in touched_by(patch)}
    foreign = sorted(name for name in names
                     if name not in ours and (base.pristine / name).exists())
    if foreign:
        raise Failure(f'these are files of QEMU, change them with a patch '
                      f'that is not in {base.folder}/own: {foreign}')
    sources = {name: ours.get(name, staging / name) for name in names}
    for name in apply_patches(patches, sources, staging):
        ours[name] = staging / name
    return {name: path for name, path in ours.items() if path.exists()}


def contents(flavour: Flavour, base: Base, staging: Path) -> Contents:
    """What the tree has to hold; staging is an empty folder."""
    patches = [path for name, path in base.patches().items()
               if fnmatchcase(name, f'*/{flavour.patches}')]
    touched = {name for patch in patches for name in touched_by(patch)}
    ours: Dict[str, Path] = {}
    gone = set(UNUSED | touched)
    if flavour.overlay:
        ours = our_files(base, staging / 'ours')
        check_overlay(ours, base.pristine)
        gone |= REPLACED
    both = sorted(touched & ours.keys())
    if both:
        raise Failure(f'these are files of ours and of QEMU: {both}')
    patched = staging / 'patched'
    apply_patches(patches, {name: base.pristine / name for name in touched},
                  patched)
    if flavour.overlay:
        source = patched if MAINTAINERS in touched else base.pristine
        put_section(source / MAINTAINERS, patched / MAINTAINERS)
        touched.add(MAINTAINERS)
        gone.add(MAINTAINERS)

    wanted = {name: base.pristine / name
              for name in walk(base.pristine, gone)}
    wanted.update((name, patched / name) for name in touched
                  if (patched / name).exists())
    wanted.update(ours)
    return Contents(wanted, ours)


def same(source: Path, target: Path) -> bool:
    """Is target what a copy of source would be?"""
    if source.is_symlink() or target.is_symlink():
        return (source.is_symlink() and target.is_symlink()
                and os.readlink(source) == os.readlink(target))
    try:
        have = target.stat()
    except FileNotFoundError:
        return False
    want = source.stat()
    if (want.st_mode, want.st_size) != (have.st_mode, have.st_size):
        return False
    # the same time: a copy that nobody has changed since
    return (want.st_mtime_ns == have.st_mtime_ns
            or filecmp.cmp(source, target, shallow=False))


def copy(source: Path, target: Path, keep_time: bool) -> None:
    """Put a copy of source in place of target, if there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.exists():
        target.unlink()
        keep_time = False
    shutil.copy2(source, target, follow_symlinks=False)
    if not keep_time and not target.is_symlink():
        # ninja compares times: what changed must be younger than what was
        # built from it, even if it changed back to an old file
        os.utime(target)


def differences(wanted: Dict[str, Path], tree: Path) -> List[str]:
    """The files of tree that are to be copied or removed."""
    surplus = set(walk(tree, set())) - wanted.keys()
    return sorted(surplus) + [name for name, source in wanted.items()
                              if not same(source, tree / name)]


def update(wanted: Dict[str, Path], tree: Path, names: List[str],
           pristine: Path) -> None:
    """Bring these files of tree to what is wanted."""
    for name in names:
        if name in wanted:
            copy(wanted[name], tree / name, pristine in wanted[name].parents)
        else:
            (tree / name).unlink()


def report(names: List[str], tree: Path) -> str:
    """A short line on what update() is about to do."""
    if not tree.exists():
        return f'copying {len(names)} files of QEMU and of ours'
    shown = ', '.join(names[:4])
    more = f' and {len(names) - 4} more' if len(names) > 4 else ''
    return f'changed: {shown}{more}'


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--flavour', choices=FLAVOURS, required=True)
    parser.add_argument('--base', default=REFERENCE)
    parser.add_argument('--pristine', type=Path, required=True)
    parser.add_argument('--tree', type=Path, required=True)
    parser.add_argument('--check', action='store_true',
                        help='change nothing, fail if the tree is stale')
    parser.add_argument('--list', action='store_true',
                        help='print the files that do not come from QEMU')
    args = parser.parse_args()
    base = Base(args.base, args.pristine)

    with tempfile.TemporaryDirectory() as staging:
        try:
            wanted = contents(FLAVOURS[args.flavour], base,
                              Path(staging)).wanted
        except Failure as failure:
            print(f'error: {failure}', file=sys.stderr)
            return 1
        if args.list:
            print(*sorted(name for name, source in wanted.items()
                          if args.pristine not in source.parents), sep='\n')
            return 0
        names = differences(wanted, args.tree)
        if args.check:
            return 1 if names else 0
        if names:
            print(f'[source] {report(names, args.tree)}', file=sys.stderr)
        update(wanted, args.tree, names, args.pristine)
    return 0


if __name__ == '__main__':
    sys.exit(main())
