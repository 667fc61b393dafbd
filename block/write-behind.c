/*
 * Write-behind queue
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/reqlist.h"
#include "block/write-behind.h"
#include "qemu/interval-tree.h"
#include "qemu/lockable.h"
#include "qemu/range.h"
#include "qemu/timer.h"

/* As many requests are in flight at the child at once */
#define MAX_IN_FLIGHT 64

/*
 * So many queued requests do not wait for those in flight to end.  All of
 * MAX_IN_FLIGHT, if of 4 KiB, would not fit in the buffer of a unix socket.
 */
#define FULL_BATCH (MAX_IN_FLIGHT / 2)

/* The time without progress is measured in so many ticks */
#define TIMEOUT_TICKS 4

/* A request that changes the disk */
typedef struct WriteBehindReq {
    WriteBehind *wb;
    WriteBehindType type;
    int64_t offset;
    int64_t bytes;
    BdrvRequestFlags flags;
    QEMUIOVector *qiov;
    size_t qiov_offset;

    /*
     * If nobody waits for the request, it and its data are ours; this is the
     * memory that they take.  Otherwise 0, and all of it is the caller's.
     */
    uint64_t room;
    QEMUIOVector copy;
    bool done;
    int ret;

    /* Ascending, without gaps, in the order of arrival */
    uint64_t seq;
    int64_t since_ns;

    /* While it is queued, in WriteBehind.fifo and .queued */
    QTAILQ_ENTRY(WriteBehindReq) next;
    IntervalTreeNode place;

    /* While it is in flight, in WriteBehind.in_flight */
    BlockReq in_flight;

    /* Woken when the request ceases to be queued, and when it is done */
    CoQueue waiters;

    /* What @copy consists of */
    uint8_t data[];
} WriteBehindReq;

struct WriteBehind {
    BlockDriverState *bs;
    WriteBehindOptions opts;
    WriteBehindErrorFunc *on_error;

    /* Held while waiting for room, lest small requests overtake large ones */
    CoMutex admission;

    /* Protects all that follows */
    QemuMutex lock;

    /* The memory that is taken, and who waits until @room_wanted is not */
    uint64_t room_taken;
    uint64_t room_wanted;
    CoQueue room_waiter;

    /* Requests that were not begun, by their age and by their place */
    QTAILQ_HEAD(, WriteBehindReq) fifo;
    IntervalTreeRoot queued;

    BlockReqList in_flight;

    unsigned nb_queued;
    unsigned nb_in_flight;

    /*
     * As in Nagle's algorithm, requests gather while others are in flight, lest
     * the guest be disturbed by the end of each of them.  When none is, or when
     * there are many, @batch of them begin.  None is held back while somebody
     * is @waiting, or when they take much memory.
     */
    unsigned batch;
    unsigned waiting;

    /*
     * A coroutine is about to begin whatever can be sent.  This is so, or
     * something is in flight, while anything is queued or to be flushed.
     */
    bool beginning;

    uint64_t last_seq;

    /*
     * Whatever is not younger than @flush_wanted has to be flushed, than
     * @flush_target is going to be with the next flush, and than @flushed is.
     */
    uint64_t flush_wanted;
    uint64_t flush_target;
    uint64_t flushed;
    bool flushing;
    CoQueue flush_waiters;

    /* A negative errno: nothing is sent any more */
    int error;

    /*
     * Runs in the main loop while anything is pending, unless it has given the
     * child up.  It counts ticks in which nothing was completed, rather than
     * look at the clock, so that time in which we were stopped does not count.
     */
    QEMUTimer *timer;
    bool watching;
    bool hung_up;
    bool progress;
    unsigned idle_ticks;

    WriteBehindStats stats;
};

static void write_behind_tick(void *opaque);

WriteBehind *write_behind_new(BlockDriverState *bs,
                              const WriteBehindOptions *opts,
                              WriteBehindErrorFunc *on_error)
{
    WriteBehind *wb = g_new0(WriteBehind, 1);

    GLOBAL_STATE_CODE();

    wb->bs = bs;
    wb->opts = *opts;
    wb->on_error = on_error;
    qemu_co_mutex_init(&wb->admission);
    qemu_mutex_init(&wb->lock);
    qemu_co_queue_init(&wb->room_waiter);
    QTAILQ_INIT(&wb->fifo);
    QLIST_INIT(&wb->in_flight);
    qemu_co_queue_init(&wb->flush_waiters);
    /* Has to run while the main loop waits for the requests in flight */
    wb->timer = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                              SCALE_NS, write_behind_tick, wb);

    return wb;
}

void write_behind_free(WriteBehind *wb)
{
    GLOBAL_STATE_CODE();
    assert(!wb->beginning && !wb->nb_in_flight && !wb->flushing);
    assert(QTAILQ_EMPTY(&wb->fifo));

    timer_free(wb->timer);
    qemu_mutex_destroy(&wb->lock);
    g_free(wb);
}

static void write_behind_enqueue(WriteBehind *wb, WriteBehindReq *req)
{
    req->place.start = req->offset;
    req->place.last = req->offset + req->bytes - 1;
    interval_tree_insert(&req->place, &wb->queued);
    QTAILQ_INSERT_TAIL(&wb->fifo, req, next);
    wb->nb_queued++;
}

static void coroutine_fn
write_behind_dequeue(WriteBehind *wb, WriteBehindReq *req)
{
    QTAILQ_REMOVE(&wb->fifo, req, next);
    interval_tree_remove(&req->place, &wb->queued);
    wb->nb_queued--;
    qemu_co_queue_restart_all(&req->waiters);
}

static bool write_behind_has_room(WriteBehind *wb, uint64_t room)
{
    return wb->room_taken + room <= wb->opts.max_bytes;
}

static void coroutine_fn write_behind_wake_room_waiter(WriteBehind *wb)
{
    if (wb->error || write_behind_has_room(wb, wb->room_wanted)) {
        qemu_co_queue_restart_all(&wb->room_waiter);
    }
}

static void coroutine_fn write_behind_put_room(WriteBehind *wb, uint64_t room)
{
    wb->room_taken -= room;
    write_behind_wake_room_waiter(wb);
}

/* The request is neither queued nor in flight any more */
static void coroutine_fn
write_behind_finish(WriteBehind *wb, WriteBehindReq *req, int ret)
{
    wb->stats.pending_requests--;
    wb->stats.pending_bytes -= req->room;

    if (!req->room) {
        req->done = true;
        req->ret = ret;
        qemu_co_queue_restart_all(&req->waiters);
        return;
    }

    write_behind_put_room(wb, req->room);
    g_free(req);
}

static void coroutine_fn write_behind_drop_all(WriteBehind *wb)
{
    WriteBehindReq *req, *next;

    QTAILQ_FOREACH_SAFE(req, &wb->fifo, next, next) {
        write_behind_dequeue(wb, req);
        wb->stats.dropped_requests++;
        write_behind_finish(wb, req, wb->error);
    }

    write_behind_wake_room_waiter(wb);
    wb->flush_wanted = wb->flush_target = wb->flushed;
    qemu_co_queue_restart_all(&wb->flush_waiters);
}

static void
write_behind_fail(WriteBehind *wb, WriteBehindType type, int ret)
{
    if (!wb->error) {
        wb->error = ret;
        wb->on_error(wb->bs, type, ret);
    }
}

/* Do not send what is queued and will be overwritten at once */
static void coroutine_fn
write_behind_supersede(WriteBehind *wb, WriteBehindReq *req)
{
    uint64_t start = req->offset;
    uint64_t last = start + req->bytes - 1;
    IntervalTreeNode *place, *next;

    /*
     * Nobody knows what is there after a discard.  And who waits for a request
     * must not have to wait for younger ones, forever if need be.
     */
    if (req->type == WRITE_BEHIND_DISCARD || wb->waiting) {
        return;
    }

    for (place = interval_tree_iter_first(&wb->queued, start, last); place;
         place = next) {
        WriteBehindReq *old = container_of(place, WriteBehindReq, place);

        next = interval_tree_iter_next(place, start, last);
        if (place->start < start || place->last > last || !old->room) {
            continue;
        }

        /* What makes the old request permanent has to wait for the new one */
        req->flags |= old->flags & BDRV_REQ_FUA;
        if (old->seq <= wb->flush_wanted) {
            wb->flush_wanted = req->seq;
        }

        wb->stats.superseded_requests++;
        wb->stats.superseded_bytes += old->bytes;
        write_behind_dequeue(wb, old);
        write_behind_finish(wb, old, 0);
    }
}

static WriteBehindReq *write_behind_oldest(WriteBehind *wb)
{
    WriteBehindReq *oldest = QTAILQ_FIRST(&wb->fifo);
    BlockReq *r;

    QLIST_FOREACH(r, &wb->in_flight, list) {
        WriteBehindReq *req = container_of(r, WriteBehindReq, in_flight);

        if (!oldest || req->seq < oldest->seq) {
            oldest = req;
        }
    }

    return oldest;
}

/* A flush under way stays as it is, so that newer ones cannot put it off */
static bool write_behind_may_flush(WriteBehind *wb)
{
    WriteBehindReq *oldest;

    if (wb->flushing || wb->flush_wanted == wb->flushed) {
        return false;
    }
    if (wb->flush_target == wb->flushed) {
        wb->flush_target = wb->flush_wanted;
    }
    oldest = write_behind_oldest(wb);

    return !oldest || oldest->seq > wb->flush_target;
}

static bool write_behind_gathers(WriteBehind *wb)
{
    if (!wb->nb_in_flight || wb->nb_queued >= FULL_BATCH) {
        wb->batch = wb->nb_queued;
    }

    return !wb->batch && !wb->waiting &&
           wb->stats.pending_bytes < wb->opts.max_bytes / 2 &&
           !qatomic_read(&wb->bs->quiesce_counter);
}

/*
 * The request to send next, if there is one that needs not wait for another in
 * flight.  Only the oldest is tried, which keeps overlapping ones in order.
 */
static WriteBehindReq *write_behind_next(WriteBehind *wb)
{
    WriteBehindReq *req = QTAILQ_FIRST(&wb->fifo);

    if (!req || wb->nb_in_flight == MAX_IN_FLIGHT || write_behind_gathers(wb) ||
        reqlist_find_conflict(&wb->in_flight, req->offset, req->bytes)) {
        return NULL;
    }

    return req;
}

/*
 * The child may have become smaller than it was when the guest's disk was put
 * above it, and what is beyond its end is refused by an assertion there.  The
 * same goes for filters: each remembers the size.
 */
static bool coroutine_fn GRAPH_RDLOCK
write_behind_is_in_bounds(WriteBehind *wb, WriteBehindReq *req)
{
    BlockDriverState *bs;

    for (bs = wb->bs->file->bs; bs; bs = bdrv_filter_bs(bs)) {
        if (bdrv_co_getlength(bs) < req->offset + req->bytes) {
            return false;
        }
    }

    return true;
}

static int coroutine_fn GRAPH_RDLOCK
write_behind_send(WriteBehind *wb, WriteBehindReq *req)
{
    BdrvChild *child = wb->bs->file;

    if (!write_behind_is_in_bounds(wb, req)) {
        return -EIO;
    }

    switch (req->type) {
    case WRITE_BEHIND_WRITE:
        return bdrv_co_pwritev_part(child, req->offset, req->bytes, req->qiov,
                                    req->qiov_offset, req->flags);
    case WRITE_BEHIND_ZEROES:
        return bdrv_co_pwrite_zeroes(child, req->offset, req->bytes,
                                     req->flags);
    case WRITE_BEHIND_DISCARD:
        return bdrv_co_pdiscard(child, req->offset, req->bytes);
    case WRITE_BEHIND_FLUSH:
        return bdrv_co_flush(child->bs);
    default:
        g_assert_not_reached();
    }
}

/* Takes the lock, after the child was at it */
static int coroutine_fn write_behind_do(WriteBehind *wb, WriteBehindReq *req)
{
    int ret;

    bdrv_graph_co_rdlock();
    ret = write_behind_send(wb, req);
    bdrv_graph_co_rdunlock();
    qemu_mutex_lock(&wb->lock);
    wb->progress = true;

    if (ret < 0) {
        wb->stats.failed_requests++;
        write_behind_fail(wb, req->type, ret);
    }

    return ret;
}

static bool write_behind_has_work(WriteBehind *wb)
{
    if (wb->error) {
        /* To be dropped, and who waits for it to be woken */
        return !QTAILQ_EMPTY(&wb->fifo) || wb->flush_wanted != wb->flushed ||
               !qemu_co_queue_empty(&wb->room_waiter);
    }

    return write_behind_next(wb) || write_behind_may_flush(wb);
}

static void coroutine_fn write_behind_begin(void *opaque);

/* Called whenever something may have become possible to send */
static void write_behind_kick(WriteBehind *wb)
{
    if (wb->beginning || !write_behind_has_work(wb)) {
        return;
    }

    /* Not at once: until then, there may be more to send together */
    wb->beginning = true;
    bdrv_inc_in_flight(wb->bs);
    aio_co_schedule(bdrv_get_aio_context(wb->bs),
                    qemu_coroutine_create(write_behind_begin, wb));
}

static bool write_behind_is_pending(WriteBehind *wb)
{
    return wb->stats.pending_requests || wb->flushing;
}

static void write_behind_next_tick(WriteBehind *wb)
{
    int64_t tick = MAX(wb->opts.timeout_ms * SCALE_MS / TIMEOUT_TICKS, 1);

    wb->watching = true;
    timer_mod(wb->timer, qemu_clock_get_ns(QEMU_CLOCK_REALTIME) + tick);
}

/* Called before anything is sent */
static void write_behind_watch(WriteBehind *wb)
{
    if (!wb->nb_in_flight && !wb->flushing) {
        wb->progress = true;
    }
    if (wb->opts.timeout_ms && !wb->watching && !wb->hung_up) {
        write_behind_next_tick(wb);
    }
}

/* With the lock.  Whether the child has to be given up. */
static bool write_behind_is_stuck(WriteBehind *wb)
{
    wb->watching = false;
    if (!write_behind_is_pending(wb)) {
        return false;
    }

    wb->idle_ticks = wb->progress ? 0 : wb->idle_ticks + 1;
    wb->progress = false;
    if (wb->idle_ticks < TIMEOUT_TICKS) {
        write_behind_next_tick(wb);
        return false;
    }

    return true;
}

static void write_behind_tick(void *opaque)
{
    WriteBehind *wb = opaque;
    WriteBehindReq *oldest;

    WITH_QEMU_LOCK_GUARD(&wb->lock) {
        if (!write_behind_is_stuck(wb)) {
            return;
        }
        wb->hung_up = true;
        oldest = write_behind_oldest(wb);
        write_behind_fail(wb, oldest ? oldest->type : WRITE_BEHIND_FLUSH,
                          -ETIMEDOUT);
        write_behind_kick(wb);
    }

    wb->opts.hang_up(wb->bs);
}

/* Until write_behind_end_wait(), send whatever there is.  With the lock. */
static void write_behind_begin_wait(WriteBehind *wb)
{
    wb->waiting++;
    write_behind_kick(wb);
}

static void write_behind_end_wait(WriteBehind *wb)
{
    wb->waiting--;
}

/*
 * Gives the lock back, at the end of a coroutine of ours, which may be the last
 * thing that keeps the queue from being freed
 */
static void coroutine_fn write_behind_end(WriteBehind *wb)
{
    BlockDriverState *bs = wb->bs;

    write_behind_kick(wb);
    qemu_mutex_unlock(&wb->lock);
    bdrv_dec_in_flight(bs);
}

static void coroutine_fn write_behind_do_request(void *opaque)
{
    WriteBehindReq *req = opaque;
    WriteBehind *wb = req->wb;
    int ret = write_behind_do(wb, req);

    if (ret >= 0) {
        wb->stats.sent_requests++;
        if (req->type != WRITE_BEHIND_DISCARD) {
            wb->stats.sent_bytes += req->bytes;
        }
    }
    reqlist_remove_req(&req->in_flight);
    wb->nb_in_flight--;
    write_behind_finish(wb, req, MIN(ret, 0));
    write_behind_end(wb);
}

static void coroutine_fn write_behind_do_flush(void *opaque)
{
    WriteBehind *wb = opaque;
    WriteBehindReq req = { .type = WRITE_BEHIND_FLUSH };

    if (write_behind_do(wb, &req) >= 0) {
        wb->stats.flushes++;
        wb->flushed = wb->flush_target;
    }
    wb->flushing = false;
    qemu_co_queue_restart_all(&wb->flush_waiters);
    write_behind_end(wb);
}

/* A coroutine that begins to do what is to be done next, or NULL */
static Coroutine *coroutine_fn write_behind_take_next(WriteBehind *wb)
{
    WriteBehindReq *req = write_behind_next(wb);

    if (write_behind_may_flush(wb)) {
        write_behind_watch(wb);
        wb->flushing = true;
        return qemu_coroutine_create(write_behind_do_flush, wb);
    }
    if (!req) {
        return NULL;
    }

    write_behind_watch(wb);
    write_behind_dequeue(wb, req);
    reqlist_init_req(&wb->in_flight, &req->in_flight, req->offset, req->bytes);
    wb->nb_in_flight++;
    wb->batch -= wb->batch > 0;
    return qemu_coroutine_create(write_behind_do_request, req);
}

/* Send whatever can be sent, and let the child send it together */
static void coroutine_fn write_behind_begin(void *opaque)
{
    WriteBehind *wb = opaque;
    Coroutine *co;

    qemu_mutex_lock(&wb->lock);
    for (;;) {
        if (wb->error) {
            write_behind_drop_all(wb);
        }
        co = write_behind_take_next(wb);
        if (!co) {
            break;
        }
        bdrv_inc_in_flight(wb->bs);
        qemu_mutex_unlock(&wb->lock);
        qemu_coroutine_enter(co);
        qemu_mutex_lock(&wb->lock);
    }
    wb->beginning = false;
    write_behind_end(wb);
}

/* With the lock.  If this returns an error, @req was dropped. */
static int coroutine_fn
write_behind_add(WriteBehind *wb, WriteBehindReq *req)
{
    WriteBehindStats *stats = &wb->stats;

    stats->pending_requests++;
    stats->pending_bytes += req->room;
    stats->max_pending_bytes = MAX(stats->max_pending_bytes,
                                   stats->pending_bytes);
    qemu_co_queue_init(&req->waiters);

    if (wb->error) {
        stats->dropped_requests++;
        write_behind_finish(wb, req, wb->error);
        return wb->error;
    }

    req->seq = ++wb->last_seq;
    req->since_ns = qemu_clock_get_ns(QEMU_CLOCK_REALTIME);
    write_behind_supersede(wb, req);
    write_behind_enqueue(wb, req);
    write_behind_kick(wb);

    return 0;
}

/* Queue @req, which is the caller's, and wait until it is done */
static int coroutine_fn
write_behind_add_and_wait(WriteBehind *wb, WriteBehindReq *req)
{
    QEMU_LOCK_GUARD(&wb->lock);

    write_behind_add(wb, req);
    write_behind_begin_wait(wb);
    while (!req->done) {
        qemu_co_queue_wait(&req->waiters, &wb->lock);
    }
    write_behind_end_wait(wb);

    return req->ret;
}

/* Whoever comes later waits behind.  After an error, there is room. */
static void coroutine_fn write_behind_get_room(WriteBehind *wb, uint64_t room)
{
    QEMU_LOCK_GUARD(&wb->admission);
    QEMU_LOCK_GUARD(&wb->lock);

    wb->room_wanted = room;
    while (!write_behind_has_room(wb, room) && !wb->error) {
        qemu_co_queue_wait(&wb->room_waiter, &wb->lock);
    }
    wb->room_taken += room;
}

/*
 * Wait for room, and make @req one that is ours, with a copy of its data.
 * Returns NULL if there can never be room for it.
 */
static WriteBehindReq *coroutine_fn
write_behind_take(WriteBehind *wb, const WriteBehindReq *req)
{
    uint64_t bytes = req->type == WRITE_BEHIND_WRITE ? req->bytes : 0;
    uint64_t room = sizeof(*req) + bytes;
    WriteBehindReq *taken;

    if (room > wb->opts.max_bytes) {
        return NULL;
    }

    write_behind_get_room(wb, room);

    /*
     * The data is behind the request, and not aligned: with an allocator that
     * does that, small requests would take twice the memory.
     */
    taken = g_try_malloc(room);
    if (!taken) {
        QEMU_LOCK_GUARD(&wb->lock);
        write_behind_put_room(wb, room);
        return NULL;
    }

    *taken = *req;
    taken->room = room;
    taken->flags &= ~BDRV_REQ_REGISTERED_BUF;
    if (bytes) {
        qemu_iovec_to_buf(req->qiov, req->qiov_offset, taken->data, bytes);
        qemu_iovec_init_buf(&taken->copy, taken->data, bytes);
        taken->qiov = &taken->copy;
        taken->qiov_offset = 0;
    }

    return taken;
}

static int coroutine_fn GRAPH_RDLOCK
write_behind_co_request(WriteBehind *wb, WriteBehindReq req)
{
    WriteBehindReq *taken;

    if (!req.bytes) {
        return 0;
    }

    taken = write_behind_take(wb, &req);
    if (!taken) {
        return write_behind_add_and_wait(wb, &req);
    }

    QEMU_LOCK_GUARD(&wb->lock);
    return write_behind_add(wb, taken);
}

int coroutine_fn
write_behind_co_pwritev(WriteBehind *wb, int64_t offset, int64_t bytes,
                        QEMUIOVector *qiov, size_t qiov_offset,
                        BdrvRequestFlags flags)
{
    return write_behind_co_request(wb, (WriteBehindReq) {
        .wb             = wb,
        .type           = WRITE_BEHIND_WRITE,
        .offset         = offset,
        .bytes          = bytes,
        .flags          = flags,
        .qiov           = qiov,
        .qiov_offset    = qiov_offset,
    });
}

int coroutine_fn
write_behind_co_pwrite_zeroes(WriteBehind *wb, int64_t offset, int64_t bytes,
                              BdrvRequestFlags flags)
{
    return write_behind_co_request(wb, (WriteBehindReq) {
        .wb             = wb,
        .type           = WRITE_BEHIND_ZEROES,
        .offset         = offset,
        .bytes          = bytes,
        .flags          = flags,
    });
}

int coroutine_fn
write_behind_co_pdiscard(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    return write_behind_co_request(wb, (WriteBehindReq) {
        .wb             = wb,
        .type           = WRITE_BEHIND_DISCARD,
        .offset         = offset,
        .bytes          = bytes,
    });
}

int coroutine_fn write_behind_co_flush(WriteBehind *wb, bool wait)
{
    uint64_t seq;

    QEMU_LOCK_GUARD(&wb->lock);

    seq = wb->last_seq;
    if (wb->error || seq <= wb->flushed) {
        return wb->error;
    }

    wb->flush_wanted = seq;
    write_behind_kick(wb);
    if (!wait && wb->opts.max_bytes) {
        return 0;
    }

    /* No younger request may take the place of one that we wait for */
    write_behind_begin_wait(wb);
    while (wb->flushed < seq && !wb->error) {
        qemu_co_queue_wait(&wb->flush_waiters, &wb->lock);
    }
    write_behind_end_wait(wb);

    return wb->flushed < seq ? wb->error : 0;
}

/*
 * Where to wait for one of the requests that touch the range and are not
 * younger than @seq, or NULL
 */
static CoQueue *
write_behind_find_waiters(WriteBehind *wb, int64_t offset, int64_t bytes,
                          uint64_t seq)
{
    uint64_t last = offset + bytes - 1;
    IntervalTreeNode *place;
    BlockReq *r;

    for (place = interval_tree_iter_first(&wb->queued, offset, last); place;
         place = interval_tree_iter_next(place, offset, last)) {
        WriteBehindReq *req = container_of(place, WriteBehindReq, place);

        if (req->seq <= seq) {
            return &req->waiters;
        }
    }
    QLIST_FOREACH(r, &wb->in_flight, list) {
        WriteBehindReq *req = container_of(r, WriteBehindReq, in_flight);

        if (req->seq <= seq &&
            ranges_overlap(offset, bytes, r->offset, r->bytes)) {
            return &r->wait_queue;
        }
    }

    return NULL;
}

void coroutine_fn
write_behind_co_settle(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    CoQueue *waiters;
    uint64_t seq;

    if (!bytes) {
        return;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    /* No younger one takes the place of one that we wait for, see supersede */
    seq = wb->last_seq;
    while ((waiters = write_behind_find_waiters(wb, offset, bytes, seq))) {
        write_behind_begin_wait(wb);
        qemu_co_queue_wait(waiters, &wb->lock);
        write_behind_end_wait(wb);
    }
}

bool write_behind_has_pending(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return bytes &&
           write_behind_find_waiters(wb, offset, bytes, wb->last_seq);
}

void write_behind_drain_begin(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    write_behind_kick(wb);
}

void write_behind_abandon(WriteBehind *wb)
{
    QEMU_LOCK_GUARD(&wb->lock);

    if (!wb->error) {
        wb->error = -ECANCELED;
        write_behind_kick(wb);
    }
}

void write_behind_get_stats(WriteBehind *wb, WriteBehindStats *stats)
{
    WriteBehindReq *oldest;

    QEMU_LOCK_GUARD(&wb->lock);

    *stats = wb->stats;
    oldest = write_behind_oldest(wb);
    stats->oldest_ns = oldest ? oldest->since_ns : 0;
}
