/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tests of the replication driver on real raw and qcow2 images.
 *
 * The registry is driven as COLO drives it.  Every test keeps a plain copy of
 * what each side must hold and compares whole images with it.
 *
 * Here is what needs to be in one process with the driver: its permissions and
 * op blockers, nodes that are closed at any time, and single requests, each
 * with its error.  All else is tested by the iotests replication-*.
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qapi/qapi-types-block-core.h"
#include "qemu/main-loop.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "qobject/qjson.h"
#include "block/block_int.h"
#include "block/blockjob.h"
#include "block/qdict.h"
#include "block/replication.h"
#include "system/block-backend.h"

/* Neither a multiple of the cluster size nor of 4 KiB */
#define IMG_SIZE (1 * MiB + 1536)
#define CLUSTER (64 * KiB)
#define DEADLINE_US (20 * G_USEC_PER_SEC)

#define PRIMARY REPLICATION_MODE_PRIMARY
#define SECONDARY REPLICATION_MODE_SECONDARY

static char *tmpdir;

/* Images and models */

static char *image_path(const char *name)
{
    return g_strdup_printf("%s/%s", tmpdir, name);
}

/* Contents in which no block is zero and no two blocks are alike */
static uint8_t *new_model(void)
{
    uint8_t *model = g_malloc(IMG_SIZE);

    for (int i = 0; i < IMG_SIZE; i++) {
        model[i] = 1 + (i / 512 * 37 + i) % 251;
    }
    return model;
}

static void create_raw(const char *path)
{
    g_autofree uint8_t *model = new_model();

    g_assert_true(g_file_set_contents(path, (char *)model, IMG_SIZE, NULL));
}

static BlockBackend *G_GNUC_PRINTF(3, 4)
try_open(int flags, Error **errp, const char *fmt, ...)
{
    g_autofree char *json = NULL;
    QDict *options;
    va_list ap;

    va_start(ap, fmt);
    json = g_strdup_vprintf(fmt, ap);
    va_end(ap);

    options = qobject_to(QDict, qobject_from_json(json, &error_abort));
    g_assert_nonnull(options);
    qdict_flatten(options);
    return blk_new_open(NULL, NULL, options, flags | BDRV_O_UNMAP, errp);
}

#define open_rw(...) try_open(BDRV_O_RDWR, &error_abort, __VA_ARGS__)

/* An overlay is born with stale data: start has to empty it */
static void create_overlay(const char *path)
{
    static const uint8_t stale[4096] = { [0 ... 4095] = 0x5a };
    BlockBackend *blk;

    bdrv_img_create(path, "qcow2", NULL, NULL, NULL, IMG_SIZE, 0, true,
                    &error_abort);
    blk = open_rw("{'driver': 'qcow2',"
                  " 'file': {'driver': 'file', 'filename': '%s'}}", path);
    g_assert_cmpint(blk_pwrite(blk, 3 * CLUSTER + 512, sizeof(stale), stale,
                               0), >=, 0);
    blk_unref(blk);
}

static void check_view_at(BlockBackend *blk, const uint8_t *model, int line)
{
    g_autofree uint8_t *buf = g_malloc0(IMG_SIZE);
    int ret = blk_pread(blk, 0, IMG_SIZE, buf, 0);

    if (ret < 0) {
        g_error("line %d: cannot read: %s", line, strerror(-ret));
    }
    for (int i = 0; i < IMG_SIZE; i++) {
        if (buf[i] != model[i]) {
            g_error("line %d: byte %d is %02x, must be %02x", line, i, buf[i],
                    model[i]);
        }
    }
}

#define check_view(blk, model) check_view_at(blk, model, __LINE__)

static int try_write(BlockBackend *blk, int64_t offset, int64_t bytes,
                     uint8_t byte, BdrvRequestFlags flags)
{
    g_autofree uint8_t *buf = g_malloc(bytes);

    memset(buf, byte, bytes);
    return blk_pwrite(blk, offset, bytes, buf, flags);
}

static void put_at(BlockBackend *blk, uint8_t *model, int64_t offset,
                   int64_t bytes, uint8_t byte, int line)
{
    int ret = try_write(blk, offset, bytes, byte, 0);

    if (ret < 0) {
        g_error("line %d: cannot write: %s", line, strerror(-ret));
    }
    if (model) {
        memset(model + offset, byte, bytes);
    }
}

#define put(blk, model, offset, bytes, byte) \
    put_at(blk, model, offset, bytes, byte, __LINE__)

static void put_zeroes(BlockBackend *blk, uint8_t *model, int64_t offset,
                       int64_t bytes)
{
    g_assert_cmpint(blk_pwrite_zeroes(blk, offset, bytes, 0), >=, 0);
    memset(model + offset, 0, bytes);
}

/* The next write to the image of a node is held, until somebody waits for it */

static void hold_write(BlockDriverState *bs)
{
    g_assert_cmpint(bdrv_debug_breakpoint(bs, "pwritev", "hold"), ==, 0);
}

static void let_go_bh(void *opaque)
{
    g_assert_cmpint(bdrv_debug_resume(opaque, "hold"), ==, 0);
}

static void let_go_later(BlockDriverState *bs)
{
    int64_t end = g_get_monotonic_time() + DEADLINE_US;

    while (!bdrv_debug_is_suspended(bs, "hold")) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        aio_poll(qemu_get_aio_context(), false);
    }
    aio_bh_schedule_oneshot(qemu_get_aio_context(), let_go_bh, bs);
}

static int try_read(BlockBackend *blk)
{
    uint8_t buf[512];

    return blk_pread(blk, 0, sizeof(buf), buf, 0);
}

/* The registry */

static void expect_error_at(Error *err, const char *word, int line)
{
    if (!err) {
        g_error("line %d: no error, expected one with '%s'", line, word);
    }
    if (!strstr(error_get_pretty(err), word)) {
        g_error("line %d: '%s' does not say '%s'", line,
                error_get_pretty(err), word);
    }
    error_free(err);
}

#define start_ok(mode) replication_start_all(mode, &error_abort)
#define checkpoint_ok() replication_do_checkpoint_all(&error_abort)
#define status_ok() replication_get_error_all(&error_abort)
#define stop_ok(failover) replication_stop_all(failover, &error_abort)

/* @call gives its error to &err_ */
#define must_fail(word, call)                           \
    do {                                                \
        Error *err_ = NULL;                             \
        call;                                           \
        expect_error_at(err_, word, __LINE__);          \
    } while (0)

#define start_fails(mode, word) \
    must_fail(word, replication_start_all(mode, &err_))
#define checkpoint_fails(word) \
    must_fail(word, replication_do_checkpoint_all(&err_))
#define status_fails(word) \
    must_fail(word, replication_get_error_all(&err_))

/* The graph, to prove that a failed start left nothing behind */

static const char *xdbg_name(XDbgBlockGraph *graph, uint64_t id)
{
    XDbgBlockGraphNodeList *n;

    for (n = graph->nodes; n; n = n->next) {
        if (n->value->id == id) {
            return n->value->name;
        }
    }
    g_assert_not_reached();
}

static unsigned perm_bits(BlockPermissionList *list)
{
    unsigned bits = 0;

    for (; list; list = list->next) {
        bits |= 1u << list->value;
    }
    return bits;
}

static int compare_lines(gconstpointer a, gconstpointer b)
{
    return strcmp(*(const char **)a, *(const char **)b);
}

static void add_blockers(GPtrArray *lines, BlockDriverState *bs)
{
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    for (int op = 0; op < BLOCK_OP_TYPE_MAX; op++) {
        if (bdrv_op_is_blocked(bs, op, NULL)) {
            g_ptr_array_add(lines, g_strdup_printf("%s blocks %d",
                                                   bs->node_name, op));
        }
    }
}

/* Nodes, edges with permissions, read-only flags, blockers, jobs, as text */
static char *graph_text(void)
{
    g_autoptr(GPtrArray) lines = g_ptr_array_new_with_free_func(g_free);
    XDbgBlockGraph *graph;
    XDbgBlockGraphNodeList *n;
    XDbgBlockGraphEdgeList *e;
    BlockDriverState *bs;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    graph = bdrv_get_xdbg_block_graph(&error_abort);
    for (n = graph->nodes; n; n = n->next) {
        g_ptr_array_add(lines, g_strdup_printf("node %d '%s'", n->value->type,
                                               n->value->name));
    }
    for (e = graph->edges; e; e = e->next) {
        g_ptr_array_add(lines, g_strdup_printf(
            "edge '%s' -%s-> '%s' %x %x",
            xdbg_name(graph, e->value->parent), e->value->name,
            xdbg_name(graph, e->value->child), perm_bits(e->value->perm),
            perm_bits(e->value->shared_perm)));
    }
    for (bs = bdrv_next_node(NULL); bs; bs = bdrv_next_node(bs)) {
        g_ptr_array_add(lines, g_strdup_printf("%s %s", bs->node_name,
                            bdrv_is_read_only(bs) ? "ro" : "rw"));
        add_blockers(lines, bs);
    }
    qapi_free_XDbgBlockGraph(graph);

    g_ptr_array_sort(lines, compare_lines);
    g_ptr_array_add(lines, NULL);
    return g_strjoinv("\n", (char **)lines->pdata);
}

/* The primary */

typedef struct Primary {
    char *path;
    BlockBackend *link;         /* the secondary, as the primary sees it */
    BlockBackend *guest;
    uint8_t *model;             /* what must have arrived there */
} Primary;

/*
 * @rules are blkdebug options below the link, each after a comma.
 */
static Primary *primary_new(const char *rules)
{
    Primary *p = g_new0(Primary, 1);

    p->path = image_path("link");
    p->model = new_model();
    create_raw(p->path);
    p->link = open_rw("{'driver': 'raw', 'node-name': 'link', 'file':"
                      " {'driver': 'blkdebug', 'image':"
                      "  {'driver': 'file', 'discard': 'unmap',"
                      "   'filename': '%s'} %s}}", p->path, rules);
    p->guest = open_rw("{'driver': 'replication', 'node-name': 'repl-p',"
                       " 'mode': 'primary', 'file': 'link'}");
    return p;
}

static void primary_free(Primary *p)
{
    blk_unref(p->guest);
    blk_unref(p->link);
    unlink(p->path);
    g_free(p->path);
    g_free(p->model);
    g_free(p);
}

/* A read fails or is right; it fails once the secondary is out of date */
static void test_primary_read(void)
{
    Primary *p = primary_new("");
    g_autofree uint8_t *buf = g_malloc0(IMG_SIZE);

    put(p->guest, p->model, 777, 7777, 0xa1);
    start_ok(PRIMARY);
    if (blk_pread(p->guest, 0, IMG_SIZE, buf, 0) >= 0) {
        g_assert_cmpmem(buf, IMG_SIZE, p->model, IMG_SIZE);
    }
    stop_ok(true);
    g_assert_cmpint(try_read(p->guest), ==, -EIO);
    g_assert_cmpint(try_write(p->guest, 0, 512, 0xa2, 0), ==, -EIO);
    g_assert_cmpint(try_read(p->guest), ==, -EIO);
    primary_free(p);
}

typedef struct Fault {
    const char *name;
    const char *iotype;
    int (*request)(BlockBackend *blk);
} Fault;

static int fault_write(BlockBackend *blk)
{
    return try_write(blk, CLUSTER, 512, 0xcc, 0);
}

static int fault_fua(BlockBackend *blk)
{
    return try_write(blk, CLUSTER, 512, 0xcc, BDRV_REQ_FUA);
}

static int fault_zero(BlockBackend *blk)
{
    return blk_pwrite_zeroes(blk, CLUSTER, CLUSTER, 0);
}

static int fault_discard(BlockBackend *blk)
{
    return blk_pdiscard(blk, CLUSTER, CLUSTER, 0);
}

static int fault_flush(BlockBackend *blk)
{
    int ret = try_write(blk, CLUSTER, 512, 0xcc, 0);

    return ret < 0 ? ret : blk_flush(blk);
}

/*
 * The request kinds also show what arrives at the link: a zero write or a
 * discard that came as data would not meet its fault.
 */
static const Fault faults[] = {
    { "write", "write", fault_write },
    { "fua", "write", fault_fua },
    { "zero", "write-zeroes", fault_zero },
    { "discard", "discard", fault_discard },
    { "flush", "flush", fault_flush },
};

static Primary *primary_with_fault(const Fault *fault)
{
    g_autofree char *rules = g_strdup_printf(
        ", 'inject-error': [{'event': 'none', 'iotype': '%s', 'errno': 28,"
        " 'once': true}]", fault->iotype);

    return primary_new(rules);
}

static void test_primary_fault_before_start(const void *opaque)
{
    const Fault *fault = opaque;
    Primary *p = primary_with_fault(fault);

    /* done when it is queued */
    g_assert_cmpint(fault->request(p->guest), >=, 0);
    start_fails(PRIMARY, "out of date");
    /* the fault is gone, what was missed is still missing */
    g_assert_cmpint(fault->request(p->guest), ==, -ENOSPC);
    start_fails(PRIMARY, "out of date");
    g_assert_cmpint(try_read(p->guest), <, 0);
    primary_free(p);
}

static void test_primary_fault_running(const void *opaque)
{
    const Fault *fault = opaque;
    Primary *p = primary_with_fault(fault);

    start_ok(PRIMARY);
    checkpoint_ok();
    g_assert_cmpint(fault->request(p->guest), >=, 0);
    blk_drain(p->guest);
    status_fails("repl-p");
    checkpoint_fails("out of date");
    checkpoint_fails("repl-p");
    g_assert_cmpint(try_read(p->guest), <, 0);
    g_assert_cmpint(fault->request(p->guest), ==, -ENOSPC);

    /* the survivor goes on alone */
    stop_ok(true);
    g_assert_cmpint(fault->request(p->guest), <, 0);
    primary_free(p);
}

/* FUA has to arrive as FUA: a flush in its place would meet the fault */
static void test_primary_fua(void)
{
    Primary *p = primary_new(", 'inject-error': [{'event': 'none',"
                             " 'iotype': 'flush'}]");

    start_ok(PRIMARY);
    g_assert_cmpint(try_write(p->guest, 0, 512, 0xa1, BDRV_REQ_FUA), >=, 0);
    memset(p->model, 0xa1, 512);
    status_ok();
    checkpoint_ok();
    g_assert_cmpint(blk_flush(p->guest), >=, 0);
    checkpoint_fails("out of date");
    check_view(p->link, p->model);
    primary_free(p);
}

/* A zero write has to arrive as one: data in its place would meet the fault */
static void test_primary_zeroes_not_data(void)
{
    Primary *p = primary_new(", 'inject-error': [{'event': 'none',"
                             " 'iotype': 'write'}]");

    start_ok(PRIMARY);
    put_zeroes(p->guest, p->model, CLUSTER, 4 * CLUSTER);
    status_ok();
    checkpoint_ok();
    check_view(p->link, p->model);
    primary_free(p);
}

/* What is queued still has to be written, although nobody else writes */
static void test_primary_last_writer_leaves(void)
{
    Primary *p = primary_new("");

    start_ok(PRIMARY);
    hold_write(blk_bs(p->link));
    put(p->guest, p->model, 0, CLUSTER, 0xa1);
    put(p->guest, p->model, 2 * CLUSTER, CLUSTER, 0xa2);
    blk_set_perm(p->guest, 0, BLK_PERM_ALL, &error_abort);
    let_go_later(blk_bs(p->link));
    blk_drain(p->guest);
    checkpoint_ok();
    check_view(p->link, p->model);
    primary_free(p);
}

static void test_primary_stop_missed(const void *opaque)
{
    const Fault *fault = opaque;
    Primary *p = primary_new("");

    start_ok(PRIMARY);
    stop_ok(false);
    g_assert_cmpint(fault->request(p->guest), ==, -EIO);
    check_view(p->link, p->model);
    start_fails(PRIMARY, "out of date");
    primary_free(p);
}

/* The secondary */

typedef struct SecondaryOptions {
    const char *id;
    bool disk_read_only;
    bool disk_unattached;       /* no block backend on the secondary disk */
    /* blkdebug options below each image, each after a comma */
    const char *active_rules, *hidden_rules, *disk_rules;
} SecondaryOptions;

typedef struct Secondary {
    const char *id;
    char *active_path, *hidden_path, *disk_path;
    char *disk_node;
    BlockDriverState *disk_bs;  /* our own reference */
    BlockBackend *disk;         /* the primary's way in */
    BlockBackend *guest;
    uint8_t *disk_model;        /* what the primary has written */
    uint8_t *view;              /* what the secondary guest must see */
} Secondary;

static char *file_json(const char *path, const char *rules)
{
    return g_strdup_printf("{'driver': 'blkdebug', 'image':"
                           " {'driver': 'file', 'filename': '%s'} %s}",
                           path, rules ?: "");
}

static char *overlay_json(const char *node, const char *id, const char *path,
                          const char *rules, const char *backing)
{
    g_autofree char *file = file_json(path, rules);

    return g_strdup_printf("{'driver': 'qcow2', 'node-name': '%s-%s',"
                           " 'file': %s, 'backing': %s}", node, id, file,
                           backing);
}

static void secondary_attach_disk(Secondary *s, uint64_t perm)
{
    s->disk = blk_new(qemu_get_aio_context(), perm, BLK_PERM_ALL);
    blk_insert_bs(s->disk, s->disk_bs, &error_abort);
}

static void secondary_open_disk(Secondary *s, const SecondaryOptions *o)
{
    g_autofree char *file = file_json(s->disk_path, o->disk_rules);
    uint64_t perm = BLK_PERM_CONSISTENT_READ;
    BlockBackend *blk;

    blk = try_open(o->disk_read_only ? 0 : BDRV_O_RDWR, &error_abort,
                   "{'driver': 'raw', 'node-name': '%s', 'file': %s}",
                   s->disk_node, file);
    s->disk_bs = blk_bs(blk);
    bdrv_ref(s->disk_bs);
    blk_unref(blk);

    if (!o->disk_read_only) {
        perm |= BLK_PERM_WRITE;
    }
    if (!o->disk_unattached) {
        secondary_attach_disk(s, perm);
    }
}

static void secondary_open_chain(Secondary *s, const SecondaryOptions *o)
{
    g_autofree char *backing = g_strdup_printf("'%s'", s->disk_node);
    g_autofree char *hidden = overlay_json("hidden", s->id, s->hidden_path,
                                           o->hidden_rules, backing);
    g_autofree char *active = overlay_json("active", s->id, s->active_path,
                                           o->active_rules, hidden);

    s->guest = open_rw("{'driver': 'quorum', 'node-name': 'top-%s',"
                       " 'vote-threshold': 1, 'read-pattern': 'fifo',"
                       " 'children': [{'driver': 'replication',"
                       "  'node-name': 'repl-%s', 'mode': 'secondary',"
                       "  'top-id': 'top-%s', 'file': %s}]}",
                       s->id, s->id, s->id, active);
}

static Secondary *secondary_new_opts(const SecondaryOptions *o)
{
    Secondary *s = g_new0(Secondary, 1);
    const char *id = o->id ?: "s";

    s->id = id;
    s->active_path = g_strdup_printf("%s/active-%s", tmpdir, id);
    s->hidden_path = g_strdup_printf("%s/hidden-%s", tmpdir, id);
    s->disk_path = g_strdup_printf("%s/disk-%s", tmpdir, id);
    s->disk_node = g_strdup_printf("disk-%s", id);
    s->disk_model = new_model();
    s->view = new_model();
    create_raw(s->disk_path);
    create_overlay(s->hidden_path);
    create_overlay(s->active_path);

    secondary_open_disk(s, o);
    secondary_open_chain(s, o);
    return s;
}

static Secondary *secondary_new(void)
{
    return secondary_new_opts(&(SecondaryOptions) {});
}

static void secondary_remove_images(Secondary *s)
{
    unlink(s->active_path);
    unlink(s->hidden_path);
    unlink(s->disk_path);
}

static void secondary_free(Secondary *s)
{
    blk_unref(s->guest);
    blk_unref(s->disk);
    bdrv_unref(s->disk_bs);
    if (bdrv_find_node(s->disk_node)) {
        Error *err = NULL;

        /* A running node may keep what it uses, but no longer than it runs */
        replication_stop_all(false, &err);
        error_free(err);
    }
    g_assert_null(bdrv_find_node(s->disk_node));
    g_assert_null(job_next(NULL));
    secondary_remove_images(s);
    g_free(s->active_path);
    g_free(s->hidden_path);
    g_free(s->disk_path);
    g_free(s->disk_node);
    g_free(s->disk_model);
    g_free(s->view);
    g_free(s);
}

static BlockDriverState *secondary_node(Secondary *s, const char *kind)
{
    g_autofree char *name = g_strdup_printf("%s-%s", kind, s->id);
    BlockDriverState *bs = bdrv_find_node(name);

    g_assert_nonnull(bs);
    return bs;
}

/* The checkpoint makes the guest see what the primary has written */
static void secondary_checkpointed(Secondary *s)
{
    memcpy(s->view, s->disk_model, IMG_SIZE);
}

static void check_secondary_at(Secondary *s, int line)
{
    check_view_at(s->disk, s->disk_model, line);
    check_view_at(s->guest, s->view, line);
}

#define check_secondary(s) check_secondary_at(s, __LINE__)

static bool overlay_is_empty(Secondary *s, const char *kind)
{
    BlockDriverState *bs = secondary_node(s, kind);
    int64_t offset = 0;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    while (offset < IMG_SIZE) {
        int64_t pnum = 0;
        int ret = bdrv_is_allocated(bs, offset, IMG_SIZE - offset, &pnum);

        g_assert_cmpint(ret, >=, 0);
        if (ret) {
            return false;
        }
        g_assert_cmpint(pnum, >, 0);
        offset += pnum;
    }
    return true;
}

/* Both sides write, apart, over each other and at odd offsets */
static void secondary_write_both(Secondary *s, uint8_t byte)
{
    put(s->disk, s->disk_model, 0, CLUSTER, byte);
    put(s->disk, s->disk_model, 3 * CLUSTER + 7, 3, byte + 1);
    put(s->guest, s->view, 3 * CLUSTER + 8, 700, byte + 2);
    put(s->disk, s->disk_model, 3 * CLUSTER, 2048, byte + 3);
    put(s->guest, s->view, 6 * CLUSTER, 2 * CLUSTER + 1, byte + 4);
    put(s->disk, s->disk_model, 7 * CLUSTER + 1, 2 * CLUSTER, byte + 5);
    put_zeroes(s->disk, s->disk_model, 10 * CLUSTER, CLUSTER + 512);
    put_zeroes(s->guest, s->view, 12 * CLUSTER, CLUSTER);
    put(s->disk, s->disk_model, IMG_SIZE - 1000, 1000, byte + 6);
    put(s->guest, s->view, IMG_SIZE - 1, 1, byte + 7);
}

static bool secondary_promoted(Secondary *s)
{
    BlockDriverState *repl = secondary_node(s, "repl");

    GRAPH_RDLOCK_GUARD_MAINLOOP();
    return repl->file->bs == s->disk_bs;
}

static void poll_until_at(bool (*done)(Secondary *s), Secondary *s, int line)
{
    int64_t end = g_get_monotonic_time() + DEADLINE_US;

    while (!done(s)) {
        if (g_get_monotonic_time() > end) {
            g_error("line %d: deadline passed", line);
        }
        if (!aio_poll(qemu_get_aio_context(), false)) {
            /* an iothread may have work: leave it the processor */
            g_usleep(200);
        }
    }
}

static bool secondary_jobs_gone(Secondary *s)
{
    return !job_next(NULL);
}

static void secondary_wait_failover_at(Secondary *s, int line)
{
    poll_until_at(secondary_promoted, s, line);
    poll_until_at(secondary_jobs_gone, s, line);
    /* from here on the disk is the guest's */
    memcpy(s->disk_model, s->view, IMG_SIZE);
}

#define secondary_wait_failover(s) secondary_wait_failover_at(s, __LINE__)

static void test_secondary_stop(void)
{
    Secondary *s = secondary_new();
    g_autofree char *before = graph_text();
    g_autofree char *after = NULL;

    start_ok(SECONDARY);
    secondary_write_both(s, 0x10);
    stop_ok(false);

    after = graph_text();
    g_assert_cmpstr(before, ==, after);
    g_assert_true(overlay_is_empty(s, "active"));
    g_assert_true(overlay_is_empty(s, "hidden"));
    secondary_checkpointed(s);
    check_secondary(s);

    /* I/O goes on, from the file and to it, and the pair can start anew */
    put(s->guest, s->view, 5 * CLUSTER, 512, 0x77);
    check_secondary(s);
    start_ok(SECONDARY);
    secondary_checkpointed(s);
    check_secondary(s);
    secondary_write_both(s, 0x20);
    check_secondary(s);
    checkpoint_ok();
    secondary_checkpointed(s);
    check_secondary(s);
    stop_ok(false);
    secondary_free(s);
}

static void test_secondary_close(const void *opaque)
{
    const char *when = opaque;
    Secondary *s = secondary_new();

    start_ok(SECONDARY);
    secondary_write_both(s, 0x10);
    if (g_str_equal(when, "stopped")) {
        stop_ok(false);
    } else if (g_str_equal(when, "failover")) {
        hold_write(s->disk_bs);
        stop_ok(true);
        let_go_later(s->disk_bs);
    } else if (g_str_equal(when, "promoted")) {
        stop_ok(true);
        secondary_wait_failover(s);
    }
    secondary_free(s);
    /* nobody is left to answer */
    status_ok();
}

/* What start refuses */

static void refuse_start_at(Secondary *s, const char *word, int line)
{
    g_autofree char *before = graph_text();

    for (int i = 0; i < 2; i++) {
        g_autofree char *after = NULL;
        Error *err = NULL;

        replication_start_all(SECONDARY, &err);
        expect_error_at(err, word, line);
        after = graph_text();
        g_assert_cmpstr(before, ==, after);
        g_assert_cmpint(try_read(s->guest), ==, -EIO);
    }
    status_fails("repl-s");
    checkpoint_fails("repl-s");
}

#define refuse_start(s, word) refuse_start_at(s, word, __LINE__)

static void start_works_now(Secondary *s)
{
    start_ok(SECONDARY);
    check_secondary(s);
    secondary_write_both(s, 0x10);
    check_secondary(s);
    checkpoint_ok();
    secondary_checkpointed(s);
    check_secondary(s);
    status_ok();
}

/* Somebody does not let hidden be written */
static void test_refuse_hidden_held(void)
{
    /* a writable disk would already conflict with the holder */
    Secondary *s = secondary_new_opts(&(SecondaryOptions) {
        .disk_read_only = true,
    });
    BlockBackend *holder = blk_new(qemu_get_aio_context(), 0,
                                   BLK_PERM_CONSISTENT_READ);

    blk_insert_bs(holder, secondary_node(s, "hidden"), &error_abort);
    refuse_start(s, "hidden-s");
    blk_unref(holder);
    start_ok(SECONDARY);
    check_secondary(s);
    status_ok();
    secondary_free(s);
}

/*
 * The first write to sector 0 of an image that is being emptied sets its dirty
 * flag.  If that one fails the image is still whole.
 */
#define EMPTYING_FAILS_ONCE ", 'inject-error': [{'event': 'none'," \
                            " 'iotype': 'write', 'sector': 0, 'once': true}]"

static void first_checkpoint_fails(const SecondaryOptions *o)
{
    Secondary *s = secondary_new_opts(o);
    g_autofree char *before = graph_text();
    g_autofree char *after = NULL;

    start_fails(SECONDARY, "-s");
    after = graph_text();
    g_assert_cmpstr(before, ==, after);
    g_assert_cmpint(try_read(s->guest), ==, -EIO);
    status_fails("repl-s");
    start_works_now(s);
    secondary_free(s);
}

static void test_refuse_first_checkpoint(void)
{
    first_checkpoint_fails(&(SecondaryOptions) {
        .active_rules = EMPTYING_FAILS_ONCE,
    });
    first_checkpoint_fails(&(SecondaryOptions) {
        .hidden_rules = EMPTYING_FAILS_ONCE,
    });
}

static uint8_t disk_byte(Secondary *s, int64_t offset)
{
    uint8_t byte;

    g_assert_cmpint(blk_pread(s->disk, offset, 1, &byte, 0), >=, 0);
    return byte;
}

static bool secondary_failover_reported(Secondary *s)
{
    Error *err = NULL;
    bool failed;

    replication_get_error_all(&err);
    failed = err != NULL;
    error_free(err);
    return failed && secondary_jobs_gone(s);
}

/* Whether the node itself may write to the disk, which others do else */
static bool secondary_may_write_disk(Secondary *s)
{
    BlockDriverState *repl = secondary_node(s, "repl");
    BdrvChild *c;

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    QLIST_FOREACH(c, &repl->children, next) {
        if (g_str_equal(c->name, "secondary-disk")) {
            return c->perm & BLK_PERM_WRITE;
        }
    }
    return false;
}

/* The commit meets one bad sector; later the sector is good again */
static void test_secondary_commit_fails(void)
{
    Secondary *s = secondary_new_opts(&(SecondaryOptions) {
        .disk_rules = ", 'inject-error': [{'event': 'none', 'sector': 1664,"
                      " 'iotype': 'write', 'errno': 28, 'once': true}]",
    });

    start_ok(SECONDARY);
    g_assert_false(secondary_may_write_disk(s));
    secondary_write_both(s, 0x10);
    put(s->guest, s->view, 13 * CLUSTER, CLUSTER, 0x51);
    stop_ok(true);
    g_assert_false(secondary_may_write_disk(s));
    poll_until_at(secondary_failover_reported, s, __LINE__);
    g_assert_true(secondary_may_write_disk(s));
    status_fails("repl-s");
    g_assert_false(secondary_promoted(s));

    /* over what active and hidden hold, beside it, and across the edge */
    check_view(s->guest, s->view);
    put(s->guest, s->view, 13 * CLUSTER + 9, 20, 0x52);
    put(s->guest, s->view, 15 * CLUSTER + 500, 50, 0x53);
    put(s->guest, s->view, 8 * CLUSTER + 100, 7 * CLUSTER, 0x54);
    put(s->guest, s->view, 5, 5, 0x55);
    put_zeroes(s->guest, s->view, 2 * CLUSTER + 1, 3 * CLUSTER);
    check_view(s->guest, s->view);
    /* what active or hidden holds goes to active, the rest to the disk */
    g_assert_cmphex(disk_byte(s, 15 * CLUSTER + 500), ==, 0x53);
    g_assert_cmphex(disk_byte(s, 5), !=, 0x55);
    status_fails("repl-s");
    checkpoint_fails("repl-s");
    start_fails(SECONDARY, "repl-s");

    stop_ok(true);
    g_assert_false(secondary_may_write_disk(s));
    secondary_wait_failover(s);
    check_secondary(s);
    status_ok();
    secondary_free(s);
}

static void test_secondary_close_commit_failed(void)
{
    Secondary *s = secondary_new_opts(&(SecondaryOptions) {
        .disk_rules = ", 'inject-error': [{'event': 'none', 'sector': 1664,"
                      " 'iotype': 'write'}]",
    });

    start_ok(SECONDARY);
    put(s->guest, s->view, 13 * CLUSTER, CLUSTER, 0x51);
    for (int i = 0; i < 2; i++) {
        stop_ok(true);
        poll_until_at(secondary_failover_reported, s, __LINE__);
        check_view(s->guest, s->view);
    }
    secondary_free(s);
}

/* Several nodes */

static void test_all_or_nothing(void)
{
    Secondary *a = secondary_new_opts(&(SecondaryOptions) { .id = "a" });
    Secondary *b = secondary_new_opts(&(SecondaryOptions) {
        .id = "b", .disk_unattached = true,
    });
    Secondary *c = secondary_new_opts(&(SecondaryOptions) { .id = "c" });
    Secondary *all[] = { a, b, c };
    g_autofree char *before = graph_text();
    g_autofree char *after = NULL;

    start_fails(SECONDARY, "-b");
    after = graph_text();
    g_assert_cmpstr(before, ==, after);
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        g_assert_cmpint(try_read(all[i]->guest), ==, -EIO);
    }

    secondary_attach_disk(b, BLK_PERM_CONSISTENT_READ | BLK_PERM_WRITE);
    start_ok(SECONDARY);
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        secondary_write_both(all[i], 0x10 + i);
        check_secondary(all[i]);
    }
    checkpoint_ok();
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        secondary_checkpointed(all[i]);
        secondary_write_both(all[i], 0x20 + i);
        check_secondary(all[i]);
    }
    status_ok();

    stop_ok(true);
    for (int i = 0; i < ARRAY_SIZE(all); i++) {
        secondary_wait_failover(all[i]);
        check_secondary(all[i]);
        secondary_free(all[i]);
    }
}

static void add_fault_tests(void)
{
    for (int i = 0; i < ARRAY_SIZE(faults); i++) {
        g_autofree char *early = g_strdup_printf(
            "/replication/primary/fault/before-start/%s", faults[i].name);
        g_autofree char *late = g_strdup_printf(
            "/replication/primary/fault/running/%s", faults[i].name);
        g_autofree char *missed = g_strdup_printf(
            "/replication/primary/stop/missed/%s", faults[i].name);

        g_test_add_data_func(early, &faults[i],
                             test_primary_fault_before_start);
        g_test_add_data_func(late, &faults[i], test_primary_fault_running);
        if (!g_str_equal(faults[i].name, "flush")) {
            g_test_add_data_func(missed, &faults[i],
                                 test_primary_stop_missed);
        }
    }
}

static void add_primary_tests(void)
{
    g_test_add_func("/replication/primary/read", test_primary_read);
    g_test_add_func("/replication/primary/fua", test_primary_fua);
    g_test_add_func("/replication/primary/zeroes-not-data",
                    test_primary_zeroes_not_data);
    g_test_add_func("/replication/primary/last-writer-leaves",
                    test_primary_last_writer_leaves);
    add_fault_tests();
}

static void add_refusal_tests(void)
{
    g_test_add_func("/replication/refuse/hidden-held",
                    test_refuse_hidden_held);
    g_test_add_func("/replication/refuse/first-checkpoint",
                    test_refuse_first_checkpoint);
}

static void add_secondary_tests(void)
{
    static const char *const close_when[] = {
        "running", "stopped", "failover", "promoted",
    };

    g_test_add_func("/replication/secondary/stop", test_secondary_stop);
    g_test_add_func("/replication/secondary/failover/commit-fails",
                    test_secondary_commit_fails);
    for (int i = 0; i < ARRAY_SIZE(close_when); i++) {
        g_autofree char *name = g_strdup_printf(
            "/replication/secondary/close/%s", close_when[i]);

        g_test_add_data_func(name, close_when[i], test_secondary_close);
    }
    g_test_add_func("/replication/secondary/close/commit-failed",
                    test_secondary_close_commit_failed);
}

int main(int argc, char **argv)
{
    int ret;

    qemu_init_main_loop(&error_fatal);
    bdrv_init();
    g_test_init(&argc, &argv, NULL);
    tmpdir = g_dir_make_tmp("test-replication.XXXXXX", NULL);
    g_assert_nonnull(tmpdir);

    add_primary_tests();
    add_secondary_tests();
    add_refusal_tests();
    g_test_add_func("/replication/all-or-nothing", test_all_or_nothing);

    ret = g_test_run();
    rmdir(tmpdir);
    g_free(tmpdir);
    return ret;
}
