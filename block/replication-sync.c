/*
 * Block replication: the job that brings a replica in step, and its commands
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-commands-block-core.h"
#include "block/block-global-state.h"
#include "block/block-io.h"
#include "block/blockjob_int.h"
#include "qemu/job.h"
#include "replication-replica.h"
#include "replication-int.h"

/* How often the job looks how far the node has got */
#define LOOK_EVERY_NS (50 * SCALE_MS)

typedef struct ReplicaSyncJob {
    BlockJob common;
    BlockDriverState *bs;

    /* The node copies for others, too */
    uint64_t copied_before;
} ReplicaSyncJob;

static ReplicaSyncJob *replica_sync_job(Job *job)
{
    return container_of(job, ReplicaSyncJob, common.job);
}

static void replica_sync_tell_progress(ReplicaSyncJob *s)
{
    uint64_t copied, remaining;

    replication_replica_get_progress(s->bs, &copied, &remaining);
    job_progress_update(&s->common.job, copied - s->copied_before);
    job_progress_set_remaining(&s->common.job, remaining);
    s->copied_before = copied;
}

/* Why there is nothing to be brought in step any more, if so */
static int replica_sync_error(ReplicaSyncJob *s)
{
    int error;
    ReplicaState state = replication_replica_state(s->bs, &error);

    return error ?: state == REPLICA_STATE_NONE ? -ECANCELED : 0;
}

static int coroutine_fn replica_sync_run(Job *job, Error **errp)
{
    ReplicaSyncJob *s = replica_sync_job(job);

    while (!job_is_cancelled(job)) {
        int error = replica_sync_error(s);

        replica_sync_tell_progress(s);
        if (error) {
            error_setg_errno(errp, -error, "The replica of replication node "
                             "'%s' could not be brought in step",
                             bdrv_get_node_name(s->bs));
            return error;
        }
        if (replication_replica_co_catch_up(s->bs)) {
            break;
        }
        replication_replica_co_settle(s->bs, false);
        job_sleep_ns(job, LOOK_EVERY_NS);
    }
    while (!job_is_cancelled(job) &&
           !replication_replica_co_settle(s->bs, true)) {
        job_sleep_ns(job, LOOK_EVERY_NS);
    }

    return job_is_cancelled(job) ? -ECANCELED : 0;
}

/* It has been in step, and may be gone before the job could end */
static int replica_sync_prepare(Job *job)
{
    return replica_sync_error(replica_sync_job(job));
}

static bool replica_sync_cancel(Job *job, bool force)
{
    replication_replica_job_cancelled(replica_sync_job(job)->bs);

    return true;
}

static void replica_sync_abort(Job *job)
{
    replication_replica_job_failed(replica_sync_job(job)->bs);
}

static void replica_sync_clean(Job *job)
{
    ReplicaSyncJob *s = replica_sync_job(job);

    replication_replica_job_ended(s->bs);
    bdrv_unref(s->bs);
}

static void coroutine_fn replica_sync_pause(Job *job)
{
    replication_replica_pause(replica_sync_job(job)->bs, true);
}

static void coroutine_fn replica_sync_resume(Job *job)
{
    replication_replica_pause(replica_sync_job(job)->bs, false);
}

static void replica_sync_set_speed(BlockJob *job, int64_t speed)
{
    ReplicaSyncJob *s = container_of(job, ReplicaSyncJob, common);

    /* Called when the job is created, too */
    if (s->bs) {
        replication_replica_set_speed(s->bs, speed);
    }
}

static const BlockJobDriver replica_sync_driver = {
    .job_driver = {
        .instance_size  = sizeof(ReplicaSyncJob),
        .job_type       = JOB_TYPE_REPLICA_SYNC,
        .free           = block_job_free,
        .user_resume    = block_job_user_resume,
        .run            = replica_sync_run,
        .pause          = replica_sync_pause,
        .resume         = replica_sync_resume,
        .prepare        = replica_sync_prepare,
        .cancel         = replica_sync_cancel,
        .abort          = replica_sync_abort,
        .clean          = replica_sync_clean,
    },
    .set_speed          = replica_sync_set_speed,
};

/* The node that holds both disks, if it may change its replica now */
static BlockDriverState *replica_lookup(const char *node_name, Error **errp)
{
    BlockDriverState *bs = bdrv_lookup_bs(node_name, node_name, errp);

    if (bs && !replication_replica_may_change(bs, errp)) {
        return NULL;
    }

    return bs;
}

void qmp_x_block_replica_sync(const char *job_id, const char *node_name,
                              const char *replica, const char *replica_metadata,
                              bool has_sync, BlockReplicaSyncMode sync,
                              bool has_discard_peer, bool discard_peer,
                              bool has_speed,
                              int64_t speed, bool has_auto_finalize,
                              bool auto_finalize, bool has_auto_dismiss,
                              bool auto_dismiss, Error **errp)
{
    BlockDriverState *bs = replica_lookup(node_name, errp);
    ReplicaAttachOptions attach = { .discard_peer = discard_peer };
    ReplicaSyncJob *s;
    uint64_t remaining;
    int flags = JOB_DEFAULT;

    if (!bs) {
        return;
    }
    attach.replica = bdrv_lookup_bs(NULL, replica, errp);
    if (!attach.replica) {
        return;
    }
    if (replica_metadata) {
        attach.metadata = bdrv_lookup_bs(NULL, replica_metadata, errp);
        if (!attach.metadata) {
            return;
        }
    }
    attach.sync = has_sync ? sync :
                  attach.metadata ? BLOCK_REPLICA_SYNC_MODE_AUTO :
                                    BLOCK_REPLICA_SYNC_MODE_FULL;
    if (has_auto_finalize && !auto_finalize) {
        flags |= JOB_MANUAL_FINALIZE;
    }
    if (has_auto_dismiss && !auto_dismiss) {
        flags |= JOB_MANUAL_DISMISS;
    }

    s = block_job_create(job_id, &replica_sync_driver, NULL, bs, 0,
                         BLK_PERM_ALL, has_speed ? speed : 0, flags, NULL, NULL,
                         errp);
    if (!s) {
        return;
    }
    /* It may take long, and a backup does not touch what the job needs */
    bdrv_op_unblock(bs, BLOCK_OP_TYPE_BACKUP_SOURCE, s->common.blocker);
    bdrv_ref(bs);
    if (!replication_replica_attach(bs, &attach, errp)) {
        job_early_fail(&s->common.job);
        bdrv_unref(bs);
        return;
    }
    s->bs = bs;
    replication_replica_get_progress(bs, &s->copied_before, &remaining);
    if (has_speed) {
        replication_replica_set_speed(bs, speed);
    }
    job_start(&s->common.job);
}

void qmp_x_block_replica_detach(const char *node_name, bool has_force,
                                bool force, Error **errp)
{
    BlockDriverState *bs = bdrv_lookup_bs(node_name, node_name, errp);
    const ReplicationRole *role = bs ? replication_role(bs) : NULL;

    if (role && role->detach) {
        role->detach(bs, errp);
    } else if (bs && replication_replica_may_change(bs, errp)) {
        replication_replica_detach(bs, has_force && force);
    }
}
