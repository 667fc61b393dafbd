/*
 * Registry of the nodes that replicate a disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * A block driver that replicates a disk registers each of its nodes here.
 * Those who decide when the two sides of a VM have to agree (migration/colo.c
 * and the xen-* QMP commands) know nothing of the nodes: they start, checkpoint
 * and stop all of them with one call.
 *
 * Everything here is global state: it is called under the BQL, outside of
 * coroutines.  start and checkpoint are called while the VM is stopped, stop
 * while it is stopped or about to be.
 *
 * The registry drains all nodes of the block layer once for each call that may
 * change what a node does, so that no request meets half of it.
 */

#ifndef REPLICATION_H
#define REPLICATION_H

#include "qapi/qapi-types-block-core.h"
#include "qemu/queue.h"

typedef struct ReplicationOps ReplicationOps;
typedef struct ReplicationState ReplicationState;

/* One registered node.  Only the registry changes the members below @ops. */
struct ReplicationState {
    /* What the driver gave to replication_new() */
    void *opaque;
    ReplicationOps *ops;

    /* The last call to all nodes that has visited this one */
    uint64_t round;
    /* When the last checkpoint of all nodes began, in QEMU_CLOCK_REALTIME ns */
    int64_t checkpoint_ns;
    /* The last one that has started it, if it may still have to be undone */
    uint64_t started;
    QTAILQ_ENTRY(ReplicationState) node;
};

/*
 * What a driver offers for each of its nodes.  An error always names the node.
 * Only abandon, get_error, quit and finish are called without draining first.
 */
struct ReplicationOps {
    /*
     * Begin to replicate in @mode.  All or nothing: after an error everything
     * is as it was, and start may be called again.  A node that has failed over
     * accepts the call and does nothing.
     */
    void (*start)(ReplicationState *rs, ReplicationMode mode, Error **errp);

    /*
     * End replication.  With @failover the other side is lost and this one goes
     * on alone, otherwise the pair ends in peace and may start again.
     */
    void (*stop)(ReplicationState *rs, bool failover, Error **errp);

    /*
     * From now on the disk as it stands is what a failover goes back to.  An
     * error means that it is not, and that the node cannot be relied on.
     */
    void (*checkpoint)(ReplicationState *rs, Error **errp);

    /* Report the error that keeps the node from protecting its disk, if any */
    void (*get_error)(ReplicationState *rs, Error **errp);

    /*
     * Optional.  Called when all nodes have started: what is done here cannot
     * be taken back without a loss.  When it fails, no other node is asked any
     * more.
     */
    void (*first_checkpoint)(ReplicationState *rs, Error **errp);

    /*
     * Optional.  Take back a start that has just succeeded, because another
     * node of the VM could not start, or do its first checkpoint.  A start that
     * did nothing is not undone.
     */
    void (*undo_start)(ReplicationState *rs);

    /*
     * Optional.  Whether a checkpoint would be refused, without doing anything.
     * No node does a checkpoint if one of them refuses.
     */
    void (*check)(ReplicationState *rs, Error **errp);

    /*
     * Optional.  Whether a failover would be refused because there is no
     * checkpoint to go back to, or none that the node may take over from.  Then
     * the node is as if that had been tried, and no other node goes back to its
     * own.
     */
    void (*check_failover)(ReplicationState *rs, Error **errp);

    /*
     * Optional.  The checkpoint of another node, whose error is @reason, failed
     * half-way, or cannot be failed over to: this one does not stand for the
     * same checkpoint.
     */
    void (*lose)(ReplicationState *rs, const Error *reason);

    /*
     * Optional.  A failover begins: nobody need wait for the peer any more.
     * All nodes are told so before they are drained, lest that wait for a peer
     * that is dead.
     */
    void (*abandon)(ReplicationState *rs);

    /* Optional.  QEMU is about to end, and what goes away then is no error. */
    void (*quit)(ReplicationState *rs);

    /*
     * Optional.  Nobody writes any more, and QEMU ends: do what would be lost
     * otherwise.  The time for this, of the node's own choice, counts from
     * @quit_ns of QEMU_CLOCK_REALTIME, when all nodes were asked for it.
     */
    void (*finish)(ReplicationState *rs, int64_t quit_ns);
};

/*
 * Register a node.  @opaque is what the functions of @ops find in
 * ReplicationState.opaque, and @ops has to stay valid until
 * replication_remove().
 */
ReplicationState *replication_new(void *opaque, ReplicationOps *ops);

/* Unregister and free @rs.  Allowed from within a call of its own ops. */
void replication_remove(ReplicationState *rs);

/*
 * Start all nodes in @mode, or none: when one refuses, those that this call
 * has started are put back, and have lost something only if they had done their
 * first checkpoint.
 * @errp gets the error of the node that refused.
 */
void replication_start_all(ReplicationMode mode, Error **errp);

/*
 * The functions below visit every node, whether or not one before it failed,
 * if they do not say otherwise.  @errp gets the first error, with the others as
 * its hint.
 */

/*
 * Make all nodes forget the previous checkpoint in favour of the present.  If
 * any of them refuses, none does it; if one fails half-way, those behind it
 * keep the previous one, and all say that they do not stand for one checkpoint.
 */
void replication_do_checkpoint_all(Error **errp);

/* Tell all nodes that one of them has lost its checkpoint, see lose() */
void replication_lose_all(Error *reason);

/* Find out whether any node has ceased to protect its disk */
void replication_get_error_all(Error **errp);

/* End replication on all nodes, see ReplicationOps.stop */
void replication_stop_all(bool failover, Error **errp);

/*
 * For the end of QEMU: before exports and devices go away, and when the VM and
 * all exports have stopped, but jobs have not
 */
void replication_quit_all(void);
void replication_finish_all(void);

#endif /* REPLICATION_H */
