# SPDX-License-Identifier: GPL-2.0-or-later
"""The commands of a page of the documentation, and what they answer there."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, List

PROMPT = re.compile(r'    (east|west|both)\$ (.*)')


@dataclass
class Step:
    """A command, where, and what it is going to print."""
    line: int
    host: str
    command: str
    answer: List[str] = field(default_factory=list)


def steps(page: Path) -> Iterator[Step]:
    """Take the commands out of a page."""
    step = None
    for number, line in enumerate(page.read_text('utf-8').splitlines(), 1):
        found = PROMPT.fullmatch(line)
        if found:
            if step:
                yield step
            step = Step(number, found[1], found[2])
        elif step and line.startswith('    > '):
            step.command += '\n' + line[6:]
        elif step and line.startswith('    '):
            step.answer.append(line[4:])
        elif step:
            yield step
            step = None


def answers(step: Step, told: List[str]) -> bool:
    """Whether that is what the page says; "..." is anything."""
    return len(told) == len(step.answer) and all(
        re.fullmatch(re.escape(wanted).replace(r'\.\.\.', '.*'), line)
        for wanted, line in zip(step.answer, told))
