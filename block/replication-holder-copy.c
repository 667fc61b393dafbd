/*
 * Block replication: copies of what the replica lacks, of a primary that holds
 * both disks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "replication-holder.h"

/* What is copied at once, by so many coroutines */
#define COPY_BYTES (1 * MiB)
#define MAX_COPIERS 4

/* The limit of speed holds for so long */
#define COPY_SLICE_NS (100 * SCALE_MS)

/*
 * Beside a guest that is busy all the time, copying rests this many times as
 * long as it takes, but at most so many ns, because it has to come to an end.
 * What is sent takes the CPU later, about so long.
 */
#define COPY_MAX_REST 24
#define COPY_MAX_REST_NS (100 * SCALE_MS)
#define COPY_SEND_NS_PER_BYTE 1

/* What a request of the guest takes of a CPU, about */
#define GUEST_REQUEST_NS (30 * SCALE_US)

static bool holder_may_copy(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return holder_forwards(bs) && !qatomic_read(&s->copy_paused) &&
           !qatomic_read(&bs->quiesce_counter) &&
           !(bs->open_flags & BDRV_O_INACTIVE) &&
           replication_changes_lacking_bytes(s->changes);
}

/* Returns how many bytes were dealt with, 0 if there is nothing to do */
static int64_t coroutine_fn GRAPH_RDLOCK holder_copy_some(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t offset, bytes;
    HolderRange range;
    int ret = 0;

    if (!replication_changes_find_lacking(s->changes,
                                          qatomic_read(&s->copy_bytes),
                                          &offset, &bytes)) {
        return 0;
    }

    holder_lock_range(bs, &range, offset, bytes);
    /* Another copier may have been here */
    if (replication_changes_is_lacking(s->changes, offset, bytes,
                                       &bytes)) {
        ret = holder_copy_range(bs, offset, bytes);
        if (ret == 0) {
            /* Only now, lest it seem to be nowhere and not to be missing */
            replication_changes_supply(s->changes, offset, bytes);
            stat64_add(&s->copied_bytes, bytes);
        }
    }
    holder_unlock_range(bs, &range);

    return ret < 0 && ret != -EAGAIN ? ret : bytes;
}

/*
 * How long to leave the disk and the CPU to the guest, in ns, after a part that
 * was begun at @begin and has @bytes.  The guest is busy by as many requests as
 * came since the part before, or if one of them waits for the disk.
 */
static int64_t coroutine_fn
holder_copy_rest(BlockDriverState *bs, int64_t begin, int64_t bytes)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s = node->holder;
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    int64_t rest = COPY_MAX_REST *
                   (now - begin + bytes * COPY_SEND_NS_PER_BYTE);
    unsigned int requests = qatomic_read(&node->requests);
    int64_t since, busy;

    QEMU_LOCK_GUARD(&s->ranges_lock);

    since = MAX(now - s->copy_end_ns, 1);
    busy = (requests - s->copy_requests) * GUEST_REQUEST_NS;
    s->copy_end_ns = now;
    s->copy_requests = requests;
    if (requests == qatomic_read(&node->requests_done) && busy < since) {
        rest = rest * ((double)busy / since);
    }

    return MIN(rest, COPY_MAX_REST_NS);
}

static void coroutine_fn holder_copy_entry(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationHolder *s = holder_state(bs);
    int64_t delay = 0;

    while (holder_may_copy(bs) && !delay) {
        int64_t begin, ret;

        /* Before the range is locked, which the guest may wait for */
        write_behind_co_await_room(s->queue,
                                   qatomic_read(&s->copy_bytes));

        begin = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
        bdrv_graph_co_rdlock();
        ret = holder_copy_some(bs);
        bdrv_graph_co_rdunlock();

        if (ret < 0) {
            /* What cannot be read here, the replica cannot get */
            holder_lose(bs, "copy", ret);
            break;
        }
        delay = holder_copy_rest(bs, begin, ret);
        if (qatomic_read(&s->copy_limited)) {
            delay = MAX(delay, ratelimit_calculate_delay(&s->copy_limit, ret));
        }
    }

    qatomic_dec(&s->copiers);
    if (delay) {
        timer_mod(s->copy_timer,
                  qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + delay);
    } else {
        /* More may have come since we looked */
        holder_kick_copiers(bs);
    }
    bdrv_dec_in_flight(bs);
}

/*
 * Count one more of those that copy, unless they are @max.  There must not seem
 * to be one for a moment that is not: the last that ends would rely on it.
 */
static bool holder_add_copier(ReplicationHolder *s, unsigned int max)
{
    unsigned int copiers, seen;

    /* Who ends does it the other way round: first this, then what is lacking */
    smp_mb();
    for (copiers = qatomic_read(&s->copiers); copiers < max; copiers = seen) {
        seen = qatomic_cmpxchg(&s->copiers, copiers, copiers + 1);
        if (seen == copiers) {
            return true;
        }
    }

    return false;
}

/* Have what the replica lacks copied.  From any thread. */
void holder_kick_copiers(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (!holder_may_copy(bs) || timer_pending(s->copy_timer) ||
        !holder_add_copier(s, qatomic_read(&s->copy_limited) ? 1 :
                                                               MAX_COPIERS)) {
        return;
    }
    bdrv_inc_in_flight(bs);
    aio_co_schedule(bdrv_get_aio_context(bs),
                    qemu_coroutine_create(holder_copy_entry, bs));
}

void holder_copy_timer(void *opaque)
{
    holder_kick_copiers(opaque);
}

void replication_replica_get_progress(BlockDriverState *bs, uint64_t *copied,
                                      uint64_t *remaining)
{
    ReplicationHolder *s = holder_state(bs);

    *copied = stat64_get(&s->copied_bytes);
    *remaining = replication_changes_lacking_bytes(s->changes);
}

void replication_replica_set_speed(BlockDriverState *bs, int64_t speed)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t bytes = speed ? speed / (NANOSECONDS_PER_SECOND / COPY_SLICE_NS) :
                            COPY_BYTES;

    /* What is copied has to fit in the queue, and more than once */
    bytes = MIN(bytes, s->queue_options.max_bytes / 2);

    if (speed) {
        ratelimit_set_speed(&s->copy_limit, speed, COPY_SLICE_NS);
    }
    qatomic_set(&s->copy_bytes,
                CLAMP(QEMU_ALIGN_DOWN(bytes, REPLICATION_BLOCK),
                      REPLICATION_BLOCK, COPY_BYTES));
    qatomic_set(&s->copy_limited, speed > 0);
    timer_del(s->copy_timer);
    holder_kick_copiers(bs);
}

void replication_replica_pause(BlockDriverState *bs, bool pause)
{
    ReplicationHolder *s = holder_state(bs);

    qatomic_set(&s->copy_paused, pause);
    holder_kick_copiers(bs);
}

bool coroutine_fn replication_replica_co_catch_up(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (replication_changes_lacking_bytes(s->changes)) {
        return false;
    }
    write_behind_co_await(s->queue, 0, BDRV_MAX_LENGTH);
    /* What was copied, a crash there must not take back: it is in no set */
    if (write_behind_co_flush(s->queue, true) < 0 || !holder_forwards(bs) ||
        replication_changes_lacking_bytes(s->changes)) {
        return false;
    }
    qatomic_set(&s->caught_up, true);
    s->had_replica = true;
    replication_report_replica(bs, REPLICA_STATE_SYNCED, NULL);

    return true;
}

/* What both sides have now, in the order of the queue, is theirs for good */
static int coroutine_fn holder_flush_settled(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    int ret;

    write_behind_co_await(s->queue, 0, BDRV_MAX_LENGTH);
    bdrv_graph_co_rdlock();
    ret = bdrv_co_flush(bs->file->bs);
    bdrv_graph_co_rdunlock();

    return ret < 0 ? ret : write_behind_co_flush(s->queue, true);
}

bool coroutine_fn replication_replica_co_settle(BlockDriverState *bs, bool now)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t time = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    if (!s->ledger || !holder_forwards(bs) ||
        replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        return true;
    }
    if (!s->settle_below) {
        if (!now && time < s->settle_ns) {
            return true;
        }
        QEMU_LOCK_GUARD(&s->ranges_lock);
        s->settle_below = ++s->nb_ranges;
        s->settle_what = replication_changes_settle(s->changes);
    }
    /* What was noted before that may not be in the queue yet */
    if (holder_has_range_below(bs, s->settle_below)) {
        return false;
    }
    s->settle_below = 0;
    s->settle_ns = time + SETTLE_NS;
    if (holder_flush_settled(bs) == 0 && holder_forwards(bs)) {
        replication_changes_settled(s->changes, s->settle_what);
    }

    return true;
}

/* What the guest wrote faster than the link took it */
typedef struct HolderCatchUp {
    BlockDriverState *bs;
    bool done;
} HolderCatchUp;

static void coroutine_fn holder_catch_up_entry(void *opaque)
{
    HolderCatchUp *c = opaque;
    ReplicationHolder *s = holder_state(c->bs);
    int64_t ret = 1;

    while (ret > 0 && holder_forwards(c->bs)) {
        write_behind_co_await_room(s->queue,
                                   qatomic_read(&s->copy_bytes));
        bdrv_graph_co_rdlock();
        ret = holder_copy_some(c->bs);
        bdrv_graph_co_rdunlock();
    }
    write_behind_co_await(s->queue, 0, BDRV_MAX_LENGTH);
    qatomic_set(&c->done, true);
    aio_wait_kick();
}

/* The node is drained */
static void holder_catch_up(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    HolderCatchUp c = { .bs = bs };

    if (!holder_forwards(bs) || !s->caught_up ||
        !replication_changes_lacking_bytes(s->changes)) {
        return;
    }
    aio_co_enter(bdrv_get_aio_context(bs),
                 qemu_coroutine_create(holder_catch_up_entry, &c));
    BDRV_POLL_WHILE(bs, !qatomic_read(&c.done));
}

void holder_vm_changed(void *opaque, bool running, RunState state)
{
    BlockDriverState *bs = opaque;

    if (state != RUN_STATE_FINISH_MIGRATE) {
        return;
    }
    /* And what is below, lest that be held back there */
    bdrv_drain_all_begin();
    if (!(bs->open_flags & BDRV_O_INACTIVE)) {
        holder_catch_up(bs);
    }
    bdrv_drain_all_end();
}
