# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM's disks and network are put together, on either side.

This is the one place that knows names of nodes and objects.  One disk:

    primary                             standby
    top0 (replication)                  top0 (replication)
      |      \\                            |
    disk0   link0 (nbd) ------------> replica0, overlays -> disk0
    meta0   link-meta0 (nbd) -------> meta0

A standby that is promoted becomes a primary by itself, once what the overlays
have is merged.  meta0 says after a crash what each of the two disks is.
"""

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from .check import TOOL_SECONDS, qemu_img
from .config import Config, Disk, Json
from .errors import Failed, last_line

# QMP commands, to be given in this order
Commands = Iterator[Tuple[str, Json]]

UNMAP = {'discard': 'unmap'}
PRIMARY: Json = {'mode': 'primary', 'replica': None}
# Of the network, on either side; rew0 stays, which old connections need
FILTERS = ('m0', 'r0', 'r1', 'comp0', 'io0', 'f2', 'f1')
CHARDEVS = ('mirror0', 'compare1', 'compare0-in', 'compare0', 'out0-in',
            'out0', 'red1', 'red0')
# Of the metadata of a disk: its head, what a bit of the rest is for, and what
# all of it is a multiple of
META_HEAD, META_REGION, META_BLOCK = 16 << 10, 1 << 20, 4 << 10
# Puts a tap into the bridge that BRIDGE in its environment names.  QEMU's own
# helper wants a file beside QEMU that allows it.
TAP_UP = Path(__file__).with_name('tap-up')
BRIDGE = 'QEMU_REPLICATION_BRIDGE'
# What the peer does not read holds up this QEMU
MIRROR: Json = {'type': 'chardev', 'id': 'mirror0'}
# Where overlays are by default that cannot be beside the disk
TEMPORARY = '/var/tmp'
# Unlimited: the guest must not wait for a migration that is throttled
BANDWIDTH = 1 << 40


def top(disk: int) -> str:
    """The node that replicates, on a primary."""
    return f'top{disk}'


def links(disk: int) -> Tuple[str, str]:
    """The nodes that lead to the peer's disk and its metadata."""
    return f'link{disk}', f'link-meta{disk}'


def nodes(config: Config, primary: bool) -> Iterator[Json]:
    """What a host has from the start that runs the VM, or stands by."""
    for number, disk in enumerate(config.disks):
        yield {'driver': disk.format, 'node-name': f'disk{number}', 'file': {
            'driver': 'file', 'filename': disk.file, **UNMAP}, **UNMAP}
        yield {'driver': 'file', 'node-name': f'meta{number}',
               'filename': str(disk.metadata_file)}
        yield {'driver': 'replication', 'node-name': top(number),
               'file': f'disk{number}', 'metadata': f'meta{number}',
               # 0 is for ever
               'replica-timeout': math.ceil(config.limits.stalled * 1000),
               **UNMAP,
               **(PRIMARY if primary else _secondary(number, disk))}


def _secondary(number: int, disk: Disk) -> Json:
    return {'mode': 'secondary', 'replica-node-name': f'replica{number}',
            **({'overlay-dir': disk.overlays} if disk.overlays else {})}


# Images

def _create(config: Config, disk: Disk) -> None:
    done = subprocess.run([
        qemu_img(config), 'create', '-q', '-f', disk.format, disk.file,
        str(disk.bytes)], check=False, timeout=TOOL_SECONDS, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Failed(last_line(done.stdout))


def wipe(disk: Disk) -> None:
    """Nothing is known of the disk."""
    regions = -(-disk.bytes // META_REGION)
    blocks = -(-regions // (8 * META_BLOCK))
    with open(disk.metadata_file, 'wb') as file:
        file.truncate(META_HEAD + blocks * META_BLOCK)
        os.fsync(file.fileno())


def files(config: Config) -> List[str]:
    """What a host has of the VM's disks."""
    return [path for disk in config.disks
            for path in (disk.file, str(disk.metadata_file))]


def make_images(config: Config) -> None:
    """Make what is not there yet."""
    for disk in config.disks:
        if not Path(disk.file).exists():
            _create(config, disk)
            wipe(disk)
        elif not disk.metadata_file.exists():
            wipe(disk)


def _escaped(path: str) -> str:
    """The name that QEMU gives to what belongs to a file elsewhere."""
    return ''.join(char if char > '\x7f' or char.isalnum() or char in '-._~'
                   else f'%{ord(char):02X}' for char in path[1:])


def overlays(disk: Disk) -> List[Path]:
    """What QEMU could not part with: the guest's, and what was below it."""
    path = os.path.realpath(disk.file)
    is_file = os.path.isfile(path)
    if not is_file:
        # what the kernel calls a device may be another one tomorrow
        path = os.path.abspath(disk.file)
    if disk.overlays or not is_file:
        path = os.path.join(disk.overlays or TEMPORARY, _escaped(path))
    return [Path(f'{path}.standby-{name}.qcow2')
            for name in ('active', 'hidden')]


def leftovers(disk: Disk) -> List[Path]:
    """Those that are there: they may have data of the disk."""
    return [overlay for overlay in overlays(disk) if overlay.exists()]


def merge_command(config: Config, disk: Disk) -> List[str]:
    """Put that into a disk that has overlays left."""
    return [qemu_img(config), 'commit', '-q', '-b', disk.file,
            str(overlays(disk)[0])]


# The command line

def arguments(config: Config, primary: bool) -> List[str]:
    """What QEMU gets for disks and network."""
    words = []
    if config.tls.kind != 'none':
        for end in ('server', 'client'):
            words += ['-object', f'tls-creds-{config.tls.kind},id={end},'
                      f'endpoint={end},dir={config.tls.dir}']
    for node in nodes(config, primary):
        words += ['-blockdev', json.dumps(node)]
    for number, disk in enumerate(config.disks):
        words += ['-device', f'{disk.device},drive={top(number)}']
    net = config.network
    if net.device:
        netdev = net.netdev or (f'tap,script={TAP_UP},downscript=no,'
                                'vhost=off')
        words += ['-netdev', f'{netdev},id=net0',
                  '-device', f'{net.device},netdev=net0']
    else:
        # without a word of it, QEMU has one that the peer does not know of
        words += ['-nic', 'none']
    return words if primary else words + _standby_arguments(config)


def _vnet(config: Config) -> bool:
    """Whether packets come with a header that the filters have to know."""
    return config.network.device.startswith('virtio-net')


def _standby_arguments(config: Config) -> List[str]:
    """What it gets besides to stand by: the primary connects the network."""
    words = ['-incoming', 'defer']
    if not config.network.device:
        return words
    tls = '' if config.tls.kind == 'none' else ',tls-creds=client'
    vnet = ',vnet_hdr_support=on' if _vnet(config) else ''
    for name, port in (('red0', config.ports.mirror),
                       ('red1', config.ports.compare)):
        words += ['-chardev', f'socket,id={name},host={config.peer_address},'
                  f'port={port},reconnect-ms=1000{tls}']
    for thing in ('filter-redirector,id=f1,netdev=net0,queue=tx,indev=red0',
                  'filter-redirector,id=f2,netdev=net0,queue=rx,outdev=red1',
                  'filter-rewriter,id=rew0,netdev=net0,queue=all'):
        words += ['-object', thing + vnet]
    return words


# QMP

def _tls(config: Config, end: str) -> Dict[str, Any]:
    return {} if config.tls.kind == 'none' else {'tls-creds': end}


def _colo(config: Config, end: str, **parameters: Any) -> Commands:
    yield 'migrate-set-capabilities', {'capabilities': [
        {'capability': name, 'state': True} for name in ('x-colo', 'events')]}
    yield 'migrate-set-parameters', {**_tls(config, end), **parameters}


def stand_by(config: Config) -> Commands:
    """Open the ports to the primary."""
    yield 'nbd-server-start', {
        'addr': {'type': 'inet', 'data': {'host': config.address,
                                          'port': str(config.ports.disks)}},
        **_tls(config, 'server')}
    for number in range(len(config.disks)):
        for name, node in ((f'disk{number}', f'replica{number}'),
                           (f'meta{number}', f'meta{number}')):
            yield 'block-export-add', {
                'type': 'nbd', 'id': f'export-{name}', 'name': name,
                'node-name': node, 'writable': True}
    yield from _colo(config, 'server')
    yield 'migrate-incoming', {
        'uri': f'tcp:{_bracketed(config.address)}:{config.ports.memory}'}


def _bracketed(address: str) -> str:
    return f'[{address}]' if ':' in address else address


def connect(config: Config, number: int) -> Commands:
    """Have the peer's disk."""
    for node, name in zip(links(number), ('disk', 'meta')):
        yield 'blockdev-add', {
            'driver': 'nbd', 'node-name': node, 'export': f'{name}{number}',
            'server': {'type': 'inet', 'host': config.peer_address,
                       'port': str(config.ports.disks)},
            **_tls(config, 'client'), **UNMAP}


def sync(number: int) -> Json:
    """How the peer's disk is brought in step."""
    replica, metadata = links(number)
    return {'job-id': f'sync{number}', 'node-name': top(number),
            'replica': replica, 'replica-metadata': metadata}


def migrate(config: Config) -> Commands:
    """Begin to bring the peer's memory in step."""
    yield from _colo(config, 'client', **{
        'max-bandwidth': BANDWIDTH,
        'x-checkpoint-delay': config.limits.checkpoint_ms})
    yield 'migrate', {
        'uri': f'tcp:{_bracketed(config.peer_address)}:{config.ports.memory}'}


def yank(config: Config) -> List[Json]:
    """All connections to the peer that can hold up this QEMU."""
    return [{'type': 'migration'}, MIRROR, *(
        {'type': 'block-node', 'node-name': node}
        for number in range(len(config.disks)) for node in links(number))]


def _listen(config: Config, name: str, port: int) -> Tuple[str, Json]:
    address = {'type': 'inet', 'data': {'host': config.address,
                                        'port': str(port)}}
    return 'chardev-add', {'id': name, 'backend': {
        'type': 'socket', 'data': {'addr': address, 'server': True,
                                   'wait': False, **_tls(config, 'server')}}}


def _pipe(config: Config, name: str, server: bool) -> Tuple[str, Json]:
    """One end of a connection within this QEMU."""
    address = {'type': 'unix',
               'data': {'path': str(config.run / f'{name}.sock')}}
    return 'chardev-add', {'id': name if server else f'{name}-in', 'backend': {
        'type': 'socket', 'data': {
            'addr': address, 'server': server,
            **({'wait': False} if server else {})}}}


def connect_network(config: Config, rewriter: bool) -> Commands:
    """Let the peer see what comes, and compare what is sent.

    A host that was promoted has a rewriter, which the filters come before.
    """
    if not config.network.device:
        return
    yield _listen(config, 'mirror0', config.ports.mirror)
    yield _listen(config, 'compare1', config.ports.compare)
    for name in ('compare0', 'out0'):
        yield _pipe(config, name, True)
        yield _pipe(config, name, False)
    more: Json = {'insert': 'before', 'position': 'id=rew0'} \
        if rewriter else {}
    vnet: Json = {'vnet_hdr_support': True} if _vnet(config) else {}
    for name, kind, options in (
            ('m0', 'mirror', {'queue': 'tx', 'outdev': 'mirror0'}),
            ('r0', 'redirector', {'queue': 'rx', 'indev': 'out0'}),
            ('r1', 'redirector', {'queue': 'rx', 'outdev': 'compare0'})):
        yield 'object-add', {'qom-type': f'filter-{kind}', 'id': name,
                             'netdev': 'net0', **options, **more, **vnet}
    yield 'object-add', {'qom-type': 'iothread', 'id': 'io0'}
    yield 'object-add', {'qom-type': 'colo-compare', 'id': 'comp0',
                         'iothread': 'io0', 'primary_in': 'compare0-in',
                         'secondary_in': 'compare1', 'outdev': 'out0-in',
                         **vnet}


def disconnect_network(objects: List[str], chardevs: List[str]) -> Commands:
    """Let the VM's packets pass, as far as that was set up."""
    for name in FILTERS:
        if name in objects:
            yield 'object-del', {'id': name}
    for name in CHARDEVS:
        if name in chardevs:
            yield 'chardev-remove', {'id': name}


def announce(config: Config) -> Commands:
    """Let switches know where the VM is now."""
    if config.network.device:
        yield 'announce-self', {'initial': 50, 'max': 550, 'rounds': 5,
                                'step': 100}
