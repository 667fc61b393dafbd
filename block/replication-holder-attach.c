/*
 * Block replication: the replica of a primary that holds both disks comes and
 * goes
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "replication-holder.h"

/* If an overlay is all that uses the node, the guest is going to write there */
bool GRAPH_RDLOCK
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
bool GRAPH_RDLOCK
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

bool GRAPH_RDLOCK
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
void GRAPH_RDLOCK holder_parents_changed(BlockDriverState *bs)
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

static void holder_forward_failed(BlockDriverState *bs, WriteBehindType type,
                                  int ret)
{
    holder_lose(bs, write_request_name(type), ret);
}

/* The part of the graph that the timeout is for */
static BlockDriverState *holder_link(void *opaque)
{
    ReplicationHolder *s = holder_state(opaque);

    return s->replica->bs;
}

static void holder_hang_up(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationHolder *s = holder_state(bs);

    holder_lose(bs, "request", -ETIMEDOUT);
    write_behind_abandon(s->queue);
    bdrv_cut_connection(s->replica->bs);
}

/* Before it is attached, which would not say of what that is true */
static bool holder_check_writable(BlockDriverState *bs, BlockDriverState *node,
                                  const char *what, Error **errp)
{
    if (!bdrv_is_read_only(node)) {
        return true;
    }
    error_setg(errp, "%s '%s' of replication node '%s' is read-only", what,
               bdrv_get_node_name(node), bdrv_get_node_name(bs));
    error_append_hint(errp, "Open it, and export it, for writing.\n");

    return false;
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

    return holder_check_writable(bs, replica, "Replica", errp);
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
bool holder_take_replica(BlockDriverState *bs, BdrvChild *replica,
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
                                     holder_hang_up, bs);

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

    return replication_may(bs, REPLICATION_OP_CHANGE_PEER, errp);
}

/* Others may have resized the disk while the node was inactive */
static bool holder_check_length(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t length;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    length = bdrv_getlength(bs->file->bs);
    if (length < 0 || length == replication_changes_size(s->changes)) {
        return true;
    }
    if (!replication_check_room(bs, length, errp)) {
        return false;
    }
    holder_resized(bs, length);

    return true;
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
                   "is not read or written", name);
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

/* Read the metadata of the replica.  The guest goes on meanwhile. */
static bool holder_meet_peer(BlockDriverState *bs,
                             const ReplicaAttachOptions *opts, Error **errp)
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

    return child && replication_ledger_meet(s->ledger, child, errp);
}

/* Find out what to copy.  The node is drained: the guest changes the record. */
static bool holder_judge(BlockDriverState *bs, const ReplicaAttachOptions *opts,
                         ReplicationRuling *ruling, Error **errp)
{
    return !opts->metadata ||
           replication_ledger_judge(holder_state(bs)->ledger,
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
    BdrvChild *child = NULL;
    bool ok;

    if (opts->metadata && !holder_meet_peer(bs, opts, errp)) {
        return false;
    }
    /* Everything: where nodes meet, some are moved to another AioContext */
    bdrv_drain_all_begin();
    if (holder_judge(bs, opts, &ruling, errp)) {
        child = holder_attach_child(bs, opts->replica, "replica",
                                    BDRV_CHILD_DATA, errp);
    }
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

void holder_abandon(BlockDriverState *bs)
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

bool replication_replica_attach(BlockDriverState *bs,
                                const ReplicaAttachOptions *opts, Error **errp)
{
    bool ok;

    GLOBAL_STATE_CODE();

    if (!holder_may_attach(bs, errp)) {
        return false;
    }
    if (!holder_check_length(bs, errp) ||
        !holder_check_attach(bs, opts, errp) ||
        !holder_check_writable(bs, opts->replica, "Replica", errp) ||
        (opts->metadata &&
         !holder_check_writable(bs, opts->metadata, "Replica metadata",
                                errp))) {
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
