# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster on one machine: Debian's Pacemaker and Corosync in namespaces.

A node has its own network, processes, host name and mounts.  The packages are
unpacked into the cache and not installed.
"""

import hashlib
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Dict, Iterable, List, Set

from guest import build_once, debian_release, run_tool

HERE = Path(__file__).resolve().parent
# What it says of the resource is what is tested
PAGE = HERE.parents[1] / 'docs/operate-a-cluster.txt'
PACKAGES = ('pacemaker', 'pacemaker-cli-utils', 'corosync',
            'resource-agents', 'libxml2-utils')
FETCH_SECONDS = 300
SECONDS = 30.0
# There is no such card
NOBODY = '02:00:00:00:00:ff'
# Corosync has one of its own, and so has replication
NETWORKS = CLUSTER, LINK = 'net-cluster', 'net-link'
USERS = {'passwd': 'hacluster:x:981:981::/var/lib/pacemaker:/bin/false\n',
         'group': 'haclient:x:981:\n'}
COROSYNC = '''totem {{
    version: 2
    cluster_name: ha
    transport: udpu
    token: 1000
}}
nodelist {{
{nodes}
}}
quorum {{
    provider: corosync_votequorum
    {two_node}
}}
system {{
    sched_rr: no
}}
logging {{
    to_logfile: yes
    logfile: /var/log/cluster/corosync.log
    to_syslog: no
}}
'''
NODE = '''    node {{
        ring0_addr: {address}
        name: {name}
        nodeid: {number}
    }}'''
CIB = '''<cib admin_epoch="0" epoch="1" num_updates="0"
     validate-with="pacemaker-3.9">
<configuration>
 <crm_config><cluster_property_set id="options">
  <nvpair id="fencing" name="stonith-enabled" value="true"/>
  <nvpair id="dc" name="dc-deadtime" value="1s"/>
  <nvpair id="load" name="load-threshold" value="10000%"/>
 </cluster_property_set></crm_config>
 <nodes>
{nodes}
 </nodes>
 <resources>
  <primitive id="fence" class="stonith" type="fence_test">
   <instance_attributes id="fence-attributes">
    <nvpair id="hosts" name="pcmk_host_list" value="{names}"/>
   </instance_attributes>
  </primitive>
{clone}</clone>
 </resources>
 <constraints>{constraint}</constraints>
</configuration>
<status/>
</cib>
'''
HOST = """  <node id="{number}" uname="{name}">
   <instance_attributes id="{name}-attributes">
{score}
  </instance_attributes></node>"""
SCORE = '   <nvpair id="{name}-score" name="master-vm" value="{score}"/>'
# On a third node, which is asked for its vote only
CONSTRAINT = """
  <rsc_location id="no-vm" rsc="vms" node="north" score="-INFINITY"
                resource-discovery="never"/>
 """
# Asks the test to power a node off
FENCE = '''#!/usr/bin/python3
import os, socket, sys
if os.environ.get('action') or len(sys.argv) > 1:
    words = {{'action': (sys.argv[1:] or [''])[0].lstrip('-o ')}}
else:
    words = dict(line.strip().partition('=')[::2] for line in sys.stdin)
action = words.get('action', '')
if action == 'metadata':
    print("""<resource-agent name="fence_test"><parameters/>
<actions><action name="off"/><action name="reboot"/><action name="on"/>
<action name="monitor"/><action name="list"/><action name="metadata"/>
</actions></resource-agent>""")
elif action in ('off', 'reboot'):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect('{path}')
        name = words.get('nodename') or words.get('port', '')
        sock.sendall(f'{{action}} {{name}} {{socket.gethostname()}}'.encode())
        sys.exit(0 if sock.recv(10) == b'ok' else 1)
'''
PROGRAM = '''#!/bin/sh
export PYTHONPATH={path}
exec {program} "$@"
'''


def unpacked(cache: Path) -> Path:
    """The packages, downloaded once."""
    def build(folder: Path) -> None:
        archives = folder / 'archives'
        (archives / 'partial').mkdir(parents=True)
        run_tool(['apt-get', 'install', '-y', '-qq', '--download-only',
                  '--no-install-recommends', '-o', 'Debug::NoLocking=true',
                  '-o', f'Dir::Cache::archives={archives}', *PACKAGES],
                 FETCH_SECONDS)
        for deb in sorted(archives.glob('*.deb')):
            run_tool(['dpkg-deb', '-x', str(deb), str(folder)])
        # as it is where /lib is a link
        if (folder / 'lib').exists():
            shutil.copytree(folder / 'lib', folder / 'usr/lib', symlinks=True,
                            dirs_exist_ok=True)
        shutil.rmtree(archives)

    which = hashlib.sha256(' '.join(PACKAGES).encode()).hexdigest()[:8]
    return build_once(cache / f'cluster-{debian_release()}-{which}', build)


def cib(nodes: Iterable[str], scores: Dict[str, int]) -> str:
    """What a cluster is configured as that has not begun yet."""
    clone = PAGE.read_text('utf-8')
    clone = clone[clone.index('<clone'):clone.index('</clone>')]
    return CIB.format(
        clone=clone, names=' '.join(nodes),
        constraint=CONSTRAINT if 'north' in nodes else '',
        nodes='\n'.join(HOST.format(
            number=number, name=name, score=SCORE.format(
                name=name, score=scores[name]) if name in scores else '')
            for number, name in enumerate(nodes, 1)))


def ip(*words: str) -> None:
    """Change the network."""
    subprocess.run(['ip', *words], check=True, timeout=SECONDS,
                   stderr=subprocess.PIPE)


class Node:
    """A host."""

    def __init__(self, cluster: 'Cluster', name: str, number: int) -> None:
        self.name = name
        self._cluster = cluster
        self.number = number
        self._boots = self._cables = 0
        # what is plugged in, by the network, and what is of no use there
        self._plugged: Dict[str, str] = {}
        self.dark: Set[str] = set()
        self.namespace = ''
        self._process: 'subprocess.Popen[bytes] | None' = None

    def start(self) -> None:
        """Power it on."""
        self._boots += 1
        cluster = self._cluster
        self.namespace = f'{cluster.prefix}-{self.name}{self._boots}'
        ip('netns', 'add', self.namespace)
        for network in NETWORKS:
            self.plug(network)
        with open(cluster.folder / f'{self.name}.log', 'ab') as log:
            # pylint: disable=consider-using-with
            self._process = subprocess.Popen(
                ['ip', 'netns', 'exec', self.namespace, 'unshare', '--mount',
                 '--pid', '--fork', '--uts', '--ipc', '--kill-child',
                 str(HERE / 'node-init.sh'), self.name,
                 str(cluster.packages), str(cluster.folder / 'extra'),
                 str(cluster.folder / f'etc-{self.name}'),
                 str(cluster.folder / f'cib-{self.name}')],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def plug(self, network: str) -> None:
        """Put a cable in."""
        # each has its own name: the kernel lets go of one late
        self._cables += 1
        veth = f'v{self.number}-{self._cables}'
        switch = self._cluster.switch
        ip('-n', switch, 'link', 'add', veth, 'type', 'veth',
           'peer', 'name', network, 'netns', self.namespace,
           # as a host has it that comes back
           'address', f'02:00:00:00:0{NETWORKS.index(network)}:'
           f'0{self.number}')
        ip('-n', switch, 'link', 'set', veth, 'up')
        if network not in self.dark:
            ip('-n', switch, 'link', 'set', veth, 'master', f'br-{network}')
        ip('-n', self.namespace, 'addr', 'add',
           f'{self._cluster.address(self, network)}/24', 'dev', network)
        ip('-n', self.namespace, 'link', 'set', network, 'up')
        self._plugged[network] = veth

    def unplug(self, network: str) -> None:
        """Cut a cable."""
        veth = self._plugged.pop(network, None)
        if veth:
            ip('-n', self._cluster.switch, 'link', 'del', veth)

    def cut(self, network: str, mute: bool = False) -> None:
        """Until it is healed, or only what it sends is lost, if it is mute."""
        with self._cluster.lock:
            if not mute:
                self.dark.add(network)
            if network not in self._plugged:
                return
            if not mute:
                ip('-n', self._cluster.switch, 'link', 'set',
                   self._plugged[network], 'nomaster')
                return
            for peer in self._cluster.nodes.values():
                if peer is not self:
                    ip('-n', self.namespace, 'neigh', 'replace',
                       self._cluster.address(peer, network), 'dev', network,
                       'lladdr', NOBODY, 'nud', 'permanent')

    def heal(self) -> None:
        """All that was cut."""
        with self._cluster.lock:
            self.dark.clear()
            for network, veth in self._plugged.items():
                ip('-n', self._cluster.switch, 'link', 'set', veth, 'master',
                   f'br-{network}')
                ip('-n', self.namespace, 'neigh', 'flush', 'dev', network,
                   'nud', 'permanent')

    def power_off(self) -> None:
        """Whatever it does."""
        with self._cluster.lock:
            for network in NETWORKS:
                self.unplug(network)
            if self._process:
                # its child, the node's first process, ends with it, but not
                # before all others of the node
                ended = [os.pidfd_open(pid) for pid in self._init]
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait(timeout=SECONDS)
                self._process = None
                for pid in ended:
                    assert select.select([pid], [], [], SECONDS)[0]
                    os.close(pid)
                ip('netns', 'del', self.namespace)

    @property
    def _init(self) -> List[int]:
        """The node's first process, if there is one."""
        pid = self._process.pid if self._process else 0
        path = Path(f'/proc/{pid}/task/{pid}/children')
        try:
            return [int(child) for child in path.read_text('utf-8').split()]
        except OSError:
            return []

    def run(self, *words: str, seconds: float = SECONDS) -> str:
        """Run a program of the cluster there, if it is on."""
        init = self._init
        return '' if not init else subprocess.run(
            ['nsenter', '-t', str(init[0]), '-m', '-p', '-n', '-u',
             '-i', *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=seconds).stdout


class Cluster:
    """Nodes, the switch between them, and what powers them off."""

    def __init__(self, folder: Path, packages: Path, ha: Path, *,
                 witness: bool = False) -> None:
        self.folder = folder
        self.packages = packages
        self.prefix = f'ha{os.getpid()}'
        self.switch = f'{self.prefix}-switch'
        self.nodes: Dict[str, Node] = {
            name: Node(self, name, number)
            for number, name in enumerate(
                ('east', 'west', 'north') if witness else ('east', 'west'),
                1)}
        # held where cables and power are changed
        self.lock = threading.RLock()
        self.fenced: List[str] = []
        self.fenced_at = 0.0
        # how long a fencing takes, and who has no way to the device
        self.fence_seconds = 0.0
        self.powerless: Set[str] = set()
        self._lay(ha)
        ip('netns', 'add', self.switch)
        for network in NETWORKS:
            bridge = f'br-{network}'
            ip('-n', self.switch, 'link', 'add', bridge, 'type', 'bridge')
            ip('-n', self.switch, 'link', 'set', bridge, 'up')
        self._listen()

    @staticmethod
    def address(node: Node, network: str) -> str:
        """On the switch, which nobody else sees."""
        return f'10.9.{NETWORKS.index(network)}.{node.number}'

    def _lay(self, ha: Path) -> None:
        """What the nodes have besides."""
        extra = self.folder / 'extra/usr'
        path = os.environ.get('PYTHONPATH', '')
        files = {
            extra / 'sbin/fence_test': FENCE.format(
                path=self.folder / 'fence.sock'),
            extra / 'lib/ocf/resource.d/qemu-replication/vm': PROGRAM.format(
                path=path, program=ha / 'ocf-vm'),
            extra / 'sbin/qemu-replication': PROGRAM.format(
                path=path, program=ha / 'qemu-replication')}
        conf = COROSYNC.format(nodes='\n'.join(
            NODE.format(address=self.address(node, CLUSTER), name=name,
                        number=node.number)
            for name, node in self.nodes.items()),
            two_node='two_node: 1' if len(self.nodes) == 2 else '')
        begin = cib(self.nodes, {'east': 200})
        for name in self.nodes:
            etc = self.folder / f'etc-{name}'
            files[etc / 'corosync/corosync.conf'] = conf
            files[self.folder / f'cib-{name}/cib.xml'] = begin
            for name, line in USERS.items():
                files[etc / name] = Path('/etc', name).read_text('utf-8') \
                    + line
        for file, text in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, 'utf-8')
            if extra in file.parents:
                file.chmod(0o755)

    def _listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(self.folder / 'fence.sock'))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                action, name, by_whom = connection.recv(1000).decode().split()
                time.sleep(self.fence_seconds)
                if by_whom in self.powerless \
                        or select.select([connection], [], [], 0)[0]:
                    # or who has asked is off
                    continue
                node = self.nodes[name]
                with self.lock:
                    node.power_off()
                    self.fenced.append(name)
                    self.fenced_at = time.monotonic()
                    if action == 'reboot':
                        node.start()
                connection.sendall(b'ok')

    def close(self) -> None:
        """Leave nothing; once is enough."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        for node in self.nodes.values():
            node.power_off()
        subprocess.run(['ip', 'netns', 'del', self.switch], check=False,
                       timeout=SECONDS)
