# SPDX-License-Identifier: GPL-2.0-or-later
"""The judgement: what the guest found, and what its disks hold on the host.

The guest compares all that it wrote with its own memory.  The host then looks
at the images without the guest: file system, database, numbered blocks.
"""

import struct
import subprocess
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import List

from console import fields
from guest import run_tool, TOOL_TIMEOUT
from machine import BLOCK, Layout

MAGIC = 0x4f4c4f436f6d6564
HEADER = struct.Struct('<QQQQ')


@dataclass
class Verdict:
    """What was checked and what was found; problems says what is wrong."""
    integrity: str = 'not checked'
    committed: int = 0
    rows: int = 0
    e2fsck: str = 'not checked'
    blocks: int = 0
    wrong: int = 0
    host_blocks: int = 0
    host_wrong: int = 0
    problems: List[str] = field(default_factory=list)

    def demand(self, true: bool, problem: str) -> None:
        """Note a problem unless something is true."""
        if not true:
            self.problems.append(problem)


def judge(report: List[str], images: List[Path], layout: Layout,
          scratch: Path) -> Verdict:
    """Judge a survivor by its guest's report and by its images."""
    verdict = Verdict()
    digests: List[str] = []
    for line in report:
        word = line.split(' ', 1)[0]
        if word in ('FAIL', 'WRONG'):
            verdict.problems.append(line)
        elif word == 'SQL':
            judge_sql(verdict, line)
        elif word == 'REGION':
            values = fields(line)
            verdict.blocks += int(values['blocks'])
            verdict.wrong += int(values['wrong'])
            digests.append(values['digest'])
    verdict.demand('CLEAN' in report, 'the guest did not shut down cleanly')
    verdict.demand(len(digests) == layout.disks,
                   'the guest did not report on all its disks')
    verdict.demand(verdict.wrong == 0, 'the guest read wrong blocks')
    judge_file_system(verdict, images[0], scratch)
    judge_blocks(verdict, images, layout, digests)
    return verdict


def judge_sql(verdict: Verdict, line: str) -> None:
    """Take in the guest's check of its database."""
    values = fields(line)
    verdict.integrity = values['integrity']
    verdict.committed = int(values['committed'])
    verdict.rows = int(values['rows'])
    verdict.wrong += int(values['wrong'])
    verdict.demand(verdict.integrity == 'ok', 'integrity_check failed')
    verdict.demand(verdict.rows == verdict.committed,
                   f'{verdict.committed} transactions committed, but '
                   f'{verdict.rows} found')


def judge_file_system(verdict: Verdict, image: Path, scratch: Path) -> None:
    """Check the file system, and the database in it, from the host."""
    done = subprocess.run(['e2fsck', '-fn', str(image)], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=TOOL_TIMEOUT,
                          check=False)
    verdict.e2fsck = 'clean' if done.returncode == 0 else \
        f'status {done.returncode}'
    verdict.demand(done.returncode == 0, f'e2fsck -fn: {done.stdout}')

    database = scratch / 'demo.db'
    run_tool(['debugfs', '-R', f'dump /demo.db {database}', str(image)])
    found = run_tool(['sqlite3', '-readonly', str(database),
                      'PRAGMA integrity_check; SELECT count(*) FROM log;'])
    verdict.demand(found.split() == ['ok', str(verdict.committed)],
                   f'the database, read by the host: {found.split()}')


def judge_blocks(verdict: Verdict, images: List[Path], layout: Layout,
                 digests: List[str]) -> None:
    """Check every numbered block of the images against itself.

    The digest, over the generations of all blocks, ties them to the guest's
    memory.
    """
    for image, region, digest in zip(images, layout.regions, digests):
        _, first, blocks = region.split(':')
        generations = []
        with image.open('rb') as stream:
            stream.seek(int(first) * BLOCK)
            for number in range(int(blocks)):
                block = stream.read(BLOCK)
                generations.append(generation(block, number))
        verdict.host_blocks += len(generations)
        verdict.host_wrong += generations.count(0)
        packed = struct.pack(f'<{len(generations)}I', *generations)
        verdict.demand(f'{zlib.crc32(packed):08x}' == digest,
                       f"{image.name} is not what the guest's memory says")
    verdict.demand(verdict.host_wrong == 0,
                   f'{verdict.host_wrong} blocks of the images are damaged')


def generation(block: bytes, number: int) -> int:
    """Return a block's generation, or 0 (never written) if it is damaged."""
    magic: int
    written: int
    magic, found, written, crc = HEADER.unpack_from(block)
    plain = block[:24] + bytes(8) + block[32:]
    good = (magic == MAGIC and found == number and zlib.crc32(plain) == crc)
    return written if good else 0
