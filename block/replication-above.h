/*
 * Block replication: what stands above a node
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_ABOVE_H
#define BLOCK_REPLICATION_ABOVE_H

#include "block/graph-lock.h"

/* All nodes whose writes come to a node, and their users */
typedef struct ReplicationAbove ReplicationAbove;

ReplicationAbove *replication_above_new(void);
void replication_above_free(ReplicationAbove *above);

/*
 * The name of a node in @above whose users' writes do not come to @bs any more,
 * or of an overlay of @bs that is written to; or NULL.  To be freed by the
 * caller.
 */
char *GRAPH_RDLOCK replication_above_bypass(ReplicationAbove *above,
                                            BlockDriverState *bs);

/* What stands above @bs now.  Takes the place of @above, which is freed. */
ReplicationAbove *GRAPH_RDLOCK
replication_above_update(ReplicationAbove *above, BlockDriverState *bs);

#endif /* BLOCK_REPLICATION_ABOVE_H */
