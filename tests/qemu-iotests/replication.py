# SPDX-License-Identifier: GPL-2.0-or-later
"""
What the replication-* tests share.

Every test keeps a model of each side in memory and compares whole images with
it.  The primary writes the secondary disk, and the secondary guest its top
node, through NBD exports of the QEMU under test.
"""

import json
import logging
import os
import subprocess
import time
from contextlib import contextmanager
from typing import (
    Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple, Union)

from qemu.machine.machine import AbnormalShutdown

import iotests
from iotests import qemu_img, qemu_img_create, qemu_io

KIB = 1024
MIB = 1024 * KIB
NANOSECONDS = 10**9
# in seconds
AGES = 10**6
CLUSTER = 64 * KIB
# Neither a multiple of the cluster size nor of 4 KiB
SIZE = 16 * CLUSTER + 1536
WAIT_SECONDS = 20.0
# A bound for what hangs: in a build with sanitizers, on a machine that does
# something else besides, a test may take ten times as long as usual
TEST_SECONDS = 180
QUIT_SECONDS = 30

Json = Dict[str, Any]
Client = subprocess.Popen[str]

_PATTERN_ROW = bytes(1 + k % 251 for k in range(1024))


def main(required: Sequence[str] = ('replication', 'quorum',
                                    'blkdebug')) -> None:
    # that a QEMU was killed is no news
    logging.getLogger('qemu').setLevel(logging.CRITICAL)
    iotests.main(supported_fmts=['qcow2'],
                 supported_protocols=['file'],
                 supported_platforms=['linux'],
                 unsupported_imgopts=['data_file', 'compat'],
                 required_fmts=required)


def nbd_server(socket: str, *args: str) -> 'subprocess.Popen[bytes]':
    """A qemu-nbd that listens, and that the caller ends"""
    # it is there once qemu-nbd listens, the socket before
    pid_file = f'{socket}.pid'
    # pylint: disable=consider-using-with
    server = subprocess.Popen(
        [iotests.qemu_nbd_prog, '--persistent', '--discard=unmap',
         '--pid-file', pid_file, '-k', socket, *args],
        # it tells of each client that is cut off
        stderr=subprocess.DEVNULL)

    def listens() -> bool:
        try:
            with open(pid_file, encoding='ascii') as file:
                return file.read() == f'{server.pid}\n'
        except FileNotFoundError:
            return False

    wait_until(listens, 'qemu-nbd')
    iotests.try_remove(pid_file)
    return server


def traces_to_a_log() -> bool:
    """Whether this QEMU was built so"""
    path = os.path.join(os.path.dirname(iotests.qemu_prog), 'config-host.h')
    with open(path, encoding='utf-8') as file:
        return 'CONFIG_TRACE_LOG' in file.read()


def pattern(size: int) -> bytearray:
    """Data without zero bytes in which neighbouring blocks differ"""
    rows = (_PATTERN_ROW[i * 37 % 251:][:512] for i in range(size // 512 + 1))
    return bytearray(b''.join(rows)[:size])


def inject(event: str = 'none', **rule: Any) -> Json:
    """blkdebug options with one fault"""
    return {'inject-error': [{'event': event, **rule}]}


def slow(image: Json, latency_ns: int) -> Json:
    """Options of a node whose writes take so long: until they are logged"""
    return {'driver': 'blklogwrites', 'file': image,
            'log': {'driver': 'null-co', 'size': 1 << 40,
                    'latency-ns': latency_ns}}


# Emptying a qcow2 image starts with a write of its dirty flag to sector 0.  If
# that one fails the image is still whole.
EMPTYING_FAILS_ONCE = inject(iotype='write', sector=0, once=True)

# The same at the second time: emptying moves to state 2, where the next write
# of data arms the fault.
SECOND_EMPTYING_FAILS: Json = {
    'set-state': [{'event': 'empty_image_prepare', 'state': 1,
                   'new_state': 2}],
    **inject('write_aio', state=2, iotype='write', sector=0, once=True),
}

# So late that the image is beyond repair
SECOND_EMPTYING_BREAKS: Json = {
    'set-state': [{'event': 'empty_image_prepare', 'state': 1,
                   'new_state': 2}],
    **inject('empty_image_prepare', state=2, once=True),
}


def dotted(options: Any, prefix: str = '') -> List[str]:
    """Options as -drive takes them"""
    if isinstance(options, dict):
        pairs = list(options.items())
    elif isinstance(options, list):
        pairs = list(enumerate(options))
    elif isinstance(options, bool):
        return [f"{prefix}={'on' if options else 'off'}"]
    else:
        return [f'{prefix}={options}'.replace(',', ',,')]
    return [option for key, value in pairs
            for option in dotted(value, f'{prefix}.{key}' if prefix
                                 else str(key))]


class VM(iotests.VM):
    """A QEMU with an NBD server, whose registry is driven by QMP"""

    def __init__(self, name: str = 'a', machine: str = 'none') -> None:
        super().__init__(path_suffix=name)
        self.sock = os.path.join(iotests.sock_dir, f'nbd-{name}')
        self.add_args('-machine', machine)
        self.add_paused()

    def launch(self) -> None:
        super().launch()
        self.nbd_server_start()

    def nbd_server_start(self) -> None:
        self.cmd('nbd-server-start',
                 addr={'type': 'unix', 'data': {'path': self.sock}})

    def query(self, command: str, **args: Any) -> Any:
        """What a command returns, of whatever type that is"""
        return self.cmd(command, None, None, **args)

    def export(self, node: str, **options: Any) -> str:
        """Export a node for writing; return the address for clients"""
        self.query('block-export-add', type='nbd', id=f'exp-{node}',
                   node_name=node, name=node, **{'writable': True, **options})
        return self.uri(node)

    def unexport(self, node: str) -> None:
        self.cmd('block-export-del', id=f'exp-{node}', mode='hard')
        wait_until(lambda: not self.exported(node), f'end of export {node}')

    def exported(self, node: str) -> bool:
        exports = self.query('query-block-exports')
        return any(exp['id'] == f'exp-{node}' for exp in exports)

    def uri(self, node: str) -> str:
        return f'nbd+unix:///{node}?socket={self.sock}'

    def hotplug_drive(self, drive: str, options: Json) -> None:
        """
        A node with a name for qemu-io, which could not take a node with
        requests in flight
        """
        reply = self.hmp('drive_add 0 ' + ','.join(
            ['if=none', f'id={drive}', *dotted(options)]))
        assert reply['return'] == 'OK\r\n', reply

    def io(self, node: str, *commands: str) -> None:
        """Have the monitor do what qemu-io can, and nothing fail"""
        for command in commands:
            output = str(self.hmp_qemu_io(node, command)['return'])
            # what it has done it tells of, what it has not as well
            assert 'ops;' in output or not output.strip(), \
                f'{command}: {output}'

    def io_fails(self, node: str, command: str) -> bool:
        """Whether that is refused"""
        return 'ops;' not in str(self.hmp_qemu_io(node, command)['return'])

    # The registry

    def start_error(self, primary: bool = False) -> Optional[str]:
        return error_of(self.qmp('xen-set-replication', enable=True,
                                 primary=primary))

    def start(self, primary: bool = False) -> None:
        self.cmd('xen-set-replication', enable=True, primary=primary)

    def stop_replication(self, failover: bool = False) -> None:
        """QEMU does not pass on the error of a failover"""
        self.cmd('xen-set-replication', enable=False, primary=False,
                 failover=failover)

    def checkpoint(self) -> None:
        self.cmd('xen-colo-do-checkpoint')

    def checkpoint_error(self) -> Optional[str]:
        return error_of(self.qmp('xen-colo-do-checkpoint'))

    def status(self) -> Optional[str]:
        """What the status says is wrong, if anything"""
        reply = self.query('query-xen-replication-status')
        return str(reply['desc']) if reply['error'] else None

    # The graph

    def graph(self) -> List[str]:
        """Nodes, edges, permissions, read-only flags and jobs, as lines"""
        graph = self.query('x-debug-query-block-graph')
        names = {node['id']: f"{node['type']} '{node['name']}'"
                 for node in graph['nodes']}
        lines = list(names.values())
        for edge in graph['edges']:
            perms = ','.join(sorted(edge['perm']))
            shared = ','.join(sorted(edge['shared-perm']))
            lines.append(f"{names[edge['parent']]} -{edge['name']}-> "
                         f"{names[edge['child']]} {perms} / {shared}")
        for node in self.query('query-named-block-nodes', flat=True):
            lines.append(f"{node['node-name']} ro={node['ro']}")
        lines += [f"job {job['type']}" for job in self.query('query-jobs')]
        return sorted(lines)

    def child(self, parent: str, name: str) -> str:
        """The node name of a child"""
        graph = self.query('x-debug-query-block-graph')
        names = {node['id']: node['name'] for node in graph['nodes']}
        for edge in graph['edges']:
            if names[edge['parent']] == parent and edge['name'] == name:
                return str(names[edge['child']])
        raise KeyError(f'{parent} has no child {name}')

    def replication_errors(self) -> List[Tuple[str, str]]:
        """Node and reason of each error that an event has told of since"""
        # what came before the reply to a command is here by now
        self.status()
        return [(event['data']['node-name'], event['data']['reason'])
                for event in self.get_qmp_events()
                if event['event'] == 'REPLICATION_ERROR']

    def is_job_running(self) -> bool:
        graph = self.query('x-debug-query-block-graph')
        return any(node['type'] == 'block-job' for node in graph['nodes'])


def stats_of(vm: VM, node: str) -> Json:
    """The statistics of a node's driver"""
    for entry in vm.query('query-blockstats', query_nodes=True):
        if entry.get('node-name') == node:
            return dict(entry['driver-specific'])
    raise KeyError(f'no statistics of {node}')


def error_of(reply: Json) -> Optional[str]:
    return reply['error']['desc'] if 'error' in reply else None


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f'waited too long for {what}')
        time.sleep(0.01)


class Brake:
    """
    A throttle group that holds writes for as long as a test wants.

    The clock of a QEMU under test stands still, so that a limit on their rate
    is one for ever.  Where it is reached is a matter of counting: the first
    write passes, and so do those that are held when their node is drained.
    """

    def __init__(self, vm: VM, name: str = 'brake') -> None:
        self.vm = vm
        self.name = name
        vm.cmd('object-add', qom_type='throttle-group', id=name)
        # for step(), which moves the clock of a VM that runs
        vm.cmd('cont')

    def above(self, node: Json, **options: Any) -> Json:
        """The options of a node with this one below it"""
        return {'driver': 'throttle', 'throttle-group': self.name,
                'file': node, **options}

    def hold(self) -> None:
        """From now on one write passes, and no other"""
        self._limit(1)

    def step(self, seconds: int = 1) -> None:
        """Let one more of them pass"""
        self.vm.qtest(f'clock_step {seconds * NANOSECONDS}')

    def let_go(self) -> None:
        self._limit(0)
        # the time that the first one waits for, whatever has passed before
        self.step(AGES)

    def _limit(self, writes_per_second: int) -> None:
        self.vm.cmd('qom-set', path=f'/objects/{self.name}', property='limits',
                    value={'iops-write': writes_per_second})


class Side:
    """A way into the disk, an NBD address, and what must be found there"""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.uri = ''

    def io(self, command: str) -> bool:
        """Run one qemu-io command; return whether it succeeded"""
        return qemu_io('-f', 'raw', '-c', command, self.uri,
                       check=False).returncode == 0

    def client(self, *args: str) -> Client:
        """Start a qemu-io that runs beside the test"""
        return iotests.qemu_tool_popen(iotests.qemu_io_args_no_fmt +
                                       ['-f', 'raw', *args, self.uri])

    def write(self, offset: int, length: int, byte: int,
              flags: str = '') -> None:
        command = f'write {flags} -P {byte} {offset} {length}'
        qemu_io('-f', 'raw', '-c', command, self.uri)
        self.data[offset:offset + length] = bytes([byte]) * length

    def zero(self, offset: int, length: int, flags: str = '') -> None:
        command = f'write -z {flags} {offset} {length}'
        qemu_io('-f', 'raw', '-c', command, self.uri)
        self.data[offset:offset + length] = bytes(length)

    @contextmanager
    def writing(self, length: int = CLUSTER, depth: int = 16
                ) -> Iterator[None]:
        """A client writes all over, as fast as it can, and never fails"""
        args = ['bench', '-w', '-f', 'raw', '-c', str(1 << 30),
                '-d', str(depth), '-s', str(length), '--pattern', '113',
                self.uri]
        with iotests.qemu_tool_popen(iotests.qemu_img_args + args) as client:
            try:
                yield
                assert client.poll() is None
            finally:
                client.kill()

    def write_many(self, requests: Sequence[Sequence[int]]) -> None:
        """Requests are (offset, length, byte); one client does them all"""
        args: List[str] = []
        for offset, length, byte in requests:
            args += ['-c', f'write -P {byte} {offset} {length}']
            self.data[offset:offset + length] = bytes([byte]) * length
        qemu_io('-f', 'raw', *args, self.uri)


class Secondary:
    """
    The chain of SPEC: quorum, replication, active, hidden, secondary disk.

    active, hidden and disk are blkdebug options to put below each of them.
    A brake can hold the disk's writes; with held, there is one.  Or each of
    them takes latency_ns.
    """

    def __init__(self, vm: VM, number: int = 0, size: int = SIZE,
                 active: Optional[Json] = None, hidden: Optional[Json] = None,
                 disk: Optional[Json] = None, held: bool = False,
                 brake: Optional[Brake] = None, latency_ns: int = 0) -> None:
        self.vm = vm
        self.number = number
        self.size = size
        self.faults = {'active': active, 'hidden': hidden, 'disk': disk}
        self.brake = Brake(vm, self.node('brake')) if held else brake
        self.latency_ns = latency_ns
        self.primary = Side(pattern(size))
        self.guest = Side(pattern(size))
        self.create_images()

    def node(self, kind: str) -> str:
        return f'{kind}{self.number}'

    def path(self, kind: str) -> str:
        return os.path.join(iotests.test_dir, self.node(kind) + '.img')

    def create_images(self) -> None:
        """Overlays are born with stale data: start has to empty them"""
        with open(self.path('disk'), 'wb') as file:
            file.write(self.primary.data)
        for kind in ('active', 'hidden'):
            qemu_img_create('-f', iotests.imgfmt, self.path(kind),
                            str(self.size))
            qemu_io('-c', f'write -P 0x5a {3 * CLUSTER} 4k', self.path(kind))

    def remove_images(self) -> None:
        for kind in ('active', 'hidden', 'disk'):
            iotests.try_remove(self.path(kind))

    def image_options(self, kind: str) -> Json:
        return {'driver': 'file', 'filename': self.path(kind)}

    def file_options(self, kind: str) -> Json:
        image = self.image_options(kind)
        faults = self.faults[kind]
        if faults is not None:
            image = {'driver': 'blkdebug', 'image': image, **faults}
        if kind == 'disk' and self.latency_ns:
            image = slow(image, self.latency_ns)
        if kind == 'disk' and self.brake:
            image = self.brake.above(image)
        return image

    def whole_chain(self, path: Optional[Callable[[str], str]] = None) -> str:
        """The images, for a tool that finds in them what the guest has"""
        path = path or self.path
        chain: Json = {'driver': 'raw', 'file': {
            'driver': 'file', 'filename': path('disk')}}
        for kind in ('hidden', 'active'):
            chain = {'driver': iotests.imgfmt, 'backing': chain, 'file': {
                'driver': 'file', 'filename': path(kind)}}
        return f'json:{json.dumps(chain)}'

    def hold_merge(self) -> None:
        """A merge that begins after this does not end by itself"""
        assert self.brake
        self.brake.hold()

    def step(self) -> None:
        """One write of it at most"""
        assert self.brake
        self.brake.step()

    def let_go(self) -> None:
        assert self.brake
        self.brake.let_go()

    def overlay_options(self, kind: str, backing: Any) -> Json:
        return {'driver': iotests.imgfmt, 'node-name': self.node(kind),
                'file': self.file_options(kind), 'backing': backing}

    def replication_options(self, **options: Any) -> Json:
        hidden = self.overlay_options('hidden', self.node('disk'))
        return {'driver': 'replication', 'node-name': self.node('repl'),
                'mode': 'secondary', 'top-id': self.node('top'),
                'file': self.overlay_options('active', hidden), **options}

    def disk_options(self) -> Json:
        return {'driver': 'raw', 'node-name': self.node('disk'),
                'file': self.file_options('disk')}

    def add_disk(self, **options: Any) -> None:
        self.vm.cmd('blockdev-add', {**self.disk_options(), **options})

    def add_top(self, replication: Union[None, str, Json] = None) -> None:
        self.vm.cmd('blockdev-add',
                    {'driver': 'quorum', 'node-name': self.node('top'),
                     'vote-threshold': 1, 'read-pattern': 'fifo',
                     'children': [replication or self.replication_options()]})

    def export_disk(self, **options: Any) -> None:
        self.primary.uri = self.vm.export(self.node('disk'), **options)

    def export_top(self, **options: Any) -> None:
        self.guest.uri = self.vm.export(self.node('top'), **options)

    def open(self, **export_options: Any) -> None:
        self.add_disk()
        self.export_disk(**export_options)
        self.add_top()
        self.export_top(**export_options)

    def write_both(self, byte: int) -> None:
        """Writes apart, over each other and at odd offsets, at once"""
        end = self.size
        self.primary.write_many([
            (0, CLUSTER, byte),
            (3 * CLUSTER + 7, 3, byte + 1),
            (7 * CLUSTER + 1, 2 * CLUSTER, byte + 2),
            (end - 1000, 1000, byte + 3),
        ])
        self.guest.write_many([
            (3 * CLUSTER + 8, 700, byte + 4),
            (6 * CLUSTER, 2 * CLUSTER + 1, byte + 5),
            (13 * CLUSTER, CLUSTER, byte + 6),
            (end - 1, 1, byte + 7),
        ])
        self.primary.write(3 * CLUSTER, 2 * KIB, byte + 8)
        self.primary.zero(10 * CLUSTER, CLUSTER + 512)
        self.guest.zero(12 * CLUSTER, CLUSTER)

    def checkpointed(self) -> None:
        """The guest now sees what the primary has written"""
        self.guest.data[:] = self.primary.data

    def promoted(self) -> bool:
        """Has the commit swapped the secondary disk in?"""
        return self.vm.child(self.node('repl'), 'file') == self.node('disk')

    def wait_promoted(self) -> None:
        wait_until(self.promoted, f"{self.node('repl')} to be promoted")
        wait_until(lambda: not self.vm.is_job_running(), 'the commit to end')
        self.primary.data[:] = self.guest.data

    def wait_failover_reported(self) -> None:
        wait_until(lambda: self.vm.status() is not None,
                   'the failed commit to be reported')
        wait_until(lambda: not self.vm.is_job_running(), 'the commit to end')


class TestCase(iotests.QMPTestCase):
    """One QEMU, which has to survive the test and to quit on request"""

    machine = 'none'
    seconds = TEST_SECONDS

    def setUp(self) -> None:
        timeout = iotests.Timeout(self.seconds, 'the test took too long')
        timeout.__enter__()
        self.addCleanup(timeout.__exit__, None, None, None)
        self.secondaries: List[Secondary] = []
        self.addCleanup(self.remove_images)
        self.vm = VM(machine=self.machine)
        self.launch()

    def launch(self) -> None:
        self.vm.launch()

    def tearDown(self) -> None:
        # whatever has hung before may do so for ever
        with iotests.Timeout(QUIT_SECONDS, 'QEMU does not quit'):
            try:
                self.quit()
            except TimeoutError:
                self.vm.kill()
                raise

    def quit(self) -> None:
        """QEMU quits in any state, and is not killed by anything"""
        try:
            self.vm.shutdown(timeout=15)
        except AbnormalShutdown:
            # the exit code and the log say more
            pass
        log = '\n'.join((self.vm.get_log() or '').splitlines()[-5:])
        self.assertEqual(self.vm.exitcode(), 0, log)

    def remove_images(self) -> None:
        for secondary in self.secondaries:
            secondary.remove_images()

    def secondary(self, **options: Any) -> Secondary:
        """Images and a description, no nodes yet"""
        options = {'number': len(self.secondaries), **options}
        secondary = Secondary(self.vm, **options)
        self.secondaries.append(secondary)
        return secondary

    def opened(self, **options: Any) -> Secondary:
        secondary = self.secondary(**options)
        secondary.open()
        return secondary

    def running(self, **options: Any) -> Secondary:
        secondary = self.opened(**options)
        self.vm.start()
        return secondary

    # Images

    def assert_image(self, image: str, data: bytearray,
                     fmt: str = 'raw') -> None:
        model = os.path.join(iotests.test_dir, 'model.img')
        with open(model, 'wb') as file:
            file.write(data)
        result = qemu_img('compare', '-f', fmt, '-F', 'raw', image, model,
                          check=False)
        iotests.try_remove(model)
        self.assertEqual(result.returncode, 0,
                         f'{image}: {result.stdout.strip()}')

    def assert_side(self, side: Side) -> None:
        self.assert_image(side.uri, side.data)

    def assert_view(self, secondary: Secondary) -> None:
        """What both sides must read, every byte"""
        self.assert_side(secondary.guest)
        self.assert_side(secondary.primary)

    def assert_empty(self, secondary: Secondary, kind: str) -> None:
        """Nothing is allocated in this overlay"""
        extents = iotests.qemu_img_map('-U', '-f', iotests.imgfmt,
                                       secondary.path(kind))
        self.assertTrue(all(extent['depth'] != 0 or not extent['present']
                            for extent in extents), extents)

    # Errors

    def assert_says(self, error: Optional[str], *words: str) -> None:
        self.assertIsNotNone(error, f'no error, expected {words}')
        for word in words:
            self.assertIn(word, str(error))

    def assert_refused(self, secondary: Secondary, *words: str) -> None:
        """start fails, twice alike, says why and leaves nothing behind"""
        before = self.vm.graph()
        for _ in range(2):
            self.assert_says(self.vm.start_error(), *words)
            self.assertEqual(self.vm.graph(), before)
            self.assertFalse(secondary.guest.io('write 0 512'))
        self.assert_says(self.vm.status(), secondary.node('repl'))

    def assert_works(self, secondary: Secondary) -> None:
        """It runs: both sides read and write right over a checkpoint"""
        self.assertIsNone(self.vm.status())
        secondary.write_both(0x10)
        self.assert_view(secondary)
        self.vm.checkpoint()
        secondary.checkpointed()
        self.assert_view(secondary)
        self.assertIsNone(self.vm.status())
