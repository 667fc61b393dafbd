#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that ./run answers at once: before packages, a download or a build."""

import os
import re
import signal
import subprocess
import tempfile
import time
import unittest
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60.0
WRONG = 2

# Each is wrong, and has a part of what is said about it.
MISTAKES = (
    ('nosuch', 'no command is called nosuch'),
    ('demo.kill', 'no command is called demo.kill'),
    ('build --nosuch', 'build has no option --nosuch'),
    ('build --stock --sanitize', 'one of --stock, --sanitize'),
    ('build --stock=yes', '--stock takes no value'),
    ('build now', 'build takes no now'),
    ('build --base', '--base wants a value'),
    ('build --base=', "there is no base ''"),
    ('build --base=x', "there is no base 'x'"),
    ('demo --disks 9', "from 1 to 8, not '9'"),
    ('demo --disks=1.5', "not '1.5'"),
    ('demo --seconds -1', "from 1 to 3600, not '-1'"),
    ('demo --kill=both', "one of primary, secondary, not 'both'"),
    ('demo --picture /proc/x/y', 'cannot write to /proc'),
    ('demo --picture /tmp', '/tmp is a folder'),
    ('demo --cache /tmp', 'demo has no option --cache'),
    ('top --once --interval 0', "from 0.05 to 60, not '0'"),
    ('top', 'no terminal'),
    ('check unti', 'no suite is called unti; there are: unit'),
    ('check --seed 1e3', "not '1e3'"),
    ('check --series quorums', 'no series is called quorums'),
    ('soak', 'soak wants --minutes'),
    ('bench --only primary no', "not 'no'"),
    ('series', 'one of -o DIR'),
    ('series -o /proc/x', '--output /proc/x: cannot write to /proc'),
    ('apply', 'apply wants one DIR'),
    ('apply /tmp', '/tmp is not a QEMU source tree'),
    ('install', 'install wants --prefix DIR'),
    ('install --prefix=', 'wants a DIR'),
    ('install --prefix /', '/ has other files'),
    ('install --prefix=/usr', "/usr belongs to Debian's packages"),
    ('install --prefix /bin', "/usr/bin belongs to Debian's packages"),
    ('install --prefix /usr/share/../local', '/usr/local '),
    ('fetch', 'fetch wants PACKAGE'),
    ('clean --al', 'clean has no option --al'),
)


class CommandLineTest(unittest.TestCase):
    """What is to be called instead of apt and the like says so."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.cache = self.folder / 'cache'
        self.called = self.folder / 'called'
        fakes = self.folder / 'bin'
        fakes.mkdir()
        for name in ('apt-get', 'sudo', 'ninja'):
            fake = fakes / name
            fake.write_text(f'#!/bin/sh\necho {name} >>{self.called}\n'
                            f'exec sleep {SECONDS}\n', 'utf-8')
            fake.chmod(0o755)
        self.env = dict(os.environ, PATH=f'{fakes}:{os.environ["PATH"]}',
                        QEMU_REPLICATION_CACHE=str(self.cache))

    def run_it(self, words: str, cache: Optional[str] = None
               ) -> 'subprocess.CompletedProcess[str]':
        """Run a command to its end, which comes soon."""
        env = dict(self.env)
        if cache is not None:
            env['QEMU_REPLICATION_CACHE'] = cache
        done = subprocess.run(
            [str(ROOT / 'run'), *words.split(' ')], env=env, check=False,
            stdin=subprocess.DEVNULL, text=True, capture_output=True,
            timeout=SECONDS, cwd=self.folder)
        self.assertFalse(self.called.exists(), words)
        return done

    def assert_refused(self, done: 'subprocess.CompletedProcess[str]',
                       text: str, status: int) -> None:
        """In one line."""
        self.assertIn(text, done.stderr)
        self.assertRegex(done.stderr, r'^error: .*\n$')
        self.assertEqual((done.returncode, done.stdout), (status, ''))

    def test_help(self) -> None:
        """Of each command, with all its options, and none that is ours."""
        for arguments in ('help', '--help', '-h'):
            shown = self.run_it(arguments)
            self.assertEqual(shown.returncode, 0, shown.stderr)
        commands = re.findall(r'^  ([a-z]+)\b', shown.stdout, re.M)
        self.assertIn('install', commands)
        for name in commands:
            told = self.run_it(f'{name} --help')
            self.assertEqual((told.returncode, told.stderr), (0, ''))
            self.assertRegex(told.stdout, f'^usage: ./run {name} ')
            self.assertNotRegex(told.stdout, r'(?m) $')
            self.assertNotIn('--cache', told.stdout)
        self.assertFalse(self.cache.exists())

    def test_tools_have_the_options(self) -> None:
        """What the table promises, the tool takes."""
        for name, tool in (('demo', 'colo/demo.py'), ('top', 'top/top.py'),
                           ('bench', 'bench/bench.py'),
                           ('series', 'series/series.py')):
            source = (ROOT / 'tools' / tool).read_text('utf-8')
            told = self.run_it(f'{name} --help').stdout
            for option in re.findall(r'^  (--[a-z-]+)', told, re.M):
                self.assertIn(f"'{option}'", source, name)

    def test_bench_has_the_groups(self) -> None:
        """All that it measures can be asked for."""
        told = self.run_it('bench --help').stdout
        listed = re.search(r'only these groups: (.*(?:\n {5,}.*)*)', told)
        source = (ROOT / 'tools/bench/bench.py').read_text('utf-8')
        groups = re.search(r'\nGROUPS.*?= \{(.*?)\}', source, re.S)
        assert listed and groups
        self.assertEqual(set(re.findall(r'[a-z]+', listed[1])),
                         set(re.findall(r"'([a-z]+)':", groups[1])))

    def test_mistakes(self) -> None:
        """Each is said in one line, with one exit status."""
        for words, text in MISTAKES:
            with self.subTest(words):
                self.assert_refused(self.run_it(words), text, WRONG)

    def test_cache(self) -> None:
        """A folder that is of no use is named, and so is the variable."""
        (self.folder / 'file').touch()
        for cache in ('/proc/x', f'{self.folder}/a b', f'{self.folder}/a:b',
                      f"{self.folder}/a'b", f'{self.folder}/a$b',
                      f'{self.folder}/file', f'{self.folder}/file/x'):
            for words in ('build', 'check --base 10.2', 'demo', 'fetch x'):
                with self.subTest(f'{words} {cache}'):
                    done = self.run_it(words, cache)
                    self.assert_refused(done, 'QEMU_REPLICATION_CACHE', 1)
                    self.assertIn(cache, done.stderr)

    def test_full_disk(self) -> None:
        """It is no reason to skip anything."""
        done = subprocess.run(
            ['sh', '-c', 'ulimit -f 0; exec "$@"', '-', str(ROOT / 'run'),
             'check', '--base', '10.2'], env=self.env, check=False, text=True,
            stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS)
        self.assert_refused(done, f'{self.cache} cannot be written to', 1)

    def test_no_home(self) -> None:
        """Nothing is assumed."""
        for name in ('HOME', 'XDG_CACHE_HOME', 'QEMU_REPLICATION_CACHE'):
            self.env.pop(name, None)
        self.assert_refused(self.run_it('build'), 'HOME is not set', 1)
        self.assertEqual(self.run_it('help').returncode, 0)

    def test_source_that_is_none(self) -> None:
        """QEMU_SRC is looked at first."""
        self.env['QEMU_SRC'] = str(self.folder)
        self.assert_refused(self.run_it('build'), 'QEMU_SRC=', 1)

    def test_interrupt(self) -> None:
        """It says so, and no more."""
        # a package is missing, and what installs it takes long
        query = self.folder / 'bin/dpkg-query'
        query.write_text('#!/bin/sh\nexit 1\n', 'utf-8')
        query.chmod(0o755)
        with subprocess.Popen(
                [str(ROOT / 'run'), 'build'], env=self.env, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, process_group=0) as process:
            deadline = time.monotonic() + SECONDS
            while not self.called.exists():
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.05)
            # as a terminal does
            os.killpg(process.pid, signal.SIGINT)
            _, said = process.communicate(timeout=SECONDS)
        self.assertEqual(process.returncode, 130)
        self.assertEqual(said.splitlines()[-1], 'interrupted')


if __name__ == '__main__':
    unittest.main(verbosity=2)
