# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration of a VM: one file, the same on both hosts."""

import os
import re
import socket
import tomllib
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Dict, List, Tuple, Type, TypeVar, cast

Json = Dict[str, Any]
T = TypeVar('T')

ETC = Path('/etc/qemu-replication')
_UNITS = {'': 1, 'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}
_SIZE = re.compile(r'(\d+)([KMGT]?)')
# For any limit: what is not a number is more
LONGEST = 10 ** 6
_WORDS = {str: 'a text', int: 'a whole number', float: 'a number',
          list: 'a list'}


class ConfigError(Exception):
    """What is wrong with the configuration, in one line."""


@dataclass(frozen=True)
class Vm:
    """What both hosts run."""
    name: str
    qemu: str
    # all that QEMU gets but for disks, network and what the keeper needs
    arguments: List[str]


@dataclass(frozen=True)
class Disk:
    """A disk of the VM, at the same place on both hosts."""
    file: str
    size: str
    format: str = 'qcow2'
    # as -device has it, without drive=
    device: str = 'virtio-blk-pci'
    # the folder for what is written between two checkpoints
    overlays: str = ''
    # what is known of the disk after a crash; by default beside it
    metadata: str = ''

    @property
    def bytes(self) -> int:
        """Its size."""
        found = _SIZE.fullmatch(self.size)
        assert found
        return int(found[1]) * _UNITS[found[2]]

    @property
    def metadata_file(self) -> Path:
        """The file of its metadata."""
        return Path(self.metadata or f'{self.file}.meta')

    @property
    def overlay_folder(self) -> Path:
        """Where QEMU makes its overlays."""
        return Path(self.overlays or Path(self.file).parent)


@dataclass(frozen=True)
class Host:
    """A host, by an address of the link between the two."""
    address: str


@dataclass(frozen=True)
class Ports:
    """Where each host listens for the other."""
    keeper: int = 9997
    memory: int = 9998
    disks: int = 9999
    mirror: int = 9003
    compare: int = 9004


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds but for the first."""
    checkpoint_ms: int = 2000
    # for QEMU to answer, and for the peer's keeper
    answer: float = 10.0
    start: float = 60.0
    # for a failover, and for going on alone
    failover: float = 60.0
    # for the migration of the memory
    memory: float = 600.0
    # for the peer to do anything, whatever is waited for
    stalled: float = 10.0


@dataclass(frozen=True)
class Tls:
    """How both hosts know that it is the other one."""
    kind: str = 'none'
    dir: str = ''


@dataclass(frozen=True)
class Network:
    """The VM's network card; none without a device."""
    # as -device has it, without netdev=
    device: str = ''
    # one of these: a bridge, or as -netdev has it, without id=
    bridge: str = ''
    netdev: str = ''


@dataclass(frozen=True)
class Cluster:
    """Who judges that a host is down."""
    # "operator", or the name of a resource of "pacemaker"
    judge: str = 'operator'
    resource: str = ''


@dataclass(frozen=True)
class Config:
    """All of it, as seen from one of the hosts."""
    path: Path
    here: str
    peer: str
    vm: Vm
    disks: Tuple[Disk, ...]
    hosts: Dict[str, Host]
    run: Path
    state: Path
    ports: Ports = Ports()
    limits: Limits = Limits()
    tls: Tls = Tls()
    network: Network = Network()
    cluster: Cluster = field(default_factory=Cluster)

    @property
    def address(self) -> str:
        """This host's."""
        return self.hosts[self.here].address

    @property
    def peer_address(self) -> str:
        """The other one's."""
        return self.hosts[self.peer].address

    @property
    def control(self) -> Path:
        """Where the keeper listens to the command line."""
        return self.run / 'keeper.sock'


def config_path(word: str) -> Path:
    """The file that is meant by a path or the name of a VM."""
    return Path(word) if '/' in word or word.endswith('.toml') \
        else ETC / f'{word}.toml'


def _fits(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _read(kind: Type[T], table: Any, where: str) -> T:
    """Make one of the classes above from a table of the file."""
    if not isinstance(table, dict):
        raise ConfigError(f'{where} has to be a table')
    known = {f.name: f for f in fields(cast(Any, kind))}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f'{where} has no {key}; there are: '
                              + ', '.join(known))
        wanted = list if known[key].type == List[str] else known[key].type
        if not _fits(value, wanted) or (
                wanted is list and not all(type(v) is str for v in value)):
            raise ConfigError(f'{where}: {key} has to be '
                              f'{_WORDS[wanted]}')  # type: ignore[index]
    for name, known_field in known.items():
        if name not in table and known_field.default is MISSING:
            raise ConfigError(f'{where}: {name} is missing')
    return kind(**table)


def _choose_host(path: Path, hosts: Dict[str, Host], name: str) -> str:
    name = name or os.environ.get('QEMU_REPLICATION_HOST', '')
    if not name:
        name = socket.gethostname()
        if name not in hosts:
            name = name.split('.')[0]
        if name not in hosts:
            raise ConfigError(
                f'{path}: this host is called {name}, but the hosts are '
                f'{" and ".join(hosts)}: say --host')
    if name not in hosts:
        raise ConfigError(f'{path}: there is no host {name}, but '
                          f'{" and ".join(hosts)}')
    return name


def _check_paths(where: str, **paths: str) -> None:
    """A keeper is in another folder than whoever has written them."""
    for name, path in paths.items():
        if not path.startswith('/'):
            raise ConfigError(f'{where}: {name} has to be a path, from / on, '
                              f'not "{path}"')


def _check_commas(**paths: str) -> None:
    """They end a path among QEMU's options."""
    for name, path in paths.items():
        if ',' in path:
            raise ConfigError(f'{name} may not have a comma: "{path}"')


def _check_values(config: Config) -> None:
    """What can be seen without looking at the machine."""
    if not config.disks:
        raise ConfigError('there is no [[disk]]')
    for number, disk in enumerate(config.disks):
        if not _SIZE.fullmatch(disk.size):
            raise ConfigError(f'[[disk]] {number}: size has to be like "10G", '
                              f'not "{disk.size}"')
        if disk.bytes == 0 or disk.bytes % 512:
            raise ConfigError(f'[[disk]] {number}: size has to be a multiple '
                              'of 512 bytes, and not 0')
        if disk.format not in ('qcow2', 'raw'):
            raise ConfigError(f'[[disk]] {number}: format has to be qcow2 or '
                              f'raw, not "{disk.format}"')
        _check_paths(f'[[disk]] {number}', file=disk.file,
                     overlays=disk.overlays or '/',
                     metadata=disk.metadata or '/')
    files = [os.path.realpath(path) for disk in config.disks
             for path in (disk.file, str(disk.metadata_file))]
    if len(set(files)) < len(files):
        raise ConfigError('two disks of [[disk]], or a disk and metadata, '
                          'have the same file')
    if '/' in config.vm.qemu:
        _check_paths('[vm]', qemu=config.vm.qemu)
    ports = vars(config.ports)
    for name, port in ports.items():
        if not 0 < port < 65536:
            raise ConfigError(f'[ports]: {name} has to be from 1 to 65535, '
                              f'not {port}')
    if len(set(ports.values())) < len(ports):
        raise ConfigError('[ports]: two of them are equal')
    for name, limit in vars(config.limits).items():
        if not 0 < limit <= LONGEST:
            raise ConfigError(f'[limits]: {name} has to be more than 0, and '
                              f'at most {LONGEST}')
    if config.tls.kind not in ('none', 'psk', 'x509'):
        raise ConfigError('[tls]: kind has to be none, psk or x509, not '
                          f'"{config.tls.kind}"')
    if config.tls.kind != 'none':
        _check_paths('[tls]', dir=config.tls.dir)
        _check_commas(dir=config.tls.dir)
    net = config.network
    if bool(net.device) != (bool(net.bridge) != bool(net.netdev)):
        raise ConfigError('[network] wants a device, and either a bridge or '
                          'a netdev')
    if config.cluster.judge not in ('operator', 'pacemaker'):
        raise ConfigError('[cluster]: judge has to be operator or pacemaker, '
                          f'not "{config.cluster.judge}"')
    if (config.cluster.judge == 'pacemaker') != bool(config.cluster.resource):
        raise ConfigError('[cluster]: pacemaker wants a resource, and nobody '
                          'else')


def _filled(value: Any, words: Dict[str, str]) -> Any:
    """Put what differs between the hosts in its places."""
    if isinstance(value, str):
        for word, meant in words.items():
            value = value.replace('{%s}' % word, meant)
    elif isinstance(value, list):
        value = [_filled(each, words) for each in value]
    elif isinstance(value, dict):
        value = {key: _filled(each, words) for key, each in value.items()}
    return value


def load(path: Path, host: str = '') -> Config:
    """Read the file."""
    try:
        table = tomllib.loads(path.read_text('utf-8'))
    except OSError as exc:
        raise ConfigError(f'{path}: {exc.strerror}') from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f'{path}: {exc}') from exc
    try:
        return _load(path, table, host)
    except ConfigError as exc:
        text = str(exc)
        raise ConfigError(text if text.startswith(str(path))
                          else f'{path}: {text}') from exc


def _load(path: Path, table: Json, host: str) -> Config:
    hosts_table = table.pop('host', {})
    if not isinstance(hosts_table, dict) or len(hosts_table) != 2:
        raise ConfigError('there have to be two hosts, [host.NAME] each')
    hosts = {name: _read(Host, value, f'[host.{name}]')
             for name, value in hosts_table.items()}
    here = _choose_host(path, hosts, host)
    peer = next(name for name in hosts if name != here)
    if hosts[here] == hosts[peer]:
        raise ConfigError('both hosts have the same address')
    vm = _read(Vm, table.get('vm', {}), '[vm]')
    if not re.fullmatch(r'[A-Za-z0-9_][A-Za-z0-9_.-]*', vm.name):
        raise ConfigError('[vm]: name may have letters, digits and "-_." '
                          'only, and not begin with "-" or "."')
    words = {'host': here, 'vm': vm.name}
    for name, default in (('run', '/run/qemu-replication/{vm}'),
                          ('state', '/var/lib/qemu-replication/{vm}')):
        value = table.pop(name, default)
        if not isinstance(value, str) or not value.startswith('/'):
            raise ConfigError(f'{name} has to be a folder, from / on')
        words[name] = _filled(value, words)
        _check_commas(**{name: words[name]})
    table = _filled(table, words)
    disks = table.pop('disk', [])
    if not isinstance(disks, list):
        raise ConfigError('[[disk]] has two brackets')
    config = Config(
        path, here, peer, _read(Vm, table.pop('vm'), '[vm]'),
        tuple(_read(Disk, disk, f'[[disk]] {number}')
              for number, disk in enumerate(disks)),
        hosts, Path(words['run']), Path(words['state']))
    for name, kind in (('ports', Ports), ('limits', Limits), ('tls', Tls),
                       ('network', Network), ('cluster', Cluster)):
        if name in table:
            part: Any = _read(kind, table.pop(name), f'[{name}]')
            config = replace(config, **{name: part})
    if table:
        raise ConfigError(f'there is no {", ".join(table)}')
    _check_values(config)
    return config
