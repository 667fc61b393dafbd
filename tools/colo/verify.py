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

from guest import TOOL_SECONDS, run_tool
from guesthost import BLOCK, Disks, fields

MAGIC = 0x4f4c4f436f6d6564
HEADER = struct.Struct('<QQQQ')


@dataclass
class Findings:
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

    @property
    def all_wrong(self) -> int:
        """Wrong blocks that the guest or the host has found."""
        return self.wrong + self.host_wrong

    def demand(self, true: bool, problem: str) -> None:
        """Note a problem unless something is true."""
        if not true:
            self.problems.append(problem)


def judge(report: List[str], images: List[Path], disks: Disks,
          scratch: Path) -> Findings:
    """Judge a survivor by its guest's report and by its images."""
    found = Findings()
    digests: List[str] = []
    for line in report:
        word = line.split(' ', 1)[0]
        if word in ('FAIL', 'WRONG'):
            found.problems.append(line)
        elif word == 'SQL':
            judge_sql(found, line)
        elif word == 'REGION':
            values = fields(line)
            found.blocks += int(values['blocks'])
            found.wrong += int(values['wrong'])
            digests.append(values['digest'])
    found.demand('CLEAN' in report, 'the guest did not shut down cleanly')
    found.demand(len(digests) == disks.count,
                 'the guest did not report on all its disks')
    found.demand(found.wrong == 0, 'the guest read wrong blocks')
    judge_file_system(found, images[0], scratch)
    judge_blocks(found, images, disks, digests)
    return found


def judge_sql(found: Findings, line: str) -> None:
    """Take in the guest's check of its database."""
    values = fields(line)
    found.integrity = values['integrity']
    found.committed = int(values['committed'])
    found.rows = int(values['rows'])
    found.wrong += int(values['wrong'])
    found.demand(found.integrity == 'ok', 'integrity_check failed')
    found.demand(found.rows == found.committed,
                 f'{found.committed} transactions committed, but '
                 f'{found.rows} found')


def judge_file_system(found: Findings, image: Path, scratch: Path) -> None:
    """Check the file system, and the database in it, from the host."""
    done = subprocess.run(['e2fsck', '-fn', str(image)], text=True,
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=TOOL_SECONDS,
                          check=False)
    found.e2fsck = 'clean' if done.returncode == 0 else \
        f'status {done.returncode}'
    found.demand(done.returncode == 0, f'e2fsck -fn: {done.stdout}')

    database = scratch / 'demo.db'
    run_tool(['debugfs', '-R', f'dump /demo.db {database}', str(image)])
    rows = run_tool(['sqlite3', '-readonly', str(database),
                     'PRAGMA integrity_check; SELECT count(*) FROM log;'])
    found.demand(rows.split() == ['ok', str(found.committed)],
                 f'the database, read by the host: {rows.split()}')


def judge_blocks(found: Findings, images: List[Path], disks: Disks,
                 digests: List[str]) -> None:
    """Check every numbered block of the images against itself.

    The digest, over the generations of all blocks, ties them to the guest's
    memory.
    """
    for image, region, digest in zip(images, disks.regions, digests):
        _, first, blocks, _ = region.split(':')
        generations = []
        with image.open('rb') as stream:
            stream.seek(int(first) * BLOCK)
            for number in range(int(blocks)):
                block = stream.read(BLOCK)
                generations.append(generation(block, number))
        found.host_blocks += len(generations)
        found.host_wrong += generations.count(0)
        packed = struct.pack(f'<{len(generations)}I', *generations)
        found.demand(f'{zlib.crc32(packed):08x}' == digest,
                     f"{image.name} is not what the guest's memory says")
    found.demand(found.host_wrong == 0,
                 f'{found.host_wrong} blocks of the images are damaged')


def generation(block: bytes, number: int) -> int:
    """Return a block's generation, or 0 (never written) if it is damaged."""
    magic: int
    written: int
    magic, place, written, crc = HEADER.unpack_from(block)
    plain = block[:24] + bytes(8) + block[32:]
    good = (magic == MAGIC and place == number and zlib.crc32(plain) == crc)
    return written if good else 0
