# SPDX-License-Identifier: GPL-2.0-or-later
"""A cluster on one machine: Debian's Pacemaker and Corosync in namespaces.

A node has its own network, processes, host name and mounts.  The packages are
unpacked into the cache and not installed.
"""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Tuple

from guest import build_once, debian_release, run_tool

HERE = Path(__file__).resolve().parent
# What it says of the resource is what is tested
PAGE = HERE.parents[1] / 'docs/operate-a-cluster.txt'
PACKAGES = ('pacemaker', 'pacemaker-cli-utils', 'corosync',
            'resource-agents')
FETCH_SECONDS = 300
SECONDS = 30.0
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
  <node id="1" uname="east"><instance_attributes id="east-attributes">
   <nvpair id="seed" name="master-vm" value="200"/>
  </instance_attributes></node>
  <node id="2" uname="west"/>
{witness}
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
# A third node, which is asked for its vote only
WITNESS = '  <node id="3" uname="north"/>'
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
        sock.sendall(f'{{action}} {{name}}\\n'.encode())
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
                  '--no-install-recommends',
                  '-o', f'Dir::Cache::archives={archives}', *PACKAGES],
                 FETCH_SECONDS)
        for deb in sorted(archives.glob('*.deb')):
            run_tool(['dpkg-deb', '-x', str(deb), str(folder)])
        # as it is where /lib is a link
        if (folder / 'lib').exists():
            shutil.copytree(folder / 'lib', folder / 'usr/lib', symlinks=True,
                            dirs_exist_ok=True)
        shutil.rmtree(archives)

    return build_once(cache / f'cluster-{debian_release()}', build)


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
        # what is plugged in, by the network
        self._plugged: Dict[str, str] = {}
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
        ip('-n', switch, 'link', 'set', veth, 'master', f'br-{network}', 'up')
        ip('-n', self.namespace, 'addr', 'add',
           f'{self._cluster.address(self, network)}/24', 'dev', network)
        ip('-n', self.namespace, 'link', 'set', network, 'up')
        self._plugged[network] = veth

    def unplug(self, network: str) -> None:
        """Cut a cable."""
        veth = self._plugged.pop(network, None)
        if veth:
            ip('-n', self._cluster.switch, 'link', 'del', veth)

    def power_off(self) -> None:
        """Whatever it does."""
        for network in NETWORKS:
            self.unplug(network)
        if self._process:
            # its child, the node's first process, ends with it
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=SECONDS)
            self._process = None
            ip('netns', 'del', self.namespace)
        self._cluster.log.append((time.time(), self.name, 'power off'))

    def run(self, *words: str) -> str:
        """Run a program of the cluster there."""
        assert self._process
        pid = self._process.pid
        init = Path(f'/proc/{pid}/task/{pid}/children').read_text(
            'utf-8').split()[0]
        return subprocess.run(
            ['nsenter', '-t', init, '-m', '-p', '-n', '-u', '-i', *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False, timeout=SECONDS).stdout


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
        self.fenced: List[str] = []
        # when, where and what
        self.log: List[Tuple[float, str, str]] = []
        self.fenced_at = 0.0
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
        clone = PAGE.read_text('utf-8')
        clone = clone[clone.index('<clone'):clone.index('</clone>')]
        cib = CIB.format(clone=clone, names=' '.join(self.nodes),
                         witness=WITNESS if len(self.nodes) > 2 else '',
                         constraint=CONSTRAINT if len(self.nodes) > 2 else '')
        for name in self.nodes:
            etc = self.folder / f'etc-{name}'
            files[etc / 'corosync/corosync.conf'] = conf
            files[self.folder / f'cib-{name}/cib.xml'] = cib
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
                action, _, name = connection.recv(1000).decode(
                    ).strip().partition(' ')
                node = self.nodes[name]
                node.power_off()
                self.fenced.append(name)
                self.fenced_at = time.monotonic()
                connection.sendall(b'ok')
                if action == 'reboot':
                    node.start()

    def wait(self, done: Callable[[], bool], what: str, seconds: float
             ) -> None:
        """Wait for something that can be asked for."""
        deadline = time.monotonic() + seconds
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(f'{what} took more than {seconds:.0f} s')
            time.sleep(0.1)

    def close(self) -> None:
        """Leave nothing; once is enough."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        for node in self.nodes.values():
            node.power_off()
        subprocess.run(['ip', 'netns', 'del', self.switch], check=False,
                       timeout=SECONDS)
