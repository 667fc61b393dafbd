#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Do what docs/protect-a-vm.txt says, and see that it answers as it says.

Two shells stand for its hosts, each in a folder of its own.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Dict, List, Tuple

import command
from page import Step, answers, steps

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / 'tools/base/install.sh'
GUIDE = ROOT / 'docs/protect-a-vm.txt'
SECONDS = 120.0
SIZE = 10 << 30
DATA = 4 << 20


class Shell:
    """A host: a shell that is given one command after the other."""

    def __init__(self, folder: Path, env: Dict[str, str]) -> None:
        self.folder = folder
        # pylint: disable=consider-using-with
        self._bash = subprocess.Popen(
            ['bash'], cwd=folder, env=env, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True)

    def run(self, text: str) -> Tuple[int, List[str]]:
        """Run a command; return its exit status and what it prints."""
        assert self._bash.stdin and self._bash.stdout
        told: List[str] = []
        timer = threading.Timer(SECONDS, self.kill)
        timer.start()
        try:
            self._bash.stdin.write(f'{text}\necho "ended: $?"\n')
            self._bash.stdin.flush()
            for line in self._bash.stdout:
                if line.startswith('ended: '):
                    return int(line.split()[1]), told
                told.append(line.rstrip('\n'))
        finally:
            timer.cancel()
        return -1, told

    def kill(self) -> None:
        """End the shell and what it waits for."""
        try:
            os.killpg(self._bash.pid, signal.SIGKILL)
        except ProcessLookupError:
            # it has ended
            pass

    def close(self) -> None:
        """End it, and QEMU."""
        self.kill()
        with self._bash:
            pass
        try:
            os.kill(int((self.folder / 'vm1.pid').read_text('utf-8')),
                    signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            # it has ended
            pass


class Guide:
    """What the guide takes for granted, and doing what it says."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.folder = folder
        self.prefix = folder / 'installed'
        subprocess.run([INSTALL, options.build, options.tree, self.prefix],
                       check=True, timeout=SECONDS)
        self._fake('run', f'shift; exec {sys.executable} '
                   f'{ROOT}/tools/top/top.py "$@"')
        # of the key: there is only one other host
        self._fake('scp', f'exec cp -pr "$2" {folder}/west')
        # an address that no other test has
        net = f'127.{os.getpid() // 250 % 250 + 1}.{os.getpid() % 250 + 1}'
        self.settings = {
            'EAST': f'{net}.1', 'WEST': f'{net}.2', 'MEMORY': '128M',
            'NET': 'user,restrict=on', 'RUN': f'{folder}/run',
            'PATH': f'{self.prefix}/bin:{folder}:$PATH'}
        self.hosts = {}
        for name in ('east', 'west'):
            (folder / name).mkdir()
            self.hosts[name] = Shell(folder / name, dict(os.environ))
        self.disks = [folder / f'east/vm1-{n}.qcow2' for n in (0, 1)]
        for disk in self.disks:
            self._make(disk)

    def _fake(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(f'#!/bin/sh\n{text}\n', 'utf-8')
        path.chmod(0o755)

    def _tool(self, name: str, *words: Any) -> None:
        subprocess.run([self.prefix / 'bin' / name, *map(str, words)],
                       check=True, timeout=SECONDS, stdout=subprocess.DEVNULL)

    def _make(self, disk: Path) -> None:
        """A disk with something on it, and a copy of that."""
        self._tool('qemu-img', 'create', '-f', 'qcow2', disk, SIZE)
        for place in (0, SIZE // 2, SIZE - DATA):
            self._tool('qemu-io', '-c', f'write -P {place % 251 + 1} {place} '
                       f'{DATA}', disk)
        shutil.copy(disk, self._original(disk))

    @staticmethod
    def _original(disk: Path) -> Path:
        return disk.parents[1] / disk.name

    def set(self, text: str) -> str:
        """A command with our settings in place of the guide's."""
        return re.sub(r'\b([A-Z]+)=[^\s$"]\S*', lambda found: found[0]
                      if found[1] not in self.settings
                      else f'{found[1]}={self.settings[found[1]]}', text)

    def do(self, step: Step) -> None:
        """Do it, where it says."""
        print(f'{GUIDE.name}:{step.line}: {step.host}: '
              f'{step.command.splitlines()[0]}', flush=True)
        for name, shell in self.hosts.items():
            if step.host not in (name, 'both'):
                continue
            status, told = shell.run(self.set(step.command))
            if step.answer:
                right = answers(step, told)
            else:
                right = status == 0 and not any(
                    line.startswith('error: ') for line in told)
            if not right:
                sys.exit(f'{name}: exit status {status}, and it says:\n'
                         + '\n'.join(told))

    def compare(self) -> None:
        """After all that, both hosts have what there was on the disks."""
        for disk in self.disks:
            for folder in ('east', 'west'):
                self._tool('qemu-img', 'compare', self._original(disk),
                           self.folder / folder / disk.name)

    def close(self) -> None:
        """Leave nothing behind."""
        for shell in self.hosts.values():
            shell.close()


def main() -> None:
    """Do all of it."""
    options = command.parser(__doc__).parse_args()
    command.begin()
    with command.work_folder('guide-') as folder:
        guide = Guide(options, folder)
        try:
            for step in steps(GUIDE):
                guide.do(step)
            guide.compare()
        finally:
            guide.close()


if __name__ == '__main__':
    main()
