#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""The VM is never at two places, whatever is cut off from what, and when.

What is cut, and killed meanwhile, is drawn from a seed.  In the end all is
mended; then the VM has to be protected again, its guest has checked every
block that it ever wrote, and what each QEMU has said of itself tells that
there was one VM all the time.

The same is tried with a keeper that lacks one of its two precautions: that
has to be noticed.
"""

import argparse
import random
import re
import signal
import sys
import threading
import time
import unittest
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

from claims import ARGUMENTS, Claims
from clustercase import BLOCKS, REST, SECONDS, ClusterCase, NodeSide
from clusternodes import CLUSTER, LINK, NETWORKS
from qemu_replication.client import ask
from qemu_replication.config import load
from sides import Json

SETTLED = 'is settled'
# When the keepers and Corosync have noticed
NOTICED = 15.0
# A precaution, the file, what it is there, what is left of it, and a kind of
# partition in which that does harm
MUTATIONS: Dict[str, Tuple[str, str, str, str]] = {
    # of the quorate part of the cluster, which both sides are in
    'ring': ('judge.py', r'(if )(peer in before|before\.quorate)[^:]*:',
             r'\1True:', 'isolated'),
    'score': ('cluster.py', r"told = _attribute\(resource, node, '-D'\)",
              'return', 'left')}


def parse() -> Tuple[argparse.Namespace, List[str]]:
    """Read the command line; the rest is for unittest."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--partitions', type=int, default=5)
    return parser.parse_known_args(REST)


OPTIONS, WORDS = parse()


class Plan:
    """What is done, by its seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seed = seed
        self.fence_seconds = self.random.choice((0.0, 0.0, 2.0, 4.0))
        self.kind = self.random.choice(('isolated', 'left', 'asking', 'any',
                                        'any', 'any', 'any'))

    @classmethod
    def of_kind(cls, kind: str) -> 'Plan':
        """The first one."""
        seed = 1
        while cls(seed).kind != kind:
            seed += 1
        return cls(seed)

    def pause(self, longest: float) -> None:
        """At random."""
        threading.Event().wait(self.random.uniform(0, longest))


class Partitions(ClusterCase):
    """One cluster for all of them."""
    claims: Claims

    @classmethod
    def vm_configuration(cls, folder: Path) -> Json:
        config = super().vm_configuration(folder)
        config['vm']['arguments'] += ARGUMENTS
        config['limits'] = {'checkpoint_ms': 1000, 'answer': 3, 'stalled': 3}
        return config

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.claims = Claims({side.name: side.folder
                             for side in cls.sides.values()})
        cls.addClassCleanup(cls.claims.close)

    def partition(self, plan: Plan) -> None:
        """Do what is planned, and mend it."""
        self.said: List[str] = []
        self.cluster.fence_seconds = plan.fence_seconds
        getattr(self, f'_{plan.kind}')(plan)
        plan.pause(6)
        self._say('heals')
        self.cluster.fence_seconds = 0.0
        self.cluster.powerless.clear()
        for node in self.cluster.nodes.values():
            node.heal()

    def _say(self, what: str) -> None:
        self.said.append(f'{time.time():.3f} {what}')

    def _cut(self, name: str, network: str, mute: bool = False) -> None:
        self._say(f'{name} {"is mute" if mute else "is cut off"} on '
                  f'{network}')
        if network == CLUSTER:
            # that is the way to the fencing device as well
            self.cluster.powerless.add(name)
        self.cluster.nodes[name].cut(network, mute)

    def _kill(self, side: NodeSide, number: signal.Signals) -> None:
        """If it is there."""
        if side.qemu():
            self._say(f'{number.name} for QEMU on {side.name}')
            side.signal(number)

    def _noticed(self, done: Callable[[], bool]) -> None:
        """Or not: that depends."""
        deadline = time.monotonic() + NOTICED
        while not done() and time.monotonic() < deadline:
            threading.Event().wait(0.1)

    def _isolated(self, _plan: Plan) -> None:
        """The primary, from all others, for a while."""
        self.cluster.fence_seconds = 4.0
        for network in NETWORKS:
            self._cut(self.primary.name, network)
        self._noticed(lambda: self.primary.name in self.cluster.fenced)

    def _left(self, plan: Plan) -> None:
        """The primary, once it goes on without its secondary."""
        self._cut(self.standby.name, LINK)
        self._noticed(lambda: self.primary.state == 'alone')
        plan.pause(2)
        self._say(f'power cut of {self.primary.name}')
        self.node(self.primary).power_off()
        self._noticed(lambda: self.primary.name in self.cluster.fenced)

    def _asking(self, _plan: Plan) -> None:
        """The primary dies while it asks whether the secondary is down."""
        for side in self.sides.values():
            self._cut(side.name, CLUSTER)
        self._noticed(lambda: self.primary.state == 'asking')
        self._kill(self.primary, signal.SIGKILL)

    def _any(self, plan: Plan) -> None:
        """Cuts, and something that dies, in any order."""
        rand = plan.random
        cables = [(node, network) for node in self.cluster.nodes
                  for network in NETWORKS]
        steps: List[Tuple[Callable[..., None], Any]] = [
            (self._cut, (*cable, rand.random() < 0.3))
            for cable in rand.sample(cables, rand.choice((1, 2, 2, 3)))]
        if rand.random() < 0.5:
            steps.append((self._kill, (
                rand.choice(list(self.sides.values())),
                rand.choice((signal.SIGKILL, signal.SIGSTOP)))))
        if rand.random() < 0.5:
            rand.shuffle(steps)
        for step, words in steps:
            step(*words)
            if rand.random() < 0.5:
                plan.pause(4)

    def settle(self) -> None:
        """Wait until no host is lost, nor about to be fenced."""
        members = f"""
            for name in {' '.join(self.cluster.nodes)}; do
                corosync-quorumtool -s | grep -qw $name || exit
            done
            crm_resource --wait --timeout 20s && echo {SETTLED}"""

        def settled() -> bool:
            return all(SETTLED in node.run('sh', '-c', members, seconds=60)
                       for node in self.cluster.nodes.values())

        self.primary.wait(settled, 'the cluster', SECONDS)

    def since(self) -> List[object]:
        """Since when each keeper is in its state."""
        return [(side.status() or {}).get('since')
                for side in self.sides.values()]

    def is_new(self, since: List[object]) -> bool:
        """Whether something has happened."""
        return since != self.since()

    def judge(self) -> None:
        """One VM all the time, and it is well."""
        self.assertEqual(self.claims.wrong(), [])
        blocks = 0
        while not blocks:
            self.settle()
            self.setUp()
            blocks = self.primary.check_guest(partial(self.is_new,
                                                      self.since()))
        self.assertEqual(blocks, BLOCKS)
        self.assertEqual(self.claims.wrong(), [])

    def one(self, plan: Plan) -> None:
        """A partition, from a protected VM to a protected VM."""
        self.setUp()
        before, began = len(self.claims.all()), time.monotonic()
        try:
            self.partition(plan)
            self.judge()
        except BaseException:
            print(f'seed {plan.seed}:', *self.said, 'claims:',
                  *self.claims.all(), sep='\n  ')
            raise
        print(f'seed {plan.seed}, {plan.kind},',
              f'{time.monotonic() - began:.0f} s:',
              '; '.join(said.split(' ', 1)[1] for said in [
                  *self.said, *map(str, self.claims.all()[before:])]),
              flush=True)

    def mutate(self, name: str) -> None:
        """Without a precaution, that is noticed."""
        file, pattern, left, kind = MUTATIONS[name]
        path = self.cluster.folder / 'ha/qemu_replication' / file
        text, times = re.subn(pattern, left, path.read_text('utf-8'))
        self.assertTrue(times)
        path.write_text(text, 'utf-8')
        for side in self.sides.values():
            list(ask(load(side.config, side.name), {'command': 'quit'}))
            # Pacemaker misses it, and the next one finds QEMU
            side.wait(lambda side=side:  # type: ignore[misc]
                      side.state == (side.status() or {})['why'],
                      'the keeper', SECONDS)
        self.setUp()
        self.partition(Plan.of_kind(kind))
        self.primary.wait(lambda: bool(self.claims.wrong()), 'the harm',
                          SECONDS)
        print(f'without {name}:', *self.said, *self.claims.wrong(),
              sep='\n  ', flush=True)


class TwoNodes(Partitions):
    """Each of them has quorum, always."""

    def test_seeds(self) -> None:
        """The odd ones."""
        for seed in range(OPTIONS.seed, OPTIONS.seed + OPTIONS.partitions):
            if seed % 2:
                with self.subTest(seed=seed):
                    self.one(Plan(seed))
        self.mutate('ring')


class ThreeNodes(Partitions):
    """One of them without the VM."""
    witness = True

    def test_seeds(self) -> None:
        """The even ones."""
        for seed in range(OPTIONS.seed, OPTIONS.seed + OPTIONS.partitions):
            if not seed % 2:
                with self.subTest(seed=seed):
                    self.one(Plan(seed))
        self.mutate('score')


if __name__ == '__main__':
    unittest.main(argv=[sys.argv[0], *WORDS], verbosity=2)
