# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the keeper of this host."""

import json
import socket
from typing import Iterator

from .config import Config, Json

# Exit statuses of all commands but "status"
DONE, FAILED, WRONG, NO_KEEPER, REFUSED, LATE = range(6)
# A command may take long, but the keeper says something at once
FIRST_SECONDS = 30.0


def ask(config: Config, request: Json) -> Iterator[Json]:
    """Ask the keeper; give what it answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(FIRST_SECONDS)
        sock.connect(str(config.control))
        sock.sendall(json.dumps(request).encode() + b'\n')
        with sock.makefile('r', encoding='utf-8') as lines:
            for line in lines:
                # it has bounds of its own from here on
                sock.settimeout(None)
                yield json.loads(line)
