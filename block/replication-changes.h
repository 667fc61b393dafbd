/*
 * What changed on a disk, and what its replica lacks of that
 *
 * Three sets of blocks, in memory:
 *
 *   current   changed since the last checkpoint began
 *   closing   changed before that, and perhaps not yet on stable storage of
 *             both sides as it was at a checkpoint
 *   lacking   what the replica that is attached now does not have
 *
 * As long as a disk and its last replica were not changed by others, whoever
 * crashed, they differ in nothing but what is in one of the first two.
 *
 * All functions may be called from any thread.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_CHANGES_H
#define BLOCK_REPLICATION_CHANGES_H

/* A bit for so many bytes: 2 MiB of memory a set for a disk of 1 TiB */
#define REPLICATION_BLOCK_BITS 16
#define REPLICATION_BLOCK (1 << REPLICATION_BLOCK_BITS)

typedef struct ReplicationChanges ReplicationChanges;

/* Whether there is memory for the sets of @bs, if it has @size bytes */
bool replication_check_room(BlockDriverState *bs, int64_t size, Error **errp);

/* For a disk of @size bytes; all sets are empty */
ReplicationChanges *replication_changes_new(int64_t size);
void replication_changes_free(ReplicationChanges *changes);

int64_t replication_changes_size(ReplicationChanges *changes);

/* The disk has another length.  All sets are empty. */
void replication_changes_resize(ReplicationChanges *changes, int64_t size);

/* To be called before the disk is changed in this range */
void replication_changes_note(ReplicationChanges *changes, int64_t offset,
                              int64_t bytes);

/* Whether a part of this range is current or closing */
bool replication_changes_has(ReplicationChanges *changes, int64_t offset,
                             int64_t bytes);

/* Find the next blocks from @start on that are one of these; false if none */
bool replication_changes_next(ReplicationChanges *changes, int64_t start,
                              int64_t *offset, int64_t *bytes);

/*
 * A checkpoint begins: what is current is closing from now on.  Whether what
 * was closing until now has been @flushed on both sides since the last call; if
 * so, it is forgotten.
 */
void replication_changes_checkpoint(ReplicationChanges *changes, bool flushed);

/*
 * The same without a checkpoint: what is current is closing from now on, but
 * what is lacking remains current.  Returns a name for what is closing, under
 * which replication_changes_settled() forgets it when both sides have it on
 * stable storage, unless something has begun since.
 */
uint64_t replication_changes_settle(ReplicationChanges *changes);
void replication_changes_settled(ReplicationChanges *changes, uint64_t what);

/* Do what replication_changes_checkpoint() has left for later */
void replication_changes_tidy(ReplicationChanges *changes);

/*
 * The replica lacks everything, what changed, nothing, or this range as well,
 * which is current then
 */
void replication_changes_lack_all(ReplicationChanges *changes);
void replication_changes_lack_changed(ReplicationChanges *changes);
void replication_changes_lack_nothing(ReplicationChanges *changes);
void replication_changes_lack(ReplicationChanges *changes, int64_t offset,
                              int64_t bytes);

/* The replica is going to have these blocks: offset and end are aligned */
void replication_changes_supply(ReplicationChanges *changes, int64_t offset,
                                int64_t bytes);

/*
 * Whether the replica lacks the block at @offset; @pnum, at most @bytes, is for
 * how far that is so.
 */
bool replication_changes_is_lacking(ReplicationChanges *changes,
                                    int64_t offset, int64_t bytes,
                                    int64_t *pnum);

/*
 * Find blocks that the replica lacks, at most @max bytes, behind those that
 * were found last.  False if it lacks none.
 */
bool replication_changes_find_lacking(ReplicationChanges *changes, int64_t max,
                                      int64_t *offset, int64_t *bytes);

/* Whole blocks: never less than what it is, up to the size of the disk */
int64_t replication_changes_lacking_bytes(ReplicationChanges *changes);

/* The same of what changed, current and closing */
int64_t replication_changes_changed_bytes(ReplicationChanges *changes);

#endif /* BLOCK_REPLICATION_CHANGES_H */
