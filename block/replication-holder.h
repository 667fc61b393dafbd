/*
 * Block replication: what the files share of a primary that holds both disks
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_HOLDER_H
#define BLOCK_REPLICATION_HOLDER_H

#include "block/reqlist.h"
#include "qemu/ratelimit.h"
#include "qemu/stats64.h"
#include "system/runstate.h"
#include "replication-above.h"
#include "replication-changes.h"
#include "replication-int.h"
#include "replication-ledger.h"
#include "replication-replica.h"
#include "replication-watch.h"

/* How often a copy to a replica that takes long is made sure of */
#define SETTLE_NS (10 * NANOSECONDS_PER_SECOND)

/* Writes and copies, in the order in which they have locked their ranges */
typedef struct HolderRange {
    BlockReq req;
    uint64_t number;
} HolderRange;

struct ReplicationHolder {
    WriteBehindOptions queue_options;
    uint64_t timeout_ms;

    /* What changed, and what the replica lacks of that */
    ReplicationChanges *changes;

    /* What is known of that after a crash; NULL without metadata */
    ReplicationLedger *ledger;
    uint64_t log_size;

    /* Where writes and copies are under way that must not overlap */
    CoMutex ranges_lock;
    BlockReqList ranges;
    uint64_t nb_ranges;
    /* Bytes of the guest's writes among them, or about to be */
    Stat64 changing_bytes;

    /*
     * The replica, the queue of what goes there, and who ends what hangs there:
     * all or none.  Changed while the node is drained.
     */
    BdrvChild *replica;
    WriteBehind *queue;
    ReplicationWatch *watch;
    /* The links on the way to it, and to its metadata, frozen by us */
    GSList *frozen;

    /* What stands above.  BQL. */
    ReplicationAbove *above;

    /* Told when the VM stops */
    VMChangeStateEntry *vm_change;

    /*
     * Why the replica gets nothing more: a negative errno, or 0.  Accessed with
     * atomic operations, as is what follows.
     */
    int lost;
    /* It has had everything at some time since it was attached */
    bool caught_up;
    /*
     * The last replica has, on stable storage: what this node knows of is all
     * that it may lack
     */
    bool had_replica;
    /* A job is bringing the replica in step.  BQL. */
    bool has_job;
    /* A read from the local disk failed */
    bool read_failed;

    /* What is lacking is copied by so many coroutines, in so large parts */
    unsigned int copiers;
    int copy_bytes;
    bool copy_paused;
    bool copy_limited;
    RateLimit copy_limit;
    QEMUTimer *copy_timer;
    Stat64 copied_bytes;
    /*
     * When the last part was over, and how many requests of the guest had come
     * by then.  Protected by @ranges_lock.
     */
    int64_t copy_end_ns;
    unsigned int copy_requests;

    /* What was closing at the last checkpoint is on both disks for good */
    bool flushed;

    /*
     * Changes that are being made sure of without a checkpoint, when the ranges
     * below this number are done, if it is not 0; and when that is done next.
     * The job's.
     */
    uint64_t settle_below;
    uint64_t settle_what;
    int64_t settle_ns;
};

static inline ReplicationHolder *holder_state(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return s->holder;
}

/* Whether what the guest changes is of use to the replica */
static inline bool holder_forwards(BlockDriverState *bs)
{
    ReplicationHolder *s = holder_state(bs);

    return s->replica && !qatomic_read(&s->lost);
}

/* replication-holder.c */

/* Whether what changed is all that the last replica may lack */
bool holder_knows_changes(BlockDriverState *bs);

/* Whether the replica lacks nothing */
bool holder_is_in_step(BlockDriverState *bs);

ReplicaState holder_replica_state(BlockDriverState *bs);

/* The replica gets nothing more.  Only the first call counts. */
void holder_lose(BlockDriverState *bs, const char *what, int ret);

/* No replica has the length of this disk, or none that is known */
void holder_resized(BlockDriverState *bs, int64_t length);

/* replication-holder-write.c: the guest's requests */

void coroutine_fn holder_lock_range(BlockDriverState *bs, HolderRange *range,
                                    int64_t offset, int64_t bytes);
void coroutine_fn holder_unlock_range(BlockDriverState *bs, HolderRange *range);

/* Whether one is under way that was locked before that @number */
bool coroutine_fn holder_has_range_below(BlockDriverState *bs, uint64_t number);

/* All of it, or it is lacking.  Returns 0 or a negative errno. */
int coroutine_fn GRAPH_RDLOCK
holder_copy_range(BlockDriverState *bs, int64_t offset, int64_t bytes);

int coroutine_fn GRAPH_RDLOCK
holder_co_write(BlockDriverState *bs, const WriteRequest *guest);

int coroutine_fn GRAPH_RDLOCK holder_co_flush(BlockDriverState *bs);

/* The local disk has failed with @ret; the replica may know better */
int coroutine_fn GRAPH_RDLOCK
holder_co_read_failed(BlockDriverState *bs, int64_t offset, int64_t bytes,
                      QEMUIOVector *qiov, size_t qiov_offset,
                      BdrvRequestFlags flags, int ret);

/* replication-holder-copy.c: copies of what the replica lacks */

/* Have what the replica lacks copied.  From any thread. */
void holder_kick_copiers(BlockDriverState *bs);
void holder_copy_timer(void *opaque);

/*
 * For a migration, the VM has stopped: copy what the guest wrote faster than
 * the link took it.  A secondary starts before its primary, and what comes
 * between the two is not in the checkpoint that it begins with.
 */
void holder_vm_changed(void *opaque, bool running, RunState state);

/* replication-holder-attach.c: the replica comes and goes; who writes above */

/* Refuse what cannot be forwarded */
bool GRAPH_RDLOCK holder_refuse_overlays(BlockDriverState *bs, Error **errp);
bool GRAPH_RDLOCK holder_refuse_bypass(BlockDriverState *bs, Error **errp);

bool GRAPH_RDLOCK holder_check_parents(BlockDriverState *bs, Error **errp);
void GRAPH_RDLOCK holder_parents_changed(BlockDriverState *bs);

/* Nobody else may write to the local disk from now on, nor to the replica */
bool holder_take_replica(BlockDriverState *bs, BdrvChild *replica,
                         Error **errp);

/* What waits for the replica need not wait any longer */
void holder_abandon(BlockDriverState *bs);

#endif /* BLOCK_REPLICATION_HOLDER_H */
