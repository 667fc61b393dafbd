# SPDX-License-Identifier: GPL-2.0-or-later
"""The demo's guest: a Debian cloud kernel and a small initramfs of ours.

Both are built once into the cache.  The kernel comes from Debian's package,
which is unpacked and not installed.  The initramfs holds the kernel modules
that the guest needs, busybox, Debian's sqlite3 and mkfs.ext4 from this host,
and the worker (guest/worker.c).
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, List

HERE = Path(__file__).resolve().parent
FETCH_DEBS = HERE.parent / 'base' / 'fetch-debs.sh'
KERNEL_PACKAGE = 'linux-image-cloud-amd64'
MODULES = ('virtio_pci', 'virtio_blk', 'crc32c_generic', 'ext4',
           'pvpanic-pci')
# Of a guest that is to have a network card
NETWORK_MODULES = ('virtio_net',)
PROGRAMS = ('/usr/bin/sqlite3', '/sbin/mke2fs')
USER_PACKAGES = ('busybox-static', 'sqlite3', 'e2fsprogs', 'libc6',
                 'libsqlite3-0')
# By the end of a module's name
UNPACK = {'.xz': 'xz', '.gz': 'gzip', '.zst': 'zstd'}
FETCH_SECONDS = 300
TOOL_SECONDS = 120

# Administrators' tools, which a user's PATH may lack.
os.environ['PATH'] += ':/usr/sbin:/sbin'


class GuestError(Exception):
    """The guest could not be built; the message says what to do."""


@dataclass
class Guest:
    """What QEMU boots."""
    kernel: Path
    initramfs: Path
    version: str


def run_tool(args: List[str], timeout: int = TOOL_SECONDS) -> str:
    """Run a tool of the host and return what it prints."""
    try:
        done = subprocess.run(args, timeout=timeout, check=True, text=True,
                              stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except FileNotFoundError as exc:
        raise GuestError(f'{args[0]} is not installed '
                         f'(see {HERE / "packages"})') from exc
    except subprocess.TimeoutExpired as exc:
        raise GuestError(f'{args[0]} took more than {timeout} s') from exc
    except subprocess.CalledProcessError as exc:
        raise GuestError(f'{" ".join(args)} failed:\n{exc.stderr}') from exc
    return done.stdout


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Let build fill a new folder and give it the name target when whole."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent,
                                         prefix='.new-') as work:
            fresh = Path(work) / 'fresh'
            fresh.mkdir()
            build(fresh)
            try:
                fresh.rename(target)
            except OSError:
                # Another run was first: its result is as good.
                if not target.exists():
                    raise
    return target


def unpack_kernel(cache: Path) -> Callable[[Path], None]:
    """Return what fetches the kernel package and unpacks it to a folder."""
    def build(folder: Path) -> None:
        debs = [Path(line) for line in
                run_tool(['bash', str(FETCH_DEBS), '--depends', str(cache),
                          KERNEL_PACKAGE], FETCH_SECONDS).splitlines()]
        images = [deb for deb in debs if deb.name.startswith('linux-image-')]
        if len(images) != 1:
            raise GuestError(f'{KERNEL_PACKAGE} should lead to one kernel '
                             f'package, not to {[d.name for d in debs]}')
        run_tool(['dpkg-deb', '-x', str(images[0]), str(folder)])
        # Debian 13 ships /usr/lib/modules only; depmod looks below /lib.
        if not (folder / 'lib').exists():
            (folder / 'lib').symlink_to('usr/lib')
        run_tool(['depmod', '-b', str(folder), kernel_version(folder)])
    return build


def kernel_version(folder: Path) -> str:
    """Return the version of the kernel unpacked in folder."""
    found = [path.name for path in (folder / 'lib/modules').iterdir()]
    if len(found) != 1:
        raise GuestError(f'{folder} should hold one kernel, not {found}')
    return found[0]


def modules(kernel: Path, names: Iterable[str]) -> List[Path]:
    """Return the files of some modules, each after those it depends on.

    Those that are built into the kernel, or that it does not know, are left
    out.
    """
    shown = subprocess.run(
        ['modprobe', '-d', str(kernel), '-S', kernel_version(kernel), '-a',
         '-q', '--ignore-install', '--show-depends', *names], check=False,
        stdout=subprocess.PIPE, text=True, timeout=TOOL_SECONDS).stdout
    paths = re.findall(r'^insmod (\S+)', shown, re.MULTILINE)
    return [Path(path) for path in dict.fromkeys(paths)]


def unpacked(module: Path) -> bytes:
    """Return a module as insmod takes it: not compressed."""
    tool = UNPACK.get(module.suffix)
    if tool is None:
        return module.read_bytes()
    return subprocess.run([tool, '-dcq', str(module)], check=True,
                          stdout=subprocess.PIPE,
                          timeout=TOOL_SECONDS).stdout


def libraries(program: str) -> List[str]:
    """Return the shared libraries of a program of this host."""
    return re.findall(r'(/\S+) \(0x', run_tool(['ldd', program]))


def copy_into(root: Path, path: str) -> None:
    """Copy a file of this host to the same place below root."""
    target = root / path.lstrip('/')
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(os.path.realpath(path), target)


def fill_root(root: Path, kernel: Path) -> None:
    """Lay out the guest's root file system."""
    copy_into(root, '/bin/busybox')
    for program in PROGRAMS:
        for path in [program, *libraries(program)]:
            copy_into(root, path)
    (root / 'sbin/mkfs.ext4').symlink_to('mke2fs')
    if os.path.exists('/etc/mke2fs.conf'):
        copy_into(root, '/etc/mke2fs.conf')

    shutil.copy(HERE / 'guest/init', root / 'init')
    (root / 'init').chmod(0o755)
    run_tool(['gcc', '-O2', '-Wall', '-static', '-o', str(root / 'bin/worker'),
              str(HERE / 'guest/worker.c'), '-lz'])

    (root / 'modules').mkdir()
    for name, wanted in (('order', MODULES), ('network', NETWORK_MODULES)):
        order = []
        for module in modules(kernel, wanted):
            target = root / 'modules' / f"{module.name.split('.')[0]}.ko"
            if not target.exists():
                target.write_bytes(unpacked(module))
                order.append(target.name)
        (root / 'modules' / name).write_text('\n'.join([*order, '']))


def pack(root: Path, archive: Path) -> None:
    """Pack root as an initramfs.

    Not compressed: without KVM unpacking costs more than reading.
    """
    names = sorted(str(path.relative_to(root)) for path in root.rglob('*'))
    with archive.open('wb') as out:
        subprocess.run(['cpio', '-o', '-H', 'newc', '-R', '0:0', '--quiet'],
                       input='\n'.join(names).encode(), stdout=out, cwd=root,
                       check=True, timeout=TOOL_SECONDS)


def initramfs_key(kernel: Path) -> str:
    """Return a digest of all that the initramfs is made from."""
    digest = hashlib.sha256(kernel_version(kernel).encode())
    for path in ('guest.py', 'guest/init', 'guest/worker.c'):
        digest.update((HERE / path).read_bytes())
    digest.update(run_tool(['dpkg-query', '-W', *USER_PACKAGES]).encode())
    return digest.hexdigest()[:16]


def debian_release() -> str:
    """Return this host's release: the kernel is taken from it."""
    text = Path('/etc/os-release').read_text()
    found = re.search(r'^VERSION_CODENAME=(\w+)', text, re.MULTILINE)
    return found[1] if found else 'unknown'


def get_guest(cache: Path, tell: Callable[[str], None]) -> Guest:
    """Return the guest, built now if the cache does not hold it, or exit."""
    try:
        return find_guest(cache, tell)
    except GuestError as exc:
        sys.exit(f'error: {exc}')


def find_guest(cache: Path, tell: Callable[[str], None]) -> Guest:
    """Return the guest; if that cannot be built, say why."""
    base = cache / 'guest'
    folder = base / f'kernel-{debian_release()}'
    if not folder.exists():
        tell(f'getting {KERNEL_PACKAGE} (once; unpacked, not installed)')
    kernel = build_once(folder, unpack_kernel(cache))

    def build(target: Path) -> None:
        root = target / 'root'
        root.mkdir()
        fill_root(root, kernel)
        pack(root, target / 'initramfs')
        shutil.rmtree(root)

    made = build_once(base / f'initramfs-{initramfs_key(kernel)}', build)
    version = kernel_version(kernel)
    return Guest(kernel=kernel / 'boot' / f'vmlinuz-{version}',
                 initramfs=made / 'initramfs', version=version)
