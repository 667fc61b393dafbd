#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Write this project's driver as a series of patches to QEMU."""

import argparse
from pathlib import Path
import sys

import compose
from gitrepo import Failure


def main() -> int:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(prog='./run series', description=__doc__)
    compose.add_arguments(parser)
    parser.add_argument('-o', '--output', type=Path, required=True,
                        metavar='DIR', help='the folder to write to')
    parser.add_argument('-s', '--signoff', action='store_true',
                        help='sign each patch off, as the user that git is '
                        'configured for')
    args = parser.parse_args()
    try:
        series = compose.make(args.cache, compose.base_of(args), args.output,
                              args.signoff)
    except Failure as failure:
        print(f'error: {failure}', file=sys.stderr)
        return 1
    print(f'[series] {len(series.patches)} patches and a cover letter for '
          f'QEMU {compose.version_of(args.pristine)}', file=sys.stderr)
    print(args.output)
    return 0


if __name__ == '__main__':
    sys.exit(main())
