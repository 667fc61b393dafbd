# SPDX-License-Identifier: GPL-2.0-or-later
"""Run by gdb on a QEMU that does not go on: what its block layer waits for.

Lists exports and their clients, nodes and their requests, throttle groups,
jobs, and the stacks of all coroutines found there.  QEMU's own qemu-gdb.py has
to be loaded before.
"""

from functools import partial
from typing import Any, Callable, Dict, Iterator, List

import gdb  # type: ignore

# By address: whose they are
_COROUTINES: Dict[int, List[str]] = {}


def entries(head: str, link: str) -> Iterator[Any]:
    """The members of a list of QEMU's."""
    yield from members(gdb.parse_and_eval(head), link)


def members(head: Any, link: str) -> Iterator[Any]:
    """The same for a list that was found elsewhere."""
    tail_queue = any(field.name == 'tqh_first'
                     for field in head.type.strip_typedefs().fields())
    entry = head['tqh_first' if tail_queue else 'lh_first']
    while entry:
        yield entry
        entry = entry[link]['tqe_next' if tail_queue else 'le_next']


def show(value: Any, *names: str) -> str:
    """Some fields of a struct."""
    return ' '.join(f'{name}={value[name].format_string()}' for name in names)


def note(coroutine: Any, owner: str) -> None:
    """Show this coroutine later."""
    if coroutine:
        _COROUTINES.setdefault(int(coroutine), []).append(owner)


def exports() -> None:
    """NBD exports and their clients."""
    for export in entries("'nbd/server.c'::exports", 'next'):
        name = export['name'].string() if export['name'] else ''
        common, blk = export['common'], export['common']['blk']
        print(f"export '{name}'", show(export, 'drained'),
              show(common, 'ctx', 'refcount'),
              show(blk, 'quiesce_counter', 'in_flight'))
        for client in members(export['clients'], 'next'):
            print('  client', show(client, 'refcount', 'nb_requests',
                                   'recv_coroutine', 'read_yielding',
                                   'quiescing', 'closing'),
                  show(client['ioc'], 'read_coroutine', 'write_coroutine'))
            note(client['recv_coroutine'], f"receives for '{name}'")
            note(client['send_coroutine'], f"answers for '{name}'")


def nodes() -> None:
    """Nodes and their requests."""
    for node in entries("'block.c'::all_bdrv_states", 'bs_list'):
        name = node['node_name'].string()
        driver = node['drv']['format_name'].string() if node['drv'] else ''
        print(f"node '{name}' {driver}", show(
            node, 'aio_context', 'in_flight', 'quiesce_counter'))
        for request in members(node['tracked_requests'], 'list'):
            print('  request', request, show(
                request, 'type', 'offset', 'bytes', 'serialising', 'co',
                'waiting_for'))
            note(request['co'], f"request of '{name}'")
        if driver == 'throttle':
            print('  member', show(
                node['opaque'].cast(pointer('ThrottleGroupMember')),
                'io_limits_disabled', 'restart_pending', 'pending_reqs'))
        elif driver == 'nbd':
            slots(node['opaque'].cast(pointer('BDRVNBDState')), name)


def slots(state: Any, name: str) -> None:
    """What an NBD client waits for."""
    print('  link', show(state, 'state', 'in_flight', 'ioc'))
    first, last = state['requests'].type.range()
    for number in range(first, last + 1):
        slot = state['requests'][number]
        if slot['coroutine']:
            print('    slot', number,
                  show(slot, 'coroutine', 'offset', 'receiving'))
            note(slot['coroutine'], f"slot {number} of '{name}'")


def pointer(name: str) -> Any:
    """The type of pointers to a struct."""
    return gdb.lookup_type(name).pointer()


def groups() -> None:
    """Throttle groups."""
    for group in entries("'block/throttle-groups.c'::throttle_groups", 'list'):
        print('throttle group', show(group, 'name', 'any_timer_armed',
                                     'tokens'))


def jobs() -> None:
    """Jobs."""
    for job in entries("'job.c'::jobs", 'job_list'):
        print('job', show(job, 'id', 'status', 'busy', 'paused', 'pause_count',
                          'deferred_to_main_loop', 'ret', 'co'))
        note(job['co'], 'job')


def lock() -> None:
    """Whether somebody changes the graph."""
    print('graph lock: has_writer =',
          gdb.parse_and_eval("'block/graph-lock.c'::has_writer"))


def coroutines() -> None:
    """The stacks of all coroutines that were found."""
    for address, owners in _COROUTINES.items():
        print(f'coroutine {address:#x}:', ', '.join(owners))
        attempt(partial(gdb.execute, f'qemu coroutine {address}'))


def attempt(look: Callable[[], Any]) -> None:
    """One that cannot be seen does not hide the others."""
    try:
        look()
    except (gdb.error, gdb.MemoryError, ValueError) as exc:
        print(f'  not to be seen: {exc}')


# after the stacks of threads
print('Block layer:')
for each in (lock, exports, nodes, groups, jobs, coroutines):
    attempt(each)
