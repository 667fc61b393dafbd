/*
 * Block replication: the files of a secondary that makes its own overlays
 *
 * As long as they mean nothing without this process, their names end in
 * ".scratch", and whoever finds them may overwrite them.  Before a merge begins
 * they get their other names: what is found there may be the rest of a disk.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_OVERLAYS_H
#define BLOCK_REPLICATION_OVERLAYS_H

#include "block/block_int.h"

typedef struct ReplicationOverlays ReplicationOverlays;

/* Those of @bs, in @dir, or NULL for where the disk is */
ReplicationOverlays *replication_overlays_new(BlockDriverState *bs,
                                              const char *dir);

/* Leaves the files where they are */
void replication_overlays_free(ReplicationOverlays *o);

/*
 * Create and open them: hidden above @disk, and active above that, which is
 * returned with a reference; or NULL.
 */
BlockDriverState *replication_overlays_make(ReplicationOverlays *o,
                                            BlockDriverState *disk,
                                            Error **errp);

/*
 * From now on, a crash leaves them to the guest.  May be repeated.  In a
 * coroutine, that does not block.
 */
int coroutine_mixed_fn replication_overlays_keep(ReplicationOverlays *o,
                                                 Error **errp);
bool replication_overlays_are_kept(const ReplicationOverlays *o);

/* What they are called when they are kept */
const char *replication_overlays_active(const ReplicationOverlays *o);
const char *replication_overlays_hidden(const ReplicationOverlays *o);

/* They stay, with data that is nowhere else: say where */
void replication_overlays_leave(const ReplicationOverlays *o);

/* They are of no more use */
void replication_overlays_remove(ReplicationOverlays *o);

#endif /* BLOCK_REPLICATION_OVERLAYS_H */
