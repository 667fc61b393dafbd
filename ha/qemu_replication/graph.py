# SPDX-License-Identifier: GPL-2.0-or-later
"""How a VM's disks and network are put together, on either side.

This is the one place that knows names of nodes and objects.  One disk:

    primary                             standby
    guest0 (throttle)                   guest0 (throttle)
      |                                   |
    top0 (replication)                  replication0
      |      \\                            |
    disk0   link0 (nbd) ------------.   active0 -> hidden0 -> disk0
                                     '------------------------^

guest0, which limits nothing, is there for the day on which the standby is
promoted: then top0 is put between it and replication0.
"""

import json
import subprocess
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

from .check import TOOL_SECONDS, qemu_img
from .config import Config, Disk, Json

# QMP commands, to be given in this order
Commands = Iterator[Tuple[str, Json]]

LIMITS = 'limits'
UNMAP = {'discard': 'unmap'}
# Of the network, on either side; rew0 stays, which old connections need
FILTERS = ('m0', 'r0', 'r1', 'comp0', 'io0', 'f2', 'f1')
CHARDEVS = ('mirror0', 'compare1', 'compare0-in', 'compare0', 'out0-in',
            'out0', 'red1', 'red0')
# The guest writes new blocks of it at nearly the speed of a plain disk then
ACTIVE_OPTIONS = 'extended_l2=on,cluster_size=128k'
# Unlimited: the guest must not wait for a migration that is throttled
BANDWIDTH = 1 << 40


def top(disk: int) -> str:
    """The node that replicates, on a primary."""
    return f'top{disk}'


def link(disk: int) -> str:
    """The node that leads to the peer's disk."""
    return f'link{disk}'


def _file(path: str) -> Json:
    return {'driver': 'file', 'filename': path, **UNMAP}


def _disk(number: int, disk: Disk) -> Json:
    return {'driver': disk.format, 'node-name': f'disk{number}',
            'file': _file(disk.file), **UNMAP}


def _root(number: int, below: str) -> Json:
    return {'driver': 'throttle', 'node-name': f'guest{number}',
            'throttle-group': LIMITS, 'file': below, **UNMAP}


def _top(config: Config, number: int, below: str) -> Json:
    return {'driver': 'replication', 'mode': 'primary',
            'node-name': top(number), 'file': below, 'replica': None,
            'replica-timeout': int(config.limits.stalled * 1000), **UNMAP}


def primary_nodes(config: Config) -> List[Json]:
    """What a host that runs the VM has from the start."""
    return [node for number, disk in enumerate(config.disks)
            for node in (_disk(number, disk),
                         _top(config, number, f'disk{number}'),
                         _root(number, top(number)))]


def standby_nodes(config: Config) -> List[Json]:
    """What a host that stands by has."""
    return [node for number, disk in enumerate(config.disks)
            for node in (
                _disk(number, disk),
                {'driver': 'qcow2', 'node-name': f'hidden{number}',
                 'backing': f'disk{number}',
                 'file': _file(str(disk.overlay('hidden')))},
                {'driver': 'qcow2', 'node-name': f'active{number}',
                 'backing': f'hidden{number}',
                 'file': _file(str(disk.overlay('active')))},
                {'driver': 'replication', 'mode': 'secondary',
                 'node-name': f'replication{number}',
                 'top-id': f'guest{number}', 'file': f'active{number}',
                 **UNMAP},
                _root(number, f'replication{number}'))]


# Images

def _create(config: Config, path: Path, size: int, kind: str,
            options: str = '') -> None:
    subprocess.run([qemu_img(config), 'create', '-q', '-f', kind,
                    *(['-o', options] if options else []), str(path),
                    str(size)], check=True, timeout=TOOL_SECONDS,
                   capture_output=True, text=True)


def make_images(config: Config) -> bool:
    """Make what a standby needs; was a disk made?"""
    made = False
    for disk in config.disks:
        if not Path(disk.file).exists():
            _create(config, Path(disk.file), disk.bytes, disk.format)
            made = True
        _create(config, disk.overlay('hidden'), disk.bytes, 'qcow2')
        _create(config, disk.overlay('active'), disk.bytes, 'qcow2',
                ACTIVE_OPTIONS)
    return made


def merge_commands(config: Config) -> Iterator[List[str]]:
    """Bring a disk up to date whose QEMU died within a failover."""
    for disk in config.disks:
        # as text: the driver takes no null or false in a name
        below = f'"backing":{{"driver":"{disk.format}",' \
                f'"file":{{"driver":"file","filename":"{disk.file}"}}}}'
        for name in ('active', 'hidden'):
            path = disk.overlay(name)
            over = f'"backing":{{"driver":"qcow2","file":{{"driver":"file",' \
                f'"filename":"{disk.overlay("hidden")}"}},{below}}}' \
                if name == 'active' else below
            yield [qemu_img(config), 'commit', '-q', '-d',
                   f'json:{{"driver":"qcow2","file":{{"driver":"file",'
                   f'"filename":"{path}"}},{over}}}']


# The command line

def arguments(config: Config, nodes: List[Json]) -> List[str]:
    """What QEMU gets for disks and network, whatever its role."""
    words = ['-object', f'throttle-group,id={LIMITS}']
    if config.tls.kind != 'none':
        for end in ('server', 'client'):
            words += ['-object', f'tls-creds-{config.tls.kind},id={end},'
                      f'endpoint={end},dir={config.tls.dir}']
    for node in nodes:
        words += ['-blockdev', json.dumps(node)]
    for number, disk in enumerate(config.disks):
        words += ['-device', f'{disk.device},drive=guest{number}']
    net = config.network
    if net.device:
        netdev = net.netdev or f'bridge,br={net.bridge}'
        words += ['-netdev', f'{netdev},id=net0',
                  '-device', f'{net.device},netdev=net0']
    return words


def _vnet(config: Config) -> bool:
    """Whether packets come with a header that the filters have to know."""
    return config.network.device.startswith('virtio-net')


def standby_arguments(config: Config) -> List[str]:
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
        yield 'block-export-add', {
            'type': 'nbd', 'id': f'export{number}', 'name': f'disk{number}',
            'node-name': f'disk{number}', 'writable': True}
    yield from _colo(config, 'server')
    yield 'migrate-incoming', {
        'uri': f'tcp:{_bracketed(config.address)}:{config.ports.memory}'}


def _bracketed(address: str) -> str:
    return f'[{address}]' if ':' in address else address


def copy(config: Config, number: int, sync: str) -> Commands:
    """Begin to bring the peer's disk in step."""
    yield 'blockdev-add', {
        'driver': 'nbd', 'node-name': link(number), 'export': f'disk{number}',
        'server': {'type': 'inet', 'host': config.peer_address,
                   'port': str(config.ports.disks)},
        **_tls(config, 'client'), **UNMAP}
    yield 'x-block-replica-sync', {
        'job-id': f'sync{number}', 'node-name': top(number),
        'replica': link(number), 'sync': sync}


def migrate(config: Config) -> Commands:
    """Begin to bring the peer's memory in step."""
    yield from _colo(config, 'client', **{
        'max-bandwidth': BANDWIDTH,
        'x-checkpoint-delay': config.limits.checkpoint_ms})
    yield 'migrate', {
        'uri': f'tcp:{_bracketed(config.peer_address)}:{config.ports.memory}'}


def yank(config: Config) -> List[Json]:
    """All connections to the peer that can hold up this QEMU."""
    return [{'type': 'migration'}, *(
        {'type': 'block-node', 'node-name': link(number)}
        for number in range(len(config.disks)))]


def promoted(config: Config, nodes: List[str]) -> Commands:
    """Have a standby that was promoted be like a primary."""
    for number in range(len(config.disks)):
        if top(number) not in nodes:
            yield 'blockdev-add', _top(config, number, f'replication{number}')
        yield 'blockdev-reopen', {'options': [_root(number, top(number))]}


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
