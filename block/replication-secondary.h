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

/* What only a secondary has that makes its own overlays */
typedef struct ReplicationStandby ReplicationStandby;

/* What says nothing else is protected by the BQL. */
struct ReplicationSecondary {
    /* NULL if we are a standby, which has the other ones */
    char *top_id;
    ReplicationStandby *standby;
    char *guard_name;

    /* Nodes that we write to, and why there are no snapshots of them */
    GSList *written;
    Error *writes_blocker;

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
    /* The filter that saves what is overwritten, if that is not a job's */
    BlockDriverState *cbw;
    ProgressMeter progress;
    /* Above that filter */
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
    /* What was saved, when last seen and up to the checkpoint */
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

/* replication-secondary.c */

/* Parse the options of all secondaries.  secondary_free() is the way back. */
bool secondary_new(BlockDriverState *bs, QemuOpts *opts, Error **errp);
void secondary_free(BlockDriverState *bs);

/* What the roles share */
void GRAPH_RDLOCK secondary_parents_changed(BlockDriverState *bs);
bool GRAPH_RDLOCK secondary_refuse_to_lose_guest(BlockDriverState *bs,
                                                 Error **errp);
/* The guest has written to @node, and that does not come to @bs */
void secondary_bypassed(BlockDriverState *bs, const char *node);
bool secondary_in_sync(BlockDriverState *bs, Error **errp);
bool secondary_checkpoint(BlockDriverState *bs, Error **errp);
void secondary_get_error(BlockDriverState *bs, Error **errp);
void secondary_get_stats(BlockDriverState *bs,
                         BlockStatsSpecificReplication *stats);
int coroutine_fn GRAPH_RDLOCK secondary_co_write(BlockDriverState *bs,
                                                 const WriteRequest *w);
int coroutine_fn GRAPH_RDLOCK secondary_co_flush(BlockDriverState *bs);
void secondary_left_behind(BlockDriverState *bs, int ret);

/* Throw away what the guest has written since the checkpoint */
bool secondary_empty_active(BlockDriverState *bs, Error **errp);

/*
 * replication-standby.c and replication-standby-failover.c.  On another
 * secondary, the functions do nothing.
 */

/*
 * The primary writes to the disk.  Whether what it overwrites is saved, and may
 * as well not be.
 */
bool standby_primary_writes(BlockDriverState *bs);

/* Saving has failed with @ret: do without it, if the primary may go on then */
void standby_give_up_saving(BlockDriverState *bs, int ret);

/* Whether this is the primary that has announced itself to this node */
bool coroutine_fn GRAPH_RDLOCK standby_co_is_announced(BlockDriverState *bs);

/* Read the metadata, and say there who we are */
bool coroutine_mixed_fn standby_open_records(BlockDriverState *bs,
                                             Error **errp);

/* Whether nothing has to be saved that the primary overwrites */
bool standby_saves_nothing(BlockDriverState *bs);

/* The overlays are empty, or something is left there that is of no use */
void standby_checkpointed(BlockDriverState *bs, bool done);

/* From now on, a crash leaves the overlays to the guest */
int coroutine_mixed_fn standby_keep_overlays(BlockDriverState *bs,
                                             Error **errp);

/*
 * Whether the guest goes on alone, which the metadata does not say yet: writes
 * go to the active overlay, as before the failover
 */
bool standby_is_unrecorded(BlockDriverState *bs);

/* Begin the merge when the overlays are such that it may be interrupted */
void standby_prepare_merge(BlockDriverState *bs);
bool standby_prepares_merge(BlockDriverState *bs);

/* At the end of QEMU, when the main loop does not come to it any more */
void standby_hurry_merge(BlockDriverState *bs);

/* The merge has ended, and @bs may have another role.  Returns its stage. */
ReplicationNodeStage standby_merged(BlockDriverState *bs);

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

/*
 * Take what lies between the active overlay and @disk.  secondary_release() is
 * the way back, on failure too.
 */
bool secondary_take_chain(BlockDriverState *bs, BlockDriverState *disk,
                          Error **errp);

/* Nothing in the overlays is to survive a crash */
void secondary_begin_scratch(BlockDriverState *bs);

/* Whether the data of @bs goes through the host's page cache */
bool GRAPH_RDLOCK secondary_uses_page_cache(BlockDriverState *bs);

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

/* Put it there once, after a failover.  Returns an error until it is. */
int coroutine_fn GRAPH_RDLOCK secondary_settle(BlockDriverState *bs,
                                               Error **errp);

void secondary_failover(BlockDriverState *bs, Error **errp);

/* Begin to merge, or say that it has failed, which takes @err */
bool secondary_start_commit(BlockDriverState *bs, Error **errp);
void secondary_failover_failed(BlockDriverState *bs, Error *err);
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
 * keeps @cbw from copying what @active covers.  With a @name, it is for others
 * to use until it is watched.
 */
BlockDriverState *replication_guard_insert(BlockDriverState *cbw,
                                           BlockDriverState *active,
                                           BlockDriverState *owner,
                                           const char *name, Error **errp);

/*
 * Forget what was, and have nobody come any more until
 * replication_guard_unwatch().  Returns false if there is nobody who can write.
 */
bool replication_guard_watch(BlockDriverState *bs);
void replication_guard_unwatch(BlockDriverState *bs);

/* Have @metadata active when @bs is, until @bs leaves its owner */
BdrvChild *replication_guard_attach_metadata(BlockDriverState *bs,
                                             BlockDriverState *metadata,
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
