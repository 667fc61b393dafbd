# SPDX-License-Identifier: GPL-2.0-or-later
"""Load by fio on an NBD export."""

import json
import subprocess
from pathlib import Path
from random import Random
from typing import Any, Dict, NamedTuple

from host import SECONDS, HostError
from hosts import Place, TimedHost


class Run(NamedTuple):
    """One load, after those before it."""
    name: str
    options: Dict[str, Any]


def load(place: Place, host: TimedHost, export: str, *jobs: Run
         ) -> Dict[str, float]:
    """Run jobs one after the other; return the requests a second of each."""
    command = ['setpriv', '--pdeathsig', 'KILL', 'fio', '--eta=never',
               '--thread', '--ioengine=nbd', f'--uri={host.uri(export)}',
               '--output-format=json', '--norandommap',
               # fio calibrates the other clock for 0.3 s
               '--clocksource=clock_gettime']
    if place.near is not None:
        command[:0] = ['taskset', '-c', str(place.near)]
    for job in jobs:
        command += [f'--name={job.name}', '--stonewall', *(
            f'--{name}={value}' for name, value in job.options.items())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True,
                          capture_output=True, timeout=SECONDS, check=False)
    # it greets the server first
    if done.returncode or '{' not in done.stdout:
        raise HostError(f'fio: {(done.stderr or done.stdout)[-500:]}')
    results = json.loads(done.stdout[done.stdout.index('{'):])['jobs']
    for result in results:
        if result['error']:
            raise HostError(f"fio: error {result['error']} in "
                            f"{result['jobname']}")
    return {result['jobname']: result['write']['iops'] for result in results}


class Arrival(NamedTuple):
    """Writes that come from the primary."""
    title: str
    options: Dict[str, Any]
    # how many bytes they are
    data: int

    def job(self, name: str) -> Run:
        """The same for fio."""
        return Run(name, self.options)


def in_a_row(block: int, depth: int, data: int) -> Arrival:
    """Blocks in a row."""
    return Arrival(f'{block // 1024} KiB sequential, depth {depth}', {
        'rw': 'write', 'bs': block, 'iodepth': depth, 'size': data}, data)


def scattered(folder: Path, size: int, cluster: int, count: int, depth: int
              ) -> Arrival:
    """A block of 4 KiB in some clusters, in a random order, each once."""
    path = folder / f'blocks-{cluster}-{count}'
    if not path.exists():
        offsets = list(range(0, size, cluster))
        Random(1).shuffle(offsets)
        path.write_text('\n'.join([
            'fio version 2 iolog', 'nbd add', 'nbd open',
            *(f'nbd write {offset} 4096' for offset in offsets[:count]),
            'nbd close', '']))
    return Arrival(f'4 KiB random, depth {depth}',
                   {'read_iolog': path, 'iodepth': depth}, 4096 * count)
