/*
 * Block replication: a failover of a secondary that makes its own overlays
 *
 * It goes on from the last checkpoint, or rolls back to what its disk had
 * before it was brought in step.  The metadata says so first.  Then the
 * overlays are merged, and after that the node is a primary without a replica.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qobject/qdict.h"
#include "system/runstate.h"
#include "replication-standby.h"

/* If it can go back, the disk is going to be this side's: see that it is */
static bool standby_begin_roll_back(BlockDriverState *bs, Error **errp)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (standby_can_roll_back(bs) && bdrv_activate(bs, errp) < 0) {
        return false;
    }
    /* Again, because of what the metadata says, which was read just now */
    if (standby_can_roll_back(bs)) {
        return true;
    }
    error_setg(errp, "Cannot fail over replication node '%s': the primary has "
               "overwritten a part of its disk, and what was there was not "
               "kept", bdrv_get_node_name(bs));
    error_append_hint(errp, "The primary has to survive. Stop replication "
                      "without failover, and bring the disk in step.\n");

    return false;
}

/* What the primary overwrote is going to differ from what it has */
static bool standby_note_saved(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    int64_t size = replication_changes_size(s->standby->changes);
    int64_t offset, bytes;
    int ret;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    for (offset = 0; offset < size; offset += bytes) {
        ret = bdrv_is_allocated(s->hidden->bs, offset, size - offset, &bytes);
        if (ret < 0) {
            error_setg_errno(errp, -ret, "Replication node '%s' cannot tell "
                             "what its hidden overlay has",
                             bdrv_get_node_name(bs));
            return false;
        }
        if (ret) {
            replication_changes_note(s->standby->changes, offset, bytes);
        }
    }

    return true;
}

/*
 * From here on, the metadata says that the disk is a primary's.  Returns 1, or
 * 0 if it may not be that, or a negative errno: then it can be tried again.
 */
static int standby_take_disk(BlockDriverState *bs, bool take_over, Error **errp)
{
    ReplicationStandby *st = standby_state(bs);
    const char *active = replication_overlays_active(st->overlays);
    const char *hidden = replication_overlays_hidden(st->overlays);
    bool runs = replication_stage(bs) == REPLICATION_STAGE_RUNNING;
    int ret;

    /* When a merge is tried again, it says so already */
    if (!st->ledger || replication_ledger_is_open(st->ledger)) {
        return 1;
    }
    if (take_over) {
        return replication_ledger_take_over(st->ledger, active, hidden, errp);
    }
    /* While it ran, the primary has that in its log */
    ret = runs ? replication_ledger_has_started(st->ledger, errp) :
                 standby_note_saved(bs, errp);
    if (ret <= 0) {
        return ret;
    }

    return replication_ledger_go_back(st->ledger, runs, active, hidden, errp);
}

static void standby_go_alone(BlockDriverState *bs, Error **errp)
{
    ReplicationStandby *st = standby_state(bs);

    qatomic_set(&st->unrecorded, false);
    st->mixed = false;
    standby_release(bs);
    secondary_failover(bs, errp);
}

/*
 * Nothing has changed, and it can be tried again.  Until then, nobody may throw
 * away what the guest writes, or come in its way.
 */
static void standby_wait_for_record(BlockDriverState *bs, const Error *err)
{
    ReplicationSecondary *s = secondary_state(bs);

    qatomic_set(&s->standby->unrecorded, true);
    s->standby->mixed = false;
    standby_release(bs);
    replication_guard_fence(s->guard);
    replication_report_error(bs, REPLICATION_ERROR_REASON_METADATA,
                             error_get_pretty(err));
    replication_set_error(bs, error_copy(err));
    replication_set_stage(bs, REPLICATION_STAGE_FAILOVER_FAILED);
}

/* If that cannot be read, the failover fails, and can be tried again */
bool standby_may_take_over(BlockDriverState *bs, Error **errp)
{
    ReplicationLedger *ledger = standby_state(bs)->ledger;
    Error *local_err = NULL;
    int ret = ledger ? replication_ledger_has_started(ledger, &local_err) : 1;

    if (ret == 0) {
        error_propagate(errp, local_err);
        return false;
    }
    error_free(local_err);

    return true;
}

void standby_failover(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();
    bool waits = standby_is_unrecorded(bs);
    bool runs = replication_stage(bs) == REPLICATION_STAGE_RUNNING || waits;
    int ret = standby_begin_roll_back(bs, errp) ?
              standby_take_disk(bs, runs, errp) : 0;

    if (ret > 0) {
        standby_go_alone(bs, errp);
    } else if (waits || (runs && ret < 0)) {
        standby_wait_for_record(bs, *errp);
    } else if (runs || !standby_can_roll_back(bs)) {
        replication_lose_checkpoint(bs, error_copy(*errp));
    } else {
        /* Nothing has changed, and the stage does not tell */
        replication_report_error(bs, REPLICATION_ERROR_REASON_FAILOVER,
                                 error_get_pretty(*errp));
    }
}

/* Before anything of the guest's is thrown away */
static bool standby_may_lose_guest(BlockDriverState *bs, Error **errp)
{
    ReplicationLedger *ledger = standby_state(bs)->ledger;

    if (runstate_check(RUN_STATE_RUNNING)) {
        error_setg(errp, "Cannot throw away what the guest has written to "
                   "replication node '%s' while it runs",
                   bdrv_get_node_name(bs));
        error_append_hint(errp, "Stop the VM, which has to be reset "
                          "afterwards.\n");
        return false;
    }

    return !ledger || replication_ledger_has_started(ledger, errp) > 0;
}

void standby_detach(BlockDriverState *bs, Error **errp)
{
    ERRP_GUARD();

    if (!replication_may(bs, REPLICATION_OP_CHANGE_PEER, errp) ||
        (replication_stage(bs) == REPLICATION_STAGE_RUNNING &&
         !standby_may_lose_guest(bs, errp)) ||
        !standby_begin_roll_back(bs, errp)) {
        return;
    }
    bdrv_drain_all_begin();
    if (secondary_empty_active(bs, errp)) {
        if (standby_state(bs)->changes) {
            standby_forget_changes(bs);
        }
        if (standby_take_disk(bs, false, errp) > 0) {
            standby_go_alone(bs, errp);
        } else if (replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
            error_append_hint(errp, "What the guest has written is thrown "
                              "away. Stop replication with failover.\n");
            standby_wait_for_record(bs, *errp);
        }
    }
    bdrv_drain_all_end();
}

static void coroutine_fn standby_flush_entry(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationStandby *st = standby_state(bs);

    bdrv_graph_co_rdlock();
    secondary_settle(bs, &st->settle_error);
    bdrv_graph_co_rdunlock();
    qatomic_set(&st->is_flushed, true);
    qemu_bh_schedule(st->merge_bh);
    bdrv_dec_in_flight(bs);
}

/*
 * What the merge is going to overwrite must be nowhere else but on a disk then.
 * The guest does not wait for that, unless it flushes.
 */
void standby_prepare_merge(BlockDriverState *bs)
{
    standby_state(bs)->prepares_merge = true;
    qatomic_set(&standby_state(bs)->is_flushed, false);
    bdrv_inc_in_flight(bs);
    aio_co_schedule(bdrv_get_aio_context(bs),
                    qemu_coroutine_create(standby_flush_entry, bs));
}

bool standby_prepares_merge(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);

    return st && st->prepares_merge;
}

void standby_merge_bh(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationStandby *st = standby_state(bs);
    AioContext *ctx = bdrv_get_aio_context(bs);
    Error *err;

    if (standby_is_being_deleted(bs)) {
        return;
    }
    qemu_bh_cancel(st->merge_bh);
    bdrv_ref(bs);
    bdrv_drained_begin(bs);
    st->prepares_merge = false;
    err = g_steal_pointer(&st->settle_error);
    if (!err) {
        secondary_start_commit(bs, &err);
    }
    if (err) {
        error_report("%s", error_get_pretty(err));
        secondary_failover_failed(bs, err);
    }
    bdrv_drained_end(bs);
    /* The filter of the job, which has just come, may have led it away */
    replication_go_back_to(bs, ctx);
    bdrv_unref(bs);
}

void standby_hurry_merge(BlockDriverState *bs)
{
    if (standby_prepares_merge(bs) &&
        qatomic_read(&standby_state(bs)->is_flushed)) {
        standby_merge_bh(bs);
    }
}

static void standby_become_primary(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    BDRVReplicationState *node = bs->opaque;
    ReplicationStandby *st = s->standby;
    WriteBehindOptions queue = st->queue;
    uint64_t timeout_ms = st->timeout_ms;
    uint64_t log_size = st->log_size;
    ReplicationChanges *changes = g_steal_pointer(&st->changes);
    ReplicationLedger *ledger = g_steal_pointer(&st->ledger);
    QDict *options[] = { bs->options, bs->explicit_options };

    standby_free(bs);
    node->mode = REPLICATION_MODE_PRIMARY;
    node->role = &replication_holder_role;
    replication_holder_take_over(bs, &queue, timeout_ms, log_size, changes,
                                 ledger);
    for (int i = 0; i < ARRAY_SIZE(options); i++) {
        qdict_put_str(options[i], REPLICATION_OPT_MODE,
                      ReplicationMode_str(node->mode));
        qdict_put_null(options[i], REPLICATION_OPT_REPLICA);
        qdict_del(options[i], REPLICATION_OPT_REPLICA_NODE_NAME);
        qdict_del(options[i], REPLICATION_OPT_OVERLAY_DIR);
        qdict_del(options[i], REPLICATION_OPT_KEEP_CHECKPOINT);
        qdict_del(options[i], REPLICATION_OPT_MERGE_AT_QUIT);
    }
    bdrv_graph_rdlock_main_loop();
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_graph_rdunlock_main_loop();
}

ReplicationNodeStage standby_merged(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);
    Error *local_err = NULL;
    int ret;

    if (!st) {
        return REPLICATION_STAGE_DONE;
    }

    if (st->ledger) {
        replication_ledger_merged(st->ledger);
    }
    /* What the guest has flushed was safe in the overlays until now */
    bdrv_graph_rdlock_main_loop();
    ret = bdrv_flush(bs->file->bs);
    bdrv_graph_rdunlock_main_loop();
    if (ret < 0) {
        warn_report("Replication node '%s' keeps '%s' and '%s', because its "
                    "disk could not be flushed after their merge: %s",
                    bdrv_get_node_name(bs),
                    replication_overlays_active(st->overlays),
                    replication_overlays_hidden(st->overlays), strerror(-ret));
    } else if (st->ledger &&
               !replication_ledger_forget_overlays(st->ledger, &local_err)) {
        error_append_hint(&local_err, "'%s' and '%s' are kept, and of no more "
                          "use when the guest has written.\n",
                          replication_overlays_active(st->overlays),
                          replication_overlays_hidden(st->overlays));
        warn_report_err(local_err);
    } else {
        replication_overlays_remove(st->overlays);
    }
    if (st->closing) {
        return REPLICATION_STAGE_DONE;
    }
    standby_become_primary(bs);

    return REPLICATION_STAGE_NONE;
}
