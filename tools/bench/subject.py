# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compared: a plain disk, the stock driver, and this one."""

from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple

UNPROTECTED, STOCK, OURS = 'unprotected', 'stock', 'ours'
NAMES = (UNPROTECTED, STOCK, OURS)

WRITE_BEHIND = 'write-behind'


class Subject(NamedTuple):
    """One of those."""
    name: str
    build: Path
    # Of the replication driver in this build
    options: FrozenSet[str] = frozenset()

    @property
    def protected(self) -> bool:
        """Whether there is a replication node."""
        return self.name != UNPROTECTED

    def tool(self, name: str) -> Path:
        """A program of the build."""
        return self.build / name

    def replication(self, mode: str, **wanted: Any) -> Dict[str, Any]:
        """
        The options of a replication node.

        Those wanted beyond what every build has are left out where the build
        does not know them.
        """
        known = {name.replace('_', '-'): value
                 for name, value in wanted.items()}
        return {'driver': 'replication', 'mode': mode,
                **{name: value for name, value in known.items()
                   if name in self.options}}


def driver_options(schema: List[Dict[str, Any]], driver: str
                   ) -> FrozenSet[str]:
    """The options of a block driver, out of query-qmp-schema."""
    types = {entry['name']: entry for entry in schema}
    options = types[types['blockdev-add']['arg-type']]
    branch = next(variant['type'] for variant in options['variants']
                  if variant['case'] == driver)
    return frozenset(member['name'] for member in types[branch]['members'])
