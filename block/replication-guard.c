/*
 * Block replication: filter above the secondary disk
 *
 * While a secondary runs, the primary writes to the secondary disk past the
 * replication node, through a copy-before-write filter.  This filter on top of
 * that one tells the replication node what it could not know otherwise: that a
 * write of the primary, or saving the pre-image for it, has failed, or that the
 * primary cannot write any more.  And it tells the copy-before-write filter
 * what that could not know: where the active overlay covers the disk.
 *
 * From a failover on the disk belongs to the secondary guest.  Then the filter
 * is a fence: it belongs to those above it, goes away with the last of them,
 * and refuses whatever they still want to change.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "copy-before-write.h"
#include "replication-secondary.h"

typedef struct ReplicationGuard {
    /*
     * The replication node that inserted us, or NULL when it has left us to our
     * parents.  Changed while we are drained.
     */
    BlockDriverState *owner;

    /* Refuse to change the disk.  Changed while we are drained. */
    bool fence;

    /* Keeps others from our node, also from the fence.  BQL. */
    Error *blocker;
    /* No more parents than that, once we are in place.  BQL. */
    bool in_place;
    int num_parents;

    /* The first failure: a negative errno, or 0.  Atomic operations. */
    int error;

    /* The active overlay, and what it allocates at once */
    BdrvChild *active;
    uint32_t active_cluster_size;

    /* Where the primary announces itself, or NULL */
    BdrvChild *metadata;

    /* Whether there was a block backend above us, and is none now.  BQL. */
    bool had_blk;
    bool cut_off;
} ReplicationGuard;

static bool guard_is_fence(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    IO_CODE();

    return g->fence;
}

static int guard_result(BlockDriverState *bs, int ret)
{
    ReplicationGuard *g = bs->opaque;

    IO_CODE();

    if (ret < 0 && g->owner && !qatomic_cmpxchg(&g->error, 0, ret)) {
        error_report("Replication node '%s': a write of the primary to the "
                     "secondary disk failed: %s", bdrv_get_node_name(g->owner),
                     strerror(-ret));
        replication_report_error(g->owner,
                                 REPLICATION_ERROR_REASON_SECONDARY_WRITE,
                                 strerror(-ret));
    }

    return ret;
}

/*
 * Whether the pre-image of @bytes at @offset need not be saved: nobody goes
 * back to it, or the guest finds them in the active overlay.  That stays so
 * until the overlay is emptied: a cluster that the guest discards there becomes
 * one of zeroes.
 *
 * A request that began when they were not yet there may still be reading the
 * disk.  It must not read what the primary is going to write.
 */
static bool coroutine_fn GRAPH_RDLOCK
guard_is_covered(void *opaque, int64_t offset, int64_t bytes)
{
    BlockDriverState *bs = opaque;
    ReplicationGuard *g = bs->opaque;
    BlockDriverState *active = g->active->bs;
    int64_t end = offset + bytes;
    int64_t pos, n;

    if (standby_saves_nothing(g->owner)) {
        return true;
    }
    for (pos = offset; pos < end; pos += n) {
        if (bdrv_co_is_allocated(active, pos, end - pos, &n) <= 0) {
            return false;
        }
    }
    bdrv_co_wait_requests(active, offset, bytes, g->active_cluster_size);

    return true;
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                     QEMUIOVector *qiov, size_t qiov_offset,
                     BdrvRequestFlags flags)
{
    return bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                               flags);
}

static int coroutine_fn GRAPH_RDLOCK guard_co_write(BlockDriverState *bs,
                                                    const WriteRequest *w)
{
    ReplicationGuard *g = bs->opaque;
    bool may_give_up;
    int ret;

    if (guard_is_fence(bs) ||
        (g->owner && !standby_co_is_announced(g->owner))) {
        return -EPERM;
    }

    may_give_up = g->owner && standby_primary_writes(g->owner);
    ret = write_request_co_do(bs->file, w);
    /* Not a failure: the caller has asked for it, to do without */
    if (ret == -ENOTSUP && (w->flags & BDRV_REQ_NO_FALLBACK)) {
        return ret;
    }
    if (ret < 0 && may_give_up) {
        /* If it was to save what is there, it succeeds without that */
        standby_give_up_saving(g->owner, ret);
        ret = write_request_co_do(bs->file, w);
    }

    return guard_result(bs, ret);
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_WRITE,
        .flags          = flags,
        .offset         = offset,
        .bytes          = bytes,
        .qiov           = qiov,
        .qiov_offset    = qiov_offset,
    };

    return guard_co_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       BdrvRequestFlags flags)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_ZEROES,
        .flags          = flags,
        .offset         = offset,
        .bytes          = bytes,
    };

    return guard_co_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_DISCARD,
        .offset         = offset,
        .bytes          = bytes,
    };

    return guard_co_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK guard_co_flush(BlockDriverState *bs)
{
    /* Closing a fence must not wait until the guest's disk is flushed */
    if (guard_is_fence(bs) && QLIST_EMPTY(&bs->parents)) {
        return 0;
    }

    return guard_result(bs, bdrv_co_flush(bs->file->bs));
}

/* Only a node that was above the disk before us can ask for it */
static int coroutine_fn GRAPH_RDLOCK
guard_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                  PreallocMode prealloc, BdrvRequestFlags flags, Error **errp)
{
    if (guard_is_fence(bs)) {
        error_setg(errp, "The disk below node '%s' belongs to the guest that a "
                   "failover has promoted", bdrv_get_node_name(bs));
        return -EPERM;
    }

    return bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
}

static void GRAPH_RDLOCK guard_refresh_filename(BlockDriverState *bs)
{
    pstrcpy(bs->exact_filename, sizeof(bs->exact_filename),
            bs->file->bs->filename);
}

/*
 * Whether an export could write.  Not what -drive or -blockdev with an ID has
 * made: that stays when the export has gone, and nobody writes through it.
 */
static bool GRAPH_RDLOCK guard_has_writer(BlockDriverState *bs)
{
    BlockBackend *blk = NULL;
    uint64_t perm, shared;

    while ((blk = blk_all_next(blk))) {
        blk_get_perm(blk, &perm, &shared);
        if (blk_bs(blk) == bs && !*blk_name(blk) && (perm & BLK_PERM_WRITE)) {
            return true;
        }
    }

    return false;
}

/* The active overlay is no option */
static void GRAPH_RDLOCK
guard_gather_child_options(BlockDriverState *bs, QDict *target,
                           bool backing_overridden)
{
    qdict_put(target, "file", qobject_ref(bs->file->bs->full_open_options));
}

static void GRAPH_RDLOCK
guard_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                 BlockReopenQueue *reopen_queue,
                 uint64_t perm, uint64_t shared,
                 uint64_t *nperm, uint64_t *nshared)
{
    ReplicationGuard *g = bs->opaque;

    if (role & BDRV_CHILD_METADATA) {
        /* As for the node that owns us */
        *nperm = bs->open_flags & BDRV_O_INACTIVE ?
                 0 : BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE;
        *nshared = BLK_PERM_ALL & ~BLK_PERM_RESIZE;
        return;
    }
    if (!(role & BDRV_CHILD_FILTERED)) {
        /* Only asked where it is allocated */
        *nperm = 0;
        *nshared = BLK_PERM_ALL;
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
    if (bs->open_flags & BDRV_O_INACTIVE) {
        return;
    }
    if (guard_is_fence(bs)) {
        *nperm &= BLK_PERM_CONSISTENT_READ;
    } else if (g->owner) {
        /*
         * Whoever writes to the disk has to come through us, and nobody may be
         * in the way of that, or of a failover
         */
        *nperm |= BLK_PERM_WRITE;
        *nshared &= ~BLK_PERM_WRITE;
    }
}

static int GRAPH_RDLOCK guard_num_parents(BlockDriverState *bs)
{
    BdrvChild *c;
    int n = 0;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        n++;
    }

    return n;
}

/* Those that were above the disk may go, but nobody may come: he would stay */
static int GRAPH_RDLOCK
guard_check_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared,
                 Error **errp)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();

    if (g->in_place && guard_num_parents(bs) > g->num_parents) {
        error_setg(errp, "Node '%s' belongs to replication",
                   bdrv_get_node_name(bs));
        return -EBUSY;
    }

    return 0;
}

/* A node must not go away with op blockers on it */
static void GRAPH_RDLOCK guard_unblock(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    if (g->blocker) {
        bdrv_op_unblock_all(bs, g->blocker);
        error_free(g->blocker);
        g->blocker = NULL;
    }
}

/* Called whenever a parent comes or goes */
static void GRAPH_RDLOCK
guard_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    ReplicationGuard *g = bs->opaque;
    bool has_blk = guard_has_writer(bs);

    GLOBAL_STATE_CODE();

    g->num_parents = guard_num_parents(bs);
    if (g->fence && !g->num_parents) {
        guard_unblock(bs);
    }
    if (g->owner && g->had_blk && !has_blk && !g->cut_off) {
        g->cut_off = true;
        replication_report_error(
            g->owner, REPLICATION_ERROR_REASON_CUT_OFF,
            "the export of the secondary disk was removed");
    }
    g->had_blk |= has_blk;
}

/* An export activates us before the node that owns us is active */
static void coroutine_fn GRAPH_RDLOCK
guard_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    ReplicationGuard *g = bs->opaque;

    if (g->owner) {
        standby_open_records(g->owner, errp);
    }
}

/* Not registered: nobody but us can make such a node */
static BlockDriver bdrv_replication_guard = {
    .format_name                = "replication-guard",
    .instance_size              = sizeof(ReplicationGuard),

    .bdrv_co_preadv_part        = guard_co_preadv_part,
    .bdrv_co_pwritev_part       = guard_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = guard_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = guard_co_pdiscard,
    .bdrv_co_flush              = guard_co_flush,
    .bdrv_co_truncate           = guard_co_truncate,

    .bdrv_refresh_filename      = guard_refresh_filename,

    .bdrv_gather_child_options  = guard_gather_child_options,

    .bdrv_child_perm            = guard_child_perm,
    .bdrv_check_perm            = guard_check_perm,
    .bdrv_set_perm              = guard_set_perm,
    .bdrv_co_invalidate_cache   = guard_co_invalidate_cache,

    .is_filter                  = true,
};

/* Have @cbw, the filter below @bs, ask us about the active overlay */
static bool guard_attach_active(BlockDriverState *bs, BlockDriverState *cbw,
                                BlockDriverState *active, Error **errp)
{
    ReplicationGuard *g = bs->opaque;
    BlockDriverInfo bdi;
    int ret = bdrv_get_info(active, &bdi);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "failed to get the cluster size of '%s'",
                         bdrv_get_node_name(active));
        return false;
    }
    g->active_cluster_size = bdi.cluster_size;

    /*
     * A child also because no request may come from us when it is drained.  The
     * reference is the child's, or dropped on failure.
     */
    bdrv_ref(active);
    bdrv_graph_wrlock();
    g->active = bdrv_attach_child(bs, active, "active-disk", &child_of_bds,
                                  BDRV_CHILD_DATA, errp);
    bdrv_graph_wrunlock();
    if (!g->active) {
        return false;
    }

    bdrv_cbw_set_needless(cbw, guard_is_covered, bs);
    return true;
}

/* Take away what belongs to our owner */
static void guard_leave_owner(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    bdrv_graph_wrlock();
    if (g->active) {
        bdrv_unref_child(bs, g->active);
        g->active = NULL;
    }
    if (g->metadata) {
        bdrv_unref_child(bs, g->metadata);
        g->metadata = NULL;
    }
    bdrv_graph_wrunlock();
    g->owner = NULL;
}

BdrvChild *replication_guard_attach_metadata(BlockDriverState *bs,
                                             BlockDriverState *metadata,
                                             Error **errp)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();

    bdrv_ref(metadata);
    bdrv_graph_wrlock();
    g->metadata = bdrv_attach_child(bs, metadata, "metadata", &child_of_bds,
                                    BDRV_CHILD_METADATA, errp);
    bdrv_graph_wrunlock();

    return g->metadata;
}

BlockDriverState *replication_guard_insert(BlockDriverState *cbw,
                                           BlockDriverState *active,
                                           BlockDriverState *owner,
                                           const char *name, Error **errp)
{
    BlockDriverState *guard_bs;
    ReplicationGuard *g;

    GLOBAL_STATE_CODE();

    guard_bs = bdrv_new_open_driver(&bdrv_replication_guard, name,
                                    BDRV_O_RDWR | BDRV_O_UNMAP |
                                    (cbw->open_flags & BDRV_O_INACTIVE), errp);
    if (!guard_bs) {
        return NULL;
    }
    replication_pass_flags(guard_bs);
    guard_bs->total_sectors = cbw->total_sectors;
    /* So that we and @cbw can always be dropped */
    guard_bs->never_freeze = true;

    if (bdrv_append(guard_bs, cbw, errp) < 0) {
        bdrv_unref(guard_bs);
        return NULL;
    }

    g = guard_bs->opaque;
    g->owner = owner;
    error_setg(&g->blocker, "node is used by replication node '%s'",
               bdrv_get_node_name(owner));
    /* Others look at the limits under the lock */
    bdrv_graph_wrlock();
    bdrv_refresh_limits(guard_bs, NULL, NULL);
    bdrv_op_block_all(guard_bs, g->blocker);
    bdrv_graph_wrunlock();
    if (!guard_attach_active(guard_bs, cbw, active, errp)) {
        replication_guard_drop(guard_bs);
        return NULL;
    }
    g->in_place = !name;

    return guard_bs;
}

bool replication_guard_watch(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();
    assert(bs->drv == &bdrv_replication_guard);

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    g->had_blk = guard_has_writer(bs);
    g->in_place = g->had_blk;
    g->cut_off = false;
    qatomic_set(&g->error, 0);

    return g->had_blk;
}

void replication_guard_unwatch(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();
    assert(bs->drv == &bdrv_replication_guard);

    g->in_place = false;
}

int replication_guard_error(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    assert(bs->drv == &bdrv_replication_guard);

    return qatomic_read(&g->error);
}

bool replication_guard_is_cut_off(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();
    assert(bs->drv == &bdrv_replication_guard);

    return g->cut_off;
}

void replication_guard_drop(BlockDriverState *bs)
{
    Error *local_err = NULL;

    GLOBAL_STATE_CODE();

    bdrv_graph_rdlock_main_loop();
    guard_unblock(bs);
    bdrv_graph_rdunlock_main_loop();
    guard_leave_owner(bs);

    /* If it has to stay, it lets everything pass */
    if (!guard_is_fence(bs) && bdrv_drop_filter(bs, &local_err) < 0) {
        warn_reportf_err(local_err, "Node '%s' stays in the graph: ",
                         bdrv_get_node_name(bs));
    }
    bdrv_unref(bs);
}

void replication_guard_fence(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();
    assert(qatomic_read(&bs->quiesce_counter) > 0);

    guard_leave_owner(bs);
    g->fence = true;
    g->in_place = true;

    /* The disk is for others to write to.  Giving up can only succeed. */
    bdrv_graph_rdlock_main_loop();
    bdrv_child_refresh_perms(bs, bs->file, NULL);
    bdrv_graph_rdunlock_main_loop();
}
