/*
 * Block replication: filter above the secondary disk
 *
 * While a secondary runs, the primary writes to the secondary disk past the
 * replication node, through a copy-before-write filter.  This filter on top of
 * that one tells the replication node what it could not know otherwise: that a
 * write of the primary, or saving the pre-image for it, has failed, or that the
 * primary cannot write any more.  And it tells the copy-before-write filter
 * what that could not know: where the active overlay hides the disk.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "copy-before-write.h"
#include "replication-int.h"

typedef struct ReplicationGuard {
    /* The replication node that inserted us */
    BlockDriverState *owner;

    /* The first failure: a negative errno, or 0.  Atomic operations. */
    int error;

    /* The active overlay, and what it allocates at once */
    BdrvChild *active;
    uint32_t active_cluster_size;

    /* Whether there was a block backend above us, and is none now.  BQL. */
    bool had_blk;
    bool cut_off;
} ReplicationGuard;

static int guard_result(BlockDriverState *bs, int ret)
{
    ReplicationGuard *g = bs->opaque;

    IO_CODE();

    if (ret < 0 && !qatomic_cmpxchg(&g->error, 0, ret)) {
        error_report("Replication node '%s': a write of the primary to the "
                     "secondary disk failed: %s", bdrv_get_node_name(g->owner),
                     strerror(-ret));
        replication_report_error(g->owner,
                                 REPLICATION_ERROR_REASON_SECONDARY_WRITE, ret,
                                 strerror(-ret));
    }

    return ret;
}

/*
 * Whether the pre-image of @bytes at @offset need not be saved, because the
 * guest finds them in the active overlay.  That stays so until the overlay is
 * emptied: a cluster that the guest discards there becomes one of zeroes.
 *
 * A request that began when they were not yet there may still be reading the
 * disk.  It must not read what the primary is going to write.
 */
static bool coroutine_fn GRAPH_RDLOCK
guard_is_hidden(void *opaque, int64_t offset, int64_t bytes)
{
    BlockDriverState *bs = opaque;
    ReplicationGuard *g = bs->opaque;
    BlockDriverState *active = g->active->bs;
    int64_t end = offset + bytes;
    int64_t pos, n;

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

static int coroutine_fn GRAPH_RDLOCK
guard_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags)
{
    return guard_result(bs, bdrv_co_pwritev_part(bs->file, offset, bytes, qiov,
                                                 qiov_offset, flags));
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       BdrvRequestFlags flags)
{
    int ret = bdrv_co_pwrite_zeroes(bs->file, offset, bytes, flags);

    /* Not a failure: the caller has asked for it, to do without */
    if (ret == -ENOTSUP && (flags & BDRV_REQ_NO_FALLBACK)) {
        return ret;
    }

    return guard_result(bs, ret);
}

static int coroutine_fn GRAPH_RDLOCK
guard_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    return guard_result(bs, bdrv_co_pdiscard(bs->file, offset, bytes));
}

static int coroutine_fn GRAPH_RDLOCK guard_co_flush(BlockDriverState *bs)
{
    return guard_result(bs, bdrv_co_flush(bs->file->bs));
}

static int64_t coroutine_fn GRAPH_RDLOCK
guard_co_getlength(BlockDriverState *bs)
{
    return bdrv_co_getlength(bs->file->bs);
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
    if (!(role & BDRV_CHILD_FILTERED)) {
        /* Only asked where it is allocated */
        *nperm = 0;
        *nshared = BLK_PERM_ALL;
        return;
    }

    bdrv_default_perms(bs, c, role, reopen_queue, perm, shared, nperm, nshared);
}

/* Called whenever a parent comes or goes */
static void GRAPH_RDLOCK
guard_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    ReplicationGuard *g = bs->opaque;
    bool has_blk = guard_has_writer(bs);

    GLOBAL_STATE_CODE();

    if (g->had_blk && !has_blk && !g->cut_off) {
        g->cut_off = true;
        replication_report_error(
            g->owner, REPLICATION_ERROR_REASON_CUT_OFF, 0,
            "the export of the secondary disk was removed");
    }
    g->had_blk |= has_blk;
}

static int guard_open(BlockDriverState *bs, QDict *options, int flags,
                      Error **errp)
{
    int ret = bdrv_open_file_child(NULL, options, "file", bs, errp);

    if (ret < 0) {
        return ret;
    }
    replication_pass_flags(bs);

    return 0;
}

static BlockDriver bdrv_replication_guard = {
    .format_name                = "replication-guard",
    .instance_size              = sizeof(ReplicationGuard),

    .bdrv_open                  = guard_open,

    .bdrv_co_preadv_part        = guard_co_preadv_part,
    .bdrv_co_pwritev_part       = guard_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = guard_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = guard_co_pdiscard,
    .bdrv_co_flush              = guard_co_flush,
    .bdrv_co_getlength          = guard_co_getlength,

    .bdrv_refresh_filename      = guard_refresh_filename,

    .bdrv_gather_child_options  = guard_gather_child_options,

    .bdrv_child_perm            = guard_child_perm,
    .bdrv_set_perm              = guard_set_perm,

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

    bdrv_cbw_set_needless(cbw, guard_is_hidden, bs);
    return true;
}

BlockDriverState *replication_guard_insert(BlockDriverState *cbw,
                                           BlockDriverState *active,
                                           BlockDriverState *owner,
                                           Error **errp)
{
    QDict *options = qdict_new();
    BlockDriverState *guard_bs;
    ReplicationGuard *g;

    GLOBAL_STATE_CODE();

    qdict_put_str(options, "driver", bdrv_replication_guard.format_name);
    qdict_put_str(options, "file", bdrv_get_node_name(cbw));

    guard_bs = bdrv_insert_node(cbw, options, BDRV_O_RDWR | BDRV_O_UNMAP, errp);
    if (!guard_bs) {
        return NULL;
    }

    g = guard_bs->opaque;
    g->owner = owner;
    if (!guard_attach_active(guard_bs, cbw, active, errp)) {
        replication_guard_drop(guard_bs);
        return NULL;
    }

    return guard_bs;
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
    ReplicationGuard *g = bs->opaque;

    GLOBAL_STATE_CODE();

    if (g->active) {
        bdrv_graph_wrlock();
        bdrv_unref_child(bs, g->active);
        bdrv_graph_wrunlock();
        g->active = NULL;
    }

    /* Those above move on to the child: that is no loss */
    g->had_blk = false;
    bdrv_drop_filter(bs, &error_abort);
    bdrv_unref(bs);
}

static void bdrv_replication_guard_init(void)
{
    bdrv_register(&bdrv_replication_guard);
}

block_init(bdrv_replication_guard_init);
