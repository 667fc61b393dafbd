# SPDX-License-Identifier: GPL-2.0-or-later
"""Asking the keeper of this host."""

import json
import socket
from typing import Iterator

from .config import Config, Json

# Exit statuses of all commands but "status"
DONE, FAILED, WRONG, NO_KEEPER, REFUSED, LATE = range(6)
# The keeper tells its status at once; before it begins with anything else, it
# may have to look at this host, and to ask QEMU, the peer and the cluster
STATUS_SECONDS, FIRST_SECONDS = 30.0, 180.0


def ask(config: Config, request: Json) -> Iterator[Json]:
    """Ask the keeper; give what it answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(STATUS_SECONDS if request['command'] == 'status'
                        else FIRST_SECONDS)
        sock.connect(str(config.control))
        sock.sendall(json.dumps(request).encode() + b'\n')
        with sock.makefile('r', encoding='utf-8') as lines:
            for line in lines:
                # it has bounds of its own from here on
                sock.settimeout(None)
                yield json.loads(line)
