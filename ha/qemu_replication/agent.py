# SPDX-License-Identifier: GPL-2.0-or-later
"""The OCF agent: it has the keeper do what Pacemaker wants.

It knows how to ask, and what an answer means to Pacemaker; the keeper does
the rest, and sets the scores.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

from . import check, cluster
from .check import TIMEOUTS
from .client import DONE, ask
from .config import Config, ConfigError, Json, config_path, load
from .errors import Failed
from .facts import open_log
from .states import AT_REST, PRIMARY, SHARED

SUCCESS, ERROR, ARGS, UNIMPLEMENTED, PERM, INSTALLED, CONFIGURED, \
    NOT_RUNNING, RUNNING_PROMOTED, FAILED_PROMOTED = range(10)
QUIT_SECONDS = 20.0
POLL_SECONDS = 0.1

METADATA = f'''<?xml version="1.0"?>
<!DOCTYPE resource-agent SYSTEM "ra-api-1.dtd">
<resource-agent name="vm" version="1.0">
<version>1.1</version>
<longdesc lang="en">
A VM that a second host goes on with when the first one dies, with QEMU's COLO
and block replication.  A promotable clone of two: the promoted one runs the
VM, the other one stands by.  Promotion scores are set by the keeper of the
VM; give the host that has the VM's disks one before the first start.
</longdesc>
<shortdesc lang="en">VM protected by block replication</shortdesc>
<parameters>
<parameter name="config" unique="1" required="1">
<longdesc lang="en">
The VM's name, for /etc/qemu-replication/NAME.toml, or the path of that file,
which is the same on both hosts.  Its [cluster] has judge = "pacemaker" and
the name of this resource.
</longdesc>
<shortdesc lang="en">configuration</shortdesc>
<content type="string"/>
</parameter>
</parameters>
<actions>
<action name="start" timeout="{TIMEOUTS['start']}s"/>
<action name="stop" timeout="{TIMEOUTS['stop']}s"/>
<action name="promote" timeout="{TIMEOUTS['promote']}s"/>
<action name="demote" timeout="{TIMEOUTS['demote']}s"/>
<action name="monitor" role="Promoted" interval="5s"
 timeout="{TIMEOUTS['monitor']}s"/>
<action name="monitor" role="Unpromoted" interval="6s"
 timeout="{TIMEOUTS['monitor']}s"/>
<action name="validate-all" timeout="{TIMEOUTS['validate-all']}s"/>
<action name="meta-data" timeout="{TIMEOUTS['meta-data']}s"/>
</actions>
</resource-agent>
'''


def kept(path: Path) -> Path:
    """The file that a VM was started with: changes are for its next start."""
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()
    return Path(os.environ.get('HA_RSCTMP', '/run/resource-agents'),
                f'qemu-replication-{path.stem}-{digest[:8]}.toml')


def say(text: str) -> None:
    """To Pacemaker's log."""
    print(text, file=sys.stderr)


class Agent:
    """One call of it."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def status(self) -> Optional[Json]:
        """What the keeper tells; nothing, if there is none."""
        try:
            return next(ask(self.config, {'command': 'status',
                                          'other': False}), None)
        except TimeoutError as exc:
            # nobody knows what it may do next
            raise Failed('the keeper does not answer') from exc
        except OSError:
            return None

    def found(self) -> Optional[Json]:
        """The same; a QEMU without a keeper gets one."""
        told = self.status()
        if told is None and check.running_qemu(self.config):
            self._start_keeper()
            told = self.status()
            if told is None:
                # not that nothing runs here
                raise Failed('the keeper has ended again')
        return told

    def order(self, command: str, force: bool = False, wait: bool = True
              ) -> int:
        """Have the keeper do something."""
        status = ERROR
        try:
            for answer in ask(self.config, {'command': command, 'wait': wait,
                                            'force': force}):
                if 'say' in answer:
                    say(answer['say'])
                status = answer.get('status', status)
        except OSError as exc:
            say(f'no keeper: {exc}')
        return status

    def _start_keeper(self) -> None:
        """It goes on without us, as QEMU does without it."""
        with open_log(self.config.run / 'keeper.log') as log:
            # pylint: disable=consider-using-with
            keeper = subprocess.Popen(
                [sys.executable, '-B', '-m', __package__, 'keeper',
                 str(self.config.path), '--host', self.config.here],
                env=dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True)
        while self.status() is None:
            if keeper.poll() is not None:
                raise Failed('the keeper did not start: see '
                             f'{self.config.run}/keeper.log')
            time.sleep(POLL_SECONDS)

    # What Pacemaker asks for

    def validate_all(self) -> int:
        """Is this host able to do it?"""
        for name, wanted in (('clone_max', '2'), ('promoted_max', '1')):
            value = os.environ.get(f'OCF_RESKEY_CRM_meta_{name}', wanted)
            if value != wanted:
                say(f'{name.replace("_", "-")} has to be {wanted}')
                return CONFIGURED
        if not self.config.cluster.resource:
            say(f'{self.config.path}: [cluster] has to have judge = '
                '"pacemaker", and a resource')
            return CONFIGURED
        found = list(check.problems(self.config, False))
        for problem in found:
            say(problem)
        return INSTALLED if found else SUCCESS

    def monitor(self) -> int:
        """What runs here?"""
        told = self.found()
        if told is None:
            return NOT_RUNNING
        if told['state'] == 'down' and told['facts']['data'] == SHARED \
                and told['pid'] is None:
            # the keeper has deleted the score: it is demoted, which is faster
            # than to recover it
            return RUNNING_PROMOTED
        if told['state'] in ('down', 'stuck'):
            return FAILED_PROMOTED
        return RUNNING_PROMOTED if told['role'] == PRIMARY else SUCCESS

    def start(self) -> int:
        """Have a keeper, and stand by unless these are the VM's disks."""
        status = self.validate_all()
        if status != SUCCESS:
            return status
        runs = self.status() is not None
        self._keep_file(runs)
        if not runs:
            self._start_keeper()
        told = self.status()
        if told is None:
            return ERROR
        if told['state'] in ('stopped', 'yielded') \
                and not self._has_data(told):
            return SUCCESS if self.order('standby') == DONE else ERROR
        return SUCCESS

    def _keep_file(self, runs: bool) -> None:
        path = kept(self.config.path)
        if not runs or not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix('.new')
            shutil.copyfile(self.config.path, fresh)
            os.replace(fresh, path)

    def _has_data(self, told: Json) -> bool:
        """Whether the VM can be started from these disks."""
        data = told['facts']['data']
        if data:
            return bool(data != 'replica')
        return cluster.score(self.config.cluster.resource,
                             self.config.here) is not None

    def stop(self) -> int:
        """End all of it."""
        if self.found() is None:
            return SUCCESS
        if self.order('stop', force=True) != DONE:
            return ERROR
        self.order('quit')
        deadline = time.monotonic() + QUIT_SECONDS
        while self.status() is not None:
            if time.monotonic() > deadline:
                return ERROR
            time.sleep(POLL_SECONDS)
        return SUCCESS

    def promote(self) -> int:
        """Run the VM here."""
        told = self.found()
        while told and told['state'] == 'joining':
            # Pacemaker does not do so for ever
            time.sleep(POLL_SECONDS)
            told = self.status()
        if told is None:
            return NOT_RUNNING
        if told['role'] == PRIMARY:
            return SUCCESS
        if told['state'] in AT_REST:
            return SUCCESS if self.order('protect', wait=False) == DONE \
                else ERROR
        # what the cluster does not know, the peer's keeper is asked
        down = self._peer_is_down(told['in-step-since'])
        return SUCCESS if self.order('failover', down) == DONE else ERROR

    def _peer_is_down(self, since: float) -> bool:
        """Who has quorum knows it: by fencing, or there is none."""
        peer, now = self.config.peer, cluster.membership()
        if now.quorate and (
                cluster.was_fenced(peer, since)
                or peer not in now.members and not cluster.fences()):
            return True
        say(f'{peer} is not known to be down')
        return False

    def demote(self) -> int:
        """Do not run the VM here any more."""
        if self.found() is None:
            return NOT_RUNNING
        return SUCCESS if self.order('demote') == DONE else ERROR


ACTIONS: Dict[str, Callable[[Agent], int]] = {
    'start': Agent.start, 'stop': Agent.stop, 'monitor': Agent.monitor,
    'promote': Agent.promote, 'demote': Agent.demote,
    'validate-all': Agent.validate_all}


def main(words: List[str]) -> int:
    """Do one action."""
    action = words[0] if words else ''
    if action in ('meta-data', 'metadata'):
        print(METADATA, end='')
        return SUCCESS
    if action not in ACTIONS:
        say(f'usage: vm {"|".join(ACTIONS)}|meta-data')
        return UNIMPLEMENTED
    # of what is written here, nothing is for others on this host
    os.umask(0o077)
    name = os.environ.get('OCF_RESKEY_config', '')
    try:
        if not name:
            raise ConfigError('the parameter config is missing')
        path = config_path(name)
        before = kept(path)
        if action not in ('start', 'validate-all') and before.exists():
            path = before
        status = ACTIONS[action](Agent(load(
            path, os.environ.get('OCF_RESKEY_CRM_meta_on_node', ''))))
        if action == 'stop' and status == SUCCESS:
            before.unlink(missing_ok=True)
        return status
    except ConfigError as exc:
        say(str(exc))
        # There is nothing to stop, where there is no configuration.  Whether
        # there is one, and is good, each host has to say for itself.
        return {'monitor': NOT_RUNNING, 'stop': SUCCESS}.get(
            action, INSTALLED if name else CONFIGURED)
    except (Failed, OSError) as exc:
        say(str(exc))
        return ERROR
