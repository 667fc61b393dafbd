/*
 * Block replication: the guest's requests, of a primary that holds both disks
 *
 * What goes to the local disk is forwarded to the replica in the order in which
 * that has completed it.  A range that is locked is changed and forwarded by
 * nobody else.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/memalign.h"
#include "replication-holder.h"
#include "trace.h"

/* Without one that is worth it, the guest waits as long as the link takes */
static bool holder_has_queue(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->queue_options.max_bytes >= 4 * REPLICATION_BLOCK;
}

void coroutine_fn
holder_lock_range(BlockDriverState *bs, HolderRange *range, int64_t offset,
                  int64_t bytes)
{
    ReplicationHolder *s = holder_state(bs);

    QEMU_LOCK_GUARD(&s->ranges_lock);

    reqlist_wait_all(&s->ranges, offset, bytes, &s->ranges_lock);
    reqlist_init_req(&s->ranges, &range->req, offset, bytes);
    range->number = s->nb_ranges++;
}

void coroutine_fn holder_unlock_range(BlockDriverState *bs,
                                             HolderRange *range)
{
    ReplicationHolder *s = holder_state(bs);

    QEMU_LOCK_GUARD(&s->ranges_lock);

    reqlist_remove_req(&range->req);
}

bool coroutine_fn holder_has_range_below(BlockDriverState *bs,
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
    if (!w.bytes) {
        /* What is below the node has become shorter than the node */
        return -EIO;
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
int coroutine_fn GRAPH_RDLOCK
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

int coroutine_fn GRAPH_RDLOCK
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
int coroutine_fn GRAPH_RDLOCK holder_co_flush(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);
    int ret = bdrv_co_flush(bs->file->bs);

    if (ret == 0 && holder_forwards(bs)) {
        write_behind_co_flush(s->queue, false);
    }

    return ret;
}

/* The local disk has failed with @ret; the replica may know better */
int coroutine_fn GRAPH_RDLOCK
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
