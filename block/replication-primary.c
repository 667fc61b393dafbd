/*
 * Block replication: the primary side
 *
 * Forwards what the guest changes to the secondary, behind the guest's back,
 * and remembers what did not get there.  The quorum above hides an error of the
 * secondary from the guest: it goes on, and the next checkpoint fails instead.
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
#include "replication-above.h"
#include "replication-int.h"
#include "replication-watch.h"
#include "trace.h"

/* As much as a link of 10 Gbit/s takes in 50 ms */
#define DEFAULT_WRITE_BEHIND (64 * MiB)

/* A negative number has become a large one, and so much is no bound either */
#define MAX_WRITE_BEHIND (1 * TiB)

/* What this may add to a checkpoint, if the link is slower than that */
#define DEFAULT_WRITE_BEHIND_MS 200

/* More than a busy secondary takes, and less than a guest's driver bears */
#define DEFAULT_REPLICA_TIMEOUT_MS 10000

struct ReplicationPrimary {
    /* What the guest wrote and the secondary does not have yet */
    WriteBehind *queue;

    /*
     * Why the first request that the secondary should have got did not reach
     * it: a negative errno, or 0.  Accessed with atomic operations.
     */
    int forward_error;

    /* The guest wrote, or may have, what was not forwarded.  Also atomic. */
    bool missed;

    /*
     * What stands above, and the name of the node there that the guest's writes
     * have got no further than, or NULL.  Protected by the BQL.
     */
    ReplicationAbove *above;
    char *bypassed_at;

    /* The links on the way to the secondary, frozen by us.  BQL. */
    GSList *frozen_below;

    /* Ends what hangs at the secondary */
    ReplicationWatch *watch;
    uint64_t timeout_ms;
};

static ReplicationPrimary *primary_state(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return s->primary;
}

/* What is written to an overlay above this node would not be forwarded */
static bool GRAPH_RDLOCK
primary_refuse_overlays(BlockDriverState *bs, Error **errp)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        if (c->role & BDRV_CHILD_COW) {
            error_setg(errp, "Replication node '%s' forwards writes and cannot "
                       "be the backing node of an overlay",
                       bdrv_get_node_name(bs));
            error_append_hint(errp, "Stop replication first.\n");
            return false;
        }
    }

    return true;
}

/* From now on the secondary is out of date.  Only the first call counts. */
static void primary_fail(BlockDriverState *bs, const char *what, int ret)
{
    ReplicationPrimary *s = primary_state(bs);

    IO_CODE();

    if (qatomic_cmpxchg(&s->forward_error, 0, ret)) {
        return;
    }
    error_report("Replication node '%s' failed to forward a %s to the "
                 "secondary: %s", bdrv_get_node_name(bs), what, strerror(-ret));
    replication_report_error(bs, REPLICATION_ERROR_REASON_FORWARD,
                             strerror(-ret));
}

/* The queue failed to forward a request, and forwards nothing more */
static void primary_forward_failed(BlockDriverState *bs, WriteBehindType type,
                                   int ret)
{
    primary_fail(bs, write_request_name(type), ret);
}

/* Note that a write was not forwarded, because nothing is in this stage */
static void primary_missed(BlockDriverState *bs)
{
    ReplicationPrimary *s = primary_state(bs);

    IO_CODE();

    qatomic_set(&s->missed, true);
}

/* What the secondary lacks, if anything: a negative errno, or 0 */
static int primary_error(BlockDriverState *bs)
{
    ReplicationPrimary *s = primary_state(bs);
    int forward_error = qatomic_read(&s->forward_error);

    if (forward_error) {
        return forward_error;
    }

    return qatomic_read(&s->missed) ? -EIO : 0;
}

/* Set @errp if something that the guest wrote did not reach the secondary */
static bool primary_in_sync(BlockDriverState *bs, Error **errp)
{
    ReplicationPrimary *s = primary_state(bs);
    int forward_error = qatomic_read(&s->forward_error);

    if (forward_error) {
        error_setg_errno(errp, -forward_error,
                         "The secondary of replication node '%s' is out of "
                         "date and has to be resynchronised: a request could "
                         "not be forwarded", bdrv_get_node_name(bs));
    } else if (s->bypassed_at) {
        error_setg(errp, "The secondary of replication node '%s' is out of "
                   "date and has to be resynchronised: the node was cut off "
                   "from node '%s' above it, where the guest may have written",
                   bdrv_get_node_name(bs), s->bypassed_at);
    } else if (qatomic_read(&s->missed)) {
        error_setg(errp, "The secondary of replication node '%s' is out of "
                   "date and has to be resynchronised: the guest wrote while "
                   "replication was stopped", bdrv_get_node_name(bs));
    } else {
        return true;
    }

    error_append_hint(errp, "Remove the node, resynchronise the secondary's "
                      "disk with a new node attached, and start again.\n");
    return false;
}

static bool GRAPH_RDLOCK
primary_refuse_bypass(BlockDriverState *bs, Error **errp)
{
    ReplicationPrimary *s = primary_state(bs);
    g_autofree char *node = replication_above_bypass(s->above, bs);

    if (!node) {
        return true;
    }

    error_setg(errp, "Replication node '%s' forwards writes and cannot be cut "
               "off from node '%s' above it", bdrv_get_node_name(bs), node);
    error_append_hint(errp, "Stop replication first.\n");
    return false;
}

static bool GRAPH_RDLOCK
primary_check_parents(BlockDriverState *bs, Error **errp)
{
    if (!replication_allows(bs, REPLICATION_OP_WRITE)) {
        return true;
    }

    /*
     * Who does not want an error takes an edge away, does not care about a
     * refusal, and then would not tell primary_parents_changed() either.
     */
    return primary_refuse_overlays(bs, errp) &&
           (!errp || primary_error(bs) || primary_refuse_bypass(bs, errp));
}

static void primary_bypassed(BlockDriverState *bs, const char *node)
{
    ReplicationPrimary *s = primary_state(bs);
    g_autofree char *text = g_strdup_printf("cut off from node '%s' above it",
                                            node);

    s->bypassed_at = g_strdup(node);
    primary_missed(bs);

    /* If that node is being deleted, most likely so are we */
    if (replication_allows(bs, REPLICATION_OP_WRITE) && bdrv_find_node(node)) {
        error_report("Replication node '%s' was %s: what is written there does "
                     "not get to the secondary", bdrv_get_node_name(bs), text);
        replication_report_error(bs, REPLICATION_ERROR_REASON_FORWARD, text);
    }
}

/* What could not be refused is not forgotten, even if it is taken back */
static void GRAPH_RDLOCK primary_parents_changed(BlockDriverState *bs)
{
    ReplicationPrimary *s = primary_state(bs);
    g_autofree char *node = replication_above_bypass(s->above, bs);

    if (node && !primary_error(bs)) {
        primary_bypassed(bs, node);
    }
    s->above = replication_above_update(s->above, bs);
}

/*
 * The secondary's disk has the guest's data only between the start, which says
 * that it was synchronised, and the first write that it missed.  After a stop
 * it is the secondary's again, unless the guest has no other.
 */
static bool primary_has_data(BlockDriverState *bs)
{
    return !primary_error(bs);
}

static void coroutine_fn GRAPH_RDLOCK
primary_co_await_writes(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    ReplicationPrimary *s = primary_state(bs);

    write_behind_co_await(s->queue, offset, bytes);
}

static bool primary_has_pending_writes(BlockDriverState *bs, int64_t offset,
                                       int64_t bytes)
{
    ReplicationPrimary *s = primary_state(bs);

    return write_behind_has_pending(s->queue, offset, bytes);
}

static void primary_drain_begin(BlockDriverState *bs)
{
    ReplicationPrimary *s = primary_state(bs);

    write_behind_drain_begin(s->queue);
}

/*
 * What is not forwarded is not done: nobody above may take the secondary for a
 * good copy of it.  Quorum goes on without us, and the guest sees no error that
 * is not of its own disk.
 */
static int coroutine_fn GRAPH_RDLOCK
primary_co_write(BlockDriverState *bs, const WriteRequest *w)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    if (!replication_allows(bs, REPLICATION_OP_WRITE)) {
        primary_missed(bs);
    }
    ret = primary_error(bs);
    if (ret < 0) {
        return ret;
    }

    trace_replication_forward(bs, bdrv_get_node_name(bs),
                              write_request_name(w->type), w->offset, w->bytes,
                              w->flags);
    ret = write_behind_co_write(s->primary->queue, w);
    if (ret >= 0 && (w->flags & BDRV_REQ_FUA) && qatomic_read(&s->relied_on)) {
        ret = write_behind_co_flush(s->primary->queue, true);
    }

    return ret;
}

/*
 * In every stage: as long as nothing is missed, a flush need not fail.  If it
 * did, quorum would go on without us, and a VM that stops could not start
 * replication again.
 */
static int coroutine_fn GRAPH_RDLOCK primary_co_flush(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;
    int ret = primary_error(bs);

    if (ret < 0) {
        return ret;
    }

    trace_replication_forward(bs, bdrv_get_node_name(bs),
                              write_request_name(WRITE_BEHIND_FLUSH), 0, 0, 0);
    return write_behind_co_flush(s->primary->queue,
                                 qatomic_read(&s->relied_on));
}

/* A request was lost on the way to us, or was one that we have failed */
static void primary_left_behind(BlockDriverState *bs, int ret)
{
    IO_CODE();

    if (!replication_allows(bs, REPLICATION_OP_WRITE)) {
        primary_missed(bs);
    } else if (!primary_error(bs)) {
        primary_fail(bs, "request", ret);
    }
}

static void primary_get_error(BlockDriverState *bs, Error **errp)
{
    ReplicationPrimary *s = primary_state(bs);

    /* Writes that are missed on purpose are no error until the next start */
    if (replication_allows(bs, REPLICATION_OP_WRITE) ||
        qatomic_read(&s->forward_error)) {
        primary_in_sync(bs, errp);
    }
}

void replication_primary_fill_stats(BlockStatsReplicationPrimary *stats,
                                    const WriteBehindStats *q)
{
    int64_t now = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    *stats = (BlockStatsReplicationPrimary) {
        .forwarded_requests     = q->sent_requests,
        .forwarded_bytes        = q->sent_bytes,
        .forwarded_flushes      = q->flushes,
        .failed_requests        = q->failed_requests,
        .dropped_requests       = q->dropped_requests,
        .superseded_requests    = q->superseded_requests,
        .superseded_bytes       = q->superseded_bytes,
        .pending_requests       = q->pending_requests,
        .pending_memory         = q->pending_bytes,
        .max_pending_memory     = q->max_pending_bytes,
        .oldest_pending_ns      = q->oldest_ns ? now - q->oldest_ns : 0,
    };
}

static void primary_get_stats(BlockDriverState *bs,
                              BlockStatsSpecificReplication *stats)
{
    ReplicationPrimary *s = primary_state(bs);
    WriteBehindStats q;

    write_behind_get_stats(s->queue, &q);
    replication_primary_fill_stats(&stats->u.primary, &q);
}

/* Whether @node has @length, which is that of @bs */
static bool primary_check_length(BlockDriverState *bs, int64_t length,
                                 BlockDriverState *node, Error **errp)
{
    int64_t other = bdrv_getlength(node);

    if (other < 0) {
        error_setg_errno(errp, -other, "Cannot start replication node '%s': "
                         "failed to get the length of node '%s'",
                         bdrv_get_node_name(bs), bdrv_get_node_name(node));
        return false;
    }
    if (other != length) {
        error_setg(errp, "Cannot start replication node '%s': it has a length "
                   "of %" PRId64 " bytes, node '%s' of %" PRId64,
                   bdrv_get_node_name(bs), length, bdrv_get_node_name(node),
                   other);
        error_append_hint(errp, "Create the secondary's disk with the length "
                          "of the primary's.\n");
        return false;
    }

    return true;
}

/*
 * The disks of both sides must have the same length: those of all nodes above
 * @node, and beside it where writes go to several.
 */
static bool GRAPH_RDLOCK
primary_check_lengths(BlockDriverState *bs, int64_t length,
                      BlockDriverState *node, Error **errp)
{
    BdrvChild *c, *sibling;

    QLIST_FOREACH(c, &node->parents, next_parent) {
        BlockDriverState *parent = c->opaque;

        if (!c->klass->parent_is_bds || (c->role & BDRV_CHILD_COW)) {
            continue;
        }
        if (parent->drv->is_filter && !bdrv_filter_child(parent)) {
            QLIST_FOREACH(sibling, &parent->children, next) {
                if (!primary_check_length(bs, length, sibling->bs, errp)) {
                    return false;
                }
            }
        }
        /* A format may well show another length than that of its file */
        if ((!parent->drv->is_format &&
             !primary_check_length(bs, length, parent, errp)) ||
            !primary_check_lengths(bs, length, parent, errp)) {
            return false;
        }
    }

    return true;
}

static bool primary_start(BlockDriverState *bs, Error **errp)
{
    int64_t length = bdrv_getlength(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (length < 0) {
        error_setg_errno(errp, -length, "Cannot start replication node '%s': "
                         "failed to get its length", bdrv_get_node_name(bs));
        return false;
    }

    return primary_refuse_overlays(bs, errp) && primary_in_sync(bs, errp) &&
           primary_check_lengths(bs, length, bs, errp);
}

static BlockDriverState *primary_link(void *opaque)
{
    BlockDriverState *bs = opaque;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    return bs->file->bs;
}

/* The secondary does nothing, and somebody may wait for it, or all of us */
static void primary_hang_up(void *opaque)
{
    BlockDriverState *bs = opaque;
    ReplicationPrimary *s = primary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (replication_allows(bs, REPLICATION_OP_WRITE) && !primary_error(bs)) {
        primary_fail(bs, "request", -ETIMEDOUT);
    }
    write_behind_abandon(s->queue);
    bdrv_cut_connection(bs->file->bs);
}

/*
 * The secondary is given up: whatever waits for it, waits in vain.  It may have
 * died without a word.
 */
static void primary_abandon(BlockDriverState *bs)
{
    ReplicationPrimary *s = primary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    /* First, lest a read give what was there before the dropped writes */
    primary_missed(bs);
    write_behind_abandon(s->queue);
    bdrv_cut_connection(bs->file->bs);
}

static bool primary_get_ms(QemuOpts *opts, const char *name,
                           uint32_t by_default, uint64_t *ms, Error **errp)
{
    uint64_t value = qemu_opt_get_number(opts, name, by_default);

    /* A negative number has become a large one */
    if (value > UINT32_MAX) {
        error_setg(errp, "Parameter '%s' expects a number of milliseconds from "
                   "0 to %" PRIu32, name, UINT32_MAX);
        return false;
    }
    *ms = value;

    return true;
}

bool replication_primary_get_opts(QemuOpts *opts, WriteBehindOptions *queue,
                                  uint64_t *timeout_ms, Error **errp)
{
    queue->max_bytes = qemu_opt_get_size(opts, REPLICATION_OPT_WRITE_BEHIND,
                                         DEFAULT_WRITE_BEHIND);
    if (queue->max_bytes > MAX_WRITE_BEHIND) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_WRITE_BEHIND "' expects "
                   "a size of at most 1 TiB");
        error_append_hint(errp, "It is memory.\n");
        return false;
    }

    return primary_get_ms(opts, REPLICATION_OPT_WRITE_BEHIND_MS,
                          DEFAULT_WRITE_BEHIND_MS, &queue->max_ms, errp) &&
           primary_get_ms(opts, REPLICATION_OPT_REPLICA_TIMEOUT,
                          DEFAULT_REPLICA_TIMEOUT_MS, timeout_ms, errp);
}

static bool primary_init(BlockDriverState *bs, QemuOpts *opts, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    WriteBehindOptions queue = {};
    uint64_t timeout_ms;

    if (!replication_primary_get_opts(opts, &queue, &timeout_ms, errp)) {
        return false;
    }

    s->primary = g_new0(ReplicationPrimary, 1);
    s->primary->timeout_ms = timeout_ms;
    s->primary->queue = write_behind_new(bs, NULL, &queue,
                                         primary_forward_failed);
    s->primary->above = replication_above_new();

    /*
     * A write of zeroes that must not fall back to data could succeed on one
     * side and be refused on the other, and a quorum above us would hide which:
     * let it be refused before either is touched.
     */
    bs->supported_zero_flags &= ~BDRV_REQ_NO_FALLBACK;
    return true;
}

/*
 * Behind a connection that was lost, there may be another disk, or a server
 * that still has a request to do which was sent again, and newer ones after it.
 * And behind another node below us there is another disk for sure.
 */
static bool primary_opened(BlockDriverState *bs, QDict *options, Error **errp)
{
    ReplicationPrimary *s = primary_state(bs);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    bdrv_keep_connection(bs->file->bs);
    s->frozen_below = replication_freeze_below(bs, NULL);
    s->watch = replication_watch_new(bs, s->timeout_ms, primary_link,
                                     primary_hang_up, bs);

    return true;
}

static void primary_cleanup(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    /* As the link does when it is closed, but then nobody watches it */
    bdrv_graph_rdlock_main_loop();
    if (bs->file) {
        bdrv_flush(bs->file->bs);
    }
    bdrv_graph_rdunlock_main_loop();
    replication_unfreeze_below(s->primary->frozen_below);
    replication_watch_free(s->primary->watch);
    write_behind_free(s->primary->queue);
    replication_above_free(s->primary->above);
    g_free(s->primary->bypassed_at);
    g_free(s->primary);
}

static void GRAPH_RDLOCK
primary_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                   BlockReopenQueue *reopen_queue,
                   uint64_t perm, uint64_t shared,
                   uint64_t *nperm, uint64_t *nshared)
{
    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);

    /* What is queued has to be written even if the guest's device has gone */
    if (!(bs->open_flags & BDRV_O_INACTIVE) && !bdrv_is_read_only(bs)) {
        *nperm |= BLK_PERM_WRITE;
    }
}

const ReplicationRole replication_primary_role = {
    .init               = primary_init,
    .cleanup            = primary_cleanup,
    .opened             = primary_opened,
    .child_perm         = primary_child_perm,
    .check_parents      = primary_check_parents,
    .parents_changed    = primary_parents_changed,

    .start              = primary_start,
    .in_sync            = primary_in_sync,
    .abandon            = primary_abandon,
    .get_error          = primary_get_error,
    .get_stats          = primary_get_stats,

    .drain_begin        = primary_drain_begin,
    .co_await_writes    = primary_co_await_writes,
    .has_pending_writes = primary_has_pending_writes,
    .has_data           = primary_has_data,
    .co_write           = primary_co_write,
    .co_flush           = primary_co_flush,
    .left_behind        = primary_left_behind,
};
