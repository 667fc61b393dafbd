/*
 * Block replication: the secondary side
 *
 * The node's child is the active overlay, over the hidden overlay, over the
 * secondary disk.  The primary writes to the secondary disk; a backup job saves
 * what it overwrites to the hidden overlay, so that the guest, which writes to
 * the active overlay, sees the last checkpoint and its own writes.  A
 * checkpoint empties both overlays.  A failover merges them into the disk.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qemu/timer.h"
#include "system/block-backend.h"
#include "block/block_backup.h"
#include "copy-before-write.h"
#include "replication-int.h"
#include "trace.h"

/*
 * For how long QEMU's end waits for a merge by default.  Managers kill a QEMU
 * that has not ended in 10 s (libvirt) or later.
 */
#define MERGE_AT_QUIT_MS 5000

static GRAPH_RDLOCK BlockDriverState *
secondary_active(BlockDriverState *bs)
{
    return bs->file->bs;
}

static GRAPH_RDLOCK BlockDriverState *
secondary_hidden(BlockDriverState *bs)
{
    return child_bs(secondary_active(bs)->backing);
}

static GRAPH_RDLOCK BlockDriverState *
secondary_disk(BlockDriverState *bs)
{
    return child_bs(secondary_hidden(bs)->backing);
}

/* What we want of the nodes below the active overlay, and let others do there */
static void secondary_own_child_perm(BlockDriverState *bs, BdrvChild *c,
                                     uint64_t *nperm, uint64_t *nshared)
{
    BDRVReplicationState *s = bs->opaque;

    /* Everybody else in the chain may go on, as long as the lengths stay */
    *nshared = BLK_PERM_ALL & ~BLK_PERM_RESIZE;

    if (c && c == s->secondary.hidden) {
        /* It is emptied */
        *nperm = BLK_PERM_WRITE_UNCHANGED;
        if (s->secondary.exclusive) {
            *nshared &= ~BLK_PERM_WRITE;
        }
    } else if (c && c == s->secondary.disk) {
        *nperm = 0;
        if (s->secondary.writes_disk) {
            *nperm = BLK_PERM_WRITE;
            *nshared &= ~BLK_PERM_WRITE;
        }
    } else {
        /* It is being attached: who will be in the way refuses it at once */
        *nperm = BLK_PERM_WRITE;
    }

    if (bs->open_flags & BDRV_O_INACTIVE) {
        *nperm = 0;
    }
}

static void
secondary_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                     BlockReopenQueue *reopen_queue,
                     uint64_t perm, uint64_t shared,
                     uint64_t *nperm, uint64_t *nshared)
{
    BDRVReplicationState *s = bs->opaque;

    if (!(role & BDRV_CHILD_FILTERED)) {
        secondary_own_child_perm(bs, c, nperm, nshared);
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);

    /*
     * The overlays pass on to the nodes below what we share here, and there the
     * primary writes to the disk.  While we run, see secondary_own_overlays().
     */
    if (s->secondary.active) {
        *nperm |= BLK_PERM_WRITE;
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    } else if (!s->secondary.exclusive) {
        *nshared |= BLK_PERM_WRITE;
    }
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
    BDRVReplicationState *s = bs->opaque;
    int64_t end = w->offset + w->bytes;
    WriteRequest part = *w;
    int ret;

    QEMU_LOCK_GUARD(&s->secondary.split_lock);

    while (part.offset < end) {
        ret = bdrv_co_is_allocated_above(bs->file->bs, s->secondary.disk->bs,
                                         false, part.offset, end - part.offset,
                                         &part.bytes);
        if (ret < 0) {
            return ret;
        }
        if (!ret && !s->secondary.writes_disk) {
            return -EIO;
        }

        ret = write_request_co_do(ret ? bs->file : s->secondary.disk, &part);
        if (ret < 0) {
            return ret;
        }

        part.offset += part.bytes;
        part.qiov_offset += part.bytes;
    }

    return 0;
}

/* Put everything on the disk that the guest sees */
static int GRAPH_RDLOCK
secondary_flush(BlockDriverState *bs, BlockDriverState *hidden,
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
    BDRVReplicationState *s = bs->opaque;

    return secondary_flush(bs, s->secondary.hidden->bs,
                           s->secondary.disk->bs);
}

/*
 * After a failover, the guest relies on what was flushed before.  All of it has
 * to be on the disk before something that is written later may be.  Returns an
 * error until it is.
 */
static int coroutine_fn GRAPH_RDLOCK secondary_settle(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    if (!qatomic_load_acquire(&s->secondary.unsettled)) {
        return 0;
    }

    QEMU_LOCK_GUARD(&s->secondary.settle_lock);

    if (!qatomic_read(&s->secondary.unsettled)) {
        return 0;
    }

    ret = secondary_flush_all(bs);
    if (ret == 0) {
        qatomic_store_release(&s->secondary.unsettled, false);
    } else if (!qatomic_cmpxchg(&s->secondary.settle_error, 0, ret)) {
        error_report("Replication node '%s': flushing the disk after the "
                     "failover failed: %s", bdrv_get_node_name(bs),
                     strerror(-ret));
        replication_report_error(bs, REPLICATION_ERROR_REASON_FAILOVER,
                                 strerror(-ret));
    }

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
secondary_co_write(BlockDriverState *bs, const WriteRequest *w)
{
    BDRVReplicationState *s = bs->opaque;
    ReplicationStage stage = replication_stage(bs);
    int ret;

    if (!replication_allows(bs, REPLICATION_OP_WRITE)) {
        return -EIO;
    }

    /*
     * A disk that cannot be flushed can still be written to: after it has been
     * tried once, only who asks for a flush is told that it fails.
     */
    if ((w->flags & BDRV_REQ_FUA) ||
        !qatomic_read(&s->secondary.settle_error)) {
        ret = secondary_settle(bs);
        if (ret < 0 && (w->flags & BDRV_REQ_FUA)) {
            return ret;
        }
    }

    if (stage == REPLICATION_STAGE_FAILOVER_FAILED) {
        return secondary_write_split(bs, w);
    }

    /* When it is done, the child is the disk */
    if (w->type != WRITE_BEHIND_DISCARD && stage != REPLICATION_STAGE_DONE) {
        stat64_add(&s->secondary.active_bytes, w->bytes);
    }
    return write_request_co_do(bs->file, w);
}

static int coroutine_fn GRAPH_RDLOCK secondary_co_flush(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    ret = secondary_settle(bs);
    if (ret < 0) {
        return ret;
    }
    ret = bdrv_co_flush(bs->file->bs);
    if (ret < 0) {
        return ret;
    }

    /* Flushing an overlay does not flush what secondary_write_split() wrote */
    if (replication_stage(bs) == REPLICATION_STAGE_FAILOVER_FAILED) {
        return bdrv_co_flush(s->secondary.disk->bs);
    }

    return 0;
}

/* Whether what is written to @top gets to @bs: not through an overlay */
static bool GRAPH_RDLOCK
node_is_below(BlockDriverState *bs, BlockDriverState *top)
{
    BdrvChild *c;

    if (bs == top) {
        return true;
    }
    QLIST_FOREACH(c, &top->children, next) {
        if (!(c->role & BDRV_CHILD_COW) && node_is_below(bs, c->bs)) {
            return true;
        }
    }

    return false;
}

static void secondary_look_above_bh(void *opaque);

/*
 * An overlay above a node that runs would keep the guest's writes away from it,
 * and checkpoints would not empty it.  So would a change that takes the node
 * out of the graph, but who removes a link does not ask.  What has come of it
 * shows when the graph lock is dropped, which runs bottom halves.
 */
static bool GRAPH_RDLOCK
secondary_check_parents(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *top = s->secondary.top;

    if (!top || node_is_below(bs, top)) {
        return true;
    }

    bdrv_ref(bs);
    aio_bh_schedule_oneshot(qemu_get_aio_context(), secondary_look_above_bh,
                            bs);
    if (QLIST_EMPTY(&bs->parents)) {
        return true;
    }

    error_setg(errp, "Replication node '%s' is running and cannot be cut off "
               "from node '%s' above it", bdrv_get_node_name(bs),
               bdrv_get_node_name(top));
    error_append_hint(errp, "Stop replication first.\n");
    return false;
}

static GRAPH_RDLOCK BlockDriverState *
secondary_find_top(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    const char *top_id = s->secondary.top_id;
    BlockDriverState *top = bdrv_lookup_bs(top_id, top_id, NULL);

    if (!top) {
        error_setg(errp, "top-id '%s' is neither a device nor a node", top_id);
    } else if (!bdrv_is_root_node(top)) {
        error_setg(errp, "node '%s', which top-id names, is not a root node",
                   top_id);
        error_append_hint(errp, "Name the node that the guest's device "
                          "uses.\n");
    } else if (!node_is_below(bs, top)) {
        error_setg(errp, "node '%s', which top-id names, is not above it",
                   top_id);
    } else {
        return top;
    }

    return NULL;
}

static bool GRAPH_RDLOCK
secondary_check_overlay(BlockDriverState *overlay, const char *what,
                        const char *backing, Error **errp)
{
    const char *name = bdrv_get_node_name(overlay);

    if (!overlay->drv || !overlay->drv->bdrv_make_empty) {
        error_setg(errp, "its %s '%s' cannot be emptied", what, name);
        error_append_hint(errp, "Use a new overlay in qcow2 format.\n");
        return false;
    }
    if (bdrv_is_inactive(overlay)) {
        error_setg(errp, "its %s '%s' is inactive", what, name);
        error_append_hint(errp, "Wait for the migration to end, or activate it "
                          "with blockdev-set-active.\n");
        return false;
    }
    if (!overlay->backing) {
        error_setg(errp, "its %s '%s' has no backing node", what, name);
        error_append_hint(errp, "Its backing node has to be the %s.\n",
                          backing);
        return false;
    }

    return true;
}

static bool GRAPH_RDLOCK
secondary_check_disk(BlockDriverState *disk, Error **errp)
{
    const char *name = bdrv_get_node_name(disk);

    if (!disk->drv || bdrv_is_inactive(disk)) {
        error_setg(errp, "its secondary disk '%s' is inactive", name);
        return false;
    }
    if (!bdrv_has_blk(disk)) {
        error_setg(errp, "nobody can write to its secondary disk '%s'", name);
        error_append_hint(errp, "Export it to the primary first, for example "
                          "with block-export-add.\n");
        return false;
    }

    return true;
}

static bool GRAPH_RDLOCK
secondary_check_length(BlockDriverState *overlay, BlockDriverState *disk,
                       Error **errp)
{
    int64_t overlay_length = bdrv_getlength(overlay);
    int64_t length = bdrv_getlength(disk);

    if (length < 0 || overlay_length < 0) {
        error_setg_errno(errp, -MIN(length, overlay_length),
                         "failed to get the length of overlay '%s' or of the "
                         "secondary disk '%s'", bdrv_get_node_name(overlay),
                         bdrv_get_node_name(disk));
        return false;
    }
    if (length != overlay_length) {
        error_setg(errp, "overlay '%s' has a length of %" PRId64 " bytes, the "
                   "secondary disk '%s' of %" PRId64,
                   bdrv_get_node_name(overlay), overlay_length,
                   bdrv_get_node_name(disk), length);
        return false;
    }

    return true;
}

static bool GRAPH_RDLOCK
secondary_check_overlays(BlockDriverState *bs, Error **errp)
{
    BlockDriverState *active = secondary_active(bs);

    if (bdrv_is_inactive(bs)) {
        error_setg(errp, "it is inactive");
        error_append_hint(errp, "Wait for the migration to end, or activate it "
                          "with blockdev-set-active.\n");
        return false;
    }
    if (!secondary_check_overlay(active, "active overlay", "hidden overlay",
                                 errp)) {
        return false;
    }
    if (bdrv_is_read_only(active)) {
        error_setg(errp, "its active overlay '%s' is read-only",
                   bdrv_get_node_name(active));
        return false;
    }

    return secondary_check_overlay(secondary_hidden(bs), "hidden overlay",
                                   "secondary disk", errp);
}

/* Whether the nodes below and above @bs are such that it can start */
static bool GRAPH_RDLOCK
secondary_check_chain(BlockDriverState *bs, Error **errp)
{
    BlockDriverState *disk;

    if (!secondary_check_overlays(bs, errp)) {
        return false;
    }

    disk = secondary_disk(bs);
    return secondary_check_disk(disk, errp) &&
           secondary_check_length(secondary_active(bs), disk, errp) &&
           secondary_check_length(secondary_hidden(bs), disk, errp) &&
           secondary_find_top(bs, errp);
}

/* With less than before, this succeeds */
static bool secondary_refresh_perms(BlockDriverState *bs, BdrvChild *child)
{
    Error *local_err = NULL;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (bdrv_child_refresh_perms(bs, child, &local_err) < 0) {
        warn_reportf_err(local_err, "Replication node '%s' does not get the "
                         "permissions that it needs: ",
                         bdrv_get_node_name(bs));
        return false;
    }

    return true;
}

/*
 * Make @node a child of @bs that can be written to and cannot go away.
 * *@was_ro tells secondary_detach() to make it read-only again.
 */
static bool secondary_attach(BlockDriverState *bs, BlockDriverState *node,
                             const char *name, BdrvChild **child, bool *was_ro,
                             Error **errp)
{
    *was_ro = bdrv_is_read_only(node);
    if (*was_ro && bdrv_reopen_set_read_only(node, false, errp) < 0) {
        *was_ro = false;
        return false;
    }

    /* The reference is the child's, or dropped on failure */
    bdrv_ref(node);
    bdrv_graph_wrlock();
    *child = bdrv_attach_child(bs, node, name, &child_of_bds, BDRV_CHILD_DATA,
                               errp);
    bdrv_graph_wrunlock();

    if (*child) {
        secondary_refresh_perms(bs, *child);
    } else if (*was_ro) {
        bdrv_reopen_set_read_only(node, true, NULL);
        *was_ro = false;
    }

    return *child;
}

static void secondary_detach(BlockDriverState *bs, BdrvChild **child,
                             bool *was_ro)
{
    BlockDriverState *node = child_bs(*child);
    Error *local_err = NULL;

    if (!node) {
        return;
    }

    bdrv_ref(node);

    bdrv_graph_wrlock();
    bdrv_unref_child(bs, *child);
    bdrv_graph_wrunlock();
    *child = NULL;

    /* An overlay that failed to be emptied may have lost its driver */
    if (*was_ro && node->drv &&
        bdrv_reopen_set_read_only(node, true, &local_err) < 0) {
        warn_reportf_err(local_err, "Replication node '%s' leaves '%s' "
                         "writable: ", bdrv_get_node_name(bs),
                         bdrv_get_node_name(node));
    }
    *was_ro = false;

    bdrv_unref(node);
}

/* What is below may be written to all the same: by the primary, the merge */
static void secondary_share_below(BlockDriverState *bs,
                                  BlockDriverState *active, bool share)
{
    BDRVReplicationState *s = bs->opaque;

    bdrv_share_backing(active, share);
    bdrv_share_backing(s->secondary.hidden->bs, share);
}

/* Keep everybody else from writing to the overlays, so that they can be ours */
static bool secondary_own_overlays(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    s->secondary.active = secondary_active(bs);
    bdrv_ref(s->secondary.active);
    error_setg(&s->secondary.active_blocker,
               "node is the active overlay of replication node '%s'",
               bdrv_get_node_name(bs));
    bdrv_op_block_all(s->secondary.active, s->secondary.active_blocker);

    secondary_share_below(bs, s->secondary.active, true);
    return bdrv_child_refresh_perms(bs, s->secondary.hidden, errp) == 0 &&
           bdrv_child_refresh_perms(bs, bs->file, errp) == 0;
}

/* After a merge, they are not below @bs any more */
static void secondary_disown_overlays(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *active = s->secondary.active;

    if (!active) {
        return;
    }

    s->secondary.active = NULL;
    secondary_share_below(bs, active, false);
    bdrv_graph_rdlock_main_loop();
    bdrv_op_unblock_all(active, s->secondary.active_blocker);
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_graph_rdunlock_main_loop();
    error_free(s->secondary.active_blocker);
    s->secondary.active_blocker = NULL;
    bdrv_unref(active);
}

/* Without this, a reopen could take the overlays out of the guest's view */
static bool secondary_freeze(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(!s->secondary.frozen);
    if (bdrv_freeze_backing_chain(bs, secondary_disk(bs), errp) < 0) {
        return false;
    }

    s->secondary.frozen = true;
    return true;
}

static void secondary_unfreeze(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!s->secondary.frozen) {
        return;
    }

    /*
     * Not bdrv_unfreeze_backing_chain(), which would not find the way through
     * an overlay that failed to be emptied and has lost its driver.
     */
    s->secondary.frozen = false;
    bdrv_unfreeze_child(secondary_hidden(bs)->backing);
    bdrv_unfreeze_child(secondary_active(bs)->backing);
    bdrv_unfreeze_child(bs->file);
}

static bool secondary_block_top(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    s->secondary.top = secondary_find_top(bs, errp);
    if (!s->secondary.top) {
        return false;
    }

    bdrv_ref(s->secondary.top);
    error_setg(&s->secondary.top_blocker, "replication node '%s' is running",
               bdrv_get_node_name(bs));
    bdrv_op_block_all(s->secondary.top, s->secondary.top_blocker);
    return true;
}

/* May delete the top node, and with it nodes below that nobody else uses */
static void secondary_unblock_top(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *top = s->secondary.top;

    if (!top) {
        return;
    }

    s->secondary.top = NULL;
    bdrv_graph_rdlock_main_loop();
    bdrv_op_unblock_all(top, s->secondary.top_blocker);
    bdrv_graph_rdunlock_main_loop();
    error_free(s->secondary.top_blocker);
    s->secondary.top_blocker = NULL;
    bdrv_unref(top);
}

static void secondary_backup_done(void *opaque, int ret);

static bool GRAPH_RDLOCK uses_page_cache(BlockDriverState *bs)
{
    BlockDriverState *below;

    while ((below = bdrv_primary_bs(bs))) {
        bs = below;
    }
    return !(bs->open_flags & BDRV_O_NOCACHE);
}

/*
 * Let the host copy a cluster by itself?  It saves a read and a trip to the
 * thread pool.  Not with cache.direct, because the host would copy through the
 * page cache.  So this is also what those set who do not want a file system to
 * share the blocks.
 */
static bool secondary_copies_in_host(BDRVReplicationState *s)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return uses_page_cache(s->secondary.disk->bs) &&
           uses_page_cache(s->secondary.hidden->bs);
}

static bool secondary_start_backup(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *hidden = s->secondary.hidden->bs;
    BlockDriverState *disk = s->secondary.disk->bs;
    BlockDriverState *active, *cbw;
    BackupPerf perf = {
        .use_copy_range = secondary_copies_in_host(s),
        .max_workers = 1,
    };

    s->secondary.backup_job =
        backup_job_create(NULL, disk, hidden, 0, MIRROR_SYNC_MODE_NONE, NULL,
                          BITMAP_SYNC_MODE_NEVER, false, false, NULL, &perf,
                          BLOCKDEV_ON_ERROR_REPORT, BLOCKDEV_ON_ERROR_REPORT,
                          JOB_INTERNAL, secondary_backup_done, bs, NULL, errp);
    if (!s->secondary.backup_job) {
        error_prepend(errp, "failed to begin the backup of secondary disk '%s' "
                      "to hidden overlay '%s': ", bdrv_get_node_name(disk),
                      bdrv_get_node_name(hidden));
        return false;
    }
    job_start(&s->secondary.backup_job->job);
    s->secondary.copied = 0;
    s->secondary.copied_before = 0;

    /* The job has put its filter between the disk and all who write to it */
    bdrv_graph_rdlock_main_loop();
    active = secondary_active(bs);
    bdrv_graph_rdunlock_main_loop();
    cbw = s->secondary.disk->bs;
    s->secondary.guard = replication_guard_insert(cbw, active, bs, errp);
    if (!s->secondary.guard) {
        return false;
    }

    /* Whatever came between would take the primary's writes past the guard */
    bdrv_freeze_child(s->secondary.disk);
    return bdrv_cbw_own_target(cbw, errp);
}

/* What the backup job has copied since start, also after its end */
static uint64_t secondary_copied_bytes(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    uint64_t total;

    if (s->secondary.backup_job) {
        progress_get_snapshot(&s->secondary.backup_job->job.progress,
                              &s->secondary.copied, &total);
    }

    return s->secondary.copied;
}

/* The overlays have nothing */
static void secondary_count_anew(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    s->secondary.copied_before = secondary_copied_bytes(bs);
    stat64_set(&s->secondary.active_bytes, 0);
}

static void secondary_end_backup_job(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    secondary_copied_bytes(bs);
    if (s->secondary.backup_job) {
        s->secondary.ending_backup = true;
        job_cancel_sync(&s->secondary.backup_job->job, true);
        s->secondary.ending_backup = false;
        assert(!s->secondary.backup_job);
    }
}

/* The primary goes on writing to the disk */
static void secondary_end_backup(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    secondary_end_backup_job(bs);
    if (s->secondary.guard) {
        bdrv_unfreeze_child(s->secondary.disk);
        replication_guard_drop(s->secondary.guard);
        s->secondary.guard = NULL;
    }
}

/*
 * The primary has written to the disk for the last time, and the guard sees to
 * it as long as somebody is above it.  The nodes are drained: no write may come
 * after the end of the backup job, which saves what it overwrites.
 */
static bool secondary_fence_off(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *guard = s->secondary.guard;
    BlockDriverState *disk;

    secondary_end_backup_job(bs);
    /* Not when only the merge is tried again */
    if (!guard) {
        return true;
    }

    replication_guard_fence(guard);
    s->secondary.exclusive = true;
    /* Nobody can have the permission that this takes from others */
    secondary_refresh_perms(bs, s->secondary.hidden);

    bdrv_graph_rdlock_main_loop();
    disk = bdrv_filter_bs(guard);
    bdrv_graph_rdunlock_main_loop();
    bdrv_unfreeze_child(s->secondary.disk);
    if (bdrv_replace_child_bs(s->secondary.disk, disk, errp) < 0) {
        /* To be tried again with the failover */
        bdrv_freeze_child(s->secondary.disk);
        return false;
    }
    s->secondary.guard = NULL;
    bdrv_unref(guard);

    return true;
}

/* Make scratch of @node and of what its own data is stored in */
static void GRAPH_RDLOCK
secondary_begin_scratch_node(BlockDriverState *bs, BlockDriverState *node)
{
    BDRVReplicationState *s = bs->opaque;
    BdrvChild *c;

    bdrv_ref(node);
    s->secondary.scratch = g_slist_prepend(s->secondary.scratch, node);
    bdrv_begin_scratch(node);

    QLIST_FOREACH(c, &node->children, next) {
        if (!(c->role & BDRV_CHILD_COW)) {
            secondary_begin_scratch_node(bs, c->bs);
        }
    }
}

/*
 * After a crash of this host the disk has to be resynchronised, and nothing in
 * the overlays is of use.  So nothing has to wait until they are on a disk,
 * least of all that they are emptied.
 */
static void secondary_begin_scratch(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(!s->secondary.scratch);
    secondary_begin_scratch_node(bs, secondary_active(bs));
    secondary_begin_scratch_node(bs, s->secondary.hidden->bs);
}

static void secondary_end_scratch_node(gpointer data)
{
    BlockDriverState *node = data;

    bdrv_end_scratch(node);
    bdrv_unref(node);
}

static void secondary_end_scratch(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    g_slist_free_full(s->secondary.scratch, secondary_end_scratch_node);
    s->secondary.scratch = NULL;
}

/* The way back from every state, complete or half-done */
static void secondary_release(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    if (s->secondary.commit_job) {
        job_cancel_sync(&s->secondary.commit_job->job, true);
        assert(!s->secondary.commit_job);
    }
    secondary_end_backup(bs);
    secondary_end_scratch(bs);
    qatomic_set(&s->secondary.unsettled, false);
    secondary_unfreeze(bs);
    secondary_disown_overlays(bs);
    secondary_detach(bs, &s->secondary.hidden, &s->secondary.hidden_was_ro);
    secondary_detach(bs, &s->secondary.disk, &s->secondary.disk_was_ro);
    secondary_unblock_top(bs);
}

static bool secondary_is_bypassed(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return s->secondary.top && !node_is_below(bs, s->secondary.top);
}

/*
 * The guest may write past the node now, and nobody will know afterwards what.
 * That does not change when the node comes back.
 */
static void secondary_bypassed(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    Error *err = NULL;

    error_setg(&err, "Replication node '%s' was cut off from node '%s' while "
               "it was running: it may lack what the guest has written",
               bdrv_get_node_name(bs), bdrv_get_node_name(s->secondary.top));
    error_append_hint(&err, "The primary has to survive. Stop replication "
                      "without failover, put the node back and start again.\n");
    replication_report_error(bs, REPLICATION_ERROR_REASON_BYPASSED,
                             error_get_pretty(err));
    replication_lose_checkpoint(bs, error_copy(err));
    replication_lose_all(err);
    error_free(err);
}

static void secondary_look_above_bh(void *opaque)
{
    BlockDriverState *bs = opaque;

    bdrv_drained_begin(bs);
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING &&
        secondary_is_bypassed(bs)) {
        secondary_bypassed(bs);
    }
    bdrv_drained_end(bs);
    bdrv_unref(bs);
}

/*
 * Completion of the backup job.  It runs until it is cancelled, and only we and
 * the end of QEMU do that.
 */
static void secondary_backup_done(void *opaque, int ret)
{
    BlockDriverState *bs = opaque;
    BDRVReplicationState *s = bs->opaque;
    Error *err = NULL;

    s->secondary.backup_job = NULL;
    if (s->secondary.ending_backup) {
        return;
    }

    bdrv_ref(bs);
    bdrv_drained_begin(bs);
    if (s->quitting) {
        /* Nothing is wrong, but what we refer to is to be deleted */
        secondary_release(bs);
    } else {
        error_setg(&err, "The backup job of replication node '%s' has ended: "
                   "the checkpoint is lost with the primary's next write",
                   bdrv_get_node_name(bs));
        replication_lose_checkpoint(bs, err);
    }
    bdrv_drained_end(bs);
    bdrv_unref(bs);
}

/* Costs next to nothing if @overlay is empty already, as only it can tell */
static bool GRAPH_RDLOCK
secondary_empty(BlockDriverState *bs, BdrvChild *overlay, const char *what,
                Error **errp)
{
    ERRP_GUARD();

    if (!overlay->bs->drv) {
        error_setg(errp, "The %s '%s' of replication node '%s' is unusable",
                   what, bdrv_get_node_name(overlay->bs),
                   bdrv_get_node_name(bs));
        return false;
    }
    if (bdrv_make_empty(overlay, errp) < 0) {
        error_prepend(errp, "The %s '%s' of replication node '%s': ", what,
                      bdrv_get_node_name(overlay->bs), bdrv_get_node_name(bs));
        return false;
    }

    return true;
}

/* Must not meet a request in flight */
static bool secondary_empty_overlays(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(qatomic_read(&s->secondary.hidden->bs->quiesce_counter) > 0);

    if (!secondary_empty(bs, bs->file, "active overlay", errp) ||
        !secondary_empty(bs, s->secondary.hidden, "hidden overlay", errp)) {
        return false;
    }

    secondary_count_anew(bs);
    return true;
}

/* Set @errp if the disk does not have what the primary wrote */
static bool secondary_in_sync(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *guard = s->secondary.guard;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!guard) {
        return true;
    }
    if (replication_guard_error(guard) < 0) {
        error_setg_errno(errp, -replication_guard_error(guard),
                         "The secondary disk of replication node '%s' is out "
                         "of date and has to be resynchronised: a write of the "
                         "primary failed", bdrv_get_node_name(bs));
    } else {
        return true;
    }

    error_append_hint(errp, "The last checkpoint is intact, and a failover "
                      "goes back to it.\n");
    return false;
}

/* Make the secondary disk as it stands the checkpoint */
static bool secondary_checkpoint(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;

    backup_do_checkpoint(s->secondary.backup_job, errp);

    return !*errp && secondary_empty_overlays(bs, errp);
}

/* Take what it needs to empty the overlays */
static bool secondary_take_overlays(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *hidden;

    bdrv_graph_rdlock_main_loop();
    hidden = secondary_check_overlays(bs, errp) ? secondary_hidden(bs) : NULL;
    bdrv_graph_rdunlock_main_loop();
    if (!hidden) {
        return false;
    }

    return secondary_attach(bs, hidden, "hidden-disk", &s->secondary.hidden,
                            &s->secondary.hidden_was_ro, errp) &&
           secondary_own_overlays(bs, errp);
}

static bool secondary_take(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *disk;

    bdrv_graph_rdlock_main_loop();
    if (!secondary_check_chain(bs, errp)) {
        bdrv_graph_rdunlock_main_loop();
        return false;
    }
    disk = secondary_disk(bs);
    bdrv_graph_rdunlock_main_loop();

    return secondary_attach(bs, disk, "secondary-disk", &s->secondary.disk,
                            &s->secondary.disk_was_ro, errp) &&
           secondary_take_overlays(bs, errp) &&
           secondary_freeze(bs, errp) &&
           secondary_start_backup(bs, errp) &&
           secondary_block_top(bs, errp);
}

static bool secondary_start(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();

    if (!secondary_take(bs, errp)) {
        secondary_release(bs);
        error_prepend(errp, "Cannot start replication node '%s': ",
                      bdrv_get_node_name(bs));
        return false;
    }

    secondary_begin_scratch(bs);
    return true;
}

/* Empty the overlays for good: from now on, a crash leaves them to the guest */
static bool secondary_clear_overlays(BlockDriverState *bs, Error **errp)
{
    int ret;

    secondary_end_scratch(bs);
    if (!secondary_empty_overlays(bs, errp)) {
        return false;
    }

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /* We have no child for the disk if the node was broken */
    ret = secondary_flush(bs, secondary_hidden(bs), secondary_disk(bs));
    if (ret < 0) {
        error_setg_errno(errp, -ret, "The disk of replication node '%s' could "
                         "not be flushed", bdrv_get_node_name(bs));
    }

    return ret == 0;
}

/* Throw away what the overlays have; the disk keeps what the primary wrote */
static bool secondary_stop(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;

    /* A broken node has given back everything */
    if (!s->secondary.hidden && !secondary_take_overlays(bs, errp)) {
        error_prepend(errp, "Cannot stop replication node '%s': ",
                      bdrv_get_node_name(bs));
        return false;
    }

    secondary_end_backup(bs);

    return secondary_clear_overlays(bs, errp);
}

/*
 * Take the permission to write to the disk, or leave the disk to the merge.  If
 * it still lies behind the guard, that refuses all writes.
 */
static void secondary_set_writes_disk(BlockDriverState *bs, bool writes_disk)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->secondary.guard || s->secondary.writes_disk == writes_disk) {
        return;
    }
    s->secondary.writes_disk = writes_disk;
    if (!secondary_refresh_perms(bs, s->secondary.disk)) {
        s->secondary.writes_disk = false;
    }
}

/* The overlays are whole and guard the guest's data until another attempt */
static void secondary_failover_failed(BlockDriverState *bs, Error *err)
{
    BDRVReplicationState *s = bs->opaque;

    replication_report_error(bs, REPLICATION_ERROR_REASON_FAILOVER,
                             error_get_pretty(err));
    replication_set_error(bs, err);
    secondary_freeze(bs, NULL);
    secondary_set_writes_disk(bs, true);
    replication_set_stage(bs, REPLICATION_STAGE_FAILOVER_FAILED);

    /* Otherwise the guest's next write or the end of the merge would do it */
    bdrv_graph_rdlock_main_loop();
    if (qatomic_read(&s->secondary.unsettled) && secondary_flush_all(bs) == 0) {
        qatomic_set(&s->secondary.unsettled, false);
    }
    bdrv_graph_rdunlock_main_loop();
}

/* The commit job has put the disk in the place of the active overlay */
static void secondary_failover_complete(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    /* It is the guest's disk now, and shared only if its device wants it so */
    s->secondary.disk_was_ro = false;
    secondary_release(bs);
    secondary_count_anew(bs);
    replication_set_error(bs, NULL);
    replication_set_stage(bs, REPLICATION_STAGE_DONE);
}

/* See how far the merge has got */
static void secondary_update_progress(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    if (!s->secondary.commit_job) {
        return;
    }
    progress_get_snapshot(&s->secondary.commit_job->job.progress,
                          &s->secondary.merged, &s->secondary.to_merge);
    trace_replication_failover_progress(bs, bdrv_get_node_name(bs),
                                        s->secondary.merged,
                                        s->secondary.to_merge);
}

static void secondary_commit_done(void *opaque, int ret)
{
    BlockDriverState *bs = opaque;
    BDRVReplicationState *s = bs->opaque;
    Error *err = NULL;

    secondary_update_progress(bs);
    s->secondary.failover_end_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    s->secondary.commit_job = NULL;

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

static void secondary_begin_progress(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    s->secondary.has_failed_over = true;
    s->secondary.merged = 0;
    s->secondary.to_merge = 0;
    s->secondary.failover_begin_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    s->secondary.failover_end_ns = 0;
}

static void secondary_get_stats(BlockDriverState *bs,
                                BlockStatsSpecificReplication *stats)
{
    BDRVReplicationState *s = bs->opaque;
    uint64_t copied = secondary_copied_bytes(bs);

    stats->u.secondary = (BlockStatsReplicationSecondary) {
        .copied_bytes   = copied,
        .hidden_bytes   = copied - s->secondary.copied_before,
        .active_bytes   = stat64_get(&s->secondary.active_bytes),
        .disk_complete  = s->stage == REPLICATION_STAGE_DONE,
    };

    if (s->secondary.has_failed_over) {
        int64_t end_ns = s->secondary.failover_end_ns ?:
                         qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

        secondary_update_progress(bs);
        stats->u.secondary.failover = g_new(BlockStatsReplicationFailover, 1);
        *stats->u.secondary.failover = (BlockStatsReplicationFailover) {
            .done       = s->secondary.merged,
            .total      = s->secondary.to_merge,
            .elapsed_ns = end_ns - s->secondary.failover_begin_ns,
        };
    }
}

static bool secondary_start_commit(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *disk = s->secondary.disk->bs;
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
    s->secondary.commit_job =
        commit_active_start(NULL, active, disk, JOB_INTERNAL, 0,
                            BLOCKDEV_ON_ERROR_REPORT, NULL,
                            secondary_commit_done, bs, true, errp);
    return s->secondary.commit_job;
}

static void secondary_quit_timeout(void *opaque)
{
    /* The timer has ended aio_poll(), as it was to do */
}

/* Whether to wait for the merge any longer, which has to be woken for it */
static bool secondary_awaits_merge(BlockDriverState *bs, int64_t end_ns)
{
    BDRVReplicationState *s = bs->opaque;

    if (!s->secondary.commit_job ||
        qemu_clock_get_ns(QEMU_CLOCK_REALTIME) >= end_ns) {
        return false;
    }
    /* The main loop's timers, on which it sleeps, do not run any more */
    job_enter(&s->secondary.commit_job->job);

    return true;
}

/*
 * A merge that quit cancels would leave the disk incomplete, and the overlays
 * are of a host that may never start them again.
 */
static void secondary_finish(BlockDriverState *bs, int64_t quit_ns)
{
    BDRVReplicationState *s = bs->opaque;
    int64_t end_ns = quit_ns + s->secondary.merge_at_quit_ms * SCALE_MS;
    QEMUTimer *timer = aio_timer_new(qemu_get_aio_context(),
                                     QEMU_CLOCK_REALTIME, SCALE_NS,
                                     secondary_quit_timeout, NULL);

    timer_mod(timer, end_ns);
    bdrv_ref(bs);
    AIO_WAIT_WHILE_UNLOCKED(NULL, secondary_awaits_merge(bs, end_ns));
    bdrv_unref(bs);
    timer_free(timer);
}

/*
 * The overlays are scratch no more.  Even if their flushes were not held back,
 * those of the guest have not reached the disk before.
 */
static void secondary_unsettle(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    secondary_end_scratch(bs);
    qatomic_set(&s->secondary.settle_error, 0);
    qatomic_set(&s->secondary.unsettled, true);
}

static void secondary_failover(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;
    bool fenced_off = secondary_fence_off(bs, errp);

    secondary_unblock_top(bs);
    secondary_unfreeze(bs);
    secondary_unsettle(bs);
    secondary_begin_progress(bs);
    if (fenced_off && secondary_start_commit(bs, errp)) {
        replication_set_error(bs, NULL);
        replication_set_stage(bs, REPLICATION_STAGE_FAILOVER);
    } else {
        error_prepend(errp, "The failover of replication node '%s' could not "
                      "start to merge its overlays into the secondary disk: ",
                      bdrv_get_node_name(bs));
        s->secondary.failover_end_ns = s->secondary.failover_begin_ns;
        secondary_failover_failed(bs, error_copy(*errp));
    }
}

static void secondary_get_error(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    if (secondary_in_sync(bs, errp) && s->secondary.guard &&
        replication_guard_is_cut_off(s->secondary.guard)) {
        /*
         * No reason to refuse a checkpoint: the disk has everything up to here,
         * and what the primary writes from now on fails there.  In COLO the
         * memory may be past the last checkpoint already.
         */
        error_setg(errp, "The secondary disk of replication node '%s' is cut "
                   "off from the primary: its export was removed",
                   bdrv_get_node_name(bs));
        error_append_hint(errp, "A failover is possible.\n");
    }
}

static bool secondary_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    const char *top_id = qemu_opt_get(opts, REPLICATION_OPT_TOP_ID);

    if (!top_id) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_TOP_ID "' is missing");
        error_append_hint(errp, "In secondary mode it names the root node "
                          "above this one.\n");
        return false;
    }

    s->secondary.top_id = g_strdup(top_id);
    qemu_co_mutex_init(&s->secondary.split_lock);
    qemu_co_mutex_init(&s->secondary.settle_lock);
    s->secondary.merge_at_quit_ms =
        qemu_opt_get_number(opts, REPLICATION_OPT_MERGE_AT_QUIT,
                            MERGE_AT_QUIT_MS);
    if (s->secondary.merge_at_quit_ms > UINT32_MAX) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_MERGE_AT_QUIT "' is "
                   "too large");
        g_free(s->secondary.top_id);
        return false;
    }

    return true;
}

static void secondary_cleanup(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    g_free(s->secondary.top_id);
}

const ReplicationRole replication_secondary_role = {
    .init               = secondary_init,
    .cleanup            = secondary_cleanup,
    .child_perm         = secondary_child_perm,
    .check_parents      = secondary_check_parents,

    .start              = secondary_start,
    .in_sync            = secondary_in_sync,
    .checkpoint         = secondary_checkpoint,
    .stop               = secondary_stop,
    .failover           = secondary_failover,
    .get_error          = secondary_get_error,
    .get_stats          = secondary_get_stats,
    .release            = secondary_release,
    .finish             = secondary_finish,

    .co_write           = secondary_co_write,
    .co_flush           = secondary_co_flush,
};
