/*
 * Registry of the nodes that replicate a disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "block/replication.h"

typedef void ReplicationVisitor(ReplicationState *rs, bool failover,
                                Error **errp);

/* In the order in which the nodes were opened, as a user would count them */
static QTAILQ_HEAD(, ReplicationState) replication_states =
    QTAILQ_HEAD_INITIALIZER(replication_states);

/* Number of the last call that visited the nodes */
static uint64_t replication_round;

ReplicationState *replication_new(void *opaque, ReplicationOps *ops)
{
    ReplicationState *rs;

    GLOBAL_STATE_CODE();
    assert(ops->start && ops->stop && ops->checkpoint && ops->get_error);

    rs = g_new0(ReplicationState, 1);
    rs->opaque = opaque;
    rs->ops = ops;
    QTAILQ_INSERT_TAIL(&replication_states, rs, node);

    return rs;
}

void replication_remove(ReplicationState *rs)
{
    GLOBAL_STATE_CODE();

    QTAILQ_REMOVE(&replication_states, rs, node);
    g_free(rs);
}

static void replication_new_round(void)
{
    replication_round++;
}

/*
 * The next node that this round has not come to, or NULL.  A callback may run
 * the event loop, and nodes may come and go there, so that a position in the
 * list would not survive it.
 */
static ReplicationState *replication_next(void)
{
    ReplicationState *rs;

    QTAILQ_FOREACH(rs, &replication_states, node) {
        if (rs->round != replication_round) {
            rs->round = replication_round;
            return rs;
        }
    }

    return NULL;
}

static void replication_undo_start(GPtrArray *started)
{
    ReplicationState *rs;

    QTAILQ_FOREACH(rs, &replication_states, node) {
        if (g_ptr_array_find(started, rs, NULL) && rs->ops->undo_start) {
            rs->ops->undo_start(rs);
        }
    }
}

void replication_start_all(ReplicationMode mode, Error **errp)
{
    g_autoptr(GPtrArray) started = g_ptr_array_new();
    ReplicationState *rs;
    Error *local_err = NULL;

    GLOBAL_STATE_CODE();

    replication_new_round();
    while ((rs = replication_next())) {
        rs->ops->start(rs, mode, &local_err);
        if (local_err) {
            replication_undo_start(started);
            error_propagate(errp, local_err);
            return;
        }
        g_ptr_array_add(started, rs);
    }
}

/* Keep the first error of a round for the caller, and lose none of the rest */
static void replication_visit_all(ReplicationVisitor *visit, bool failover,
                                  Error **errp)
{
    ReplicationState *rs;
    Error *first = NULL;

    GLOBAL_STATE_CODE();

    replication_new_round();
    while ((rs = replication_next())) {
        Error *local_err = NULL;

        visit(rs, failover, &local_err);
        if (local_err && first) {
            error_append_hint(&first, "%s\n", error_get_pretty(local_err));
            error_free(local_err);
        } else if (local_err) {
            first = local_err;
        }
    }
    error_propagate(errp, first);
}

static void replication_checkpoint_one(ReplicationState *rs, bool failover,
                                       Error **errp)
{
    rs->ops->checkpoint(rs, errp);
}

void replication_do_checkpoint_all(Error **errp)
{
    replication_visit_all(replication_checkpoint_one, false, errp);
}

static void replication_get_error_one(ReplicationState *rs, bool failover,
                                      Error **errp)
{
    rs->ops->get_error(rs, errp);
}

void replication_get_error_all(Error **errp)
{
    replication_visit_all(replication_get_error_one, false, errp);
}

static void replication_stop_one(ReplicationState *rs, bool failover,
                                 Error **errp)
{
    rs->ops->stop(rs, failover, errp);
}

void replication_stop_all(bool failover, Error **errp)
{
    replication_visit_all(replication_stop_one, failover, errp);
}
