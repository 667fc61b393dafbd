/*
 * Block replication: filter above the secondary disk
 *
 * While a secondary runs, the primary writes to the secondary disk past the
 * replication node, through a copy-before-write filter.  This filter on top of
 * that one tells the replication node what it could not know otherwise: that a
 * write of the primary, or saving the pre-image for it, has failed, or that the
 * primary cannot write any more.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-events-block-core.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/module.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "replication-int.h"

typedef struct ReplicationGuard {
    /* Node name of the replication node that inserted us */
    char *owner;

    /* The first failure: a negative errno, or 0.  Atomic operations. */
    int error;

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
                     "secondary disk failed: %s", g->owner, strerror(-ret));
        qapi_event_send_replication_error(
            g->owner, REPLICATION_ERROR_REASON_SECONDARY_WRITE, strerror(-ret));
    }

    return ret;
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

/* Called whenever a parent comes or goes */
static void GRAPH_RDLOCK
guard_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    ReplicationGuard *g = bs->opaque;
    bool has_blk = bdrv_has_blk(bs);

    GLOBAL_STATE_CODE();

    if (g->had_blk && !has_blk && !g->cut_off) {
        g->cut_off = true;
        qapi_event_send_replication_error(
            g->owner, REPLICATION_ERROR_REASON_CUT_OFF,
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

static void guard_close(BlockDriverState *bs)
{
    ReplicationGuard *g = bs->opaque;

    g_free(g->owner);
}

static BlockDriver bdrv_replication_guard = {
    .format_name                = "replication-guard",
    .instance_size              = sizeof(ReplicationGuard),

    .bdrv_open                  = guard_open,
    .bdrv_close                 = guard_close,

    .bdrv_co_preadv_part        = guard_co_preadv_part,
    .bdrv_co_pwritev_part       = guard_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = guard_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = guard_co_pdiscard,
    .bdrv_co_flush              = guard_co_flush,
    .bdrv_co_getlength          = guard_co_getlength,

    .bdrv_refresh_filename      = guard_refresh_filename,

    .bdrv_child_perm            = bdrv_default_perms,
    .bdrv_set_perm              = guard_set_perm,

    .is_filter                  = true,
};

BlockDriverState *replication_guard_insert(BlockDriverState *bs,
                                           const char *owner, Error **errp)
{
    QDict *options = qdict_new();
    BlockDriverState *guard_bs;
    ReplicationGuard *g;

    GLOBAL_STATE_CODE();

    qdict_put_str(options, "driver", bdrv_replication_guard.format_name);
    qdict_put_str(options, "file", bdrv_get_node_name(bs));

    guard_bs = bdrv_insert_node(bs, options, BDRV_O_RDWR | BDRV_O_UNMAP, errp);
    if (guard_bs) {
        g = guard_bs->opaque;
        g->owner = g_strdup(owner);
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
