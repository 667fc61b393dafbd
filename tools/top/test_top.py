#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that the watcher shows what two QEMUs have done."""

import os
import pty
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
import unittest
from itertools import accumulate
from pathlib import Path
from typing import Any, List, Tuple

import command
import nodes
from figures import (DOUBTFUL, PROTECTED, UNPROTECTED, NodeFigures, Rate,
                     Watched, verdict)
from host import NO_GUEST, Host
from view import COLUMNS, View, duration, size, sparkline

TOP = Path(__file__).resolve().parent / 'top.py'
WAIT_SECONDS = 60.0
MIB = 1024 * 1024
DISK_MIB = 64
# Writes to the last MiB of the link fail.
FULL_SECTOR = (DISK_MIB - 1) * MIB // 512


OPTIONS, REST = command.parser(__doc__).parse_known_args()


class FiguresTest(unittest.TestCase):
    """What follows from figures, without a QEMU."""

    def test_rate(self) -> None:
        """Taken over the last seconds, and anew when a count falls."""
        rate = Rate()
        self.assertIsNone(rate.per_second)
        for second in range(10):
            rate.take(second, second * 100)
            if second:
                self.assertEqual(rate.per_second, 100)
        for second in range(10, 20):
            rate.take(second, 900)
        self.assertEqual(rate.per_second, 0)
        rate.take(20, 5)
        self.assertIsNone(rate.per_second)
        rate.take(20.5, 15)
        self.assertEqual(rate.per_second, 20)

    def test_time_left(self) -> None:
        """A quarter has taken two seconds."""
        node = NodeFigures('n')
        node.take(0, {'mode': 'secondary', 'stage': 'failover',
                      'checkpoints': 0, 'copied-bytes': 0,
                      'failover': {'done': 25, 'total': 100,
                                   'elapsed-ns': 2 * 10**9}})
        progress = node.failover
        assert progress is not None
        self.assertEqual(progress.part, 0.25)
        self.assertEqual(progress.seconds_left, 6)

    def test_pauses(self) -> None:
        """From each STOP to its RESUME."""
        side = Watched(Path('/x/host/qmp'))
        for micros, name in ((0, 'RESUME'), (1000, 'STOP'), (4000, 'RESUME'),
                             (6000, 'STOP'), (7000, 'RESUME')):
            self.assertIsNone(side.take_event({
                'event': name,
                'timestamp': {'seconds': 5, 'microseconds': micros}}))
        self.assertEqual([round(p * 1000) for p in side.pauses], [3, 1])
        self.assertEqual(side.pause_count, 2)
        self.assertAlmostEqual(side.longest_pause, 0.003, places=4)

    @staticmethod
    def side(name: str, **stats: Any) -> Watched:
        """Return one with a node of these statistics."""
        side = Watched(Path(f'/x/{name}'))
        side.connected(name)
        node = {'driver': 'replication', 'mode': 'secondary', 'checkpoints': 0,
                'copied-bytes': 0, 'stage': 'running', **stats}
        side.take_nodes(0, [{'node-name': 'n', 'driver-specific': node}])
        return side

    def test_verdict(self) -> None:
        """Protected, if all that is known says so."""
        good = {'protects': True, 'checkpoint-age-ns': 12 * 10**8}
        bad = {'protects': False, 'unprotected': {'text': 'it is over'}}
        west = self.side('west', **good)
        last = 'PROTECTED, last checkpoint 1.2 s ago'
        self.assertEqual(verdict([west], 60), (PROTECTED, last))
        self.assertEqual(verdict([west], 1), (DOUBTFUL, last))
        self.assertEqual(
            verdict([west, self.side('east', **bad)], 60),
            (UNPROTECTED, 'NOT PROTECTED, because of n on east: it is over'))
        dead = self.side('east', **good)
        dead.lost('it is gone', time.time())
        status, text = verdict([west, dead], 60)
        self.assertEqual(status, UNPROTECTED)
        self.assertRegex(text, '^NOT PROTECTED since [0-9:]+, because east '
                         'does not answer: it is gone$')
        dead.connected('east')
        dead.lost('it hangs', time.time(), hangs=True)
        self.assertEqual(verdict([west, dead], 60), (
            DOUBTFUL, f'{last}, but east does not answer: it hangs'))
        self.assertEqual(verdict([dead], 60), (
            DOUBTFUL, 'IN DOUBT, because east does not answer: it hangs'))
        self.assertEqual(verdict([], 60)[0], UNPROTECTED)
        # one that was promoted stays below the next primary's node
        both = self.side('west', **good, **{'top-node': 'top'})
        both.nodes['done'] = self.side(
            'west', **bad, **{'top-node': 'top'}).nodes['n']
        self.assertEqual(verdict([both], 60), (PROTECTED, last))

    def test_texts(self) -> None:
        """Three digits are enough, and fit."""
        self.assertEqual([size(n) for n in (0, 1023, 1024, 1536, 10**9)],
                         ['0 B', '1023 B', '1 KiB', '1.5 KiB', '954 MiB'])
        self.assertEqual([duration(s) for s in (0.0031, 0.25, 2.5, 61, 3700)],
                         ['3.1 ms', '250 ms', '2.5 s', '61 s', '1:01:40'])
        self.assertEqual(sparkline([1, 2, 4], 2, '0123'), '23')


class TopTest(unittest.TestCase):
    """The watcher as it is called."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        folder = tempfile.TemporaryDirectory(prefix='top-')
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def host(self, name: str, *args: str) -> Host:
        """Start a QEMU with a socket to watch; it ends with the test."""
        host = Host(
            OPTIONS.build, self.folder, name, *NO_GUEST, '-name', name,
            '-chardev', f'socket,id=top,path={self.folder}/{name}.top,'
            'server=on,wait=off',
            '-mon', 'chardev=top,mode=control', *args)
        self.addCleanup(host.kill)
        host.launch()
        return host

    def top(self, host: Host) -> Path:
        """Where it is watched."""
        return self.folder / f'{host.name}.top'

    def primary(self) -> Host:
        """A node that forwards to nowhere, and can be made to wait."""
        return self.host(
            'east', '-drive', 'if=none,id=guest,node-name=forward0,'
            'driver=replication,mode=primary,file.driver=raw,'
            'file.file.driver=blkdebug,file.file.image.driver=null-co,'
            f'file.file.image.size={DISK_MIB}M,'
            'file.file.inject-error.0.event=none,'
            'file.file.inject-error.0.iotype=write,'
            'file.file.inject-error.0.errno=28,'
            f'file.file.inject-error.0.sector={FULL_SECTOR}')

    def secondary(self) -> Host:
        """A node over two overlays and a disk."""
        disk = self.folder / 'disk.raw'
        with disk.open('wb') as file:
            file.truncate(DISK_MIB * MIB)
        for name in ('hidden', 'active'):
            nodes.create(OPTIONS.build, self.folder / f'{name}.qcow2',
                         DISK_MIB * MIB)
        return self.host(
            'west', '-drive', 'if=none,id=disk0,node-name=disk,driver=raw,'
            f'file.driver=file,file.filename={disk}',
            '-drive', 'if=none,id=guest,node-name=replication0,'
            'driver=replication,mode=secondary,top-id=guest,'
            'file.driver=qcow2,file.backing.driver=qcow2,'
            f'file.file.filename={self.folder}/active.qcow2,'
            f'file.backing.file.filename={self.folder}/hidden.qcow2,'
            'file.backing.backing=disk')

    @staticmethod
    def command(*arguments: Any) -> List[str]:
        """Return the command for a watcher."""
        return [sys.executable, str(TOP), *map(str, arguments)]

    def snapshot(self, *arguments: Any, width: int = 80
                 ) -> 'subprocess.CompletedProcess[str]':
        """Run the watcher once."""
        return subprocess.run(
            self.command('--once', *arguments), text=True, check=False,
            capture_output=True, timeout=WAIT_SECONDS,
            env={**os.environ, 'COLUMNS': str(width)})

    def once(self, *sockets: Path, width: int = 80,
             status: int = UNPROTECTED) -> List[str]:
        """Return the lines of a snapshot."""
        done = self.snapshot('--interval', '0.1', *sockets, width=width)
        self.assertEqual(done.returncode, status, done.stderr)
        self.assertNotIn('\033', done.stdout)
        return done.stdout.splitlines()

    def row(self, lines: List[str], node: str) -> Tuple[str, ...]:
        """Return the cells of a node's row."""
        rows = [line for line in lines if line.startswith(f'  {node} ')]
        self.assertEqual(len(rows), 1, lines)
        ends = [*accumulate(COLUMNS), len(rows[0])]
        return tuple(rows[0][begin:end].strip()
                     for begin, end in zip([0, *ends], ends))

    def test_primary(self) -> None:
        """Behind, caught up, checkpointed, failed."""
        host = self.primary()
        lines = self.once(self.top(host))
        self.assertRegex(lines[0], '^NOT PROTECTED since [0-9:]+, because of '
                         'forward0 on east: it is not running$')
        self.assertRegex(lines[2], '^east  prelaunch .*east.top$')
        self.assertEqual(self.row(lines, 'forward0'),
                         ('forward0', 'none', 'nothing', '0 B/s 0/s', '0'))

        host.qemu_io('guest', 'break write_aio A')
        host.qemu_io('guest', 'write 0 1M')
        _, _, behind, _, _ = self.row(self.once(self.top(host)), 'forward0')
        self.assertRegex(behind, r'^1 MiB, [\d.]+ m?s$')
        host.qemu_io('guest', 'resume A')

        host.cmd('xen-set-replication', enable=True, primary=True)
        for _ in range(2):
            host.cmd('xen-colo-do-checkpoint')
        lines = self.once(self.top(host), status=PROTECTED)
        self.assertRegex(lines[0],
                         r'^PROTECTED, last checkpoint [\d.]+ s ago$')
        name, stage, behind, _, took = self.row(lines, 'forward0')
        self.assertEqual([name, stage, behind],
                         ['forward0', 'running', 'nothing'])
        self.assertRegex(took, r'^2 [\d.]+/[\d.]+ ms$')
        wide = self.once(self.top(host), width=120, status=PROTECTED)
        self.assertIn('    1 MiB in 1 requests forwarded, 0 B superseded, at '
                      'most 1 MiB behind', wide)

        host.qemu_io('guest', f'write {DISK_MIB - 1}M 512')
        self.assertTrue(host.attempt('xen-colo-do-checkpoint'))
        lines = self.once(self.top(host))
        self.assertRegex(' '.join(lines[:4]), 'NOT PROTECTED since .*: a '
                         'request could not be forwarded: No space left on '
                         'device')
        done = self.snapshot('--check', self.top(host))
        self.assertEqual(done.returncode, UNPROTECTED)
        self.assertEqual(done.stdout.splitlines(),
                         [' '.join(lines[:lines.index('')])])
        self.assertIn('    1 failed: the secondary is out of date', lines)
        self.assertTrue(any(re.fullmatch(
            r'    \d\d:\d\d:\d\d forward: No space left on device', line)
            for line in lines), lines)
        self.assertRegex(self.row(lines, 'forward0')[-1],
                         r'^2 \+1 failed [\d.]+/[\d.]+ ms$')

    def test_both(self) -> None:
        """A pair: each side with its node, and no line too long."""
        east, west = self.primary(), self.secondary()
        west.cmd('xen-set-replication', enable=True, primary=False)
        west.qemu_io('guest', 'write 1M 192k')
        west.qemu_io('disk0', 'write 8M 1')
        for width in (80, 120):
            lines = self.once(self.top(east), self.top(west), width=width)
            self.assertIn('forward0 on east: it is not running', lines[0])
            self.assertLessEqual(max(map(len, lines)), width, lines)
            self.assertEqual(
                self.row(lines, 'replication0'),
                ('replication0', 'running', '192 KiB, 64 KiB', '0 B/s', '0'))
            self.row(lines, 'forward0')

        west.cmd('xen-set-replication', enable=False, primary=False,
                 failover=True)
        west.wait_until(lambda: self.row(self.once(
            self.top(west)), 'replication0')[1] == 'done', 'the merge')
        lines = self.once(self.top(west))
        self.assertTrue(any(re.fullmatch(
            r'    failed over in [\d.]+ m?s, 256 KiB merged', line)
            for line in lines), lines)
        # that it ended as it should is no error, and no protection
        self.assertNotIn('cut-off', ' '.join(lines))
        self.assertIn('this host has the only copy', ' '.join(lines))

    def test_nobody_there(self) -> None:
        """The side that answers is shown."""
        host = self.primary()
        host.cmd('xen-set-replication', enable=True, primary=True)
        lines = self.once(self.top(host), self.folder / 'none')
        self.assertEqual(lines[0], 'NOT PROTECTED, because none does not '
                         'answer: no QEMU at this socket')
        self.assertEqual(self.row(lines, 'forward0')[1], 'running')

    def test_other_client(self) -> None:
        """Whoever watches already is no reason for an alarm."""
        host = self.primary()
        host.cmd('xen-set-replication', enable=True, primary=True)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.top(host)))
            # it is the one client from now on
            self.assertTrue(client.recv(1))
            lines = self.once(self.top(host), status=DOUBTFUL)
        self.assertEqual(' '.join(lines[:lines.index('')]),
                         'IN DOUBT, because east.top does not answer: it '
                         'hangs, or the socket has another client')

    def test_live(self) -> None:
        """It goes on when QEMU dies, and finds the next one."""
        host = self.primary()
        terminal, other = pty.openpty()
        self.addCleanup(os.close, terminal)
        # pylint: disable=consider-using-with
        top = subprocess.Popen(
            self.command('--interval', '0.1', self.top(host)),
            stdin=other, stdout=other, stderr=other,
            env={**os.environ, 'COLUMNS': '80', 'LINES': '24',
                 'PYTHONIOENCODING': 'utf-8'})
        os.close(other)
        self.addCleanup(top.wait)
        self.addCleanup(top.kill)

        self.read_until(terminal, 'forward0')
        host.cmd('xen-set-replication', enable=True, primary=True)
        self.read_until(terminal, 'REPLICATION_STAGE_CHANGE forward0 running')
        host.kill()
        self.read_until(terminal, 'gone since')
        self.read_until(terminal, 'no QEMU at this socket')
        host.launch()
        self.read_until(terminal, 'prelaunch')
        os.write(terminal, b'q')
        self.read_until(terminal, '\033[?1049l')
        self.assertEqual(top.wait(WAIT_SECONDS), 0)

    def read_until(self, terminal: int, text: str) -> None:
        """Read what is shown until a text is among it."""
        deadline = time.monotonic() + WAIT_SECONDS
        shown = ''
        while text not in re.sub(r'\033\[[\d;]*m', '', shown):
            ready, _, _ = select.select([terminal], [], [],
                                        max(deadline - time.monotonic(), 0))
            self.assertTrue(ready, f'no {text!r} in {shown[-2000:]!r}')
            shown += os.read(terminal, 65536).decode(errors='replace')


class ViewTest(unittest.TestCase):
    """What a person sees."""

    def test_replica(self) -> None:
        """What a primary with both disks has of the other one."""
        side = FiguresTest.side('east', **{
            'mode': 'primary', 'stage': 'none', 'protects': False,
            'unprotected': {'text': 'its replica was lost: Broken pipe'},
            'replica-state': 'lost', 'out-of-sync-bytes': 3 * MIB,
            'copied-bytes': 64 * MIB, 'failed-checkpoints': 0,
            'forwarded-requests': 0, 'forwarded-bytes': 0,
            'pending-requests': 0,
            'replica-lost': {'text': 'Broken pipe',
                             'time-ns': time.time_ns()}})
        lines = [line.show(80, False)
                 for line in View(80, 60).lines([side], [])]
        self.assertRegex('\n'.join(lines), r'(?m)^    replica lost, 3 MiB out '
                         r'of sync, 64 MiB copied, lost [0-9:]+: Broken pipe$')

    def test_bar(self) -> None:
        """The sync, half done, at a known speed."""
        side = Watched(Path('/x/host/qmp'))
        side.connected('host')
        for when, done in ((0, 0), (1, 25 * MIB), (2, 50 * MIB)):
            side.take_jobs(when, [{'device': 'sync0', 'type': 'mirror',
                                   'offset': done, 'len': 100 * MIB}])
        lines = [line.show(80, False) for line in View(80, 60).side(side)]
        self.assertIn('  sync sync0   [##########..........]  50 %  50 MiB of '
                      '100 MiB, 2 s left', lines)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
