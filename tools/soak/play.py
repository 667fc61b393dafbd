# SPDX-License-Identifier: GPL-2.0-or-later
"""Plays sequences, one after another, with the same hosts where that goes."""

import faulthandler
import gc
import shutil
import subprocess
import traceback
from pathlib import Path
from typing import Dict, NamedTuple, Optional, TextIO

from qemu.machine.machine import QEMUMachineError
from qemu.qmp import QMPError

import nbd  # type: ignore

from host import Difference, Host, Setup
from layout import Images
from model import Op, Stage
from nbdio import Hang
from sequence import Sequence, Stats
from steps import choose, hosts, start

MIN_STEPS, MAX_STEPS = 10, 50
LOG_LINES = 40
SEQUENCE_SECONDS = 300

# What a QEMU that crashes or hangs ends in, besides differences
FINDINGS = (Difference, Hang, QEMUMachineError, QMPError, nbd.Error, EOFError,
            ConnectionError, TimeoutError, subprocess.TimeoutExpired)


class Result(NamedTuple):
    """How a sequence has ended."""
    number: int
    stats: Stats
    failure: Optional[str] = None
    # With how many before it in the same QEMU
    before: int = 0


class Player:
    """Plays sequences by their number."""

    def __init__(self, setup: Setup, seed: int) -> None:
        self._setup = setup
        self._seed = seed
        self._images = Images(setup)
        self._hosts: Dict[str, Host] = {}
        self.trace = setup.work_dir / 'trace'

    def play(self, number: int) -> Result:
        """Play a sequence."""
        folder = self._setup.work_dir / 'images'
        folder.mkdir()
        with open(self.trace, 'w', encoding='utf-8') as trace:
            # Each wait has its own limit; this is for what nobody thought of
            faulthandler.dump_traceback_later(SEQUENCE_SECONDS, exit=True,
                                              file=trace)
            try:
                return self._play(number, folder, trace)
            finally:
                faulthandler.cancel_dump_traceback_later()
                shutil.rmtree(folder)
                # disks and their parts refer to each other, and are large
                gc.collect()

    def _play(self, number: int, folder: Path, trace: TextIO) -> Result:
        before = self._launch()
        seq = Sequence(self._hosts, self._images, folder,
                       f'{self._seed}/{number}', trace)
        try:
            play(seq)
            seq.stats.sequences = 1
            return Result(number, seq.stats)
        except Exception as exc:  # pylint: disable=broad-except
            return Result(number, seq.stats, self._report(exc), before)

    def _launch(self) -> int:
        """Start the hosts that do not run yet; how old is the oldest?"""
        for name in ('a', 'b'):
            if name not in self._hosts:
                self._hosts[name] = Host(self._setup, name)
                self._hosts[name].launch()
            self._hosts[name].served += 1
        return max(host.served for host in self._hosts.values()) - 1

    def _report(self, exc: BaseException) -> str:
        lines = [self.trace.read_text(encoding='utf-8')]
        if not isinstance(exc, FINDINGS):
            lines.append('The test itself has failed:')
        lines += [traceback.format_exc()]
        if isinstance(exc, (Hang, TimeoutError)):
            lines += [host.stacks() for host in self._hosts.values()]
        for host in self._hosts.values():
            log = host.log().splitlines()[-LOG_LINES:]
            lines += [f'log of host {host.name}, which ended with '
                      f'status {host.vm.exitcode()}:', *log, '']
        return '\n'.join(lines)

    def close(self) -> None:
        """End all hosts."""
        for host in self._hosts.values():
            if host.is_running():
                host.vm.kill()


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


def check_empty(host: Host) -> None:
    """Nothing is left behind."""
    for command in ('query-named-block-nodes', 'query-block-exports',
                    'query-jobs', 'query-block-jobs'):
        left = host.cmd(command)
        if left:
            raise Difference(f'{host.name}: {command} still has {left}')
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
