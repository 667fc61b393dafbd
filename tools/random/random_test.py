#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Random sequences of everything that can happen to replicated disks.

QEMU does each step, a small model foretells what every read returns, which
calls succeed and what the status says.
"""

import gc
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Dict, List, Optional, TextIO, Type, Union

from qemu.machine.machine import QEMUMachineError
from qemu.qmp import QMPError

import nbd  # type: ignore

import command
from autopsy import stacks
from failback import Failback
from holder import HolderWalk
from host import Hang, HostError
from layout import Images
from model import Op, Stage
from modelhost import Difference, ModelHost
from sequence import Sequence, Stats
from steps import choose, hosts, start

# In turn: pairs under quorum, of a primary that holds both disks, and of two
# disks with metadata
KINDS: List[Type[Union[HolderWalk, Sequence]]] = [
    HolderWalk, Sequence, Failback, Sequence]
MIN_STEPS, MAX_STEPS = 10, 50
LOG_LINES = 40
# Each wait has its own limit; this is for what nobody thought of
SEQUENCE_SECONDS = 300

# What a QEMU that crashes or hangs ends in, besides differences
FINDINGS = (Difference, HostError, QEMUMachineError, QMPError, nbd.Error,
            EOFError, ConnectionError, TimeoutError,
            subprocess.TimeoutExpired)


class Player:
    """Plays sequences, with the same hosts where that goes."""

    def __init__(self, build: Path, folder: Path, seed: int) -> None:
        self._build = build
        self._folder = folder
        self._seed = seed
        self._images = Images(build, folder)
        self._hosts: Dict[str, ModelHost] = {}
        self._trace = folder / 'trace'
        self.stats = Stats()

    def play(self, number: int) -> Optional[str]:
        """Play a sequence; tell of a difference."""
        folder = self._folder / 'images'
        folder.mkdir()
        signal.alarm(SEQUENCE_SECONDS)
        try:
            with open(self._trace, 'w', encoding='utf-8') as trace:
                self._play(number, folder, trace)
        except Exception as exc:  # pylint: disable=broad-except
            signal.alarm(0)
            return self._report(number, exc)
        finally:
            signal.alarm(0)
            shutil.rmtree(folder)
            # disks and their parts refer to each other, and are large
            gc.collect()
        return None

    def _play(self, number: int, folder: Path, trace: TextIO) -> None:
        for name in ('a', 'b'):
            if name not in self._hosts:
                self._hosts[name] = ModelHost(self._build, self._folder, name)
                self._hosts[name].launch()
            self._hosts[name].served += 1
        args = (self._hosts, self._images, folder, f'{self._seed}/{number}',
                trace)
        seq = KINDS[number % len(KINDS)](*args)
        try:
            if isinstance(seq, HolderWalk):
                seq.play()
                for host in self._hosts.values():
                    check_empty(host)
            else:
                play(seq)
            seq.stats.sequences = 1
        finally:
            self.stats.add(seq.stats)

    def _report(self, number: int, exc: Exception) -> str:
        lines = [f'sequence {number} differs; to repeat it:',
                 f'  --seed {self._seed} --first {number} --count 1']
        before = max(host.served for host in self._hosts.values()) - 1
        if before:
            lines += [
                'if that shows nothing, with those before in the same QEMU:',
                f'  --seed {self._seed} --first {number - before} '
                f'--count {before + 1}']
        lines += ['', self._trace.read_text(encoding='utf-8')]
        if not isinstance(exc, FINDINGS):
            lines.append('The test itself has failed:')
        lines.append(traceback.format_exc())
        if isinstance(exc, (Hang, TimeoutError)):
            lines += map(stacks, self._hosts.values())
        for host in self._hosts.values():
            host.kill()
            lines += [f'log of host {host.name}, which ended with status '
                      f'{host.exitcode()}:',
                      *host.log_text().splitlines()[-LOG_LINES:], '']
        return '\n'.join(lines)

    def close(self) -> None:
        """End all hosts."""
        for host in self._hosts.values():
            host.kill()


def play(seq: Sequence) -> None:
    """Open the disks, do random steps, look at everything, and close."""
    for disk in seq.disks:
        disk.open()
    seq.check_status()
    if seq.rng.random() < 0.8:
        start(seq, seq.disks[0])
    for number in range(seq.rng.randrange(MIN_STEPS, MAX_STEPS)):
        seq.new_step(number)
        disk = seq.rng.choice(seq.disks)
        choose(seq, disk)(seq, disk)
        for each in seq.disks:
            seq.settle(each)
        seq.check_status()
    seq.new_step(MAX_STEPS)
    if seq.rng.random() < 0.25:
        end_by_quit(seq)
    else:
        end_by_close(seq)


def end_by_close(seq: Sequence) -> None:
    """End replication where that is needed, and delete all nodes."""
    seq.log('end')
    seq.mend()
    for disk in seq.disks:
        seq.compare_all(disk)
    for host in hosts(seq):
        if any(node.stage is Stage.RUNNING for node in host.nodes):
            op = seq.rng.choice([Op.STOP, Op.FAILOVER])
            seq.call(host, op, host.nodes[0].mode)
    for disk in seq.disks:
        seq.settle(disk)
        seq.compare_all(disk)
    seq.check_status()
    for disk in seq.disks:
        disk.close()
    for host in seq.hosts.values():
        check_empty(host)


def check_empty(host: ModelHost) -> None:
    """Nothing is left behind."""
    for query in ('query-named-block-nodes', 'query-block-exports',
                  'query-jobs', 'query-block-jobs'):
        left = host.cmd(query)
        if left:
            raise Difference(f'{host.name}: {query} still has {left}')
    graph = host.cmd('x-debug-query-block-graph')
    if graph['nodes']:
        raise Difference(f'{host.name}: the graph still has {graph}')


def end_by_quit(seq: Sequence) -> None:
    """Quit in the middle, then see whether the images have everything."""
    seq.log('quit')
    whole = [disk for disk in seq.disks if not any(
        image.failing for image in disk.images_of().values())]
    for disk in seq.disks:
        for client in disk.clients.values():
            client.close()
    for host in seq.hosts.values():
        host.end()
    for host in seq.hosts.values():
        host.launch()
    for disk in whole:
        disk.check_after_quit()


def too_long(_number: int, _frame: object) -> None:
    """A sequence has not ended in time."""
    raise Hang(f'a sequence took more than {SEQUENCE_SECONDS} s')


def main() -> int:
    """Make room for a run, do it, and clean up."""
    parser = command.parser(__doc__)
    command.add_seed(parser)
    options = parser.parse_args()
    command.begin()
    signal.signal(signal.SIGALRM, too_long)
    print(f'seed {options.seed}', flush=True)
    progress = command.Progress()
    failure = None
    with command.work_folder('random-') as folder:
        player = Player(options.build, folder, options.seed)
        try:
            for number in command.numbers(options):
                failure = player.play(number)
                if failure:
                    break
                progress.show(player.stats.short())
        finally:
            with command.held():
                player.close()
    if failure:
        progress.say(failure)
    progress.say(str(player.stats))
    return 1 if failure else 0


if __name__ == '__main__':
    sys.exit(main())
