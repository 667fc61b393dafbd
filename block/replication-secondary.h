/*
 * Block replication: what the files of the secondary side share
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_SECONDARY_H
#define BLOCK_REPLICATION_SECONDARY_H

#include "block/blockjob.h"
#include "qemu/stats64.h"
#include "replication-above.h"
#include "replication-int.h"

/* What says nothing else is protected by the BQL. */
struct ReplicationSecondary {
    char *top_id;
    /* For how long the end of QEMU may wait for a merge */
    uint64_t merge_at_quit_ms;

    /*
     * What start takes and secondary_release() gives back.  Each is NULL or
     * false while we do not have it.
     */
    BdrvChild *hidden;
    BdrvChild *disk;
    bool hidden_was_ro;
    bool disk_was_ro;
    /*
     * The active overlay, referenced, while it and the hidden one can be
     * emptied and nobody else may write to them
     */
    BlockDriverState *active;
    Error *active_blocker;
    /* The links from this node to the secondary disk are frozen */
    bool frozen;
    /* And those from the overlays and the disk to what they are stored in */
    GSList *frozen_below;
    /* Referenced, because a node must not go away with op blockers on it */
    BlockDriverState *top;
    Error *top_blocker;
    /* What stands above, as long as we have @top */
    ReplicationAbove *above;
    BlockJob *backup_job;
    /* Above the filter of @backup_job */
    BlockDriverState *guard;
    BlockJob *commit_job;
    /* Nodes that we have made scratch, referenced */
    GSList *scratch;

    /* Something of the guest is elsewhere.  Atomic. */
    bool left_behind;

    /* We are ending @backup_job ourselves */
    bool ending_backup;
    /* From a failover on: nobody else may write to the overlays */
    bool exclusive;
    /* We write to the disk, and nobody else: only in stage FAILOVER_FAILED */
    bool writes_disk;

    /* Bytes that the guest wrote since the active overlay was emptied */
    Stat64 active_bytes;
    /* What @backup_job has copied, when last seen and up to the checkpoint */
    uint64_t copied;
    uint64_t copied_before;

    /* How far the merge has got, when it began, and when it ended or 0 */
    bool has_failed_over;
    uint64_t merged;
    uint64_t to_merge;
    int64_t failover_begin_ns;
    int64_t failover_end_ns;

    /*
     * What the guest and the primary have flushed before the failover may not
     * be on the disk yet.  Cleared by requests under @settle_lock, apart from
     * that changed while the node is drained.  Accessed with atomic operations.
     */
    bool unsettled;
    CoMutex settle_lock;
    /* The first failure to settle: a negative errno, or 0.  Also atomic. */
    int settle_error;

    /* Serialises the guest's writes in stage FAILOVER_FAILED */
    CoMutex split_lock;
};

static inline ReplicationSecondary *secondary_state(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return s->secondary;
}

/* The nodes of the chain as it is now */

static inline GRAPH_RDLOCK BlockDriverState *
secondary_active(BlockDriverState *bs)
{
    return bs->file->bs;
}

static inline GRAPH_RDLOCK BlockDriverState *
secondary_hidden(BlockDriverState *bs)
{
    return child_bs(secondary_active(bs)->backing);
}

static inline GRAPH_RDLOCK BlockDriverState *
secondary_disk(BlockDriverState *bs)
{
    return child_bs(secondary_hidden(bs)->backing);
}

/* replication-secondary-take.c */

void secondary_child_perm(BlockDriverState *bs, BdrvChild *c,
                          BdrvChildRole role, BlockReopenQueue *reopen_queue,
                          uint64_t perm, uint64_t shared,
                          uint64_t *nperm, uint64_t *nshared);

/* Have a change of what secondary_child_perm() says take effect */
bool secondary_refresh_perms(BlockDriverState *bs, BdrvChild *child);

/* Whether what is written to @top gets to @bs: not through an overlay */
bool GRAPH_RDLOCK secondary_is_below(BlockDriverState *bs,
                                     BlockDriverState *top);

/* Take all that is needed to run, or nothing */
bool secondary_start(BlockDriverState *bs, Error **errp);

/* Take what is needed to empty the overlays */
bool secondary_take_overlays(BlockDriverState *bs, Error **errp);

bool secondary_freeze(BlockDriverState *bs, Error **errp);

/* What the backup job has copied since start, also after its end */
uint64_t secondary_copied_bytes(BlockDriverState *bs);

/* Count what the guest wrote to the active overlay */
void secondary_count_write(BlockDriverState *bs, const WriteRequest *w);

/* The overlays have nothing */
void secondary_count_anew(BlockDriverState *bs);

/* The primary goes on writing to the disk, and nothing is saved */
void secondary_end_backup(BlockDriverState *bs);

/* What is flushed from now on is meant to survive a crash */
void secondary_end_scratch(BlockDriverState *bs);

/* Give back what is of use only while there is a primary, which is kept out */
bool secondary_part_from_primary(BlockDriverState *bs, Error **errp);

/* The way back from every state, complete or half-done */
void secondary_release(BlockDriverState *bs);

/* replication-secondary-merge.c */

/* Put everything on the disk that the guest sees */
int GRAPH_RDLOCK secondary_flush(BlockDriverState *bs, BlockDriverState *hidden,
                                 BlockDriverState *disk);

void secondary_failover(BlockDriverState *bs, Error **errp);
void secondary_finish(BlockDriverState *bs, int64_t quit_ns);

/* Requests in the stages FAILOVER and FAILOVER_FAILED */
int coroutine_fn GRAPH_RDLOCK
secondary_merge_co_write(BlockDriverState *bs, const WriteRequest *w);
int coroutine_fn GRAPH_RDLOCK secondary_merge_co_flush(BlockDriverState *bs);

void secondary_merge_get_stats(BlockDriverState *bs,
                               BlockStatsReplicationSecondary *stats);

/* replication-guard.c */

/*
 * Insert a filter above the copy-before-write filter @cbw that remembers failed
 * writes, for the replication node @owner, which has to outlive it.  It also
 * keeps @cbw from copying what @active covers.
 */
BlockDriverState *replication_guard_insert(BlockDriverState *cbw,
                                           BlockDriverState *active,
                                           BlockDriverState *owner,
                                           Error **errp);

/* The first failure of a write that came through: a negative errno, or 0 */
int replication_guard_error(BlockDriverState *bs);

/* Whether the last user above @bs that could write has gone */
bool replication_guard_is_cut_off(BlockDriverState *bs);

/* Take the filter out of the graph and delete it.  A fence stays in place. */
void replication_guard_drop(BlockDriverState *bs);

/*
 * Leave the filter to those above it, as a fence that refuses all that would
 * change the disk, and does not hold the permission to.  The caller has drained
 * it, and drops its reference when it has no child that leads there any more.
 */
void replication_guard_fence(BlockDriverState *bs);

#endif /* BLOCK_REPLICATION_SECONDARY_H */
