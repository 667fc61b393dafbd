#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0-or-later
"""Break protected VMs at random instants, and look for damage.

Each round protects a guest with COLO and breaks something: a side is killed
or goes silent, or the link that carries the disk writes is cut, at a random
instant before, in or after a checkpoint.  The guest, which knows all that it
wrote, must go on with not a block wrong.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A unix socket's path has room for 107 bytes; ours adds folders and a name.
MAX_WORK_DIR = 75
KILLS = 50


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--build-dir', type=Path, required=True,
                        metavar='DIR', help='folder of the built QEMU')
    parser.add_argument('--qemu-src', type=Path, required=True,
                        metavar='DIR', help='folder of the QEMU source')
    parser.add_argument('--cache', type=Path, required=True, metavar='DIR',
                        help='folder that keeps the guest between runs')
    parser.add_argument('--seed', type=int, metavar='N',
                        help='repeat the run that printed this seed')
    parser.add_argument('--kills', type=int, metavar='K',
                        help='end after so many rounds (default: '
                        f'{KILLS}, or no limit with --minutes)')
    parser.add_argument('--minutes', type=float, metavar='M',
                        help='begin no round after this time')
    parser.add_argument('--round', type=int, metavar='I',
                        help='only this round of the seed, on a new guest')
    parser.add_argument('--write-behind', choices=('random', 'on', 'off'),
                        default='random', help='whether the guest\'s writes '
                        'do not wait for the secondary (default: random, for '
                        'each round)')
    parser.add_argument('--accel', choices=('auto', 'kvm', 'tcg'),
                        default='auto', help='default: KVM where it works')
    parser.add_argument('--work-dir', type=Path, metavar='DIR',
                        help='where the images go (default: the system\'s '
                        'folder for temporary files)')
    options = parser.parse_args()
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1 << 31)
    if options.kills is None and options.minutes is None:
        options.kills = KILLS
    return options


def run(options: argparse.Namespace, work: Path) -> bool:
    """Run the campaign in a folder; return whether all went well."""
    # QEMU logs its own death by a signal with its whole command line.
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    # pylint: disable=import-outside-toplevel
    from chaos_campaign import Campaign
    from signals import held, install

    install()
    campaign = Campaign(options, work)
    try:
        return campaign.run()
    finally:
        with held():
            campaign.close()


def main() -> int:
    """Make room for a run, do it, and clean up."""
    options = parse()
    sys.path[:0] = [str(HERE.parent / 'demo'),
                    str(options.qemu_src / 'python')]
    print(f'seed {options.seed}', flush=True)
    work = Path(tempfile.mkdtemp(prefix='chaos-', dir=options.work_dir))
    keep = False
    try:
        if len(str(work)) > MAX_WORK_DIR:
            print(f'error: {work} is too long for the path of a socket',
                  file=sys.stderr)
            return 2
        keep = not run(options, work)
        return int(keep)
    except Exception:
        keep = True
        raise
    finally:
        if keep:
            print(f'images and logs: {work}', flush=True)
        else:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == '__main__':
    sys.exit(main())
