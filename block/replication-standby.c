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
#include "replication-ledger.h"
#include "replication-overlays.h"
#include "replication-secondary.h"

struct ReplicationStandby {
    /* Options */
    bool keep_checkpoint;
    /* Of the primary that the node becomes */
    WriteBehindOptions queue;
    uint64_t timeout_ms;
    uint64_t log_size;

    /*
     * With metadata, else NULL: what the guest changed since the last
     * checkpoint, and what becomes of it at a failover
     */
    ReplicationChanges *changes;
    ReplicationLedger *ledger;
    /* The metadata as the guard has it, before this node is active */
    ReplicationMeta *meta;
    bool has_records;
    CoMutex announce_lock; /* held to read it there */
    bool announced; /* atomic */

    ReplicationOverlays *overlays;

    /* What the primary overwrites is saved, even if the node does not run */
    bool saves; /* atomic */
    /* Something was overwritten that was not saved */
    bool overwritten; /* atomic */
    /* Started on what may be a mixture, unless the primary starts.  BQL. */
    bool mixed;
    /* The guest goes on alone, which the metadata does not say */
    bool unrecorded; /* atomic */
    /* Where the guest wrote past the running node, or NULL.  BQL. */
    char *bypassed;
    /* Does what others ask for who cannot: requests, changes of the graph */
    QEMUBH *bh;

    /* A merge begins when everything is flushed, or fails with this.  BQL. */
    bool prepares_merge;
    bool is_flushed; /* atomic */
    Error *settle_error;
    /* Not while the main loop waits for something, to change the graph */
    QEMUBH *merge_bh;

    /* The node is being closed, and becomes nothing any more */
    bool closing;
};

static ReplicationStandby *standby_state(BlockDriverState *bs)
{
    return secondary_state(bs)->standby;
}

bool standby_is_unrecorded(BlockDriverState *bs)
{
    ReplicationStandby *st = standby_state(bs);

    return st && qatomic_read(&st->unrecorded);
}

/* Whether a failover would give a whole disk */
static bool standby_can_roll_back(BlockDriverState *bs)
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

/* Then a reference that is dropped would delete it once more */
static bool standby_is_being_deleted(BlockDriverState *bs)
{
    return !bs->refcnt;
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
static void standby_forget_changes(BlockDriverState *bs)
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

static void standby_merge_bh(void *opaque)
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

static void standby_free(BlockDriverState *bs)
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
static void standby_release(BlockDriverState *bs)
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
static bool standby_may_take_over(BlockDriverState *bs, Error **errp)
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

static void standby_failover(BlockDriverState *bs, Error **errp)
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

static void standby_detach(BlockDriverState *bs, Error **errp)
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
