# SPDX-License-Identifier: GPL-2.0-or-later
"""Why a QEMU does not go on: its threads, and what its block layer does."""

import subprocess
from pathlib import Path

from qemu import machine

from host import Host

GDB_SECONDS = 120
GDB_SCRIPTS = [Path(machine.__file__).parents[3] / 'scripts' / 'qemu-gdb.py',
               Path(__file__).with_name('autopsy_gdb.py')]


def stacks(host: Host) -> str:
    """The stacks of threads and coroutines, nodes, jobs, if it runs."""
    if not host.is_running():
        return ''
    scripts = [arg for path in GDB_SCRIPTS for arg in ('-x', str(path))]
    try:
        return subprocess.run(
            ['gdb', '-p', str(host.get_pid()), '-batch', '-nx',
             '-ex', 'set debuginfod enabled off', '-ex', 'set width 0',
             '-ex', 'thread apply all backtrace', *scripts],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=GDB_SECONDS,
            check=False).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired) as exc:
        return f'no stacks: {exc}'
