/*
 * Block replication: the secondary side
 *
 * The node's child is the active overlay, over the hidden overlay, over the
 * secondary disk.  The primary writes to the secondary disk; a backup job saves
 * what it overwrites to the hidden overlay, so that the guest, which writes to
 * the active overlay, sees the last checkpoint and its own writes.  A
 * checkpoint empties both overlays.
 *
 * This is what the node does while it runs.  What it takes for that is in
 * replication-secondary-take.c, and what a failover makes of it in
 * replication-secondary-merge.c.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "block/block_backup.h"
#include "copy-before-write.h"
#include "replication-secondary.h"

/*
 * For how long QEMU's end waits for a merge by default.  Managers kill a QEMU
 * that has not ended in 10 s (libvirt) or later.
 */
#define MERGE_AT_QUIT_MS 5000

/* A merge has begun, and has not succeeded */
static bool secondary_is_merging(BlockDriverState *bs)
{
    ReplicationNodeStage stage = replication_stage(bs);

    return stage == REPLICATION_STAGE_FAILOVER ||
           (stage == REPLICATION_STAGE_FAILOVER_FAILED &&
            !standby_is_unrecorded(bs));
}

int coroutine_fn secondary_co_write(BlockDriverState *bs, const WriteRequest *w)
{
    if (!replication_allows(bs, REPLICATION_OP_WRITE)) {
        return -EIO;
    }

    if (secondary_is_merging(bs)) {
        return secondary_merge_co_write(bs, w);
    }

    /* When the node has failed over, its child is the disk */
    if (replication_stage(bs) != REPLICATION_STAGE_DONE) {
        secondary_count_write(bs, w);
    }
    return write_request_co_do(bs->file, w);
}

int coroutine_fn secondary_co_flush(BlockDriverState *bs)
{
    if (secondary_is_merging(bs)) {
        return secondary_merge_co_flush(bs);
    }

    return bdrv_co_flush(bs->file->bs);
}

static bool secondary_is_bypassed(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return s->top && !secondary_is_below(bs, s->top);
}

/*
 * The guest may write past the node now, and nobody will know afterwards what.
 * That does not change when the node comes back.
 */
void secondary_bypassed(BlockDriverState *bs, const char *node)
{
    Error *err = NULL;

    error_setg(&err, "Replication node '%s' was cut off from node '%s' while "
               "it was running: it may lack what the guest has written",
               bdrv_get_node_name(bs), node);
    error_append_hint(&err, "The primary has to survive. Stop replication "
                      "without failover, put the node back and start again.\n");
    replication_report_error(bs, REPLICATION_ERROR_REASON_BYPASSED,
                             error_get_pretty(err));
    replication_lose_checkpoint(bs, error_copy(err));
    replication_lose_all(err);
    error_free(err);
}

/* The guest's device must not go to a node that is not above this one */
bool secondary_refuse_to_lose_guest(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    g_autofree char *lost = replication_above_bypass(s->above, bs);

    if (!lost) {
        return true;
    }

    error_setg(errp, "Replication node '%s' is running and cannot be cut off "
               "from node '%s' above it", bdrv_get_node_name(bs), lost);
    error_append_hint(errp, "Stop replication first.\n");
    return false;
}

/* Who has come meanwhile must not get lost either */
void secondary_parents_changed(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (s->above) {
        s->above = replication_above_update(s->above, bs);
    }
}

static void secondary_look_above_bh(void *opaque)
{
    BlockDriverState *bs = opaque;

    bdrv_drained_begin(bs);
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING &&
        secondary_is_bypassed(bs)) {
        secondary_bypassed(bs, bdrv_get_node_name(secondary_state(bs)->top));
    }
    bdrv_drained_end(bs);
    bdrv_unref(bs);
}

/*
 * An overlay above a node that runs would keep the guest's writes away from it,
 * and checkpoints would not empty it.  So would a change that takes the node
 * out of the graph, but who removes a link does not ask.  What has come of it
 * shows when the graph lock is dropped, which runs bottom halves.
 */
static bool GRAPH_RDLOCK
secondary_check_parents(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *top = s->top;

    if (!top) {
        return true;
    }
    if (secondary_is_below(bs, top)) {
        return !errp || secondary_refuse_to_lose_guest(bs, errp);
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
    ReplicationSecondary *s = secondary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    assert(qatomic_read(&s->hidden->bs->quiesce_counter) > 0);

    if (!secondary_empty(bs, bs->file, "active overlay", errp) ||
        !secondary_empty(bs, s->hidden, "hidden overlay", errp)) {
        return false;
    }

    secondary_count_anew(bs);
    return true;
}

/* Set @errp if the disk does not have what the primary wrote */
bool secondary_in_sync(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    int ret = s->guard ? replication_guard_error(s->guard) : 0;

    if (qatomic_read(&s->left_behind)) {
        error_setg(errp, "Replication node '%s' was left behind by a node "
                   "above it: it lacks what the guest has written",
                   bdrv_get_node_name(bs));
        error_append_hint(errp, "The primary has to survive. Have no other "
                          "child beside this one.\n");
        return false;
    }
    if (ret == 0) {
        return true;
    }

    error_setg_errno(errp, -ret, "The secondary disk of replication node '%s' "
                     "is out of date and has to be resynchronised: a write of "
                     "the primary failed", bdrv_get_node_name(bs));
    error_append_hint(errp, "The last checkpoint is intact, and a failover "
                      "goes back to it.\n");
    return false;
}

/* Make the secondary disk as it stands the checkpoint */
bool secondary_checkpoint(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    ReplicationSecondary *s = secondary_state(bs);
    bool done;

    if (s->cbw) {
        bdrv_cbw_restart(s->cbw);
    } else {
        backup_do_checkpoint(s->backup_job, errp);
    }
    done = !*errp && secondary_empty_overlays(bs, errp);
    standby_checkpointed(bs, done);

    return done;
}

bool secondary_empty_active(BlockDriverState *bs, Error **errp)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return secondary_empty(bs, bs->file, "active overlay", errp);
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
    ReplicationSecondary *s = secondary_state(bs);

    /* A broken node has given back everything */
    if (!s->hidden && !secondary_take_overlays(bs, errp)) {
        error_prepend(errp, "Cannot stop replication node '%s': ",
                      bdrv_get_node_name(bs));
        return false;
    }

    secondary_end_backup(bs);

    return secondary_clear_overlays(bs, errp);
}

/*
 * A write of the guest failed here, and was done in another place.  In any
 * thread, where nobody can ask for more than to be remembered.
 */
void secondary_left_behind(BlockDriverState *bs, int ret)
{
    ReplicationSecondary *s = secondary_state(bs);

    IO_CODE();

    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        qatomic_set(&s->left_behind, true);
    }
}

void secondary_get_error(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);

    if (secondary_in_sync(bs, errp) && s->guard &&
        replication_guard_is_cut_off(s->guard)) {
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

void secondary_get_stats(BlockDriverState *bs,
                         BlockStatsSpecificReplication *stats)
{
    ReplicationSecondary *s = secondary_state(bs);
    uint64_t copied = secondary_copied_bytes(bs);

    stats->u.secondary = (BlockStatsReplicationSecondary) {
        .copied_bytes   = copied,
        .hidden_bytes   = copied - s->copied_before,
        .active_bytes   = stat64_get(&s->active_bytes),
        .disk_complete  = replication_stage(bs) == REPLICATION_STAGE_DONE,
    };
    secondary_merge_get_stats(bs, &stats->u.secondary);
}

void secondary_free(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    g_free(s->secondary->top_id);
    g_free(s->secondary->guard_name);
    error_free(s->secondary->writes_blocker);
    g_free(s->secondary);
}

bool secondary_new(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    s->secondary = g_new0(ReplicationSecondary, 1);
    qemu_co_mutex_init(&s->secondary->split_lock);
    qemu_co_mutex_init(&s->secondary->settle_lock);
    s->secondary->merge_at_quit_ms =
        qemu_opt_get_number(opts, REPLICATION_OPT_MERGE_AT_QUIT,
                            MERGE_AT_QUIT_MS);
    if (s->secondary->merge_at_quit_ms > UINT32_MAX) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_MERGE_AT_QUIT "' is "
                   "too large");
        secondary_free(bs);
        return false;
    }
    error_setg(&s->secondary->writes_blocker,
               "node is written to by replication node '%s'",
               bdrv_get_node_name(bs));

    return true;
}

static bool secondary_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    const char *top_id = qemu_opt_get(opts, REPLICATION_OPT_TOP_ID);

    if (!top_id) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_TOP_ID "' is missing");
        error_append_hint(errp, "In secondary mode it names the root node "
                          "above this one. A secondary with '"
                          REPLICATION_OPT_REPLICA_NODE_NAME "' makes its own "
                          "overlays, and does without.\n");
        return false;
    }
    if (!*top_id) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_TOP_ID "' is empty");
        error_append_hint(errp, "It is the root node, which the guest's device "
                          "uses.\n");
        return false;
    }
    if (!strcmp(top_id, bdrv_get_node_name(bs))) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_TOP_ID "' names "
                   "replication node '%s' itself", top_id);
        error_append_hint(errp, "It is the root node above, or the drive that "
                          "uses this one.\n");
        return false;
    }

    if (!secondary_new(bs, opts, errp)) {
        return false;
    }
    secondary_state(bs)->top_id = g_strdup(top_id);

    return true;
}

const ReplicationRole replication_secondary_role = {
    .init               = secondary_init,
    .cleanup            = secondary_free,
    .child_perm         = secondary_child_perm,
    .check_parents      = secondary_check_parents,
    .parents_changed    = secondary_parents_changed,

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
    .left_behind        = secondary_left_behind,
};
