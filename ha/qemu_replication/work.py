# SPDX-License-Identifier: GPL-2.0-or-later
"""What a keeper does with QEMU in each state; states.py bounds it."""

import asyncio
import subprocess
import time
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Awaitable, Callable, List

from . import graph
from .config import Config, Disk, Json
from .facts import Facts
from .judge import Verdict, new_judge
from .machine import Machine
from .errors import Busy, Failed, Late, Refused, Unreachable, last_line
from .monitor import Monitor
from .peer import Peer
from .states import (FORGETFUL, PRIMARY, PROMOTABLE, REPLICA, SHARED,
                     SOLE)

LOOK_SECONDS = 1.0
POLL_SECONDS = 0.1
# The VM stands still meanwhile
ASK_SECONDS = 0.2
# After a failed attempt to protect, the next one waits longer and longer
LONGEST_PAUSE = 60.0
QUIT_SECONDS = 10.0
# In which QEMU has a guest wait; in others it runs, sleeps, or was stopped
TRANSIENT = ('colo', 'finish-migrate', 'inmigrate', 'postmigrate', 'prelaunch',
             'restore-vm', 'save-vm')


Work = Callable[[Any], Awaitable[str]]


def insistent(work: Work) -> Work:
    """Try it again within the bound of its state: the VM may hang on it."""
    @wraps(work)
    async def again(works: Any) -> str:
        while True:
            try:
                return await work(works)
            except Late as exc:
                works.problem = str(exc)
                await asyncio.sleep(POLL_SECONDS)

    return again


class Works:
    """Each _do_... is the work of a state."""

    def __init__(self, config: Config, machine: Machine, peer: Peer) -> None:
        self.config = config
        self.machine = machine
        self.peer = peer
        self.facts_path = config.state / 'facts.json'
        self.facts = Facts.read(self.facts_path)
        # why it came to this, what is in the way, and how far it is
        self.why = self.problem = self.progress = ''
        self.judge = new_judge(self)
        self._tries = 0
        # the QEMU that had a claim to the VM has ended, and who was to know
        # does
        self.gave_up = asyncio.Event()
        # the peer has said so of its own, and asks before it starts another
        self.peer_ended = False
        # which standby was tried last, by when it began to be one
        self._tried = 0.0
        # why the last one has failed
        self.refusal = ''
        self._off = self._colo_ended = False

    @property
    def _monitor(self) -> Monitor:
        return self.machine.monitor

    def note(self, **facts: Any) -> None:
        """For good, before anything is done that needs it."""
        fresh = replace(self.facts, **facts)
        try:
            fresh.save(self.facts_path)
        except OSError as exc:
            raise Failed(f'{self.facts_path}: {exc.strerror}') from exc
        self.facts = fresh

    @staticmethod
    def _protects(nodes: List[Json]) -> bool:
        """Whether all disks are safe."""
        return bool(nodes) and all(node['protects'] for node in nodes)

    async def _until(self, done: Callable[[], Awaitable[bool]]) -> None:
        """Wait; whoever calls has a bound."""
        while not await done():
            await asyncio.sleep(POLL_SECONDS)

    def _pause_seconds(self) -> float:
        """Do not try again at once what has failed."""
        self._tries += 1
        # no number is large enough for the power of a day's tries
        return min(2.0 ** min(self._tries, 10) / 4, LONGEST_PAUSE) \
            if self._tries > 1 else 0.0

    # The VM runs here

    async def _do_boot(self) -> None:
        # the last one may be about to end
        await self._end_qemu()
        for disk in self.config.disks:
            if graph.leftovers(disk):
                await self._merge(disk)
        await self._make_images()
        before, booted = self.facts.data, False
        self._begin_alone(self.facts.generation)
        try:
            await self._start(True)
            booted = True
        finally:
            if not booted:
                self.note(data=before)
        await self.judge.promoted()

    async def _make_images(self) -> None:
        await asyncio.to_thread(graph.make_images, self.config)
        files = graph.files(self.config)
        if files != self.facts.files:
            self.note(files=files)

    def _begin_alone(self, generation: int) -> None:
        """These disks are the VM's."""
        self._tries, self.refusal = 0, ''
        self.note(generation=generation, data=SOLE, overwrite=False,
                  held=False)

    async def _start(self, primary: bool) -> None:
        self._off = self._colo_ended = False
        await self.machine.start(primary)

    async def _merge(self, disk: Disk) -> None:
        """QEMU has died in a failover, or was ended where it stood by."""
        self.progress = f'merges the overlays that {disk.file} has left'
        # of no use any more, and of none before all is merged
        self.note(wiped=True)
        active, hidden = graph.overlays(disk)
        # alone, the other one is what is left of both, and has what is old
        if active.exists():
            await self._run(graph.merge_command(self.config, disk))
        graph.wipe(disk)
        for path in (active, hidden):
            path.unlink(missing_ok=True)

    @staticmethod
    async def _run(words: List[str]) -> None:
        """It has no bound, and ends with who waits for it."""
        process = await asyncio.create_subprocess_exec(
            *words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT)
        try:
            said, _ = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise Failed(last_line(said.decode(errors='replace')))

    async def _do_wait_for_standby(self) -> None:
        while not await self._merged():
            await self._settle_scores()
            await asyncio.sleep(POLL_SECONDS)
        self.progress = ''
        again = time.monotonic() + self._pause_seconds()
        while True:
            await self._settle_scores()
            try:
                told = await self.peer.ask('status')
                self.problem = self.refusal
                if told['facts']['generation'] > self.facts.generation \
                        and told['facts']['data'] != REPLICA \
                        or told['role'] == PRIMARY:
                    # a person has vouched for what was not so
                    self.problem = (
                        f'{self.config.peer} says that it has the VM: one of '
                        'the two is wrong, and has to be told "stop --force"')
                elif told['state'] == 'standby' and (
                        time.monotonic() >= again
                        or told['since'] != self._tried):
                    self._tried = told['since']
                    return
                elif told['state'] in PROMOTABLE:
                    # the link was cut, and it has not heard
                    await self.peer.ask('yield',
                                        generation=self.facts.generation)
            except Unreachable as exc:
                self.problem = str(exc)
            await asyncio.sleep(LOOK_SECONDS)

    async def _settle_scores(self) -> None:
        if self.judge.owes:
            await self.judge.promoted()

    async def _merged(self) -> bool:
        """A host that was promoted is a primary once all is merged."""
        try:
            told = await self._monitor.replication()
        except Failed as exc:
            # it may be busy, and is asked again
            self.problem = str(exc)
            return False
        nodes = [node for node in told if node['mode'] == 'secondary']
        steps = [node['failover'] for node in nodes if 'failover' in node]
        total = sum(step['total'] for step in steps) or 1
        done = 100 * sum(step['done'] for step in steps) // total
        self.progress = f'{done} % of what a failover has left is merged'
        self.problem = '; '.join(f'{node["node"]}: {node["error"]["error"]}'
                                 for node in nodes if 'error' in node)
        return not nodes

    async def _do_copy(self) -> None:
        told = await self.peer.ask('status')
        for number in range(len(self.config.disks)):
            await self._monitor.all(graph.connect(self.config, number))
            await self._begin_copy(number, told['facts']['overwrite'])
        await self._wait_for_copies()
        told = await self.peer.ask('in-step',
                                   generation=self.facts.generation)
        if not told['ok']:
            raise Failed(f'{self.config.peer}: {told["because"]}')
        self.note(wiped=False, since=time.time())

    async def _begin_copy(self, number: int, overwrite: bool) -> None:
        """QEMU refuses disks that may have what nobody else has."""
        ways: List[Json] = [{}]
        if overwrite:
            ways.append({'discard-peer': True})
        if overwrite or self.facts.wiped:
            ways.append({'discard-peer': True, 'sync': 'full'})
        refusals = []
        for way in ways:
            why = await self._monitor.attempt(
                'x-block-replica-sync', {**graph.sync(number), **way})
            if why is None:
                return
            refusals.append(why)
        raise Failed(refusals[0])

    async def _wait_for_copies(self) -> None:
        """A job that gets on has no other bound."""
        best, best_when = -1, time.monotonic()
        while True:
            jobs = await self._monitor.cmd('query-block-jobs')
            if not jobs:
                break
            done = sum(job['offset'] for job in jobs)
            total = sum(job['len'] for job in jobs)
            self.progress = f'{100 * done // (total or 1)} % copied'
            if done != best:
                best, best_when = done, time.monotonic()
            elif time.monotonic() > best_when + 2 * self.config.limits.stalled:
                raise Failed('the copy does not get on')
            await asyncio.sleep(POLL_SECONDS)
        for node in await self._monitor.replication():
            if node['mode'] == 'primary' \
                    and node.get('replica-state') != 'synced':
                raise Failed(f'{node["node"]}: the copy has failed')

    async def _do_migrate(self) -> None:
        self._colo_ended = False
        try:
            await self._monitor.all(graph.connect_network(
                self.config, 'rew0' in await self._objects()))
            await self._monitor.all(graph.migrate(self.config))
        except Refused as exc:
            raise Failed(str(exc), 'not-begun') from exc

        async def in_colo() -> bool:
            told = await self._monitor.cmd('query-migrate')
            status = told['status']
            ram = told.get('ram', {})
            if ram.get('total'):
                left = 100 * ram['remaining'] // ram['total']
                self.progress = f'{100 - left} % of the memory'
            if status in ('failed', 'cancelled'):
                # COLO has not begun, so the peer cannot have taken the VM
                raise Failed('the migration of the memory has failed: '
                             f'{told.get("error-desc", "no reason")}',
                             'not-begun')
            return bool(status == 'colo')

        await self._until(in_colo)

        async def protects() -> bool:
            return self._protects(await self._monitor.replication())

        await self._until(protects)
        self._tries = 0
        await self.judge.in_step()

    async def _objects(self) -> List[str]:
        return [item['name'] for item in await self._monitor.cmd(
            'qom-list', {'path': '/objects'})]

    async def _do_hand_over(self) -> None:
        """What is done since the last checkpoint shall be little."""

        async def count() -> int:
            return min(int(node['checkpoints'])
                       for node in await self._monitor.replication()
                       if node['mode'] == 'primary')

        before = await count()
        await self._monitor.cmd('migrate-set-parameters',
                                {'x-checkpoint-delay': 1})
        try:
            async def newer() -> bool:
                return await count() > before

            await self._until(newer)
            told = await self.peer.ask('take')
            if not told['ok']:
                raise Failed(f'{self.config.peer}: {told["because"]}')
            # it asks for the VM, which ends this
            await asyncio.sleep(self.config.limits.failover)
        finally:
            if self.machine.runs:
                await self._take_time()

    async def _take_time(self) -> None:
        """Between two checkpoints, as long as there is nothing else to do."""
        await self._monitor.attempt('migrate-set-parameters', {
            'x-checkpoint-delay': self.config.limits.checkpoint_ms})

    async def _do_ask(self) -> str:
        """Go on only when the peer cannot take the VM any more."""
        while True:
            verdict = await self.judge.of_peer(self.facts.since)
            if verdict is Verdict.OUT:
                return 'done'
            if verdict is Verdict.PROMOTED:
                return 'ousted'
            await asyncio.sleep(ASK_SECONDS)

    async def _do_doubt(self) -> str:
        """The peer takes the VM if it is well and this QEMU hangs.

        It may well be the peer that hangs, and has this QEMU wait for it: its
        disks have a limit for that, and its network is cut here.
        """
        while True:
            try:
                told = await self.peer.ask('well')
                if told['ok']:
                    return 'hangs'
                self.problem = f'{self.config.peer}: {told["because"]}'
            except Unreachable as exc:
                self.problem = str(exc)
            await self._yank([graph.MIRROR])
            try:
                await self._monitor.cmd('query-status')
                return 'done'
            except Failed:
                # as before
                pass

    @insistent
    async def _do_detach(self) -> str:
        await self._yank(graph.yank(self.config))
        status = (await self._monitor.cmd('query-migrate')).get('status')
        if status == 'colo':
            await self._monitor.cmd('x-colo-lost-heartbeat')
        elif status not in (None, 'none', 'completed', 'failed', 'cancelled'):
            await self._monitor.attempt('migrate_cancel')

        async def ended() -> bool:
            told = await self._monitor.cmd('query-migrate')
            return told.get('status') in (None, 'none', 'completed', 'failed',
                                          'cancelled')

        await self._until(ended)
        await self._until(self._goes_on)
        await self._let_go()
        # a person may have decided it, and the peer still has its own
        self.judge.owes = True
        return 'hold' if self.facts.held else 'done'

    async def _do_hold(self) -> None:
        while self.judge.owes:
            await self._settle_scores()
            await asyncio.sleep(POLL_SECONDS)

    async def _yank(self, instances: List[Json]) -> None:
        """Cut off what hangs on the peer, beside QEMU's main loop."""
        for instance in instances:
            try:
                await self._monitor.cmd('yank', {'instances': [instance]},
                                        oob=True)
            except Failed:
                # there is no such connection
                pass

    async def _goes_on(self) -> bool:
        return (await self._monitor.cmd('query-status'))['status'] \
            not in TRANSIENT

    async def _let_go(self) -> None:
        """Take the peer's disks and its network out."""
        for job in await self._monitor.cmd('query-block-jobs'):
            # it may end by itself in this moment
            await self._monitor.attempt('block-job-cancel', {
                'device': job['device'], 'force': True})

        async def no_job() -> bool:
            return not await self._monitor.cmd('query-block-jobs')

        await self._until(no_job)
        for number in range(len(self.config.disks)):
            await self._monitor.attempt('x-block-replica-detach', {
                'node-name': graph.top(number), 'force': True})
            for node in graph.links(number):
                await self._until(partial(self._deleted, node))
        await self._disconnect()

    async def _disconnect(self) -> None:
        chardevs = await self._monitor.cmd('query-chardev')
        await self._monitor.all(graph.disconnect_network(
            await self._objects(), [item['label'] for item in chardevs]))

    async def _deleted(self, node: str) -> bool:
        why = await self._monitor.attempt('blockdev-del',
                                          {'node-name': node})
        return why is None or 'Failed to find node' in why

    async def _end_qemu(self, quit_seconds: float = 0) -> None:
        """It cannot be killed while its storage hangs."""
        while True:
            try:
                await self.machine.end(quit_seconds)
                break
            except Failed as exc:
                self.problem = str(exc)
        self.problem = ''

    async def _do_tell_death(self) -> None:
        # one that hangs is not dead yet
        await self._end_qemu()
        await self.judge.has_died()
        await self._wait_for_new_primary()

    async def _do_wait(self) -> None:
        await self._end_qemu(QUIT_SECONDS)
        await self._wait_for_new_primary()

    async def _do_tell_off(self) -> None:
        """The peer has nothing to take over, and shall not wait."""
        while self.facts.data == SHARED:
            try:
                self.problem = ''
                await self._reclaim()
            except Unreachable as exc:
                self.problem = str(exc)
            await asyncio.sleep(LOOK_SECONDS)

    async def _reclaim(self) -> None:
        """Have the peer give up its claim to the VM."""
        told = await self.peer.ask('yield', generation=self.facts.generation)
        if told['yields']:
            self.note(data=SOLE)
            await self.judge.promoted()

    async def _wait_for_new_primary(self) -> None:
        """The peer may have got the VM, or will, or has lost it as well."""
        while True:
            try:
                told = await self.peer.ask('status')
                self.problem = ''
                if told['facts']['generation'] > self.facts.generation:
                    if told['role'] == PRIMARY:
                        return
                elif self.facts.data == SOLE:
                    # the scores may be those of a part that had no quorum
                    await self.judge.promoted()
                elif told['state'] in FORGETFUL:
                    await self._reclaim()
                elif told['state'] in PROMOTABLE:
                    # this host may have asked about it when QEMU died
                    await self.judge.gives_way()
                    await self.judge.in_step()
            except Failed as exc:
                self.problem = str(exc)
            await asyncio.sleep(LOOK_SECONDS)

    async def _do_end(self) -> None:
        problem = ''
        try:
            # who waits for its end may end this keeper as well
            await self.judge.stopped()
        except Failed as exc:
            problem = str(exc)
        await self._end_qemu(QUIT_SECONDS)
        if self.facts.data == SHARED:
            try:
                # nobody may be here to be asked when it takes the VM
                await self.peer.ask('ended')
            except Unreachable as exc:
                problem = problem or str(exc)
        self.gave_up.set()
        self.problem = problem

    # This host stands by

    async def _do_arm(self) -> None:
        await self._end_qemu()
        self.gave_up.set()
        await asyncio.sleep(self._pause_seconds())
        await self._drop_leftovers()
        self._miss_files()
        await self._make_images()
        await self._start(False)
        await self._monitor.all(graph.stand_by(self.config))

    def _miss_files(self) -> None:
        """Nothing is made below a file system that is not mounted."""
        gone = [file for file in graph.files(self.config)
                if file in self.facts.files and not Path(file).exists()]
        if gone and not self.facts.overwrite:
            raise Failed(f'{gone[0]} is not there any more: is its file '
                         'system mounted? If it is to be made anew: "stop", '
                         'and "standby --force"')

    async def _drop_leftovers(self) -> None:
        """They may be the only checkpoint, if the primary is gone."""
        left = [path for disk in self.config.disks
                for path in graph.leftovers(disk)]
        if not left:
            return
        told = (await self.peer.ask('status'))['facts']
        if told['data'] not in (SOLE, SHARED) \
                or told['generation'] < self.facts.generation:
            raise Failed(f'{left[0]} has data, and {self.config.peer} may not '
                         'have it: "stop", and then "protect --force" to use '
                         'it here, or "standby --force" to throw it away')
        for path in left:
            path.unlink()

    async def _do_take(self) -> None:
        """The primary gives up the VM, and says so when it has."""
        try:
            told = await self._ask_for_it()
            if told['yields']:
                return
            why = f'{self.config.peer}: {told["because"]}'
        except Unreachable as exc:
            if self.peer_ended:
                return
            why = (f'{exc}: make sure that {self.config.peer} is down, and '
                   'say --peer-is-down')
        raise Failed(why, 'orphaned' if self._colo_ended else 'failed')

    async def _ask_for_it(self) -> Json:
        """It may take long to end a QEMU, which is not given back then."""
        while True:
            try:
                return await self.peer.ask('yield',
                                           generation=self.facts.generation)
            except Busy as exc:
                self.problem = str(exc)

    @insistent
    async def _do_promote(self) -> str:
        # within a checkpoint QEMU waits for the primary and nothing else
        await self._yank([{'type': 'migration'}])
        nodes = await self._monitor.replication()
        if (await self._monitor.cmd('query-migrate'))['status'] == 'colo':
            for node in nodes:
                if node['stage'] != 'running':
                    raise Failed(f'{node["node"]} is {node["stage"]}: there '
                                 'is no checkpoint to go back to', 'unfit')
            try:
                self._begin_alone(self.facts.generation + 1)
            except Failed as exc:
                # nothing was done yet
                raise Failed(str(exc), 'unfit') from exc
            await self._monitor.cmd('x-colo-lost-heartbeat')
        await self._until(self._goes_on)
        # an earlier keeper may have done it
        await self._monitor.attempt('nbd-server-stop')
        await self._disconnect()
        await self._monitor.all(graph.announce(self.config))
        await self.judge.promoted()
        return 'done'
