/*
 * Block replication: the write-intent log
 *
 * A bit for each region of the disk, REPLICATION_META_REGION bytes, in the
 * metadata.  It is set there, on stable storage, before the region is changed,
 * so whoever crashes knows what may have been changed: a superset of it.  What
 * is set and unset is the log; what was changed exactly is known in memory, see
 * replication-changes.h.
 *
 *   replication_changes_note(changes, ...);    always before
 *   ret = replication_log_co_begin(log, ...);  may wait for a write of 4 KiB
 *   if (ret == 0) { change the disk }
 *
 * A region that is not in @changes any more leaves the log later.  It stays for
 * a while, because it may be changed again: until as many others were changed
 * as make half of the log's size, or for some time: until the second call of
 * replication_log_co_tick().
 *
 * Functions may be called from any thread.  Those marked coroutine_mixed_fn may
 * be called in a coroutine, with the graph lock, or in the main loop without
 * one, where they poll; the node must be drained in either case.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_LOG_H
#define BLOCK_REPLICATION_LOG_H

#include "block/block-common.h"
#include "block/graph-lock.h"
#include "replication-changes.h"
#include "replication-meta.h"

typedef struct ReplicationLog ReplicationLog;

/*
 * Of a disk of @size bytes, in the metadata @child, and with @log_size bytes of
 * regions at most that are there for nothing.  It is empty, whatever is in the
 * metadata.  The log of a peer needs no @changes.
 */
ReplicationLog *replication_log_new(BdrvChild *child, int64_t size,
                                    ReplicationChanges *changes,
                                    int64_t log_size);
void replication_log_free(ReplicationLog *log);

/*
 * The disk gets another length, and the metadata is large enough for it.  Of
 * what was in the log, nothing is lost.
 */
void replication_log_resize(ReplicationLog *log, int64_t size);

/* Read what is in the metadata.  Bits behind the end are ignored. */
int coroutine_mixed_fn replication_log_load(ReplicationLog *log);

/*
 * Find what is in the log from @start on: false if there is nothing.  A part of
 * a region at the end of the disk is cut off.
 */
bool replication_log_next(ReplicationLog *log, int64_t start, int64_t *offset,
                          int64_t *bytes);

/* Regions in the log */
uint64_t replication_log_regions(ReplicationLog *log);

/* Changes that had to wait for a write of the log */
uint64_t replication_log_cold_writes(ReplicationLog *log);

/*
 * To be called before a part of the disk is changed, when @changes has it.
 * Returns 0 when the log on stable storage has it, or a negative errno: then
 * the disk must not be changed, unless somebody has made a note elsewhere that
 * the log is void.
 */
int coroutine_fn GRAPH_RDLOCK
replication_log_co_begin(ReplicationLog *log, int64_t offset, int64_t bytes);

/* Whether replication_log_co_tick() is worth it before its time */
bool replication_log_wants_tick(ReplicationLog *log);

/*
 * Forget what is not in @changes and was not changed since the last call.
 * Errors are of no consequence: then the metadata has more than it need have.
 */
void coroutine_fn GRAPH_RDLOCK replication_log_co_tick(ReplicationLog *log);

/*
 * Add all of @changes, and return when that is on stable storage: a few writes,
 * of at most 1 MiB each
 */
int coroutine_mixed_fn
replication_log_write_changes(ReplicationLog *log, ReplicationChanges *changes);

/* Have nothing in the log, on stable storage */
int coroutine_mixed_fn replication_log_write_empty(ReplicationLog *log);

#endif /* BLOCK_REPLICATION_LOG_H */
