/*
 * Test of what block replication knows of changes: against a model that has a
 * byte for each block
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "../../block/replication-changes.h"

#define BLOCK REPLICATION_BLOCK
#define NB_BLOCKS 300
/* The last block is not whole */
#define SIZE ((int64_t)NB_BLOCKS * BLOCK - 512)

typedef struct Model {
    bool current[NB_BLOCKS];
    bool closing[NB_BLOCKS];
    bool lacking[NB_BLOCKS];
    /* What replication_changes_settle() returned, unless it is over */
    uint64_t settling;
} Model;

static void mark(bool *set, int64_t offset, int64_t bytes, bool value)
{
    for (int64_t i = offset / BLOCK; i * BLOCK < offset + bytes; i++) {
        set[i] = value;
    }
}

static int64_t count(const bool *a, const bool *b)
{
    int64_t bytes = 0;

    for (int i = 0; i < NB_BLOCKS; i++) {
        bytes += a[i] || (b && b[i]) ? BLOCK : 0;
    }

    return MIN(bytes, SIZE);
}

static void check(ReplicationChanges *changes, const Model *model)
{
    int64_t offset, n;

    g_assert_cmpint(replication_changes_lacking_bytes(changes), ==,
                    count(model->lacking, NULL));
    g_assert_cmpint(replication_changes_changed_bytes(changes), ==,
                    count(model->current, model->closing));
    for (offset = 0; offset < SIZE; offset += n) {
        bool lacking = replication_changes_is_lacking(changes, offset,
                                                      SIZE - offset, &n);

        g_assert_cmpint(n, >, 0);
        for (int64_t at = offset; at < offset + n; at += BLOCK) {
            g_assert(model->lacking[at / BLOCK] == lacking);
        }
    }
}

static void step(ReplicationChanges *changes, Model *model, GRand *rng)
{
    int64_t offset = g_rand_double_range(rng, 0, SIZE - 1);
    int64_t bytes = MIN(1 + g_rand_int_range(rng, 0, 5 * BLOCK), SIZE - offset);
    bool flushed = g_rand_boolean(rng);

    switch (g_rand_int_range(rng, 0, 11)) {
    case 0:
        replication_changes_lack_changed(changes);
        for (int i = 0; i < NB_BLOCKS; i++) {
            model->lacking[i] = model->current[i] || model->closing[i];
        }
        break;
    case 1:
        replication_changes_lack_nothing(changes);
        mark(model->lacking, 0, SIZE, false);
        break;
    case 2:
        replication_changes_checkpoint(changes, flushed);
        model->settling = 0;
        for (int i = 0; i < NB_BLOCKS; i++) {
            model->closing[i] = model->current[i] ||
                                (!flushed && model->closing[i]);
            model->current[i] = false;
        }
        break;
    case 3:
        replication_changes_tidy(changes);
        break;
    case 9:
        model->settling = replication_changes_settle(changes);
        for (int i = 0; i < NB_BLOCKS; i++) {
            model->closing[i] |= model->current[i];
            model->current[i] = model->lacking[i];
        }
        break;
    case 10:
        replication_changes_settled(changes, model->settling);
        if (model->settling) {
            mark(model->closing, 0, SIZE, false);
        }
        break;
    case 4:
        replication_changes_lack(changes, offset, bytes);
        mark(model->lacking, offset, bytes, true);
        mark(model->current, offset, bytes, true);
        break;
    case 5:
        if (replication_changes_find_lacking(changes, 4 * BLOCK, &offset,
                                             &bytes)) {
            g_assert_cmpint(bytes, <=, 4 * BLOCK);
            for (int64_t at = offset; at < offset + bytes; at += BLOCK) {
                g_assert(model->lacking[at / BLOCK]);
            }
            replication_changes_supply(changes, offset, bytes);
            mark(model->lacking, offset, bytes, false);
        } else {
            g_assert_cmpint(count(model->lacking, NULL), ==, 0);
        }
        break;
    default:
        replication_changes_note(changes, offset, bytes);
        mark(model->current, offset, bytes, true);
        break;
    }
}

static void test_random(void)
{
    g_autoptr(GRand) rng = g_rand_new_with_seed(1);
    ReplicationChanges *changes = replication_changes_new(SIZE);
    Model model = {};

    check(changes, &model);
    for (int i = 0; i < 20000; i++) {
        step(changes, &model, rng);
        check(changes, &model);
    }
    replication_changes_free(changes);
}

/* What is found goes all around, and gets no block twice */
static void test_all(void)
{
    ReplicationChanges *changes = replication_changes_new(SIZE);
    int64_t offset, bytes, sum = 0;

    replication_changes_lack_all(changes);
    g_assert_cmpint(replication_changes_lacking_bytes(changes), ==, SIZE);
    while (replication_changes_find_lacking(changes, 7 * BLOCK, &offset,
                                            &bytes)) {
        replication_changes_supply(changes, offset, bytes);
        sum += bytes;
    }
    g_assert_cmpint(sum, ==, SIZE);
    replication_changes_free(changes);
}

int main(int argc, char **argv)
{
    g_test_init(&argc, &argv, NULL);
    g_test_add_func("/replication-changes/random", test_random);
    g_test_add_func("/replication-changes/all", test_all);

    return g_test_run();
}
