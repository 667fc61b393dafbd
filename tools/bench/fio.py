# SPDX-License-Identifier: GPL-2.0-or-later
"""Load by fio on an NBD export."""

import json
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from monitor import SECONDS, BenchError
from place import Place
from server import Export

POLL = 0.01
PERCENTILES = {'p50': '50.000000', 'p99': '99.000000'}


class Job(NamedTuple):
    """One load, after those before it."""
    name: str
    options: Dict[str, Any]


class Speed(NamedTuple):
    """How a load went."""
    iops: float
    p50: float
    p99: float


def _words(options: Dict[str, Any]) -> List[str]:
    return [f'--{name}' if value is True else f'--{name}={value}'
            for name, value in options.items()]


def _command(place: Place, export: Export, jobs: List[Job]) -> List[str]:
    words = ['fio', '--eta=never', '--thread', '--ioengine=nbd',
             f'--uri={export.uri}', '--output-format=json', '--norandommap',
             # fio calibrates the other clock for 0.3 s
             '--clocksource=clock_gettime']
    for job in jobs:
        words += [f'--name={job.name}', '--stonewall', *_words(job.options)]
    return place.command(words, place.near)


def _speed(result: Dict[str, Any]) -> Speed:
    figures = result['write' if result['write']['total_ios'] else 'read']
    at = figures['clat_ns'].get('percentile', {})
    return Speed(figures['iops'],
                 *(at.get(name, 0) / 1000 for name in PERCENTILES.values()))


def load(place: Place, export: Export, jobs: List[Job],
         watch: Optional[Callable[[], None]] = None) -> Dict[str, Speed]:
    """Run jobs one after the other; meanwhile, call watch."""
    process = subprocess.Popen(_command(place, export, jobs),
                               stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + SECONDS
        while watch and process.poll() is None:
            watch()
            if time.monotonic() > deadline:
                raise BenchError('fio does not end')
            time.sleep(POLL)
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired as exc:
        raise BenchError('fio does not end') from exc
    finally:
        process.kill()
        process.wait(SECONDS)
    if process.returncode != 0:
        raise BenchError(f'fio: {(errors or output).strip()[-500:]}')
    # it greets the server first
    if '{' not in output:
        raise BenchError('fio tells nothing')
    results = json.loads(output[output.index('{'):])['jobs']
    for result in results:
        if result['error']:
            raise BenchError(f"fio: error {result['error']} in "
                             f"{result['jobname']}")
    return {result['jobname']: _speed(result) for result in results}


class Blocks:
    """Blocks of a disk in a random order, each once, and the rest of it."""

    def __init__(self, folder: Path, size: int, cluster: int, block: int,
                 count: int) -> None:
        offsets = list(range(0, size, cluster))
        Random(1).shuffle(offsets)
        self._block = block
        self.count = count
        self.data = count * block
        self._chosen = self._write(folder / f'write-{count}', 'write',
                                   offsets[:count])
        self._read = self._write(folder / f'read-{count}', 'read',
                                 offsets[:count])
        self._others = self._write(folder / f'others-{count}', 'read',
                                   offsets[count:2 * count])

    def _write(self, path: Path, kind: str, offsets: List[int]) -> Path:
        lines = ['fio version 2 iolog', 'nbd add', 'nbd open',
                 *(f'nbd {kind} {offset} {self._block}'
                   for offset in offsets), 'nbd close', '']
        path.write_text('\n'.join(lines))
        return path

    def write(self, name: str, depth: int) -> Job:
        """Write all chosen blocks."""
        return Job(name, {'read_iolog': self._chosen, 'iodepth': depth})

    def read(self, name: str, depth: int) -> Job:
        """Read all chosen blocks."""
        return Job(name, {'read_iolog': self._read, 'iodepth': depth})

    def read_others(self, name: str, depth: int) -> Job:
        """Read as many other blocks."""
        return Job(name, {'read_iolog': self._others, 'iodepth': depth})
