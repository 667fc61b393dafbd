/*
 * Block replication: a secondary that makes its own overlays
 *
 * It is opened with the disk alone.  Active and hidden are files of its own,
 * and all that another secondary takes when it is started is taken at once.  So
 * what the primary overwrites to bring the disk in step is saved, too, and a
 * failover meanwhile rolls back to what the disk had.  When the merge of a
 * failover has ended, the node is a primary without a replica.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "system/runstate.h"
#include "copy-before-write.h"
#include "replication-standby.h"

bool standby_is_unrecorded(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);

    return st && qatomic_read(&st->unrecorded);
}

/* Whether a failover would give a whole disk */
bool standby_can_roll_back(BlockDriverState *bs)
{
    return replication_stage(bs) != REPLICATION_STAGE_BROKEN &&
           !qatomic_read(&standby_state(bs)->overwritten);
}

bool standby_saves_nothing(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);

    if (!st || replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        return false;
    }

    return replication_stage(bs) == REPLICATION_STAGE_BROKEN ||
           !qatomic_read(&st->saves);
}

bool standby_primary_writes(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);

    if (!st || replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        return false;
    }
    if (replication_stage(bs) != REPLICATION_STAGE_SYNCING) {
        qemu_bh_schedule(st->bh);
    }
    if (standby_saves_nothing(bs)) {
        qatomic_set(&st->overwritten, true);
        return false;
    }

    return true;
}

bool coroutine_fn standby_co_is_announced(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);
    const ReplicationRecords *r;

    if (!st || !st->meta || qatomic_read(&st->announced)) {
        return true;
    }

    QEMU_LOCK_GUARD(&st->announce_lock);

    /* The own record as well: after a stop, the announcement is over */
    if (!st->has_records ||
        replication_meta_load(st->meta, replication_changes_size(st->changes),
                              NULL) < 0) {
        return false;
    }
    r = replication_meta_records(st->meta);
    if (replication_records_has_peer(r) &&
        qemu_uuid_is_equal(&r->peer.instance, &r->own.instance)) {
        qatomic_set(&st->announced, true);
    }

    return qatomic_read(&st->announced);
}

bool coroutine_mixed_fn standby_open_records(BlockDriverState *bs, Error **errp)
{
    ReplicationStandby *st = standby_state(bs);
    const ReplicationRecords *r;
    ReplicationOwnRecord own;
    int64_t size;

    if (!st || !st->meta || st->has_records) {
        return true;
    }
    size = replication_changes_size(st->changes);
    if (replication_meta_load(st->meta, size, errp) < 0) {
        return false;
    }
    r = replication_meta_records(st->meta);
    if (r->own_status > REPLICATION_RECORD_VALID ||
        r->peer_status > REPLICATION_RECORD_VALID) {
        error_setg(errp, "The metadata of replication node '%s' is damaged, or "
                   "of a newer version", bdrv_get_node_name(bs));
        error_append_hint(errp, "If a primary is to copy all of its disk, "
                          "overwrite it with zeroes.\n");
        return false;
    }

    /* A mixture was so before we came, and nobody wants it back */
    if (replication_records_has_peer(r) ||
        r->own.state != REPLICATION_META_STATE_OK) {
        qatomic_set(&st->overwritten, true);
        qatomic_set(&st->saves, false);
    } else if (replication_records_is_fresh(r)) {
        qatomic_set(&st->saves, false);
    }
    own = replication_records_open(r, REPLICATION_META_ROLE_SECONDARY, size);
    st->has_records = replication_meta_write_own(st->meta, &own, errp) == 0;

    return st->has_records;
}

void standby_give_up_saving(BlockDriverState *bs, int ret)
{
    ReplicationStandby *st = standby_state(bs);

    qatomic_set(&st->overwritten, true);
    if (qatomic_xchg(&st->saves, false)) {
        warn_report("Replication node '%s' does not keep what its disk had "
                    "before the primary brings it in step: %s",
                    bdrv_get_node_name(bs), strerror(-ret));
        qemu_bh_schedule(st->bh);
    }
}

static void standby_bh(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationSecondary *s = secondary_state(bs);
    BlockDriverState *hidden;
    ReplicationNodeStage stage;

    if (standby_is_being_deleted(bs)) {
        return;
    }
    hidden = s->hidden->bs;
    bdrv_ref(bs);
    bdrv_ref(hidden);
    /* And all above, which are the primary and this node */
    bdrv_drained_begin(hidden);
    stage = replication_stage(bs);
    if (stage == REPLICATION_STAGE_NONE || stage == REPLICATION_STAGE_STOPPED) {
        /* The first write of the primary has come */
        replication_set_stage(bs, REPLICATION_STAGE_SYNCING);
    }
    if (stage == REPLICATION_STAGE_RUNNING && standby_state(bs)->bypassed) {
        secondary_bypassed(bs, standby_state(bs)->bypassed);
    }
    if (replication_stage(bs) == REPLICATION_STAGE_SYNCING &&
        qatomic_read(&standby_state(bs)->overwritten) &&
        !(bs->open_flags & BDRV_O_INACTIVE)) {
        /* Room is scarce where it was, and if this fails, nothing is lost */
        bdrv_graph_rdlock_main_loop();
        bdrv_make_empty(s->hidden, NULL);
        bdrv_graph_rdunlock_main_loop();
    }
    bdrv_drained_end(hidden);
    bdrv_unref(hidden);
    bdrv_unref(bs);
}

/* What is current, and what was closing */
void standby_forget_changes(BlockDriverState *bs)
{
    for (int i = 0; i < 2; i++) {
        replication_changes_checkpoint(standby_state(bs)->changes, true);
        replication_changes_tidy(standby_state(bs)->changes);
    }
}

void standby_checkpointed(BlockDriverState *bs, bool done)
{
    ReplicationStandby *st = standby_state(bs);

    if (!st) {
        return;
    }
    qatomic_set(&st->overwritten, !done);
    qatomic_set(&st->saves, done && st->keep_checkpoint);
    if (st->changes) {
        standby_forget_changes(bs);
    }
}

/* If the node is inactive, the records are read when the guard is active */
static bool standby_open_metadata(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationSecondary *s = secondary_state(bs);
    ReplicationStandby *st = s->standby;
    BlockDriverState *metadata;
    BdrvChild *child;
    int64_t length;

    if (!node->meta) {
        return true;
    }
    bdrv_graph_rdlock_main_loop();
    metadata = replication_meta_child(node->meta)->bs;
    length = bdrv_getlength(s->guard);
    bdrv_graph_rdunlock_main_loop();
    if (!replication_check_room(bs, length, errp)) {
        return false;
    }
    child = replication_guard_attach_metadata(s->guard, metadata, errp);
    if (!child) {
        return false;
    }
    st->changes = replication_changes_new(length);
    st->ledger = replication_ledger_new(bs, node->meta, st->changes,
                                        st->log_size, st->timeout_ms);
    st->meta = replication_meta_new(bs, child);

    return (bs->open_flags & BDRV_O_INACTIVE) ||
           standby_open_records(bs, errp);
}

/* Not that of a -drive without a device: nobody writes through it */
static bool GRAPH_RDLOCK standby_is_writer(BdrvChild *parent)
{
    BlockBackend *blk = NULL;

    while ((blk = blk_all_next(blk)) && blk != parent->opaque) {
        /* Look at the next one */
    }

    return (parent->perm & BLK_PERM_WRITE) &&
           !(blk && *blk_name(blk) && !blk_get_attached_dev(blk));
}

/*
 * Who uses the disk already would be taken for the primary, and be kept out
 * when the node has gone
 */
static bool GRAPH_RDLOCK standby_refuse_writers(BlockDriverState *bs,
                                                BlockDriverState *disk,
                                                Error **errp)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &disk->parents, next_parent) {
        if (c->opaque != bs && standby_is_writer(c)) {
            g_autofree char *user = c->klass->get_parent_desc(c);

            error_setg(errp, "The disk '%s' of replication node '%s' is "
                       "written to by %s", bdrv_get_node_name(disk),
                       bdrv_get_node_name(bs), user);
            error_append_hint(errp, "Have the guest use '%s', and export the "
                              "node that '" REPLICATION_OPT_REPLICA_NODE_NAME
                              "' names.\n", bdrv_get_node_name(bs));
            return false;
        }
    }

    return true;
}

static bool standby_opened(BlockDriverState *bs, QDict *options, Error **errp)
{
    BlockDriverState *disk, *active;
    BdrvChild *file;
    bool is_free;
    int ret;

    bdrv_graph_rdlock_main_loop();
    file = bs->file;
    disk = file->bs;
    bdrv_graph_rdunlock_main_loop();

    if (bdrv_is_read_only(bs) || bdrv_is_read_only(disk)) {
        error_setg(errp, "Replication node '%s' or its disk '%s' is read-only, "
                   "and the primary writes there", bdrv_get_node_name(bs),
                   bdrv_get_node_name(disk));
        error_append_hint(errp, "Open both with read-only=off.\n");
        return false;
    }
    bdrv_graph_rdlock_main_loop();
    is_free = standby_refuse_writers(bs, disk, errp);
    bdrv_graph_rdunlock_main_loop();
    if (!is_free) {
        return false;
    }
    active = replication_overlays_make(standby_state(bs)->overlays, disk, errp);
    if (!active) {
        return false;
    }
    ret = bdrv_replace_child_bs(file, active, errp);
    bdrv_unref(active);

    if (ret < 0 || !secondary_take_chain(bs, disk, errp)) {
        return false;
    }
    secondary_begin_scratch(bs);

    return standby_open_metadata(bs, errp);
}

/* As in stage RUNNING of any secondary, but there is no node that is named */
static bool GRAPH_RDLOCK standby_check_parents(BlockDriverState *bs,
                                               Error **errp)
{
    return !secondary_state(bs)->above || !errp ||
           secondary_refuse_to_lose_guest(bs, errp);
}

/* What could not be refused shows when the graph lock is dropped */
static void GRAPH_RDLOCK standby_parents_changed(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    g_autofree char *node = NULL;

    if (s->above) {
        node = replication_above_bypass(s->above, bs);
    }
    /* If that node is being deleted, most likely so are we */
    if (node && bdrv_find_node(node) && !s->standby->bypassed) {
        s->standby->bypassed = g_steal_pointer(&node);
        qemu_bh_schedule(s->standby->bh);
    }
    secondary_parents_changed(bs);
}

int coroutine_mixed_fn standby_keep_overlays(BlockDriverState *bs, Error **errp)
{
    ReplicationStandby *st = standby_state(bs);

    return st ? replication_overlays_keep(st->overlays, errp) : 0;
}

void standby_free(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    ReplicationStandby *st = s->standby;

    replication_overlays_free(st->overlays);
    qemu_bh_delete(st->bh);
    qemu_bh_delete(st->merge_bh);
    progress_destroy(&s->progress);
    replication_meta_free(st->meta);
    replication_ledger_free(st->ledger);
    replication_changes_free(st->changes);
    error_free(st->settle_error);
    g_free(st->bypassed);
    g_free(st);
    secondary_free(bs);
}

static bool standby_start(BlockDriverState *bs, Error **errp)
{
    ReplicationSecondary *s = secondary_state(bs);
    ReplicationAbove *above = replication_above_new();
    g_autofree char *bypass = NULL;
    ReplicationStandby *st = s->standby;
    bool active;

    bdrv_graph_rdlock_main_loop();
    active = replication_check_active(bs, REPLICATION_OP_START, errp);
    above = replication_above_update(above, bs);
    bypass = replication_above_bypass(above, bs);
    bdrv_graph_rdunlock_main_loop();

    if (!active) {
        goto fail;
    }
    if (bypass) {
        error_setg(errp, "Cannot start replication node '%s': what is written "
                   "to an overlay of node '%s' does not come to it",
                   bdrv_get_node_name(bs), bypass);
        error_append_hint(errp, "Commit the overlay.\n");
        goto fail;
    }
    if (!replication_guard_watch(s->guard)) {
        error_setg(errp, "Cannot start replication node '%s': nobody can write "
                   "to its node '%s'", bdrv_get_node_name(bs),
                   bdrv_get_node_name(s->guard));
        error_append_hint(errp, "Export that to the primary first, for example "
                          "with block-export-add.\n");
        goto fail;
    }
    s->above = above;
    st->mixed = replication_stage(bs) == REPLICATION_STAGE_SYNCING ||
                qatomic_read(&st->overwritten);
    g_clear_pointer(&st->bypassed, g_free);
    qatomic_set(&s->left_behind, false);

    return true;

fail:
    replication_above_free(above);
    return false;
}

/* Whether the overlays may be the only ones that have the last checkpoint */
static bool standby_may_have_started(BlockDriverState *bs)
{
    ReplicationLedger *ledger = standby_state(bs)->ledger;

    return replication_stage(bs) == REPLICATION_STAGE_RUNNING &&
           (!ledger || replication_ledger_has_started(ledger, NULL) != 0);
}

/* What start has taken; the rest stays until the node is closed or promoted */
void standby_release(BlockDriverState *bs)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationSecondary *s = secondary_state(bs);

    /* A start that is undone: its checkpoint, if it came to that, was none */
    if (s->standby->mixed && node->undo_stage == REPLICATION_STAGE_NONE &&
        !(standby_is_being_deleted(bs) && standby_may_have_started(bs))) {
        standby_checkpointed(bs, false);
    }

    if (s->above) {
        replication_above_free(g_steal_pointer(&s->above));
        replication_guard_unwatch(s->guard);
    }
}

static bool standby_flush_disk(BlockDriverState *bs, Error **errp)
{
    int ret;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    ret = bdrv_flush(secondary_state(bs)->guard);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "The disk of replication node '%s' could "
                         "not be flushed", bdrv_get_node_name(bs));
    }

    return ret == 0;
}

/* The disk is what the primary has written, and the next sync may come */
static bool standby_stop(BlockDriverState *bs, Error **errp)
{
    ReplicationStandby *st = standby_state(bs);
    bool active, whole;

    bdrv_graph_rdlock_main_loop();
    active = replication_check_active(bs, REPLICATION_OP_STOP, errp);
    bdrv_graph_rdunlock_main_loop();
    if (!active) {
        return false;
    }

    whole = replication_stage(bs) == REPLICATION_STAGE_RUNNING &&
            secondary_in_sync(bs, NULL) &&
            (!st->ledger ||
             replication_ledger_has_started(st->ledger, NULL) > 0);
    st->mixed = false;
    if (!secondary_checkpoint(bs, errp) || !standby_flush_disk(bs, errp)) {
        return false;
    }
    if (!whole) {
        /* It lacks some of that, and is no disk to go back to */
        standby_checkpointed(bs, false);
        return true;
    }
    if (st->ledger && !replication_ledger_stopped(st->ledger, errp)) {
        return false;
    }
    qatomic_set(&st->announced, false);

    return true;
}

/* Note what the guest is going to change, and from a failover on in the log */
static int coroutine_fn GRAPH_RDLOCK
standby_co_log(BlockDriverState *bs, const WriteRequest *w)
{
    ReplicationStandby *st = standby_state(bs);

    if (!st->changes || !w->bytes) {
        return 0;
    }
    replication_changes_note(st->changes, w->offset, w->bytes);
    if (!replication_ledger_is_open(st->ledger)) {
        return 0;
    }

    return replication_ledger_co_begin(st->ledger, w->offset, w->bytes, true);
}

static int coroutine_fn GRAPH_RDLOCK
standby_co_write(BlockDriverState *bs, const WriteRequest *w)
{
    int ret;

    if (w->flags & BDRV_REQ_FUA && standby_is_unrecorded(bs)) {
        return -EIO;
    }
    if (replication_allows(bs, REPLICATION_OP_WRITE)) {
        ret = standby_co_log(bs, w);
        if (ret < 0) {
            return ret;
        }
    }

    return secondary_co_write(bs, w);
}

/* What is flushed must be there after a crash */
static int coroutine_fn GRAPH_RDLOCK standby_co_flush(BlockDriverState *bs)
{
    return standby_is_unrecorded(bs) ? -EIO : secondary_co_flush(bs);
}

static bool standby_may_resize(BlockDriverState *bs, int64_t length,
                               Error **errp)
{
    error_setg(errp, "Cannot resize the disk of replication node '%s', which "
               "has overlays of its length", bdrv_get_node_name(bs));
    error_append_hint(errp, "Remove the node, resize the disk on both sides, "
                      "and add the node again.\n");

    return false;
}

static void standby_get_stats(BlockDriverState *bs,
                              BlockStatsSpecificReplication *stats)
{
    secondary_get_stats(bs, stats);
    stats->u.secondary.has_rollback_available = true;
    stats->u.secondary.rollback_available = standby_can_roll_back(bs);
}

/* Whether the overlays have what nobody else may have */
static bool standby_is_worth_keeping(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);

    switch (replication_stage(bs)) {
    case REPLICATION_STAGE_RUNNING:
    case REPLICATION_STAGE_SYNCING:
        return standby_can_roll_back(bs) &&
               (secondary_copied_bytes(bs) > s->copied_before ||
                stat64_get(&s->active_bytes));
    case REPLICATION_STAGE_FAILOVER:
    case REPLICATION_STAGE_FAILOVER_FAILED:
        return true;
    default:
        return false;
    }
}

/* Somebody closes the node, or it could not be opened */
static void standby_cleanup(BlockDriverState *bs)
{
    ReplicationSecondary *s = secondary_state(bs);
    ReplicationStandby *st = s->standby;
    bool keep = standby_is_worth_keeping(bs);
    Error *local_err = NULL;

    st->closing = true;
    if (keep && replication_overlays_keep(st->overlays, &local_err) < 0) {
        error_append_hint(&local_err, "Rename it before the disk is opened "
                          "again, which would overwrite it.\n");
        warn_report_err(local_err);
    }
    if (s->guard) {
        /* It stays as long as the primary is there */
        bdrv_drained_begin(s->guard);
        replication_guard_fence(s->guard);
        bdrv_drained_end(s->guard);
    }
    secondary_release(bs);
    if (keep || replication_overlays_are_kept(st->overlays)) {
        replication_overlays_leave(st->overlays);
    } else {
        replication_overlays_remove(st->overlays);
    }
    standby_free(bs);
}

static bool standby_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    const char *name = qemu_opt_get(opts, REPLICATION_OPT_REPLICA_NODE_NAME);
    ReplicationStandby options = {};
    ReplicationSecondary *s;

    if (qemu_opt_get(opts, REPLICATION_OPT_TOP_ID)) {
        error_setg(errp, "Parameters '" REPLICATION_OPT_TOP_ID "' and '"
                   REPLICATION_OPT_REPLICA_NODE_NAME "' exclude each other");
        return false;
    }
    if (!replication_primary_get_opts(opts, &options.queue,
                                      &options.timeout_ms, errp) ||
        !secondary_new(bs, opts, errp)) {
        return false;
    }

    s = secondary_state(bs);
    options.log_size = replication_holder_get_log_size(opts);
    options.keep_checkpoint =
        qemu_opt_get_bool(opts, REPLICATION_OPT_KEEP_CHECKPOINT, true);
    options.saves = options.keep_checkpoint;
    options.bh = aio_bh_new(qemu_get_aio_context(), standby_bh, bs);
    options.overlays = replication_overlays_new(
        bs, qemu_opt_get(opts, REPLICATION_OPT_OVERLAY_DIR));
    options.merge_bh = aio_bh_new(iohandler_get_aio_context(), standby_merge_bh,
                                  bs);
    s->guard_name = g_strdup(name);
    s->standby = g_memdup2(&options, sizeof(options));
    qemu_co_mutex_init(&s->standby->announce_lock);
    progress_init(&s->progress);

    return true;
}

const ReplicationRole replication_standby_role = {
    .is_standby         = true,
    .has_metadata       = true,

    .init               = standby_init,
    .cleanup            = standby_cleanup,
    .opened             = standby_opened,
    .child_perm         = secondary_child_perm,
    .check_parents      = standby_check_parents,
    .parents_changed    = standby_parents_changed,

    .start              = standby_start,
    .in_sync            = secondary_in_sync,
    .checkpoint         = secondary_checkpoint,
    .stop               = standby_stop,
    .may_take_over      = standby_may_take_over,
    .failover           = standby_failover,
    .detach             = standby_detach,
    .get_error          = secondary_get_error,
    .get_stats          = standby_get_stats,
    .release            = standby_release,
    .finish             = secondary_finish,

    .may_resize         = standby_may_resize,
    .co_write           = standby_co_write,
    .co_flush           = standby_co_flush,
    .left_behind        = secondary_left_behind,
};
