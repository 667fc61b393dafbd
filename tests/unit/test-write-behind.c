/*
 * Unit test of the write-behind queue
 *
 * A filter with such a queue stands above a driver whose requests end when the
 * test says so, in the order that it wants.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "block/write-behind.h"
#include "iothread.h"
#include "qapi/error.h"
#include "qemu/interval-tree.h"
#include "qemu/main-loop.h"
#include "qobject/qdict.h"
#include "system/block-backend.h"
#include "system/cpu-timers.h"

/*
 * The queue looks for requests that overlap in interval trees.  Count how many
 * it looks at: this copy takes the place of the library's.
 */
IntervalTreeNode *iter_first(IntervalTreeRoot *root, uint64_t start,
                             uint64_t last);
IntervalTreeNode *iter_next(IntervalTreeNode *node, uint64_t start,
                            uint64_t last);

#define interval_tree_iter_first iter_first
#define interval_tree_iter_next iter_next
#include "../../util/interval-tree.c"
#undef interval_tree_iter_first
#undef interval_tree_iter_next

static uint64_t nb_looked_at;

IntervalTreeNode *interval_tree_iter_first(IntervalTreeRoot *root,
                                           uint64_t start, uint64_t last)
{
    nb_looked_at++;
    return iter_first(root, start, last);
}

IntervalTreeNode *interval_tree_iter_next(IntervalTreeNode *node,
                                          uint64_t start, uint64_t last)
{
    nb_looked_at++;
    return iter_next(node, start, last);
}

#define DISK_SIZE   2048
#define NB_CELLS    (DISK_SIZE / sizeof(uint32_t))
#define SCHEDULES   1000

/* A request that the child has begun */
typedef struct ChildReq {
    WriteBehindType type;
    int64_t offset;
    int64_t bytes;
    BdrvRequestFlags flags;
    Coroutine *co;
    bool released;
    int ret;
    QTAILQ_ENTRY(ChildReq) next;
} ChildReq;

typedef QTAILQ_HEAD(ChildReqList, ChildReq) ChildReqList;

/* What the child has been told, and what is there now */
static struct {
    uint8_t data[DISK_SIZE];
    /* What would be there after a power cut, and after the flush under way */
    uint8_t stable[DISK_SIZE];
    uint8_t flushing[DISK_SIZE];
    /* Begun and not ended, in the order of arrival */
    ChildReqList reqs;
    /* All that have begun: "w0+4 z8+4 ..." in cells, "f" for a flush */
    GString *log;
    /* Requests end when child_release() says so, else by themselves */
    bool hold;
} child;

static struct {
    WriteBehind *queue;
    BlockBackend *blk;
    int errors;
    WriteBehindType error_type;
    int error;
    bool flush_waits;
} filter;

/* What setup() gives the next queue, but for the memory */
static WriteBehindOptions filter_opts;

static bool overlap(const ChildReq *a, const ChildReq *b)
{
    return a->offset < b->offset + b->bytes && b->offset < a->offset + a->bytes;
}

static int coroutine_fn child_co_begin(BlockDriverState *bs, ChildReq *req)
{
    ChildReq *other;

    QTAILQ_FOREACH(other, &child.reqs, next) {
        g_assert(!overlap(req, other));
        /* One flush at a time is enough */
        g_assert(req->type != WRITE_BEHIND_FLUSH || other->type != req->type);
    }
    QTAILQ_INSERT_TAIL(&child.reqs, req, next);

    if (req->type == WRITE_BEHIND_FLUSH) {
        g_string_append_printf(child.log, "f ");
    } else {
        g_string_append_printf(child.log, "%c%" PRId64 "+%" PRId64 " ",
                               "wzd"[req->type], req->offset / 4,
                               req->bytes / 4);
    }

    req->co = qemu_coroutine_self();
    if (!child.hold) {
        req->released = true;
        aio_co_schedule(bdrv_get_aio_context(bs), req->co);
        qemu_coroutine_yield();
    }
    while (!req->released) {
        qemu_coroutine_yield();
    }
    QTAILQ_REMOVE(&child.reqs, req, next);

    return req->ret;
}

static void child_written(const ChildReq *req)
{
    if (req->flags & BDRV_REQ_FUA) {
        memcpy(child.stable + req->offset, child.data + req->offset,
               req->bytes);
        memcpy(child.flushing + req->offset, child.data + req->offset,
               req->bytes);
    }
}

static int coroutine_fn GRAPH_RDLOCK
child_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                 QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    ChildReq req = { WRITE_BEHIND_WRITE, offset, bytes, flags };
    int ret = child_co_begin(bs, &req);

    if (ret == 0) {
        qemu_iovec_to_buf(qiov, 0, child.data + offset, bytes);
        child_written(&req);
    }

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
child_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       BdrvRequestFlags flags)
{
    ChildReq req = { WRITE_BEHIND_ZEROES, offset, bytes, flags };
    int ret = child_co_begin(bs, &req);

    if (ret == 0) {
        memset(child.data + offset, 0, bytes);
        child_written(&req);
    }

    return ret;
}

/* Leaves what is there */
static int coroutine_fn GRAPH_RDLOCK
child_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    ChildReq req = { WRITE_BEHIND_DISCARD, offset, bytes };

    return child_co_begin(bs, &req);
}

static int coroutine_fn GRAPH_RDLOCK child_co_flush(BlockDriverState *bs)
{
    ChildReq req = { WRITE_BEHIND_FLUSH };
    int ret;

    /* Nothing is promised for what ends only meanwhile */
    memcpy(child.flushing, child.data, sizeof(child.flushing));
    ret = child_co_begin(bs, &req);
    if (ret == 0) {
        memcpy(child.stable, child.flushing, sizeof(child.stable));
    }

    return ret;
}

static int coroutine_fn GRAPH_RDLOCK
child_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    qemu_iovec_from_buf(qiov, 0, child.data + offset, bytes);
    return 0;
}

/* Of both nodes: the filter is opened before it has its child */
static int64_t coroutine_fn GRAPH_RDLOCK
test_co_getlength(BlockDriverState *bs)
{
    return DISK_SIZE;
}

static BlockDriver bdrv_child = {
    .format_name            = "test-child",
    .bdrv_co_preadv         = child_co_preadv,
    .bdrv_co_pwritev        = child_co_pwritev,
    .bdrv_co_pwrite_zeroes  = child_co_pwrite_zeroes,
    .bdrv_co_pdiscard       = child_co_pdiscard,
    .bdrv_co_flush_to_disk  = child_co_flush,
    .bdrv_co_getlength      = test_co_getlength,
};

static void filter_error(BlockDriverState *bs, WriteBehindType type, int ret)
{
    filter.errors++;
    filter.error_type = type;
    filter.error = ret;
}

static int coroutine_fn GRAPH_RDLOCK
filter_co_pwritev_part(BlockDriverState *bs, int64_t offset, int64_t bytes,
                       QEMUIOVector *qiov, size_t qiov_offset,
                       BdrvRequestFlags flags)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_WRITE,
        .flags          = flags,
        .offset         = offset,
        .bytes          = bytes,
        .qiov           = qiov,
        .qiov_offset    = qiov_offset,
    };

    return write_behind_co_write(filter.queue, &w);
}

static int coroutine_fn GRAPH_RDLOCK
filter_co_pwrite_zeroes(BlockDriverState *bs, int64_t offset, int64_t bytes,
                        BdrvRequestFlags flags)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_ZEROES,
        .flags          = flags,
        .offset         = offset,
        .bytes          = bytes,
    };

    return write_behind_co_write(filter.queue, &w);
}

static int coroutine_fn GRAPH_RDLOCK
filter_co_pdiscard(BlockDriverState *bs, int64_t offset, int64_t bytes)
{
    WriteRequest w = {
        .type           = WRITE_BEHIND_DISCARD,
        .offset         = offset,
        .bytes          = bytes,
    };

    return write_behind_co_write(filter.queue, &w);
}

static int coroutine_fn GRAPH_RDLOCK filter_co_flush(BlockDriverState *bs)
{
    return write_behind_co_flush(filter.queue, filter.flush_waits);
}

static int coroutine_fn GRAPH_RDLOCK
filter_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
                 QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    write_behind_co_await(filter.queue, offset, bytes);
    return bdrv_co_preadv(bs->file, offset, bytes, qiov, flags);
}

static void filter_drain_begin(BlockDriverState *bs)
{
    /* There is none before the child is attached */
    if (filter.queue) {
        write_behind_drain_begin(filter.queue);
    }
}

static void filter_close(BlockDriverState *bs)
{
    write_behind_free(filter.queue);
}

static BlockDriver bdrv_filter = {
    .format_name            = "test-filter",
    .is_filter              = true,
    .bdrv_close             = filter_close,
    .bdrv_co_preadv         = filter_co_preadv,
    .bdrv_co_pwritev_part   = filter_co_pwritev_part,
    .bdrv_co_pwrite_zeroes  = filter_co_pwrite_zeroes,
    .bdrv_co_pdiscard       = filter_co_pdiscard,
    .bdrv_co_flush          = filter_co_flush,
    .bdrv_co_getlength      = test_co_getlength,
    .bdrv_drain_begin       = filter_drain_begin,
    .bdrv_child_perm        = bdrv_default_perms,
};

static void setup(uint64_t max_bytes)
{
    WriteBehindOptions opts = filter_opts;
    BlockDriverState *child_bs, *filter_bs;

    memset(&filter, 0, sizeof(filter));
    memset(&child, 0, sizeof(child));
    QTAILQ_INIT(&child.reqs);
    child.log = g_string_new(NULL);
    child.hold = true;

    child_bs = bdrv_new_open_driver(&bdrv_child, "child",
                                    BDRV_O_RDWR | BDRV_O_UNMAP, &error_abort);
    child_bs->supported_write_flags = BDRV_REQ_FUA;
    child_bs->supported_zero_flags = BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP;

    filter_bs = bdrv_new_open_driver(&bdrv_filter, "filter",
                                     BDRV_O_RDWR | BDRV_O_UNMAP, &error_abort);
    filter_bs->supported_write_flags = BDRV_REQ_FUA;
    filter_bs->supported_zero_flags = BDRV_REQ_FUA | BDRV_REQ_MAY_UNMAP;

    bdrv_graph_wrlock();
    filter_bs->file = bdrv_attach_child(
        filter_bs, child_bs, "file", &child_of_bds,
        BDRV_CHILD_FILTERED | BDRV_CHILD_PRIMARY, &error_abort);
    bdrv_graph_wrunlock();
    opts.max_bytes = max_bytes;
    filter.queue = write_behind_new(filter_bs, NULL, &opts, filter_error);

    filter.blk = blk_new(qemu_get_aio_context(),
                         BLK_PERM_WRITE | BLK_PERM_CONSISTENT_READ,
                         BLK_PERM_ALL);
    blk_set_allow_aio_context_change(filter.blk, true);
    blk_insert_bs(filter.blk, filter_bs, &error_abort);
    bdrv_unref(filter_bs);
}

/* Let everything go on that can */
static void run(void)
{
    while (aio_poll(qemu_get_aio_context(), false)) {
        /* Until there is nothing more to do */
    }
}

static void release(ChildReq *req, int ret)
{
    req->released = true;
    req->ret = ret;
    aio_co_wake(req->co);
    run();
}

static void release_first(int ret)
{
    g_assert(!QTAILQ_EMPTY(&child.reqs));
    release(QTAILQ_FIRST(&child.reqs), ret);
}

static void release_all(void)
{
    while (!QTAILQ_EMPTY(&child.reqs)) {
        release_first(0);
    }
}

/* What has begun, and all that comes, in a drain for instance */
static void release_later(void)
{
    ChildReq *req;

    child.hold = false;
    QTAILQ_FOREACH(req, &child.reqs, next) {
        req->released = true;
        aio_co_schedule(qemu_get_aio_context(), req->co);
    }
}

static void teardown(void)
{
    release_all();
    /* Closing a node flushes it */
    child.hold = false;
    blk_unref(filter.blk);
    g_string_free(child.log, true);
}

/* The test's own requests */
typedef struct GuestReq {
    QEMUIOVector qiov;
    void *buf;
    int64_t offset;
    int64_t bytes;
    bool done;
    int ret;
    int expected;
} GuestReq;

static void guest_done(void *opaque, int ret)
{
    GuestReq *req = opaque;

    req->ret = ret;
    req->done = true;
}

/* Begin a request for @nb_cells from cell @first on; a write fills in @value */
static GuestReq *guest_begin(WriteBehindType type, int first, int nb_cells,
                             uint32_t value, BdrvRequestFlags flags)
{
    GuestReq *req = g_new0(GuestReq, 1);

    req->offset = first * sizeof(uint32_t);
    req->bytes = nb_cells * sizeof(uint32_t);
    switch (type) {
    case WRITE_BEHIND_WRITE:
        req->buf = g_malloc(req->bytes);
        for (int i = 0; i < nb_cells; i++) {
            memcpy(req->buf + i * sizeof(value), &value, sizeof(value));
        }
        qemu_iovec_init_buf(&req->qiov, req->buf, req->bytes);
        blk_aio_pwritev(filter.blk, req->offset, &req->qiov, flags, guest_done,
                        req);
        break;
    case WRITE_BEHIND_ZEROES:
        blk_aio_pwrite_zeroes(filter.blk, req->offset, req->bytes, flags,
                              guest_done, req);
        break;
    case WRITE_BEHIND_DISCARD:
        blk_aio_pdiscard(filter.blk, req->offset, req->bytes, guest_done, req);
        break;
    case WRITE_BEHIND_FLUSH:
        blk_aio_flush(filter.blk, guest_done, req);
        break;
    }
    run();

    return req;
}

static void guest_free(GuestReq *req)
{
    g_assert(req->done);
    g_assert_cmpint(req->ret, ==, req->expected);
    g_free(req->buf);
    g_free(req);
}

/* A request that has to be done at once */
static void guest_do(WriteBehindType type, int first, int nb_cells,
                     uint32_t value, BdrvRequestFlags flags)
{
    guest_free(guest_begin(type, first, nb_cells, value, flags));
}

/* The same, but the queue has failed */
static void guest_fail(WriteBehindType type, int first, int nb_cells,
                       int error)
{
    GuestReq *req = guest_begin(type, first, nb_cells, 1, 0);

    req->expected = error;
    guest_free(req);
}

static void guest_write(int first, int nb_cells, uint32_t value)
{
    guest_do(WRITE_BEHIND_WRITE, first, nb_cells, value, 0);
}

static void guest_flush(void)
{
    guest_do(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
}

static uint32_t cell(const uint8_t *data, int i)
{
    uint32_t value;

    memcpy(&value, data + i * sizeof(value), sizeof(value));
    return value;
}

static void assert_cells(const uint8_t *data, int first, int nb_cells,
                         uint32_t value)
{
    for (int i = first; i < first + nb_cells; i++) {
        g_assert_cmpuint(cell(data, i), ==, value);
    }
}

static void assert_log(const char *expected)
{
    g_assert_cmpstr(child.log->str, ==, expected);
}

static WriteBehindStats get_stats(void)
{
    WriteBehindStats stats;

    write_behind_get_stats(filter.queue, &stats);
    return stats;
}

static void test_behind(void)
{
    WriteBehindStats stats;

    setup(1 << 20);
    guest_write(0, 4, 0x11);
    guest_do(WRITE_BEHIND_ZEROES, 8, 4, 0, 0);
    guest_do(WRITE_BEHIND_DISCARD, 16, 4, 0, 0);
    assert_cells(child.data, 0, 4, 0);

    stats = get_stats();
    g_assert_cmpuint(stats.pending_requests, ==, 3);
    g_assert_cmpuint(stats.pending_bytes, >, 16);
    g_assert_cmpint(stats.oldest_ns, >, 0);

    release_all();
    assert_log("w0+4 z8+4 d16+4 ");
    assert_cells(child.data, 0, 4, 0x11);
    stats = get_stats();
    g_assert_cmpuint(stats.pending_requests, ==, 0);
    g_assert_cmpuint(stats.pending_bytes, ==, 0);
    g_assert_cmpuint(stats.sent_requests, ==, 3);
    g_assert_cmpuint(stats.sent_bytes, ==, 32);
    g_assert_cmpint(stats.oldest_ns, ==, 0);
    teardown();
}

/* While one is in flight, the others gather and are sent together */
static void test_gather(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(8, 4, 2);
    guest_write(16, 4, 3);
    assert_log("w0+4 ");
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 ");
    guest_write(24, 4, 4);
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 ");
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 w24+4 ");
    release_all();

    /* Unless there are many of them */
    g_string_truncate(child.log, 0);
    for (int i = 0; i < 32; i++) {
        guest_write(i * 2, 1, i);
    }
    assert_log("w0+1 ");
    guest_write(64, 1, 1);
    g_assert_cmpint(strlen(child.log->str), >, 5 * 32);
    teardown();
}

static void test_order(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(2, 4, 2);
    guest_write(16, 4, 3);
    assert_log("w0+4 ");
    release_first(0);
    assert_log("w0+4 w2+4 w16+4 ");
    release(QTAILQ_LAST(&child.reqs), 0);
    assert_cells(child.data, 0, 4, 1);
    release_all();
    assert_cells(child.data, 0, 2, 1);
    assert_cells(child.data, 2, 4, 2);
    assert_cells(child.data, 16, 4, 3);
    teardown();
}

static void test_bound(void)
{
    GuestReq *small, *large, *huge;
    uint64_t room;

    setup(1 << 20);
    guest_write(0, 4, 1);
    room = get_stats().pending_bytes;
    teardown();

    /* Three of the same size */
    setup(3 * room);
    guest_write(0, 4, 1);
    guest_write(8, 4, 2);
    large = guest_begin(WRITE_BEHIND_WRITE, 16, 8, 3, 0);
    small = guest_begin(WRITE_BEHIND_WRITE, 32, 4, 4, 0);
    g_assert(!large->done);
    /* There is room, but others were there before */
    g_assert(!small->done);
    g_assert_cmpuint(get_stats().pending_bytes, ==, 2 * room);
    release_first(0);
    g_assert(large->done && !small->done);
    release_first(0);
    g_assert(small->done);
    release_all();
    g_assert_cmpuint(get_stats().max_pending_bytes, <=, 3 * room);

    /* For this one there is never room */
    huge = guest_begin(WRITE_BEHIND_WRITE, 0, NB_CELLS, 5, 0);
    g_assert(!huge->done);
    g_assert_cmpuint(get_stats().pending_bytes, ==, 0);
    release_first(0);
    g_assert(huge->done);
    assert_cells(child.data, 0, NB_CELLS, 5);

    guest_free(huge);
    guest_free(large);
    guest_free(small);
    teardown();
}

static void test_no_queue(void)
{
    GuestReq *first, *second, *flush;

    setup(0);
    first = guest_begin(WRITE_BEHIND_WRITE, 0, 4, 1, 0);
    second = guest_begin(WRITE_BEHIND_ZEROES, 8, 4, 0, 0);
    g_assert(!first->done && !second->done);
    release(QTAILQ_LAST(&child.reqs), 0);
    g_assert(!first->done && second->done);
    release_all();
    g_assert(first->done);

    flush = guest_begin(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
    assert_log("w0+4 z8+4 f ");
    g_assert(!flush->done);
    release_all();
    assert_cells(child.stable, 0, 4, 1);

    guest_free(first);
    guest_free(second);
    guest_free(flush);
    teardown();
}

static void test_flush(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(8, 4, 2);
    guest_flush();
    guest_write(16, 4, 3);
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 ");
    release_first(0);

    /* Nothing older is left, and younger ones do not hold it up */
    assert_log("w0+4 w8+4 w16+4 f ");
    guest_write(24, 4, 4);
    guest_flush();
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 f w24+4 ");
    assert_cells(child.stable, 0, 4, 0);
    release_first(0);
    assert_cells(child.stable, 0, 4, 1);
    assert_cells(child.stable, 8, 4, 2);
    assert_cells(child.stable, 16, 4, 0);
    release_first(0);
    assert_log("w0+4 w8+4 w16+4 f w24+4 f ");
    release_all();
    assert_cells(child.stable, 16, 4, 3);
    assert_cells(child.stable, 24, 4, 4);

    /* There is nothing to flush */
    guest_flush();
    assert_log("w0+4 w8+4 w16+4 f w24+4 f ");
    g_assert_cmpuint(get_stats().flushes, ==, 2);
    teardown();
}

static void test_supersede(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    for (int i = 2; i < 10; i++) {
        guest_write(0, 4, i);
    }
    guest_write(1, 2, 10);
    guest_do(WRITE_BEHIND_ZEROES, 0, 8, 0, 0);
    guest_do(WRITE_BEHIND_DISCARD, 0, 8, 0, 0);
    assert_log("w0+4 ");
    g_assert_cmpuint(get_stats().superseded_requests, ==, 9);
    g_assert_cmpuint(get_stats().superseded_bytes, ==, 8 * 16 + 8);
    g_assert_cmpuint(get_stats().pending_requests, ==, 3);
    release_all();
    assert_log("w0+4 z0+8 d0+8 ");
    assert_cells(child.data, 0, 8, 0);
    teardown();
}

/* What makes a request permanent is not lost with it */
static void test_supersede_permanent(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(0, 4, 2);
    guest_flush();
    guest_write(0, 4, 3);
    guest_do(WRITE_BEHIND_WRITE, 8, 4, 4, BDRV_REQ_FUA);
    guest_write(8, 4, 5);
    release_all();
    assert_log("w0+4 f w0+4 w8+4 f ");
    assert_cells(child.stable, 0, 4, 3);
    assert_cells(child.stable, 8, 4, 5);
    teardown();
}

/* Each rewrites the end of the one before: all of it is sent once */
static void test_cut_appends(void)
{
    WriteBehindStats stats;

    setup(1 << 20);
    guest_write(0, 4, 1);
    for (int i = 1; i < 31; i++) {
        guest_write(4 * i - 1, 5, i + 1);
    }
    assert_log("w0+4 ");
    release_first(0);
    /* But for what was in flight already */
    assert_log("w0+4 w3+121 ");
    release_all();
    assert_cells(child.data, 0, 3, 1);
    for (int i = 1; i < 31; i++) {
        assert_cells(child.data, 4 * i - 1, i < 30 ? 4 : 5, i + 1);
    }
    stats = get_stats();
    g_assert_cmpuint(stats.sent_requests, ==, 31);
    g_assert_cmpuint(stats.superseded_requests, ==, 0);
    g_assert_cmpuint(stats.superseded_bytes, ==, 29 * 4);
    teardown();
}

static void test_cut(void)
{
    setup(1 << 20);
    guest_write(100, 4, 1);

    /* The end, the beginning, and both */
    guest_write(0, 8, 2);
    guest_do(WRITE_BEHIND_ZEROES, 4, 8, 0, 0);
    guest_write(10, 8, 3);
    guest_write(6, 2, 4);
    /* Zeroes in the midst of data are data */
    guest_do(WRITE_BEHIND_ZEROES, 12, 2, 0, 0);
    guest_write(13, 1, 5);
    release_first(0);
    assert_log("w100+4 w0+4 z4+2 w10+8 z8+2 w6+2 ");
    release_all();
    assert_cells(child.data, 0, 4, 2);
    assert_cells(child.data, 4, 2, 0);
    assert_cells(child.data, 6, 2, 4);
    assert_cells(child.data, 8, 2, 0);
    assert_cells(child.data, 10, 2, 3);
    assert_cells(child.data, 12, 1, 0);
    assert_cells(child.data, 13, 1, 5);
    assert_cells(child.data, 14, 4, 3);
    g_assert_cmpuint(get_stats().sent_requests, ==, 7);
    g_assert_cmpuint(get_stats().superseded_requests, ==, 0);
    g_assert_cmpuint(get_stats().superseded_bytes, ==,
                     (4 + 2 + 2 + 2 + 1) * sizeof(uint32_t));
    g_assert_cmpuint(get_stats().pending_bytes, ==, 0);
    teardown();
}

/* What is there after a discard is not known, but a newer write is */
static void test_cut_discard(void)
{
    setup(1 << 20);
    guest_write(100, 4, 1);

    guest_write(0, 4, 2);
    guest_do(WRITE_BEHIND_DISCARD, 2, 10, 0, 0);
    guest_write(6, 2, 3);
    guest_do(WRITE_BEHIND_DISCARD, 10, 4, 0, 0);
    release_first(0);
    /* That which touches the write has to wait for it */
    assert_log("w100+4 w0+4 d8+6 w6+2 ");
    release_first(0);
    assert_log("w100+4 w0+4 d8+6 w6+2 d2+4 ");
    release_all();
    assert_cells(child.data, 0, 4, 2);
    assert_cells(child.data, 6, 2, 3);
    teardown();
}

static void test_cut_permanent(void)
{
    setup(1 << 20);
    guest_write(100, 4, 1);

    /* The newer part has to be as permanent as the older one was */
    guest_do(WRITE_BEHIND_WRITE, 0, 4, 2, BDRV_REQ_FUA);
    guest_write(2, 4, 3);
    guest_do(WRITE_BEHIND_WRITE, 13, 2, 5, 0);
    guest_do(WRITE_BEHIND_WRITE, 10, 8, 4, 0);
    guest_do(WRITE_BEHIND_WRITE, 12, 1, 5, BDRV_REQ_FUA);
    release_first(0);
    assert_log("w100+4 w0+6 w10+8 ");
    release_all();
    assert_cells(child.stable, 100, 4, 0);
    assert_cells(child.stable, 0, 2, 2);
    assert_cells(child.stable, 2, 4, 3);
    assert_cells(child.stable, 10, 2, 4);
    assert_cells(child.stable, 12, 1, 5);
    assert_cells(child.stable, 13, 5, 4);

    /* And a flush comes behind both */
    g_string_truncate(child.log, 0);
    guest_write(100, 4, 5);
    guest_write(0, 4, 6);
    guest_flush();
    guest_write(2, 8, 7);
    release_first(0);
    assert_log("w100+4 w0+10 ");
    release_first(0);
    assert_log("w100+4 w0+10 f ");
    release_all();
    assert_cells(child.stable, 0, 2, 6);
    assert_cells(child.stable, 2, 8, 7);
    teardown();
}

/* A write is sent although an older one, which it does not touch, waits */
static void test_not_only_oldest(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(20, 1, 1);
    release_first(0);
    assert_log("w0+4 w20+1 ");
    guest_write(20, 4, 2);
    for (int i = 0; i < 40; i++) {
        guest_write(40 + 2 * i, 1, 3);
    }
    g_assert_nonnull(strstr(child.log->str, " w100+1 "));
    g_assert_null(strstr(child.log->str, "w20+4"));
    release_all();
    assert_cells(child.data, 20, 4, 2);
    teardown();
}

static void test_join(void)
{
    setup(1 << 20);
    guest_write(500, 1, 1);
    guest_write(4, 4, 1);
    guest_write(0, 4, 2);
    guest_write(8, 4, 3);
    guest_do(WRITE_BEHIND_WRITE, 12, 4, 4, BDRV_REQ_FUA);
    guest_do(WRITE_BEHIND_ZEROES, 16, 4, 0, 0);
    guest_do(WRITE_BEHIND_ZEROES, 20, 4, 0, 0);
    guest_do(WRITE_BEHIND_ZEROES, 24, 4, 0, BDRV_REQ_MAY_UNMAP);
    guest_do(WRITE_BEHIND_DISCARD, 32, 4, 0, 0);
    guest_do(WRITE_BEHIND_DISCARD, 36, 4, 0, 0);
    release_first(0);
    assert_log("w500+1 w0+12 w12+4 z16+8 z24+4 d32+8 ");
    release_all();
    assert_cells(child.data, 0, 4, 2);
    assert_cells(child.data, 4, 4, 1);
    assert_cells(child.data, 8, 4, 3);
    assert_cells(child.data, 12, 4, 4);
    g_assert_cmpuint(get_stats().sent_requests, ==, 10);

    /* A driver takes so many buffers only */
    g_string_truncate(child.log, 0);
    guest_write(500, 1, 2);
    for (int i = 0; i < 300; i++) {
        guest_write(i, 1, i);
        if (i == 30) {
            /* Lest a part of them begin */
            g_assert_cmpuint(get_stats().pending_requests, ==, 32);
        }
    }
    release_all();
    for (int i = 0; i < 300; i++) {
        assert_cells(child.data, i, 1, i);
    }
    teardown();
}

/* All of them fail */
static void test_join_error(void)
{
    setup(1 << 20);
    guest_write(500, 1, 1);
    guest_write(0, 4, 1);
    guest_write(4, 4, 2);
    guest_write(20, 4, 2);
    release_first(0);
    assert_log("w500+1 w0+8 w20+4 ");
    guest_write(2, 4, 3);
    release_first(-EIO);
    release_first(0);
    assert_log("w500+1 w0+8 w20+4 ");
    g_assert_cmpint(filter.errors, ==, 1);
    g_assert_cmpuint(get_stats().dropped_requests, ==, 1);
    g_assert_cmpuint(get_stats().sent_requests, ==, 2);
    g_assert_cmpuint(get_stats().pending_requests, ==, 0);
    assert_cells(child.data, 0, 8, 0);
    teardown();
}

static void test_error(void)
{
    GuestReq *waiting;
    WriteBehindStats stats;
    uint64_t room;

    setup(1 << 20);
    guest_write(0, 4, 1);
    room = get_stats().pending_bytes;
    release_all();
    teardown();

    setup(4 * room);
    guest_write(0, 4, 1);
    guest_do(WRITE_BEHIND_ZEROES, 8, 4, 0, 0);
    guest_write(0, 2, 2);
    guest_flush();
    waiting = guest_begin(WRITE_BEHIND_WRITE, 16, NB_CELLS - 16, 3, 0);
    g_assert(!waiting->done);

    release_first(0);
    release_first(-ENOSPC);
    g_assert_cmpint(filter.errors, ==, 1);
    g_assert_cmpint(filter.error_type, ==, WRITE_BEHIND_ZEROES);
    g_assert_cmpint(filter.error, ==, -ENOSPC);
    release_first(-EIO);
    release_all();
    g_assert(waiting->done);
    g_assert_cmpint(filter.errors, ==, 1);

    g_string_truncate(child.log, 0);
    guest_fail(WRITE_BEHIND_WRITE, 0, 4, -ENOSPC);
    guest_fail(WRITE_BEHIND_DISCARD, 0, 4, -ENOSPC);
    guest_fail(WRITE_BEHIND_FLUSH, 0, 0, -ENOSPC);
    assert_log("");
    stats = get_stats();
    g_assert_cmpuint(stats.sent_requests, ==, 2);
    g_assert_cmpuint(stats.dropped_requests, ==, 2);
    g_assert_cmpuint(stats.pending_requests, ==, 0);

    waiting->expected = -EIO;
    guest_free(waiting);
    teardown();
}

/* The request that fails may be one behind which others wait */
static void test_error_drops_queued(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(0, 2, 2);
    guest_write(8, 4, 3);
    guest_flush();
    release_first(-EIO);
    assert_log("w0+4 ");
    g_assert(QTAILQ_EMPTY(&child.reqs));
    g_assert_cmpuint(get_stats().dropped_requests, ==, 2);
    assert_cells(child.data, 0, NB_CELLS, 0);
    teardown();
}

/* Nothing is queued then, but somebody waits for the flush */
static void test_error_ends_wait(void)
{
    GuestReq *write, *flush;

    setup(0);
    write = guest_begin(WRITE_BEHIND_WRITE, 0, 4, 1, 0);
    flush = guest_begin(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
    g_assert(!flush->done);
    release_first(-EIO);
    g_assert(write->done);
    g_assert(flush->done);
    assert_log("w0+4 ");
    write->expected = flush->expected = -EIO;
    guest_free(write);
    guest_free(flush);
    teardown();
}

static void test_flush_error(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_flush();
    release_first(0);
    assert_log("w0+4 f ");
    release_first(-EIO);
    g_assert_cmpint(filter.errors, ==, 1);
    g_assert_cmpint(filter.error_type, ==, WRITE_BEHIND_FLUSH);
    guest_fail(WRITE_BEHIND_FLUSH, 0, 0, -EIO);
    assert_log("w0+4 f ");
    teardown();
}

/* With a queue, somebody may want to know all the same */
static void test_flush_waits(void)
{
    GuestReq *flush;

    setup(1 << 20);
    filter.flush_waits = true;
    guest_write(0, 4, 1);
    guest_write(8, 4, 2);
    flush = guest_begin(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
    /* Does not take the place of what the flush waits for */
    guest_write(8, 4, 3);
    release_first(0);
    assert_log("w0+4 w8+4 ");
    release_first(0);
    g_assert(!flush->done);
    assert_log("w0+4 w8+4 f w8+4 ");
    release_first(0);
    g_assert(flush->done);
    assert_cells(child.stable, 8, 4, 2);
    guest_free(flush);

    flush = guest_begin(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
    release_first(0);
    g_assert(!flush->done);
    release_first(-EIO);
    g_assert(flush->done);
    flush->expected = -EIO;
    guest_free(flush);
    teardown();
}

static void shrink_child(void)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    blk_bs(filter.blk)->file->bs->total_sectors--;
}

/* What is beyond the end of the child is a failure like any other */
static void test_short(void)
{
    setup(1 << 20);
    shrink_child();
    guest_write(NB_CELLS - 128 - 4, 4, 1);
    release_all();
    g_assert_cmpint(filter.errors, ==, 0);
    guest_write(NB_CELLS - 128 - 4, 5, 2);
    g_assert_cmpint(filter.errors, ==, 1);
    g_assert_cmpint(filter.error, ==, -EIO);
    guest_fail(WRITE_BEHIND_WRITE, 0, 4, -EIO);
    assert_cells(child.data, NB_CELLS - 128 - 4, 4, 1);
    teardown();
}

static void test_settle(void)
{
    uint32_t value = 0xff;
    QEMUIOVector qiov;
    GuestReq read = { 0 };

    setup(1 << 20);
    qemu_iovec_init_buf(&qiov, &value, sizeof(value));
    guest_write(0, 4, 1);
    guest_write(0, 2, 2);
    guest_write(8, 4, 3);
    blk_aio_preadv(filter.blk, 0, &qiov, 0, guest_done, &read);
    run();
    g_assert(!read.done);
    g_assert(write_behind_has_pending(filter.queue, 15, 1));
    g_assert(!write_behind_has_pending(filter.queue, 16, 16));
    g_assert(write_behind_has_pending(filter.queue, 0, DISK_SIZE));
    release_first(0);
    g_assert(!read.done);
    assert_log("w0+4 w8+4 w0+2 ");
    release(QTAILQ_LAST(&child.reqs), 0);
    g_assert(read.done);
    g_assert_cmpuint(value, ==, 2);

    /* What is elsewhere is no reason to wait */
    g_assert(!QTAILQ_EMPTY(&child.reqs));
    read.done = false;
    blk_aio_preadv(filter.blk, 3 * sizeof(value), &qiov, 0, guest_done, &read);
    run();
    g_assert(read.done);
    g_assert_cmpuint(value, ==, 1);
    teardown();
}

/* It waits for what was there, and newer requests do not change that */
static void test_settle_overwritten(void)
{
    uint32_t value = 0xff;
    QEMUIOVector qiov;
    GuestReq read = { 0 };

    setup(1 << 20);
    qemu_iovec_init_buf(&qiov, &value, sizeof(value));
    guest_write(0, 2, 1);
    guest_write(0, 4, 2);
    guest_write(2, 4, 3);
    blk_aio_preadv(filter.blk, 4, &qiov, 0, guest_done, &read);
    run();
    assert_log("w0+2 w2+4 ");
    guest_write(0, 4, 4);
    guest_write(1, 1, 5);
    release_first(0);
    g_assert(!read.done);
    assert_log("w0+2 w2+4 w0+2 ");
    release(QTAILQ_LAST(&child.reqs), 0);
    g_assert(read.done);
    g_assert_cmpuint(value, ==, 2);
    release_all();
    assert_log("w0+2 w2+4 w0+2 w0+4 ");
    assert_cells(child.data, 0, 1, 4);
    assert_cells(child.data, 1, 1, 5);
    assert_cells(child.data, 2, 2, 4);
    assert_cells(child.data, 4, 2, 3);
    teardown();
}

/*
 * How much the queue looks at for writes in the midst of others, while readers
 * wait: each for a write within the one before.  Those cannot be cut.
 */
static uint64_t cost_of_overlaps(int nb_readers, int nb_writes)
{
    g_autofree GuestReq *reads = g_new0(GuestReq, nb_readers);
    g_autofree uint32_t *values = g_new0(uint32_t, nb_readers);
    g_autofree QEMUIOVector *qiovs = g_new0(QEMUIOVector, nb_readers);
    g_autoptr(GRand) rand = g_rand_new_with_seed(nb_readers);
    int middle = NB_CELLS / 2;
    uint64_t cost;

    setup(1 << 20);
    nb_looked_at = 0;
    guest_write(0, NB_CELLS, 1);
    for (int i = 0; i < nb_readers; i++) {
        guest_write(i, NB_CELLS - 2 * i, 2 + i);
        qemu_iovec_init_buf(&qiovs[i], &values[i], sizeof(values[i]));
        blk_aio_preadv(filter.blk, middle * sizeof(values[i]), &qiovs[i], 0,
                       guest_done, &reads[i]);
        run();
        g_assert(!reads[i].done);
    }
    for (int i = 0; i < nb_writes; i++) {
        int first = g_rand_int_range(rand, 0, middle);
        int last = g_rand_int_range(rand, middle, NB_CELLS);

        guest_write(first, last - first + 1, 1000 + i);
    }
    release_all();
    cost = nb_looked_at;

    for (int i = 0; i < nb_readers; i++) {
        g_assert(reads[i].done);
        g_assert_cmpint(values[i], >=, 2 + i);
    }
    assert_cells(child.data, middle, 1, 1000 + nb_writes - 1);
    teardown();

    return cost;
}

/* Twice as many writes take about twice as much, whoever waits */
static void test_cost_of_overlaps(void)
{
    static const int nb_readers[] = { 0, 1, 16 };

    for (int i = 0; i < ARRAY_SIZE(nb_readers); i++) {
        uint64_t few = cost_of_overlaps(nb_readers[i], 2000);
        uint64_t many = cost_of_overlaps(nb_readers[i], 4000);

        g_test_message("%d readers: %" PRIu64 ", %" PRIu64, nb_readers[i],
                       few, many);
        g_assert_cmpuint(many, <, 3 * few);
    }
}

/* So do twice as many readers */
static void test_cost_of_readers(void)
{
    uint64_t few = cost_of_overlaps(100, 1);
    uint64_t many = cost_of_overlaps(200, 1);

    g_test_message("%" PRIu64 ", %" PRIu64, few, many);
    g_assert_cmpuint(many, <, 3 * few);
}

/* A reader waits for many, and looks but once for each of them */
static void test_cost_of_settle(void)
{
    g_autofree uint8_t *buf = g_malloc(DISK_SIZE);
    QEMUIOVector qiov = QEMU_IOVEC_INIT_BUF(qiov, buf, DISK_SIZE);
    GuestReq read = { 0 };
    int nb_writes = NB_CELLS / 2;
    uint64_t before;

    setup(1 << 20);
    for (int i = 0; i < nb_writes; i++) {
        /* apart from each other */
        guest_write(2 * i, 1, 1 + i);
    }
    before = nb_looked_at;
    blk_aio_preadv(filter.blk, 0, &qiov, 0, guest_done, &read);
    run();
    g_assert(!read.done);
    release_all();
    g_assert(read.done);
    g_test_message("%d writes: %" PRIu64, nb_writes, nb_looked_at - before);
    /* the queue itself looks for what it can join, on both sides */
    g_assert_cmpuint(nb_looked_at - before, <, 8 * nb_writes);
    for (int i = 0; i < nb_writes; i++) {
        assert_cells(buf, 2 * i, 1, 1 + i);
    }
    teardown();
}

/* How many writes of one cell, apart from each other, do not wait */
static int fill(void)
{
    GuestReq *req;
    int i = 0;

    while (i < NB_CELLS / 2) {
        req = guest_begin(WRITE_BEHIND_WRITE, 2 * i, 1, i, 0);
        if (!req->done) {
            break;
        }
        guest_free(req);
        req = NULL;
        i++;
    }
    release_all();
    if (i < NB_CELLS / 2) {
        guest_free(req);
    }

    return i;
}

/* QEMU_CLOCK_VIRTUAL, in place of the stubs, which a busy host may hold up */
static int64_t virtual_ns = 1;

int64_t cpus_get_virtual_clock(void)
{
    return virtual_ns;
}

void cpus_set_virtual_clock(int64_t new_time)
{
    virtual_ns = new_time;
}

/* The queue takes what the child has done in some time */
static void test_bound_in_time(void)
{
    int few;

    filter_opts.max_ms = 400;
    filter_opts.clock = QEMU_CLOCK_VIRTUAL;
    setup(1 << 20);
    g_assert_cmpint(fill(), ==, NB_CELLS / 2);

    guest_write(0, 1, 1);
    run();
    cpus_set_virtual_clock(virtual_ns + 800 * SCALE_MS);
    release_all();
    few = fill();
    g_assert_cmpint(few, >, 10);
    g_assert_cmpint(few, <, 100);

    /* They were done quickly, as are these */
    g_assert_cmpint(fill(), >=, 2 * few);
    fill();
    g_assert_cmpint(fill(), ==, NB_CELLS / 2);
    teardown();
    filter_opts = (WriteBehindOptions) { };
}

static void test_abandon(void)
{
    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(0, 4, 2);
    guest_flush();
    write_behind_abandon(filter.queue);
    guest_fail(WRITE_BEHIND_WRITE, 8, 4, -ECANCELED);
    release_all();
    assert_log("w0+4 ");
    g_assert_cmpint(filter.errors, ==, 0);
    g_assert_cmpuint(get_stats().dropped_requests, ==, 2);
    teardown();
}

static void test_drain(void)
{
    setup(1 << 20);
    for (int i = 0; i < 100; i++) {
        guest_write(i, 8, i + 1);
    }
    guest_flush();
    release_later();
    blk_drain(filter.blk);
    for (int i = 0; i < 100; i++) {
        g_assert_cmpuint(cell(child.stable, i), ==, i + 1);
    }
    teardown();
}

/* Draining the child waits for what still has to get there */
static void test_drain_child(void)
{
    BlockDriverState *bs;

    setup(1 << 20);
    guest_write(0, 4, 1);
    guest_write(2, 4, 2);
    release_later();

    bs = bdrv_find_node("child");
    if (!bs) {
        GRAPH_RDLOCK_GUARD_MAINLOOP();
        bs = blk_bs(filter.blk)->file->bs;
    }
    bdrv_drained_begin(bs);
    assert_cells(child.data, 0, 2, 1);
    assert_cells(child.data, 2, 4, 2);
    bdrv_drained_end(bs);
    teardown();
}

static void test_iothread(void)
{
    IOThread *iothread = iothread_new();
    uint32_t value;

    setup(16 << 10);
    child.hold = false;
    blk_set_aio_context(filter.blk, iothread_get_aio_context(iothread),
                        &error_abort);
    for (int i = 0; i < 1000; i++) {
        value = i + 1;
        g_assert_cmpint(blk_pwrite(filter.blk, i % 7, sizeof(value), &value, 0),
                        ==, 0);
    }
    blk_set_aio_context(filter.blk, qemu_get_aio_context(), &error_abort);
    g_assert_cmpuint(get_stats().pending_requests, ==, 0);
    memcpy(&value, child.data + 999 % 7, sizeof(value));
    g_assert_cmpuint(value, ==, 1000);
    teardown();
    iothread_join(iothread);
}

/* A read, and what there was when it began */
typedef struct ModelRead {
    GuestReq req;
    QEMUIOVector qiov;
    uint32_t data[NB_CELLS];
    uint32_t cells[NB_CELLS];
    uint32_t writer[NB_CELLS];
} ModelRead;

/* What the guest knows of its disk in a random schedule */
typedef struct Model {
    uint32_t cells[NB_CELLS];
    /* The request that wrote the value, or one that wrote 0 */
    uint32_t writer[NB_CELLS];
    uint32_t zeroed[NB_CELLS];
    /* The oldest request whose value may be there after a power cut */
    uint32_t floor[NB_CELLS];
    /* The same for when the flush that is waited for is done */
    uint32_t flushed[NB_CELLS];
    GuestReq *flush;
    ModelRead *read;
    GuestReq *waiting[16];
    GRand *rand;
    uint32_t last;
} Model;

static bool model_is_busy(Model *m, int first, int nb_cells)
{
    for (int i = 0; i < ARRAY_SIZE(m->waiting); i++) {
        GuestReq *req = m->waiting[i];

        if (req && req->offset < (first + nb_cells) * sizeof(uint32_t) &&
            first * sizeof(uint32_t) < req->offset + req->bytes) {
            return true;
        }
    }

    return false;
}

static void model_raise_floor(Model *m, const uint32_t *floor)
{
    for (int i = 0; i < NB_CELLS; i++) {
        m->floor[i] = MAX(m->floor[i], floor[i]);
    }
}

static void model_check_stable(Model *m, const uint32_t *floor)
{
    for (int i = 0; i < NB_CELLS; i++) {
        uint32_t stable = cell(child.stable, i);

        g_assert_cmpuint(stable ?: m->zeroed[i], >=, floor[i]);
    }
}

/* It may have what was written since, if anything was */
static void model_check_read(Model *m, ModelRead *read)
{
    int first = read->req.offset / sizeof(uint32_t);

    for (int i = 0; i < read->req.bytes / sizeof(uint32_t); i++) {
        if (m->writer[first + i] == read->writer[first + i]) {
            g_assert_cmpuint(read->data[i], ==, read->cells[first + i]);
        }
    }
}

static void model_reap(Model *m)
{
    if (m->read && m->read->req.done) {
        if (!filter.errors) {
            model_check_read(m, m->read);
        }
        g_clear_pointer(&m->read, g_free);
    }
    if (m->flush && m->flush->done) {
        if (m->flush->ret == 0) {
            model_raise_floor(m, m->flushed);
            model_check_stable(m, m->flushed);
        }
        g_assert(m->flush->ret == 0 || filter.errors);
        g_clear_pointer(&m->flush, g_free);
    }
    for (int i = 0; i < ARRAY_SIZE(m->waiting); i++) {
        if (m->waiting[i] && m->waiting[i]->done) {
            if (filter.errors) {
                m->waiting[i]->expected = m->waiting[i]->ret;
            }
            guest_free(m->waiting[i]);
            m->waiting[i] = NULL;
        }
    }
}

static bool model_is_quiet(Model *m)
{
    for (int i = 0; i < ARRAY_SIZE(m->waiting); i++) {
        if (m->waiting[i]) {
            return false;
        }
    }

    return true;
}

static void model_change(Model *m, WriteBehindType type, int first,
                         int nb_cells, bool fua)
{
    for (int i = first; i < first + nb_cells; i++) {
        if (type != WRITE_BEHIND_DISCARD) {
            m->cells[i] = type == WRITE_BEHIND_ZEROES ? 0 : m->last;
            m->writer[i] = m->last;
        }
        if (type == WRITE_BEHIND_ZEROES) {
            m->zeroed[i] = m->last;
        }
        if (fua) {
            m->floor[i] = m->last;
        }
    }
}

/* A flush is for what was done before */
static void model_flush(Model *m)
{
    if (!model_is_quiet(m) || m->flush) {
        return;
    }

    memcpy(m->flushed, m->writer, sizeof(m->flushed));
    m->flush = guest_begin(WRITE_BEHIND_FLUSH, 0, 0, 0, 0);
    g_assert(m->flush->done || filter.flush_waits);
    if (m->flush->done) {
        model_raise_floor(m, m->flushed);
        g_clear_pointer(&m->flush, guest_free);
    }
}

static void model_begin_read(Model *m, int first, int nb_cells)
{
    ModelRead *read = g_new0(ModelRead, 1);

    read->req.offset = first * sizeof(uint32_t);
    read->req.bytes = nb_cells * sizeof(uint32_t);
    memcpy(read->cells, m->cells, sizeof(read->cells));
    memcpy(read->writer, m->writer, sizeof(read->writer));
    qemu_iovec_init_buf(&read->qiov, read->data, read->req.bytes);
    m->read = read;
    blk_aio_preadv(filter.blk, read->req.offset, &read->qiov, 0, guest_done,
                   &read->req);
    run();
}

static void model_request(Model *m)
{
    static const WriteBehindType types[] = {
        WRITE_BEHIND_WRITE, WRITE_BEHIND_WRITE, WRITE_BEHIND_WRITE,
        WRITE_BEHIND_ZEROES, WRITE_BEHIND_DISCARD, WRITE_BEHIND_FLUSH,
    };
    WriteBehindType type = types[g_rand_int_range(m->rand, 0,
                                                  ARRAY_SIZE(types))];
    int slot = g_rand_int_range(m->rand, 0, ARRAY_SIZE(m->waiting));
    int first = g_rand_int_range(m->rand, 0, 48);
    int nb_cells = g_rand_int_range(m->rand, 1, 16);
    bool fua = g_rand_int_range(m->rand, 0, 8) == 0;

    if (type == WRITE_BEHIND_FLUSH) {
        model_flush(m);
        return;
    }
    if (m->waiting[slot] || model_is_busy(m, first, nb_cells)) {
        return;
    }
    if (!m->read && g_rand_int_range(m->rand, 0, 16) == 0) {
        model_begin_read(m, first, nb_cells);
        return;
    }

    fua &= type != WRITE_BEHIND_DISCARD;
    m->last++;
    model_change(m, type, first, nb_cells, fua);
    m->waiting[slot] = guest_begin(type, first, nb_cells, m->last,
                                   fua ? BDRV_REQ_FUA : 0);
}

static void model_release(Model *m)
{
    ChildReq *req;
    int n = 0;

    QTAILQ_FOREACH(req, &child.reqs, next) {
        n++;
    }
    if (!n) {
        return;
    }
    n = g_rand_int_range(m->rand, 0, n);
    QTAILQ_FOREACH(req, &child.reqs, next) {
        if (n-- == 0) {
            release(req, 0);
            return;
        }
    }
}

static void model_check(Model *m)
{
    for (int i = 0; i < NB_CELLS; i++) {
        g_assert_cmpuint(cell(child.data, i), ==, m->cells[i]);
    }
    model_check_stable(m, m->floor);
}

static void random_schedule(uint32_t seed)
{
    static const uint64_t bounds[] = { 512, 2048, 1 << 20 };
    Model m = { .rand = g_rand_new_with_seed(seed) };
    int steps = g_rand_int_range(m.rand, 1, 200);
    int hurry = g_rand_int_range(m.rand, 1, 8);
    uint64_t max_bytes = bounds[seed % ARRAY_SIZE(bounds)];
    WriteBehindStats stats;
    bool fails;

    setup(max_bytes);
    filter.flush_waits = seed % 2;
    while (steps--) {
        if (g_rand_int_range(m.rand, 0, 8) < hurry) {
            model_release(&m);
        } else {
            model_request(&m);
        }
        model_reap(&m);
        g_assert_cmpuint(get_stats().pending_bytes, <=, max_bytes);
    }
    fails = !QTAILQ_EMPTY(&child.reqs) && seed % 8 == 0;
    if (fails) {
        release_first(-EIO);
    }
    while (!QTAILQ_EMPTY(&child.reqs)) {
        model_release(&m);
    }
    model_reap(&m);

    /* Nobody is left behind */
    g_assert(model_is_quiet(&m) && !m.flush && !m.read);
    stats = get_stats();
    g_assert_cmpuint(stats.pending_requests, ==, 0);
    g_assert_cmpuint(stats.pending_bytes, ==, 0);
    g_assert_cmpint(filter.errors, ==, fails);
    if (!fails) {
        g_assert_cmpuint(stats.sent_requests + stats.superseded_requests, ==,
                         m.last);
        model_check(&m);
    }
    teardown();
    g_rand_free(m.rand);
}

static void test_random(void)
{
    uint32_t seed = g_test_rand_int();

    for (int i = 0; i < SCHEDULES; i++) {
        g_test_message("schedule %" PRIu32, seed + i);
        random_schedule(seed + i);
    }
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);

    g_test_add_func("/write-behind/behind", test_behind);
    g_test_add_func("/write-behind/gather", test_gather);
    g_test_add_func("/write-behind/order", test_order);
    g_test_add_func("/write-behind/bound", test_bound);
    g_test_add_func("/write-behind/no-queue", test_no_queue);
    g_test_add_func("/write-behind/flush", test_flush);
    g_test_add_func("/write-behind/supersede", test_supersede);
    g_test_add_func("/write-behind/supersede-permanent",
                    test_supersede_permanent);
    g_test_add_func("/write-behind/cut-appends", test_cut_appends);
    g_test_add_func("/write-behind/cut", test_cut);
    g_test_add_func("/write-behind/cut-discard", test_cut_discard);
    g_test_add_func("/write-behind/cut-permanent", test_cut_permanent);
    g_test_add_func("/write-behind/not-only-oldest", test_not_only_oldest);
    g_test_add_func("/write-behind/join", test_join);
    g_test_add_func("/write-behind/join-error", test_join_error);
    g_test_add_func("/write-behind/error", test_error);
    g_test_add_func("/write-behind/error-drops-queued",
                    test_error_drops_queued);
    g_test_add_func("/write-behind/error-ends-wait", test_error_ends_wait);
    g_test_add_func("/write-behind/flush-error", test_flush_error);
    g_test_add_func("/write-behind/flush-waits", test_flush_waits);
    g_test_add_func("/write-behind/short", test_short);
    g_test_add_func("/write-behind/settle", test_settle);
    g_test_add_func("/write-behind/settle-overwritten",
                    test_settle_overwritten);
    g_test_add_func("/write-behind/cost/overlaps", test_cost_of_overlaps);
    g_test_add_func("/write-behind/cost/readers", test_cost_of_readers);
    g_test_add_func("/write-behind/cost/settle", test_cost_of_settle);
    g_test_add_func("/write-behind/bound-in-time", test_bound_in_time);
    g_test_add_func("/write-behind/abandon", test_abandon);
    g_test_add_func("/write-behind/drain", test_drain);
    g_test_add_func("/write-behind/drain-child", test_drain_child);
    g_test_add_func("/write-behind/iothread", test_iothread);
    g_test_add_func("/write-behind/random", test_random);

    return g_test_run();
}
