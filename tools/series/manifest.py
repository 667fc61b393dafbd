# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads tools/series/manifest: what is in which patch of the series."""

from fnmatch import fnmatchcase
from pathlib import Path
import re
from typing import Dict, Iterable, List, NamedTuple

from gitrepo import Failure

HERE = Path(__file__).resolve().parent
MANIFEST = HERE / 'manifest'
MESSAGES = HERE / 'messages'
PATCHES = 'patches/'


class Step(NamedTuple):
    """One patch of the series."""
    message: Path
    files: List[str]
    patches: List[str]


class Line(NamedTuple):
    """A line of the manifest: which patch of the series, and a name."""
    message: str
    pattern: str


def read_lines() -> List[Line]:
    """The lines that name something, in their order."""
    lines = []
    message = ''
    for text in MANIFEST.read_text('utf-8').splitlines():
        name = text.strip()
        if not name or name.startswith('#'):
            continue
        if text[0].isspace():
            if not message:
                raise Failure(f'{MANIFEST}: no message above {name}')
            lines.append(Line(message, name))
        elif name.startswith(PATCHES):
            message = ''
            lines.append(Line(message, name))
        else:
            message = name
    return lines


def called(name: str) -> str:
    """What the manifest calls a file by."""
    return re.sub(rf'^{PATCHES}\d+-', PATCHES, name)


def sort_out(names: Iterable[str], lines: List[Line],
             complete: bool) -> Dict[Line, List[str]]:
    """Find the line of each file; if complete, each line must have one."""
    found: Dict[Line, List[str]] = {line: [] for line in lines}
    lost = []
    for name in sorted(names):
        alias = called(name)
        line = next((line for line in lines if line.pattern == alias), None)
        if line is None:
            line = next((line for line in lines
                         if fnmatchcase(alias, line.pattern)), None)
        if line is None:
            lost.append(name)
        else:
            found[line].append(name)
    if lost:
        raise Failure(f'{MANIFEST} puts these into no patch: {lost}')
    empty = [line.pattern for line in lines if not found[line]]
    if empty and complete:
        raise Failure(f'{MANIFEST} names what there is not: {empty}')
    return found


def read_steps(files: Dict[str, Path], complete: bool) -> List[Step]:
    """The patches of the series; files are all that are in it.

    They are complete in the reference: another base may lack some.
    """
    lines = read_lines()
    unused = sorted({path.name for path in MESSAGES.iterdir()}
                    - {line.message for line in lines})
    if unused:
        raise Failure(f'{MANIFEST} does not use these messages: {unused}')
    steps: List[Step] = []
    by_message: Dict[str, Step] = {}
    for line, found in sort_out(files, lines, complete).items():
        if not line.message:
            steps += [Step(files[name], [], [name]) for name in found]
            continue
        step = by_message.get(line.message)
        if step is None and found:
            step = Step(MESSAGES / line.message, [], [])
            if not step.message.exists():
                raise Failure(f'{step.message} is missing')
            by_message[line.message] = step
            steps.append(step)
        for name in found:
            assert step
            part = step.patches if name.startswith(PATCHES) else step.files
            part.append(name)
    for step in steps:
        step.patches.sort()
    return steps
