#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""A pair whose hosts know each other by certificates."""

import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Dict, List

import command
from guesthost import MIB, Disks
from qemu_replication import check
from qemu_replication.config import load
from sides import NAMES, Side, configuration, toml

SECONDS = 60.0
DISKS = Disks(1, MIB, 0)
WRONG = 2


OPTIONS, REST = command.parser(__doc__).parse_known_args()


def openssl(*words: str) -> None:
    """Make a file."""
    subprocess.run(['openssl', *words], check=True, timeout=SECONDS,
                   stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def new_key(*words: str) -> List[str]:
    """Part of making a certificate."""
    return ['req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256',
            '-nodes', *words]


class Authority:
    """Signs certificates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        openssl(*new_key('-x509', '-subj', '/CN=authority', '-keyout',
                         str(folder / 'ca-key.pem'), '-out',
                         str(folder / 'ca-cert.pem'), '-addext',
                         'keyUsage=critical,keyCertSign,cRLSign'))

    def furnish(self, folder: Path, address: str) -> None:
        """Make all that a host needs."""
        folder.mkdir(exist_ok=True)
        authority = self._folder / 'ca-cert.pem'
        (folder / 'ca-cert.pem').write_bytes(authority.read_bytes())
        for end in ('server', 'client'):
            request = folder / 'request'
            openssl(*new_key('-subj', f'/CN={folder.name}', '-keyout',
                             str(folder / f'{end}-key.pem'), '-out',
                             str(request)))
            (folder / 'more').write_text(
                f'extendedKeyUsage={end}Auth\nbasicConstraints=CA:FALSE\n'
                'keyUsage=critical,digitalSignature,keyAgreement\n'
                'authorityKeyIdentifier=keyid\n'
                f'subjectAltName=IP:{address}\n', 'utf-8')
            openssl('x509', '-req', '-in', str(request), '-CA',
                    str(authority), '-CAkey',
                    str(self._folder / 'ca-key.pem'), '-CAcreateserial',
                    '-extfile', str(folder / 'more'), '-out',
                    str(folder / f'{end}-cert.pem'))


class TlsTest(unittest.TestCase):
    """Two keepers, and a VM without a guest."""
    sides: Dict[str, Side]

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory(prefix='ha-')
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        config = configuration(OPTIONS.build, self.folder, DISKS)
        config['vm']['arguments'] = [
            '-nodefaults', '-machine', 'pc,accel=tcg', '-m', '64']
        config['tls'] = {'kind': 'x509', 'dir': f'{self.folder}/{{host}}/tls'}
        config['network'] = {'device': 'e1000,romfile=',
                             'netdev': 'user,restrict=on'}
        self.path = self.folder / 'vm1.toml'
        self.path.write_text(toml(config), 'utf-8')
        self.addresses = {name: host['address']
                          for name, host in config['host'].items()}
        self.authority = Authority(self.folder / 'authority')
        self.sides = {}
        for name in NAMES:
            self.sides[name] = Side(self.path, self.folder, name)
            self.addCleanup(self.sides[name].close)
            self.authority.furnish(self.tls(name), self.addresses[name])

    def tls(self, name: str) -> Path:
        """A host's certificates."""
        return self.folder / name / 'tls'

    def begin(self) -> List[Side]:
        """Start the keepers, and the VM on east."""
        for side in self.sides.values():
            side.start()
        east, west = self.sides.values()
        with open(east.folder / 'disk0.raw', 'wb') as image:
            image.truncate(DISKS.size)
        east.order('protect', '--no-wait')
        west.order('standby')
        return [east, west]

    def test_pair(self) -> None:
        """Each side is lost once, and comes back."""
        east, west = self.begin()
        east.order('protect')
        dead = west.signal(signal.SIGKILL)
        west.wait(lambda: west.stands_by_again(dead), 'another QEMU')
        east.wait_for('protected')
        east.signal(signal.SIGKILL)
        east.wait_for('down')
        west.order('failover')
        west.order('protect')
        self.assertEqual(east.run('status').returncode, 0)

    def test_other_authority(self) -> None:
        """The other host's is not believed."""
        Authority(self.folder / 'other').furnish(self.tls('west'),
                                                 self.addresses['west'])
        east, _ = self.begin()
        east.wait(lambda: 'CERTIFICATE_VERIFY_FAILED' in str(
            (east.status() or {})['problem']), 'a problem')
        self.assertEqual(east.state, 'alone')

    def problem(self) -> str:
        """The only one of east, where nothing is started."""
        found = list(check.problems(load(self.path, 'east')))
        self.assertEqual(len(found), 1, found)
        for word in 'check', 'keeper':
            self.assertIn(found[0],
                          self.sides['east'].order(word, status=WRONG))
        return found[0]

    def test_missing(self) -> None:
        """A file is not there."""
        (self.tls('east') / 'client-key.pem').unlink()
        self.assertIn('client-key.pem: no such file', self.problem())

    def test_readable(self) -> None:
        """A key is no secret."""
        (self.tls('east') / 'server-key.pem').chmod(0o644)
        self.assertIn('others may read it', self.problem())

    def test_wrong_authority(self) -> None:
        """Another authority has signed it."""
        other = self.folder / 'more'
        Authority(self.folder / 'other').furnish(other,
                                                 self.addresses['east'])
        for part in ('cert', 'key'):
            os.replace(other / f'client-{part}.pem',
                       self.tls('east') / f'client-{part}.pem')
        self.assertIn('client-cert.pem: unable to get local issuer',
                      self.problem())

    def test_wrong_address(self) -> None:
        """It is of another host."""
        self.authority.furnish(self.tls('east'), self.addresses['west'])
        self.assertIn('server-cert.pem: IP address mismatch', self.problem())

    def test_wrong_key(self) -> None:
        """It is of another certificate."""
        os.replace(self.tls('east') / 'client-key.pem',
                   self.tls('east') / 'server-key.pem')
        os.link(self.tls('east') / 'server-key.pem',
                self.tls('east') / 'client-key.pem')
        self.assertIn('mismatch', self.problem())


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
