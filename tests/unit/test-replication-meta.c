/*
 * Test of the records in the metadata of block replication, and of the rules
 * that say from two sides' records what has to be copied
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/units.h"
#include "../../block/replication-meta.h"

/* Generation 'a', and so on; '-' is none */
static QemuUUID gen(char c)
{
    QemuUUID uuid = {};

    if (c != '-') {
        memset(uuid.data, c, sizeof(uuid.data));
    }

    return uuid;
}

static void test_own_record(void)
{
    uint8_t buf[REPLICATION_META_RECORD];
    ReplicationOwnRecord back, own = {
        .sequence   = 0x0102030405060708ULL,
        .size       = 5 * TiB + 512,
        .disk_id    = gen('d'),
        .current    = gen('c'),
        .base       = gen('b'),
        .role       = REPLICATION_META_ROLE_SECONDARY,
        .state      = REPLICATION_META_STATE_MERGING,
        .log_void   = true,
        .absorbed   = 77,
        .instance   = gen('i'),
        .active     = "/tmp/active",
        .hidden     = "/tmp/hidden",
    };

    for (int i = 0; i < REPLICATION_META_HISTORY; i++) {
        own.history[i] = gen('0' + i);
    }
    replication_own_record_encode(&own, buf);
    g_assert_cmpint(replication_own_record_decode(&back, buf), ==,
                    REPLICATION_RECORD_VALID);
    g_assert_cmpmem(&own, sizeof(own), &back, sizeof(back));
    g_assert_cmpint(replication_peer_record_decode(
                        &(ReplicationPeerRecord) {}, buf), ==,
                    REPLICATION_RECORD_CORRUPT);
}

static void test_peer_record(void)
{
    uint8_t buf[REPLICATION_META_RECORD];
    ReplicationPeerRecord back, peer = {
        .sequence   = 9,
        .kind       = REPLICATION_PEER_SYNC,
        .full       = true,
        .log_void   = true,
        .size       = 4096,
        .disk_id    = gen('d'),
        .generation = gen('g'),
        .instance   = gen('i'),
    };

    replication_peer_record_encode(&peer, buf);
    g_assert_cmpint(replication_peer_record_decode(&back, buf), ==,
                    REPLICATION_RECORD_VALID);
    g_assert_cmpmem(&peer, sizeof(peer), &back, sizeof(back));
}

/* Not one bit may change unseen; and nothing at all is no record */
static void test_damage(void)
{
    uint8_t buf[REPLICATION_META_RECORD];
    ReplicationOwnRecord own = { .sequence = 1, .current = gen('c') };

    replication_own_record_encode(&own, buf);
    for (int i = 0; i < sizeof(buf); i++) {
        buf[i] ^= 1 << i % 8;
        g_assert_cmpint(replication_own_record_decode(&own, buf), ==,
                        REPLICATION_RECORD_CORRUPT);
        buf[i] ^= 1 << i % 8;
    }
    memset(buf, 0, sizeof(buf));
    g_assert_cmpint(replication_own_record_decode(&own, buf), ==,
                    REPLICATION_RECORD_FRESH);
}

static void test_rotate(void)
{
    ReplicationOwnRecord own = { .base = gen('b') };
    QemuUUID base = gen('b');

    replication_own_record_rotate(&own);
    g_assert(qemu_uuid_is_null(&own.history[0]));
    for (int i = 0; i < 2 * REPLICATION_META_HISTORY; i++) {
        ReplicationOwnRecord old = own;

        replication_own_record_rotate(&own);
        g_assert(!qemu_uuid_is_equal(&own.current, &old.current));
        g_assert(qemu_uuid_is_equal(&own.history[0], &old.current));
        g_assert_cmpmem(&own.history[1], 7 * sizeof(QemuUUID), &old.history[0],
                        7 * sizeof(QemuUUID));
    }
    g_assert(qemu_uuid_is_equal(&own.base, &base));
}

/*
 * The node has generation 'c', counts from 'b', and was 'h'.  A rule's peer is
 * three letters: its generation, its base, the disk's ID, which should be 'd';
 * or "" if its own record is fresh.  Then who has announced what generation.
 */
typedef struct Rule {
    const char *what;
    const char *own;
    char sync, started;
    bool merging, own_void, peer_void, has_log, other_size, absorbed, primary;
    ReplicationRecordStatus own_status, peer_status;

    /* In each case: quick, full, or - if refused; of auto, discard, full */
    const char *verdict;
    const char *error;
    /* Whether the peer's log counts */
    bool no_log;
} Rule;

#define VALID   REPLICATION_RECORD_VALID
#define CORRUPT REPLICATION_RECORD_CORRUPT
#define UNKNOWN REPLICATION_RECORD_UNKNOWN

static const Rule rules[] = {
    { "fresh", "", .verdict = "fff" },
    { "secondary that had nothing", "---", .verdict = "fff" },

    { "in step with us", "---", .sync = 'c', .verdict = "qqf" },
    { "in step with our base", "---", .sync = 'b', .verdict = "qqf" },
    { "in step, fresh", "", .sync = 'c', .verdict = "qqf" },
    { "in step, once ours", "bbd", .sync = 'c', .has_log = true,
      .verdict = "qqf" },
    { "in step with what was", "bbd", .sync = 'h', .verdict = "fff" },
    { "in step with others", "bbd", .sync = 'x', .verdict = "--f",
      .error = "nothing is known" },

    { "our base", "bad", .verdict = "qqf" },
    { "our generation", "cad", .verdict = "qqf" },
    { "started", "bad", .started = 'c', .verdict = "qqf", .no_log = true },
    { "started, our base", "xyd", .started = 'b', .verdict = "qqf",
      .no_log = true },
    { "started, a void log", "xyd", .started = 'b', .peer_void = true,
      .verdict = "qqf", .no_log = true },
    { "started and absorbed", "bad", .started = 'x', .absorbed = true,
      .verdict = "qqf" },
    { "a primary's", "bad", .started = 'x', .primary = true, .verdict = "---",
      .error = "in use by a primary" },

    { "newer", "xcd", .verdict = "-q-", .error = "stale" },
    { "diverged", "xbd", .has_log = true, .verdict = "-q-",
      .error = "both have changed" },
    { "diverged, void", "xbd", .peer_void = true, .verdict = "-f-",
      .error = "both have changed" },
    { "took over, wrote nothing", "xbd", .verdict = "qqf" },
    { "no base is no common base", "x-d", .verdict = "--f",
      .error = "nothing is known" },

    { "stale", "had", .verdict = "fff" },
    { "stale, started", "bad", .started = 'h', .verdict = "fff",
      .no_log = true },
    { "half merged", "xbd", .merging = true, .verdict = "-f-",
      .error = "half in the overlays 'A' and 'H'" },
    { "a void log there", "bad", .peer_void = true, .verdict = "fff" },
    { "a void log here", "bad", .own_void = true, .verdict = "fff" },

    { "another disk", "bae", .verdict = "--f", .error = "another disk" },
    { "no disk", "ba-", .verdict = "--f", .error = "another disk" },
    { "another size", "bad", .other_size = true, .verdict = "--f",
      .error = "of a disk of 8192 bytes" },
    { "unknown", "xyd", .verdict = "--f", .error = "nothing is known" },
    { "damaged", "", .own_status = CORRUPT, .verdict = "--f",
      .error = "damaged" },
    { "damaged announcement", "bad", .peer_status = CORRUPT, .verdict = "--f",
      .error = "damaged" },
    { "newer version", "", .own_status = UNKNOWN, .verdict = "---",
      .error = "newer version" },
    { "newer announcement", "bad", .peer_status = UNKNOWN, .verdict = "---",
      .error = "newer version" },
};

static ReplicationRecords rule_records(const Rule *rule)
{
    int64_t size = rule->other_size ? 8192 : 4096;
    ReplicationRecords r = {
        .own_status     = rule->own_status,
        .peer_status    = rule->peer_status,
        .peer = {
            .sequence   = 5,
            .size       = size,
            .disk_id    = gen('d'),
            .generation = gen(rule->sync ?: rule->started ?: '-'),
        },
    };

    if (*rule->own) {
        r.own_status = VALID;
        r.own = (ReplicationOwnRecord) {
            .sequence   = 3,
            .size       = size,
            .current    = gen(rule->own[0]),
            .base       = gen(rule->own[1]),
            .disk_id    = gen(rule->own[2]),
            .role       = rule->primary ? REPLICATION_META_ROLE_PRIMARY :
                                          REPLICATION_META_ROLE_SECONDARY,
            .state      = rule->merging ? REPLICATION_META_STATE_MERGING :
                                          REPLICATION_META_STATE_OK,
            .log_void   = rule->peer_void,
            .absorbed   = rule->absorbed ? 5 : 4,
            .active     = "A",
            .hidden     = "H",
        };
    }
    if (rule->sync || rule->started) {
        r.peer_status = VALID;
        r.peer.kind = rule->sync ? REPLICATION_PEER_SYNC :
                                   REPLICATION_PEER_STARTED;
    }

    return r;
}

static void check_error(const Rule *rule, const ReplicationRecords *r,
                        Error *err)
{
    const char *text = error_get_pretty(err);
    char generation[UUID_STR_LEN];
    QemuUUID current = gen('c');

    g_assert(rule->error);
    g_assert(strstr(text, rule->error));
    g_assert(strstr(text, "'top'") && strstr(text, "'peer'"));
    if (strstr(rule->error, "damaged") || strstr(rule->error, "version")) {
        return;
    }
    qemu_uuid_unparse(&current, generation);
    g_assert(strstr(text, generation));
    qemu_uuid_unparse(replication_records_has_peer(r) ? &r->peer.generation :
                      &r->own.current, generation);
    g_assert(strstr(text, generation));
}

static void check_rule(const Rule *rule, int i, char verdict)
{
    ReplicationRecords r = rule_records(rule);
    ReplicationOwnRecord own = {
        .sequence   = 1,
        .size       = 4096,
        .disk_id    = gen('d'),
        .current    = gen('c'),
        .base       = gen('b'),
        .history    = { gen('g'), gen('h') },
        .role       = REPLICATION_META_ROLE_PRIMARY,
        .log_void   = rule->own_void,
    };
    ReplicationQuestion q = {
        .name           = "top",
        .peer_name      = "peer",
        .own            = &own,
        .peer           = &r,
        .peer_log_empty = !rule->has_log,
        .discard_peer   = i == 1,
        .full           = i == 2,
    };
    ReplicationRuling ruling;
    Error *err = NULL;

    g_test_message("%s, case %d", rule->what, i);
    if (!replication_meta_judge(&q, &ruling, &err)) {
        g_assert_cmpint(verdict, ==, '-');
        check_error(rule, &r, err);
        error_free(err);
        return;
    }
    g_assert(!err);
    g_assert_cmpint(verdict, ==, ruling.full ? 'f' : 'q');
    g_assert(ruling.full == !!ruling.reason);
    if (!ruling.full) {
        g_assert(ruling.merge_log == !rule->no_log);
    }
}

static void test_rules(void)
{
    for (int i = 0; i < ARRAY_SIZE(rules); i++) {
        for (int j = 0; j < 3; j++) {
            check_rule(&rules[i], j, rules[i].verdict[j]);
        }
    }
}

/* Without a base of its own, a node shares none with others */
static void test_no_base(void)
{
    ReplicationOwnRecord own = { .disk_id = gen('d'), .current = gen('c') };
    ReplicationRecords r = {
        .own_status = VALID,
        .own = { .disk_id = gen('d'), .current = gen('x') },
    };
    ReplicationQuestion q = { .name = "top", .peer_name = "peer", .own = &own,
                              .peer = &r, .peer_log_empty = true };
    ReplicationRuling ruling;
    Error *err = NULL;

    g_assert(!replication_meta_judge(&q, &ruling, &err));
    error_free(err);
}

static void test_open(void)
{
    ReplicationRecords r = {
        .peer_status    = VALID,
        .peer           = { .kind = REPLICATION_PEER_STARTED, .sequence = 7 },
    };
    ReplicationOwnRecord own;

    /* A secondary that has nothing, and what its primary says counts */
    own = replication_records_open(&r, REPLICATION_META_ROLE_SECONDARY, 512);
    g_assert(qemu_uuid_is_null(&own.current));
    g_assert(qemu_uuid_is_null(&own.disk_id));
    g_assert(!qemu_uuid_is_null(&own.instance));
    g_assert_cmpint(own.absorbed, ==, 0);
    g_assert_cmpint(own.size, ==, 512);

    /* A primary that has nothing */
    r = (ReplicationRecords) {};
    own = replication_records_open(&r, REPLICATION_META_ROLE_PRIMARY, 512);
    g_assert(!qemu_uuid_is_null(&own.current));
    g_assert(!qemu_uuid_is_null(&own.disk_id));
    g_assert(qemu_uuid_is_null(&own.base));
    g_assert(!own.log_void);

    /* It was a primary, for whom announcements are of no meaning */
    r.own_status = VALID;
    r.own = own;
    r.peer.sequence = 8;
    own = replication_records_open(&r, REPLICATION_META_ROLE_SECONDARY, 1024);
    g_assert(qemu_uuid_is_equal(&own.current, &r.own.current));
    g_assert_cmpint(own.absorbed, ==, 8);
    g_assert(own.log_void);
}

static void check_usable(const ReplicationRecords *r, const char *error)
{
    Error *err = NULL;

    if (replication_records_check_usable(r, "top", &err)) {
        g_assert(!error && !err);
        return;
    }
    g_assert(error && strstr(error_get_pretty(err), error));
    g_assert(strstr(error_get_pretty(err), "'top'"));
    error_free(err);
}

static void test_usable(void)
{
    ReplicationRecords r = {};

    check_usable(&r, NULL);
    r.own_status = CORRUPT;
    check_usable(&r, "damaged");
    r.own_status = UNKNOWN;
    check_usable(&r, "newer version");

    r.own_status = VALID;
    r.own.role = REPLICATION_META_ROLE_SECONDARY;
    check_usable(&r, NULL);
    r.peer_status = VALID;
    r.peer = (ReplicationPeerRecord) {
        .sequence = 4, .kind = REPLICATION_PEER_SYNC, .generation = gen('a'),
    };
    check_usable(&r, "in step with generation 61616161-6161-6161-6161-");
    r.peer.kind = REPLICATION_PEER_STARTED;
    check_usable(&r, "last checkpoint of generation 61616161-6161-6161-6161-");
    r.own.absorbed = 4;
    check_usable(&r, NULL);
    r.own.absorbed = 3;
    r.own.role = REPLICATION_META_ROLE_PRIMARY;
    check_usable(&r, NULL);

    r.own.state = REPLICATION_META_STATE_MERGING;
    strcpy(r.own.active, "/x/active");
    check_usable(&r, "'/x/active'");
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/replication-meta/own-record", test_own_record);
    g_test_add_func("/replication-meta/peer-record", test_peer_record);
    g_test_add_func("/replication-meta/damage", test_damage);
    g_test_add_func("/replication-meta/rotate", test_rotate);
    g_test_add_func("/replication-meta/rules", test_rules);
    g_test_add_func("/replication-meta/no-base", test_no_base);
    g_test_add_func("/replication-meta/open", test_open);
    g_test_add_func("/replication-meta/usable", test_usable);

    return g_test_run();
}
