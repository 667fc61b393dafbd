/*
 * Block replication: failover of a secondary
 *
 * The primary is lost.  A job merges the overlays into the disk while the guest
 * goes on, and then takes them out of the chain.  What the guest has flushed
 * before has not reached the disk, and is flushed first.  If the merge fails,
 * the guest's writes are split between the overlays and the disk until another
 * attempt.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "replication-secondary.h"
#include "trace.h"

int secondary_flush(BlockDriverState *bs, BlockDriverState *hidden,
                    BlockDriverState *disk)
{
    int ret;

    ret = bdrv_flush(bs->file->bs);
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_flush(hidden);
    if (ret < 0) {
        return ret;
    }

    return bdrv_flush(disk);
}

/* The same while we have our children: a merge may change the chain */
static int GRAPH_RDLOCK secondary_flush_all(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    return secondary_flush(bs, s->hidden->bs, s->disk->bs);
}

/* The same, such that a crash does not take the overlays from the guest */
static int coroutine_mixed_fn GRAPH_RDLOCK
secondary_do_settle(BlockDriverState *bs, Error **errp)
{
    int ret = secondary_flush_all(bs);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Replication node '%s': flushing the disk "
                         "after the failover failed", bdrv_get_node_name(bs));
        return ret;
    }

    return standby_keep_overlays(bs, errp);
}

/*
 * After a failover, the guest relies on what was flushed before.  All of it has
 * to be on the disk before something that is written later may be.  Returns an
 * error until it is.
 */
int coroutine_fn secondary_settle(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    ReplicationSecondary *s = secondary_state(bs);
    int ret;

    if (!qatomic_load_acquire(&s->unsettled)) {
        return 0;
    }

    QEMU_LOCK_GUARD(&s->settle_lock);

    if (!qatomic_read(&s->unsettled)) {
        return 0;
    }

    ret = secondary_do_settle(bs, errp);
    if (ret == 0) {
        qatomic_store_release(&s->unsettled, false);
    } else if (!qatomic_cmpxchg(&s->settle_error, 0, ret)) {
        error_report("%s", error_get_pretty(*errp));
        replication_report_error(bs, REPLICATION_ERROR_REASON_FAILOVER,
                                 error_get_pretty(*errp));
    }

    return ret;
}

/*
 * After a failed failover, write each block where the guest reads it from: to
 * the active overlay if one of the overlays has it, else to the disk, such that
 * the overlays, which may be full, do not grow.
 *
 * Writes are serialised: one that allocates a cluster in the active overlay
 * copies the rest of it from below, and must not cover up what another one is
 * writing to the disk there.
 */
static int coroutine_fn GRAPH_RDLOCK
secondary_write_split(BlockDriverState *bs, const WriteRequest *w)
{
    ReplicationSecondary *s = secondary_state(bs);
    int64_t end = w->offset + w->bytes;
    WriteRequest part = *w;
    int ret;

    QEMU_LOCK_GUARD(&s->split_lock);

    while (part.offset < end) {
        ret = bdrv_co_is_allocated_above(bs->file->bs, s->disk->bs, false,
                                         part.offset, end - part.offset,
                                         &part.bytes);
        if (ret < 0) {
            return ret;
        }
        if (!ret && !s->writes_disk) {
            return -EIO;
        }

        ret = write_request_co_do(ret ? bs->file : s->disk, &part);
        if (ret < 0) {
            return ret;
        }

        part.offset += part.bytes;
        part.qiov_offset += part.bytes;
    }

    return 0;
}

int coroutine_fn secondary_merge_co_write(BlockDriverState *bs,
                                          const WriteRequest *w)
{
    ReplicationSecondary *s = secondary_state(bs);
    bool fua = w->flags & BDRV_REQ_FUA;
    int ret;

    /*
     * A disk that cannot be flushed can still be written to: after it has been
     * tried once, only who asks for a flush is told that it fails.
     */
    if (fua || !qatomic_read(&s->settle_error)) {
        ret = secondary_settle(bs, NULL);
        if (ret < 0 && fua) {
            return ret;
        }
    }

    if (replication_stage(bs) == REPLICATION_STAGE_FAILOVER_FAILED) {
        return secondary_write_split(bs, w);
    }

    secondary_count_write(bs, w);
    return write_request_co_do(bs->file, w);
}

int coroutine_fn secondary_merge_co_flush(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    int ret;

    ret = secondary_settle(bs, NULL);
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_flush(bs->file->bs);
    if (ret < 0) {
        return ret;
    }

    /* Flushing an overlay does not flush what secondary_write_split() wrote */
    if (replication_stage(bs) == REPLICATION_STAGE_FAILOVER_FAILED) {
        return bdrv_co_flush(s->disk->bs);
    }

    return 0;
}

static void secondary_begin_progress(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    s->has_failed_over = true;
    s->merged = 0;
    s->to_merge = 0;
    s->failover_begin_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    s->failover_end_ns = 0;
}

/* See how far the merge has got */
static void secondary_update_progress(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (!s->commit_job) {
        return;
    }
    progress_get_snapshot(&s->commit_job->job.progress, &s->merged,
                          &s->to_merge);
    trace_replication_failover_progress(bs, bdrv_get_node_name(bs), s->merged,
                                        s->to_merge);
}

void secondary_merge_get_stats(BlockDriverState *bs,
                               BlockStatsReplicationSecondary *stats)
{
    ReplicationSecondary *s = secondary_state(bs);
    int64_t end_ns = s->failover_end_ns ?:
                     qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    if (!s->has_failed_over) {
        return;
    }

    secondary_update_progress(bs);
    stats->failover = g_new(BlockStatsReplicationFailover, 1);
    *stats->failover = (BlockStatsReplicationFailover) {
        .done       = s->merged,
        .total      = s->to_merge,
        .elapsed_ns = end_ns - s->failover_begin_ns,
    };
}

/*
 * Take the permission to write to the disk, or leave the disk to the merge.  If
 * it still lies behind the guard, that refuses all writes.
 */
static void secondary_set_writes_disk(BlockDriverState *bs, bool writes_disk)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (s->guard || s->writes_disk == writes_disk) {
        return;
    }
    s->writes_disk = writes_disk;
    if (!secondary_refresh_perms(bs, s->disk)) {
        s->writes_disk = false;
    }
}

/* The overlays are whole and guard the guest's data until another attempt */
void secondary_failover_failed(BlockDriverState *bs, Error *err)
{
    ReplicationSecondary *s = secondary_state(bs);

    replication_report_error(bs, REPLICATION_ERROR_REASON_FAILOVER,
                             error_get_pretty(err));
    replication_set_error(bs, err);
    secondary_freeze(bs, NULL);
    secondary_set_writes_disk(bs, true);
    replication_set_stage(bs, REPLICATION_STAGE_FAILOVER_FAILED);

    /* Otherwise the guest's next write or the end of the merge would do it */
    bdrv_graph_rdlock_main_loop();
    if (qatomic_read(&s->unsettled) && secondary_do_settle(bs, NULL) == 0) {
        qatomic_set(&s->unsettled, false);
    }
    bdrv_graph_rdunlock_main_loop();
}

/* The commit job has put the disk in the place of the active overlay */
static void secondary_failover_complete(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    /* It is the guest's disk now, and shared only if its device wants it so */
    s->disk_was_ro = false;
    secondary_release(bs);
    secondary_count_anew(bs);
    replication_set_error(bs, NULL);
    replication_set_stage(bs, standby_merged(bs));
}

static void secondary_commit_done(void *opaque, int ret)
{
    BlockDriverState *bs = opaque;
    ReplicationSecondary *s = secondary_state(bs);
    Error *err = NULL;

    secondary_update_progress(bs);
    s->failover_end_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    s->commit_job = NULL;

    /* A guest's write under way to the active overlay must not be split */
    bdrv_drained_begin(bs);
    if (ret == 0) {
        secondary_failover_complete(bs);
    } else {
        error_setg_errno(&err, -ret, "The failover of replication node '%s' "
                         "failed to merge its overlays into the secondary "
                         "disk", bdrv_get_node_name(bs));
        error_report("%s", error_get_pretty(err));
        secondary_failover_failed(bs, err);
    }
    bdrv_drained_end(bs);
}

bool secondary_start_commit(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *disk = s->disk->bs;
    BlockDriverState *active;
    bool in_chain;

    bdrv_graph_rdlock_main_loop();
    active = secondary_active(bs);
    in_chain = bdrv_chain_contains(active, disk);
    bdrv_graph_rdunlock_main_loop();

    /* The links are frozen while it runs, but not while a merge is under way */
    if (!in_chain) {
        error_setg(errp, "node '%s' is not in the backing chain of node '%s'",
                   bdrv_get_node_name(disk), bdrv_get_node_name(active));
        return false;
    }

    secondary_set_writes_disk(bs, false);
    s->commit_job = commit_active_start(NULL, active, disk, JOB_INTERNAL, 0,
                                        BLOCKDEV_ON_ERROR_REPORT, NULL,
                                        secondary_commit_done, bs, true, errp);

    return s->commit_job;
}

void secondary_failover(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    ReplicationSecondary *s = secondary_state(bs);
    bool parted = secondary_part_from_primary(bs, errp);

    /*
     * The overlays are scratch no more.  Even if their flushes were not held
     * back, those of the guest have not reached the disk before.
     */
    qatomic_set(&s->settle_error, 0);
    qatomic_set(&s->unsettled, true);
    secondary_begin_progress(bs);
    if (parted && s->standby) {
        /* Until the merge does so, we keep others from writing to the disk */
        secondary_set_writes_disk(bs, true);
        standby_prepare_merge(bs);
    }
    if (parted && (s->standby || secondary_start_commit(bs, errp))) {
        replication_set_error(bs, NULL);
        replication_set_stage(bs, REPLICATION_STAGE_FAILOVER);
    } else {
        error_prepend(errp, "The failover of replication node '%s' could not "
                      "start to merge its overlays into the secondary disk: ",
                      bdrv_get_node_name(bs));
        s->failover_end_ns = s->failover_begin_ns;
        secondary_failover_failed(bs, error_copy(*errp));
    }
}

static void secondary_quit_timeout(void *opaque)
{
    /* The timer has ended aio_poll(), as it was to do */
}

/* Whether to wait for the merge any longer, which has to be woken for it */
static bool secondary_awaits_merge(BlockDriverState *bs, int64_t end_ns)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (replication_stage(bs) == REPLICATION_STAGE_FAILOVER) {
        standby_hurry_merge(bs);
    }
    /* After the merge of a standby, its state is that of a primary */
    if (replication_stage(bs) != REPLICATION_STAGE_FAILOVER ||
        qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= end_ns) {
        return false;
    }
    if (!s->commit_job) {
        return standby_prepares_merge(bs);
    }
    /* The main loop's timers, on which it sleeps, do not run any more */
    job_enter(&s->commit_job->job);

    return true;
}

/*
 * A merge that quit cancels would leave the disk incomplete, and the overlays
 * are of a host that may never start them again.
 */
void secondary_finish(BlockDriverState *bs, int64_t quit_ns)
{
    ReplicationSecondary *s = secondary_state(bs);
    int64_t end_ns = quit_ns + s->merge_at_quit_ms * SCALE_MS;
    QEMUTimer *timer = aio_timer_new(qemu_get_aio_context(),
                                     QEMU_CLOCK_REALTIME, SCALE_NS,
                                     secondary_quit_timeout, NULL);

    timer_mod(timer, end_ns);
    bdrv_ref(bs);
    AIO_WAIT_WHILE_UNLOCKED(NULL, secondary_awaits_merge(bs, end_ns));
    bdrv_unref(bs);
    timer_free(timer);
}
