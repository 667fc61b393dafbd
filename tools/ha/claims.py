# SPDX-License-Identifier: GPL-2.0-or-later
"""Which QEMU may run the VM for itself, and since when: as QEMU says.

A QEMU claims the VM when it boots the guest, when it takes it as a secondary,
and when it goes on without its secondary.  It has it until its process has
ended, whatever the guest does.  One that runs the guest as a secondary has
not: neither its disks nor its packets are the VM's.
"""

import re
import select
import socket
import threading
import time
from pathlib import Path
from typing import Dict, List, NamedTuple

# Of QEMU, which then tells in its log; all hosts have the same clock
ARGUMENTS = ['-msg', 'timestamp=on'] + [
    word for event in ('runstate_set', 'qmp_enter_migrate_incoming',
                       'migrate_set_state', 'colo_failover_set_state')
    for word in ('-trace', event)]
_LINE = re.compile(r'^\d+@(\d+\.\d+):(\w+) (.*)$', re.MULTILINE)
# How exactly the end of a QEMU is known, in seconds
POLL = 0.01


class Life:
    """One QEMU."""

    def __init__(self, host: str, began: float, stands_by: bool) -> None:
        self.host = host
        self.began = began
        self.stands_by = stands_by
        # when it came in step, as a secondary
        self.in_step = 0.0
        # when it was certainly there, the last time
        self.seen = 0.0
        self.claims: List['Claim'] = []

    def claim(self, when: float, how: str) -> None:
        """It has the VM."""
        self.claims.append(Claim(when, how, self))


class Claim(NamedTuple):
    """On the VM."""
    when: float
    how: str
    life: Life

    def __str__(self) -> str:
        return f'{self.when:.3f} {self.life.host} {self.how}'


class Claims:
    """All that there were, on all hosts, each with its folder."""

    def __init__(self, folders: Dict[str, Path]) -> None:
        self._folders = folders
        # when each QEMU was there, the last time
        self._seen: Dict[str, List[float]] = {host: [] for host in folders}
        self._closing = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(host,),
                                          daemon=True) for host in folders]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the watch."""
        self._closing.set()
        for thread in self._threads:
            thread.join()

    def _watch(self, host: str) -> None:
        """See when each QEMU there ends, whoever ends it."""
        while not self._closing.wait(POLL):
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(str(self._folders[host] / 'top.sock'))
                    self._follow(sock, self._seen[host])
                except OSError:
                    # there is none
                    continue

    def _follow(self, sock: socket.socket, seen: List[float]) -> None:
        seen.append(0.0)
        while not self._closing.is_set():
            now = time.time()
            if select.select([sock], [], [], POLL)[0] and not sock.recv(4096):
                return
            seen[-1] = now

    def _lives(self, host: str) -> List[Life]:
        """What its QEMUs have said, one after the other."""
        lives: List[Life] = []
        log = self._folders[host] / 'qemu.log'
        for stamp, event, said in _LINE.findall(log.read_text(
                'utf-8', 'replace') if log.exists() else ''):
            when, new = float(stamp), said.split()[-1]
            if event == 'qmp_enter_migrate_incoming':
                lives.append(Life(host, when, True))
            elif '(prelaunch)' in said and new == '(running)':
                lives.append(Life(host, when, False))
                lives[-1].claim(when, 'boots it')
            elif event == 'migrate_set_state' and new == 'colo' \
                    and lives[-1].stands_by:
                lives[-1].in_step = when
            elif event == 'colo_failover_set_state' and new == 'active':
                lives[-1].claim(when, 'takes it' if lives[-1].stands_by
                                else 'goes on alone')
                lives[-1].stands_by = False
        return lives

    def all(self) -> List[Claim]:
        """In their order."""
        claims = []
        for host, seen in self._seen.items():
            for life in self._lives(host):
                life.seen = next((last for last in list(seen)
                                  if last >= life.began), life.began)
                claims += life.claims
        return sorted(claims, key=lambda claim: claim.when)

    def wrong(self) -> List[str]:
        """Two at once; or a history of the VM that has two ends."""
        found: List[str] = []
        claims = self.all()
        for number, claim in enumerate(claims):
            life = claim.life
            for other in claims[:number]:
                if other.life.host != life.host \
                        and other.life.seen > claim.when:
                    found.append(f'{claim}, where {other.life.host} has it '
                                 f'until {other.life.seen:.3f}')
            last = claims[number - 1] if number else claim
            if last.life is not life and not (
                    claim.how == 'takes it' and life.in_step > last.when
                    or claim.how == 'boots it'
                    and last.life.host == life.host):
                found.append(f'{claim}, after {last}: in step since '
                             f'{life.in_step:.3f}')
        return found
