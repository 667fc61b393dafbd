/*
 * Block replication: what stands above a node
 *
 * A node that forwards writes is of use only as long as they come to it.  A
 * change of the graph above can lead them elsewhere without any of them ever
 * being seen here, and be taken back before somebody asks.  So each change is
 * compared with what was there before.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "system/block-backend.h"
#include "block/block_int.h"
#include "replication-above.h"

typedef struct AboveNode {
    char *name;
    /* It has one child, and whoever used it uses that when it goes */
    bool is_filter;
    /* Somebody was above it at some time */
    bool was_used;
} AboveNode;

/*
 * The keys may have been freed since they were added, and are only compared.
 * None can be allocated again unnoticed, because every edge that goes is a
 * change.
 */
struct ReplicationAbove {
    /* BlockDriverState => AboveNode */
    GHashTable *nodes;
    /* Who is not a node, BlockBackends for example => name of the node used */
    GHashTable *users;
};

static void above_node_free(void *opaque)
{
    AboveNode *node = opaque;

    g_free(node->name);
    g_free(node);
}

ReplicationAbove *replication_above_new(void)
{
    ReplicationAbove *above = g_new(ReplicationAbove, 1);

    above->nodes = g_hash_table_new_full(NULL, NULL, NULL, above_node_free);
    above->users = g_hash_table_new_full(NULL, NULL, NULL, g_free);

    return above;
}

void replication_above_free(ReplicationAbove *above)
{
    g_hash_table_destroy(above->nodes);
    g_hash_table_destroy(above->users);
    g_free(above);
}

/* Writes to an overlay do not come to its backing node */
static bool above_passes_writes(const BdrvChild *c)
{
    return !(c->role & BDRV_CHILD_COW);
}

static bool GRAPH_RDLOCK above_is_used(BlockDriverState *bs)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        if (above_passes_writes(c)) {
            return true;
        }
    }

    return false;
}

static AboveNode *GRAPH_RDLOCK above_node_new(BlockDriverState *bs)
{
    AboveNode *node = g_new(AboveNode, 1);

    *node = (AboveNode) {
        .name       = g_strdup(bdrv_get_node_name(bs)),
        .is_filter  = bdrv_filter_child(bs),
        .was_used   = above_is_used(bs),
    };

    return node;
}

static void GRAPH_RDLOCK above_add(ReplicationAbove *above,
                                   BlockDriverState *bs)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        if (!above_passes_writes(c)) {
            continue;
        }
        if (!c->klass->parent_is_bds) {
            g_hash_table_insert(above->users, c->opaque,
                                g_strdup(bdrv_get_node_name(bs)));
        } else if (!g_hash_table_contains(above->nodes, c->opaque)) {
            g_hash_table_insert(above->nodes, c->opaque,
                                above_node_new(c->opaque));
            above_add(above, c->opaque);
        }
    }
}

/*
 * Whether nobody can come to use this node again.  It may have been freed.  If
 * not, it was not opened yet or is being deleted when it has neither a parent
 * nor a name that the monitor knows it by.
 */
static bool GRAPH_RDLOCK above_is_gone(const void *node)
{
    BlockDriverState *bs = NULL;

    while ((bs = bdrv_next_all_states(bs))) {
        if (bs == node) {
            return QLIST_EMPTY(&bs->parents) &&
                   !QTAILQ_IN_USE(bs, monitor_list);
        }
    }

    return true;
}

static bool above_has_moved(const void *user)
{
    BlockBackend *blk = NULL;

    while ((blk = blk_all_next(blk))) {
        if (blk == user) {
            return blk_bs(blk);
        }
    }

    return false;
}

/*
 * The name of a node that is in @old and not in @new, and where writes may go
 * on; or NULL
 */
static const char *GRAPH_RDLOCK
above_bypassing_node(ReplicationAbove *old, ReplicationAbove *new)
{
    GHashTableIter iter;
    void *key, *value;

    g_hash_table_iter_init(&iter, old->nodes);
    while (g_hash_table_iter_next(&iter, &key, &value)) {
        AboveNode *node = value;

        if (g_hash_table_contains(new->nodes, key)) {
            continue;
        }
        /*
         * What is gone takes its users with it, or leaves them to its child.
         * But a quorum has more than one, and the next one may lack us.
         */
        if (!above_is_gone(key) ||
            (node->was_used && !node->is_filter &&
             !g_hash_table_size(new->nodes))) {
            return node->name;
        }
    }

    return NULL;
}

/* The same for the users of nodes, which may come and go */
static const char *
above_bypassing_user(ReplicationAbove *old, ReplicationAbove *new)
{
    GHashTableIter iter;
    void *key, *value;

    g_hash_table_iter_init(&iter, old->users);
    while (g_hash_table_iter_next(&iter, &key, &value)) {
        if (!g_hash_table_contains(new->users, key) && above_has_moved(key)) {
            return value;
        }
    }

    return NULL;
}

/*
 * Whether somebody writes to this overlay who does not write to the node below
 * it: not a filter there that keeps in the overlay what it is going to replace,
 * nor a node that nobody uses, as that filter is when it has been taken out.
 */
static bool GRAPH_RDLOCK above_is_written(ReplicationAbove *new,
                                          BlockDriverState *overlay)
{
    BdrvChild *c;

    QLIST_FOREACH(c, &overlay->parents, next_parent) {
        BlockDriverState *parent = c->klass->parent_is_bds ? c->opaque : NULL;

        if ((c->perm & BLK_PERM_WRITE) &&
            (!parent || (!g_hash_table_contains(new->nodes, parent) &&
                         !QLIST_EMPTY(&parent->parents)))) {
            return true;
        }
    }

    return false;
}

/* The name of an overlay of @bs, or of one of those, that is; or NULL */
static const char *GRAPH_RDLOCK
above_written_overlay(ReplicationAbove *new, BlockDriverState *bs)
{
    const char *name = NULL;
    BdrvChild *c;

    QLIST_FOREACH(c, &bs->parents, next_parent) {
        BlockDriverState *overlay = c->opaque;

        if (above_passes_writes(c)) {
            continue;
        }
        name = above_is_written(new, overlay) ? bdrv_get_node_name(overlay) :
                                         above_written_overlay(new, overlay);
        if (name) {
            break;
        }
    }

    return name;
}

static const char *GRAPH_RDLOCK above_overlaid(ReplicationAbove *new)
{
    GHashTableIter iter;
    void *key, *value;

    g_hash_table_iter_init(&iter, new->nodes);
    while (g_hash_table_iter_next(&iter, &key, &value)) {
        AboveNode *node = value;

        if (above_written_overlay(new, key)) {
            return node->name;
        }
    }

    return NULL;
}

static ReplicationAbove *GRAPH_RDLOCK above_find(BlockDriverState *bs)
{
    ReplicationAbove *above = replication_above_new();

    above_add(above, bs);

    return above;
}

char *replication_above_bypass(ReplicationAbove *above, BlockDriverState *bs)
{
    ReplicationAbove *new = above_find(bs);
    const char *name;
    char *result;

    GLOBAL_STATE_CODE();

    name = above_bypassing_node(above, new) ?:
           above_bypassing_user(above, new) ?:
           above_overlaid(new) ?: above_written_overlay(new, bs);
    result = g_strdup(name);
    replication_above_free(new);

    return result;
}

ReplicationAbove *replication_above_update(ReplicationAbove *above,
                                           BlockDriverState *bs)
{
    ReplicationAbove *new = above_find(bs);
    GHashTableIter iter;
    void *key, *value;

    GLOBAL_STATE_CODE();

    g_hash_table_iter_init(&iter, new->nodes);
    while (g_hash_table_iter_next(&iter, &key, &value)) {
        AboveNode *node = value;
        AboveNode *old = g_hash_table_lookup(above->nodes, key);

        node->was_used |= old && old->was_used;
    }
    replication_above_free(above);

    return new;
}
