/*
 * Block replication: what the files of a secondary share that makes its own
 * overlays
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_STANDBY_H
#define BLOCK_REPLICATION_STANDBY_H

#include "replication-ledger.h"
#include "replication-overlays.h"
#include "replication-secondary.h"

struct ReplicationStandby {
    /* Options */
    bool keep_checkpoint;
    /* Of the primary that the node becomes */
    WriteBehindOptions queue;
    uint64_t timeout_ms;
    uint64_t log_size;

    /*
     * With metadata, else NULL: what the guest changed since the last
     * checkpoint, and what becomes of it at a failover
     */
    ReplicationChanges *changes;
    ReplicationLedger *ledger;
    /* The metadata as the guard has it, before this node is active */
    ReplicationMeta *meta;
    bool has_records;
    CoMutex announce_lock; /* held to read it there */
    bool announced; /* atomic */

    ReplicationOverlays *overlays;

    /* What the primary overwrites is saved, even if the node does not run */
    bool saves; /* atomic */
    /* Something was overwritten that was not saved */
    bool overwritten; /* atomic */
    /* Started on what may be a mixture, unless the primary starts.  BQL. */
    bool mixed;
    /* The guest goes on alone, which the metadata does not say */
    bool unrecorded; /* atomic */
    /* Where the guest wrote past the running node, or NULL.  BQL. */
    char *bypassed;
    /* Does what others ask for who cannot: requests, changes of the graph */
    QEMUBH *bh;

    /* A merge begins when everything is flushed, or fails with this.  BQL. */
    bool prepares_merge;
    bool is_flushed; /* atomic */
    Error *settle_error;
    /* Not while the main loop waits for something, to change the graph */
    QEMUBH *merge_bh;

    /* The node is being closed, and becomes nothing any more */
    bool closing;
};

static inline ReplicationStandby *standby_state(BlockDriverState *bs)
{
    return secondary_state(bs)->standby;
}

/* Then a reference that is dropped would delete it once more */
static inline bool standby_is_being_deleted(BlockDriverState *bs)
{
    return !bs->refcnt;
}

/* replication-standby.c */

bool standby_can_roll_back(BlockDriverState *bs);
void standby_forget_changes(BlockDriverState *bs);
void standby_release(BlockDriverState *bs);
void standby_free(BlockDriverState *bs);

/* replication-standby-failover.c */

bool standby_may_take_over(BlockDriverState *bs, Error **errp);
void standby_failover(BlockDriverState *bs, Error **errp);
void standby_detach(BlockDriverState *bs, Error **errp);

/* Everything is flushed that the merge is going to overwrite: begin it */
void standby_merge_bh(void *opaque);

#endif /* BLOCK_REPLICATION_STANDBY_H */
