/*
 * What changed on a disk, and what its replica lacks of that
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "block/block-io.h"
#include "qapi/error.h"
#include "qemu/hbitmap.h"
#include "qemu/lockable.h"
#include "replication-changes.h"

/* With the spare one */
#define NB_SETS 4

struct ReplicationChanges {
    /* Protects everything below */
    QemuMutex lock;

    int64_t size;
    HBitmap *current;
    HBitmap *closing;
    HBitmap *lacking;

    /*
     * Takes the place of @current at the next checkpoint, for which the VM
     * stands still.  Cleared before that, unless there was no time.
     */
    HBitmap *spare;
    bool spare_is_clear;

    /* Where to go on looking for what is lacking */
    int64_t cursor;

    /* Counts how often something else began to be closing */
    uint64_t closings;
};

/* Bitmaps that cannot be had end QEMU.  What is not used costs nothing. */
static bool changes_have_room(int64_t size)
{
    uint64_t bits = ((uint64_t)size >> REPLICATION_BLOCK_BITS) + 1;
    g_autofree void *room = NULL;

    if (bits > 1ULL << HBITMAP_LOG_MAX_SIZE) {
        return false;
    }
    room = g_try_malloc(NB_SETS * DIV_ROUND_UP(bits, 8));

    return room;
}

bool replication_check_room(BlockDriverState *bs, int64_t size, Error **errp)
{
    if (changes_have_room(size)) {
        return true;
    }
    error_setg(errp, "Replication node '%s': not enough memory to note what "
               "changes on a disk of %" PRId64 " bytes",
               bdrv_get_node_name(bs), size);

    return false;
}

static void changes_alloc(ReplicationChanges *changes, int64_t size)
{
    changes->size = size;
    changes->current = hbitmap_alloc(size, REPLICATION_BLOCK_BITS);
    changes->closing = hbitmap_alloc(size, REPLICATION_BLOCK_BITS);
    changes->lacking = hbitmap_alloc(size, REPLICATION_BLOCK_BITS);
    changes->spare = hbitmap_alloc(size, REPLICATION_BLOCK_BITS);
    changes->spare_is_clear = true;
    changes->cursor = 0;
    changes->closings++;
}

static void changes_release(ReplicationChanges *changes)
{
    hbitmap_free(changes->current);
    hbitmap_free(changes->closing);
    hbitmap_free(changes->lacking);
    hbitmap_free(changes->spare);
}

ReplicationChanges *replication_changes_new(int64_t size)
{
    ReplicationChanges *changes = g_new0(ReplicationChanges, 1);

    qemu_mutex_init(&changes->lock);
    changes_alloc(changes, size);

    return changes;
}

void replication_changes_free(ReplicationChanges *changes)
{
    if (!changes) {
        return;
    }
    changes_release(changes);
    qemu_mutex_destroy(&changes->lock);
    g_free(changes);
}

int64_t replication_changes_size(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    return changes->size;
}

void replication_changes_resize(ReplicationChanges *changes, int64_t size)
{
    QEMU_LOCK_GUARD(&changes->lock);

    changes_release(changes);
    changes_alloc(changes, size);
}

void replication_changes_note(ReplicationChanges *changes, int64_t offset,
                              int64_t bytes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    /* The disk may have become shorter since the request came */
    bytes = MIN(bytes, changes->size - offset);
    if (bytes > 0) {
        hbitmap_set(changes->current, offset, bytes);
    }
}

bool replication_changes_has(ReplicationChanges *changes, int64_t offset,
                             int64_t bytes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    return hbitmap_next_dirty(changes->current, offset, bytes) >= 0 ||
           hbitmap_next_dirty(changes->closing, offset, bytes) >= 0;
}

bool replication_changes_next(ReplicationChanges *changes, int64_t start,
                              int64_t *offset, int64_t *bytes)
{
    int64_t closing, closing_bytes;
    bool has_current, has_closing;

    QEMU_LOCK_GUARD(&changes->lock);

    has_current = hbitmap_next_dirty_area(changes->current, start,
                                          changes->size, INT64_MAX, offset,
                                          bytes);
    has_closing = hbitmap_next_dirty_area(changes->closing, start,
                                          changes->size, INT64_MAX,
                                          &closing, &closing_bytes);
    if (has_closing && (!has_current || closing < *offset)) {
        *offset = closing;
        *bytes = closing_bytes;
    }

    return has_current || has_closing;
}

static void changes_tidy(ReplicationChanges *changes)
{
    if (!changes->spare_is_clear) {
        hbitmap_reset_all(changes->spare);
        changes->spare_is_clear = true;
    }
}

void replication_changes_tidy(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    changes_tidy(changes);
}

/* Takes as long as there is much in @from, however large the disk is */
static void changes_move(ReplicationChanges *changes, HBitmap *from,
                         HBitmap *to)
{
    int64_t start = 0, bytes;

    while (hbitmap_next_dirty_area(from, start, changes->size, INT64_MAX,
                                   &start, &bytes)) {
        hbitmap_set(to, start, bytes);
        hbitmap_reset(from, start, bytes);
        start += bytes;
    }
}

void replication_changes_checkpoint(ReplicationChanges *changes, bool flushed)
{
    QEMU_LOCK_GUARD(&changes->lock);

    changes->closings++;
    if (flushed) {
        HBitmap *old = changes->closing;

        changes_tidy(changes);
        changes->closing = changes->current;
        changes->current = changes->spare;
        changes->spare = old;
        changes->spare_is_clear = hbitmap_empty(old);
    } else {
        changes_move(changes, changes->current, changes->closing);
    }
}

uint64_t replication_changes_settle(ReplicationChanges *changes)
{
    int64_t start = 0, bytes;

    QEMU_LOCK_GUARD(&changes->lock);

    changes_move(changes, changes->current, changes->closing);
    while (hbitmap_next_dirty_area(changes->lacking, start, changes->size,
                                   INT64_MAX, &start, &bytes)) {
        hbitmap_set(changes->current, start, bytes);
        start += bytes;
    }

    return ++changes->closings;
}

void replication_changes_settled(ReplicationChanges *changes, uint64_t what)
{
    QEMU_LOCK_GUARD(&changes->lock);

    if (changes->closings == what) {
        hbitmap_reset_all(changes->closing);
    }
}

void replication_changes_lack_all(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    if (changes->size) {
        hbitmap_set(changes->lacking, 0, changes->size);
    }
}

void replication_changes_lack_changed(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    hbitmap_merge(changes->current, changes->closing, changes->lacking);
}

void replication_changes_lack_nothing(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    hbitmap_reset_all(changes->lacking);
}

void replication_changes_lack(ReplicationChanges *changes, int64_t offset,
                              int64_t bytes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    hbitmap_set(changes->lacking, offset, bytes);
    /* It was noted, but perhaps before what is being settled now */
    hbitmap_set(changes->current, offset, bytes);
}

void replication_changes_supply(ReplicationChanges *changes, int64_t offset,
                                int64_t bytes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    hbitmap_reset(changes->lacking, offset, bytes);
}

bool replication_changes_is_lacking(ReplicationChanges *changes,
                                    int64_t offset, int64_t bytes,
                                    int64_t *pnum)
{
    QEMU_LOCK_GUARD(&changes->lock);

    /* Nearly always */
    if (hbitmap_empty(changes->lacking)) {
        *pnum = bytes;
        return false;
    }

    return hbitmap_status(changes->lacking, offset, bytes, pnum);
}

bool replication_changes_find_lacking(ReplicationChanges *changes, int64_t max,
                                      int64_t *offset, int64_t *bytes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    if (!hbitmap_next_dirty_area(changes->lacking, changes->cursor,
                                 changes->size, max, offset, bytes) &&
        !hbitmap_next_dirty_area(changes->lacking, 0, changes->size, max,
                                 offset, bytes)) {
        return false;
    }
    changes->cursor = *offset + *bytes;

    return true;
}

int64_t replication_changes_lacking_bytes(ReplicationChanges *changes)
{
    QEMU_LOCK_GUARD(&changes->lock);

    return MIN(hbitmap_count(changes->lacking), changes->size);
}

/* How much of a range is not in @set, in whole blocks */
static int64_t changes_missing(HBitmap *set, int64_t start, int64_t bytes)
{
    int64_t end = start + bytes;
    int64_t zero, dirty, result = 0;

    for (; start < end; start = dirty) {
        zero = hbitmap_next_zero(set, start, end - start);
        if (zero < 0) {
            break;
        }
        dirty = hbitmap_next_dirty(set, zero, end - zero);
        if (dirty < 0) {
            dirty = end;
        }
        result += QEMU_ALIGN_UP(dirty - zero, REPLICATION_BLOCK);
    }

    return result;
}

int64_t replication_changes_changed_bytes(ReplicationChanges *changes)
{
    int64_t start = 0, bytes, result;

    QEMU_LOCK_GUARD(&changes->lock);

    /*
     * Those of both, and then what only the second has.  The guest waits, so
     * not block by block.
     */
    result = hbitmap_count(changes->current);
    while (hbitmap_next_dirty_area(changes->closing, start, changes->size,
                                   INT64_MAX, &start, &bytes)) {
        result += changes_missing(changes->current, start, bytes);
        start += bytes;
    }

    return MIN(result, changes->size);
}
