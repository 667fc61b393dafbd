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
from typing import Callable, Dict, List

from guest import build_once, debian_release, run_tool

HERE = Path(__file__).resolve().parent
PACKAGES = ('pacemaker', 'pacemaker-cli-utils', 'corosync',
            'resource-agents')
FETCH_SECONDS = 300
SECONDS = 30.0
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
    two_node: 1
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
 </nodes>
 <resources>
  <primitive id="fence" class="stonith" type="fence_test">
   <instance_attributes id="fence-attributes">
    <nvpair id="hosts" name="pcmk_host_list" value="east west"/>
   </instance_attributes>
  </primitive>
  <clone id="vms"><meta_attributes id="vms-meta">
    <nvpair id="promotable" name="promotable" value="true"/>
    <nvpair id="clone-max" name="clone-max" value="2"/>
    <nvpair id="promoted-max" name="promoted-max" value="1"/>
   </meta_attributes>
   <primitive id="vm" class="ocf" provider="qemu-replication" type="vm">
    <instance_attributes id="vm-attributes">
     <nvpair id="config" name="config" value="{config}"/>
    </instance_attributes>
    <operations>
     <op id="m1" name="monitor" interval="2s" role="Promoted" timeout="30s"/>
     <op id="m2" name="monitor" interval="3s" role="Unpromoted"
         timeout="30s"/>
     <op id="start" name="start" interval="0" timeout="90s"/>
     <op id="stop" name="stop" interval="0" timeout="90s"/>
     <op id="promote" name="promote" interval="0" timeout="90s"/>
     <op id="demote" name="demote" interval="0" timeout="90s"/>
    </operations>
   </primitive>
  </clone>
 </resources>
 <constraints/>
</configuration>
<status/>
</cib>
'''
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
AGENT = '''#!/bin/sh
export PYTHONPATH={path}
exec {agent} "$@"
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
        self.namespace = ''
        self._process: 'subprocess.Popen[bytes] | None' = None

    @property
    def _veth(self) -> str:
        # each has its own name: the kernel lets go of one late
        return f'v{self.number}-{self._cables}'

    def start(self) -> None:
        """Power it on."""
        self._boots += 1
        cluster = self._cluster
        self.namespace = f'{cluster.prefix}-{self.name}{self._boots}'
        ip('netns', 'add', self.namespace)
        self.plug()
        with open(cluster.folder / f'{self.name}.log', 'ab') as log:
            # pylint: disable=consider-using-with
            self._process = subprocess.Popen(
                ['ip', 'netns', 'exec', self.namespace, 'unshare', '--mount',
                 '--pid', '--fork', '--uts', '--ipc', '--kill-child',
                 str(HERE / 'node-init.sh'), self.name,
                 str(cluster.packages), str(cluster.folder / 'extra'),
                 str(cluster.folder / f'etc-{self.name}')],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)

    def plug(self) -> None:
        """Put its cable in."""
        self._cables += 1
        switch = self._cluster.switch
        ip('-n', switch, 'link', 'add', self._veth, 'type', 'veth',
           'peer', 'name', 'eth0', 'netns', self.namespace)
        ip('-n', switch, 'link', 'set', self._veth, 'master', 'br0', 'up')
        ip('-n', self.namespace, 'addr', 'add',
           f'{self._cluster.address(self)}/24', 'dev', 'eth0')
        ip('-n', self.namespace, 'link', 'set', 'eth0', 'up')

    def unplug(self) -> None:
        """Cut its cable."""
        ip('-n', self._cluster.switch, 'link', 'del', self._veth)

    def power_off(self) -> None:
        """Whatever it does."""
        try:
            self.unplug()
        except subprocess.CalledProcessError:
            # it has none any more
            pass
        if self._process:
            # its child, the node's first process, ends with it
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(timeout=SECONDS)
            self._process = None
            ip('netns', 'del', self.namespace)

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

    def __init__(self, folder: Path, packages: Path, config: Path,
                 agent: Path) -> None:
        self.folder = folder
        self.packages = packages
        self.prefix = f'ha{os.getpid()}'
        self.switch = f'{self.prefix}-switch'
        self.nodes: Dict[str, Node] = {
            name: Node(self, name, number)
            for number, name in enumerate(('east', 'west'), 1)}
        self.fenced: List[str] = []
        self._lay(config, agent)
        ip('netns', 'add', self.switch)
        ip('-n', self.switch, 'link', 'add', 'br0', 'type', 'bridge')
        ip('-n', self.switch, 'link', 'set', 'br0', 'up')
        self._listen()

    @staticmethod
    def address(node: Node) -> str:
        """On the switch, which nobody else sees."""
        return f'10.9.0.{node.number}'

    def _lay(self, config: Path, agent: Path) -> None:
        """What the nodes have besides."""
        extra = self.folder / 'extra/usr'
        files = {
            extra / 'sbin/fence_test': FENCE.format(
                path=self.folder / 'fence.sock'),
            extra / 'lib/ocf/resource.d/qemu-replication/vm': AGENT.format(
                path=os.environ.get('PYTHONPATH', ''), agent=agent)}
        conf = COROSYNC.format(nodes='\n'.join(
            NODE.format(address=self.address(node), name=name,
                        number=node.number)
            for name, node in self.nodes.items()))
        for name in self.nodes:
            etc = self.folder / f'etc-{name}'
            files[etc / 'corosync/corosync.conf'] = conf
            files[etc / 'cib.xml'] = CIB.format(config=config)
            for file, line in USERS.items():
                files[etc / file] = Path('/etc', file).read_text('utf-8') \
                    + line
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, 'utf-8')
            if extra in path.parents:
                path.chmod(0o755)

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
