/*
 * Registry of the nodes that replicate a disk
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "block/block.h"
#include "block/replication.h"

typedef void ReplicationVisitor(ReplicationState *rs, void *opaque,
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

/*
 * The next node that @round has not come to, or NULL.  A callback may run the
 * event loop, and nodes may come and go there, so that a position in the list
 * would not survive it.
 */
static ReplicationState *replication_next(uint64_t round)
{
    ReplicationState *rs;

    QTAILQ_FOREACH(rs, &replication_states, node) {
        if (rs->round < round) {
            rs->round = round;
            return rs;
        }
    }

    return NULL;
}

/* Keep the first error of a round for the caller, and lose none of the rest */
static void replication_visit_all(ReplicationVisitor *visit, void *opaque,
                                  Error **errp)
{
    uint64_t round = ++replication_round;
    ReplicationState *rs;
    Error *first = NULL;

    while ((rs = replication_next(round))) {
        Error *local_err = NULL;

        visit(rs, opaque, &local_err);
        if (local_err && first) {
            error_append_hint(&first, "%s\n", error_get_pretty(local_err));
            error_free(local_err);
        } else if (local_err) {
            first = local_err;
        }
    }
    error_propagate(errp, first);
}

/*
 * The same up to the first error: what @visit does cannot be taken back, and
 * the nodes behind the one that failed keep what they have.  Returns whether
 * there was none.
 */
static bool replication_visit_until_error(ReplicationVisitor *visit,
                                          void *opaque, Error **errp)
{
    ERRP_GUARD();
    uint64_t round = ++replication_round;
    ReplicationState *rs;

    while (!*errp && (rs = replication_next(round))) {
        visit(rs, opaque, errp);
    }

    return !*errp;
}

static void replication_undo_start_one(ReplicationState *rs, void *opaque,
                                       Error **errp)
{
    uint64_t *start_round = opaque;

    if (rs->started == *start_round && rs->ops->undo_start) {
        rs->ops->undo_start(rs);
    }
}

static void replication_first_checkpoint_one(ReplicationState *rs,
                                             void *opaque, Error **errp)
{
    uint64_t *start_round = opaque;

    if (rs->started == *start_round && rs->ops->first_checkpoint) {
        rs->ops->first_checkpoint(rs, errp);
    }
}

void replication_start_all(ReplicationMode mode, Error **errp)
{
    uint64_t round = ++replication_round;
    ReplicationState *rs;
    Error *local_err = NULL;

    GLOBAL_STATE_CODE();

    bdrv_drain_all_begin();
    while (!local_err && (rs = replication_next(round))) {
        rs->started = round;
        rs->ops->start(rs, mode, &local_err);
        if (local_err) {
            rs->started = 0;
        }
    }
    if (!local_err) {
        replication_visit_until_error(replication_first_checkpoint_one, &round,
                                      &local_err);
    }
    if (local_err) {
        replication_visit_all(replication_undo_start_one, &round, NULL);
    }
    bdrv_drain_all_end();

    error_propagate(errp, local_err);
}

static void replication_check_one(ReplicationState *rs, void *opaque,
                                  Error **errp)
{
    if (rs->ops->check) {
        rs->ops->check(rs, errp);
    }
}

static void replication_checkpoint_one(ReplicationState *rs, void *opaque,
                                       Error **errp)
{
    int64_t *begin_ns = opaque;

    rs->checkpoint_ns = *begin_ns;
    rs->ops->checkpoint(rs, errp);
}

static void replication_lose_one(ReplicationState *rs, void *opaque,
                                 Error **errp)
{
    if (rs->ops->lose) {
        rs->ops->lose(rs, opaque);
    }
}

void replication_lose_all(Error *reason)
{
    GLOBAL_STATE_CODE();

    bdrv_drain_all_begin();
    replication_visit_all(replication_lose_one, reason, NULL);
    bdrv_drain_all_end();
}

void replication_do_checkpoint_all(Error **errp)
{
    int64_t begin_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    Error *local_err = NULL;

    GLOBAL_STATE_CODE();

    /* So that no request fails between the check and the checkpoint */
    bdrv_drain_all_begin();
    replication_visit_all(replication_check_one, NULL, &local_err);
    if (!local_err &&
        !replication_visit_until_error(replication_checkpoint_one, &begin_ns,
                                       &local_err)) {
        replication_lose_all(local_err);
    }
    bdrv_drain_all_end();

    error_propagate(errp, local_err);
}

static void replication_get_error_one(ReplicationState *rs, void *opaque,
                                      Error **errp)
{
    rs->ops->get_error(rs, errp);
}

void replication_get_error_all(Error **errp)
{
    GLOBAL_STATE_CODE();

    replication_visit_all(replication_get_error_one, NULL, errp);
}

static void replication_abandon_one(ReplicationState *rs, void *opaque,
                                    Error **errp)
{
    if (rs->ops->abandon) {
        rs->ops->abandon(rs);
    }
}

static void replication_check_failover_one(ReplicationState *rs, void *opaque,
                                           Error **errp)
{
    if (rs->ops->check_failover) {
        rs->ops->check_failover(rs, errp);
    }
}

static void replication_stop_one(ReplicationState *rs, void *opaque,
                                 Error **errp)
{
    bool *failover = opaque;

    rs->ops->stop(rs, *failover, errp);
}

void replication_stop_all(bool failover, Error **errp)
{
    Error *local_err = NULL;

    GLOBAL_STATE_CODE();

    if (failover) {
        replication_visit_all(replication_abandon_one, NULL, NULL);
    }
    bdrv_drain_all_begin();
    if (failover) {
        replication_visit_all(replication_check_failover_one, NULL, &local_err);
    }
    if (local_err) {
        replication_lose_all(local_err);
    }
    /* What else is refused follows from the first error */
    replication_visit_all(replication_stop_one, &failover,
                          local_err ? NULL : errp);
    bdrv_drain_all_end();

    error_propagate(errp, local_err);
}

static void replication_quit_one(ReplicationState *rs, void *opaque,
                                 Error **errp)
{
    if (rs->ops->quit) {
        rs->ops->quit(rs);
    }
}

void replication_quit_all(void)
{
    GLOBAL_STATE_CODE();

    replication_visit_all(replication_quit_one, NULL, NULL);
}

static void replication_finish_one(ReplicationState *rs, void *opaque,
                                   Error **errp)
{
    int64_t *quit_ns = opaque;

    if (rs->ops->finish) {
        rs->ops->finish(rs, *quit_ns);
    }
}

void replication_finish_all(void)
{
    int64_t quit_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);

    GLOBAL_STATE_CODE();

    replication_visit_all(replication_finish_one, &quit_ns, NULL);
}
