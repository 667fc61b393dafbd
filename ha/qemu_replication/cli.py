# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line, which asks the keeper of this host."""

import argparse
import asyncio
import fcntl
import json
import logging
import os
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Iterator, List, Optional

from . import check
from .config import Config, ConfigError, Json, config_path, load
from .client import DONE, FAILED, NO_KEEPER, WRONG, ask
from .control import Commands, Control
from .errors import Failed
from .keeper import Keeper

HELP = {
    'check': 'look for what is wrong with the configuration and this host',
    'keeper': 'keep the VM protected: the service, one on each host',
    'status': 'tell how it is: exit status 0 if the VM is protected, 1 if '
              'that is in doubt, 2 if not, 3 without a keeper',
    'watch': 'watch replication live in the terminal',
}
FORCE = {
    'protect': 'force', 'standby': 'force', 'stop': 'force',
    'failover': 'peer-is-down', 'alone': 'peer-is-down'}
FORCE_HELP = {
    'force': 'even if data may be lost by that',
    'peer-is-down': 'you vouch for it that the VM does not run on the other '
                    'host: that is powered off, or cannot come back'}
STATUSES = '''exit status: 0 done, 1 failed, 2 wrong command line or
configuration, 3 no keeper, 4 refused, 5 not done in time'''
DOUBTFUL, UNPROTECTED = 1, 2
# In a checkout, and where it was installed
TOPS = ('../../tools/top/top.py', '../top/top.py')


def parse(words: List[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog='qemu-replication', description='Protect a VM by a second host '
        'that goes on with it.', epilog=STATUSES)
    commands = parser.add_subparsers(dest='command', required=True,
                                     metavar='COMMAND')
    texts = {name: (getattr(Commands, name).__doc__ or '').rstrip('.')
             for name in ('protect', 'standby', 'failover', 'alone', 'switch',
                          'stop', 'demote', 'quit')}
    for name, text in {**texts, **HELP}.items():
        command = commands.add_parser(name, help=text, description=text,
                                      epilog=STATUSES)
        command.add_argument('vm', metavar='VM', help='its name, or the path '
                             'of its configuration')
        command.add_argument('--host', default='', metavar='NAME', help='the '
                             'name of this host in there (its host name)')
        if name in FORCE:
            command.add_argument(f'--{FORCE[name]}', dest='force',
                                 action='store_true',
                                 help=FORCE_HELP[FORCE[name]])
        if name == 'protect':
            command.add_argument('--no-wait', action='store_true',
                                 help='until the VM runs, not until it is '
                                 'protected')
        if name == 'status':
            command.add_argument('--json', action='store_true',
                                 help='all that there is to know')
            command.add_argument('--max-age', type=float, default=60.0,
                                 metavar='S', help='when the last checkpoint '
                                 'is longer ago, it is in doubt (60 s)')
    return parser.parse_args(words)


def no_keeper(config: Config, exc: OSError) -> int:
    """Say so, and who starts it; or that it may not be asked."""
    if isinstance(exc, PermissionError):
        print(f'error: {config.control}: {exc.strerror}: only root may ask',
              file=sys.stderr)
        return FAILED
    if isinstance(exc, TimeoutError):
        print(f'error: the keeper of {config.vm.name} on {config.here} does '
              'not answer', file=sys.stderr)
        return FAILED
    starter = 'Pacemaker starts it' if config.cluster.resource \
        else f'start qemu-replication@{config.path.stem}'
    print(f'error: no keeper of {config.vm.name} on {config.here} '
          f'({exc.strerror or exc}): {starter}', file=sys.stderr)
    return NO_KEEPER


def order(config: Config, options: argparse.Namespace) -> int:
    """Have the keeper do something, and print what it says."""
    request = {'command': options.command,
               'force': getattr(options, 'force', False),
               'wait': not getattr(options, 'no_wait', False)}
    try:
        for answer in ask(config, request):
            if 'status' in answer:
                return int(answer['status'])
            print(answer['say'], flush=True)
    except OSError as exc:
        return no_keeper(config, exc)
    print('error: the keeper has ended', file=sys.stderr)
    return FAILED


def age(told: Json) -> float:
    """How old the last checkpoint is."""
    return max((float(disk['checkpoint-age']) for disk in told['disks']
                if disk['protects']), default=0.0)


def lines(told: Json) -> Iterator[str]:
    """A side, for people."""
    since = time.strftime('%F %H:%M:%S', time.localtime(told['since']))
    yield f'{told["host"]}: {told["says"]} ({told["state"]}, since {since})'
    if told['progress']:
        yield f'    {told["progress"]}'
    if told['problem']:
        yield f'    {told["problem"]}'
    if not told['protected']:
        if told['why']:
            yield f'    because: {told["why"]}'
        for disk in told['disks']:
            if disk['unprotected'] and told['role'] == 'primary':
                yield f'    {disk["node"]}: {disk["unprotected"]}'


def status(config: Config, options: argparse.Namespace) -> int:
    """Tell how it is."""
    try:
        told = next(ask(config, {'command': 'status'}))
    except (OSError, StopIteration) as exc:
        return no_keeper(config, exc if isinstance(exc, OSError)
                         else OSError('it has ended'))
    other = told['other']
    good = told['protected']
    doubt = good and (age(told) > options.max_age
                      or not other.get('protected', False))
    if options.json:
        print(json.dumps(told, indent=1))
    else:
        print(f'{told["vm"]}: '
              + (f'PROTECTED, last checkpoint {age(told):.1f} s ago'
                 + (', but the other side is in doubt' if doubt else '')
                 if good else 'NOT PROTECTED'))
        for line in lines(told):
            print(line)
        if 'state' in other:
            for line in lines(other):
                print(line)
        else:
            print(f'{told["peer"]}: {other["problem"]}')
    return DOUBTFUL if doubt else DONE if good else UNPROTECTED


def watch(config: Config) -> int:
    """The view of ./run top."""
    for place in TOPS:
        path = Path(__file__).resolve().parent / place
        if path.exists():
            sys.argv = ['qemu-replication watch',
                        str(config.run / 'top.sock')]
            sys.path.insert(0, str(path.parent))
            runpy.run_path(str(path), run_name='__main__')
    print('error: the watcher was not installed', file=sys.stderr)
    return FAILED


def _busy_folder(config: Config) -> Optional[Path]:
    """Take both folders until the end; one that another keeper has."""
    for folder in {config.run, config.state}:
        try:
            fcntl.flock(os.open(folder, os.O_RDONLY),
                        fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return folder
    return None


async def _keep(config: Config) -> None:
    keeper = Keeper(config)
    await Control(keeper).serve()
    running = asyncio.ensure_future(keeper.run())
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        # as it was told
        pass


def keep(config: Config) -> int:
    """Be the keeper, until told to end; QEMU goes on."""
    logging.basicConfig(
        level=logging.INFO, format=f'%(asctime)s {config.vm.name} on '
        f'{config.here}: %(message)s')
    # its modules log each connection that has ended
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    # what the guest has, and has said, is for nobody else on this host
    os.umask(0o077)
    try:
        busy = _busy_folder(config)
        if busy:
            raise Failed(f'{busy}: a keeper of {config.vm.name} runs already')
        asyncio.run(_keep(config))
    except (OSError, Failed) as exc:
        print(f'error: {exc}', file=sys.stderr)
        return FAILED
    return DONE


def main(words: List[str]) -> int:
    """Do what the command line says."""
    options = parse(words)
    try:
        config = load(config_path(options.vm), options.host)
    except ConfigError as exc:
        print(f'error: {exc}', file=sys.stderr)
        return WRONG
    if options.command in ('check', 'keeper'):
        found = list(check.problems(config, options.command == 'check'))
        for problem in found:
            print(f'error: {config.path}: {problem}', file=sys.stderr)
        if options.command == 'check':
            return WRONG if found else DONE
        # whoever stops the QEMU that is there needs a keeper for it
        if found and not check.running_qemu(config):
            return WRONG
        return keep(config)
    if options.command == 'status':
        return status(config, options)
    if options.command == 'watch':
        return watch(config)
    return order(config, options)
