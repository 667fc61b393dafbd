/*
 * Block replication: what a secondary takes to run, and gives back
 *
 * The overlays and the disk below the active one become children of the node:
 * they stay, and stay as long as they are, and nobody else writes to the
 * overlays.  The links between them are frozen, and the guest's root node is
 * blocked.  The backup job and the guard come between the disk and all who
 * write to it, and the overlays become scratch.
 *
 * Each is taken or not, and secondary_release() gives back what there is.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "system/block-backend.h"
#include "block/block-copy.h"
#include "copy-before-write.h"
#include "replication-secondary.h"

/* What we need of the nodes below the active overlay, and leave to others */
static void secondary_own_child_perm(BlockDriverState *bs, BdrvChild *c,
                                     uint64_t *nperm, uint64_t *nshared)
{
    ReplicationSecondary *s = secondary_state(bs);

    /* Everybody else in the chain may go on, as long as the lengths stay */
    *nshared = BLK_PERM_ALL & ~BLK_PERM_RESIZE;

    if (c && c == s->hidden) {
        /* It is emptied */
        *nperm = BLK_PERM_WRITE_UNCHANGED;
        if (s->exclusive) {
            *nshared &= ~BLK_PERM_WRITE;
        }
    } else if (c && c == s->disk) {
        *nperm = 0;
        if (s->writes_disk) {
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

void secondary_child_perm(BlockDriverState *bs, BdrvChild *c,
                          BdrvChildRole role, BlockReopenQueue *reopen_queue,
                          uint64_t perm, uint64_t shared,
                          uint64_t *nperm, uint64_t *nshared)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (!(role & BDRV_CHILD_FILTERED)) {
        secondary_own_child_perm(bs, c, nperm, nshared);
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);

    /*
     * The overlays pass on to the nodes below what we share here, and there the
     * primary writes to the disk.  See secondary_claim_overlays() for while we
     * run.
     */
    if (s->active) {
        if (!(bs->open_flags & BDRV_O_INACTIVE)) {
            *nperm |= BLK_PERM_WRITE;
        }
        *nshared &= ~(BLK_PERM_WRITE | BLK_PERM_RESIZE);
    } else if (!s->exclusive) {
        *nshared |= BLK_PERM_WRITE;
    }
}

/* With less than before, this succeeds */
bool secondary_refresh_perms(BlockDriverState *bs, BdrvChild *child)
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

/* Whether what is written to @top gets to @bs: not through an overlay */
bool GRAPH_RDLOCK
secondary_is_below(BlockDriverState *bs, BlockDriverState *top)
{
    BdrvChild *c;

    if (bs == top) {
        return true;
    }
    QLIST_FOREACH(c, &top->children, next) {
        if (!(c->role & BDRV_CHILD_COW) && secondary_is_below(bs, c->bs)) {
            return true;
        }
    }

    return false;
}

static GRAPH_RDLOCK BlockDriverState *
secondary_find_top(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    const char *top_id = s->top_id;
    BlockDriverState *top = bdrv_lookup_bs(top_id, top_id, NULL);

    if (!top) {
        error_setg(errp, "top-id '%s' is neither a device nor a node", top_id);
    } else if (!bdrv_is_root_node(top)) {
        error_setg(errp, "node '%s', which top-id names, is not a root node",
                   top_id);
        error_append_hint(errp, "Name the node that the guest's device "
                          "uses.\n");
    } else if (!secondary_is_below(bs, top)) {
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

/* Of @node, which we write to.  The child may get filters below it. */
static void secondary_forbid_snapshots(BlockDriverState *bs,
                                       BlockDriverState *node)
{
    ReplicationSecondary *s = secondary_state(bs);

    bdrv_ref(node);
    s->written = g_slist_prepend(s->written, node);
    bdrv_op_block(node, BLOCK_OP_TYPE_INTERNAL_SNAPSHOT, s->writes_blocker);
}

static void secondary_allow_snapshots(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    for (GSList *l = s->written; l; l = l->next) {
        bdrv_op_unblock(l->data, BLOCK_OP_TYPE_INTERNAL_SNAPSHOT,
                        s->writes_blocker);
        bdrv_unref(l->data);
    }
    g_slist_free(s->written);
    s->written = NULL;
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
        secondary_forbid_snapshots(bs, node);
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
    ReplicationSecondary *s = secondary_state(bs);

    bdrv_share_backing(active, share);
    bdrv_share_backing(s->hidden->bs, share);
}

/* Keep everybody else from writing to the overlays, so that they can be ours */
static bool secondary_claim_overlays(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    s->active = secondary_active(bs);
    bdrv_ref(s->active);
    error_setg(&s->active_blocker,
               "node is the active overlay of replication node '%s'",
               bdrv_get_node_name(bs));
    bdrv_op_block_all(s->active, s->active_blocker);

    secondary_share_below(bs, s->active, true);
    return bdrv_child_refresh_perms(bs, s->hidden, errp) == 0 &&
           bdrv_child_refresh_perms(bs, bs->file, errp) == 0;
}

/* After a merge, they are not below @bs any more */
static void secondary_unclaim_overlays(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *active = s->active;

    if (!active) {
        return;
    }

    s->active = NULL;
    secondary_share_below(bs, active, false);
    bdrv_graph_rdlock_main_loop();
    bdrv_op_unblock_all(active, s->active_blocker);
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_graph_rdunlock_main_loop();
    error_free(s->active_blocker);
    s->active_blocker = NULL;
    bdrv_unref(active);
}

/* Without this, a reopen could take the overlays out of the guest's view */
bool secondary_freeze(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(!s->frozen);
    if (bdrv_freeze_backing_chain(bs, secondary_disk(bs), errp) < 0) {
        return false;
    }

    s->frozen = true;
    s->frozen_below = replication_freeze_below(secondary_active(bs), NULL);
    return true;
}

static void secondary_unfreeze(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!s->frozen) {
        return;
    }

    /*
     * Not bdrv_unfreeze_backing_chain(), which would not find the way through
     * an overlay that failed to be emptied and has lost its driver.
     */
    s->frozen = false;
    bdrv_unfreeze_child(secondary_hidden(bs)->backing);
    bdrv_unfreeze_child(secondary_active(bs)->backing);
    bdrv_unfreeze_child(bs->file);
    replication_unfreeze_below(g_steal_pointer(&s->frozen_below));
}

static bool secondary_block_top(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    s->top = secondary_find_top(bs, errp);
    if (!s->top) {
        return false;
    }

    bdrv_ref(s->top);
    error_setg(&s->top_blocker, "replication node '%s' is running",
               bdrv_get_node_name(bs));
    bdrv_op_block_all(s->top, s->top_blocker);
    s->above = replication_above_update(replication_above_new(), bs);
    return true;
}

/* May delete the top node, and with it nodes below that nobody else uses */
static void secondary_unblock_top(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *top = s->top;

    if (!top) {
        return;
    }

    s->top = NULL;
    replication_above_free(g_steal_pointer(&s->above));
    bdrv_graph_rdlock_main_loop();
    bdrv_op_unblock_all(top, s->top_blocker);
    bdrv_graph_rdunlock_main_loop();
    error_free(s->top_blocker);
    s->top_blocker = NULL;
    bdrv_unref(top);
}

uint64_t secondary_copied_bytes(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    uint64_t total;

    if (s->backup_job) {
        progress_get_snapshot(&s->backup_job->job.progress, &s->copied,
                              &total);
    } else if (s->cbw) {
        progress_get_snapshot(&s->progress, &s->copied, &total);
    }

    return s->copied;
}

void secondary_count_write(BlockDriverState *bs, const WriteRequest *w)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (w->type != WRITE_BEHIND_DISCARD) {
        stat64_add(&s->active_bytes, w->bytes);
    }
}

void secondary_count_anew(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    s->copied_before = secondary_copied_bytes(bs);
    stat64_set(&s->active_bytes, 0);
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

    s->secondary->backup_job = NULL;
    if (s->secondary->ending_backup) {
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

bool secondary_uses_page_cache(BlockDriverState *bs)
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
static bool secondary_copies_in_host(ReplicationSecondary *s)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return secondary_uses_page_cache(s->disk->bs) &&
           secondary_uses_page_cache(s->hidden->bs);
}

/* The job, with which users of the disk are known to it, puts a filter there */
static bool secondary_start_job(BlockDriverState *bs, BlockDriverState *disk,
                                BlockDriverState *hidden, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BackupPerf perf = {
        .use_copy_range = secondary_copies_in_host(s),
        .max_workers = 1,
    };

    s->backup_job =
        backup_job_create(NULL, disk, hidden, 0, MIRROR_SYNC_MODE_NONE, NULL,
                          BITMAP_SYNC_MODE_NEVER, false, false, NULL, &perf,
                          BLOCKDEV_ON_ERROR_REPORT, BLOCKDEV_ON_ERROR_REPORT,
                          JOB_INTERNAL, secondary_backup_done, bs, NULL, errp);
    if (s->backup_job) {
        job_start(&s->backup_job->job);
    }

    return s->backup_job;
}

static bool secondary_insert_cbw(BlockDriverState *bs, BlockDriverState *disk,
                                 BlockDriverState *hidden, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockCopyState *bcs;

    s->cbw = bdrv_cbw_append(disk, hidden, NULL, false, true, 0, &bcs, errp);
    if (s->cbw) {
        block_copy_set_copy_opts(bcs, secondary_copies_in_host(s), false);
        block_copy_set_progress_meter(bcs, &s->progress);
    }

    return s->cbw;
}

static bool secondary_start_backup(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *hidden = s->hidden->bs;
    BlockDriverState *disk = s->disk->bs;
    BlockDriverState *active, *cbw;

    if (!(s->standby ? secondary_insert_cbw(bs, disk, hidden, errp) :
                       secondary_start_job(bs, disk, hidden, errp))) {
        error_prepend(errp, "failed to begin the backup of secondary disk '%s' "
                      "to hidden overlay '%s': ", bdrv_get_node_name(disk),
                      bdrv_get_node_name(hidden));
        return false;
    }
    s->copied = 0;
    s->copied_before = 0;

    /* There is a filter now between the disk and all who write to it */
    bdrv_graph_rdlock_main_loop();
    active = secondary_active(bs);
    bdrv_graph_rdunlock_main_loop();
    cbw = s->disk->bs;
    s->guard = replication_guard_insert(cbw, active, bs, s->guard_name, errp);
    if (!s->guard) {
        return false;
    }

    /* Whatever came between would take the primary's writes past the guard */
    bdrv_freeze_child(s->disk);
    return bdrv_cbw_own_target(cbw, errp);
}

static void secondary_end_backup_job(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    secondary_copied_bytes(bs);
    if (s->backup_job) {
        s->ending_backup = true;
        job_cancel_sync(&s->backup_job->job, true);
        s->ending_backup = false;
        assert(!s->backup_job);
    }
    if (s->cbw) {
        bdrv_cbw_drop(g_steal_pointer(&s->cbw));
    }
}

void secondary_end_backup(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    secondary_end_backup_job(bs);
    if (s->guard) {
        bdrv_unfreeze_child(s->disk);
        replication_guard_drop(s->guard);
        s->guard = NULL;
    }
}

/*
 * The primary has written to the disk for the last time, and the guard sees to
 * it as long as somebody is above it.  The nodes are drained: no write may come
 * after the end of the backup job, which saves what it overwrites.
 */
static bool secondary_fence_off(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *guard = s->guard;
    BlockDriverState *disk;

    secondary_end_backup_job(bs);
    /* Not when only the merge is tried again */
    if (!guard) {
        return true;
    }

    replication_guard_fence(guard);
    s->exclusive = true;
    /* Nobody can have the permission that this takes from others */
    secondary_refresh_perms(bs, s->hidden);

    bdrv_graph_rdlock_main_loop();
    disk = bdrv_filter_bs(guard);
    bdrv_graph_rdunlock_main_loop();
    bdrv_unfreeze_child(s->disk);
    if (bdrv_replace_child_bs(s->disk, disk, errp) < 0) {
        /* To be tried again with the failover */
        bdrv_freeze_child(s->disk);
        return false;
    }
    s->guard = NULL;
    bdrv_unref(guard);

    return true;
}

/* Make scratch of @node and of what its own data is stored in */
static void GRAPH_RDLOCK
secondary_begin_scratch_node(BlockDriverState *bs, BlockDriverState *node)
{
    ReplicationSecondary *s = secondary_state(bs);
    BdrvChild *c;

    bdrv_ref(node);
    s->scratch = g_slist_prepend(s->scratch, node);
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
void secondary_begin_scratch(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(!s->scratch);
    secondary_begin_scratch_node(bs, secondary_active(bs));
    secondary_begin_scratch_node(bs, s->hidden->bs);
}

static void secondary_end_scratch_node(gpointer data)
{
    BlockDriverState *node = data;

    bdrv_end_scratch(node);
    bdrv_unref(node);
}

void secondary_end_scratch(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    g_slist_free_full(s->scratch, secondary_end_scratch_node);
    s->scratch = NULL;
}

void secondary_release(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    GLOBAL_STATE_CODE();

    if (s->commit_job) {
        job_cancel_sync(&s->commit_job->job, true);
        assert(!s->commit_job);
    }
    secondary_end_backup(bs);
    secondary_end_scratch(bs);
    qatomic_set(&s->unsettled, false);
    secondary_unfreeze(bs);
    secondary_unclaim_overlays(bs);
    secondary_allow_snapshots(bs);
    secondary_detach(bs, &s->hidden, &s->hidden_was_ro);
    secondary_detach(bs, &s->disk, &s->disk_was_ro);
    secondary_unblock_top(bs);
}

/*
 * Give back what is of use only while there is a primary.  Even if the primary
 * cannot be kept out, and this fails, the rest is done.
 */
bool secondary_part_from_primary(BlockDriverState *bs, Error **errp)
{
    bool fenced_off = secondary_fence_off(bs, errp);

    secondary_unblock_top(bs);
    secondary_unfreeze(bs);
    secondary_end_scratch(bs);

    return fenced_off;
}

static bool secondary_own_overlays(BlockDriverState *bs,
                                   BlockDriverState *hidden, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);

    return secondary_attach(bs, hidden, "hidden-disk", &s->hidden,
                            &s->hidden_was_ro, errp) &&
           secondary_claim_overlays(bs, errp);
}

bool secondary_take_overlays(BlockDriverState *bs, Error **errp)
{
    BlockDriverState *hidden;

    bdrv_graph_rdlock_main_loop();
    hidden = secondary_check_overlays(bs, errp) ? secondary_hidden(bs) : NULL;
    bdrv_graph_rdunlock_main_loop();
    if (!hidden) {
        return false;
    }

    return secondary_own_overlays(bs, hidden, errp);
}

bool secondary_take_chain(BlockDriverState *bs, BlockDriverState *disk,
                          Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *hidden;

    bdrv_graph_rdlock_main_loop();
    hidden = secondary_hidden(bs);
    bdrv_graph_rdunlock_main_loop();

    return secondary_attach(bs, disk, "secondary-disk", &s->disk,
                            &s->disk_was_ro, errp) &&
           secondary_own_overlays(bs, hidden, errp) &&
           secondary_freeze(bs, errp) &&
           secondary_start_backup(bs, errp);
}

static bool secondary_take(BlockDriverState *bs, Error **errp)
{
    BlockDriverState *disk;

    bdrv_graph_rdlock_main_loop();
    if (!secondary_check_chain(bs, errp)) {
        bdrv_graph_rdunlock_main_loop();
        return false;
    }
    disk = secondary_disk(bs);
    bdrv_graph_rdunlock_main_loop();

    return secondary_take_chain(bs, disk, errp) &&
           secondary_block_top(bs, errp);
}

bool secondary_start(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();

    if (!secondary_take(bs, errp)) {
        secondary_release(bs);
        error_prepend(errp, "Cannot start replication node '%s': ",
                      bdrv_get_node_name(bs));
        return false;
    }

    qatomic_set(&secondary_state(bs)->left_behind, false);
    secondary_begin_scratch(bs);
    return true;
}
