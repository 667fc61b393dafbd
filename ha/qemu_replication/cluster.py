# SPDX-License-Identifier: GPL-2.0-or-later
"""What is asked of Pacemaker and Corosync, and set there."""

import asyncio
import os
import re
import subprocess
from datetime import datetime
from typing import AsyncIterator, List, NamedTuple, Optional

from .errors import Failed

SECONDS = 15.0
# Of this host, and of a peer that is in step
OWN_SCORE, PEER_SCORE = 200, 100
# What is said at once has been said after so long
QUIET_SECONDS = 0.05
# crm_attribute: no such attribute
CRM_EX_NOSUCH = 105


def _run(*words: str) -> 'subprocess.CompletedProcess[str]':
    try:
        return subprocess.run(words, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.STDOUT, timeout=SECONDS,
                              stdin=subprocess.DEVNULL, check=False,
                              errors='replace')
    except FileNotFoundError as exc:
        raise Failed(f'there is no {words[0]}') from exc
    except OSError as exc:
        # there are not enough processes at the moment
        raise Failed(f'{words[0]}: {exc.strerror}') from exc
    except subprocess.TimeoutExpired as exc:
        raise Failed(f'{words[0]} took more than {SECONDS:g} s') from exc


def _attribute(resource: str, node: str, *words: str
               ) -> 'subprocess.CompletedProcess[str]':
    return _run('crm_attribute', f'--promotion={resource}', '-N', node, '-l',
                'forever', *words)


def score(resource: str, node: str) -> Optional[int]:
    """The promotion score of a node."""
    told = _attribute(resource, node, '-G', '-q')
    if told.returncode == CRM_EX_NOSUCH:
        return None
    found = re.search(r'^-?\d+$', told.stdout, re.MULTILINE)
    if told.returncode or not found:
        raise Failed(f'crm_attribute: {told.stdout.strip()}')
    return int(found[0])


def set_score(resource: str, node: str, value: int) -> None:
    """Let the node be promoted."""
    told = _attribute(resource, node, '-v', str(value))
    if told.returncode:
        raise Failed(f'crm_attribute: {told.stdout.strip()}')


def delete_score(resource: str, node: str) -> None:
    """From now on the node may not be promoted."""
    told = _attribute(resource, node, '-D')
    if told.returncode not in (0, CRM_EX_NOSUCH):
        raise Failed(f'crm_attribute: {told.stdout.strip()}')


def fail(resource: str, node: str) -> None:
    """Have the cluster look at a resource at once."""
    _run('crm_resource', '--fail', '-r', resource, '-N', node)


class Membership(NamedTuple):
    """What Corosync says at a moment."""
    ring: str
    quorate: bool
    members: List[str]


# Number, votes, maybe those of a qdevice, and the name
_MEMBER = re.compile(r'^\s*\d+\s+\d+\s+\S.*$', re.MULTILINE)


def _members(text: str) -> List[str]:
    return [line.replace('(local)', '').split()[-1]
            for line in _MEMBER.findall(text)]


async def memberships() -> AsyncIterator[List[str]]:
    """Who is in this part of the cluster, from now on."""
    # it says so at once to a terminal only
    ours, theirs = os.openpty()
    try:
        process = await asyncio.create_subprocess_exec(
            'setpriv', '--pdeathsig', 'KILL', 'corosync-quorumtool', '-m',
            stdin=subprocess.DEVNULL, stdout=theirs,
            stderr=subprocess.DEVNULL)
    except OSError:
        os.close(ours)
        return
    finally:
        os.close(theirs)
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(ours, 'rb'))
    try:
        found: List[str] = []
        while True:
            # the list is the last thing that is said of a change
            try:
                line = await asyncio.wait_for(reader.readline(), QUIET_SECONDS
                                              if found else None)
                if not line:
                    return
                if line.startswith(b'Date:'):
                    found = []
                found += _members(line.decode(errors='replace'))
            except asyncio.TimeoutError:
                yield found
                found = []
            except OSError:
                # of a terminal whose other end is closed
                return
    finally:
        transport.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


def membership() -> Membership:
    """Who is in this part of the cluster."""
    told = _run('corosync-quorumtool', '-s')
    ring = re.search(r'^Ring ID:\s*(\S+)', told.stdout, re.MULTILINE)
    quorate = re.search(r'^Quorate:\s*Yes', told.stdout, re.MULTILINE)
    members = _members(told.stdout)
    if not ring or not members:
        raise Failed(f'corosync-quorumtool: {told.stdout.strip()}')
    return Membership(ring[1], bool(quorate), members)


def fences() -> bool:
    """Does the cluster power off a node that is lost?"""
    told = _run('crm_attribute', '-t', 'crm_config', '-n', 'stonith-enabled',
                '-G', '-q')
    return told.stdout.strip().lower() not in ('false', '0', 'no', 'off')


def was_fenced(node: str, since: float) -> bool:
    """Has the node been fenced with success since a time?"""
    # verbose: else of several that are alike there may be the first one only
    told = _run('stonith_admin', '--history', node, '--verbose',
                '--output-as', 'xml')
    for event in re.findall(r'<fence_event [^>]*>', told.stdout):
        words = dict(re.findall(r'([\w-]+)="([^"]*)"', event))
        if words.get('target') == node \
                and words.get('status') == 'success' \
                and words.get('action') in ('reboot', 'off') \
                and _seconds(words.get('completed', '')) \
                >= int(since):  # it may be told without fractions
            return True
    return False


def _seconds(text: str) -> float:
    """When something was, by stonith_admin: "2026-11-29 23:59:59Z"."""
    try:
        return datetime.fromisoformat(text.replace(' +', '+')).timestamp()
    except ValueError:
        return 0.0
