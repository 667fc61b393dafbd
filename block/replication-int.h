/*
 * Block replication: what its files share
 *
 * Who calls whom ("-x.c" is block/replication-x.c):
 *
 *   COLO, xen-*                        block layer
 *        |                                  |
 *        v                                  v
 *   replication.c                      block/replication.c
 *   the registry: each operation       options; requests, and
 *   on all nodes, drained once         changes of the graph
 *        |                                  |
 *        | ReplicationOps                   |
 *        v                                  |
 *   -ops.c                                  |
 *   what each stage allows; errors          |
 *   and statistics of a node                |
 *        |                                  |
 *        '----------------.----------------'
 *                         | ReplicationRole
 *           .-------------'-------------.
 *           v                           v
 *   -primary.c                    -secondary.c
 *   forwards what the guest       I/O, checkpoint, stop
 *   changes                         |       |
 *     |          |                  |       v
 *     |          |                  |   -secondary-merge.c
 *     |          |                  |   failover
 *     v          v                  v       v
 *   write-     -above.c           -secondary-take.c
 *   behind.c   who writes         what start takes, and gives back
 *   the queue  to the node              |
 *   in front                            v
 *   of the                        -guard.c
 *   link                          filter above the secondary disk, for
 *                                 what the primary does there
 *
 * A secondary that makes its own overlays is a role beside these: -standby.c,
 * which has most from the files of the secondary, and -standby-failover.c.  The
 * overlays' files are -overlays.c's.
 *
 * A primary with a replica of its own is a role beside these: -holder.c, with
 * the guest's requests in -holder-write.c, the copies of what the replica lacks
 * in -holder-copy.c, and in -holder-attach.c how that comes and goes.
 * -changes.c knows what changed and what the replica lacks, -sync.c is the job
 * that brings it in step.  -watch.c ends what hangs at the other side, for both
 * kinds of primary.
 *
 * What is known of a disk after a crash is in its metadata: records of its
 * generation, -meta.c, and the log of what was changed, -log.c.  -ledger.c
 * writes both, for a primary and for a standby.
 *
 * On the way back a role tells -ops.c of a stage that the node enters, of an
 * error, and that its checkpoint is lost.  All ask it what the stage allows.
 *
 * The words, each for one thing in all of the files:
 *
 *   stage       where a node stands: ReplicationNodeStage
 *   checkpoint  the state that a failover goes back to, and making it so
 *   in sync     all that the primary's guest wrote has arrived
 *   missed      what the guest wrote and was not forwarded
 *   replica     the way to the other disk, of a node that holds both
 *   lack        what the replica does not have and is going to be copied
 *   in step     it lacks nothing, and gets what the guest writes
 *   generation  a name of the data of a disk; its base is the one that it has
 *               in common with a replica, but for what is in the log
 *   alone       writing without a replica that gets it
 *   announce    tell the peer's metadata what is going to be done to its disk
 *   lose        the checkpoint: the overlays do not stand for one any more
 *   bypass      write above a node without the writes coming to it
 *   cut off     the primary cannot write to the secondary disk any more
 *   cover       the active overlay has it, and nobody looks below
 *   standby     a secondary that makes its own overlays
 *   save        in the hidden overlay, what the primary overwrites
 *   roll back   fail over to what the disk had before it was brought in step
 *   take        what is needed to run; to release is to give it back
 *   abandon     the peer: what waits for it waits in vain
 *   fence       refuse the primary's writes, because the disk is the guest's
 *   merge       the overlays into the disk, after a failover
 *   settle      put on the disk what was flushed before the failover
 *   split       a write between overlays and disk, after a failed merge
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_INT_H
#define BLOCK_REPLICATION_INT_H

#include "block/block-io.h"
#include "block/block_int.h"
#include "block/replication.h"
#include "block/write-behind.h"
#include "qemu/timer.h"

/* What is asked of a node, and its stage may refuse */
typedef enum ReplicationOp {
    /* By the registry */
    REPLICATION_OP_START,
    REPLICATION_OP_CHECKPOINT,
    REPLICATION_OP_STOP,
    REPLICATION_OP_FAILOVER,

    /* By those who use the node */
    REPLICATION_OP_READ,
    REPLICATION_OP_WRITE,
    REPLICATION_OP_RESIZE,
    REPLICATION_OP_INACTIVATE,

    /* By x-block-replica-sync and x-block-replica-detach */
    REPLICATION_OP_CHANGE_PEER,

    REPLICATION_OP__MAX,
} ReplicationOp;

typedef struct ReplicationChanges ReplicationChanges;
typedef struct ReplicationHolder ReplicationHolder;
typedef struct ReplicationLedger ReplicationLedger;
typedef struct ReplicationMeta ReplicationMeta;
typedef struct ReplicationPrimary ReplicationPrimary;
typedef struct ReplicationSecondary ReplicationSecondary;
typedef struct ReplicationRole ReplicationRole;

typedef struct BDRVReplicationState {
    ReplicationMode mode;
    const ReplicationRole *role;
    ReplicationState *rs;

    /* What is known of the disk after a crash; or NULL */
    ReplicationMeta *meta;
    /* The links to it, and to what it is stored in: it stays where it is */
    GSList *meta_frozen;

    /*
     * replication_stages[] in replication-ops.c says what each stage allows.
     * Changed under the BQL while the node is drained; read by requests with
     * replication_stage().
     */
    ReplicationNodeStage stage;

    /*
     * Where undo_start goes back to: the stage before start, or NONE once the
     * first checkpoint may have thrown away what the guest saw there.
     */
    ReplicationNodeStage undo_stage;

    /* Why the stage is BROKEN or FAILOVER_FAILED.  BQL. */
    Error *error;

    /*
     * The guest has no other copy of its data: what is done here has to be on
     * the disk.  Accessed with atomic operations.
     */
    bool relied_on;

    /*
     * How many requests have come from above, and how many of them are over,
     * for who gives way to them.  They wrap around.  Accessed with atomic
     * operations.
     */
    unsigned int requests;
    unsigned int requests_done;

    /* QEMU ends, and what goes away is no loss.  BQL. */
    bool quitting;

    /* Statistics.  Protected by the BQL. */
    uint64_t checkpoints;
    uint64_t failed_checkpoints;
    int64_t last_checkpoint_ns;
    int64_t longest_checkpoint_ns;
    /* When the last one was, of QEMU_CLOCK_REALTIME; 0 if there was none */
    int64_t checkpoint_time_ns;
    /* When the stage was entered, of the host's clock */
    int64_t stage_time_ns;

    /* The first error since open or start, or NULL */
    BlockStatsReplicationError *first_error;
    /* Why the last replica was lost, or NULL since another is in step */
    BlockStatsReplicationCause *replica_lost;
    /* When the replica got into the state that it is in */
    int64_t replica_time_ns;
    /*
     * Where the node stands in the graph, or stood when it was started: the
     * root above it or NULL, and the device of the root or NULL
     */
    char *top_node;
    char *device;
    QemuMutex error_lock; /* protects @first_error and what follows it */

    /* What only the node's role knows */
    union {
        ReplicationHolder *holder;
        ReplicationPrimary *primary;
        ReplicationSecondary *secondary;
    };
} BDRVReplicationState;

/*
 * What differs between a primary and a secondary node.  Where a member is NULL,
 * there is nothing to do, and no error.  The global state functions are called
 * only in stages that allow the operation, and without the graph lock.
 */
struct ReplicationRole {
    /* The node's file is the guest's disk, in every stage */
    bool holds_disk;

    /* It makes its own overlays, and can go back before it was started */
    bool is_standby;

    /* The node may have metadata */
    bool has_metadata;

    /* Prepare our state before the first child is opened, and free it */
    bool (*init)(BlockDriverState *bs, QemuOpts *opts, Error **errp);
    void (*cleanup)(BlockDriverState *bs);

    /* The node's file is open: open other children, if there are @options */
    bool (*opened)(BlockDriverState *bs, QDict *options, Error **errp);

    /*
     * The node is not inactive any more, as it was from the beginning or since
     * it was inactivated
     */
    bool GRAPH_RDLOCK_PTR coroutine_fn (*co_activated)(BlockDriverState *bs,
                                                       Error **errp);

    void (*child_perm)(
        BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
        BlockReopenQueue *reopen_queue, uint64_t perm, uint64_t shared,
        uint64_t *nperm, uint64_t *nshared);

    /*
     * Refuse a change of the graph above that would keep writes away.  Called
     * with the graph lock.
     */
    bool (*check_parents)(BlockDriverState *bs, Error **errp);

    /* The graph above has changed.  With the graph lock as well. */
    void (*parents_changed)(BlockDriverState *bs);

    /* Take what is needed to run.  On failure nothing is left taken. */
    bool (*start)(BlockDriverState *bs, Error **errp);

    /* Whether everything that the primary's guest wrote has arrived */
    bool (*in_sync)(BlockDriverState *bs, Error **errp);

    /*
     * The node is in sync: make the disk as it stands the checkpoint.  A role
     * without this has no checkpoint to go back to.
     */
    bool (*checkpoint)(BlockDriverState *bs, Error **errp);

    /* Both sides have reached a checkpoint, the first one included */
    void (*checkpointed)(BlockDriverState *bs);

    /* End in peace */
    bool (*stop)(BlockDriverState *bs, Error **errp);

    /* Whether the primary lets this side go on from the last checkpoint */
    bool (*may_take_over)(BlockDriverState *bs, Error **errp);

    /*
     * A failover comes: do not wait for what nobody needs any more.  Called
     * without draining the node first.
     */
    void (*abandon)(BlockDriverState *bs);

    /* Go on alone.  Sets the stage, also on failure.  Without this, to DONE. */
    void (*failover)(BlockDriverState *bs, Error **errp);

    /* Part from the other side in any stage, other than by its replica */
    void (*detach)(BlockDriverState *bs, Error **errp);

    /*
     * Report what keeps the node from protecting its disk, if anything does.
     * Neither this nor get_stats() waits for anything.
     */
    void (*get_error)(BlockDriverState *bs, Error **errp);

    /* Fill in the part of the statistics that only this role has */
    void (*get_stats)(BlockDriverState *bs,
                      BlockStatsSpecificReplication *stats);

    /* End every job and give back what start took; the stage stays */
    void (*release)(BlockDriverState *bs);

    /*
     * QEMU ends, since @quit_ns of QEMU_CLOCK_REALTIME, and nobody writes any
     * more: finish what would be lost, in a bounded time.  Called in every
     * stage, and without draining the node first.
     */
    void (*finish)(BlockDriverState *bs, int64_t quit_ns);

    /* The node is going to be drained, and is not drained any more */
    void (*drain_begin)(BlockDriverState *bs);
    void (*drain_end)(BlockDriverState *bs);

    /* Whether the disk may get this length, if not negative, and that it has */
    bool (*may_resize)(BlockDriverState *bs, int64_t length, Error **errp);
    void (*resized)(BlockDriverState *bs, int64_t length);

    /* The node's file failed to be read; @ret says why.  May read elsewhere. */
    int GRAPH_RDLOCK_PTR coroutine_fn (*co_read_failed)(
        BlockDriverState *bs, int64_t offset, int64_t bytes,
        QEMUIOVector *qiov, size_t qiov_offset, BdrvRequestFlags flags,
        int ret);

    /* Wait until what the guest wrote in this range is where it is read from */
    void GRAPH_RDLOCK_PTR coroutine_fn (*co_await_writes)(
        BlockDriverState *bs, int64_t offset, int64_t bytes);

    /* Whether co_await_writes() would have to wait */
    bool (*has_pending_writes)(BlockDriverState *bs, int64_t offset,
                               int64_t bytes);

    /* Whether none of the guest's data is missing here.  NULL: none is. */
    bool (*has_data)(BlockDriverState *bs);

    /* In every stage */
    int GRAPH_RDLOCK_PTR coroutine_fn (*co_write)(BlockDriverState *bs,
                                                  const WriteRequest *w);
    int GRAPH_RDLOCK_PTR coroutine_fn (*co_flush)(BlockDriverState *bs);

    /* See bdrv_leave_behind() */
    void (*left_behind)(BlockDriverState *bs, int ret);
};

#define REPLICATION_OPT_MODE            "mode"
#define REPLICATION_OPT_TOP_ID          "top-id"
#define REPLICATION_OPT_WRITE_BEHIND    "write-behind"
#define REPLICATION_OPT_WRITE_BEHIND_MS "write-behind-ms"
#define REPLICATION_OPT_REPLICA_TIMEOUT "replica-timeout"
#define REPLICATION_OPT_REPLICA         "replica"
#define REPLICATION_OPT_METADATA        "metadata"
#define REPLICATION_OPT_LOG_SIZE        "log-size"
#define REPLICATION_OPT_MERGE_AT_QUIT   "merge-at-quit"
#define REPLICATION_OPT_REPLICA_NODE_NAME "replica-node-name"
#define REPLICATION_OPT_OVERLAY_DIR     "overlay-dir"
#define REPLICATION_OPT_KEEP_CHECKPOINT "keep-checkpoint"

extern const ReplicationRole replication_holder_role;
extern const ReplicationRole replication_primary_role;
extern const ReplicationRole replication_secondary_role;
extern const ReplicationRole replication_standby_role;

/* NULL if @bs is not a replication node */
static inline const ReplicationRole *replication_role(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return bs->drv && !strcmp(bs->drv->format_name, "replication") ? s->role :
                                                                     NULL;
}

static inline ReplicationNodeStage replication_stage(BlockDriverState *bs)
{
    BDRVReplicationState *s = bs->opaque;

    return qatomic_read(&s->stage);
}

/* The host's clock, since the epoch */
static inline int64_t replication_time_ns(void)
{
    return g_get_real_time() * SCALE_US;
}

/* Whether the present stage of @bs allows @op.  replication_stages[] says. */
bool replication_allows(BlockDriverState *bs, ReplicationOp op);

/* The same for what a user asks for; if that is refused, @errp says why */
bool replication_may(BlockDriverState *bs, ReplicationOp op, Error **errp);

/* For @op, something has to be written that is others' while @bs is inactive */
bool GRAPH_RDLOCK replication_check_active(BlockDriverState *bs,
                                           ReplicationOp op, Error **errp);

/*
 * Enter @stage.  The caller holds the BQL and has drained @bs, so that no
 * request meets two stages.
 */
void replication_set_stage(BlockDriverState *bs, ReplicationNodeStage stage);

/*
 * Tell QMP clients that @bs cannot protect its disk, and remember it for the
 * statistics if it is the first such error.  May be called from any thread.
 */
void replication_report_error(BlockDriverState *bs,
                              ReplicationErrorReason reason, const char *text);

/* The same when the replica has got into @state, with @error if that is why */
void replication_report_replica(BlockDriverState *bs, ReplicaState state,
                                const char *error);

/* Why the stage is what it is, or is about to become; takes @err, or NULL */
void replication_set_error(BlockDriverState *bs, Error *err);

/* The overlays do not stand for one checkpoint because of @err.  Takes it. */
void replication_lose_checkpoint(BlockDriverState *bs, Error *err);

/* For the statistics, the node starts anew */
void replication_forget_first_error(BlockDriverState *bs);

/* Find out where @bs stands in the graph, unless it runs */
void GRAPH_RDLOCK replication_update_place(BlockDriverState *bs);

/*
 * A node moves to the main loop when it gets or loses a parent, unless another
 * parent objects.  Ours come and go all the time: @bs and those around it go
 * back to @ctx, where somebody wanted them to be.
 */
void replication_go_back_to(BlockDriverState *bs, AioContext *ctx);

/* End every job, and give back what start took */
void replication_release(BlockDriverState *bs);

BlockStatsSpecific *replication_get_specific_stats(BlockDriverState *bs);

/* What the registry calls */
extern ReplicationOps replication_ops;

/*
 * For a filter: pass on the flags of all requests.  What the child cannot do,
 * the block layer does there: FUA becomes a flush, zeroes become data.
 */
static inline void replication_pass_flags(BlockDriverState *bs)
{
    bs->supported_read_flags = BDRV_REQ_REGISTERED_BUF;
    bs->supported_write_flags = BDRV_REQ_WRITE_UNCHANGED | BDRV_REQ_FUA |
                                BDRV_REQ_REGISTERED_BUF;
    bs->supported_zero_flags = BDRV_REQ_WRITE_UNCHANGED | BDRV_REQ_FUA |
                               BDRV_REQ_MAY_UNMAP | BDRV_REQ_NO_FALLBACK;
}

/*
 * Freeze the links below @bs that are not frozen yet, and add them to @frozen,
 * which is returned: a snapshot or a reopen there would lead elsewhere what is
 * written to @bs.
 */
GSList *GRAPH_RDLOCK replication_freeze_below(BlockDriverState *bs,
                                              GSList *frozen);

/* The links in @frozen may be changed again.  Frees @frozen. */
void replication_unfreeze_below(GSList *frozen);

/* The options of the queue, and the timeout in milliseconds, of a primary */
bool replication_primary_get_opts(QemuOpts *opts, WriteBehindOptions *queue,
                                  uint64_t *timeout_ms, Error **errp);

/* How much a log may have for nothing */
uint64_t replication_holder_get_log_size(QemuOpts *opts);

/*
 * Become a primary without a replica; the state of the role before is gone.
 * Takes @changes and @ledger, which may be NULL.
 */
void replication_holder_take_over(BlockDriverState *bs,
                                  const WriteBehindOptions *queue,
                                  uint64_t timeout_ms, uint64_t log_size,
                                  ReplicationChanges *changes,
                                  ReplicationLedger *ledger);

/* What a queue has forwarded, as a primary tells it */
void replication_primary_fill_stats(BlockStatsReplicationPrimary *stats,
                                    const WriteBehindStats *q);

#endif /* BLOCK_REPLICATION_INT_H */
