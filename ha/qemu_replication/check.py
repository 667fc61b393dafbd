# SPDX-License-Identifier: GPL-2.0-or-later
"""What this machine has to have before anything is started."""

import errno
import ipaddress
import json
import os
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Iterator, List

from .config import Config, Disk, Json

TOOL_SECONDS = 30.0
# The path of a unix socket
MAX_PATH = 107
# What the keeper says itself, or is another way to say that
RESERVED = ('-name', '-blockdev', '-drive', '-hda', '-hdb', '-hdc', '-hdd',
            '-sd', '-mtdblock', '-pflash', '-fda', '-fdb', '-netdev', '-net',
            '-nic', '-incoming', '-loadvm', '-preconfig', '-daemonize',
            '-pidfile', '-S', '-snapshot')
# How long Pacemaker waits for each action of the agent, in seconds
TIMEOUTS = {'start': 90, 'stop': 120, 'promote': 120, 'demote': 120,
            'monitor': 30, 'validate-all': 60, 'meta-data': 5}
# Of a limit, the action that may take so long, and how often, and how long
# that may take besides
LIMITED = {'start': ('start', 1, 30), 'failover': ('promote', 2, 0),
           'answer': ('stop', 1, 80)}
NEEDED = ('x-block-replica-sync', 'x-block-replica-detach',
          'x-colo-lost-heartbeat', 'yank')
_TLS_FILES = {
    'none': (), 'psk': ('keys.psk',),
    'x509': ('ca-cert.pem', 'server-cert.pem', 'server-key.pem',
             'client-cert.pem', 'client-key.pem')}


def problems(config: Config, ports: bool = True) -> Iterator[str]:
    """All that is wrong here, a line each.

    The ports are in use while the VM's QEMU runs.
    """
    yield from _addresses(config)
    yield from _programs(config)
    for word in config.vm.arguments:
        if word.replace('--', '-', 1) in RESERVED:
            yield (f'[vm]: arguments may not have {word}: disks, network and '
                   'how it is started are said elsewhere')
    yield from _folders(config)
    for disk in config.disks:
        yield from _disk(config, disk)
    yield from _tls(config)
    yield from _network(config)
    if config.cluster.resource:
        yield from _limits(config)
    if ports and not running_qemu(config):
        yield from _ports(config)


def _limits(config: Config) -> Iterator[str]:
    """Pacemaker ends what takes longer, and then QEMU."""
    for name, (action, times, rest) in LIMITED.items():
        most = (TIMEOUTS[action] - rest) / times
        if getattr(config.limits, name) > most:
            yield (f'[limits]: {name} may be {most:g} at most: Pacemaker '
                   f'waits {TIMEOUTS[action]} s for "{action}"')


def _addresses(config: Config) -> Iterator[str]:
    for name, host in config.hosts.items():
        try:
            address = ipaddress.ip_address(host.address)
        except ValueError:
            yield f'[host.{name}]: "{host.address}" is not an IP address'
            continue
        if address.is_unspecified or address.is_multicast:
            yield f'[host.{name}]: {host.address} is no address of one host'
        if name == config.here:
            problem = _cannot_listen(host.address, 0)
            if problem == errno.EADDRNOTAVAIL:
                yield (f'[host.{name}]: {host.address} is not an address of '
                       'this machine')


def _cannot_listen(address: str, port: int) -> int:
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
            probe.listen()
        except socket.gaierror:
            # no address at all: that is said elsewhere
            return errno.EADDRNOTAVAIL
        except OSError as exc:
            return exc.errno or errno.EIO
    return 0


def _ports(config: Config) -> Iterator[str]:
    for name, port in vars(config.ports).items():
        if name == 'keeper':
            # the keeper itself has it
            continue
        problem = _cannot_listen(config.address, port)
        if problem and problem != errno.EADDRNOTAVAIL:
            yield (f'[ports]: {name}: {config.address}:{port}: '
                   f'{os.strerror(problem)}')


def qemu_img(config: Config) -> str:
    """The tool that belongs to the QEMU."""
    qemu = shutil.which(config.vm.qemu) or config.vm.qemu
    return str(Path(qemu).with_name('qemu-img'))


def _programs(config: Config) -> Iterator[str]:
    found = shutil.which(config.vm.qemu)
    if not found:
        yield f'[vm]: qemu: there is no program {config.vm.qemu}'
        return
    if not os.access(qemu_img(config), os.X_OK):
        yield f'[vm]: qemu: there is no {qemu_img(config)} beside it'
    told = _commands(found)
    missing = [name for name in NEEDED if name not in told]
    if missing:
        yield (f'[vm]: {found} is not a QEMU with this replication driver: '
               f'it has no {missing[0]}')


def _commands(qemu: str) -> List[str]:
    """The QMP commands that a QEMU has."""
    asked = ''.join(json.dumps({'execute': name}) for name in (
        'qmp_capabilities', 'query-commands', 'quit'))
    try:
        told = subprocess.run(
            [qemu, '-machine', 'none', '-nodefaults', '-no-user-config', '-S',
             '-display', 'none', '-qmp', 'stdio'], input=asked, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
            timeout=TOOL_SECONDS).stdout
        return [command['name'] for line in told.splitlines()
                for answer in [json.loads(line).get('return')]
                if isinstance(answer, list) for command in answer]
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return []


def running_qemu(config: Config) -> int:
    """The process of the VM's QEMU here, whoever started it; 0 if none.

    It writes its pidfile late, and leaves it when it is killed.
    """
    mark = b'\0-pidfile\0' + os.fsencode(config.run / 'qemu.pid') + b'\0'
    for path in Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if mark in path.read_bytes():
                return int(path.parent.name)
        except OSError:
            # it has ended
            pass
    return 0


def _folders(config: Config) -> Iterator[str]:
    for folder in (config.run, config.state):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            yield f'{folder}: {exc.strerror}'
            continue
        if not os.access(folder, os.W_OK):
            yield f'{folder}: cannot be written to'
    longest = config.run / 'compare0.sock'
    if len(str(longest)) > MAX_PATH:
        yield f'run: {config.run} is too long for the path of a socket'


def image(config: Config, disk: Disk) -> Json:
    """What qemu-img says of a disk; an error has the key "error"."""
    try:
        told = subprocess.run(
            [qemu_img(config), 'info', '-U', '--output=json', '-f',
             disk.format, disk.file], stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, check=False,
            timeout=TOOL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return {'error': str(exc)}
    if told.returncode:
        lines = told.stderr.strip().splitlines()
        return {'error': lines[-1] if lines else 'qemu-img failed'}
    return dict(json.loads(told.stdout))


def _disk(config: Config, disk: Disk) -> Iterator[str]:
    for folder in sorted({Path(disk.file).parent, disk.overlay_folder,
                          disk.metadata_file.parent}):
        if not os.access(folder, os.W_OK):
            yield f'[[disk]] {disk.file}: {folder} cannot be written to'
    if Path(disk.file).is_block_device() \
            and not (disk.overlays and disk.metadata):
        yield (f'[[disk]] {disk.file}: it is a device: say in which folder '
               'its overlays are, and in which file its metadata')
    # a host that is to stand by makes it
    if not os.path.exists(disk.file) or not os.access(qemu_img(config),
                                                      os.X_OK):
        return
    told = image(config, disk)
    if 'error' in told:
        yield f'[[disk]] {disk.file}: {told["error"]}'
    elif told['virtual-size'] != disk.bytes:
        yield (f'[[disk]] {disk.file}: its size is {told["virtual-size"]} '
               f'bytes, and not {disk.size}, which is {disk.bytes}')
    elif 'backing-filename' in told:
        yield (f'[[disk]] {disk.file}: it is an overlay of '
               f'{told["backing-filename"]}: commit or convert it')


def _tls(config: Config) -> Iterator[str]:
    for name in _TLS_FILES[config.tls.kind]:
        path = Path(config.tls.dir) / name
        if not os.access(path, os.R_OK):
            yield f'[tls]: {path}: no such file, or it cannot be read'
        elif 'key' in name and path.stat().st_mode & 0o077:
            yield f'[tls]: {path}: others may read it: chmod 600'
    if config.tls.kind == 'psk' and not psk(config):
        yield (f'[tls]: {config.tls.dir}/keys.psk: there is no line "qemu:" '
               'and 64 hexadecimal digits')
    if config.tls.kind == 'x509' and all(
            os.access(Path(config.tls.dir) / name, os.R_OK)
            for name in _TLS_FILES['x509']):
        yield from _certificates(config)


def tls_context(config: Config, end: str) -> ssl.SSLContext:
    """Of certificates; who connects has to have one, too."""
    folder = Path(config.tls.dir)
    context = ssl.create_default_context(
        ssl.Purpose.CLIENT_AUTH if end == 'server'
        else ssl.Purpose.SERVER_AUTH, cafile=str(folder / 'ca-cert.pem'))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(folder / f'{end}-cert.pem',
                            folder / f'{end}-key.pem')
    return context


def _certificates(config: Config) -> Iterator[str]:
    """What a peer with the same CA would say of this host's."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        ends = (('server', tls_context(config, 'client').wrap_bio(
            to_client, to_server, server_hostname=config.address)),
            ('client', tls_context(config, 'server').wrap_bio(
                to_server, to_client, server_side=True)))
    except OSError as exc:
        yield f'[tls]: the files in {config.tls.dir}: {exc}'
        return
    for other, end in ends * 2:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            # it is the other one's turn
            pass
        except ssl.SSLError as exc:
            why = getattr(exc, 'verify_message', '') or exc
            yield f'[tls]: {config.tls.dir}/{other}-cert.pem: {why}'
            return


def psk(config: Config) -> bytes:
    """The key that both hosts have; nothing, if there is none."""
    try:
        for line in (Path(config.tls.dir) / 'keys.psk').read_text(
                'utf-8').splitlines():
            user, _, digits = line.partition(':')
            if user == 'qemu' and len(digits) >= 32:
                return bytes.fromhex(digits)
    except (OSError, ValueError):
        # problems() tells
        pass
    return b''


def _network(config: Config) -> Iterator[str]:
    words = dict(word.partition('=')[::2]
                 for word in config.network.netdev.split(','))
    net = Path('/sys/class/net')
    if config.network.bridge and not (
            net / config.network.bridge / 'bridge').exists():
        yield f'[network]: there is no bridge {config.network.bridge}'
    if 'tap' in words:
        if words.get('vhost', 'off') != 'off':
            yield '[network]: netdev: COLO needs vhost=off'
        if 'ifname' in words and not (net / words['ifname']).exists():
            yield f'[network]: there is no interface {words["ifname"]}'
