/*
 * Block replication: end what hangs at the other side
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "replication-watch.h"

/*
 * A time in which nothing happens is measured in so many parts, each of which
 * the main loop must have seen: it may have stood still itself.
 */
#define TIMEOUT_PARTS 4

struct ReplicationWatch {
    BlockDriverState *bs;
    uint64_t timeout_ms;
    ReplicationWatchLink *link;
    ReplicationWatchHangUp *hang_up;
    void *opaque;
    QEMUTimer *timer;

    /* What was done when the timer ran last, and since how many times */
    unsigned int done;
    unsigned int idle_parts;
};

typedef struct WatchLoad {
    /* Requests that have not ended, and those that have, modulo 2^32 */
    unsigned int in_flight;
    unsigned int done;
} WatchLoad;

/* Add what is under way at the ends of the way to the other side */
static void GRAPH_RDLOCK watch_add_load(BlockDriverState *bs, WatchLoad *load)
{
    BdrvChild *c;

    if (QLIST_EMPTY(&bs->children)) {
        load->in_flight += qatomic_read(&bs->in_flight);
        load->done += qatomic_read(&bs->requests_done);
    }
    QLIST_FOREACH(c, &bs->children, next) {
        watch_add_load(c->bs, load);
    }
}

/*
 * Not only the requests of the node itself count: whatever hangs in the link
 * may be waited for by whoever drains it, or changes the graph.
 */
static void watch_look(void *opaque)
{
    ReplicationWatch *watch = opaque;
    WatchLoad load = {};

    GRAPH_RDLOCK_GUARD_MAINLOOP();

    watch_add_load(watch->link(watch->opaque), &load);
    if (!load.in_flight || load.done != watch->done) {
        watch->idle_parts = 0;
    } else if (++watch->idle_parts == TIMEOUT_PARTS) {
        warn_report("Replication node '%s' cuts the connection to the "
                    "secondary, which has done nothing for %" PRIu64 " ms",
                    bdrv_get_node_name(watch->bs), watch->timeout_ms);
        watch->hang_up(watch->opaque);
    }
    watch->done = load.done;

    timer_mod(watch->timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) +
              DIV_ROUND_UP(watch->timeout_ms, TIMEOUT_PARTS));
}

ReplicationWatch *replication_watch_new(BlockDriverState *bs,
                                        uint64_t timeout_ms,
                                        ReplicationWatchLink *link,
                                        ReplicationWatchHangUp *hang_up,
                                        void *opaque)
{
    ReplicationWatch *watch;

    GLOBAL_STATE_CODE();

    if (!timeout_ms) {
        return NULL;
    }

    watch = g_new(ReplicationWatch, 1);
    *watch = (ReplicationWatch) {
        .bs         = bs,
        .timeout_ms = timeout_ms,
        .link       = link,
        .hang_up    = hang_up,
        .opaque     = opaque,
        /* Runs while the main loop waits for the requests in flight */
        .timer      = aio_timer_new(qemu_get_aio_context(), QEMU_CLOCK_REALTIME,
                                    SCALE_MS, watch_look, watch),
    };
    watch_look(watch);

    return watch;
}

void replication_watch_free(ReplicationWatch *watch)
{
    GLOBAL_STATE_CODE();

    if (watch) {
        timer_free(watch->timer);
        g_free(watch);
    }
}
