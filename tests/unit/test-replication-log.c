/*
 * Test of the write-intent log of block replication
 *
 * The metadata is a driver that knows of each page every version that may be
 * there after a power cut: the last one that was written with FUA, those that
 * came later, and the one that is being written.  Any sector may be of any of
 * these, so what all of them have is what the log has for sure.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block_int.h"
#include "qapi/error.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "../../block/replication-log.h"

#define PAGE        REPLICATION_META_RECORD
#define REGION      REPLICATION_META_REGION
#define NB_PAGES    3
/* The last one is not whole */
#define NB_REGIONS  (2 * PAGE * 8 + 50)
#define SIZE        (NB_REGIONS * REGION - 512)
#define META_SIZE   (REPLICATION_META_LOG + NB_PAGES * PAGE)

/* Those that the test touches: around where pages meet, and at the end */
#define NB_TOUCHED  100

typedef struct MetaReq {
    Coroutine *co;
    int64_t offset;
    int64_t bytes;
    QTAILQ_ENTRY(MetaReq) next;
} MetaReq;

static struct {
    uint8_t data[META_SIZE];
    /* What every version has that may be there */
    uint8_t sure[META_SIZE];
    QTAILQ_HEAD(, MetaReq) reqs;
    /* Writes are under way until meta_release() */
    bool hold;
    int error;
    int writes;
} meta = { .reqs = QTAILQ_HEAD_INITIALIZER(meta.reqs) };

static BlockDriverState *meta_bs, *top_bs;
static BdrvChild *meta_child;
static ReplicationChanges *changes;
static ReplicationLog *replication_log;
/* Coroutines that have not ended */
static int pending;

static void coroutine_fn meta_wait(int64_t offset, int64_t bytes)
{
    MetaReq *other, req = {
        .co = qemu_coroutine_self(), .offset = offset, .bytes = bytes,
    };

    QTAILQ_FOREACH(other, &meta.reqs, next) {
        g_assert(offset + bytes <= other->offset ||
                 other->offset + other->bytes <= offset);
    }
    QTAILQ_INSERT_TAIL(&meta.reqs, &req, next);
    if (!meta.hold) {
        aio_co_schedule(qemu_get_aio_context(), req.co);
    }
    qemu_coroutine_yield();
    QTAILQ_REMOVE(&meta.reqs, &req, next);
}

static int coroutine_fn GRAPH_RDLOCK
meta_co_pwritev(BlockDriverState *bs, int64_t offset, int64_t bytes,
                QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);
    int error = meta.error;

    g_assert(!(offset % PAGE) && !(bytes % PAGE));
    meta.writes++;
    qemu_iovec_to_buf(qiov, 0, buf, bytes);
    for (int64_t i = 0; i < bytes; i++) {
        meta.sure[offset + i] &= buf[i];
    }
    meta_wait(offset, bytes);
    if (error) {
        return error;
    }
    memcpy(meta.data + offset, buf, bytes);
    if (flags & BDRV_REQ_FUA) {
        memcpy(meta.sure + offset, buf, bytes);
    }

    return 0;
}

static int coroutine_fn GRAPH_RDLOCK
meta_co_preadv(BlockDriverState *bs, int64_t offset, int64_t bytes,
               QEMUIOVector *qiov, BdrvRequestFlags flags)
{
    qemu_iovec_from_buf(qiov, 0, meta.data + offset, bytes);

    return 0;
}

static int64_t coroutine_fn GRAPH_RDLOCK meta_co_getlength(BlockDriverState *bs)
{
    return META_SIZE;
}

static BlockDriver bdrv_meta = {
    .format_name        = "meta",
    .bdrv_co_pwritev    = meta_co_pwritev,
    .bdrv_co_preadv     = meta_co_preadv,
    .bdrv_co_getlength  = meta_co_getlength,
    .bdrv_child_perm    = bdrv_default_perms,
};

static void GRAPH_RDLOCK
top_child_perm(BlockDriverState *bs, BdrvChild *c, BdrvChildRole role,
               BlockReopenQueue *reopen_queue, uint64_t perm, uint64_t shared,
               uint64_t *nperm, uint64_t *nshared)
{
    *nperm = BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE;
    *nshared = BLK_PERM_ALL;
}

static BlockDriver bdrv_top = {
    .format_name        = "top",
    .bdrv_child_perm    = top_child_perm,
};

/* Let a request end, the one at this place in their order */
static void meta_release(int i)
{
    MetaReq *req = QTAILQ_FIRST(&meta.reqs);

    while (i--) {
        req = QTAILQ_NEXT(req, next);
    }
    aio_co_wake(req->co);
}

static void setup(int64_t log_size)
{
    memset(meta.data, 0, sizeof(meta.data));
    memset(meta.sure, 0, sizeof(meta.sure));
    meta.hold = false;
    meta.error = 0;
    meta.writes = 0;

    meta_bs = bdrv_new_open_driver(&bdrv_meta, "meta", BDRV_O_RDWR,
                                   &error_abort);
    meta_bs->total_sectors = META_SIZE / BDRV_SECTOR_SIZE;
    meta_bs->supported_write_flags = BDRV_REQ_FUA;
    top_bs = bdrv_new_open_driver(&bdrv_top, "top", BDRV_O_RDWR, &error_abort);
    bdrv_graph_wrlock();
    meta_child = bdrv_attach_child(top_bs, meta_bs, "metadata", &child_of_bds,
                                   BDRV_CHILD_METADATA, &error_abort);
    bdrv_graph_wrunlock();
    changes = replication_changes_new(SIZE);
    replication_log = replication_log_new(meta_child, SIZE, changes, log_size);
}

static void forget_log(void)
{
    replication_log_free(replication_log);
    replication_changes_free(changes);
    changes = replication_changes_new(SIZE);
}

static void teardown(void)
{
    replication_log_free(replication_log);
    replication_changes_free(changes);
    bdrv_unref(top_bs);
}

static bool is_set(const uint8_t *data, int64_t region)
{
    return data[REPLICATION_META_LOG + region / 8] & 1 << region % 8;
}

static void drain(void)
{
    while (pending) {
        if (meta.hold && !QTAILQ_EMPTY(&meta.reqs)) {
            meta_release(0);
        }
        aio_poll(qemu_get_aio_context(), false);
    }
}

/* A change of the disk */
typedef struct Change {
    int64_t offset;
    int64_t bytes;
    int ret;
} Change;

/* What the disk may have that a checkpoint of both sides has not, for sure */
static struct {
    bool current[NB_REGIONS];
    bool closing[NB_REGIONS];
} needed;

static void coroutine_fn change_entry(void *opaque)
{
    Change *c = opaque;

    replication_changes_note(changes, c->offset, c->bytes);
    bdrv_graph_co_rdlock();
    c->ret = replication_log_co_begin(replication_log, c->offset, c->bytes);
    bdrv_graph_co_rdunlock();
    if (c->ret == 0) {
        for (int64_t r = c->offset / REGION;
             r * REGION < c->offset + c->bytes; r++) {
            g_assert(is_set(meta.sure, r));
            needed.current[r] = true;
        }
    }
    pending--;
}

static void begin_change(Change *c, int64_t offset, int64_t bytes)
{
    *c = (Change) { .offset = offset, .bytes = bytes, .ret = -EINPROGRESS };
    pending++;
    qemu_coroutine_enter(qemu_coroutine_create(change_entry, c));
}

static void change(int64_t region)
{
    Change c;

    begin_change(&c, region * REGION, 512);
    drain();
    g_assert_cmpint(c.ret, ==, 0);
}

static void coroutine_fn tick_entry(void *opaque)
{
    bdrv_graph_co_rdlock();
    replication_log_co_tick(replication_log);
    bdrv_graph_co_rdunlock();
    *(bool *)opaque = false;
    pending--;
}

static bool ticking;

static void begin_tick(void)
{
    ticking = true;
    pending++;
    qemu_coroutine_enter(qemu_coroutine_create(tick_entry, &ticking));
}

static void tick(void)
{
    begin_tick();
    drain();
}

static void check_superset(void)
{
    for (int64_t r = 0; r < NB_REGIONS; r++) {
        g_assert(!(needed.current[r] || needed.closing[r]) ||
                 is_set(meta.sure, r));
    }
}

static void checkpoint(bool flushed)
{
    replication_changes_checkpoint(changes, flushed);
    for (int64_t r = 0; r < NB_REGIONS; r++) {
        needed.closing[r] = needed.current[r] ||
                            (!flushed && needed.closing[r]);
        needed.current[r] = false;
    }
}

/* Nowhere, or in some of the regions: see NB_TOUCHED */
static int64_t random_region(GRand *rng)
{
    int64_t i = g_rand_int_range(rng, 0, NB_TOUCHED);

    return i < NB_TOUCHED / 2 ? PAGE * 8 - NB_TOUCHED / 4 + i :
                                NB_REGIONS - NB_TOUCHED + i;
}

static void random_step(GRand *rng, Change *all, int nb)
{
    int64_t offset = random_region(rng) * REGION +
                     g_rand_int_range(rng, 0, REGION / 512 - 1) * 512;
    int i = g_rand_int_range(rng, 0, nb);
    MetaReq *req;
    int reqs = 0;

    QTAILQ_FOREACH(req, &meta.reqs, next) {
        reqs++;
    }
    switch (g_rand_int_range(rng, 0, 20)) {
    case 0:
        drain();
        checkpoint(g_rand_boolean(rng));
        break;
    case 1:
        if (!ticking) {
            begin_tick();
        }
        break;
    case 2:
        meta.error = g_rand_int_range(rng, 0, 4) ? 0 : -EIO;
        break;
    case 3 ... 10:
        if (all[i].ret != -EINPROGRESS) {
            begin_change(&all[i], offset,
                         MIN(SIZE - offset,
                             512 << g_rand_int_range(rng, 0, 14)));
        }
        break;
    default:
        if (reqs) {
            meta_release(g_rand_int_range(rng, 0, reqs));
        }
        break;
    }
}

/* Whenever the power is cut, the log has what it must have, and not all */
static void test_superset(void)
{
    g_autoptr(GRand) rng = g_rand_new_with_seed(1);
    Change all[8] = {};

    memset(&needed, 0, sizeof(needed));
    setup(NB_TOUCHED * REGION);
    meta.hold = true;
    for (int i = 0; i < 20000; i++) {
        random_step(rng, all, ARRAY_SIZE(all));
        aio_poll(qemu_get_aio_context(), false);
        check_superset();
    }
    drain();
    for (int i = 0; i < 4; i++) {
        meta.error = 0;
        checkpoint(true);
        tick();
    }
    for (int64_t r = 0; r < NB_REGIONS; r++) {
        g_assert(!is_set(meta.data, r));
    }
    g_assert_cmpint(replication_log_regions(replication_log), ==, 0);
    teardown();
}

/* However many wait, they wait for two writes at most */
static void test_group(void)
{
    Change all[100];

    setup(GiB);
    meta.hold = true;
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        begin_change(&all[i], i * REGION, 512);
    }
    drain();
    g_assert_cmpint(meta.writes, ==, 2);
    g_assert_cmpint(replication_log_cold_writes(replication_log), ==, 100);

    /* And now none */
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        begin_change(&all[i], i * REGION + 5, 1);
        g_assert_cmpint(all[i].ret, ==, 0);
    }
    g_assert_cmpint(meta.writes, ==, 2);
    teardown();
}

/* What is of no use stays for a while, and what is of use stays */
static void test_clock(void)
{
    setup(8 * REGION);
    for (int r = 0; r < 4; r++) {
        g_assert(!replication_log_wants_tick(replication_log));
        change(r);
    }
    g_assert(replication_log_wants_tick(replication_log));
    checkpoint(true);
    checkpoint(true);

    tick();
    g_assert(!replication_log_wants_tick(replication_log));
    g_assert_cmpint(replication_log_regions(replication_log), ==, 4);
    change(1);
    tick();
    g_assert_cmpint(replication_log_regions(replication_log), ==, 1);
    checkpoint(false);
    tick();
    tick();
    g_assert_cmpint(replication_log_regions(replication_log), ==, 1);
    g_assert(is_set(meta.data, 1) && !is_set(meta.data, 0));

    checkpoint(true);
    tick();
    g_assert_cmpint(replication_log_regions(replication_log), ==, 0);
    g_assert(!is_set(meta.data, 1));
    change(1);
    g_assert(is_set(meta.sure, 1));
    teardown();
}

static void test_error(void)
{
    Change c;

    setup(GiB);
    meta.error = -ENOSPC;
    begin_change(&c, 0, 512);
    drain();
    g_assert_cmpint(c.ret, ==, -ENOSPC);
    meta.error = 0;
    change(0);
    g_assert(is_set(meta.sure, 0));
    meta.error = -EIO;
    /* It is hot */
    change(0);
    teardown();
}

/* What another process has written, or the same one before */
static void test_load(void)
{
    int64_t offset, bytes;

    setup(GiB);
    change(0);
    change(1);
    change(PAGE * 8 - 1);
    change(PAGE * 8);
    change(NB_REGIONS - 1);
    forget_log();
    /* Behind the end */
    meta.data[REPLICATION_META_LOG + NB_REGIONS / 8 + 1] = 0xff;

    replication_log = replication_log_new(meta_child, SIZE, changes, GiB);
    g_assert_cmpint(replication_log_load(replication_log), ==, 0);
    g_assert_cmpint(replication_log_regions(replication_log), ==, 5);
    g_assert(replication_log_next(replication_log, 0, &offset, &bytes));
    g_assert_cmpint(offset, ==, 0);
    g_assert_cmpint(bytes, ==, 2 * REGION);
    g_assert(replication_log_next(replication_log, 2 * REGION, &offset,
                                  &bytes));
    g_assert_cmpint(offset, ==, (PAGE * 8 - 1) * REGION);
    g_assert_cmpint(bytes, ==, 2 * REGION);
    g_assert(replication_log_next(replication_log, offset + bytes, &offset,
                                  &bytes));
    g_assert_cmpint(offset + bytes, ==, SIZE);
    g_assert(!replication_log_next(replication_log, SIZE, &offset, &bytes));

    /* It may not have been on stable storage */
    meta.writes = 0;
    change(0);
    g_assert_cmpint(meta.writes, ==, 1);
    teardown();
}

static void test_write_changes(void)
{
    setup(GiB);
    replication_changes_note(changes, 5 * REGION - 1, 2);
    replication_changes_checkpoint(changes, true);
    replication_changes_note(changes, SIZE - 1, 1);
    g_assert_cmpint(replication_log_write_changes(replication_log, changes), ==,
                    0);
    g_assert_cmpint(meta.writes, ==, 2);
    g_assert_cmpint(replication_log_regions(replication_log), ==, 3);
    g_assert(is_set(meta.sure, 4) && is_set(meta.sure, 5));
    g_assert(is_set(meta.sure, NB_REGIONS - 1));

    replication_changes_note(changes, 0, SIZE);
    g_assert_cmpint(replication_log_write_changes(replication_log, changes), ==,
                    0);
    g_assert_cmpint(meta.writes, ==, 3);
    g_assert_cmpint(replication_log_regions(replication_log), ==, NB_REGIONS);
    for (int64_t r = 0; r < NB_REGIONS; r++) {
        g_assert(is_set(meta.sure, r));
    }

    g_assert_cmpint(replication_log_write_empty(replication_log), ==, 0);
    g_assert_cmpint(replication_log_regions(replication_log), ==, 0);
    for (int64_t r = 0; r < NB_REGIONS; r++) {
        g_assert(!is_set(meta.data, r));
    }
    teardown();
}

static void test_resize(void)
{
    ReplicationLog *log;

    setup(GiB);
    log = replication_log_new(meta_child, REGION, changes, GiB);
    replication_log_resize(log, SIZE);
    replication_log_free(replication_log);
    replication_log = log;
    change(NB_REGIONS - 1);
    g_assert(is_set(meta.sure, NB_REGIONS - 1));
    replication_log_resize(log, REGION);
    change(0);
    teardown();
}

/* Which of two copies counts, and that a write does not touch the other */
static void test_records(void)
{
    ReplicationOwnRecord own = { .size = SIZE, .current.data = { 1 } };
    ReplicationPeerRecord peer = { .kind = REPLICATION_PEER_SYNC };
    const ReplicationRecords *r;
    ReplicationMeta *m;

    setup(GiB);
    m = replication_meta_new(top_bs, meta_child);
    r = replication_meta_records(m);
    g_assert_cmpint(replication_meta_load(m, SIZE, &error_abort), ==, 0);
    g_assert_cmpint(r->own_status, ==, REPLICATION_RECORD_FRESH);

    /* The first gets both copies */
    g_assert_cmpint(replication_meta_write_own(m, &own, &error_abort), ==, 0);
    g_assert_cmpint(meta.writes, ==, 2);
    for (int i = 2; i < 6; i++) {
        own.current.data[0] = i;
        g_assert_cmpint(replication_meta_write_own(m, &own, &error_abort), ==,
                        0);
        g_assert_cmpint(r->own.sequence, ==, i);
        g_assert_cmpint(meta.writes, ==, i + 1);
    }
    g_assert_cmpint(replication_meta_load(m, SIZE, &error_abort), ==, 0);
    g_assert_cmpint(r->own_status, ==, REPLICATION_RECORD_VALID);
    g_assert_cmpint(r->own.current.data[0], ==, 5);

    /* One is damaged, and then the other as well */
    for (int i = 0; i < 2; i++) {
        meta.data[i * PAGE + 100] ^= 1;
        g_assert_cmpint(replication_meta_load(m, SIZE, &error_abort), ==, 0);
        g_assert_cmpint(r->own_status, ==, i ? REPLICATION_RECORD_CORRUPT :
                                               REPLICATION_RECORD_VALID);
    }

    /* A write that failed is done again to the same copy */
    meta.data[100] ^= 1;
    g_assert_cmpint(replication_meta_load(m, SIZE, &error_abort), ==, 0);
    meta.error = -EIO;
    g_assert_cmpint(replication_meta_write_own(m, &own, NULL), ==, -EIO);
    meta.error = 0;
    meta.writes = 0;
    g_assert_cmpint(replication_meta_write_own(m, &own, &error_abort), ==, 0);
    g_assert_cmpint(meta.writes, ==, 1);

    /* The peer's does not fall behind what was taken account of */
    own.absorbed = 10;
    g_assert_cmpint(replication_meta_write_own(m, &own, &error_abort), ==, 0);
    g_assert_cmpint(replication_meta_write_peer(m, &peer, &error_abort), ==, 0);
    g_assert_cmpint(replication_meta_load_peer(m, &error_abort), ==, 0);
    g_assert_cmpint(r->peer.sequence, ==, 11);
    g_assert(replication_records_has_peer(r));

    /* An interrupted first one is none */
    memset(meta.data, 0, sizeof(meta.data));
    meta.data[PAGE + 1] = 1;
    g_assert_cmpint(replication_meta_load(m, SIZE, &error_abort), ==, 0);
    g_assert_cmpint(r->own_status, ==, REPLICATION_RECORD_FRESH);
    g_assert_cmpint(replication_meta_load(m, 10 * TiB, NULL), ==, -ENOSPC);
    replication_meta_free(m);
    teardown();
}

int main(int argc, char **argv)
{
    bdrv_init();
    qemu_init_main_loop(&error_abort);
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/replication-log/superset", test_superset);
    g_test_add_func("/replication-log/group", test_group);
    g_test_add_func("/replication-log/clock", test_clock);
    g_test_add_func("/replication-log/error", test_error);
    g_test_add_func("/replication-log/load", test_load);
    g_test_add_func("/replication-log/write-changes", test_write_changes);
    g_test_add_func("/replication-log/resize", test_resize);
    g_test_add_func("/replication-log/records", test_records);

    return g_test_run();
}
