#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Give a QEMU a command, and print what it answers as JSON.

usage: qmp SOCKET COMMAND [KEY=TEXT | KEY:=JSON]...

A KEY with dots is one of an object.
"""

import json
import socket
import sys
from typing import Any, Dict, Iterator, List

Json = Dict[str, Any]


def arguments(words: List[str]) -> Json:
    """Return the arguments of a command."""
    result: Json = {}
    for word in words:
        key, found, text = word.partition('=')
        if not found:
            sys.exit(f'{word!r} is neither KEY=TEXT nor KEY:=JSON')
        value = json.loads(text) if key.endswith(':') else text
        *path, last = key.rstrip(':').split('.')
        place = result
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return result


def wait_for(answers: Iterator[Json], key: str) -> Any:
    """Return what comes with a key, or fail with an error."""
    for answer in answers:
        if 'error' in answer:
            sys.exit(f"error: {answer['error']['desc']}")
        if key in answer:
            return answer[key]
    sys.exit('error: QEMU has ended')


def main() -> None:
    """Do what the command line says."""
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    path, command, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except OSError as exc:
            sys.exit(f'error: {path}: {exc.strerror}')
        answers = map(json.loads, connection.makefile())
        wait_for(answers, 'QMP')
        for what in ({'execute': 'qmp_capabilities'},
                     {'execute': command, 'arguments': arguments(words)}):
            connection.sendall(json.dumps(what).encode())
            told = wait_for(answers, 'return')
    if isinstance(told, str):
        print(told.replace('\r', ''), end='')
    elif told != {}:
        print(json.dumps(told, indent=1))


if __name__ == '__main__':
    main()
