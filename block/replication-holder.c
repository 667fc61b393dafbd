/*
 * Block replication: a primary that holds both disks
 *
 * The guest's requests go to the local disk, the node's file.  What changed
 * there is forwarded to the replica, as long as one is attached, through the
 * write-behind queue.  So are copies of what the replica lacks: all that goes
 * to the replica goes through one queue, in the order in which the local disk
 * has completed it, and that is what makes the two equal in the end.
 *
 * A range that is lacking at the replica is not forwarded: its copy is going to
 * bring what is written meanwhile.  Writes and copies that overlap wait for
 * each other, until what they are about is in the queue.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/option.h"
#include "qemu/timer.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qnull.h"
#include "qobject/qstring.h"
#include "block/block_int.h"
#include "replication-holder.h"

/* Half a minute of copying, and more than most guests change in one */
#define DEFAULT_LOG_SIZE (16 * GiB)

/* Whether what changed is all that the last replica may lack */
bool holder_knows_changes(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->ledger ? replication_ledger_knows_changes(s->ledger) :
                       s->had_replica;
}

bool holder_is_in_step(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return holder_forwards(bs) && qatomic_read(&s->caught_up) &&
           !replication_changes_lacking_bytes(s->changes);
}

ReplicaState holder_replica_state(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (!s->replica) {
        return REPLICA_STATE_NONE;
    }
    if (qatomic_read(&s->lost)) {
        return REPLICA_STATE_LOST;
    }

    return holder_is_in_step(bs) ? REPLICA_STATE_SYNCED : REPLICA_STATE_SYNCING;
}

/* The replica gets nothing more.  Only the first call counts. */
void holder_lose(BlockDriverState *bs, const char *what, int ret)
{
    ReplicationHolder *s = holder_state(bs);

    IO_CODE();

    if (qatomic_cmpxchg(&s->lost, 0, ret)) {
        return;
    }
    error_report("Replication node '%s' failed to forward a %s to the "
                 "secondary: %s", bdrv_get_node_name(bs), what, strerror(-ret));
    replication_report_error(bs, REPLICATION_ERROR_REASON_FORWARD,
                             strerror(-ret));
    replication_report_replica(bs, REPLICA_STATE_LOST, strerror(-ret));
    if (s->ledger) {
        replication_ledger_lose_peer(s->ledger);
    }
}

static bool holder_in_sync(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    const char *name = bdrv_get_node_name(bs);
    int lost = qatomic_read(&s->lost);

    if (!s->replica) {
        error_setg(errp, "Replication node '%s' has no replica", name);
    } else if (lost) {
        error_setg_errno(errp, -lost, "The replica of replication node '%s' "
                         "was lost", name);
    } else if (!holder_is_in_step(bs)) {
        error_setg(errp, "The replica of replication node '%s' is not in step: "
                   "it lacks %" PRId64 " bytes", name,
                   replication_changes_lacking_bytes(s->changes));
        error_append_hint(errp, "Wait until it is synced.\n");
        return false;
    } else {
        return true;
    }
    error_append_hint(errp, "Attach one with x-block-replica-sync.\n");

    return false;
}

static void holder_get_error(BlockDriverState *bs, Error **errp)
{
    if (replication_stage(bs) == REPLICATION_STAGE_RUNNING) {
        holder_in_sync(bs, errp);
    }
}

/*
 * What was changed before the last checkpoint, and both sides have on stable
 * storage now, can be forgotten at the next one.
 */
static void coroutine_fn holder_flush_both(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationHolder *s = holder_state(bs);
    int ret;

    replication_changes_tidy(s->changes);
    bdrv_graph_co_rdlock();
    ret = bdrv_co_flush(bs->file->bs);
    bdrv_graph_co_rdunlock();
    if (ret == 0) {
        ret = write_behind_co_flush(s->queue, true);
    }
    s->flushed = ret == 0;
    bdrv_dec_in_flight(bs);
}

/* The node is drained, and both sides are going to have the same checkpoint */
static void holder_checkpointed(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    replication_changes_checkpoint(s->changes, s->flushed);
    s->flushed = false;
    /* The next one drains the node, and so comes when this has ended */
    bdrv_inc_in_flight(bs);
    aio_co_schedule(bdrv_get_aio_context(bs),
                    qemu_coroutine_create(holder_flush_both, bs));
}

static bool holder_start(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    bdrv_graph_rdlock_main_loop();
    if (!replication_check_active(bs, REPLICATION_OP_START, errp) ||
        !holder_refuse_overlays(bs, errp) || !holder_refuse_bypass(bs, errp)) {
        bdrv_graph_rdunlock_main_loop();
        return false;
    }
    bdrv_graph_rdunlock_main_loop();

    if (!holder_in_sync(bs, errp) ||
        (s->ledger && !replication_ledger_confirm(s->ledger, errp))) {
        return false;
    }
    /* What was reported is forgotten from now on, and has to be told again */
    qatomic_set(&s->read_failed, false);

    return true;
}

/* The replica is the secondary's disk from now on */
static bool holder_stop(BlockDriverState *bs, Error **errp)
{
    replication_replica_detach(bs, false);

    return true;
}

/*
 * Alone, with all that is needed to protect the guest again.  A generation of
 * its own that cannot be written is not the end: writes fail until it is.
 */
static void holder_failover(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    replication_replica_detach(bs, true);
    replication_set_stage(bs, REPLICATION_STAGE_NONE);
    if (s->ledger) {
        replication_ledger_go_alone(s->ledger, errp);
    }
}

static void holder_new(BlockDriverState *bs, const WriteBehindOptions *queue,
                       uint64_t timeout_ms, uint64_t log_size)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s;

    s = node->holder = g_new0(ReplicationHolder, 1);
    s->queue_options = *queue;
    s->timeout_ms = timeout_ms;
    s->log_size = log_size;
    s->above = replication_above_new();
    qemu_co_mutex_init(&s->ranges_lock);
    QLIST_INIT(&s->ranges);
    stat64_init(&s->copied_bytes, 0);
    stat64_init(&s->changing_bytes, 0);
    ratelimit_init(&s->copy_limit);
    s->copy_timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                                  SCALE_NS, holder_copy_timer, bs);
    s->vm_change = qemu_add_vm_change_state_handler(holder_vm_changed, bs);
    replication_replica_set_speed(bs, 0);
}

static bool holder_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    WriteBehindOptions queue = {};
    uint64_t timeout_ms;

    if (!replication_primary_get_opts(opts, &queue, &timeout_ms, errp)) {
        return false;
    }
    holder_new(bs, &queue, timeout_ms, replication_holder_get_log_size(opts));

    return true;
}

uint64_t replication_holder_get_log_size(QemuOpts *opts)
{
    return qemu_opt_get_size(opts, REPLICATION_OPT_LOG_SIZE, DEFAULT_LOG_SIZE);
}

void replication_holder_take_over(BlockDriverState *bs,
                                  const WriteBehindOptions *queue,
                                  uint64_t timeout_ms, uint64_t log_size,
                                  ReplicationChanges *changes,
                                  ReplicationLedger *ledger)
{
    ReplicationHolder *s;

    GLOBAL_STATE_CODE();

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    holder_new(bs, queue, timeout_ms, log_size);
    s = holder_state(bs);
    s->ledger = ledger;
    s->changes = changes ?:
        replication_changes_new(bs->total_sectors * BDRV_SECTOR_SIZE);
    /* If that is not the length, it is known before a replica is attached */
    holder_parents_changed(bs);
}

static bool holder_is_null(const QObject *option)
{
    const QString *string = qobject_to(QString, option);

    /* As for "backing": -drive and -blockdev have no null */
    return qobject_type(option) == QTYPE_QNULL ||
           (string && !*qstring_get_str(string));
}

/* While the node is inactive, others may write to the metadata */
static bool holder_open_ledger(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s = node->holder;

    s->ledger = replication_ledger_new(bs, node->meta, s->changes, s->log_size,
                                       s->timeout_ms);

    return (bs->open_flags & BDRV_O_INACTIVE) ||
           replication_ledger_open(s->ledger, errp) == 0;
}

/* At once: if the node does not become active yet, nobody tells it again */
static void holder_used_by_others(BlockDriverState *bs)
{
    if (holder_state(bs)->replica) {
        error_report("Replication node '%s': others have used its disk while "
                     "it was inactive, and what they wrote does not get to the "
                     "secondary", bdrv_get_node_name(bs));
        holder_lose(bs, "request", -EIO);
    }
}

static bool coroutine_fn GRAPH_RDLOCK
holder_co_activated(BlockDriverState *bs, Error **errp)
{
    ReplicationHolder *s = holder_state(bs);
    int64_t length = bdrv_co_getlength(bs->file->bs);
    int ret;

    if (length >= 0 && length != replication_changes_size(s->changes)) {
        if (!replication_check_room(bs, length, errp)) {
            return false;
        }
        replication_changes_resize(s->changes, length);
        s->had_replica = false;
        holder_used_by_others(bs);
    }
    if (s->ledger) {
        ret = replication_ledger_open(s->ledger, errp);
        if (ret < 0) {
            return false;
        }
        if (ret > 0) {
            holder_used_by_others(bs);
        }
    }

    return true;
}

/*
 * A replica that is there from the beginning has what the disk has: the user
 * answers for that.
 */
static bool holder_opened(BlockDriverState *bs, QDict *options, Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *node = bs->opaque;
    ReplicationHolder *s = node->holder;
    QObject *option = qdict_get(options, REPLICATION_OPT_REPLICA);
    BdrvChild *replica;
    int64_t length;

    bdrv_graph_rdlock_main_loop();
    length = bdrv_getlength(bs->file->bs);
    bdrv_graph_rdunlock_main_loop();
    if (length < 0) {
        error_setg_errno(errp, -length, "Replication node '%s': failed to get "
                         "the length of its disk", bdrv_get_node_name(bs));
        return false;
    }
    if (!replication_check_room(bs, length, errp)) {
        return false;
    }
    s->changes = replication_changes_new(length);

    if (option && holder_is_null(option)) {
        qdict_del(options, REPLICATION_OPT_REPLICA);
        return !node->meta || holder_open_ledger(bs, errp);
    }
    if (node->meta) {
        error_setg(errp, "Replication node '%s' has metadata, and nobody has "
                   "announced it to its replica", bdrv_get_node_name(bs));
        error_append_hint(errp, "Open it with replica=null, and attach the "
                          "replica with x-block-replica-sync.\n");
        return false;
    }
    replica = bdrv_open_child(NULL, options, REPLICATION_OPT_REPLICA, bs,
                              &child_of_bds, BDRV_CHILD_DATA, false, errp);
    if (!replica) {
        error_prepend(errp, "Replication node '%s' cannot use its replica: ",
                      bdrv_get_node_name(bs));
        return false;
    }
    if (!holder_take_replica(bs, replica, errp)) {
        return false;
    }
    s->caught_up = true;
    s->had_replica = true;

    return true;
}

static void holder_cleanup(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    qemu_del_vm_change_state_handler(s->vm_change);
    replication_unfreeze_below(s->frozen);
    replication_watch_free(s->watch);
    if (s->queue) {
        write_behind_free(s->queue);
    }
    timer_free(s->copy_timer);
    ratelimit_destroy(&s->copy_limit);
    replication_ledger_free(s->ledger);
    replication_changes_free(s->changes);
    replication_above_free(s->above);
    g_free(s);
}

static void holder_drain_begin(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    if (s->queue) {
        write_behind_drain_begin(s->queue);
    }
}

static void holder_drain_end(BlockDriverState *bs)
{
    holder_kick_copiers(bs);
}

static void GRAPH_RDLOCK
holder_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                  BlockReopenQueue *reopen_queue,
                  uint64_t perm, uint64_t shared,
                  uint64_t *nperm, uint64_t *nshared)
{
    ReplicationHolder *s = holder_state(bs);

    if (!(role & BDRV_CHILD_FILTERED)) {
        *nperm = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE;
        *nshared = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE_UNCHANGED;
        if (bs->open_flags & BDRV_O_INACTIVE) {
            *nperm &= ~BLK_PERM_WRITE;
            *nshared = BLK_PERM_ALL;
        }
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (bs->open_flags & BDRV_O_INACTIVE) {
        return;
    }
    /* What is changed past the node gets to no replica, and to no set */
    *nshared &= ~BLK_PERM_RESIZE;
    if (s->replica || s->had_replica || s->ledger) {
        *nshared &= ~BLK_PERM_WRITE;
    }
}

static void holder_get_stats(BlockDriverState *bs,
                             BlockStatsSpecificReplication *stats)
{
    ReplicationHolder *s = holder_state(bs);
    BlockStatsReplicationPrimary *p = &stats->u.primary;
    WriteBehindStats q = {};
    ReplicaState state;
    uint64_t behind;

    /* In the order in which a write goes from one to the next */
    behind = stat64_get(&s->changing_bytes);
    behind += replication_changes_lacking_bytes(s->changes);
    if (s->queue) {
        write_behind_get_stats(s->queue, &q);
    }
    /* After that, because it is lost before the queue is dropped */
    state = holder_replica_state(bs);
    replication_primary_fill_stats(p, &q);
    p->has_replica_state = true;
    p->replica_state = state;
    p->has_copied_bytes = true;
    p->copied_bytes = stat64_get(&s->copied_bytes);
    p->has_out_of_sync_bytes = true;
    if (state == REPLICA_STATE_SYNCING || state == REPLICA_STATE_SYNCED) {
        p->out_of_sync_bytes = behind + q.pending_span;
    } else if (holder_knows_changes(bs)) {
        p->out_of_sync_bytes =
            replication_changes_changed_bytes(s->changes);
    } else {
        p->out_of_sync_bytes = bs->total_sectors * BDRV_SECTOR_SIZE;
    }
    if (s->ledger) {
        replication_ledger_fill_stats(s->ledger, p);
    }
}

/* No replica has the length of this disk, or none that is known */
void holder_resized(BlockDriverState *bs, int64_t length)
{
    ReplicationHolder *s = holder_state(bs);

    replication_changes_resize(s->changes, length);
    s->had_replica = false;
    if (s->ledger) {
        replication_ledger_resized(s->ledger);
    }
}

static bool holder_may_resize(BlockDriverState *bs, int64_t length,
                              Error **errp)
{
    ReplicationHolder *s = holder_state(bs);

    if (s->replica) {
        error_setg(errp, "Cannot resize replication node '%s' while it has a "
                   "replica", bdrv_get_node_name(bs));
        error_append_hint(errp, "Detach the replica with "
                          "x-block-replica-detach, and resize both.\n");
        return false;
    }

    return (length < 0 || replication_check_room(bs, length, errp)) &&
           (!s->ledger ||
            replication_ledger_may_resize(s->ledger, length, errp));
}

const ReplicationRole replication_holder_role = {
    .holds_disk         = true,
    .has_metadata       = true,

    .init               = holder_init,
    .cleanup            = holder_cleanup,
    .opened             = holder_opened,
    .co_activated       = holder_co_activated,
    .child_perm         = holder_child_perm,
    .check_parents      = holder_check_parents,
    .parents_changed    = holder_parents_changed,

    .start              = holder_start,
    .in_sync            = holder_in_sync,
    .checkpointed       = holder_checkpointed,
    .stop               = holder_stop,
    .abandon            = holder_abandon,
    .failover           = holder_failover,
    .get_error          = holder_get_error,
    .get_stats          = holder_get_stats,

    .drain_begin        = holder_drain_begin,
    .drain_end          = holder_drain_end,
    .may_resize         = holder_may_resize,
    .resized            = holder_resized,
    .co_read_failed     = holder_co_read_failed,
    .co_write           = holder_co_write,
    .co_flush           = holder_co_flush,
};
