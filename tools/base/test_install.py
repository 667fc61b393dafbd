#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Install into a folder of its own, move that, and use what is there."""

import os
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import unittest
from typing import Dict, List, Set

import command
import nodes
from host import Host, HostError

INSTALL = Path(__file__).with_name('install.sh')
PROGRAMS = {'qemu-system-x86_64', 'qemu-img', 'qemu-io', 'qemu-nbd',
            'qemu-storage-daemon'}
HELPERS = {'qemu-bridge-helper', 'qemu-pr-helper'}
SECONDS = 120
SIZE = 1024 * 1024


OPTIONS, REST = command.parser(__doc__).parse_known_args()


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
        # the second time in the place of the first
        for _ in range(2):
            cls.run_in_homes(str(INSTALL), str(OPTIONS.build),
                             str(OPTIONS.tree), str(first))
            assert names(cls.top) == {'home', 'tmp', 'cwd', 'first'}
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
        self.assertEqual(names(self.prefix),
                         {'bin', 'lib', 'libexec', 'share', 'README'})
        self.assertEqual(names(self.prefix / 'bin'),
                         PROGRAMS | {'qmp', 'qemu-replication'})
        self.assertEqual(names(self.prefix / 'libexec'),
                         HELPERS | {'ocf-vm'})
        self.assertEqual(names(self.prefix / 'share'), {'qemu', 'systemd'})
        self.assertIn('en-us', names(share / 'keymaps'))
        links = [path for path in share.iterdir() if path.name != 'keymaps']
        # of each package one
        self.assertLessEqual({'bios-256k.bin', 'efi-e1000e.rom',
                              'kvmvapic.bin'}, {path.name for path in links})
        for link in links:
            self.assertTrue(link.is_symlink() and link.exists(), link)

    def test_keeper(self) -> None:
        """It finds what it needs, and leaves nothing behind."""
        before = sorted(self.prefix.rglob('*'))
        with tempfile.TemporaryDirectory(dir=self.top) as folder:
            config = Path(folder, 'vm1.toml')
            config.write_text(
                f'run = "{folder}/run"\nstate = "{folder}/state"\n'
                f'vm.name = "vm1"\nvm.arguments = []\n'
                f'vm.qemu = "{self.prefix}/bin/qemu-system-x86_64"\n'
                'host.east.address = "127.0.0.1"\n'
                'host.west.address = "127.0.0.2"\n'
                f'[[disk]]\nfile = "{folder}/disk"\nsize = "1M"\n',
                'utf-8')
            self.program('qemu-replication', 'check', str(config), '--host',
                         'east')
        self.assertIn('resource-agent', self.run_in_homes(
            str(self.prefix / 'libexec/ocf-vm'), 'meta-data'))
        self.assertEqual(sorted(self.prefix.rglob('*')), before)

    def test_files_of_others(self) -> None:
        """What somebody has put there is not removed by the next one."""
        with tempfile.TemporaryDirectory(dir=self.top) as folder:
            prefix = Path(folder, 'prefix')
            shutil.copytree(self.prefix, prefix, symlinks=True)
            command = [str(INSTALL), '--refuse', str(prefix)]
            self.run_in_homes(*command)
            (prefix / 'bin/disk.qcow2').touch()
            done = subprocess.run(command, check=False, text=True,
                                  timeout=SECONDS, capture_output=True)
        self.assertEqual(done.returncode, 1)
        self.assertIn('has other files, such as ./bin/disk.qcow2',
                      done.stderr)

    def test_failed(self) -> None:
        """What was there stays where it was."""
        with tempfile.TemporaryDirectory(dir=self.top) as folder:
            prefix, move = Path(folder, 'prefix'), Path(folder, 'mv')
            shutil.copytree(self.prefix, prefix, symlinks=True)
            # it cannot put what is new there
            move.write_text('#!/bin/sh\ncase $2 in */new) exit 1 ;; esac\n'
                            f'exec {shutil.which("mv")} "$@"\n', 'utf-8')
            move.chmod(0o755)
            done = subprocess.run(
                [INSTALL, OPTIONS.build, OPTIONS.tree, prefix], check=False,
                env={**self.env, 'PATH': f'{folder}:{os.environ["PATH"]}'},
                timeout=SECONDS, text=True, capture_output=True)
            self.assertEqual(done.returncode, 1)
            self.assertIn('nothing has changed', done.stderr)
            self.assertEqual(names(Path(folder)), {'prefix', 'mv'})
            self.assertEqual(names(prefix), names(self.prefix))

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
        with tempfile.TemporaryDirectory(dir=self.top) as folder, self.host(
                folder, 'installed', '-S') as host:
            host.add(nodes.primary(
                'node', {'driver': 'null-co', 'size': SIZE,
                         'read-zeroes': True}, **{'write-behind': 65536}))
            stats, = host.statistics()
            host.delete('node')
            host.end()
        self.assertEqual(stats['mode'], 'primary')

    def host(self, folder: str, name: str, *args: str) -> Host:
        """A QEMU of those installed."""
        return Host(self.prefix / 'bin', Path(folder), name, '-machine', 'q35',
                    '-accel', 'tcg', '-nodefaults', *args)

    def test_features(self) -> None:
        """What VMs of x86 are run with."""
        with tempfile.TemporaryDirectory(dir=self.top) as folder, self.host(
                folder, 'features', '-S', '-sandbox', 'on', '-vnc',
                f'unix:{folder}/vnc', '-netdev', 'user,id=net0', '-device',
                'virtio-net-pci,netdev=net0', '-object',
                'memory-backend-memfd,id=m0,size=1M,policy=default') as host:
            host.cmd('migrate-set-parameters',
                     {'multifd-compression': 'zstd'})
            host.end()
        devices = self.program('qemu-system-x86_64', '-device', 'help')
        for device in ('usb-redir', 'usb-host', 'vhost-vsock-pci',
                       'vhost-user-fs-pci', 'tpm-crb'):
            self.assertIn(f'"{device}"', devices)

    def test_tls(self) -> None:
        """On NBD and migration; who does not have the key is refused."""
        with tempfile.TemporaryDirectory(dir=self.top) as folder:
            for name in ('right', 'wrong'):
                Path(folder, name).mkdir()
                Path(folder, name, 'keys.psk').write_text(
                    f'qemu:{os.urandom(32).hex()}\n', 'utf-8')
            with Path(folder, 'disk').open('wb') as disk:
                disk.truncate(SIZE)
            self.assert_tls(folder)

    def assert_tls(self, folder: str) -> None:
        """From one QEMU to another."""
        def key(name: str, end: str) -> str:
            return (f'tls-creds-psk,id={name},dir={folder}/{name},'
                    f'endpoint={end}')

        with self.host(folder, 'east', '-object', key('right', 'client'),
                       '-object', key('wrong', 'client')) as east, \
             self.host(folder, 'west', '-object', key('right', 'server'),
                       '-incoming', 'defer', '-blockdev',
                       f'raw,node-name=disk0,file.driver=file,'
                       f'file.filename={folder}/disk') as west:
            socket = f'{folder}/nbd'
            west.cmd('nbd-server-start', {'tls-creds': 'right', 'addr': {
                'type': 'unix', 'data': {'path': socket}}})
            west.export('disk0')
            link = nodes.link('link', Path(socket), 'disk0')
            with self.assertRaises(HostError):
                east.add(link)
            with self.assertRaises(HostError):
                east.add({**link, 'tls-creds': 'wrong'})
            east.add({**link, 'tls-creds': 'right'})
            east.qemu_io('link', 'write -P 90 0 64k')
            east.delete('link')
            for host in (east, west):
                host.cmd('migrate-set-parameters', {
                    'tls-creds': 'right', 'tls-hostname': 'west'})
            uri = f'unix:{folder}/migration'
            west.cmd('migrate-incoming', uri=uri)
            east.cmd('migrate', uri=uri)
            east.wait_until(lambda: bool(
                east.cmd('query-migrate')['status'] == 'completed'),
                'the migration')
            for host in (east, west):
                host.end()
        self.assertEqual(Path(folder, 'disk').read_bytes(),
                         b'Z' * 65536 + bytes(SIZE - 65536))

    def test_refusal(self) -> None:
        """Only a folder that is empty, or that it has made, is changed."""
        other = self.top / 'other'
        other.mkdir()
        (other / 'file').touch()
        for target, why in ((str(other), 'has other files'),
                            (f'{other}/file', 'is not a folder')):
            result = subprocess.run(
                [INSTALL, '--refuse', os.path.realpath(target)], check=False,
                env=self.env, timeout=SECONDS, text=True, cwd=self.homes[2],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertNotEqual(result.returncode, 0)
            self.assertIn(why, result.stdout)
        self.assertEqual(names(other), {'file'})


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
