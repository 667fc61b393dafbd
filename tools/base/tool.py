# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a program of tools/, and say in one line what ends it from outside."""

import errno
import os
import runpy
import sys
from pathlib import Path

# What is not the program's fault: the disk, or who may write there
OUTSIDE = (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EISDIR, errno.EIO,
           errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM,
           errno.EROFS)


def describe(exc: OSError) -> str:
    """Name the path, and the variable if it is the cache's."""
    path = str(exc.filename or 'a file')
    cache = os.environ['QEMU_REPLICATION_CACHE']
    hint = ' (QEMU_REPLICATION_CACHE names another folder for the cache)' \
        if path == 'a file' or Path(cache) in Path(path).parents else ''
    return f'error: {path}: {exc.strerror}{hint}'


def main() -> None:
    """Run it as Python would."""
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # nobody reads on: Python would say so at the end once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as exc:
        if exc.errno not in OUTSIDE:
            raise
        sys.exit(describe(exc))


if __name__ == '__main__':
    main()
