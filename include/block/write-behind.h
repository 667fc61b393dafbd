/*
 * Write-behind queue
 *
 * Lets a filter complete a request that changes the disk before its child has
 * done so.  The queue keeps a copy and sends it to the child later.
 *
 * - Requests that overlap reach the child in the order in which they were
 *   queued.  Others may be in flight there at the same time.
 * - A flush goes to the child behind everything that was queued before it.
 * - Requests that come while others are in flight at the child may be sent
 *   together when those have ended.  Contiguous ones may become one request.
 * - What was not begun when a newer request covers it is not sent: all of an
 *   older request, or a part of it.
 * - The first failure is reported once.  Then whatever is queued is dropped,
 *   and so is everything that comes later, lest it end up on top of a hole.
 * - If the child does not complete anything for too long, that is a failure.
 * - Requests in the queue count as requests in flight on the node: when it is
 *   drained, the queue is empty.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_WRITE_BEHIND_H
#define BLOCK_WRITE_BEHIND_H

#include "block/block-common.h"
#include "block/graph-lock.h"
#include "qemu/timer.h"

typedef struct WriteBehind WriteBehind;

typedef enum WriteBehindType {
    WRITE_BEHIND_WRITE,
    WRITE_BEHIND_ZEROES,
    WRITE_BEHIND_DISCARD,
    WRITE_BEHIND_FLUSH,
} WriteBehindType;

/* A request that changes the data of a node.  Never WRITE_BEHIND_FLUSH. */
typedef struct WriteRequest {
    WriteBehindType type;
    BdrvRequestFlags flags;
    int64_t offset;
    int64_t bytes;
    /* The data of a WRITE_BEHIND_WRITE, from @qiov_offset on */
    QEMUIOVector *qiov;
    size_t qiov_offset;
} WriteRequest;

/* What is to be said of a request or a flush, as in "failed to forward a" */
const char *write_request_name(WriteBehindType type);

/* Do it now */
int coroutine_fn GRAPH_RDLOCK
write_request_co_do(BdrvChild *child, const WriteRequest *w);

/*
 * All counts start at 0 with write_behind_new().  Requests are counted as they
 * came; only those of more than 16 MiB, which are cut, count as several.
 */
typedef struct WriteBehindStats {
    /* Done by the child; bytes without those of discards */
    uint64_t sent_requests;
    uint64_t sent_bytes;
    uint64_t flushes;

    /* Not sent, because newer requests covered them; bytes also of parts */
    uint64_t superseded_requests;
    uint64_t superseded_bytes;

    /* Failed at the child, flushes included, and not sent after that */
    uint64_t failed_requests;
    uint64_t dropped_requests;

    /* Queued or in flight: now, and bytes of memory at most */
    uint64_t pending_requests;
    uint64_t pending_bytes;
    uint64_t max_pending_bytes;

    /* Bytes of the disk that they are about, not of memory */
    uint64_t pending_span;

    /* When the oldest of them was queued, in ns of the queue's clock, or 0 */
    int64_t oldest_ns;
} WriteBehindStats;

/*
 * Called for the first request of a queue that fails, with a negative errno.
 * In any thread, with a lock held: must not yield, nor call any function of
 * the queue.
 */
typedef void WriteBehindErrorFunc(BlockDriverState *bs, WriteBehindType type,
                                  int ret);

typedef struct WriteBehindOptions {
    /*
     * The memory that requests in the queue may take.  When there is no room,
     * or if a request is larger than that, it waits; with 0, all do.
     */
    uint64_t max_bytes;

    /*
     * If not 0, a request waits as well while more is in the queue than the
     * child lately completed in this time.
     */
    uint64_t max_ms;

    /* What tells the time; if not set, QEMU_CLOCK_REALTIME */
    QEMUClockType clock;
} WriteBehindOptions;

/*
 * Create the queue of @bs, a node whose requests go to @child, or if that is
 * NULL to bs->file, which may change
 */
WriteBehind *write_behind_new(BlockDriverState *bs, BdrvChild *child,
                              const WriteBehindOptions *opts,
                              WriteBehindErrorFunc *on_error);

/* To be called when @bs is drained */
void write_behind_free(WriteBehind *wb);

/*
 * Returns 0 when the request is queued or, if it has to wait as said above,
 * when the child has done it.  If the queue has failed, the request is dropped,
 * and this returns the error, a negative errno.
 */
int coroutine_fn GRAPH_RDLOCK
write_behind_co_write(WriteBehind *wb, const WriteRequest *w);

/*
 * The same, but if it would have to wait, this returns -EAGAIN.  A part may
 * have been queued by then.
 */
int coroutine_fn GRAPH_RDLOCK
write_behind_co_try_write(WriteBehind *wb, const WriteRequest *w);

/*
 * Wait until there is room for a request of @bytes, and a quarter of the memory
 * remains for others, or the queue has failed.  Does not hold the room.
 */
void coroutine_fn write_behind_co_await_room(WriteBehind *wb, int64_t bytes);

/*
 * Flush what was queued before.  If @wait, or without a queue, return when the
 * child has done it, or with the error of the queue.
 */
int coroutine_fn write_behind_co_flush(WriteBehind *wb, bool wait);

/* Wait for what is queued or in flight now and touches this range */
void coroutine_fn
write_behind_co_await(WriteBehind *wb, int64_t offset, int64_t bytes);

/* Whether write_behind_co_await() would have to wait.  From any thread. */
bool write_behind_has_pending(WriteBehind *wb, int64_t offset, int64_t bytes);

/*
 * To be called by .bdrv_drain_begin of @bs: what was held back, to be sent
 * together with more, is sent now.
 */
void write_behind_drain_begin(WriteBehind *wb);

/*
 * Drop what is queued, without a call of the error function, because nobody
 * will need it.  What is in flight goes on.
 */
void write_behind_abandon(WriteBehind *wb);

/* May be called from any thread */
void write_behind_get_stats(WriteBehind *wb, WriteBehindStats *stats);

#endif /* BLOCK_WRITE_BEHIND_H */
