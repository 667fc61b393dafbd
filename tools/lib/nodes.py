# SPDX-License-Identifier: GPL-2.0-or-later
"""The nodes of a replicated disk, as blockdev-add wants them.

    primary                       secondary
    replication                   any node
      |    +------+                 |
    disk      NBD client          replication
                                    |
    or, without a replica of its    |
    own:                          active -> hidden -> disk
    quorum
      |    +------+
    disk      replication
                  |
              NBD client
"""

import subprocess
from pathlib import Path
from typing import Any, Dict, Union

Json = Dict[str, Any]
# A node that is there, by its name, or one to be made
Below = Union[str, Json]

# The secondary's guest writes new blocks of it at nearly the speed of a plain
# disk then.  The hidden overlay is better off without.
RECOMMENDED_ACTIVE = 'extended_l2=on,cluster_size=128k'
# In place of options: the node makes both overlays
OWN_OVERLAYS = 'own'
TOOL_SECONDS = 60


def file(path: Path, **options: Any) -> Json:
    """A file of this machine."""
    return {'driver': 'file', 'filename': str(path), **options}


def image(driver: str, name: str, below: Below, **options: Any) -> Json:
    """A disk or an overlay in a file."""
    return {'driver': driver, 'node-name': name, 'file': below, **options}


def quorum(name: str, *children: Below, **options: Any) -> Json:
    """The guest's node, which reads from the first child that can."""
    return {'driver': 'quorum', 'node-name': name, 'vote-threshold': 1,
            'read-pattern': 'fifo', 'children': list(children), **options}


def primary(name: str, target: Below, **options: Any) -> Json:
    """What forwards the guest's writes to a target."""
    return {'driver': 'replication', 'mode': 'primary', 'node-name': name,
            'file': target, **options}


def holder(name: str, local: Below, **options: Any) -> Json:
    """The guest's node of a primary that holds both disks; alone at first."""
    return primary(name, local, **{'replica': None, **options})


def secondary(name: str, top: str, active: Below, **options: Any) -> Json:
    """What keeps the guest's view of the last checkpoint."""
    return {'driver': 'replication', 'mode': 'secondary', 'node-name': name,
            'top-id': top, 'file': active, **options}


def standby(name: str, replica: str, disk: Below, **options: Any) -> Json:
    """The same, with overlays that it makes by itself."""
    return {'driver': 'replication', 'mode': 'secondary', 'node-name': name,
            'replica-node-name': replica, 'file': disk, **options}


def link(name: str, server: Union[Path, Json], export: str, **options: Any
         ) -> Json:
    """An NBD client: the way to the other host."""
    if isinstance(server, Path):
        server = {'type': 'unix', 'path': str(server)}
    return {'driver': 'nbd', 'node-name': name, 'export': export,
            'server': server, **options}


def sparse(path: Path, size: int) -> None:
    """Make a raw image without data."""
    with open(path, 'wb') as file:
        file.truncate(size)


def create(build: Path, path: Path, size: int, options: str = '') -> None:
    """Make the image of an empty overlay."""
    subprocess.run([str(build / 'qemu-img'), 'create', '-q', '-f', 'qcow2',
                    *(['-o', options] if options else []), str(path),
                    str(size)], check=True, timeout=TOOL_SECONDS)
