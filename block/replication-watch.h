/*
 * Block replication: end what hangs at the other side
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_WATCH_H
#define BLOCK_REPLICATION_WATCH_H

#include "block/block-common.h"

typedef struct ReplicationWatch ReplicationWatch;
typedef BlockDriverState *ReplicationWatchLink(void *opaque);
typedef void ReplicationWatchHangUp(void *opaque);

/*
 * Watch a link of the replication node @bs: call @hang_up when requests are in
 * flight below the node that @link gives, and none was done for @timeout_ms.
 * If that is 0, this returns NULL.
 */
ReplicationWatch *replication_watch_new(BlockDriverState *bs,
                                        uint64_t timeout_ms,
                                        ReplicationWatchLink *link,
                                        ReplicationWatchHangUp *hang_up,
                                        void *opaque);
void replication_watch_free(ReplicationWatch *watch);

#endif /* BLOCK_REPLICATION_WATCH_H */
