/*
 * Write-behind queue
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "block/write-behind.h"
#include "qemu/interval-tree.h"
#include "qemu/lockable.h"
#include "qemu/timer.h"
#include "qemu/units.h"

/* As many requests, and about as many bytes, are in flight at once */
#define MAX_IN_FLIGHT 256
#define MAX_IN_FLIGHT_BYTES (32 * MiB)

/*
 * So many requests that may begin do not wait for those in flight to end.
 * Twice as many, of 4 KiB, would not fit in the buffer of a unix socket.
 */
#define FULL_BATCH 32

/*
 * What is contiguous is joined until it is as large as this.  More would make
 * the cost of a request no smaller, and delay what waits for a part of it.
 */
#define MAX_JOINED_DATA (1 * MiB)
#define MAX_JOINED_PARTS 256
#define MAX_JOINED_ZEROES (16 * MiB)

/* Larger requests are cut, so that who watches a slow child sees it go on */
#define MAX_REQUEST (16 * MiB)

/*
 * With a bound in time, the first and the smallest of what may be in the queue.
 * See write_behind_weigh() for the unit.
 */
#define FIRST_LIMIT (4 * MiB)
#define MIN_LIMIT (256 * KiB)

/*
 * A place in the queue, that of a request, or of somebody who waits for the
 * requests in a range: its turn comes when all older requests that overlap are
 * done.
 */
typedef struct Place {
    IntervalTreeNode range;

    /* Ascending in the order of arrival.  The parts of a request share it. */
    uint64_t seq;

    /* If so, it is in WriteBehind.ready, else in a request's followers */
    bool ready;
    QTAILQ_ENTRY(Place) next;
    QLIST_ENTRY(Place) follow;

    /* Nobody waits any more: the request, or those in the range, are done */
    bool is_request;
    bool done;
    CoQueue waiter;
} Place;

typedef QTAILQ_HEAD(PlaceList, Place) PlaceList;
typedef QLIST_HEAD(FollowerList, Place) FollowerList;

/* A request that changes the disk, or what is left of it */
typedef struct WriteBehindReq {
    Place place;
    WriteBehindType type;
    BdrvRequestFlags flags;
    QEMUIOVector *qiov;
    size_t qiov_offset;

    /*
     * If nobody waits for the request, it and its data are ours; this is the
     * memory that they take.  Otherwise 0, and all of it is the caller's.
     */
    uint64_t room;
    QEMUIOVector copy;
    int ret;

    /* How many of those that we were given it stands for */
    unsigned requests;

    /* What is counted for it in WriteBehind.weight */
    uint64_t weight;

    /* When it came, and WriteBehind.carried at that time */
    int64_t since_ns;
    uint64_t carried;

    /* In WriteBehind.pending */
    QTAILQ_ENTRY(WriteBehindReq) next;
    /* Else it is in flight */
    bool queued;

    /* Some of those whose turn comes only after this */
    FollowerList followers;

    /* What @copy consists of */
    uint8_t data[];
} WriteBehindReq;

/* One or more requests that are contiguous, in flight together */
typedef struct WriteBehindSend {
    WriteBehind *wb;
    PlaceList parts;
    unsigned nb_parts;

    /* From the beginning of the first to the end of the last */
    uint64_t start;
    uint64_t last;
} WriteBehindSend;

struct WriteBehind {
    BlockDriverState *bs;
    /* NULL for bs->file, whatever that is */
    BdrvChild *child;
    WriteBehindOptions opts;
    WriteBehindErrorFunc *on_error;

    /* Held while waiting for room, lest small requests overtake large ones */
    CoMutex admission;

    /* Protects all that follows */
    QemuMutex lock;

    /* What is taken, and who waits until there is room for what it wants */
    uint64_t room;
    uint64_t weight;
    uint64_t wanted_room;
    uint64_t wanted_weight;
    CoQueue room_waiter;

    /*
     * The weight that the child has completed in all, and what it completes in
     * opts.max_ms.
     */
    uint64_t carried;
    uint64_t limit;
    int64_t limit_raised_ns;

    /* All requests, queued or in flight: by age, and by their range */
    QTAILQ_HEAD(, WriteBehindReq) pending;
    IntervalTreeRoot ranges;

    /* The queued ones that may begin; the others follow one that is pending */
    PlaceList ready;

    unsigned nb_queued;
    unsigned nb_ready;
    unsigned nb_in_flight;
    uint64_t in_flight_bytes;

    /*
     * As in Nagle's algorithm, requests gather while others are in flight, lest
     * the guest be disturbed by the end of each of them, and so that they can
     * be joined.  When none is, or when there are many, @batch of them begin.
     * None is held back while somebody is @waiting, or when they take much
     * memory.
     */
    unsigned batch;
    unsigned waiting;

    /*
     * What is not younger than this has somebody who waits for it.  No younger
     * request takes the place of it: who waits must not have to wait for those,
     * forever if need be.
     */
    uint64_t awaited;

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

    WriteBehindStats stats;
};

const char *write_request_name(WriteBehindType type)
{
    static const char *const names[] = {
        [WRITE_BEHIND_WRITE]    = "write",
        [WRITE_BEHIND_ZEROES]   = "write of zeroes",
        [WRITE_BEHIND_DISCARD]  = "discard",
        [WRITE_BEHIND_FLUSH]    = "flush",
    };

    return names[type];
}

int coroutine_fn write_request_co_do(BdrvChild *child, const WriteRequest *w)
{
    switch (w->type) {
    case WRITE_BEHIND_WRITE:
        return bdrv_co_pwritev_part(child, w->offset, w->bytes, w->qiov,
                                    w->qiov_offset, w->flags);
    case WRITE_BEHIND_ZEROES:
        return bdrv_co_pwrite_zeroes(child, w->offset, w->bytes, w->flags);
    case WRITE_BEHIND_DISCARD:
        return bdrv_co_pdiscard(child, w->offset, w->bytes);
    default:
        g_assert_not_reached();
    }
}

WriteBehind *write_behind_new(BlockDriverState *bs, BdrvChild *child,
                              const WriteBehindOptions *opts,
                              WriteBehindErrorFunc *on_error)
{
    WriteBehind *wb = g_new0(WriteBehind, 1);

    GLOBAL_STATE_CODE();

    wb->bs = bs;
    wb->child = child;
    wb->opts = *opts;
    wb->on_error = on_error;
    qemu_co_mutex_init(&wb->admission);
    qemu_mutex_init(&wb->lock);
    qemu_co_queue_init(&wb->room_waiter);
    wb->limit = FIRST_LIMIT;
    QTAILQ_INIT(&wb->pending);
    QTAILQ_INIT(&wb->ready);
    qemu_co_queue_init(&wb->flush_waiters);

    return wb;
}

void write_behind_free(WriteBehind *wb)
{
    GLOBAL_STATE_CODE();
    assert(!wb->beginning && !wb->nb_in_flight && !wb->flushing);
    assert(QTAILQ_EMPTY(&wb->pending));

    qemu_mutex_destroy(&wb->lock);
    g_free(wb);
}

static int64_t write_behind_req_bytes(const WriteBehindReq *req)
{
    return req->place.range.last - req->place.range.start + 1;
}

static int64_t write_behind_send_bytes(const WriteBehindSend *send)
{
    return send->last - send->start + 1;
}

static WriteBehindReq *write_behind_req(Place *place)
{
    return container_of(place, WriteBehindReq, place);
}

/* Where the requests go */
static BdrvChild *GRAPH_RDLOCK write_behind_child(const WriteBehind *wb)
{
    return wb->child ?: wb->bs->file;
}

/*
 * How much of the child's time a request takes, in bytes of data that take as
 * long: each has a cost of its own, and zeroes cost little.  It need not be
 * right, as what the child completes is measured in the same unit.  But the
 * better it is, the less does another mix of requests change the measure.
 */
static uint64_t write_behind_weigh(WriteBehindType type, int64_t bytes)
{
    return 4 * KiB + (type == WRITE_BEHIND_WRITE ? bytes : bytes / 64);
}

static bool
write_behind_has_room(WriteBehind *wb, uint64_t room, uint64_t weight)
{
    return wb->room + room <= wb->opts.max_bytes &&
           (!wb->opts.max_ms || !wb->weight ||
            wb->weight + weight <= wb->limit);
}

static void coroutine_fn write_behind_wake_room_waiter(WriteBehind *wb)
{
    if (wb->error ||
        write_behind_has_room(wb, wb->wanted_room, wb->wanted_weight)) {
        qemu_co_queue_restart_all(&wb->room_waiter);
    }
}

static void coroutine_fn
write_behind_put_room(WriteBehind *wb, uint64_t room, uint64_t weight)
{
    wb->room -= room;
    wb->weight -= weight;
    write_behind_wake_room_waiter(wb);
}

/*
 * The followers of a request that touches the range and is older than @seq, or
 * NULL
 */
static FollowerList *
write_behind_find_older(WriteBehind *wb, uint64_t start, uint64_t last,
                        uint64_t seq)
{
    IntervalTreeNode *node;

    for (node = interval_tree_iter_first(&wb->ranges, start, last); node;
         node = interval_tree_iter_next(node, start, last)) {
        WriteBehindReq *req = container_of(node, WriteBehindReq, place.range);

        if (req->place.seq < seq) {
            return &req->followers;
        }
    }

    return NULL;
}

/*
 * Let it follow one of the older ones that overlap, or have its turn.  If it
 * @followed another, that is out of the way.
 */
static void coroutine_fn
write_behind_line_up(WriteBehind *wb, Place *place, bool followed)
{
    FollowerList *followers = write_behind_find_older(wb, place->range.start,
                                                      place->range.last,
                                                      place->seq);

    if (followers) {
        QLIST_INSERT_HEAD(followers, place, follow);
        return;
    }
    if (!place->is_request) {
        place->done = true;
        qemu_co_queue_restart_all(&place->waiter);
        return;
    }

    place->ready = true;
    wb->nb_ready++;
    if (followed) {
        /* It is older than most, and has waited long enough */
        QTAILQ_INSERT_HEAD(&wb->ready, place, next);
        wb->batch++;
    } else {
        QTAILQ_INSERT_TAIL(&wb->ready, place, next);
    }
}

static void coroutine_fn
write_behind_line_up_followers(WriteBehind *wb, WriteBehindReq *req)
{
    Place *place;

    while ((place = QLIST_FIRST(&req->followers))) {
        QLIST_REMOVE(place, follow);
        write_behind_line_up(wb, place, true);
    }
}

static void coroutine_fn
write_behind_enqueue(WriteBehind *wb, WriteBehindReq *req)
{
    QLIST_INIT(&req->followers);
    interval_tree_insert(&req->place.range, &wb->ranges);
    req->queued = true;
    wb->nb_queued++;
    write_behind_line_up(wb, &req->place, false);
}

/* It is about to begin, or will not be sent */
static void write_behind_dequeue(WriteBehind *wb, WriteBehindReq *req)
{
    if (req->place.ready) {
        wb->nb_ready--;
        QTAILQ_REMOVE(&wb->ready, &req->place, next);
    } else {
        QLIST_REMOVE(&req->place, follow);
    }
    req->queued = false;
    wb->nb_queued--;
}

/* Nobody needs to follow the request any more: it is over, or will be */
static void write_behind_clear_way(WriteBehind *wb, WriteBehindReq *req)
{
    interval_tree_remove(&req->place.range, &wb->ranges);
}

/* The request is over, and not in the way of others */
static void coroutine_fn
write_behind_finish(WriteBehind *wb, WriteBehindReq *req, int ret)
{
    QTAILQ_REMOVE(&wb->pending, req, next);
    wb->stats.pending_requests -= req->requests;
    wb->stats.pending_bytes -= req->room;
    write_behind_line_up_followers(wb, req);

    if (!req->room) {
        req->ret = ret;
        req->place.done = true;
        qemu_co_queue_restart_all(&req->place.waiter);
        return;
    }

    write_behind_put_room(wb, req->room, req->weight);
    g_free(req);
}

/* Finish a request that is queued, and will not be sent */
static void coroutine_fn
write_behind_skip(WriteBehind *wb, WriteBehindReq *req, int ret)
{
    write_behind_dequeue(wb, req);
    write_behind_clear_way(wb, req);
    write_behind_finish(wb, req, ret);
}

static void coroutine_fn write_behind_drop_all(WriteBehind *wb)
{
    WriteBehindReq *req, *next;

    QTAILQ_FOREACH_SAFE(req, &wb->pending, next, next) {
        if (req->queued) {
            wb->stats.dropped_requests += req->requests;
            write_behind_skip(wb, req, wb->error);
        }
    }

    write_behind_wake_room_waiter(wb);
    wb->flush_wanted = wb->flush_target = wb->flushed;
    qemu_co_queue_restart_all(&wb->flush_waiters);
}

static void write_behind_fail(WriteBehind *wb, WriteBehindType type, int ret)
{
    if (!wb->error) {
        wb->error = ret;
        wb->on_error(wb->bs, type, ret);
    }
}

/*
 * Whether a part of @old need not be sent because of @req.  Nobody knows what
 * is there after a discard.
 */
static bool write_behind_may_cut(WriteBehind *wb, const WriteBehindReq *old,
                                 const WriteBehindReq *req)
{
    return old->queued && old->room && old->place.seq > wb->awaited &&
           (req->type != WRITE_BEHIND_DISCARD || old->type == req->type);
}

/* What is left of @req.  It may still follow one that it overlaps no more. */
static void write_behind_set_range(WriteBehind *wb, WriteBehindReq *req,
                                   uint64_t start, uint64_t last)
{
    IntervalTreeNode *range = &req->place.range;
    uint64_t weight;

    interval_tree_remove(range, &wb->ranges);
    req->qiov_offset += start - range->start;
    range->start = start;
    range->last = last;
    interval_tree_insert(range, &wb->ranges);

    weight = write_behind_weigh(req->type, last - start + 1);
    wb->weight -= req->weight - weight;
    req->weight = weight;
}

/*
 * Cut what is behind @start off @req, and queue it as a request of its own.
 * Only without data, and if there is room.
 */
static bool coroutine_fn
write_behind_split(WriteBehind *wb, WriteBehindReq *req, uint64_t start)
{
    uint64_t last = req->place.range.last;
    WriteBehindReq *tail;

    if (req->type == WRITE_BEHIND_WRITE ||
        wb->room + sizeof(*tail) > wb->opts.max_bytes) {
        return false;
    }

    tail = g_new(WriteBehindReq, 1);
    *tail = *req;
    tail->room = sizeof(*tail);
    tail->requests = 0;
    tail->weight = write_behind_weigh(tail->type, last - start + 1);
    tail->place.range.start = start;
    tail->place.ready = false;
    wb->room += tail->room;
    wb->weight += tail->weight;
    wb->stats.pending_bytes += tail->room;

    write_behind_set_range(wb, req, req->place.range.start, start - 1);
    QTAILQ_INSERT_AFTER(&wb->pending, req, tail, next);
    write_behind_enqueue(wb, tail);

    return true;
}

/* Do not send what @old has in this range: @req will be sent for it */
static void coroutine_fn
write_behind_cut(WriteBehind *wb, WriteBehindReq *old, WriteBehindReq *req)
{
    const IntervalTreeNode *range = &old->place.range;
    uint64_t start = req->place.range.start;
    uint64_t last = req->place.range.last;
    int64_t bytes = write_behind_req_bytes(old);

    if (range->start < start && range->last > last &&
        !write_behind_split(wb, old, last + 1)) {
        return;
    }

    /* What makes the old request permanent has to wait for the new one */
    req->flags |= old->flags & BDRV_REQ_FUA;
    if (old->place.seq <= wb->flush_wanted) {
        wb->flush_wanted = req->place.seq;
    }

    if (range->start < start) {
        wb->stats.superseded_bytes += MIN(range->last, last) - start + 1;
        write_behind_set_range(wb, old, range->start, start - 1);
    } else if (range->last > last) {
        wb->stats.superseded_bytes += last - range->start + 1;
        write_behind_set_range(wb, old, last + 1, range->last);
    } else {
        wb->stats.superseded_requests += old->requests;
        wb->stats.superseded_bytes += bytes;
        write_behind_skip(wb, old, 0);
    }
}

/*
 * So that no two requests with data overlap in the queue, unless somebody waits
 * for one of them: then all can be in flight at once.
 */
static void coroutine_fn
write_behind_supersede(WriteBehind *wb, WriteBehindReq *req)
{
    uint64_t start = req->place.range.start;
    uint64_t last = req->place.range.last;
    IntervalTreeNode *node, *next;

    for (node = interval_tree_iter_first(&wb->ranges, start, last); node;
         node = next) {
        WriteBehindReq *old = container_of(node, WriteBehindReq, place.range);

        next = interval_tree_iter_next(node, start, last);
        if (write_behind_may_cut(wb, old, req)) {
            write_behind_cut(wb, old, req);
        }
    }
}

/* The youngest request that touches the range, or NULL */
static WriteBehindReq *
write_behind_find_youngest(WriteBehind *wb, uint64_t start, uint64_t last)
{
    WriteBehindReq *youngest = NULL;
    IntervalTreeNode *node;

    for (node = interval_tree_iter_first(&wb->ranges, start, last); node;
         node = interval_tree_iter_next(node, start, last)) {
        WriteBehindReq *req = container_of(node, WriteBehindReq, place.range);

        if (!youngest || req->place.seq > youngest->place.seq) {
            youngest = req;
        }
    }

    return youngest;
}

/*
 * Whether @old may get the data of @req, which is in the midst of it, or all of
 * it.  Somebody may wait for @old: it takes no longer with other data.
 */
static bool write_behind_may_absorb(WriteBehind *wb, const WriteBehindReq *old,
                                    const WriteBehindReq *req)
{
    const IntervalTreeNode *outer = &old->place.range;
    const IntervalTreeNode *inner = &req->place.range;

    if (!old->queued || !old->room || old->type != WRITE_BEHIND_WRITE ||
        !req->room || req->type == WRITE_BEHIND_DISCARD) {
        return false;
    }
    if (old->place.seq <= wb->awaited) {
        return outer->start <= inner->start && outer->last >= inner->last;
    }

    return outer->start < inner->start && outer->last > inner->last;
}

/*
 * Change the data of a write that is queued, if that will do.  It has to be the
 * youngest there, lest another come in between.
 */
static bool coroutine_fn
write_behind_absorb(WriteBehind *wb, WriteBehindReq *req)
{
    uint64_t start = req->place.range.start;
    uint64_t last = req->place.range.last;
    int64_t bytes = write_behind_req_bytes(req);
    WriteBehindReq *old = write_behind_find_youngest(wb, start, last);
    size_t offset;

    if (!old || !write_behind_may_absorb(wb, old, req)) {
        return false;
    }

    offset = old->qiov_offset + start - old->place.range.start;
    if (req->type == WRITE_BEHIND_WRITE) {
        qemu_iovec_from_buf(old->qiov, offset, req->data, bytes);
    } else {
        qemu_iovec_memset(old->qiov, offset, 0, bytes);
    }
    old->flags |= req->flags & BDRV_REQ_FUA;
    old->requests += req->requests;

    wb->stats.superseded_bytes += bytes;
    wb->stats.pending_bytes -= req->room;
    write_behind_put_room(wb, req->room, req->weight);
    g_free(req);

    return true;
}

static bool write_behind_child_is_busy(const WriteBehind *wb)
{
    return wb->nb_in_flight == MAX_IN_FLIGHT ||
           wb->in_flight_bytes >= MAX_IN_FLIGHT_BYTES;
}

/* Decide on what is to be done next.  The functions below only look at it. */
static void write_behind_decide(WriteBehind *wb)
{
    /* A flush under way stays as it is, so that newer ones cannot put it off */
    if (wb->flush_target == wb->flushed) {
        wb->flush_target = wb->flush_wanted;
    }
    if (!write_behind_child_is_busy(wb) &&
        (!wb->nb_in_flight || wb->nb_ready >= FULL_BATCH)) {
        wb->batch = wb->nb_ready;
    }
}

static bool write_behind_may_flush(const WriteBehind *wb)
{
    WriteBehindReq *oldest = QTAILQ_FIRST(&wb->pending);

    return !wb->flushing && wb->flush_target != wb->flushed &&
           (!oldest || oldest->place.seq > wb->flush_target);
}

static bool write_behind_gathers(const WriteBehind *wb)
{
    return !wb->batch && !wb->waiting &&
           wb->stats.pending_bytes < wb->opts.max_bytes / 2 &&
           !qatomic_read(&wb->bs->quiesce_counter);
}

/* The request to send next, if there is one that can be sent now */
static WriteBehindReq *write_behind_next(const WriteBehind *wb)
{
    Place *place = QTAILQ_FIRST(&wb->ready);

    if (!place || write_behind_child_is_busy(wb) || write_behind_gathers(wb)) {
        return NULL;
    }

    return write_behind_req(place);
}

/*
 * The child may have become smaller than it was when the guest's disk was put
 * above it, and what is beyond its end is refused by an assertion there.  The
 * same goes for filters: each remembers the size.
 */
static bool coroutine_fn GRAPH_RDLOCK
write_behind_is_in_bounds(WriteBehind *wb, int64_t end)
{
    BlockDriverState *bs;

    for (bs = write_behind_child(wb)->bs; bs; bs = bdrv_filter_bs(bs)) {
        if (bdrv_co_getlength(bs) < end) {
            return false;
        }
    }

    return true;
}

/* Send the parts as one request */
static int coroutine_fn GRAPH_RDLOCK write_behind_co_send(WriteBehindSend *send)
{
    WriteBehind *wb = send->wb;
    WriteBehindReq *first = write_behind_req(QTAILQ_FIRST(&send->parts));
    WriteRequest w = {
        .type           = first->type,
        .flags          = first->flags,
        .offset         = send->start,
        .bytes          = write_behind_send_bytes(send),
        .qiov           = first->qiov,
        .qiov_offset    = first->qiov_offset,
    };
    QEMUIOVector joined;
    Place *place;
    int ret;

    if (!write_behind_is_in_bounds(wb, w.offset + w.bytes)) {
        return -EIO;
    }

    if (w.qiov && send->nb_parts > 1) {
        qemu_iovec_init(&joined, send->nb_parts);
        QTAILQ_FOREACH(place, &send->parts, next) {
            WriteBehindReq *req = write_behind_req(place);

            qemu_iovec_concat(&joined, req->qiov, req->qiov_offset,
                              write_behind_req_bytes(req));
        }
        w.qiov = &joined;
        w.qiov_offset = 0;
    }

    ret = write_request_co_do(write_behind_child(wb), &w);
    if (w.qiov == &joined) {
        qemu_iovec_destroy(&joined);
    }

    return MIN(ret, 0);
}

static bool write_behind_has_work(WriteBehind *wb)
{
    if (wb->error) {
        /* To be dropped, and who waits for it to be woken */
        return wb->nb_queued || wb->flush_wanted != wb->flushed ||
               !qemu_co_queue_empty(&wb->room_waiter);
    }

    return write_behind_next(wb) || write_behind_may_flush(wb);
}

static void coroutine_fn write_behind_begin(void *opaque);

/* Called whenever something may have become possible to send */
static void write_behind_kick(WriteBehind *wb)
{
    if (wb->beginning) {
        return;
    }
    write_behind_decide(wb);
    if (!write_behind_has_work(wb)) {
        return;
    }

    /* Not at once: until then, there may be more to send together */
    wb->beginning = true;
    bdrv_inc_in_flight(wb->bs);
    aio_co_schedule(bdrv_get_aio_context(wb->bs),
                    qemu_coroutine_create(write_behind_begin, wb));
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

/* The child has completed something.  Takes the lock. */
static void write_behind_progress(WriteBehind *wb, WriteBehindType type,
                                  int ret)
{
    qemu_mutex_lock(&wb->lock);
    if (ret < 0) {
        wb->stats.failed_requests++;
        write_behind_fail(wb, type, ret);
    }
}

/*
 * Bound what may be in the queue by what the child completed since @req came,
 * scaled to the time that the queue may take.  The child is able to complete
 * more if there was not enough for it to do.  So this counts if it is more than
 * we knew of, or if @req took too long.
 */
static void
write_behind_adjust_limit(WriteBehind *wb, const WriteBehindReq *req)
{
    int64_t now = qemu_clock_get_ns(wb->opts.clock);
    double took = MAX(now - req->since_ns, 1);
    double may_take = wb->opts.max_ms * (double)SCALE_MS;
    uint64_t limit = (wb->carried - req->carried) * (may_take / took);

    if (took > may_take) {
        wb->limit = MAX(MIN(wb->limit, limit), MIN_LIMIT);
    } else if (limit > wb->limit && req->since_ns >= wb->limit_raised_ns) {
        /* Not at once: a child may complete more at first than later */
        wb->limit = MIN(wb->limit * 2, limit);
        wb->limit_raised_ns = now;
    }
}

static void write_behind_count_sent(WriteBehind *wb, WriteBehindSend *send)
{
    Place *place;

    QTAILQ_FOREACH(place, &send->parts, next) {
        WriteBehindReq *req = write_behind_req(place);
        int64_t bytes = write_behind_req_bytes(req);

        wb->carried += write_behind_weigh(req->type, bytes);
        wb->stats.sent_requests += req->requests;
        if (req->type != WRITE_BEHIND_DISCARD) {
            wb->stats.sent_bytes += bytes;
        }
    }
    if (wb->opts.max_ms) {
        write_behind_adjust_limit(
            wb, write_behind_req(QTAILQ_FIRST(&send->parts)));
    }
}

static uint64_t write_behind_data_bytes(WriteBehindSend *send)
{
    bool data = write_behind_req(QTAILQ_FIRST(&send->parts))->qiov;

    return data ? write_behind_send_bytes(send) : 0;
}

static void coroutine_fn write_behind_do_request(void *opaque)
{
    WriteBehindSend *send = opaque;
    WriteBehind *wb = send->wb;
    WriteBehindType type = write_behind_req(QTAILQ_FIRST(&send->parts))->type;
    Place *place;
    int ret;

    bdrv_graph_co_rdlock();
    ret = write_behind_co_send(send);
    bdrv_graph_co_rdunlock();

    write_behind_progress(wb, type, ret);
    if (ret == 0) {
        write_behind_count_sent(wb, send);
    }
    wb->nb_in_flight--;
    wb->in_flight_bytes -= write_behind_data_bytes(send);
    /* First of all, so that nothing follows one after the other */
    QTAILQ_FOREACH(place, &send->parts, next) {
        write_behind_clear_way(wb, write_behind_req(place));
    }
    while ((place = QTAILQ_FIRST(&send->parts))) {
        QTAILQ_REMOVE(&send->parts, place, next);
        write_behind_finish(wb, write_behind_req(place), ret);
    }
    g_free(send);
    write_behind_end(wb);
}

static void coroutine_fn write_behind_do_flush(void *opaque)
{
    WriteBehind *wb = opaque;
    int ret;

    bdrv_graph_co_rdlock();
    ret = bdrv_co_flush(write_behind_child(wb)->bs);
    bdrv_graph_co_rdunlock();

    write_behind_progress(wb, WRITE_BEHIND_FLUSH, ret);
    if (ret == 0) {
        wb->stats.flushes++;
        wb->flushed = wb->flush_target;
    }
    wb->flushing = false;
    qemu_co_queue_restart_all(&wb->flush_waiters);
    write_behind_end(wb);
}

static bool write_behind_may_join(WriteBehindSend *send, WriteBehindReq *req)
{
    WriteBehindReq *first = write_behind_req(QTAILQ_FIRST(&send->parts));
    bool data = first->type == WRITE_BEHIND_WRITE;

    return req->queued && req->place.ready && req->room && first->room &&
           req->type == first->type && req->flags == first->flags &&
           (!data || send->nb_parts < MAX_JOINED_PARTS) &&
           write_behind_send_bytes(send) + write_behind_req_bytes(req) <=
           (data ? MAX_JOINED_DATA : MAX_JOINED_ZEROES);
}

/* A request that can be sent together, and starts or ends at this byte */
static WriteBehindReq *
write_behind_find_neighbour(WriteBehindSend *send, uint64_t at)
{
    WriteBehind *wb = send->wb;
    IntervalTreeNode *node;

    for (node = interval_tree_iter_first(&wb->ranges, at, at); node;
         node = interval_tree_iter_next(node, at, at)) {
        WriteBehindReq *req = container_of(node, WriteBehindReq, place.range);
        uint64_t edge = at < send->start ? node->last : node->start;

        if (edge == at && write_behind_may_join(send, req)) {
            return req;
        }
    }

    return NULL;
}

static void
write_behind_add_part(WriteBehindSend *send, WriteBehindReq *req)
{
    IntervalTreeNode *range = &req->place.range;

    write_behind_dequeue(send->wb, req);
    send->nb_parts++;
    if (range->start < send->start) {
        QTAILQ_INSERT_HEAD(&send->parts, &req->place, next);
    } else {
        QTAILQ_INSERT_TAIL(&send->parts, &req->place, next);
    }
    send->start = MIN(send->start, range->start);
    send->last = MAX(send->last, range->last);
}

/* Take the request, and all that can be sent together with it */
static WriteBehindSend *write_behind_take(WriteBehind *wb, WriteBehindReq *req)
{
    WriteBehindSend *send = g_new(WriteBehindSend, 1);

    *send = (WriteBehindSend) {
        .wb     = wb,
        .start  = req->place.range.start,
        .last   = req->place.range.last,
    };
    QTAILQ_INIT(&send->parts);
    while (req) {
        write_behind_add_part(send, req);
        req = write_behind_find_neighbour(send, send->last + 1);
    }
    while (send->start &&
           (req = write_behind_find_neighbour(send, send->start - 1))) {
        write_behind_add_part(send, req);
    }

    wb->nb_in_flight++;
    wb->in_flight_bytes += write_behind_data_bytes(send);
    wb->batch -= MIN(wb->batch, send->nb_parts);

    return send;
}

/* A coroutine that begins to do what is to be done next, or NULL */
static Coroutine *coroutine_fn write_behind_take_next(WriteBehind *wb)
{
    WriteBehindReq *req;

    write_behind_decide(wb);
    if (write_behind_may_flush(wb)) {
        wb->flushing = true;
        return qemu_coroutine_create(write_behind_do_flush, wb);
    }
    req = write_behind_next(wb);
    if (!req) {
        return NULL;
    }

    return qemu_coroutine_create(write_behind_do_request,
                                 write_behind_take(wb, req));
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
    qemu_co_queue_init(&req->place.waiter);
    req->place.seq = ++wb->last_seq;
    req->place.is_request = true;
    req->requests = 1;
    req->since_ns = qemu_clock_get_ns(wb->opts.clock);
    req->carried = wb->carried;

    if (!wb->error && write_behind_absorb(wb, req)) {
        return 0;
    }

    QLIST_INIT(&req->followers);
    QTAILQ_INSERT_TAIL(&wb->pending, req, next);
    if (wb->error) {
        stats->dropped_requests++;
        write_behind_finish(wb, req, wb->error);
        return wb->error;
    }

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
    while (!req->place.done) {
        qemu_co_queue_wait(&req->place.waiter, &wb->lock);
    }
    write_behind_end_wait(wb);

    return req->ret;
}

/* Whoever comes later waits behind.  After an error, there is room. */
static void coroutine_fn
write_behind_get_room(WriteBehind *wb, uint64_t room, uint64_t weight)
{
    QEMU_LOCK_GUARD(&wb->admission);
    QEMU_LOCK_GUARD(&wb->lock);

    if (!write_behind_has_room(wb, room, weight)) {
        wb->wanted_room = room;
        wb->wanted_weight = weight;
        write_behind_begin_wait(wb);
        while (!write_behind_has_room(wb, room, weight) && !wb->error) {
            qemu_co_queue_wait(&wb->room_waiter, &wb->lock);
        }
        write_behind_end_wait(wb);
    }
    wb->room += room;
    wb->weight += weight;
}

static bool
write_behind_try_get_room(WriteBehind *wb, uint64_t room, uint64_t weight)
{
    QEMU_LOCK_GUARD(&wb->lock);

    if (!write_behind_has_room(wb, room, weight) && !wb->error) {
        return false;
    }
    wb->room += room;
    wb->weight += weight;

    return true;
}

/*
 * Get room, if need be and @wait by waiting for it, and make @req one that is
 * ours, with a copy of its data.  Returns NULL if there is none, which with
 * @wait is so if there can never be.
 */
static WriteBehindReq *coroutine_fn
write_behind_own(WriteBehind *wb, const WriteBehindReq *req, bool wait)
{
    int64_t bytes = write_behind_req_bytes(req);
    uint64_t data = req->type == WRITE_BEHIND_WRITE ? bytes : 0;
    uint64_t room = sizeof(*req) + data;
    uint64_t weight = write_behind_weigh(req->type, bytes);
    WriteBehindReq *own;

    if (room > wb->opts.max_bytes) {
        return NULL;
    }

    if (wait) {
        write_behind_get_room(wb, room, weight);
    } else if (!write_behind_try_get_room(wb, room, weight)) {
        return NULL;
    }

    /*
     * The data is behind the request, and not aligned: with an allocator that
     * does that, small requests would take twice the memory.
     */
    own = g_try_malloc(room);
    if (!own) {
        QEMU_LOCK_GUARD(&wb->lock);
        write_behind_put_room(wb, room, weight);
        return NULL;
    }

    *own = *req;
    own->room = room;
    own->weight = weight;
    own->flags &= ~BDRV_REQ_REGISTERED_BUF;
    if (data) {
        qemu_iovec_to_buf(req->qiov, req->qiov_offset, own->data, data);
        qemu_iovec_init_buf(&own->copy, own->data, data);
        own->qiov = &own->copy;
        own->qiov_offset = 0;
    }

    return own;
}

static int coroutine_fn
write_behind_co_queue(WriteBehind *wb, WriteBehindReq *req, bool wait)
{
    WriteBehindReq *own = write_behind_own(wb, req, wait);

    if (!own) {
        return wait ? write_behind_add_and_wait(wb, req) : -EAGAIN;
    }

    QEMU_LOCK_GUARD(&wb->lock);
    return write_behind_add(wb, own);
}

static int coroutine_fn
write_behind_co_cut(WriteBehind *wb, const WriteRequest *w, bool wait)
{
    int64_t end = w->offset + w->bytes;
    int64_t offset, next;
    int ret = 0;

    assert(!w->bytes || !w->qiov == (w->type != WRITE_BEHIND_WRITE));

    for (offset = w->offset; offset < end && ret == 0; offset = next) {
        WriteBehindReq req = {
            .type           = w->type,
            .flags          = w->flags,
            .qiov           = w->qiov,
            .qiov_offset    = w->qiov_offset + offset - w->offset,
        };

        next = MIN(end, QEMU_ALIGN_DOWN(offset, MAX_REQUEST) + MAX_REQUEST);
        req.place.range.start = offset;
        req.place.range.last = next - 1;
        ret = write_behind_co_queue(wb, &req, wait);
    }

    return ret;
}

int coroutine_fn write_behind_co_write(WriteBehind *wb, const WriteRequest *w)
{
    return write_behind_co_cut(wb, w, true);
}

int coroutine_fn
write_behind_co_try_write(WriteBehind *wb, const WriteRequest *w)
{
    return write_behind_co_cut(wb, w, false);
}

void coroutine_fn write_behind_co_await_room(WriteBehind *wb, int64_t bytes)
{
    uint64_t room = MIN(sizeof(WriteBehindReq) + bytes + wb->opts.max_bytes / 4,
                        wb->opts.max_bytes);
    uint64_t weight = write_behind_weigh(WRITE_BEHIND_WRITE, bytes);

    write_behind_get_room(wb, room, weight);

    QEMU_LOCK_GUARD(&wb->lock);
    write_behind_put_room(wb, room, weight);
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

    wb->awaited = seq;
    write_behind_begin_wait(wb);
    while (wb->flushed < seq && !wb->error) {
        qemu_co_queue_wait(&wb->flush_waiters, &wb->lock);
    }
    write_behind_end_wait(wb);

    return wb->flushed < seq ? wb->error : 0;
}

void coroutine_fn
write_behind_co_await(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    Place place = {
        .range = { .start = offset, .last = offset + bytes - 1 },
    };

    if (!bytes) {
        return;
    }

    QEMU_LOCK_GUARD(&wb->lock);

    place.seq = wb->last_seq + 1;
    qemu_co_queue_init(&place.waiter);
    write_behind_line_up(wb, &place, false);
    if (place.done) {
        return;
    }

    wb->awaited = wb->last_seq;
    write_behind_begin_wait(wb);
    while (!place.done) {
        qemu_co_queue_wait(&place.waiter, &wb->lock);
    }
    write_behind_end_wait(wb);
}

bool write_behind_has_pending(WriteBehind *wb, int64_t offset, int64_t bytes)
{
    QEMU_LOCK_GUARD(&wb->lock);

    return bytes && write_behind_find_older(wb, offset, offset + bytes - 1,
                                            UINT64_MAX);
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
    WriteBehindReq *oldest, *req;

    QEMU_LOCK_GUARD(&wb->lock);

    *stats = wb->stats;
    oldest = QTAILQ_FIRST(&wb->pending);
    stats->oldest_ns = oldest ? oldest->since_ns : 0;
    QTAILQ_FOREACH(req, &wb->pending, next) {
        stats->pending_span += write_behind_req_bytes(req);
    }
}
