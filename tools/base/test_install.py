#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Install into a folder of its own, move that, and use what is there."""

import argparse
import os
from pathlib import Path
import subprocess
import sys
import tempfile
import unittest
from typing import Dict, List, Set

import nodes
from host import Host

INSTALL = Path(__file__).with_name('install.sh')
PROGRAMS = {'qemu-system-x86_64', 'qemu-img', 'qemu-io', 'qemu-nbd',
            'qemu-storage-daemon'}
HELPERS = {'qemu-bridge-helper', 'qemu-pr-helper'}
SECONDS = 120
SIZE = 1024 * 1024


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build', type=Path, required=True)
    parser.add_argument('--tree', type=Path, required=True)
    return parser.parse_args()


OPTIONS = parse()


def names(folder: Path) -> Set[str]:
    """What is in a folder."""
    return {path.name for path in folder.iterdir()}


class InstallTest(unittest.TestCase):
    """One installation; the tests do not change it."""
    top: Path
    prefix: Path
    homes: List[Path]
    env: Dict[str, str]

    @classmethod
    def setUpClass(cls) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(holder.cleanup)
        cls.top = Path(holder.name)
        # whoever wants to leave something finds these empty
        cls.homes = [cls.top / name for name in ('home', 'tmp', 'cwd')]
        for folder in cls.homes:
            folder.mkdir()
        cls.env = dict(os.environ, HOME=str(cls.homes[0]),
                       TMPDIR=str(cls.homes[1]))
        first = cls.top / 'first'
        cls.run_in_homes(str(INSTALL), str(OPTIONS.build), str(OPTIONS.tree),
                         str(first))
        cls.prefix = first.rename(cls.top / 'moved')

    @classmethod
    def tearDownClass(cls) -> None:
        """After all that, nothing is anywhere else."""
        left = [str(path) for folder in cls.homes
                for path in folder.iterdir()]
        assert not left, left

    @classmethod
    def run_in_homes(cls, *command: str) -> str:
        """Run a command to its end; return what it says."""
        return subprocess.run(command, cwd=cls.homes[2],
                              env=cls.env, timeout=SECONDS, check=True,
                              stdout=subprocess.PIPE, text=True).stdout

    def program(self, name: str, *words: str) -> str:
        """Run a program of those installed."""
        return self.run_in_homes(str(self.prefix / 'bin' / name), *words)

    def test_contents(self) -> None:
        """Programs, helpers, keymaps and links to firmware; nothing else."""
        share = self.prefix / 'share/qemu'
        self.assertEqual(names(self.prefix), {'bin', 'libexec', 'share'})
        self.assertEqual(names(self.prefix / 'bin'), PROGRAMS)
        self.assertEqual(names(self.prefix / 'libexec'), HELPERS)
        self.assertEqual(names(self.prefix / 'share'), {'qemu'})
        self.assertIn('en-us', names(share / 'keymaps'))
        links = [path for path in share.iterdir() if path.name != 'keymaps']
        # of each package one
        self.assertLessEqual({'bios-256k.bin', 'efi-e1000e.rom',
                              'kvmvapic.bin'}, {path.name for path in links})
        for link in links:
            self.assertTrue(link.is_symlink() and link.exists(), link)

    def test_versions(self) -> None:
        """Each program says that it is the one that was built."""
        version = (OPTIONS.tree / 'VERSION').read_text('utf-8').strip()
        for name in sorted(PROGRAMS):
            said = self.program(name, '--version').splitlines()[0]
            self.assertIn(f' {version}', said)

    def test_tools(self) -> None:
        """What qemu-io writes to an image, qemu-img finds in it."""
        with tempfile.TemporaryDirectory() as folder:
            image, raw = f'{folder}/image.qcow2', f'{folder}/image.raw'
            self.program('qemu-img', 'create', '-q', '-f', 'qcow2', image,
                         str(SIZE))
            self.program('qemu-io', '-f', 'qcow2', '-c', 'write -P 90 64k 4k',
                         image)
            self.program('qemu-img', 'convert', '-O', 'raw', image, raw)
            data = Path(raw).read_bytes()
        self.assertEqual(data, bytes(65536) + b'Z' * 4096
                         + bytes(SIZE - 65536 - 4096))

    def test_replication(self) -> None:
        """QEMU has this driver, not the one that it came with."""
        with tempfile.TemporaryDirectory(dir=self.top) as folder, Host(
                self.prefix / 'bin', Path(folder), 'installed', '-machine',
                'q35', '-accel', 'tcg', '-nodefaults', '-S') as host:
            host.add(nodes.primary(
                'node', {'driver': 'null-co', 'size': SIZE,
                         'read-zeroes': True}, **{'write-behind': 65536}))
            stats, = host.statistics()
            host.delete('node')
            host.end()
        self.assertEqual(stats['mode'], 'primary')

    def test_refusal(self) -> None:
        """A folder with programs of a package is left alone."""
        fake = self.top / 'fake'
        fake.mkdir()
        query = fake / 'dpkg-query'
        query.write_text('#!/bin/sh\necho "qemu-utils: $2"\n', 'utf-8')
        query.chmod(0o755)
        env = dict(self.env, PATH=f'{fake}:{os.environ["PATH"]}')
        target = self.top / 'packaged'
        result = subprocess.run(
            [INSTALL, OPTIONS.build, OPTIONS.tree, target], env=env,
            timeout=SECONDS, check=False, text=True, cwd=self.homes[2],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.assertNotEqual(result.returncode, 0)
        self.assertIn('is a file of package qemu-utils', result.stdout)
        self.assertFalse(target.exists())


if __name__ == '__main__':
    unittest.main(argv=sys.argv[:1], verbosity=2)
