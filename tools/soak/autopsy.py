# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a QEMU does not go on: its threads, and what its block layer does."""

import re
import subprocess
from pathlib import Path

from qemu import machine

GDB_TIMEOUT = 120
GDB_SCRIPTS = [Path(machine.__file__).parents[3] / 'scripts' / 'qemu-gdb.py',
               Path(__file__).with_name('autopsy_gdb.py')]
# Printed by the second one between the stacks of threads and of coroutines
_END_OF_THREADS = 'Block layer:'

# A function of the block layer or of a driver, and one of COLO's own.
_BLOCK = re.compile(r'\b(replication_|bdrv_|blk_|block_job_|job_|backup_|'
                    r'commit_|mirror_|nbd_|quorum_|qcow2_|raw_co_)\w+ \(')
_COLO = re.compile(r'\b(colo_|migration_|qemu_loadvm_|qemu_savevm_)\w+ \(')


def backtrace(pid: int) -> str:
    """Return the stacks of all threads of a QEMU, and of its coroutines."""
    scripts = [arg for path in GDB_SCRIPTS for arg in ('-x', str(path))]
    try:
        done = subprocess.run(
            ['gdb', '-p', str(pid), '-batch', '-nx',
             '-ex', 'set debuginfod enabled off',
             '-ex', 'set width 0',
             '-ex', 'thread apply all backtrace', *scripts],
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
    threads = stacks.partition(_END_OF_THREADS)[0]
    if _BLOCK.search(threads):
        return ''
    for stack in re.split(r'^Thread ', threads, flags=re.MULTILINE):
        found = _COLO.search(stack)
        if found:
            return found[0].rstrip(' (')
    return ''
