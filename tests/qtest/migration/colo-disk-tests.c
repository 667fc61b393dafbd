/*
 * SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Tests of COLO: memory, disks, and a failover of either side
 *
 * The boot block of the migration tests is the guest.  It writes to memory all
 * the time; what is written to the disks and to a marker in memory, on either
 * side, is told by the test.  There is a checkpoint when the test asks for one
 * and at no other time, so that the test knows what is in it.
 */

#include "qemu/osdep.h"
#include "qemu/units.h"
#include "libqtest.h"
#include "libqos/libqos.h"
#include "migration/bootfile.h"
#include "migration/framework.h"
#include "migration/migration-qmp.h"
#include "migration/migration-util.h"

#define DISKS 2
#define BLOCKS 16
#define BLOCK_SIZE (64 * KiB)
#define DISK_SIZE_MB 1
QEMU_BUILD_BUG_ON(BLOCKS * BLOCK_SIZE != DISK_SIZE_MB * MiB);

/* The guest writes to the first byte of each page only. */
#define MARKER (X86_TEST_MEM_START + 3 * MiB + 1024)

/*
 * Both sides have the boot block open at once.  It is booted from, whatever
 * other disks there are.
 */
#define COMMON_ARGS "-nic none -snapshot -global ide-hd.bootindex=0"

/* in ms; no checkpoint of its own comes within a test */
#define NEVER (60 * 60 * 1000)

/* in s; nothing takes as long, even on a busy host */
#define PATIENCE 180

/* Each block is filled with one byte, another for each write and disk. */
typedef uint8_t Contents[DISKS][BLOCKS];

typedef struct Side {
    QTestState *qts;
    bool lost;
    /* of its NBD server, and a number for the next export */
    char *socket;
    unsigned exports;
    unsigned stops, resumes, colo_exits;
} Side;

typedef struct ColoTest ColoTest;
struct ColoTest {
    /* on both sides, besides x-colo */
    const char *capabilities[2];
    /* migrates the memory, if the test does not leave that to colo_start() */
    void (*migrating)(ColoTest *t);
    bool without_disks;
    char *dir;
    Side primary, secondary;
    uint8_t fill;
};

static bool count_event(QTestState *qts, const char *name, QDict *event,
                        void *opaque)
{
    Side *side = opaque;

    if (g_str_equal(name, "STOP")) {
        side->stops++;
    } else if (g_str_equal(name, "RESUME")) {
        side->resumes++;
    } else if (g_str_equal(name, "COLO_EXIT")) {
        side->colo_exits++;
    } else {
        return false;
    }
    return true;
}

static int64_t deadline(void)
{
    return g_get_monotonic_time() + PATIENCE * G_TIME_SPAN_SECOND;
}

/* Take the events that came: they are before the answer. */
static void take_events(Side *side)
{
    if (!side->lost) {
        qtest_qmp_assert_success(side->qts, "{'execute': 'query-name'}");
    }
}

/*
 * Wait until an event has come as often as that, but not longer than both
 * sides live that are not lost.
 */
static void wait_for_count(ColoTest *t, const unsigned *counter,
                           unsigned count)
{
    int64_t end = deadline();

    while (*counter < count) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(5 * 1000);
        take_events(&t->primary);
        take_events(&t->secondary);
    }
}

static void wait_for_jobs(Side *side)
{
    int64_t end = deadline();
    size_t jobs;

    do {
        QDict *answer = qtest_qmp(side->qts,
                                  "{'execute': 'query-block-jobs'}");

        jobs = qlist_size(qdict_get_qlist(answer, "return"));
        qobject_unref(answer);
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(5 * 1000);
    } while (jobs);
}

/* Disks */

static char *image_path(ColoTest *t, const char *name, int disk)
{
    return g_strdup_printf("%s/%s%d", t->dir, name, disk);
}

static void make_images(ColoTest *t)
{
    static const char *raw[] = { "primary", "secondary" };
    static const char *overlays[] = { "hidden", "active" };
    g_autofree char *zeroes = g_malloc0(BLOCKS * BLOCK_SIZE);
    int disk, i;

    for (disk = 0; disk < DISKS; disk++) {
        for (i = 0; i < 2; i++) {
            g_autofree char *path = image_path(t, raw[i], disk);
            g_autofree char *overlay = image_path(t, overlays[i], disk);

            g_assert_true(g_file_set_contents(path, zeroes,
                                              BLOCKS * BLOCK_SIZE, NULL));
            mkqcow2(overlay, DISK_SIZE_MB);
        }
    }
}

static void remove_files(ColoTest *t)
{
    static const char *names[] = {
        "primary.sock", "secondary.sock", "copy", "src_serial", "dest_serial",
        "primary0", "secondary0", "hidden0", "active0",
        "primary1", "secondary1", "hidden1", "active1",
    };
    int i;

    for (i = 0; i < ARRAY_SIZE(names); i++) {
        g_autofree char *path = g_strdup_printf("%s/%s", t->dir, names[i]);

        unlink(path);
    }
    g_free(t->primary.socket);
    g_free(t->secondary.socket);
}

/* A disk of the guest is a quorum, as COLO has it, with this below it. */
static void add_disk_args(GString *args, int disk, const char *child)
{
    g_string_append_printf(args,
        " -blockdev driver=quorum,node-name=top%d,read-pattern=fifo,"
        "vote-threshold=1,children.0=%s%d"
        " -device virtio-blk-pci,id=vd%d,drive=top%d",
        disk, child, disk, disk, disk);
}

static void add_file_args(GString *args, ColoTest *t, const char *driver,
                          const char *node, const char *name, int disk)
{
    g_autofree char *path = image_path(t, name, disk);

    g_string_append_printf(args,
        " -blockdev driver=%s,node-name=%s%d,file.driver=file,"
        "file.filename=%s", driver, node, disk, path);
}

static char *primary_args(ColoTest *t)
{
    GString *args = g_string_new(COMMON_ARGS);
    int disk;

    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        add_file_args(args, t, "raw", "local", "primary", disk);
        add_disk_args(args, disk, "local");
    }
    return g_string_free(args, false);
}

static char *secondary_args(ColoTest *t)
{
    GString *args = g_string_new(COMMON_ARGS);
    int disk;

    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        add_file_args(args, t, "raw", "local", "secondary", disk);
        add_file_args(args, t, "qcow2", "hidden", "hidden", disk);
        g_string_append_printf(args, ",backing=local%d", disk);
        add_file_args(args, t, "qcow2", "active", "active", disk);
        g_string_append_printf(args, ",backing=hidden%d", disk);
        g_string_append_printf(args,
            " -blockdev driver=replication,mode=secondary,node-name=repl%d,"
            "top-id=top%d,file=active%d", disk, disk, disk);
        add_disk_args(args, disk, "repl");
    }
    return g_string_free(args, false);
}

static void start_nbd_server(ColoTest *t, Side *side, const char *name)
{
    side->socket = g_strdup_printf("%s/%s", t->dir, name);
    qtest_qmp_assert_success(side->qts, "{'execute': 'nbd-server-start',"
                             " 'arguments': {'addr': {'type': 'unix',"
                             " 'data': {'path': %s}}}}", side->socket);
}

static void connect_disks(ColoTest *t)
{
    QTestState *from = t->primary.qts, *to = t->secondary.qts;
    const char *socket;
    int disk;

    start_nbd_server(t, &t->primary, "primary.sock");
    start_nbd_server(t, &t->secondary, "secondary.sock");
    socket = t->secondary.socket;
    for (disk = 0; disk < DISKS; disk++) {
        g_autofree char *local = g_strdup_printf("local%d", disk);
        g_autofree char *link = g_strdup_printf("link%d", disk);
        g_autofree char *forward = g_strdup_printf("forward%d", disk);
        g_autofree char *top = g_strdup_printf("top%d", disk);

        qtest_qmp_assert_success(to, "{'execute': 'block-export-add',"
                                 " 'arguments': {'type': 'nbd', 'id': %s,"
                                 " 'node-name': %s, 'name': %s,"
                                 " 'writable': true}}", link, local, link);
        qtest_qmp_assert_success(from, "{'execute': 'blockdev-add',"
                                 " 'arguments': {'driver': 'nbd',"
                                 " 'node-name': %s, 'export': %s, 'server':"
                                 " {'type': 'unix', 'path': %s}}}",
                                 link, link, socket);
        qtest_qmp_assert_success(from, "{'execute': 'blockdev-add',"
                                 " 'arguments': {'driver': 'replication',"
                                 " 'mode': 'primary', 'node-name': %s,"
                                 " 'file': %s}}", forward, link);
        qtest_qmp_assert_success(from, "{'execute': 'x-blockdev-change',"
                                 " 'arguments': {'parent': %s, 'node': %s}}",
                                 top, forward);
    }
}

static void disconnect_disks(ColoTest *t)
{
    int disk;

    for (disk = 0; disk < DISKS; disk++) {
        g_autofree char *forward = g_strdup_printf("forward%d", disk);
        g_autofree char *link = g_strdup_printf("link%d", disk);
        g_autofree char *top = g_strdup_printf("top%d", disk);

        qtest_qmp_assert_success(t->primary.qts,
                                 "{'execute': 'x-blockdev-change',"
                                 " 'arguments': {'parent': %s,"
                                 " 'child': 'children.1'}}", top);
        qtest_qmp_assert_success(t->primary.qts, "{'execute': 'blockdev-del',"
                                 " 'arguments': {'node-name': %s}}", forward);
        qtest_qmp_assert_success(t->primary.qts, "{'execute': 'blockdev-del',"
                                 " 'arguments': {'node-name': %s}}", link);
    }
}

/*
 * Do what the guest's disk would do with these blocks.  The command does not
 * tell whether it was done: the contents do.
 */
static void qemu_io(Side *side, int disk, const char *command, int first,
                    int last)
{
    g_free(qtest_hmp(side->qts, "qemu-io -d /machine/peripheral/vd%d/"
                     "virtio-backend \"%s %" PRId64 " %" PRId64 "\"", disk,
                     command, first * BLOCK_SIZE,
                     (last - first + 1) * BLOCK_SIZE));
}

static void disk_write(ColoTest *t, Side *side, Contents contents,
                       int first, int last)
{
    int disk;

    if (t->without_disks) {
        return;
    }
    t->fill++;
    for (disk = 0; disk < DISKS; disk++) {
        uint8_t fill = t->fill * DISKS + disk;
        g_autofree char *command = g_strdup_printf("write -P 0x%x", fill);

        qemu_io(side, disk, command, first, last);
        memset(&contents[disk][first], fill, last - first + 1);
    }
}

static void disk_zero(ColoTest *t, Side *side, Contents contents, int block)
{
    int disk;

    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        qemu_io(side, disk, "write -z", block, block);
        contents[disk][block] = 0;
    }
}

static void check_image(const char *path, const uint8_t *contents)
{
    g_autofree char *image = NULL;
    gsize size;
    int block, i;

    g_assert_true(g_file_get_contents(path, &image, &size, NULL));
    g_assert_cmpuint(size, ==, BLOCKS * BLOCK_SIZE);
    for (block = 0; block < BLOCKS; block++) {
        for (i = 0; i < BLOCK_SIZE; i++) {
            uint8_t byte = image[block * BLOCK_SIZE + i];

            if (byte != contents[block]) {
                g_test_message("%s: byte %d of block %d", path, i, block);
                g_assert_cmphex(byte, ==, contents[block]);
            }
        }
    }
}

/* The disks, as the guest sees them now */
static void check_disks(ColoTest *t, Side *side, Contents contents)
{
    int disk;

    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        g_autofree char *top = g_strdup_printf("top%d", disk);
        g_autofree char *view = g_strdup_printf("view%u", side->exports++);
        g_autofree char *url = g_strdup_printf("nbd+unix:///%s?socket=%s",
                                               view, side->socket);
        g_autofree char *copy = g_strdup_printf("%s/copy", t->dir);
        const char *argv[] = {
            getenv("QTEST_QEMU_IMG"), "convert", "-f", "raw", "-O", "raw",
            url, copy, NULL
        };
        int status;

        qtest_qmp_assert_success(side->qts, "{'execute': 'block-export-add',"
                                 " 'arguments': {'type': 'nbd', 'id': %s,"
                                 " 'node-name': %s, 'name': %s}}",
                                 view, top, view);
        g_assert_true(g_spawn_sync(NULL, (char **)argv, NULL,
                                   G_SPAWN_DEFAULT, NULL, NULL, NULL, NULL,
                                   &status, NULL));
        g_assert_cmpint(status, ==, 0);
        qtest_qmp_assert_success(side->qts, "{'execute': 'block-export-del',"
                                 " 'arguments': {'id': %s, 'mode': 'hard'}}",
                                 view);
        check_image(copy, contents[disk]);
    }
}

/* The image files, of a QEMU that has ended */
static void check_images(ColoTest *t, const char *name, Contents contents)
{
    int disk;

    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        g_autofree char *path = image_path(t, name, disk);

        check_image(path, contents[disk]);
    }
}

/* COLO */

/* the states from which COLO does not come any more */
static const char *not_colo[] = { "failed", "cancelled", "completed", NULL };

static void set_capability(ColoTest *t, const char *capability)
{
    migrate_set_capability(t->primary.qts, capability, true);
    migrate_set_capability(t->secondary.qts, capability, true);
}

static bool colo_start(ColoTest *t)
{
    g_autofree char *opts_source = NULL;
    g_autofree char *opts_target = NULL;
    /* COLO reports errors when its connection is cut, as it is here */
    MigrateStart args = { .hide_stderr = true, .oob = true };
    Side *primary = &t->primary, *secondary = &t->secondary;
    unsigned resumes;
    int i;

    t->dir = migration_get_env()->tmpfs;
    if (!t->without_disks) {
        if (!have_qemu_img()) {
            g_test_skip("QTEST_QEMU_IMG not set or qemu-img missing");
            return false;
        }
        make_images(t);
    }
    args.opts_source = opts_source = primary_args(t);
    args.opts_target = opts_target = secondary_args(t);
    if (migrate_start(&primary->qts, &secondary->qts, "defer", &args)) {
        return false;
    }
    qtest_qmp_set_event_callback(primary->qts, count_event, primary);
    qtest_qmp_set_event_callback(secondary->qts, count_event, secondary);

    if (!t->without_disks) {
        connect_disks(t);
    }
    set_capability(t, "x-colo");
    for (i = 0; i < ARRAY_SIZE(t->capabilities) && t->capabilities[i]; i++) {
        set_capability(t, t->capabilities[i]);
    }
    migrate_set_parameter_int(primary->qts, "x-checkpoint-delay", NEVER);
    wait_for_serial("src_serial");

    migrate_incoming_qmp(secondary->qts, "tcp:127.0.0.1:0", NULL, "{}");
    resumes = primary->resumes;
    if (t->migrating) {
        t->migrating(t);
    } else {
        migrate_ensure_converge(primary->qts);
        migrate_qmp(primary->qts, secondary->qts, NULL, NULL, "{}");
    }
    wait_for_migration_status(primary->qts, "colo", not_colo);
    wait_for_count(t, &primary->resumes, resumes + 1);
    wait_for_count(t, &secondary->resumes, 1);
    return true;
}

static void request_checkpoint(ColoTest *t)
{
    /* setting it asks for a checkpoint at once */
    qtest_qmp_assert_success(t->primary.qts,
                             "{'execute': 'migrate-set-parameters',"
                             " 'arguments': {'x-checkpoint-delay': %d}}",
                             NEVER);
}

static void checkpoint(ColoTest *t)
{
    unsigned resumes = t->primary.resumes;

    request_checkpoint(t);
    wait_for_count(t, &t->primary.resumes, resumes + 1);
    g_assert_cmpuint(t->primary.colo_exits, ==, 0);
    g_assert_cmpuint(t->secondary.colo_exits, ==, 0);
}

static void yank(Side *side, const char *type, const char *node)
{
    QDict *instance = qdict_new();
    QList *instances = qlist_new();

    qdict_put_str(instance, "type", type);
    if (node) {
        qdict_put_str(instance, "node-name", node);
    }
    qlist_append(instances, instance);
    qtest_qmp_assert_success(side->qts, "{'exec-oob': 'yank', 'id': 'yank',"
                             " 'arguments': {'instances': %p}}", instances);
}

static void cut_connections(ColoTest *t, Side *side)
{
    int disk;

    yank(side, "migration", NULL);
    for (disk = 0; disk < DISKS && !t->without_disks; disk++) {
        if (side == &t->primary) {
            g_autofree char *link = g_strdup_printf("link%d", disk);

            yank(side, "block-node", link);
        }
    }
}

/*
 * What a manager does when the other side does not answer.  The monitor may
 * wait for it, too, until the connections are cut.
 */
static void failover(ColoTest *t, Side *side)
{
    unsigned resumes = side->resumes;

    cut_connections(t, side);
    qtest_qmp_assert_success(side->qts,
                             "{'execute': 'x-colo-lost-heartbeat'}");
    wait_for_count(t, &side->colo_exits, 1);
    wait_for_count(t, &side->resumes, resumes + 1);
    if (side == &t->primary && !t->without_disks) {
        disconnect_disks(t);
    }
}

static void check_guest_runs(Side *side)
{
    int64_t end = deadline();
    uint8_t before = qtest_readb(side->qts, X86_TEST_MEM_START);

    while (qtest_readb(side->qts, X86_TEST_MEM_START) == before) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(5 * 1000);
    }
}

static void colo_end(ColoTest *t, Side *survivor, Side *lost,
                     Contents contents)
{
    const char *name = survivor == &t->primary ? "primary" : "secondary";

    check_disks(t, survivor, contents);
    check_guest_runs(survivor);
    /* a promoted secondary writes to its disk what it had in its overlays */
    wait_for_jobs(survivor);
    qtest_qmp_assert_success(survivor->qts, "{'execute': 'stop'}");
    check_guests_ram(survivor->qts);

    qtest_quit(survivor->qts);
    /* only to end it */
    g_assert_cmpint(kill(qtest_pid(lost->qts), SIGCONT), ==, 0);
    qtest_quit(lost->qts);
    check_images(t, name, contents);
    remove_files(t);
}

/* The host of a side is not there any more: it neither answers nor closes. */
static void lose(Side *side)
{
    g_assert_cmpint(kill(qtest_pid(side->qts), SIGSTOP), ==, 0);
    side->lost = true;
}

/*
 * Both sides have written since the checkpoint, and over each other.  What is
 * on the disks at the checkpoint is in contents, with the marker 1.
 */
static void begin(ColoTest *t, Contents contents)
{
    Contents own;

    qtest_writeb(t->primary.qts, MARKER, 1);
    disk_write(t, &t->primary, contents, 0, 5);
    disk_write(t, &t->secondary, own, 3, 8);
    checkpoint(t);
    check_disks(t, &t->primary, contents);
    check_disks(t, &t->secondary, contents);
    g_assert_cmphex(qtest_readb(t->secondary.qts, MARKER), ==, 1);
}

static void test_secondary(ColoTest *t, bool in_checkpoint)
{
    Contents contents = { }, own, next;

    if (!colo_start(t)) {
        return;
    }
    begin(t, contents);
    memcpy(next, contents, sizeof(next));
    memcpy(own, contents, sizeof(own));

    qtest_writeb(t->primary.qts, MARKER, 2);
    disk_write(t, &t->primary, next, 2, 7);
    disk_zero(t, &t->primary, next, 1);
    disk_write(t, &t->secondary, own, 6, 10);
    disk_zero(t, &t->secondary, own, 3);
    if (in_checkpoint) {
        unsigned stops = t->primary.stops;

        request_checkpoint(t);
        wait_for_count(t, &t->primary.stops, stops + 1);
    }
    lose(&t->primary);
    failover(t, &t->secondary);

    /* it may have had the whole checkpoint, but not a part of it */
    if (qtest_readb(t->secondary.qts, MARKER) == 2) {
        g_assert_true(in_checkpoint);
        memcpy(own, next, sizeof(own));
    }
    disk_write(t, &t->secondary, own, 11, 12);
    colo_end(t, &t->secondary, &t->primary, own);
}

static void test_primary(ColoTest *t, bool in_checkpoint)
{
    Contents contents = { }, own;

    if (!colo_start(t)) {
        return;
    }
    begin(t, contents);

    qtest_writeb(t->primary.qts, MARKER, 2);
    disk_write(t, &t->primary, contents, 2, 7);
    disk_zero(t, &t->primary, contents, 1);
    disk_write(t, &t->secondary, own, 6, 10);
    if (in_checkpoint) {
        unsigned stops = t->primary.stops;

        request_checkpoint(t);
        wait_for_count(t, &t->primary.stops, stops + 1);
    }
    lose(&t->secondary);
    failover(t, &t->primary);

    g_assert_cmphex(qtest_readb(t->primary.qts, MARKER), ==, 2);
    disk_write(t, &t->primary, contents, 11, 12);
    colo_end(t, &t->primary, &t->secondary, contents);
}

static void test_disk_secondary_idle(void)
{
    test_secondary(&(ColoTest) { }, false);
}

static void test_disk_secondary_checkpoint(void)
{
    test_secondary(&(ColoTest) { }, true);
}

static void test_disk_primary_idle(void)
{
    test_primary(&(ColoTest) { }, false);
}

static void test_disk_primary_checkpoint(void)
{
    test_primary(&(ColoTest) { }, true);
}

static void test_return_path(void)
{
    test_secondary(&(ColoTest) { .without_disks = true,
                                 .capabilities = { "return-path" } }, false);
}

/*
 * Let a byte change in the last stage of the migration, when the VM stands
 * still, in a page that has been sent often enough to be in XBZRLE's cache.
 */
static void migrate_and_change(ColoTest *t)
{
    QTestState *from = t->primary.qts;
    int64_t end = deadline();

    qtest_writeb(from, MARKER, 1);
    migrate_set_parameter_int(from, "xbzrle-cache-size", 256 * MiB);
    migrate_set_parameter_int(from, "max-bandwidth", 1 * GiB);
    migrate_set_parameter_int(from, "downtime-limit", 1);
    migrate_qmp(from, t->secondary.qts, NULL, NULL, "{}");
    while (get_migration_pass(from) < 3) {
        g_assert_cmpint(g_get_monotonic_time(), <, end);
        g_usleep(5 * 1000);
    }
    migrate_ensure_converge(from);
    wait_for_migration_status(from, "pre-switchover", not_colo);
    qtest_writeb(from, MARKER, 2);
    migrate_continue(from, "pre-switchover");
}

/* What the secondary has is what the primary's cache says that it has. */
static void test_xbzrle(void)
{
    ColoTest t = {
        .without_disks = true,
        .capabilities = { "xbzrle", "pause-before-switchover" },
        .migrating = migrate_and_change,
    };
    Contents nothing;

    if (!colo_start(&t)) {
        return;
    }
    g_assert_cmphex(qtest_readb(t.secondary.qts, MARKER), ==, 2);
    qtest_writeb(t.primary.qts, MARKER, 1);
    checkpoint(&t);
    g_assert_cmphex(qtest_readb(t.secondary.qts, MARKER), ==, 1);

    lose(&t.primary);
    failover(&t, &t.secondary);
    colo_end(&t, &t.secondary, &t.primary, nothing);
}

void migration_test_add_colo_disk(MigrationTestEnv *env)
{
#ifdef CONFIG_REPLICATION
    if (!env->is_x86) {
        return;
    }
    migration_test_add("/migration/colo/return-path", test_return_path);
    migration_test_add("/migration/colo/xbzrle", test_xbzrle);
    migration_test_add("/migration/colo/disk-secondary-idle",
                       test_disk_secondary_idle);
    migration_test_add("/migration/colo/disk-secondary-checkpoint",
                       test_disk_secondary_checkpoint);
    migration_test_add("/migration/colo/disk-primary-idle",
                       test_disk_primary_idle);
    migration_test_add("/migration/colo/disk-primary-checkpoint",
                       test_disk_primary_checkpoint);
#endif
}
