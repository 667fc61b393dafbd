#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one tool that reads our sources and objects to what it finds."""

import argparse
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys
from typing import Callable, Dict, List, Optional

from bases import our_files

ROOT = Path(__file__).resolve().parents[2]
IOTESTS = 'tests/qemu-iotests'


def run(command: List[str], env: Optional[Dict[str, str]] = None) -> bool:
    """Run a command; does it find nothing to object to?"""
    result = subprocess.run(command, env=dict(os.environ, **(env or {})),
                            check=False)
    return result.returncode == 0


def first_line(path: Path) -> str:
    """The first line of a file, if it is text."""
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.readline()


def scripts(top: str, language: str, suffix: str) -> List[str]:
    """Our files under top in some language, by suffix or first line."""
    return sorted(
        str(path) for path in (ROOT / top).rglob('*')
        if path.is_file() and '__pycache__' not in path.parts
        and path.suffix in ('', suffix)
        and (path.suffix or (first_line(path).startswith('#!')
                             and language in first_line(path))))


def c_files(suffixes: str) -> List[str]:
    """The C files that we add to QEMU, by their path in its tree."""
    return sorted(name for name in our_files()
                  if name.endswith(tuple(suffixes.split())))


def flake8(_args: argparse.Namespace) -> bool:
    """All of our Python."""
    return run(['flake8'] + scripts('tools', 'python', '.py')
               + scripts('ha', 'python', '.py')
               + scripts(IOTESTS, 'python', '.py'))


def mypy(args: argparse.Namespace) -> bool:
    """All of our Python: each folder is a program of its own."""
    python = str(args.tree / 'python')
    good = True
    for folder in [ROOT / 'ha', *sorted((ROOT / 'tools').iterdir())]:
        # the series uses modules of base; tests of ha, the demo's guest
        path = ':'.join(map(str, [python, folder, ROOT / 'tools/lib',
                                  ROOT / 'tools/base', ROOT / 'tools/colo',
                                  ROOT / 'ha']))
        files = scripts(str(folder.relative_to(ROOT)), 'python', '.py')
        if files:
            good &= run(['mypy', '--strict', '--follow-imports=silent',
                         '--scripts-are-modules'] + files,
                        {'MYPYPATH': path})
    tests = args.tree / IOTESTS
    path = f'{args.tree / "python"}:{tests}'
    for file in scripts(IOTESTS, 'python', '.py'):
        # as the base has it: they may have been patched for it
        laid = args.tree / Path(file).relative_to(ROOT)
        good &= run(['mypy', '--config-file', str(tests / 'mypy.ini'),
                     '--follow-imports=silent', str(laid)],
                    {'MYPYPATH': path})
    return good


def shellcheck(_args: argparse.Namespace) -> bool:
    """All of our shell scripts."""
    return run(['shellcheck', '-x', '-P', f"{ROOT / 'tools/base'}:{ROOT}",
                str(ROOT / 'run'), str(ROOT / '.ci/run')]
               + scripts('tools', 'sh', '.sh'))


def checkpatch(args: argparse.Namespace) -> bool:
    """Our C files, and our patches to QEMU's."""
    command = [str(args.tree / 'scripts/checkpatch.pl'), '--quiet',
               '--no-summary', '--terse', '--strict', f'--root={args.tree}']
    good = run(command + ['-f'] + c_files('.c .h'))
    # Nobody has signed the patches off: that is for who submits them.
    return run(command + ['--no-signoff', '--patch']
               + [str(path) for top in ('patches', 'bases')
                  for path in sorted((ROOT / top).rglob('*.patch'))
                  if '\ndiff --git ' in path.read_text('utf-8')]
               ) and good


def mutations(_args: argparse.Namespace) -> bool:
    """What breaks the driver on purpose has to apply to it."""
    return all([run(['git', '-C', str(ROOT), 'apply', '--check', str(path)])
                for path in (ROOT / 'tools/mutations').glob('*.patch')])


def clang_command(command: List[str]) -> List[str]:
    """A gcc command for clang, with nothing about the code it makes."""
    words = iter(command[1:])
    kept = []
    for word in words:
        if word in ('-o', '-MF', '-MQ'):
            next(words)
        elif word not in ('-c', '-MD') and not word.startswith('-f'):
            kept.append(word)
    return ['clang', '-fsyntax-only', '-Wno-unknown-warning-option',
            *kept, '-Wthread-safety', '-Werror']


def clang(args: argparse.Namespace) -> bool:
    """Our C files, with the checks of locks that only clang makes."""
    database = json.loads((args.build / 'compile_commands.json').read_text())
    good = True
    os.chdir(args.build)
    wanted = {os.path.relpath(args.tree / name): name
              for name in c_files('.c')}
    for entry in database:
        if wanted.pop(entry['file'], None):
            good &= run(clang_command(shlex.split(entry['command'])))
    if wanted:
        print(f'not compiled by the build: {sorted(wanted.values())}')
    return good and not wanted


TOOLS: Dict[str, Callable[[argparse.Namespace], bool]] = {
    tool.__name__: tool
    for tool in (checkpatch, clang, flake8, mutations, mypy, shellcheck)}


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('tool', choices=TOOLS)
    parser.add_argument('--build', type=Path, required=True)
    parser.add_argument('--tree', type=Path, required=True)
    args = parser.parse_args()
    return 0 if TOOLS[args.tool](args) else 1


if __name__ == '__main__':
    sys.exit(main())
