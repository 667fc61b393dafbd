#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""What Pacemaker makes of the scores, told by its own crm_simulate.

The resource is that of docs/operate-a-cluster.txt.
"""

import os
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from typing import Dict, NamedTuple, Tuple

import command
from clusternodes import cib, unpacked

SECONDS = 60.0
TWO, THREE = ('east', 'west'), ('east', 'west', 'north')
RING, NONE = '--quorum=1', '--quorum=0'
# The scores: the VM is on east, and west is in step, is not, or has it
STEP: Dict[str, int] = {'east': 200, 'west': 100}
ALONE: Dict[str, int] = {'east': 200}
DIED: Dict[str, int] = {'west': 100}
FRESH: Dict[str, int] = {}


class Case(NamedTuple):
    """What happens to a VM that runs on east, or to one that does not run."""
    name: str
    nodes: Tuple[str, ...]
    runs: bool
    scores: Dict[str, int]
    what: Tuple[str, ...]
    # where the VM is in the end, and who was fenced for that
    promoted: str
    fenced: str = ''


CASES = (
    Case('first start', TWO, False, ALONE, ('-u east', '-u west', RING),
         'east'),
    Case('no score', TWO, False, FRESH, ('-u east', '-u west', RING), ''),
    Case('one of two', TWO, False, ALONE, ('-u east', RING), 'east', 'west'),
    Case('without VM', TWO, False, ALONE, ('-u west', RING), '', 'east'),
    Case('no quorum', THREE, False, ALONE, ('-u east', NONE), ''),
    Case('third node', THREE, False, ALONE,
         ('-u east', '-u west', '-u north', RING), 'east'),
    Case('all is well', TWO, True, STEP, (RING,), 'east'),
    Case('alone', TWO, True, ALONE, (RING,), 'east'),
    Case('primary lost', TWO, True, STEP, ('-f east', RING), 'west', 'east'),
    Case('primary lost alone', TWO, True, ALONE, ('-f east', RING), '',
         'east'),
    Case('secondary lost', TWO, True, ALONE, ('-f west', RING), 'east',
         'west'),
    Case('primary died in step', TWO, True, DIED, (RING,), 'west'),
    Case('primary died alone', TWO, True, ALONE,
         ('-i vm_monitor_5000@east=9', RING), 'east'),
    Case('secondary died', TWO, True, ALONE,
         ('-i vm_monitor_6000@west=1', RING), 'east'),
    Case('both gone', TWO, True, FRESH, (RING,), ''),
    Case('third node lost', THREE, True, STEP, ('-f north', RING), 'east',
         'north'),
    Case('primary lost of three', THREE, True, STEP, ('-f east', RING),
         'west', 'east'),
    Case('west without quorum', THREE, True, STEP,
         ('-f east', '-f north', NONE), ''),
)


OPTIONS, REST = command.parser(__doc__).parse_known_args()


class PolicyTest(unittest.TestCase):
    """A table."""

    def setUp(self) -> None:
        # pylint: disable=consider-using-with
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.path = Path(holder.name) / 'cib.xml'

    def simulate(self, *words: str) -> str:
        """What would be done with the cluster; it is as after that then."""
        usr = unpacked(OPTIONS.cache) / 'usr'
        libraries = [usr / 'lib', *usr.glob('lib/*-linux-gnu')]
        done = subprocess.run(
            [usr / 'sbin/crm_simulate', '-x', self.path, '-S', '-O',
             self.path, *[part for word in words for part in word.split()]],
            env=dict(os.environ, CIB_shadow_dir=str(self.path.parent),
                     PCMK_schema_directory=str(usr / 'share/pacemaker'),
                     LD_LIBRARY_PATH=':'.join(map(str, libraries))),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=SECONDS)
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout

    def change(self, case: Case) -> None:
        """The scores, where the VM runs already."""
        text = self.path.read_text('utf-8')
        for name in STEP.keys() - case.scores.keys():
            text = re.sub(f'<nvpair id="{name}-score"[^>]*>', '', text)
        self.path.write_text(text, 'utf-8')

    def test_cases(self) -> None:
        """Who gets the VM?"""
        for case in CASES:
            with self.subTest(case.name):
                self.path.write_text(cib(
                    case.nodes, STEP if case.runs else case.scores), 'utf-8')
                if case.runs:
                    self.simulate(*(f'-u {name}' for name in case.nodes),
                                  RING)
                    self.change(case)
                told = self.simulate(*case.what)
                after = told.split('Revised Cluster Status')[1]
                found = re.search(r'Promoted: \[ (\w+) \]', after)
                self.assertEqual(found[1] if found else '', case.promoted,
                                 told)
                self.assertEqual(re.findall(r'Fence \(\w+\) (\w+)', told),
                                 [case.fenced] if case.fenced else [], told)


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *REST], verbosity=2)
