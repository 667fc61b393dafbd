/*
 * Block replication: a primary that holds both disks
 *
 * The guest's requests go to the local disk, the node's file.  What changed
 * there is forwarded to the replica, as long as one is attached, through the
 * write-behind queue.  So are copies of what the replica lacks: all that goes
 * to the replica goes through one queue, in the order in which the local disk
 * has completed it, and that is what makes the two equal in the end.
 *
 * A range that is lacking at the replica is not forwarded: its copy is going to
 * bring what is written meanwhile.  Writes and copies that overlap wait for
 * each other, until what they are about is in the queue.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/memalign.h"
#include "qemu/option.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qnull.h"
#include "qobject/qstring.h"
#include "block/reqlist.h"
#include "qemu/ratelimit.h"
#include "qemu/stats64.h"
#include "replication-above.h"
#include "replication-changes.h"
#include "replication-holder.h"
#include "replication-int.h"
#include "replication-ledger.h"
#include "replication-watch.h"
#include "trace.h"

/* Half a minute of copying, and more than most guests change in one */
#define DEFAULT_LOG_SIZE (16 * GiB)

/* What is copied at once, by so many coroutines */
#define COPY_BYTES (1 * MiB)
#define MAX_COPIERS 4

/* How often a copy to a replica that takes long is made sure of */
#define SETTLE_NS (10 * NANOSECONDS_PER_SECOND)

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

/* Writes and copies, in the order in which they have locked their ranges */
typedef struct HolderRange {
    BlockReq req;
    uint64_t number;
} HolderRange;

struct ReplicationHolder {
    WriteBehindOptions queue_options;
    uint64_t timeout_ms;

    /* What changed, and what the replica lacks of that */
    ReplicationChanges *changes;

    /* What is known of that after a crash; NULL without metadata */
    ReplicationLedger *ledger;
    uint64_t log_size;

    /* Where writes and copies are under way that must not overlap */
    CoMutex ranges_lock;
    BlockReqList ranges;
    uint64_t nb_ranges;
    /* Bytes of the guest's writes among them, or about to be */
    Stat64 changing_bytes;

    /*
     * The replica, the queue of what goes there, and who ends what hangs there:
     * all or none.  Changed while the node is drained.
     */
    BdrvChild *replica;
    WriteBehind *queue;
    ReplicationWatch *watch;
    /* The links on the way to it, and to its metadata, frozen by us */
    GSList *frozen;

    /* What stands above.  BQL. */
    ReplicationAbove *above;

    /*
     * Why the replica gets nothing more: a negative errno, or 0.  Accessed with
     * atomic operations, as is what follows.
     */
    int lost;
    /* It has had everything at some time since it was attached */
    bool caught_up;
    /*
     * The last replica has, on stable storage: what this node knows of is all
     * that it may lack
     */
    bool had_replica;
    /* A job is bringing the replica in step.  BQL. */
    bool has_job;
    /* A read from the local disk failed */
    bool read_failed;

    /* What is lacking is copied by so many coroutines, in so large parts */
    unsigned int copiers;
    int copy_bytes;
    bool copy_paused;
    bool copy_limited;
    RateLimit copy_limit;
    QEMUTimer *copy_timer;
    Stat64 copied_bytes;
    /*
     * When the last part was over, and how many requests of the guest had come
     * by then.  Protected by @ranges_lock.
     */
    int64_t copy_end_ns;
    unsigned int copy_requests;

    /* What was closing at the last checkpoint is on both disks for good */
    bool flushed;

    /*
     * Changes that are being made sure of without a checkpoint, when the ranges
     * below this number are done, if it is not 0; and when that is done next.
     * The job's.
     */
    uint64_t settle_below;
    uint64_t settle_what;
    int64_t settle_ns;
};

static ReplicationHolder *holder_state(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return s->holder;
}

static void holder_kick_copiers(BlockDriverState *bs);
static void holder_abandon(BlockDriverState *bs);
static void holder_drop_replica(BlockDriverState *bs);

/* Whether what the guest changes is of use to the replica */
static bool holder_forwards(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->replica && !qatomic_read(&s->lost);
}

/* Whether what changed is all that the last replica may lack */
static bool holder_knows_changes(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->ledger ? replication_ledger_knows_changes(s->ledger) :
                       s->had_replica;
}

static bool holder_is_in_step(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return holder_forwards(bs) && qatomic_read(&s->caught_up) &&
           !replication_changes_lacking_bytes(s->changes);
}

static ReplicaState holder_replica_state(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (!s->replica) {
        return REPLICA_STATE_NONE;
    }
    if (qatomic_read(&s->lost)) {
        return REPLICA_STATE_LOST;
    }

    return holder_is_in_step(bs) ? REPLICA_STATE_SYNCED : REPLICA_STATE_SYNCING;
}

/* The replica gets nothing more.  Only the first call counts. */
static void holder_lose(BlockDriverState *bs, const char *what, int ret)
{
    ReplicationHolder *s = holder_state(bs);

    IO_CODE();

    if (qatomic_cmpxchg(&s->lost, 0, ret)) {
        return;
    }
    error_report("Replication node '%s' failed to forward a %s to the "
                 "secondary: %s", bdrv_get_node_name(bs), what, strerror(-ret));
    replication_report_error(bs, REPLICATION_ERROR_REASON_FORWARD,
                             strerror(-ret));
    replication_report_replica(bs, REPLICA_STATE_LOST, strerror(-ret));
}

static void holder_forward_failed(BlockDriverState *bs, WriteBehindType type,
                                  int ret)
{
    holder_lose(bs, write_request_name(type), ret);
}

static void coroutine_fn
holder_lock_range(BlockDriverState *bs, HolderRange *range, int64_t offset,
                  int64_t bytes)
{
    ReplicationHolder *s = holder_state(bs);

    QEMU_LOCK_GUARD(&s->ranges_lock);

    reqlist_wait_all(&s->ranges, offset, bytes, &s->ranges_lock);
    reqlist_init_req(&s->ranges, &range->req, offset, bytes);
    range->number = s->nb_ranges++;
}

static void coroutine_fn holder_unlock_range(BlockDriverState *bs,
                                             HolderRange *range)
{
    ReplicationHolder *s = holder_state(bs);

    QEMU_LOCK_GUARD(&s->ranges_lock);

    reqlist_remove_req(&range->req);
}

static bool coroutine_fn holder_has_range_below(BlockDriverState *bs,
                                                uint64_t number)
{
    ReplicationHolder *s = holder_state(bs);
    BlockReq *req;

    QEMU_LOCK_GUARD(&s->ranges_lock);

    QLIST_FOREACH(req, &s->ranges, list) {
        if (container_of(req, HolderRange, req)->number < number) {
            return true;
        }
    }

    return false;
}

/* Without one that is worth it, the guest waits as long as the link takes */
static bool holder_has_queue(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->queue_options.max_bytes >= 4 * REPLICATION_BLOCK;
}

/* Returns whether it was queued, or else is lacking */
static bool coroutine_fn GRAPH_RDLOCK
holder_queue(BlockDriverState *bs, const WriteRequest *w)
{
    ReplicationHolder *s = holder_state(bs);

    trace_replication_forward(bs, bdrv_get_node_name(bs),
                              write_request_name(w->type), w->offset, w->bytes,
                              w->flags);
    /*
     * While replication runs, the guest must not get further ahead than the
     * queue lets it, because a checkpoint waits for that.
     */
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING ||
        !holder_has_queue(bs)) {
        write_behind_co_write(s->queue, w);
        return true;
    }
    if (write_behind_co_try_write(s->queue, w) == -EAGAIN) {
        replication_changes_lack(s->changes, w->offset, w->bytes);
        holder_kick_copiers(bs);
        return false;
    }

    return true;
}

/* Queue what was read, but its zeroes as such.  Returns whether all was. */
static bool coroutine_fn GRAPH_RDLOCK
holder_queue_data(BlockDriverState *bs, int64_t offset, int64_t bytes,
                  const uint8_t *buf, QEMUIOVector *qiov)
{
    int64_t done, length;
    bool queued = true;

    for (done = 0; done < bytes; done += length) {
        WriteRequest w = { .offset = offset + done };
        bool zero;

        length = MIN(bytes - done, REPLICATION_BLOCK);
        zero = buffer_is_zero(buf + done, length);
        while (done + length < bytes) {
            int64_t more = MIN(bytes - done - length, REPLICATION_BLOCK);

            if (buffer_is_zero(buf + done + length, more) != zero) {
                break;
            }
            length += more;
        }
        w.bytes = length;
        if (zero) {
            w.type = WRITE_BEHIND_ZEROES;
            w.flags = BDRV_REQ_MAY_UNMAP;
        } else {
            w.type = WRITE_BEHIND_WRITE;
            w.qiov = qiov;
            w.qiov_offset = done;
        }
        queued = holder_queue(bs, &w) && queued;
    }

    return queued;
}

/*
 * Forward what the local disk has, in a part of a range that is locked and not
 * lacking.  Returns how much of it, or a negative errno: -EAGAIN if there was
 * no room for it.
 */
static int64_t coroutine_fn GRAPH_RDLOCK
holder_forward_local(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    ReplicationHolder *s = holder_state(bs);
    WriteRequest w = { .type = WRITE_BEHIND_ZEROES, .offset = offset };
    QEMUIOVector qiov;
    uint8_t *buf;
    int ret;

    ret = bdrv_co_block_status_above(bs->file->bs, NULL, offset, bytes,
                                     &w.bytes, NULL, NULL);
    if (ret < 0) {
        return ret;
    }
    if (ret & BDRV_BLOCK_ZERO) {
        w.flags = BDRV_REQ_MAY_UNMAP;
        return holder_queue(bs, &w) ? w.bytes : -EAGAIN;
    }

    bytes = MIN(w.bytes, qatomic_read(&s->copy_bytes));
    buf = qemu_try_blockalign(bs->file->bs, bytes);
    if (!buf) {
        return -ENOMEM;
    }
    qemu_iovec_init_buf(&qiov, buf, bytes);
    ret = bdrv_co_preadv(bs->file, offset, bytes, &qiov, 0);
    if (ret == 0 && !holder_queue_data(bs, offset, bytes, buf, &qiov)) {
        ret = -EAGAIN;
    }
    qemu_vfree(buf);

    return ret < 0 ? ret : bytes;
}

/* All of it, or it is lacking.  Returns 0 or a negative errno. */
static int coroutine_fn GRAPH_RDLOCK
holder_copy_range(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t end = offset + bytes;
    int64_t ret;

    for (; offset < end; offset += ret) {
        ret = holder_forward_local(bs, offset, end - offset);
        if (ret < 0) {
            replication_changes_lack(s->changes, offset, end - offset);
            return ret;
        }
    }

    return 0;
}

/*
 * The local disk has done @w with the result @ret, and its range is locked.  If
 * that failed, the disk may have the old data, the new, or a mixture.
 */
static void coroutine_fn GRAPH_RDLOCK
holder_forward(BlockDriverState *bs, const WriteRequest *w, int ret)
{
    ReplicationHolder *s = holder_state(bs);
    WriteRequest part = *w;
    int64_t end = w->offset + w->bytes;

    /* The replica has to do it, however it can */
    part.flags &= ~BDRV_REQ_NO_FALLBACK;
    while (part.offset < end) {
        if (replication_changes_is_lacking(s->changes, part.offset,
                                           end - part.offset, &part.bytes)) {
            /* To be copied */
        } else if (ret < 0) {
            if (holder_copy_range(bs, part.offset, part.bytes) < 0) {
                holder_kick_copiers(bs);
            }
        } else {
            holder_queue(bs, &part);
        }
        part.offset += part.bytes;
        part.qiov_offset += part.bytes;
    }
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

static bool holder_may_copy(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return holder_forwards(bs) && !qatomic_read(&s->copy_paused) &&
           !qatomic_read(&bs->quiesce_counter) &&
           !(bs->open_flags & BDRV_O_INACTIVE) &&
           replication_changes_lacking_bytes(s->changes);
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

/* Have what the replica lacks copied.  From any thread. */
static void holder_kick_copiers(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    unsigned int max;

    if (!holder_may_copy(bs) || timer_pending(s->copy_timer)) {
        return;
    }
    max = qatomic_read(&s->copy_limited) ? 1 : MAX_COPIERS;
    if (qatomic_fetch_inc(&s->copiers) >= max) {
        qatomic_dec(&s->copiers);
        return;
    }
    bdrv_inc_in_flight(bs);
    aio_co_schedule(bdrv_get_aio_context(bs),
                    qemu_coroutine_create(holder_copy_entry, bs));
}

static void holder_copy_timer(void *opaque)
{
    holder_kick_copiers(opaque);
}

/* Whether zeroes may free space there, and not take some */
static bool GRAPH_RDLOCK holder_can_unmap(BlockDriverState *node)
{
    for (; node; node = bdrv_primary_bs(node)) {
        if (!(node->open_flags & BDRV_O_UNMAP) ||
            !(node->supported_zero_flags & BDRV_REQ_MAY_UNMAP)) {
            return false;
        }
    }

    return true;
}

/*
 * A discarded block may read as anything, and on another disk as something
 * else.  With a replica it becomes zeroes, if both disks may free space for
 * these; else it is not worth it.
 */
static bool GRAPH_RDLOCK
holder_take_discard(BlockDriverState *bs, WriteRequest *w)
{
    ReplicationHolder *s = holder_state(bs);

    if (!holder_can_unmap(bs->file->bs) || !holder_can_unmap(s->replica->bs)) {
        return false;
    }
    w->type = WRITE_BEHIND_ZEROES;
    w->flags |= BDRV_REQ_MAY_UNMAP;

    return true;
}

/* What is changed belongs to this node alone: to no replica but its own */
static bool holder_is_alone(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return replication_stage(bs) != REPLICATION_STAGE_RUNNING &&
           (!holder_forwards(bs) || replication_ledger_is_confirmed(s->ledger));
}

static int coroutine_fn GRAPH_RDLOCK
holder_co_write(BlockDriverState *bs, const WriteRequest *guest)
{
    ReplicationHolder *s = holder_state(bs);
    WriteRequest w = *guest;
    HolderRange range;
    int ret = 0;

    if (w.type == WRITE_BEHIND_DISCARD && s->replica &&
        !holder_take_discard(bs, &w)) {
        return 0;
    }
    if (!w.bytes) {
        return write_request_co_do(bs->file, &w);
    }

    stat64_add(&s->changing_bytes, w.bytes);
    holder_lock_range(bs, &range, w.offset, w.bytes);
    replication_changes_note(s->changes, w.offset, w.bytes);
    if (s->ledger) {
        ret = replication_ledger_co_begin(s->ledger, w.offset, w.bytes,
                                          holder_is_alone(bs));
    }
    if (ret == 0) {
        ret = write_request_co_do(bs->file, &w);
        /* Whatever it says, a part may have been done */
        if (holder_forwards(bs)) {
            holder_forward(bs, &w, ret);
        }
    }
    holder_unlock_range(bs, &range);
    stat64_add(&s->changing_bytes, -w.bytes);

    return ret;
}

/* What the guest flushes it relies on here; the replica may take its time */
static int coroutine_fn GRAPH_RDLOCK holder_co_flush(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    int ret = bdrv_co_flush(bs->file->bs);

    if (ret == 0 && holder_forwards(bs)) {
        write_behind_co_flush(s->queue, false);
    }

    return ret;
}

/* The local disk has failed with @ret; the replica may know better */
static int coroutine_fn GRAPH_RDLOCK
holder_co_read_failed(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags, int ret)
{
    ReplicationHolder *s = holder_state(bs);

    if (!holder_is_in_step(bs)) {
        return ret;
    }
    write_behind_co_await(s->queue, offset, bytes);
    /* Again, because of what has become of the writes */
    if (!holder_is_in_step(bs)) {
        return ret;
    }
    if (!qatomic_xchg(&s->read_failed, true)) {
        warn_report("Replication node '%s' reads from its replica what the "
                    "local disk fails to: %s", bdrv_get_node_name(bs),
                    strerror(-ret));
        replication_report_error(bs, REPLICATION_ERROR_REASON_LOCAL_READ,
                                 strerror(-ret));
    }

    return bdrv_co_preadv_part(s->replica, offset, bytes, qiov,
                               qiov_offset, flags) < 0 ? ret : 0;
}

/* If an overlay is all that uses the node, the guest is going to write there */
static bool GRAPH_RDLOCK
holder_refuse_overlays(BlockDriverState *bs, Error **errp)
{
    bool has_overlay = false;
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        if (c->role & BDRV_CHILD_COW) {
            has_overlay = true;
        } else if (!c->klass->stay_at_node) {
            return true;
        }
    }
    if (has_overlay) {
        error_setg(errp, "Replication node '%s' cannot have a replica and be "
                   "the backing node of an overlay", bdrv_get_node_name(bs));
        error_append_hint(errp, "Commit the overlay, or detach the replica "
                          "with x-block-replica-detach first.\n");
    }

    return !has_overlay;
}

/* What the guest writes past the node gets to no disk of it */
static bool GRAPH_RDLOCK
holder_refuse_bypass(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    g_autofree char *node = replication_above_bypass(s->above, bs);

    if (!node) {
        return true;
    }

    error_setg(errp, "Replication node '%s' cannot have a replica and be cut "
               "off from node '%s' above it", bdrv_get_node_name(bs), node);
    error_append_hint(errp, "Detach the replica with x-block-replica-detach "
                      "first.\n");
    return false;
}

static bool GRAPH_RDLOCK
holder_check_parents(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    /*
     * Only what somebody comes to do is refused: who lets go of something has
     * no way out of an error.
     */
    return !s->replica || !errp || holder_refuse_bypass(bs, errp);
}

/* What could not be refused is not forgotten, even if it is taken back */
static void GRAPH_RDLOCK holder_parents_changed(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    g_autofree char *node = replication_above_bypass(s->above, bs);

    /* If that node is being deleted, most likely so are we */
    if (node && s->replica && bdrv_find_node(node)) {
        error_report("Replication node '%s' was cut off from node '%s' above "
                     "it: what is written there does not get to the secondary",
                     bdrv_get_node_name(bs), node);
        holder_lose(bs, "request", -EIO);
    }
    s->above = replication_above_update(s->above, bs);
    /* It may have become active */
    holder_kick_copiers(bs);
}

static bool holder_in_sync(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    const char *name = bdrv_get_node_name(bs);
    int lost = qatomic_read(&s->lost);

    if (!s->replica) {
        error_setg(errp, "Replication node '%s' has no replica", name);
    } else if (lost) {
        error_setg_errno(errp, -lost, "The replica of replication node '%s' "
                         "was lost", name);
    } else if (!holder_is_in_step(bs)) {
        error_setg(errp, "The replica of replication node '%s' is not in step: "
                   "it lacks %" PRId64 " bytes", name,
                   replication_changes_lacking_bytes(s->changes));
        error_append_hint(errp, "Wait until it is synced.\n");
        return false;
    } else {
        return true;
    }
    error_append_hint(errp, "Attach one with x-block-replica-sync.\n");

    return false;
}

static void holder_get_error(BlockDriverState *bs, Error **errp)
{
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        holder_in_sync(bs, errp);
    }
}

/*
 * What was changed before the last checkpoint, and both sides have on stable
 * storage now, can be forgotten at the next one.
 */
static void coroutine_fn holder_flush_both(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationHolder *s = holder_state(bs);
    int ret;

    replication_changes_tidy(s->changes);
    bdrv_graph_co_rdlock();
    ret = bdrv_co_flush(bs->file->bs);
    bdrv_graph_co_rdunlock();
    if (ret == 0) {
        ret = write_behind_co_flush(s->queue, true);
    }
    s->flushed = ret == 0;
    bdrv_dec_in_flight(bs);
}

/* The node is drained, and both sides are going to have the same checkpoint */
static void holder_checkpointed(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    replication_changes_checkpoint(s->changes, s->flushed);
    s->flushed = false;
    /* The next one drains the node, and so comes when this has ended */
    bdrv_inc_in_flight(bs);
    aio_co_schedule(bdrv_get_aio_context(bs),
                    qemu_coroutine_create(holder_flush_both, bs));
}

/* The part of the graph that the timeout is for */
static BlockDriverState *holder_link(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->replica->bs;
}

static void holder_hang_up(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    holder_lose(bs, "request", -ETIMEDOUT);
    write_behind_abandon(s->queue);
    bdrv_cut_connection(s->replica->bs);
}

static bool GRAPH_RDLOCK
holder_check_replica(BlockDriverState *bs, BlockDriverState *replica,
                     Error **errp)
{
    int64_t length = bdrv_getlength(bs->file->bs);
    int64_t other = bdrv_getlength(replica);

    if (length < 0 || other < 0) {
        error_setg_errno(errp, -MIN(length, other), "Replication node '%s': "
                         "failed to get the length of node '%s'",
                         bdrv_get_node_name(bs),
                         bdrv_get_node_name(length < 0 ? bs : replica));
        return false;
    }
    if (length != other) {
        error_setg(errp, "Replication node '%s' has a length of %" PRId64
                   " bytes, its replica '%s' of %" PRId64,
                   bdrv_get_node_name(bs), length,
                   bdrv_get_node_name(replica), other);
        error_append_hint(errp, "Create the replica with the length of the "
                          "disk.\n");
        return false;
    }
    if (bdrv_is_read_only(replica)) {
        error_setg(errp, "Replica '%s' of replication node '%s' is read-only",
                   bdrv_get_node_name(replica), bdrv_get_node_name(bs));
        error_append_hint(errp, "Open it, and export it, for writing.\n");
        return false;
    }

    return true;
}

/* A connection that is lost is lost, and the link leads where it leads now */
static void GRAPH_RDLOCK holder_freeze(BlockDriverState *bs, BdrvChild *child)
{
    ReplicationHolder *s = holder_state(bs);

    bdrv_keep_connection(child->bs);
    bdrv_freeze_child(child);
    s->frozen = replication_freeze_below(child->bs,
                                         g_slist_prepend(s->frozen, child));
}

/* Nobody else may write to the local disk from now on, nor to the replica */
static bool holder_take_replica(BlockDriverState *bs, BdrvChild *replica,
                                Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!holder_check_replica(bs, replica->bs, errp)) {
        return false;
    }
    s->replica = replica;
    if (bdrv_child_refresh_perms(bs, bs->file, errp) < 0) {
        s->replica = NULL;
        return false;
    }

    holder_freeze(bs, replica);
    s->lost = 0;
    s->flushed = false;
    s->queue = write_behind_new(bs, replica, &s->queue_options,
                                holder_forward_failed);
    s->watch = replication_watch_new(bs, s->timeout_ms, holder_link,
                                     holder_hang_up);

    return true;
}

bool replication_replica_may_change(BlockDriverState *bs, Error **errp)
{
    GLOBAL_STATE_CODE();

    if (replication_role(bs) != &replication_holder_role) {
        error_setg(errp, "Node '%s' is not a replication node with a replica "
                   "of its own", bdrv_get_node_name(bs));
        error_append_hint(errp, "Open one with mode=primary and the option "
                          "'replica', which may be null.\n");
        return false;
    }
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        error_setg(errp, "The replica of replication node '%s' cannot be "
                   "changed: it is running", bdrv_get_node_name(bs));
        error_append_hint(errp, "Stop replication first.\n");
        return false;
    }

    return true;
}

/* No replica has the length of this disk, or none that is known */
static void holder_resized(BlockDriverState *bs, int64_t length)
{
    ReplicationHolder *s = holder_state(bs);

    replication_changes_resize(s->changes, length);
    s->had_replica = false;
    if (s->ledger) {
        replication_ledger_resized(s->ledger);
    }
}

/* Others may have resized the disk while the node was inactive */
static void holder_check_length(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t length;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    length = bdrv_getlength(bs->file->bs);
    if (length >= 0 && length != replication_changes_size(s->changes)) {
        holder_resized(bs, length);
    }
}

/* Whether @opts make sense for @bs */
static bool holder_check_attach(BlockDriverState *bs,
                                const ReplicaAttachOptions *opts, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    const char *name = bdrv_get_node_name(bs);

    if (opts->metadata && !s->ledger) {
        error_setg(errp, "Replication node '%s' has no metadata of its own, "
                   "and that of the replica alone says nothing", name);
        error_append_hint(errp, "Open the node with the option 'metadata'.\n");
    } else if (s->ledger && !replication_ledger_is_open(s->ledger)) {
        error_setg(errp, "Replication node '%s' is inactive, and its metadata "
                   "was not read", name);
    } else if (opts->sync == BLOCK_REPLICA_SYNC_MODE_AUTO && !opts->metadata) {
        error_setg(errp, "Replication node '%s': sync=auto needs the metadata "
                   "of the replica", name);
        error_append_hint(errp, "Give replica-metadata, or use sync=full.\n");
    } else if (opts->discard_peer && !opts->metadata) {
        error_setg(errp, "Replication node '%s': discard-peer needs the "
                   "metadata of the replica", name);
    } else if (opts->sync == BLOCK_REPLICA_SYNC_MODE_CHANGED &&
               opts->metadata) {
        error_setg(errp, "Replication node '%s': with the metadata of the "
                   "replica, that says what changed", name);
        error_append_hint(errp, "Use sync=auto.\n");
    } else if (opts->sync == BLOCK_REPLICA_SYNC_MODE_CHANGED &&
               !holder_knows_changes(bs)) {
        error_setg(errp, "Replication node '%s' has had no replica that was in "
                   "step", name);
        error_append_hint(errp, "Use sync=full.\n");
    } else {
        return true;
    }

    return false;
}

static bool holder_may_attach(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (s->has_job) {
        error_setg(errp, "Replication node '%s' has a job that brings its "
                   "replica in step", bdrv_get_node_name(bs));
        error_append_hint(errp, "Wait until it has ended, or cancel it.\n");
        return false;
    }
    if (s->replica && !s->lost) {
        error_setg(errp, "Replication node '%s' has a replica",
                   bdrv_get_node_name(bs));
        error_append_hint(errp, "Detach it with x-block-replica-detach "
                          "first.\n");
        return false;
    }

    return holder_refuse_overlays(bs, errp) && holder_refuse_bypass(bs, errp);
}

/* The node is drained */
static void holder_drop_peer(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    BdrvChild *child = s->ledger ? replication_ledger_leave(s->ledger) : NULL;

    if (child) {
        replication_unfreeze_below(g_steal_pointer(&s->frozen));
        bdrv_graph_wrlock();
        bdrv_unref_child(bs, child);
        bdrv_graph_wrunlock();
    }
}

static BdrvChild *holder_attach_child(BlockDriverState *bs,
                                      BlockDriverState *child_bs,
                                      const char *name, BdrvChildRole role,
                                      Error **errp)
{
    BdrvChild *child;

    bdrv_ref(child_bs);
    bdrv_graph_wrlock();
    child = bdrv_attach_child(bs, child_bs, name, &child_of_bds, role, errp);
    bdrv_graph_wrunlock();

    return child;
}

/*
 * Read the metadata of the replica, and find out what to copy.  The guest goes
 * on meanwhile.
 */
static bool holder_meet_peer(BlockDriverState *bs,
                             const ReplicaAttachOptions *opts,
                             ReplicationRuling *ruling, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    BdrvChild *child;

    bdrv_drain_all_begin();
    child = holder_attach_child(bs, opts->metadata, "replica-metadata",
                                BDRV_CHILD_METADATA, errp);
    if (child) {
        bdrv_graph_rdlock_main_loop();
        holder_freeze(bs, child);
        bdrv_graph_rdunlock_main_loop();
    }
    bdrv_drain_all_end();

    return child && replication_ledger_meet(s->ledger, child, errp) &&
           replication_ledger_judge(s->ledger,
                                    opts->sync == BLOCK_REPLICA_SYNC_MODE_FULL,
                                    opts->discard_peer, ruling, errp);
}

/* The node is drained, and the replica was taken */
static bool holder_begin_sync(BlockDriverState *bs,
                              const ReplicationRuling *ruling, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    if (s->ledger &&
        !replication_ledger_announce(s->ledger, ruling, errp)) {
        return false;
    }
    s->has_job = true;
    s->caught_up = false;
    s->settle_below = 0;
    s->settle_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + SETTLE_NS;
    if (ruling->full) {
        /* Until it has everything, nobody knows what it lacks */
        s->had_replica = false;
        replication_changes_lack_all(s->changes);
    } else {
        replication_changes_lack_changed(s->changes);
    }
    replication_report_replica(bs, REPLICA_STATE_SYNCING, NULL);

    return true;
}

static bool holder_attach(BlockDriverState *bs,
                          const ReplicaAttachOptions *opts, Error **errp)
{
    ReplicationRuling ruling = {
        .full = opts->sync == BLOCK_REPLICA_SYNC_MODE_FULL,
    };
    BdrvChild *child;
    bool ok;

    if (opts->metadata && !holder_meet_peer(bs, opts, &ruling, errp)) {
        return false;
    }
    /* Everything: where nodes meet, some are moved to another AioContext */
    bdrv_drain_all_begin();
    child = holder_attach_child(bs, opts->replica, "replica", BDRV_CHILD_DATA,
                                errp);
    ok = child && holder_take_replica(bs, child, errp);
    if (child && !ok) {
        bdrv_graph_wrlock();
        bdrv_unref_child(bs, child);
        bdrv_graph_wrunlock();
    } else if (ok && !holder_begin_sync(bs, &ruling, errp)) {
        ok = false;
        holder_drop_replica(bs);
    }
    bdrv_drain_all_end();
    if (ok && ruling.full && ruling.reason) {
        info_report("Replication node '%s' copies all of its disk, because %s",
                    bdrv_get_node_name(bs), ruling.reason);
    }

    return ok;
}

bool replication_replica_attach(BlockDriverState *bs,
                                const ReplicaAttachOptions *opts, Error **errp)
{
    bool ok;

    GLOBAL_STATE_CODE();

    if (!holder_may_attach(bs, errp)) {
        return false;
    }
    holder_check_length(bs);
    if (!holder_check_attach(bs, opts, errp)) {
        return false;
    }

    /* One that was lost may be the same node, and have no other user */
    bdrv_ref(opts->replica);
    if (opts->metadata) {
        bdrv_ref(opts->metadata);
    }
    replication_replica_detach(bs, true);
    ok = holder_attach(bs, opts, errp);
    if (!ok) {
        bdrv_drain_all_begin();
        holder_drop_peer(bs);
        bdrv_drain_all_end();
    }
    bdrv_unref(opts->replica);
    bdrv_unref(opts->metadata);

    return ok;
}

/* Nothing is in flight */
static void holder_drop_replica(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    BdrvChild *replica = s->replica;

    replication_unfreeze_below(g_steal_pointer(&s->frozen));
    replication_watch_free(g_steal_pointer(&s->watch));
    write_behind_free(g_steal_pointer(&s->queue));
    timer_del(s->copy_timer);
    s->replica = NULL;
    replication_changes_lack_nothing(s->changes);
    holder_drop_peer(bs);

    bdrv_graph_wrlock();
    bdrv_unref_child(bs, replica);
    bdrv_graph_wrunlock();

    bdrv_graph_rdlock_main_loop();
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_graph_rdunlock_main_loop();

    replication_report_replica(bs, REPLICA_STATE_NONE, NULL);
}

void replication_replica_detach(BlockDriverState *bs, bool force)
{
    ReplicationHolder *s = holder_state(bs);

    GLOBAL_STATE_CODE();

    if (force && s->replica) {
        holder_abandon(bs);
    }
    bdrv_drain_all_begin();
    if (s->replica) {
        holder_drop_replica(bs);
    }
    bdrv_drain_all_end();
}

void replication_replica_job_cancelled(BlockDriverState *bs)
{
    GLOBAL_STATE_CODE();

    if (replication_stage(bs) != REPLICATION_STAGE_RUNNING) {
        holder_abandon(bs);
    }
}

void replication_replica_job_failed(BlockDriverState *bs)
{
    GLOBAL_STATE_CODE();

    /* What runs already is no business of a job whose end was put off */
    if (replication_stage(bs) != REPLICATION_STAGE_RUNNING) {
        replication_replica_detach(bs, true);
    }
}

void replication_replica_job_ended(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    GLOBAL_STATE_CODE();

    s->has_job = false;
    replication_replica_set_speed(bs, 0);
    replication_replica_pause(bs, false);
}

ReplicaState replication_replica_state(BlockDriverState *bs, int *error)
{
    ReplicationHolder *s = holder_state(bs);

    *error = qatomic_read(&s->lost);

    return holder_replica_state(bs);
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

/* The node is drained, and the VM stands still most likely */
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

static bool holder_start(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    bdrv_graph_rdlock_main_loop();
    if (!holder_refuse_overlays(bs, errp) || !holder_refuse_bypass(bs, errp)) {
        bdrv_graph_rdunlock_main_loop();
        return false;
    }
    bdrv_graph_rdunlock_main_loop();

    holder_catch_up(bs);

    return holder_in_sync(bs, errp) &&
           (!s->ledger || replication_ledger_confirm(s->ledger, errp));
}

/* The replica is the secondary's disk from now on */
static bool holder_stop(BlockDriverState *bs, Error **errp)
{
    replication_replica_detach(bs, false);

    return true;
}

static void holder_abandon(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!s->replica) {
        return;
    }
    /* First, lest a read give what was there before the dropped writes */
    qatomic_cmpxchg(&s->lost, 0, -ECANCELED);
    write_behind_abandon(s->queue);
    bdrv_cut_connection(s->replica->bs);
    if (s->ledger) {
        replication_ledger_abandon(s->ledger);
    }
}

/*
 * Alone, with all that is needed to protect the guest again.  A generation of
 * its own that cannot be written is not the end: writes fail until it is.
 */
static void holder_failover(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    replication_replica_detach(bs, true);
    replication_set_stage(bs, REPLICATION_STAGE_NONE);
    if (s->ledger) {
        replication_ledger_go_alone(s->ledger, errp);
    }
}

static void holder_new(BlockDriverState *bs, const WriteBehindOptions *queue,
                       uint64_t timeout_ms, uint64_t log_size)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s;

    s = node->holder = g_new0(ReplicationHolder, 1);
    s->queue_options = *queue;
    s->timeout_ms = timeout_ms;
    s->log_size = log_size;
    s->above = replication_above_new();
    qemu_co_mutex_init(&s->ranges_lock);
    QLIST_INIT(&s->ranges);
    stat64_init(&s->copied_bytes, 0);
    stat64_init(&s->changing_bytes, 0);
    ratelimit_init(&s->copy_limit);
    s->copy_timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                                  SCALE_NS, holder_copy_timer, bs);
    replication_replica_set_speed(bs, 0);
}

static bool holder_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    WriteBehindOptions queue = {};
    uint64_t timeout_ms;

    if (!replication_primary_get_opts(opts, &queue, &timeout_ms, errp)) {
        return false;
    }
    holder_new(bs, &queue, timeout_ms, replication_holder_get_log_size(opts));

    return true;
}

uint64_t replication_holder_get_log_size(QemuOpts *opts)
{
    return qemu_opt_get_size(opts, REPLICATION_OPT_LOG_SIZE, DEFAULT_LOG_SIZE);
}

void replication_holder_take_over(BlockDriverState *bs,
                                  const WriteBehindOptions *queue,
                                  uint64_t timeout_ms, uint64_t log_size,
                                  ReplicationChanges *changes,
                                  ReplicationLedger *ledger)
{
    ReplicationHolder *s;

    GLOBAL_STATE_CODE();

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    holder_new(bs, queue, timeout_ms, log_size);
    s = holder_state(bs);
    s->ledger = ledger;
    s->changes = changes ?:
        replication_changes_new(bs->total_sectors * BDRV_SECTOR_SIZE);
    /* If that is not the length, it is known before a replica is attached */
    holder_parents_changed(bs);
}

static bool holder_is_null(const QObject *option)
{
    const QString *string = qobject_to(QString, option);

    /* As for "backing": -drive and -blockdev have no null */
    return qobject_type(option) == QTYPE_QNULL ||
           (string && !*qstring_get_str(string));
}

/* While the node is inactive, others may write to the metadata */
static bool holder_open_ledger(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s = node->holder;

    s->ledger = replication_ledger_new(bs, node->meta, s->changes, s->log_size,
                                       s->timeout_ms);

    return (bs->open_flags & BDRV_O_INACTIVE) ||
           replication_ledger_open(s->ledger, errp) == 0;
}

static bool coroutine_fn GRAPH_RDLOCK
holder_co_activated(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t length;

    if (!s->ledger) {
        return true;
    }
    length = bdrv_co_getlength(bs->file->bs);
    if (length >= 0 && length != replication_changes_size(s->changes)) {
        replication_changes_resize(s->changes, length);
    }

    return replication_ledger_open(s->ledger, errp) == 0;
}

/*
 * A replica that is there from the beginning has what the disk has: the user
 * answers for that.
 */
static bool holder_opened(BlockDriverState *bs, QDict *options, Error **errp)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s = node->holder;
    QObject *option = qdict_get(options, REPLICATION_OPT_REPLICA);
    BdrvChild *replica;
    int64_t length;

    bdrv_graph_rdlock_main_loop();
    length = bdrv_getlength(bs->file->bs);
    bdrv_graph_rdunlock_main_loop();
    if (length < 0) {
        error_setg_errno(errp, -length, "Replication node '%s': failed to get "
                         "the length of its disk", bdrv_get_node_name(bs));
        return false;
    }
    s->changes = replication_changes_new(length);

    if (option && holder_is_null(option)) {
        qdict_del(options, REPLICATION_OPT_REPLICA);
        return !node->meta || holder_open_ledger(bs, errp);
    }
    if (node->meta) {
        error_setg(errp, "Replication node '%s' has metadata, and nobody has "
                   "announced it to its replica", bdrv_get_node_name(bs));
        error_append_hint(errp, "Open it with replica=null, and attach the "
                          "replica with x-block-replica-sync.\n");
        return false;
    }
    replica = bdrv_open_child(NULL, options, REPLICATION_OPT_REPLICA, bs,
                              &child_of_bds, BDRV_CHILD_DATA, false, errp);
    if (!replica || !holder_take_replica(bs, replica, errp)) {
        return false;
    }
    s->caught_up = true;
    s->had_replica = true;

    return true;
}

static void holder_cleanup(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    replication_unfreeze_below(s->frozen);
    replication_watch_free(s->watch);
    if (s->queue) {
        write_behind_free(s->queue);
    }
    timer_free(s->copy_timer);
    ratelimit_destroy(&s->copy_limit);
    replication_ledger_free(s->ledger);
    replication_changes_free(s->changes);
    replication_above_free(s->above);
    g_free(s);
}

static void holder_drain_begin(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (s->queue) {
        write_behind_drain_begin(s->queue);
    }
}

static void holder_drain_end(BlockDriverState *bs)
{
    holder_kick_copiers(bs);
}

static void GRAPH_RDLOCK
holder_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                  BlockReopenQueue *reopen_queue,
                  uint64_t perm, uint64_t shared,
                  uint64_t *nperm, uint64_t *nshared)
{
    ReplicationHolder *s = holder_state(bs);

    if (!(role & BDRV_CHILD_FILTERED)) {
        *nperm = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE;
        *nshared = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED;
        if (bs->open_flags & BDRV_O_INACTIVE) {
            *nperm &= ~BLK_PERM_WRITE;
            *nshared = BLK_PERM_ALL;
        }
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (bs->open_flags & BDRV_O_INACTIVE) {
        return;
    }
    /* What is changed past the node gets to no replica, and to no set */
    *nshared &= ~BLK_PERM_RESIZE;
    if (s->replica || s->had_replica || s->ledger) {
        *nshared &= ~BLK_PERM_WRITE;
    }
}

static void holder_get_stats(BlockDriverState *bs,
                             BlockStatsSpecificReplication *stats)
{
    ReplicationHolder *s = holder_state(bs);
    BlockStatsReplicationPrimary *p = &stats->u.primary;
    WriteBehindStats q = {};
    ReplicaState state;
    uint64_t behind;

    /* In the order in which a write goes from one to the next */
    behind = stat64_get(&s->changing_bytes);
    behind += replication_changes_lacking_bytes(s->changes);
    if (s->queue) {
        write_behind_get_stats(s->queue, &q);
    }
    /* After that, because it is lost before the queue is dropped */
    state = holder_replica_state(bs);
    replication_primary_fill_stats(p, &q);
    p->has_replica_state = true;
    p->replica_state = state;
    p->has_copied_bytes = true;
    p->copied_bytes = stat64_get(&s->copied_bytes);
    p->has_out_of_sync_bytes = true;
    if (state == REPLICA_STATE_SYNCING || state == REPLICA_STATE_SYNCED) {
        p->out_of_sync_bytes = behind + q.pending_span;
    } else if (holder_knows_changes(bs)) {
        p->out_of_sync_bytes =
            replication_changes_changed_bytes(s->changes);
    } else {
        p->out_of_sync_bytes = bs->total_sectors * BDRV_SECTOR_SIZE;
    }
    if (s->ledger) {
        replication_ledger_fill_stats(s->ledger, p);
    }
}

static bool holder_may_resize(BlockDriverState *bs, int64_t length,
                              Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    if (s->replica) {
        error_setg(errp, "Cannot resize replication node '%s' while it has a "
                   "replica", bdrv_get_node_name(bs));
        error_append_hint(errp, "Detach the replica with "
                          "x-block-replica-detach, and resize both.\n");
        return false;
    }

    return !s->ledger ||
           replication_ledger_may_resize(s->ledger, length, errp);
}

const ReplicationRole replication_holder_role = {
    .holds_disk         = true,
    .has_metadata       = true,

    .init               = holder_init,
    .cleanup            = holder_cleanup,
    .opened             = holder_opened,
    .co_activated       = holder_co_activated,
    .child_perm         = holder_child_perm,
    .check_parents      = holder_check_parents,
    .parents_changed    = holder_parents_changed,

    .start              = holder_start,
    .in_sync            = holder_in_sync,
    .checkpointed       = holder_checkpointed,
    .stop               = holder_stop,
    .abandon            = holder_abandon,
    .failover           = holder_failover,
    .get_error          = holder_get_error,
    .get_stats          = holder_get_stats,

    .drain_begin        = holder_drain_begin,
    .drain_end          = holder_drain_end,
    .may_resize         = holder_may_resize,
    .resized            = holder_resized,
    .co_read_failed     = holder_co_read_failed,
    .co_write           = holder_co_write,
    .co_flush           = holder_co_flush,
};
