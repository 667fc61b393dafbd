/*
 * Block replication filter
 *
 * Keeps the disk of a protected VM (the primary) usable on a second host (the
 * secondary), such that both sides agree at every checkpoint.  This file has
 * the options of a node, and what the block layer asks of it.
 *
 * See docs/block-replication.txt, and replication-int.h for what is where.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/util.h"
#include "qemu/main-loop.h"
#include "qemu/cutils.h"
#include "qemu/module.h"
#include "qemu/option.h"
#include "qobject/qdict.h"
#include "replication-int.h"
#include "replication-meta.h"

static QemuOptsList replication_runtime_opts = {
    .name = "replication",
    .head = QTAILQ_HEAD_INITIALIZER(replication_runtime_opts.head),
    .desc = {
        {
            .name = REPLICATION_OPT_MODE,
            .type = QEMU_OPT_STRING,
            .help = "Role of this host: primary or secondary",
        },
        {
            .name = REPLICATION_OPT_TOP_ID,
            .type = QEMU_OPT_STRING,
            .help = "Device or node at the root above this node (secondary)",
        },
        {
            .name = REPLICATION_OPT_REPLICA_NODE_NAME,
            .type = QEMU_OPT_STRING,
            .help = "Name of the node to export to the primary; the node makes "
                    "its own overlays (secondary)",
        },
        {
            .name = REPLICATION_OPT_OVERLAY_DIR,
            .type = QEMU_OPT_STRING,
            .help = "Where it makes them (secondary)",
        },
        {
            .name = REPLICATION_OPT_KEEP_CHECKPOINT,
            .type = QEMU_OPT_BOOL,
            .help = "Whether it keeps what its disk had while that is brought "
                    "in step (secondary)",
        },
        {
            .name = REPLICATION_OPT_WRITE_BEHIND,
            .type = QEMU_OPT_SIZE,
            .help = "Memory for writes that the secondary does not have yet "
                    "(primary)",
        },
        {
            .name = REPLICATION_OPT_WRITE_BEHIND_MS,
            .type = QEMU_OPT_NUMBER,
            .help = "For how many milliseconds of the link writes may be "
                    "waiting (primary)",
        },
        {
            .name = REPLICATION_OPT_REPLICA_TIMEOUT,
            .type = QEMU_OPT_NUMBER,
            .help = "Milliseconds after which a secondary that does nothing is "
                    "given up, 0 for never (primary)",
        },
        {
            .name = REPLICATION_OPT_LOG_SIZE,
            .type = QEMU_OPT_SIZE,
            .help = "How much may be copied again for nothing after a crash "
                    "(primary with metadata)",
        },
        {
            .name = REPLICATION_OPT_MERGE_AT_QUIT,
            .type = QEMU_OPT_NUMBER,
            .help = "Milliseconds that the end of QEMU may wait for a merge "
                    "(secondary)",
        },
        { /* end of list */ }
    },
};

/* Options that only one of the modes has */
static const struct {
    const char *name;
    ReplicationMode mode;
} replication_mode_opts[] = {
    { REPLICATION_OPT_TOP_ID,       REPLICATION_MODE_SECONDARY },
    { REPLICATION_OPT_REPLICA_NODE_NAME, REPLICATION_MODE_SECONDARY },
    { REPLICATION_OPT_OVERLAY_DIR, REPLICATION_MODE_SECONDARY },
    { REPLICATION_OPT_KEEP_CHECKPOINT, REPLICATION_MODE_SECONDARY },
    { REPLICATION_OPT_WRITE_BEHIND, REPLICATION_MODE_PRIMARY },
    { REPLICATION_OPT_WRITE_BEHIND_MS, REPLICATION_MODE_PRIMARY },
    { REPLICATION_OPT_REPLICA_TIMEOUT, REPLICATION_MODE_PRIMARY },
    { REPLICATION_OPT_LOG_SIZE,     REPLICATION_MODE_PRIMARY },
    { REPLICATION_OPT_MERGE_AT_QUIT, REPLICATION_MODE_SECONDARY },
};

/* Whether a read gives the guest's data */
static bool replication_can_read(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return replication_allows(bs, REPLICATION_OP_READ) &&
           (!s->role->has_data || s->role->has_data(bs));
}

static int coroutine_fn GRAPH_RDLOCK
replication_do_read(BlockDriverState *bs, int64_t offset, int64_t bytes,
                    QEMUIOVector *qiov, size_t qiov_offset,
                    BdrvRequestFlags flags)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    if (s->role->co_await_writes && replication_can_read(bs)) {
        s->role->co_await_writes(bs, offset, bytes);
    }
    /* Again, because of what has become of them */
    if (!replication_can_read(bs)) {
        return -EIO;
    }

    ret = bdrv_co_preadv_part(bs->file, offset, bytes, qiov, qiov_offset,
                              flags);
    if (ret < 0 && s->role->co_read_failed) {
        ret = s->role->co_read_failed(bs, offset, bytes, qiov, qiov_offset,
                                      flags, ret);
    }

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
replication_co_preadv_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                           QEMUIOVector *qiov, size_t qiov_offset,
                           BdrvRequestFlags flags)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    qatomic_inc(&s->requests);
    ret = replication_do_read(bs, offset, bytes, qiov, qiov_offset, flags);
    qatomic_inc(&s->requests_done);

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
replication_co_block_status(BlockDriverState *bs, bool want_zero,
                            int64_t offset, int64_t bytes, int64_t *pnum,
                            int64_t *map, BlockDriverState **file)
{
    BDRVReplicationState *s = bs->opaque;

    *pnum = bytes;

    /*
     * Whoever was told that there are zeroes would not try to read.  Do not
     * wait for writes: quorum asks all children before a read of only one.
     */
    if (!replication_can_read(bs) ||
        (s->role->has_pending_writes &&
         s->role->has_pending_writes(bs, offset, bytes))) {
        return BDRV_BLOCK_DATA;
    }

    *map = offset;
    *file = bs->file->bs;
    return BDRV_BLOCK_RAW | BDRV_BLOCK_OFFSET_VALID;
}

static int coroutine_fn GRAPH_RDLOCK
replication_do_write(BlockDriverState *bs, const WriteRequest *w)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    qatomic_inc(&s->requests);
    ret = s->role->co_write(bs, w);
    qatomic_inc(&s->requests_done);

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
replication_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
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

    return replication_do_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK
replication_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset,
                             int64_t bytes, BdrvRequestFlags flags)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_ZEROES,
        .flags          = flags,
        .offset         = offset,
        .bytes          = bytes,
    };

    return replication_do_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK
replication_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_DISCARD,
        .offset         = offset,
        .bytes          = bytes,
    };

    return replication_do_write(bs, &w);
}

static int coroutine_fn GRAPH_RDLOCK replication_co_flush(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return s->role->co_flush(bs);
}

/* A guest that has nothing else needs to read what it writes */
static bool GRAPH_RDLOCK replication_can_rely_on(BlockDriverState *bs)
{
    return replication_can_read(bs);
}

static void GRAPH_RDLOCK replication_rely_on(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    qatomic_set(&s->relied_on, true);
}

static void GRAPH_RDLOCK replication_leave_behind(BlockDriverState *bs, int ret)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->left_behind) {
        s->role->left_behind(bs, ret);
    }
}

static void replication_drain_begin(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->drain_begin) {
        s->role->drain_begin(bs);
    }
}

static void replication_drain_end(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->drain_end) {
        s->role->drain_end(bs);
    }
}

static int64_t coroutine_fn GRAPH_RDLOCK
replication_co_getlength(BlockDriverState *bs)
{
    return bdrv_co_getlength(bs->file->bs);
}

/*
 * While a node is in use on both sides, a new length here would be another one
 * than there, and than that of the nodes below.
 */
static int coroutine_fn GRAPH_RDLOCK
replication_co_truncate(BlockDriverState *bs, int64_t offset, bool exact,
                        PreallocMode prealloc, BdrvRequestFlags flags,
                        Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    if (!replication_allows(bs, REPLICATION_OP_RESIZE)) {
        error_setg(errp, "Cannot resize replication node '%s' while it "
                   "replicates", bdrv_get_node_name(bs));
        error_append_hint(errp, "Stop replication, resize the disk on both "
                          "sides, resynchronise it and start again.\n");
        return -EBUSY;
    }
    if (s->role->may_resize && !s->role->may_resize(bs, offset, errp)) {
        return -EBUSY;
    }

    /* What was written where the disk ends now must not end up beyond it */
    if (s->role->co_await_writes) {
        s->role->co_await_writes(bs, 0, BDRV_MAX_LENGTH);
    }

    ret = bdrv_co_truncate(bs->file, offset, exact, prealloc, flags, errp);
    if (ret == 0 && s->role->resized) {
        /* What it is, which may be more if a part could not be cut off */
        s->role->resized(bs, MAX(bdrv_co_getlength(bs->file->bs), 0));
    }

    return ret;
}

/*
 * Otherwise the block layer would close the node and open it again, and it
 * would have forgotten its stage.  A snapshot may have another length.
 */
static int replication_snapshot_goto(BlockDriverState *bs,
                                     const char *snapshot_id)
{
    BlockDriverState *child_bs;
    Error *local_err = NULL;
    BDRVReplicationState *s = bs->opaque;
    int ret;

    GLOBAL_STATE_CODE();

    if (!replication_allows(bs, REPLICATION_OP_RESIZE) ||
        (s->role->may_resize && !s->role->may_resize(bs, -1, NULL))) {
        return -EBUSY;
    }

    bdrv_graph_rdlock_main_loop();
    child_bs = bs->file->bs;
    bdrv_graph_rdunlock_main_loop();

    ret = bdrv_snapshot_goto(child_bs, snapshot_id, &local_err);
    if (ret < 0) {
        error_report_err(local_err);
    } else if (s->role->resized) {
        /* All of the disk is another one */
        s->role->resized(bs, MAX(bdrv_getlength(bs), 0));
    }

    return ret;
}

/* As for any filter, but it says that other children may have the data, too */
static bool GRAPH_RDLOCK
replication_recurse_can_replace(BlockDriverState *bs,
                                BlockDriverState *to_replace)
{
    return bdrv_recurse_can_replace(bs->file->bs, to_replace);
}

/* Others come and go with start and stop, and are no options */
static void GRAPH_RDLOCK
replication_gather_child_options(BlockDriverState *bs, QDict *target,
                                 bool backing_overridden)
{
    BDRVReplicationState *s = bs->opaque;
    BdrvChild *c;

    if (s->role->holds_disk) {
        qdict_put_null(target, REPLICATION_OPT_REPLICA);
    }
    QLIST_FOREACH(c, &bs->children, next) {
        if (c == bs->file || !strcmp(c->name, REPLICATION_OPT_METADATA) ||
            !strcmp(c->name, REPLICATION_OPT_REPLICA)) {
            qdict_put(target, c->name, qobject_ref(c->bs->full_open_options));
        }
    }
}

static void GRAPH_RDLOCK
replication_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
                       BlockReopenQueue *reopen_queue,
                       uint64_t perm, uint64_t shared,
                       uint64_t *nperm, uint64_t *nshared)
{
    BDRVReplicationState *s = bs->opaque;

    if (role & BDRV_CHILD_METADATA) {
        /* Each side writes to a part of its own, and to that of the other */
        *nperm = bs->open_flags & BDRV_O_INACTIVE ?
                 0 : BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE;
        *nshared = BLK_PERM_ALL & ~BLK_PERM_RESIZE;
        return;
    }
    s->role->child_perm(bs, c, role, reopen_queue, perm, shared, nperm,
                        nshared);
}

static int GRAPH_RDLOCK
replication_check_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared,
                       Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    return s->role->check_parents(bs, errp) ? 0 : -EBUSY;
}

/* Of all changes of the graph above, these callbacks hear */
static void GRAPH_RDLOCK
replication_set_perm(BlockDriverState *bs, uint64_t perm, uint64_t shared)
{
    BDRVReplicationState *s = bs->opaque;

    replication_update_place(bs);
    if (s->role->parents_changed) {
        s->role->parents_changed(bs);
    }
}

static void coroutine_fn GRAPH_RDLOCK
replication_co_invalidate_cache(BlockDriverState *bs, Error **errp)
{
    BDRVReplicationState *s = bs->opaque;

    if (s->role->co_activated) {
        s->role->co_activated(bs, errp);
    }
}

/* Called before the node is marked inactive, unlike its permission callbacks */
static int GRAPH_RDLOCK replication_inactivate(BlockDriverState *bs)
{
    return replication_allows(bs, REPLICATION_OP_INACTIVATE) ? 0 : -EBUSY;
}

/* Whether there is such a child, by name or by options of its own, or null */
static bool replication_has_child_opt(QDict *options, const char *name)
{
    const QDictEntry *e;
    const char *rest;

    for (e = qdict_first(options); e; e = qdict_next(options, e)) {
        if (strstart(qdict_entry_key(e), name, &rest) &&
            (!*rest || *rest == '.')) {
            return true;
        }
    }

    return false;
}

/* A secondary that makes its own overlays, and is going to be a primary */
static bool replication_is_standby(ReplicationMode mode, QemuOpts *opts)
{
    return mode == REPLICATION_MODE_SECONDARY &&
           qemu_opt_get(opts, REPLICATION_OPT_REPLICA_NODE_NAME);
}

static bool replication_check_standby_opts(QemuOpts *opts, Error **errp)
{
    const char *const names[] = {
        REPLICATION_OPT_OVERLAY_DIR,
        REPLICATION_OPT_KEEP_CHECKPOINT,
    };

    for (int i = 0; i < ARRAY_SIZE(names); i++) {
        if (qemu_opt_get(opts, names[i])) {
            error_setg(errp, "Parameter '%s' is only for a secondary with '"
                       REPLICATION_OPT_REPLICA_NODE_NAME "'", names[i]);
            return false;
        }
    }

    return true;
}

static bool replication_check_mode_opts(ReplicationMode mode, QemuOpts *opts,
                                        QDict *options, Error **errp)
{
    bool is_standby = replication_is_standby(mode, opts);

    for (int i = 0; i < ARRAY_SIZE(replication_mode_opts); i++) {
        const char *name = replication_mode_opts[i].name;
        ReplicationMode wanted = replication_mode_opts[i].mode;

        if (mode != wanted && !is_standby && qemu_opt_get(opts, name)) {
            error_setg(errp, "Parameter '%s' is only for %s mode", name,
                       ReplicationMode_str(wanted));
            return false;
        }
    }
    if (mode == REPLICATION_MODE_SECONDARY &&
        replication_has_child_opt(options, REPLICATION_OPT_REPLICA)) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_REPLICA "' is only for "
                   "primary mode");
        return false;
    }

    return is_standby || replication_check_standby_opts(opts, errp);
}

/* What @options are left are for the children */
static const ReplicationRole *
replication_choose_role(ReplicationMode mode, QemuOpts *opts, QDict *options)
{
    if (replication_is_standby(mode, opts)) {
        return &replication_standby_role;
    }
    if (mode == REPLICATION_MODE_SECONDARY) {
        return &replication_secondary_role;
    }

    return replication_has_child_opt(options, REPLICATION_OPT_REPLICA) ?
           &replication_holder_role : &replication_primary_role;
}

static bool replication_check_metadata_opts(BlockDriverState *bs,
                                            QemuOpts *opts, QDict *options,
                                            Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    bool metadata = replication_has_child_opt(options,
                                              REPLICATION_OPT_METADATA);

    if (metadata && !s->role->has_metadata) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_METADATA "' is only for "
                   "a primary with the parameter '" REPLICATION_OPT_REPLICA
                   "', or a secondary with '"
                   REPLICATION_OPT_REPLICA_NODE_NAME "'");
        return false;
    }
    if (!metadata && qemu_opt_get(opts, REPLICATION_OPT_LOG_SIZE)) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_LOG_SIZE "' needs the "
                   "parameter '" REPLICATION_OPT_METADATA "'");
        return false;
    }

    return true;
}

/* Parse our options into @bs.  On failure nothing is left allocated. */
static int replication_parse_options(BlockDriverState *bs, QDict *options,
                                     Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;
    QemuOpts *opts = qemu_opts_create(&replication_runtime_opts, NULL, 0,
                                      &error_abort);
    const char *mode;
    int ret = -EINVAL;

    if (!qemu_opts_absorb_qdict(opts, options, errp)) {
        goto out;
    }

    mode = qemu_opt_get(opts, REPLICATION_OPT_MODE);
    if (!mode) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_MODE "' is missing");
        error_append_hint(errp, "It is 'primary' or 'secondary'.\n");
        goto out;
    }
    s->mode = qapi_enum_parse(&ReplicationMode_lookup, mode, -1, NULL);
    if (s->mode == -1) {
        error_setg(errp, "Parameter '" REPLICATION_OPT_MODE "' expects "
                   "'primary' or 'secondary', not '%s'", mode);
        goto out;
    }

    if (!replication_check_mode_opts(s->mode, opts, options, errp)) {
        goto out;
    }

    s->role = replication_choose_role(s->mode, opts, options);
    if (!replication_check_metadata_opts(bs, opts, options, errp)) {
        goto out;
    }
    replication_pass_flags(bs);
    if (!s->role->init(bs, opts, errp)) {
        goto out;
    }
    s->stage_time_ns = replication_time_ns();
    qemu_mutex_init(&s->error_lock);
    ret = 0;

out:
    qemu_opts_del(opts);
    return ret;
}

static void replication_cleanup(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    s->role->cleanup(bs);
    replication_unfreeze_below(s->meta_frozen);
    replication_meta_free(s->meta);
    replication_set_error(bs, NULL);
    replication_forget_first_error(bs);
    qapi_free_BlockStatsReplicationCause(s->replica_lost);
    g_free(s->top_node);
    g_free(s->device);
    qemu_mutex_destroy(&s->error_lock);
}

static bool GRAPH_RDLOCK replication_same_image(BlockDriverState *a,
                                                BlockDriverState *b)
{
    bdrv_refresh_filename(a);
    bdrv_refresh_filename(b);

    return a == b || (*a->filename && !strcmp(a->filename, b->filename));
}

/*
 * One log for two disks would lose bits of both.  Permissions do not tell: who
 * exports the metadata to the peer writes to it as well.
 */
static bool GRAPH_RDLOCK
replication_check_metadata(BlockDriverState *bs, BlockDriverState *metadata,
                           Error **errp)
{
    BlockDriverState *other = NULL;

    if (replication_same_image(bs->file->bs, metadata)) {
        error_setg(errp, "Metadata '%s' of replication node '%s' is its disk",
                   bdrv_get_node_name(metadata), bdrv_get_node_name(bs));
        error_append_hint(errp, "Have a file of its own for it.\n");
        return false;
    }
    while ((other = bdrv_next_all_states(other))) {
        BDRVReplicationState *o = other->opaque;

        if (other == bs || other->drv != bs->drv || !o->meta ||
            !replication_same_image(replication_meta_child(o->meta)->bs,
                                    metadata)) {
            continue;
        }
        error_setg(errp, "Metadata '%s' of replication node '%s' is that of "
                   "replication node '%s'", bdrv_get_node_name(metadata),
                   bdrv_get_node_name(bs), bdrv_get_node_name(other));
        error_append_hint(errp, "Each disk needs metadata of its own.\n");
        return false;
    }

    return true;
}

static bool replication_open_metadata(BlockDriverState *bs, QDict *options,
                                      Error **errp)
{
    ERRP_GUARD();
    BDRVReplicationState *s = bs->opaque;
    BdrvChild *child;

    if (!replication_has_child_opt(options, REPLICATION_OPT_METADATA)) {
        return true;
    }
    child = bdrv_open_child(NULL, options, REPLICATION_OPT_METADATA, bs,
                            &child_of_bds, BDRV_CHILD_METADATA, false, errp);
    if (!child) {
        error_prepend(errp, "Replication node '%s' cannot use its metadata: ",
                      bdrv_get_node_name(bs));
        return false;
    }

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (!replication_check_metadata(bs, child->bs, errp)) {
        return false;
    }
    s->meta = replication_meta_new(bs, child);
    bdrv_freeze_child(child);
    s->meta_frozen = replication_freeze_below(child->bs,
                                              g_slist_prepend(NULL, child));

    return true;
}

static int replication_open(BlockDriverState *bs, QDict *options, int flags,
                            Error **errp)
{
    BDRVReplicationState *s = bs->opaque;
    int ret;

    GLOBAL_STATE_CODE();

    ret = replication_parse_options(bs, options, errp);
    if (ret < 0) {
        return ret;
    }

    ret = bdrv_open_file_child(NULL, options, "file", bs, errp);
    if (ret < 0) {
        replication_cleanup(bs);
        return ret;
    }

    bs->supported_truncate_flags = BDRV_REQ_ZERO_WRITE;

    if (s->mode == REPLICATION_MODE_PRIMARY && bdrv_is_read_only(bs)) {
        error_setg(errp, "Replication node '%s' is read-only, and a primary "
                   "forwards what is written", bdrv_get_node_name(bs));
        error_append_hint(errp, "Open it with read-only=off.\n");
        replication_cleanup(bs);
        return -EINVAL;
    }
    if (!replication_open_metadata(bs, options, errp) ||
        (s->role->opened && !s->role->opened(bs, options, errp))) {
        replication_cleanup(bs);
        return -EINVAL;
    }
    s->rs = replication_new(bs, &replication_ops);
    return 0;
}

static void replication_close(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    GLOBAL_STATE_CODE();

    replication_remove(s->rs);
    replication_release(bs);
    replication_cleanup(bs);
}

static const char *const replication_strong_runtime_opts[] = {
    REPLICATION_OPT_MODE,
    REPLICATION_OPT_TOP_ID,
    REPLICATION_OPT_WRITE_BEHIND,
    REPLICATION_OPT_WRITE_BEHIND_MS,
    REPLICATION_OPT_REPLICA_TIMEOUT,
    REPLICATION_OPT_LOG_SIZE,
    REPLICATION_OPT_MERGE_AT_QUIT,
    REPLICATION_OPT_REPLICA_NODE_NAME,
    REPLICATION_OPT_OVERLAY_DIR,
    REPLICATION_OPT_KEEP_CHECKPOINT,

    NULL
};

static BlockDriver bdrv_replication = {
    .format_name                = "replication",
    .instance_size              = sizeof(BDRVReplicationState),

    .bdrv_open                  = replication_open,
    .bdrv_close                 = replication_close,

    .bdrv_co_preadv_part        = replication_co_preadv_part,
    .bdrv_co_pwritev_part       = replication_co_pwritev_part,
    .bdrv_co_pwrite_zeroes      = replication_co_pwrite_zeroes,
    .bdrv_co_pdiscard           = replication_co_pdiscard,
    .bdrv_co_flush              = replication_co_flush,
    .bdrv_co_block_status       = replication_co_block_status,
    .bdrv_co_getlength          = replication_co_getlength,
    .bdrv_co_truncate           = replication_co_truncate,
    .bdrv_snapshot_goto         = replication_snapshot_goto,
    .bdrv_recurse_can_replace   = replication_recurse_can_replace,

    .bdrv_rely_on               = replication_rely_on,
    .bdrv_leave_behind          = replication_leave_behind,

    .bdrv_drain_begin           = replication_drain_begin,
    .bdrv_drain_end             = replication_drain_end,

    .bdrv_get_specific_stats    = replication_get_specific_stats,

    .bdrv_gather_child_options  = replication_gather_child_options,

    .bdrv_child_perm            = replication_child_perm,
    .bdrv_check_perm            = replication_check_perm,
    .bdrv_set_perm              = replication_set_perm,
    .bdrv_inactivate            = replication_inactivate,
    .bdrv_co_invalidate_cache   = replication_co_invalidate_cache,

    .bdrv_can_rely_on           = replication_can_rely_on,

    .is_filter                  = true,
    .strong_runtime_opts        = replication_strong_runtime_opts,
};

static void bdrv_replication_init(void)
{
    bdrv_register(&bdrv_replication);
}

block_init(bdrv_replication_init);
