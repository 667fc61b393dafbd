/*
 * Block replication: the metadata of a disk that a guest uses
 *
 * Says when which record is written, and sees to it that the log has what
 * changes, before it changes:
 *
 *   open        the disk is a primary's, if it is whole
 *   take over   the disk of a secondary is, with what is in its overlays
 *   begin       before each change: the log; and a new generation, if the data
 *               was that of a checkpoint of both sides until now
 *   announce    before a replica is changed: first that this disk counts from
 *               the same generation, then that the replica is none of its own
 *   confirm     when replication starts: from now on the replica may take over
 *
 * Functions without coroutine in their names are called in the main loop, with
 * the node drained; those marked coroutine_mixed_fn in a coroutine as well.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_LEDGER_H
#define BLOCK_REPLICATION_LEDGER_H

#include "block/block-common.h"
#include "block/graph-lock.h"
#include "qapi/qapi-types-block-core.h"
#include "replication-changes.h"
#include "replication-meta.h"

typedef struct ReplicationLedger ReplicationLedger;

/*
 * Of node @bs, with @meta and @changes that remain the caller's.  Nothing is
 * read.  A peer that does nothing for @timeout_ms is given up, or if that is 0
 * after some seconds.
 */
ReplicationLedger *replication_ledger_new(BlockDriverState *bs,
                                          ReplicationMeta *meta,
                                          ReplicationChanges *changes,
                                          uint64_t log_size,
                                          uint64_t timeout_ms);
void replication_ledger_free(ReplicationLedger *ledger);

/*
 * Read the metadata, again if it was read before, and note in the changes what
 * is in the log.  Returns 0, or 1 if others have used the disk since it was
 * read before, or a negative errno, also if the disk is not usable.
 */
int coroutine_mixed_fn replication_ledger_open(ReplicationLedger *ledger,
                                               Error **errp);
/* Not while the node is inactive: what is in the metadata is up to others */
bool replication_ledger_is_open(ReplicationLedger *ledger);

/*
 * Instead of open, for a secondary that runs and whose metadata was loaded: the
 * guest goes on with its disk and these overlays.  The changes have what the
 * guest has written since the checkpoint.  Returns 1, or 0 if the primary has
 * not said that the disk may take over, or a negative errno if the metadata
 * fails: then it can be tried again.
 */
int replication_ledger_take_over(ReplicationLedger *ledger, const char *active,
                                 const char *hidden, Error **errp);

/*
 * The same when the disk goes back to the last checkpoint, of a primary that
 * has said that it may take over, or else to what it was before that began to
 * bring it in step: then the changes have what was overwritten.
 */
int replication_ledger_go_back(ReplicationLedger *ledger, bool to_checkpoint,
                               const char *active, const char *hidden,
                               Error **errp);

/*
 * Whether the primary of this very secondary has said that it may take over.
 * Reads the metadata: a negative errno if that fails.
 */
int replication_ledger_has_started(ReplicationLedger *ledger, Error **errp);

/*
 * The disk of a secondary has all of its primary.  That has confirmed it: who
 * calls this has just asked.
 */
bool replication_ledger_stopped(ReplicationLedger *ledger, Error **errp);

/*
 * The overlays have been merged into the disk.  As long as nothing else is
 * changed there they are as good as the disk; before, they are forgotten.
 */
void replication_ledger_merged(ReplicationLedger *ledger);

/* They can be removed: the disk has all of it on stable storage */
bool replication_ledger_forget_overlays(ReplicationLedger *ledger,
                                        Error **errp);

/* Whether the changes are all that a disk of the base may lack */
bool replication_ledger_knows_changes(ReplicationLedger *ledger);

/*
 * To be called before the disk is changed, when the changes have it.  The node
 * is @alone if no replica gets it, or one that may take over by itself.  On
 * failure, a negative errno, the disk must not be changed.
 */
int coroutine_fn GRAPH_RDLOCK
replication_ledger_co_begin(ReplicationLedger *ledger, int64_t offset,
                            int64_t bytes, bool alone);

/* The same for all that may come: the node has lost its replica */
bool replication_ledger_go_alone(ReplicationLedger *ledger, Error **errp);

/* Whether the disk may get @length, or if that is negative, all other data */
bool coroutine_mixed_fn
replication_ledger_may_resize(ReplicationLedger *ledger, int64_t length,
                              Error **errp);
/* It has; the changes know it */
void coroutine_mixed_fn replication_ledger_resized(ReplicationLedger *ledger);

/* Read the metadata of a peer, in @child, until it is left */
bool replication_ledger_meet(ReplicationLedger *ledger, BdrvChild *child,
                             Error **errp);
/* Nothing is written to it any more.  Returns the child, or NULL. */
BdrvChild *replication_ledger_leave(ReplicationLedger *ledger);
/* Whatever is under way there fails */
void replication_ledger_abandon(ReplicationLedger *ledger);
/* The same from any thread, soon: the replica was lost */
void replication_ledger_lose_peer(ReplicationLedger *ledger);

/* What to copy to the peer; see replication_meta_judge() */
bool replication_ledger_judge(ReplicationLedger *ledger, bool full,
                              bool discard_peer, ReplicationRuling *ruling,
                              Error **errp);

/*
 * Note in the changes what the peer has changed, or everything if a copy is
 * @ruling->full, and announce this node to the peer, if it is one with metadata
 */
bool replication_ledger_announce(ReplicationLedger *ledger,
                                 const ReplicationRuling *ruling, Error **errp);

/* The replica has what the disk has, and may take over from now on */
bool replication_ledger_confirm(ReplicationLedger *ledger, Error **errp);
bool replication_ledger_is_confirmed(ReplicationLedger *ledger);

void replication_ledger_fill_stats(ReplicationLedger *ledger,
                                   BlockStatsReplicationPrimary *stats);

#endif /* BLOCK_REPLICATION_LEDGER_H */
