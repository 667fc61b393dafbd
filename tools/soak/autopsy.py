# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a QEMU does not go on: the stacks of its threads."""

import re
import subprocess

GDB_TIMEOUT = 120

# A function of the block layer or of a driver, and one of COLO's own.
_BLOCK = re.compile(r'\b(replication_|bdrv_|blk_|block_job_|job_|backup_|'
                    r'commit_|mirror_|nbd_|quorum_|qcow2_|raw_co_)\w+ \(')
_COLO = re.compile(r'\b(colo_|migration_|qemu_loadvm_|qemu_savevm_)\w+ \(')


def backtrace(pid: int) -> str:
    """Return the stacks of all threads of a process."""
    try:
        done = subprocess.run(
            ['gdb', '-p', str(pid), '-batch', '-nx',
             '-ex', 'set debuginfod enabled off',
             '-ex', 'thread apply all backtrace'],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=GDB_TIMEOUT,
            check=False)
    except FileNotFoundError:
        return 'gdb is not installed: no backtrace'
    except subprocess.TimeoutExpired:
        return f'gdb took more than {GDB_TIMEOUT} s: no backtrace'
    return done.stdout


def colo_gave_up(stacks: str) -> str:
    """Return where in COLO's own code a thread waits, or nothing.

    It is COLO's own doing only if no thread is in the block layer too.
    """
    if _BLOCK.search(stacks):
        return ''
    for stack in re.split(r'^Thread ', stacks, flags=re.MULTILINE):
        found = _COLO.search(stack)
        if found:
            return found[0].rstrip(' (')
    return ''
