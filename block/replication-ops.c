/*
 * Block replication: what the registry asks of a node
 *
 * A table says what each stage of a node allows.  What differs between the two
 * roles is theirs; here is what they have in common, with the errors and the
 * statistics of a node.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/clone-visitor.h"
#include "qapi/qapi-events-block-core.h"
#include "qapi/qapi-visit-block-core.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "system/block-backend.h"
#include "replication-int.h"
#include "trace.h"

static const char *const replication_op_names[] = {
    [REPLICATION_OP_START]      = "start",
    [REPLICATION_OP_CHECKPOINT] = "checkpoint",
    [REPLICATION_OP_STOP]       = "stop",
    [REPLICATION_OP_FAILOVER]   = "fail over",
    [REPLICATION_OP_CHANGE_PEER] = "change the peer of",
};

typedef enum ReplicationVerdict {
    REFUSE,
    ACCEPT,
    /* Succeed without doing anything */
    IGNORE,
    /* Accept in one of the modes */
    PRIMARY,
    SECONDARY,
    /* A primary accepts only if its guest has its data nowhere else */
    LASTLY,
    /* Only a node that can go back to what it had before a start accepts */
    STANDBY,
    /* A secondary accepts whose overlays were given to it */
    GIVEN,
} ReplicationVerdict;

/* What each stage allows, and what to tell the user whom it refuses */
static const struct {
    ReplicationVerdict verdict[REPLICATION_OP__MAX];
    const char *reason;
    const char *hint;
} replication_stages[REPLICATION_STAGE__MAX] = {
    /*
     * start, checkpoint, stop, failover; read, write, resize, inactivate;
     * change the peer
     */
    [REPLICATION_STAGE_NONE] = {
        /* A primary forwards at once, lest a write before start be lost */
        { ACCEPT, REFUSE, REFUSE, STANDBY, REFUSE, PRIMARY, ACCEPT, ACCEPT,
          ACCEPT },
        .reason = "it is not running",
        .hint = "Start replication first.\n",
    },
    [REPLICATION_STAGE_RUNNING] = {
        { REFUSE, ACCEPT, ACCEPT, ACCEPT, ACCEPT, ACCEPT, REFUSE, PRIMARY,
          STANDBY },
        .reason = "it is running already",
        .hint = "Stop replication first.\n",
    },
    [REPLICATION_STAGE_BROKEN] = {
        { REFUSE, REFUSE, ACCEPT, REFUSE, REFUSE, REFUSE, REFUSE, ACCEPT,
          ACCEPT },
        .reason = "its overlays do not stand for one checkpoint any more",
        .hint = "The primary has to survive. Stop replication without "
                "failover, remove the node, resynchronise the disk and start "
                "again with new overlays.\n",
    },
    [REPLICATION_STAGE_STOPPED] = {
        /* The guest of a standby has gone, and its overlay stays empty */
        { ACCEPT, REFUSE, IGNORE, IGNORE, LASTLY, GIVEN, ACCEPT, ACCEPT,
          ACCEPT },
        .reason = "it was stopped",
        .hint = "Start replication first.\n",
    },
    [REPLICATION_STAGE_SYNCING] = {
        { ACCEPT, REFUSE, REFUSE, ACCEPT, REFUSE, REFUSE, REFUSE, REFUSE,
          ACCEPT },
        .reason = "the primary is bringing its disk in step",
        .hint = "Wait until that is synced, and start replication.\n",
    },
    [REPLICATION_STAGE_FAILOVER] = {
        { IGNORE, IGNORE, IGNORE, IGNORE, ACCEPT, ACCEPT, REFUSE, REFUSE,
          REFUSE },
        .reason = "it has failed over, and this host has the only copy",
    },
    [REPLICATION_STAGE_FAILOVER_FAILED] = {
        { REFUSE, REFUSE, REFUSE, ACCEPT, ACCEPT, ACCEPT, REFUSE, REFUSE,
          REFUSE },
        .reason = "its failover has failed",
        .hint = "Remove the cause, then stop replication with failover "
                "again.\n",
    },
    [REPLICATION_STAGE_DONE] = {
        { IGNORE, IGNORE, IGNORE, IGNORE, SECONDARY, SECONDARY, ACCEPT, ACCEPT,
          REFUSE },
        .reason = "it has failed over, and this host has the only copy",
    },
};

static BlockDriverState *GRAPH_RDLOCK replication_root(BlockDriverState *bs)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        if (c->klass->parent_is_bds) {
            return replication_root(c->opaque);
        }
    }

    return bs;
}

/* How a user calls the device of @bs: as -drive does, or by its ID or path */
static char *GRAPH_RDLOCK replication_device(BlockDriverState *bs)
{
    BlockBackend *blk = NULL;
    char *id;

    while ((blk = blk_all_next(blk))) {
        if (blk_bs(blk) != bs) {
            continue;
        }
        id = *blk_name(blk) ? g_strdup(blk_name(blk)) :
                              blk_get_attached_dev_id(blk);
        if (*id) {
            return id;
        }
        g_free(id);
    }

    return NULL;
}

/*
 * Errors are reported from any thread, where nobody can look at the graph.  And
 * who takes a running node out of it wants to be told where it was.
 */
void replication_update_place(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    BlockDriverState *root = replication_root(bs);

    GLOBAL_STATE_CODE();

    if (s->stage == REPLICATION_STAGE_RUNNING) {
        return;
    }

    QEMU_LOCK_GUARD(&s->error_lock);
    g_free(s->top_node);
    g_free(s->device);
    s->top_node = root == bs ? NULL : g_strdup(bdrv_get_node_name(root));
    s->device = replication_device(root);
}

void replication_set_stage(BlockDriverState *bs, ReplicationNodeStage stage)
{
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();
    assert(qatomic_read(&bs->quiesce_counter) > 0);

    if (stage == s->stage) {
        return;
    }
    /* A device may have come since, which changes nothing in the graph */
    bdrv_graph_rdlock_main_loop();
    replication_update_place(bs);
    bdrv_graph_rdunlock_main_loop();
    qatomic_set(&s->stage, stage);
    s->stage_time_ns = replication_time_ns();
    trace_replication_stage(bs, bdrv_get_node_name(bs),
                            ReplicationNodeStage_str(stage));

    QEMU_LOCK_GUARD(&s->error_lock);
    qapi_event_send_replication_stage_change(bdrv_get_node_name(bs),
                                             s->top_node, s->device, stage);
}

void replication_report_error(BlockDriverState *bs,
                              ReplicationErrorReason reason, const char *text)
{
    BDRVReplicationState *s = bs->opaque;

    IO_CODE();

    /* The end of QEMU removes all exports, and so may who has failed over */
    if (reason == REPLICATION_ERROR_REASON_CUT_OFF &&
        (s->quitting ||
         replication_stage(bs) != REPLICATION_STAGE_RUNNING)) {
        return;
    }

    trace_replication_error(bs, bdrv_get_node_name(bs),
                            ReplicationErrorReason_str(reason), text);

    QEMU_LOCK_GUARD(&s->error_lock);
    qapi_event_send_replication_error(bdrv_get_node_name(bs), s->top_node,
                                      s->device, reason, text);
    if (!s->first_error) {
        s->first_error = g_new(BlockStatsReplicationError, 1);
        *s->first_error = (BlockStatsReplicationError) {
            .reason     = reason,
            .error      = g_strdup(text),
            .time_ns    = replication_time_ns(),
        };
    }
}

static BlockStatsReplicationCause *replication_cause(const char *text,
                                                     int64_t time_ns)
{
    BlockStatsReplicationCause *cause = g_new0(BlockStatsReplicationCause, 1);

    cause->text = g_strdup(text);
    cause->has_time_ns = time_ns > 0;
    cause->time_ns = time_ns;

    return cause;
}

void replication_report_replica(BlockDriverState *bs, ReplicaState state,
                                const char *error)
{
    BDRVReplicationState *s = bs->opaque;

    IO_CODE();

    QEMU_LOCK_GUARD(&s->error_lock);
    s->replica_time_ns = replication_time_ns();
    if (state == REPLICA_STATE_SYNCED) {
        g_clear_pointer(&s->replica_lost, qapi_free_BlockStatsReplicationCause);
    } else if (state == REPLICA_STATE_LOST) {
        qapi_free_BlockStatsReplicationCause(s->replica_lost);
        s->replica_lost = replication_cause(error, s->replica_time_ns);
    }
    qapi_event_send_replication_replica_change(bdrv_get_node_name(bs),
                                               s->top_node, s->device, state,
                                               error);
}

void replication_forget_first_error(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->error_lock);
    g_clear_pointer(&s->first_error, qapi_free_BlockStatsReplicationError);
}

void replication_set_error(BlockDriverState *bs, Error *err)
{
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    error_free(s->error);
    s->error = err;
}

void replication_release(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->release) {
        s->role->release(bs);
    }
}

/*
 * The guest's view is gone, and only the primary is left.  Nothing is kept that
 * could stand in its way: a hidden overlay that failed would fail its writes.
 */
void replication_lose_checkpoint(BlockDriverState *bs, Error *err)
{
    replication_set_error(bs, err);
    replication_release(bs);
    replication_set_stage(bs, REPLICATION_STAGE_BROKEN);
}

bool replication_allows(BlockDriverState *bs, ReplicationOp op)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->holds_disk &&
        (op == REPLICATION_OP_READ || op == REPLICATION_OP_WRITE)) {
        return true;
    }

    switch (replication_stages[replication_stage(bs)].verdict[op]) {
    case ACCEPT:
        return true;
    case PRIMARY:
        return s->mode == REPLICATION_MODE_PRIMARY;
    case SECONDARY:
        return s->mode == REPLICATION_MODE_SECONDARY;
    case LASTLY:
        return s->mode == REPLICATION_MODE_SECONDARY ||
               qatomic_read(&s->relied_on);
    case STANDBY:
        return s->role->is_standby;
    case GIVEN:
        return s->mode == REPLICATION_MODE_SECONDARY && !s->role->is_standby;
    default:
        return false;
    }
}

bool replication_may(BlockDriverState *bs, ReplicationOp op, Error **errp)
{
    ReplicationNodeStage stage = replication_stage(bs);
    ReplicationVerdict verdict = replication_stages[stage].verdict[op];
    bool allowed = replication_allows(bs, op);

    if (!allowed && (verdict == REFUSE || verdict == STANDBY)) {
        error_setg(errp, "Cannot %s replication node '%s': %s",
                   replication_op_names[op], bdrv_get_node_name(bs),
                   replication_stages[stage].reason);
        error_append_hint(errp, "%s", replication_stages[stage].hint);
    }

    return allowed;
}

bool replication_check_active(BlockDriverState *bs, ReplicationOp op,
                              Error **errp)
{
    if (!bdrv_is_inactive(bs)) {
        return true;
    }
    error_setg(errp, "Cannot %s replication node '%s': it is inactive",
               replication_op_names[op], bdrv_get_node_name(bs));
    error_append_hint(errp, "Wait for the migration to end, or activate it "
                      "with blockdev-set-active.\n");

    return false;
}

/*
 * Around everything of the registry that may change the stage: @bs, which it
 * has drained, outlives the operation even if that drops the last node above
 * it.  Returns what to give to replication_op_end().
 */
static AioContext *replication_op_begin(BlockDriverState *bs)
{
    assert(qatomic_read(&bs->quiesce_counter) > 0);
    bdrv_ref(bs);

    return bdrv_get_aio_context(bs);
}

void replication_go_back_to(BlockDriverState *bs, AioContext *ctx)
{
    /* This may drain all nodes, also where there is nothing to be moved */
    if (bdrv_get_aio_context(bs) != ctx) {
        bdrv_try_change_aio_context(bs, ctx, NULL, NULL);
    }
}

static void replication_op_end(BlockDriverState *bs, AioContext *ctx)
{
    replication_go_back_to(bs, ctx);
    bdrv_unref(bs);
}

static bool replication_check_mode(BlockDriverState *bs, ReplicationMode mode,
                                   Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    if (mode != s->mode) {
        error_setg(errp, "Cannot start replication node '%s' as %s: "
                   "it was opened as %s", bdrv_get_node_name(bs),
                   ReplicationMode_str(mode), ReplicationMode_str(s->mode));
        return false;
    }

    return true;
}

static bool replication_do_checkpoint(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    /* Without it, all there is to do is that what was written has arrived */
    if (s->role->checkpoint && !s->role->checkpoint(bs, errp)) {
        return false;
    }
    if (s->role->checkpointed) {
        s->role->checkpointed(bs);
    }
    s->checkpoint_time_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    return true;
}

static void replication_start(ReplicationState *rs, ReplicationMode mode,
                              Error **errp)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    AioContext *ctx;

    GLOBAL_STATE_CODE();

    trace_replication_start(bs, bdrv_get_node_name(bs),
                            ReplicationMode_str(mode));
    ctx = replication_op_begin(bs);
    if (replication_may(bs, REPLICATION_OP_START, errp) &&
        replication_check_mode(bs, mode, errp) && s->role->start(bs, errp)) {
        replication_set_error(bs, NULL);
        replication_forget_first_error(bs);
        s->undo_stage = s->stage;
        replication_set_stage(bs, REPLICATION_STAGE_RUNNING);
    }
    replication_op_end(bs, ctx);
}

/* A failure is undone as that of a start is, unlike those of later ones */
static void replication_first_checkpoint(ReplicationState *rs, Error **errp)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    AioContext *ctx;

    GLOBAL_STATE_CODE();

    ctx = replication_op_begin(bs);
    /* A node that has failed over did not start */
    if (s->stage == REPLICATION_STAGE_RUNNING) {
        s->undo_stage = REPLICATION_STAGE_NONE;
        replication_do_checkpoint(bs, errp);
    }
    replication_op_end(bs, ctx);
}

static void replication_undo_start(ReplicationState *rs)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    AioContext *ctx;

    GLOBAL_STATE_CODE();

    ctx = replication_op_begin(bs);
    if (s->stage == REPLICATION_STAGE_RUNNING) {
        replication_release(bs);
        replication_set_stage(bs, s->undo_stage);
    }
    replication_op_end(bs, ctx);
}

static void replication_abandon(ReplicationState *rs)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    if (s->role->abandon && replication_allows(bs, REPLICATION_OP_FAILOVER)) {
        s->role->abandon(bs);
    }
}

static void replication_end_in_peace(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;

    if (s->role->stop && !s->role->stop(bs, errp)) {
        replication_lose_checkpoint(bs, error_copy(*errp));
        return;
    }
    replication_release(bs);
    replication_set_error(bs, NULL);
    replication_set_stage(bs, REPLICATION_STAGE_STOPPED);
}

/*
 * Part of a failover may be to remove the export before it, and to give up a
 * replica that has not failed as far as we know.
 */
static void replication_expect_end(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->error_lock);

    if (s->first_error &&
        s->first_error->reason == REPLICATION_ERROR_REASON_CUT_OFF) {
        g_clear_pointer(&s->first_error, qapi_free_BlockStatsReplicationError);
    }
    if (s->role->holds_disk && !s->replica_lost) {
        s->replica_lost = replication_cause("it was given up by a failover",
                                            replication_time_ns());
    }
}

static void replication_go_on_alone(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    replication_expect_end(bs);
    if (s->role->failover) {
        s->role->failover(bs, errp);
    } else {
        replication_set_stage(bs, REPLICATION_STAGE_DONE);
    }
}

static void replication_stop(ReplicationState *rs, bool failover, Error **errp)
{
    BlockDriverState *bs = rs->opaque;
    AioContext *ctx;
    ReplicationOp op = failover ? REPLICATION_OP_FAILOVER : REPLICATION_OP_STOP;

    GLOBAL_STATE_CODE();

    trace_replication_stop(bs, bdrv_get_node_name(bs), failover);
    ctx = replication_op_begin(bs);
    if (replication_may(bs, op, errp)) {
        if (failover) {
            replication_go_on_alone(bs, errp);
        } else {
            replication_end_in_peace(bs, errp);
        }
    }
    replication_op_end(bs, ctx);
}

static void replication_check(ReplicationState *rs, Error **errp)
{
    ERRP_GUARD();
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    if (replication_may(bs, REPLICATION_OP_CHECKPOINT, errp)) {
        s->role->in_sync(bs, errp);
    }
    s->failed_checkpoints += *errp != NULL;
}

/* The node is in sync, and nobody has written to it since that was checked */
static void replication_checkpoint(ReplicationState *rs, Error **errp)
{
    ERRP_GUARD();
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    AioContext *ctx;
    bool done;

    GLOBAL_STATE_CODE();

    ctx = replication_op_begin(bs);
    if (replication_may(bs, REPLICATION_OP_CHECKPOINT, errp)) {
        trace_replication_checkpoint_begin(bs, bdrv_get_node_name(bs));
        done = replication_do_checkpoint(bs, errp);
        if (!done) {
            replication_report_error(bs, REPLICATION_ERROR_REASON_CHECKPOINT,
                                     error_get_pretty(*errp));
            replication_lose_checkpoint(bs, error_copy(*errp));
        }
        s->checkpoints += done;
        s->failed_checkpoints += !done;
        s->last_checkpoint_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) -
                                rs->checkpoint_ns;
        s->longest_checkpoint_ns = MAX(s->longest_checkpoint_ns,
                                       s->last_checkpoint_ns);
        trace_replication_checkpoint_end(bs, bdrv_get_node_name(bs), done,
                                         s->last_checkpoint_ns);
    }
    replication_op_end(bs, ctx);
}

static void replication_check_failover(ReplicationState *rs, Error **errp)
{
    ERRP_GUARD();
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    AioContext *ctx;

    GLOBAL_STATE_CODE();

    ctx = replication_op_begin(bs);
    if (s->stage == REPLICATION_STAGE_BROKEN) {
        error_propagate(errp, error_copy(s->error));
    } else if (s->stage == REPLICATION_STAGE_RUNNING &&
               s->role->may_take_over && !s->role->may_take_over(bs, errp)) {
        replication_lose_checkpoint(bs, error_copy(*errp));
    }
    replication_op_end(bs, ctx);
}

/* A primary has its own disk, and no checkpoint to lose */
static void replication_lose(ReplicationState *rs, const Error *reason)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;
    Error *err = NULL;
    AioContext *ctx;

    GLOBAL_STATE_CODE();

    ctx = replication_op_begin(bs);
    if (s->stage == REPLICATION_STAGE_RUNNING && s->role->checkpoint) {
        error_setg(&err, "Replication node '%s' does not stand for the same "
                   "checkpoint as the VM's other disks: %s",
                   bdrv_get_node_name(bs), error_get_pretty(reason));
        replication_report_error(bs, REPLICATION_ERROR_REASON_CHECKPOINT,
                                 error_get_pretty(err));
        replication_lose_checkpoint(bs, err);
    }
    replication_op_end(bs, ctx);
}

static void replication_quit(ReplicationState *rs)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    s->quitting = true;
}

static void replication_finish(ReplicationState *rs, int64_t quit_ns)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    if (s->role->finish) {
        s->role->finish(bs, quit_ns);
    }
}

static void replication_get_error(ReplicationState *rs, Error **errp)
{
    BlockDriverState *bs = rs->opaque;
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    if (s->stage == REPLICATION_STAGE_NONE ||
        s->stage == REPLICATION_STAGE_SYNCING) {
        error_setg(errp, "Replication node '%s' is not running",
                   bdrv_get_node_name(bs));
    } else if (s->error) {
        error_propagate(errp, error_copy(s->error));
    } else {
        s->role->get_error(bs, errp);
    }
}

/* Whether @bs takes itself out of the graph when its job ends */
static bool replication_is_job_filter(BlockDriverState *bs)
{
    return bs->never_freeze ||
           (bs->drv && bs->drv->is_filter && !bdrv_op_blocker_is_empty(bs));
}

GSList *replication_freeze_below(BlockDriverState *bs, GSList *frozen)
{
    BdrvChild *c;

    GLOBAL_STATE_CODE();

    QLIST_FOREACH(c, &bs->children, next) {
        if (replication_is_job_filter(c->bs)) {
            continue;
        }
        if (!c->frozen) {
            bdrv_freeze_child(c);
            frozen = g_slist_prepend(frozen, c);
        }
        frozen = replication_freeze_below(c->bs, frozen);
    }

    return frozen;
}

static void replication_unfreeze(gpointer data)
{
    bdrv_unfreeze_child(data);
}

void replication_unfreeze_below(GSList *frozen)
{
    GLOBAL_STATE_CODE();

    g_slist_free_full(frozen, replication_unfreeze);
}

ReplicationOps replication_ops = {
    .start      = replication_start,
    .undo_start = replication_undo_start,
    .stop       = replication_stop,
    .check      = replication_check,
    .checkpoint = replication_checkpoint,
    .first_checkpoint = replication_first_checkpoint,
    .check_failover = replication_check_failover,
    .lose       = replication_lose,
    .abandon    = replication_abandon,
    .get_error  = replication_get_error,
    .quit       = replication_quit,
    .finish     = replication_finish,
};

/* The node has a disk of its own, and replication does not run */
static BlockStatsReplicationCause *
replication_why_replica(BlockDriverState *bs, ReplicaState state)
{
    BDRVReplicationState *s = bs->opaque;
    g_autofree char *text = NULL;

    switch (state) {
    case REPLICA_STATE_SYNCED:
        return replication_cause("its replica is in step, but replication is "
                                 "not running", s->stage_time_ns);
    case REPLICA_STATE_SYNCING:
        return replication_cause("its replica is being brought in step",
                                 s->replica_time_ns);
    default:
        break;
    }
    if (!s->replica_lost) {
        return replication_cause("it has no replica", s->replica_time_ns ?:
                                                      s->stage_time_ns);
    }
    text = g_strdup_printf("its replica was lost: %s", s->replica_lost->text);

    return replication_cause(text, s->replica_lost->time_ns);
}

/* Why a node that runs does not protect its disk, or NULL if it does */
static BlockStatsReplicationCause *replication_why_error(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    BlockStatsReplicationError *first = s->first_error;
    BlockStatsReplicationCause *cause = NULL;
    Error *err = NULL;

    s->role->get_error(bs, &err);
    if (err) {
        cause = replication_cause(error_get_pretty(err),
                                  first ? first->time_ns : 0);
        error_free(err);
    } else if (first) {
        cause = replication_cause(first->error, first->time_ns);
    } else if (qatomic_read(&s->relied_on)) {
        cause = replication_cause("the local disk has failed, and only the "
                                  "secondary has all data", 0);
    }

    return cause;
}

static BlockStatsReplicationCause *
replication_why_unprotected(BlockDriverState *bs,
                            BlockStatsSpecificReplication *stats)
{
    BDRVReplicationState *s = bs->opaque;

    QEMU_LOCK_GUARD(&s->error_lock);

    if (s->stage == REPLICATION_STAGE_RUNNING) {
        return replication_why_error(bs);
    }
    if (s->error) {
        return replication_cause(error_get_pretty(s->error), s->stage_time_ns);
    }
    if (s->role->holds_disk) {
        return replication_why_replica(bs, stats->u.primary.replica_state);
    }

    return replication_cause(replication_stages[s->stage].reason,
                             s->stage_time_ns);
}

BlockStatsSpecific *replication_get_specific_stats(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    BlockStatsSpecific *specific = g_new0(BlockStatsSpecific, 1);
    BlockStatsSpecificReplication *stats = &specific->u.replication;

    GLOBAL_STATE_CODE();

    specific->driver = BLOCKDEV_DRIVER_REPLICATION;
    *stats = (BlockStatsSpecificReplication) {
        .mode                   = s->mode,
        .stage                  = s->stage,
        .checkpoints            = s->checkpoints,
        .failed_checkpoints     = s->failed_checkpoints,
        .last_checkpoint_ns     = s->last_checkpoint_ns,
        .longest_checkpoint_ns  = s->longest_checkpoint_ns,
    };
    s->role->get_stats(bs, stats);
    stats->unprotected = replication_why_unprotected(bs, stats);
    stats->protects = !stats->unprotected;
    if (s->checkpoint_time_ns) {
        stats->has_checkpoint_age_ns = true;
        stats->checkpoint_age_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME) -
                                   s->checkpoint_time_ns;
    }
    WITH_QEMU_LOCK_GUARD(&s->error_lock) {
        stats->error = QAPI_CLONE(BlockStatsReplicationError, s->first_error);
        stats->top_node = g_strdup(s->top_node);
        stats->device = g_strdup(s->device);
        if (s->role->holds_disk) {
            stats->u.primary.replica_lost =
                QAPI_CLONE(BlockStatsReplicationCause, s->replica_lost);
        }
    }

    return specific;
}
