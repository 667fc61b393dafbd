/*
 * Block replication: the write-intent log
 *
 * Each page of the metadata has the bits of 32768 regions.  One write of a page
 * is under way at a time, and whoever wants to set bits meanwhile waits for the
 * next one: so two at most, however many wait.
 *
 * A page that is torn by a power cut is a mixture of two versions, sector by
 * sector.  Each has all bits that have to be there: new ones do not have to
 * until the write is done, and old ones are unset when they are of no use.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/coroutine.h"
#include "qemu/cutils.h"
#include "qemu/lockable.h"
#include "qemu/memalign.h"
#include "qemu/units.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "replication-log.h"

#define PAGE REPLICATION_META_RECORD
#define PAGE_REGIONS (PAGE * 8)

/* What is read, or written while nothing else goes on, at once */
#define MAX_PAGES (1 * MiB / PAGE)

typedef struct LogPage {
    /* What the metadata has or is going to have */
    uint8_t wanted[PAGE];
    /* What it has on stable storage */
    uint8_t stable[PAGE];
    /* Regions that were changed since the last tick */
    uint8_t recent[PAGE];

    bool writing;
    /* Bits were unset, which is not urgent */
    bool stale;
    CoQueue waiting;
} LogPage;

struct ReplicationLog {
    BdrvChild *child;
    ReplicationChanges *changes;

    /* Protects everything below */
    QemuMutex lock;

    int64_t regions;
    int64_t size;
    LogPage **pages;
    int64_t nb_pages;

    uint64_t nb_wanted;
    uint64_t nb_recent;
    uint64_t max_recent;
    uint64_t cold_writes;
};

static bool bit_test(const uint8_t *bits, int64_t i)
{
    return bits[i / 8] & 1 << i % 8;
}

static void bit_set(uint8_t *bits, int64_t i)
{
    bits[i / 8] |= 1 << i % 8;
}

static void bit_unset(uint8_t *bits, int64_t i)
{
    bits[i / 8] &= ~(1 << i % 8);
}

static LogPage *log_page(ReplicationLog *log, int64_t region)
{
    return log->pages[region / PAGE_REGIONS];
}

static bool log_is_wanted(ReplicationLog *log, int64_t region)
{
    return bit_test(log_page(log, region)->wanted, region % PAGE_REGIONS);
}

static bool log_is_stable(ReplicationLog *log, int64_t region)
{
    return bit_test(log_page(log, region)->stable, region % PAGE_REGIONS);
}

static void log_want(ReplicationLog *log, int64_t region)
{
    if (!log_is_wanted(log, region)) {
        bit_set(log_page(log, region)->wanted, region % PAGE_REGIONS);
        log->nb_wanted++;
    }
}

static void log_touch(ReplicationLog *log, int64_t region)
{
    LogPage *page = log_page(log, region);

    if (!bit_test(page->recent, region % PAGE_REGIONS)) {
        bit_set(page->recent, region % PAGE_REGIONS);
        log->nb_recent++;
    }
}

/* Bytes of the disk that a region has */
static int64_t log_region_bytes(ReplicationLog *log, int64_t region)
{
    return MIN(REPLICATION_META_REGION,
               log->size - region * REPLICATION_META_REGION);
}

void replication_log_resize(ReplicationLog *log, int64_t size)
{
    int64_t old = log->nb_pages;

    QEMU_LOCK_GUARD(&log->lock);

    log->size = size;
    log->regions = DIV_ROUND_UP(size, REPLICATION_META_REGION);
    log->nb_pages = MAX(old, DIV_ROUND_UP(log->regions, PAGE_REGIONS));
    log->pages = g_renew(LogPage *, log->pages, log->nb_pages);
    for (int64_t i = old; i < log->nb_pages; i++) {
        log->pages[i] = g_new0(LogPage, 1);
        qemu_co_queue_init(&log->pages[i]->waiting);
    }
}

ReplicationLog *replication_log_new(BdrvChild *child, int64_t size,
                                    ReplicationChanges *changes,
                                    int64_t log_size)
{
    ReplicationLog *log = g_new0(ReplicationLog, 1);

    qemu_mutex_init(&log->lock);
    log->child = child;
    log->changes = changes;
    log->max_recent = MAX(log_size / REPLICATION_META_REGION / 2, 1);
    replication_log_resize(log, size);

    return log;
}

void replication_log_free(ReplicationLog *log)
{
    if (!log) {
        return;
    }
    for (int64_t i = 0; i < log->nb_pages; i++) {
        g_free(log->pages[i]);
    }
    g_free(log->pages);
    qemu_mutex_destroy(&log->lock);
    g_free(log);
}

uint64_t replication_log_regions(ReplicationLog *log)
{
    QEMU_LOCK_GUARD(&log->lock);

    return log->nb_wanted;
}

uint64_t replication_log_cold_writes(ReplicationLog *log)
{
    QEMU_LOCK_GUARD(&log->lock);

    return log->cold_writes;
}

/*
 * Who wrote it may have died before it was on stable storage, so that is not
 * taken for granted.
 */
static void log_load_pages(ReplicationLog *log, int64_t first, int64_t nb,
                           const uint8_t *buf)
{
    int64_t base = first * PAGE_REGIONS;
    int64_t end = MIN(base + nb * PAGE_REGIONS, log->regions);

    QEMU_LOCK_GUARD(&log->lock);

    for (int64_t region = base; region < end; region++) {
        if (bit_test(buf, region - base)) {
            log_want(log, region);
        }
    }
}

int coroutine_mixed_fn replication_log_load(ReplicationLog *log)
{
    int64_t max = MIN(log->nb_pages, MAX_PAGES);
    uint8_t *buf = qemu_blockalign(log->child->bs, MAX(max, 1) * PAGE);
    int64_t i, nb;
    int ret = 0;

    for (i = 0; i < log->nb_pages && ret == 0; i += nb) {
        nb = MIN(max, log->nb_pages - i);
        ret = bdrv_pread(log->child, REPLICATION_META_LOG + i * PAGE, nb * PAGE,
                         buf, 0);
        if (ret == 0) {
            log_load_pages(log, i, nb, buf);
        }
    }
    qemu_vfree(buf);

    return ret;
}

bool replication_log_next(ReplicationLog *log, int64_t start, int64_t *offset,
                          int64_t *bytes)
{
    int64_t region = DIV_ROUND_UP(start, REPLICATION_META_REGION);

    QEMU_LOCK_GUARD(&log->lock);

    while (region < log->regions && !log_is_wanted(log, region)) {
        region++;
    }
    if (region >= log->regions) {
        return false;
    }
    *offset = region * REPLICATION_META_REGION;
    *bytes = 0;
    while (region < log->regions && log_is_wanted(log, region)) {
        *bytes += log_region_bytes(log, region++);
    }

    return true;
}

/* Write a page as it is wanted now.  Called with the lock, and drops it. */
static int coroutine_fn GRAPH_RDLOCK
log_co_write_page(ReplicationLog *log, int64_t index, BdrvRequestFlags flags)
{
    LogPage *page = log->pages[index];
    uint8_t *buf = qemu_blockalign(log->child->bs, PAGE);
    int ret;

    memcpy(buf, page->wanted, PAGE);
    page->writing = true;
    page->stale = false;
    qemu_mutex_unlock(&log->lock);

    ret = bdrv_co_pwrite(log->child, REPLICATION_META_LOG + index * PAGE, PAGE,
                         buf, flags);

    qemu_mutex_lock(&log->lock);
    page->writing = false;
    if (ret < 0) {
        page->stale = true;
    } else if (flags & BDRV_REQ_FUA) {
        for (int i = 0; i < PAGE; i++) {
            /* What is not wanted any more might be unset by the next write */
            page->stable[i] |= buf[i] & page->wanted[i];
        }
    }
    qemu_co_queue_restart_all(&page->waiting);
    qemu_vfree(buf);

    return ret;
}

int coroutine_fn replication_log_co_begin(ReplicationLog *log, int64_t offset,
                                          int64_t bytes)
{
    bool cold = false;
    int64_t region, end, i;
    int ret = 0;

    QEMU_LOCK_GUARD(&log->lock);

    /* The disk may have become shorter since the request came */
    end = DIV_ROUND_UP(MIN(offset + bytes, log->size), REPLICATION_META_REGION);
    for (region = offset / REPLICATION_META_REGION; region < end; region++) {
        log_touch(log, region);
        while (!log_is_stable(log, region) && ret == 0) {
            LogPage *page = log_page(log, region);

            cold = true;
            for (i = region; i < end && log_page(log, i) == page; i++) {
                log_want(log, i);
            }
            if (page->writing) {
                qemu_co_queue_wait(&page->waiting, &log->lock);
            } else {
                ret = log_co_write_page(log, region / PAGE_REGIONS,
                                        BDRV_REQ_FUA);
            }
        }
        if (ret < 0) {
            break;
        }
    }
    log->cold_writes += cold;

    return ret;
}

bool replication_log_wants_tick(ReplicationLog *log)
{
    QEMU_LOCK_GUARD(&log->lock);

    return log->nb_recent >= log->max_recent;
}

/* Begin another period for the regions of a page */
static void log_tick_page(ReplicationLog *log, int64_t index)
{
    int64_t base = index * PAGE_REGIONS;
    LogPage *page = log->pages[index];

    for (int64_t i = 0; i < PAGE_REGIONS; i++) {
        if (bit_test(page->recent, i)) {
            bit_unset(page->recent, i);
            log->nb_recent--;
        } else if (bit_test(page->wanted, i) && base + i < log->regions &&
                   !replication_changes_has(log->changes,
                                            (base + i) *
                                            REPLICATION_META_REGION,
                                            log_region_bytes(log, base + i))) {
            bit_unset(page->wanted, i);
            bit_unset(page->stable, i);
            page->stale = true;
            log->nb_wanted--;
        }
    }
}

/*
 * Whoever is going to change something has noted it in @changes before asking
 * here for the lock, and so either it is seen there, or has to set the bit.
 */
void coroutine_fn replication_log_co_tick(ReplicationLog *log)
{
    QEMU_LOCK_GUARD(&log->lock);

    for (int64_t i = 0; i < log->nb_pages; i++) {
        log_tick_page(log, i);
        if (log->pages[i]->stale && !log->pages[i]->writing) {
            log_co_write_page(log, i, 0);
        }
    }
}

static bool log_page_is_cold(const LogPage *page)
{
    return memcmp(page->wanted, page->stable, PAGE);
}

/* Copy pages from @first on that have to be written.  Returns how many. */
static int64_t log_gather(ReplicationLog *log, int64_t first, bool all,
                          uint8_t *buf)
{
    int64_t nb = 0;

    QEMU_LOCK_GUARD(&log->lock);

    while (nb < MAX_PAGES && first + nb < log->nb_pages &&
           (all || log_page_is_cold(log->pages[first + nb]))) {
        memcpy(buf + nb * PAGE, log->pages[first + nb]->wanted, PAGE);
        nb++;
    }

    return nb;
}

static void log_have_written(ReplicationLog *log, int64_t first, int64_t nb)
{
    QEMU_LOCK_GUARD(&log->lock);

    for (int64_t i = first; i < first + nb; i++) {
        memcpy(log->pages[i]->stable, log->pages[i]->wanted, PAGE);
        log->pages[i]->stale = false;
    }
}

/* Write those pages that need it, or all, while nothing else goes on */
static int coroutine_mixed_fn log_write(ReplicationLog *log, bool all)
{
    uint8_t *buf = qemu_blockalign(log->child->bs, MAX_PAGES * PAGE);
    int64_t i, nb;
    int ret = 0;

    for (i = 0; i < log->nb_pages; i += MAX(nb, 1)) {
        nb = log_gather(log, i, all, buf);
        if (!nb) {
            continue;
        }
        ret = bdrv_pwrite(log->child, REPLICATION_META_LOG + i * PAGE,
                          nb * PAGE, buf, BDRV_REQ_FUA);
        if (ret < 0) {
            break;
        }
        log_have_written(log, i, nb);
    }
    qemu_vfree(buf);

    return ret;
}

int coroutine_mixed_fn
replication_log_write_changes(ReplicationLog *log, ReplicationChanges *changes)
{
    int64_t offset = 0, bytes;

    while (replication_changes_next(changes, offset, &offset, &bytes)) {
        int64_t end = offset + bytes;

        QEMU_LOCK_GUARD(&log->lock);

        for (; offset < MIN(end, log->size);
             offset = QEMU_ALIGN_UP(offset + 1, REPLICATION_META_REGION)) {
            log_want(log, offset / REPLICATION_META_REGION);
        }
    }

    return log_write(log, false);
}

int coroutine_mixed_fn replication_log_write_empty(ReplicationLog *log)
{
    qemu_mutex_lock(&log->lock);
    for (int64_t i = 0; i < log->nb_pages; i++) {
        memset(log->pages[i]->wanted, 0, PAGE);
        memset(log->pages[i]->stable, 0, PAGE);
    }
    log->nb_wanted = 0;
    qemu_mutex_unlock(&log->lock);

    return log_write(log, true);
}
