# SPDX-License-Identifier: GPL-2.0-or-later
"""The one table of what a keeper may be in, and what leads where."""

from dataclasses import dataclass, field
from typing import Dict

PRIMARY, STANDBY, NONE = 'primary', 'standby', 'none'
# What this host's disks are: the only ones that are up to date; or the peer's
# may have taken their place; or they follow the peer's.
SOLE, SHARED, REPLICA = 'sole', 'shared', 'replica'


@dataclass(frozen=True)
class State:
    """What it is like."""
    says: str
    role: str = NONE
    # what is done on the way in, which ends with "done" or "failed"
    work: str = ''
    # the bound of that, of the limits; without, it lasts until something
    # happens or a person decides, and says what it waits for
    limit: str = ''
    # what is noted for good before that is done
    data: str = ''
    on: Dict[str, str] = field(default_factory=dict)


# Of a QEMU that runs the VM; the cluster may have the peer take it then
ENDS = {'stop': 'stopped', 'demote': 'waiting'}
STATES = {
    # nothing runs
    'stopped': State(
        'nothing runs here', work='end', on={
            'boot': 'booting', 'arm': 'arming', 'yield': 'yielded'}),
    'yielded': State(
        'nothing runs here, and the peer has the VM', work='end',
        data=REPLICA, on={
            'boot': 'booting', 'arm': 'arming'}),
    'down': State(
        'QEMU has died while it ran the VM', work='tell_death',
        on={'boot': 'booting', 'arm': 'arming', 'yield': 'arming',
            'done': 'arming', **ENDS}),
    'waiting': State(
        'has run the VM, and waits to hear who has it now', work='wait',
        on={
            'boot': 'booting', 'arm': 'arming', 'yield': 'arming',
            'done': 'arming', 'stop': 'stopped'}),

    'off': State(
        'the guest has shut down', work='tell_off', on={
            'boot': 'booting', 'arm': 'arming', 'yield': 'arming',
            'stop': 'stopped'}),

    # the VM runs here
    'finding': State(
        'has found QEMU, and waits for its answer', PRIMARY, 'find', 'start',
        on={name: name for name in ('protected', 'asking', 'promoting',
                                    'detaching', 'secondary', 'arming')}
        | {'failed': 'down', 'died': 'down', 'off': 'off', **ENDS}),
    'booting': State(
        # to merge what a failover has left may take long
        'starts the VM', PRIMARY, 'boot', on={
            'done': 'alone', 'failed': 'stopped', 'died': 'stopped',
            'off': 'off', **ENDS}),
    'alone': State(
        'runs the VM, without protection', PRIMARY, 'wait_for_standby', on={
            'done': 'copying', 'hold': 'held', 'died': 'down',
            'off': 'off', **ENDS}),
    'held': State(
        'runs the VM, and was told not to protect it', PRIMARY, 'hold', on={
            'protect': 'alone', 'died': 'down', 'off': 'off',
            **ENDS}),
    'copying': State(
        'brings the disks of the peer in step', PRIMARY, 'copy', on={
            'done': 'migrating', 'failed': 'detaching', 'lost': 'detaching',
            'drop': 'detaching', 'died': 'down', 'off': 'off',
            **ENDS}),
    'migrating': State(
        'brings the memory of the peer in step', PRIMARY, 'migrate',
        'memory', SHARED, on={
            'done': 'protected', 'failed': 'asking', 'lost': 'asking',
            'not-begun': 'detaching', 'drop': 'detaching', 'died': 'down',
            'off': 'off', **ENDS}),
    'protected': State(
        'runs the VM, and the peer is in step', PRIMARY, data=SHARED, on={
            'lost': 'asking', 'drop': 'detaching', 'switch': 'handing',
            'silent': 'doubting', 'yield': 'arming', 'died': 'down',
            'off': 'off', **ENDS}),
    'doubting': State(
        'runs the VM, but QEMU does not answer', PRIMARY, 'doubt', on={
            'done': 'protected', 'hangs': 'down', 'lost': 'asking',
            'drop': 'detaching', 'yield': 'arming', 'died': 'down',
            'off': 'off', **ENDS}),
    'handing': State(
        'waits for a checkpoint, and for the peer to take the VM', PRIMARY,
        'hand_over', 'failover', on={
            'done': 'protected', 'failed': 'protected', 'lost': 'asking',
            'yield': 'arming', 'died': 'down', 'off': 'off', **ENDS}),
    'asking': State(
        'has lost the peer, and waits for word that it is down', PRIMARY,
        'ask', data=SHARED, on={
            'done': 'detaching', 'drop': 'detaching', 'ousted': 'arming',
            'yield': 'arming', 'died': 'down', 'off': 'off',
            **ENDS}),
    'detaching': State(
        'goes on alone', PRIMARY, 'detach', 'failover', SOLE, on={
            'done': 'alone', 'hold': 'held', 'failed': 'stuck',
            'died': 'down', 'off': 'off', **ENDS}),
    'stuck': State(
        'could not go on alone', PRIMARY, on={
            'drop': 'detaching', 'promote': 'promoting', 'died': 'down',
            'off': 'off', **ENDS}),

    # this host stands by
    'joining': State(
        'has found QEMU that stands by, and waits for its answer', STANDBY,
        'join', on={
            'secondary': 'secondary', 'arming': 'arming', 'died': 'arming',
            'yield': 'arming', 'stop': 'stopped'}),
    'arming': State(
        'makes ready to stand by', STANDBY, 'arm', data=REPLICA, on={
            'done': 'standby', 'failed': 'arming', 'died': 'arming',
            'stop': 'stopped'}),
    'standby': State(
        'stands by, and waits for the primary', STANDBY, on={
            'in-step': 'secondary', 'yield': 'arming', 'died': 'arming',
            'silent': 'arming', 'stop': 'stopped'}),
    # Whether it hangs, or waits for a primary that has died without a word,
    # only the primary's keeper can tell
    'secondary': State(
        'stands by, and is in step', STANDBY, data=REPLICA, on={
            'lost': 'orphan', 'take': 'taking', 'promote': 'promoting',
            'yield': 'arming', 'died': 'arming', 'stop': 'stopped'}),
    'orphan': State(
        'has lost the primary, and waits for a failover', STANDBY, on={
            'take': 'taking', 'promote': 'promoting', 'yield': 'arming',
            'died': 'arming', 'stop': 'stopped'}),
    'taking': State(
        'asks the primary to give up the VM', STANDBY, 'take', 'failover',
        on={'done': 'promoting', 'promote': 'promoting',
            'failed': 'secondary', 'orphaned': 'orphan', 'died': 'arming',
            'stop': 'stopped'}),
    'promoting': State(
        'takes the VM', PRIMARY, 'promote', 'failover', on={
            'done': 'alone', 'failed': 'stuck', 'unfit': 'orphan',
            'died': 'down', 'off': 'off', **ENDS}),
}
# Where the VM does not run and is not about to
AT_REST = ('stopped', 'yielded', 'down', 'waiting', 'off')
# Where a host that has stood by has no checkpoint any more
FORGETFUL = ('arming', 'standby')
# Where the VM can be taken from, as far as this keeper knows
PROMOTABLE = ('secondary', 'orphan')
