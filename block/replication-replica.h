/*
 * Block replication: the replica of a node that holds both disks, for the job
 * that brings it in step
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_REPLICA_H
#define BLOCK_REPLICATION_REPLICA_H

#include "block/block-common.h"
#include "qapi/qapi-types-block-core.h"

/* Whether it may be attached or detached: @bs holds its disk, and rests */
bool replication_replica_may_change(BlockDriverState *bs, Error **errp);

/* See x-block-replica-sync */
typedef struct ReplicaAttachOptions {
    BlockDriverState *replica;
    /* The way to the metadata of that, or NULL */
    BlockDriverState *metadata;
    BlockReplicaSyncMode sync;
    bool discard_peer;
} ReplicaAttachOptions;

/* Attach a replica, and begin to copy what it lacks */
bool replication_replica_attach(BlockDriverState *bs,
                                const ReplicaAttachOptions *opts, Error **errp);

/* Let go of the replica, if there is one, and with @force do not wait for it */
void replication_replica_detach(BlockDriverState *bs, bool force);

/* Whatever the job waits for need not arrive any more */
void replication_replica_job_cancelled(BlockDriverState *bs);

/* Let go of the replica, unless the node runs already */
void replication_replica_job_failed(BlockDriverState *bs);

/* To be called once for each replica that was attached */
void replication_replica_job_ended(BlockDriverState *bs);

/* @error is a negative errno if copying ended before it was done, else 0 */
ReplicaState replication_replica_state(BlockDriverState *bs, int *error);

/* Bytes that were copied since the node was opened, and are lacking */
void replication_replica_get_progress(BlockDriverState *bs, uint64_t *copied,
                                      uint64_t *remaining);

/*
 * If nothing is lacking any more, wait until it has arrived and is flushed, and
 * say so
 */
bool coroutine_fn replication_replica_co_catch_up(BlockDriverState *bs);

/*
 * Have what the replica got so far, and what the guest has written, not copied
 * again after a crash: every ten seconds, or @now.  Returns whether that is
 * done; if not, it is to be called again.
 */
bool coroutine_fn replication_replica_co_settle(BlockDriverState *bs, bool now);

/* Bytes per second, or 0 for no limit */
void replication_replica_set_speed(BlockDriverState *bs, int64_t speed);
void replication_replica_pause(BlockDriverState *bs, bool pause);

#endif /* BLOCK_REPLICATION_REPLICA_H */
