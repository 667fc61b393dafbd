/*
 * Block replication: the metadata of a disk that a guest uses
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/cutils.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "qemu/main-loop.h"
#include "qemu/timer.h"
#include "replication-int.h"
#include "replication-ledger.h"
#include "replication-log.h"
#include "replication-watch.h"

/* How long a part of the disk stays in the log for nothing, at least */
#define TICK_MS 60000

/* Of what is asked of a peer, where nothing else is said: the monitor waits */
#define PEER_TIMEOUT_MS 5000

/* Until a drained node is looked at again */
#define DRAINED_MS 100

struct ReplicationLedger {
    BlockDriverState *bs;
    ReplicationMeta *meta;
    ReplicationChanges *changes;
    uint64_t log_size;
    uint64_t timeout_ms;

    /* NULL until the metadata was read */
    ReplicationLog *log;

    /* Held by requests that write the own record */
    CoMutex lock;

    /*
     * Accessed with atomic operations.  The log does not say what changed.
     */
    bool log_void;
    /* So says only the peer's record, which is ours to write */
    bool void_at_peer;
    bool told;
    /* The data is that of the last checkpoint of both sides, for all we know */
    bool at_base;
    /* The replica may take over */
    bool confirmed;
    /* The overlays that the record names are merged, which it does not say */
    bool merged;
    /* An error was reported */
    bool failed;
    bool ticking;

    /* The changes are all that a disk of the base may lack.  BQL. */
    bool knows_changes;

    /*
     * Others have used the disk since the metadata was read, which an attempt
     * to open it that failed has seen.  While the node is not active.
     */
    bool by_others;

    /*
     * What the primary had said when the takeover began, which may have to be
     * repeated; sequence 0 if it has not begun.  BQL.
     */
    ReplicationPeerRecord taken_over;

    /* Of the peer, while there is one with metadata.  BQL. */
    ReplicationMeta *peer;
    ReplicationLog *peer_log;
    ReplicationPeerRecord announced;
    ReplicationWatch *watch;
    QEMUBH *lose_bh;

    /*
     * The current generation, if it was announced, and nobody has answered that
     * he knows it; and to which opening of the replica that was.  Changed while
     * the node is drained.
     */
    QemuUUID unheard;
    QemuUUID unheard_by;

    QEMUTimer *tick_timer;

    QemuMutex stats_lock; /* protects what follows it */
    QemuUUID current;
    QemuUUID base;
};

static const char *ledger_name(ReplicationLedger *ledger)
{
    return bdrv_get_node_name(ledger->bs);
}

static const ReplicationOwnRecord *ledger_own(ReplicationLedger *ledger)
{
    return &replication_meta_records(ledger->meta)->own;
}

/* Tell users once that the metadata fails.  Takes @err. */
static void ledger_report(ReplicationLedger *ledger, Error *err)
{
    if (!qatomic_xchg(&ledger->failed, true)) {
        replication_report_error(ledger->bs, REPLICATION_ERROR_REASON_METADATA,
                                 error_get_pretty(err));
        error_report_err(err);
    } else {
        error_free(err);
    }
}

static int coroutine_mixed_fn
ledger_write_own(ReplicationLedger *ledger, const ReplicationOwnRecord *own,
                 Error **errp)
{
    ReplicationOwnRecord record = *own;
    int ret;

    if (qatomic_read(&ledger->merged)) {
        record.state = REPLICATION_META_STATE_OK;
        record.active[0] = '\0';
        record.hidden[0] = '\0';
    }
    record.log_void |= qatomic_read(&ledger->void_at_peer);
    ret = replication_meta_write_own(ledger->meta, &record, errp);
    if (ret < 0) {
        return ret;
    }
    qatomic_set(&ledger->merged, false);
    qatomic_set(&ledger->log_void, record.log_void);
    qatomic_set(&ledger->at_base,
                qemu_uuid_is_equal(&own->current, &own->base));

    QEMU_LOCK_GUARD(&ledger->stats_lock);
    ledger->current = own->current;
    ledger->base = own->base;

    return 0;
}

static void coroutine_fn ledger_tick_entry(void *opaque)
{
    ReplicationLedger *ledger = opaque;

    bdrv_graph_co_rdlock();
    replication_log_co_tick(ledger->log);
    bdrv_graph_co_rdunlock();

    qatomic_set(&ledger->ticking, false);
    bdrv_dec_in_flight(ledger->bs);
}

/* From any thread.  Returns false if the node is drained. */
static bool ledger_tick(ReplicationLedger *ledger)
{
    BlockDriverState *bs = ledger->bs;

    if (qatomic_read(&bs->quiesce_counter)) {
        return false;
    }
    if (!qatomic_read(&ledger->log_void) &&
        !(bs->open_flags & BDRV_O_INACTIVE) &&
        !qatomic_xchg(&ledger->ticking, true)) {
        bdrv_inc_in_flight(bs);
        aio_co_schedule(bdrv_get_aio_context(bs),
                        qemu_coroutine_create(ledger_tick_entry, ledger));
    }

    return true;
}

static void ledger_tick_in(ReplicationLedger *ledger, int64_t ms)
{
    timer_mod(ledger->tick_timer, qemu_clock_get_ms(QEMU_CLOCK_REALTIME) + ms);
}

static void ledger_tick_timer(void *opaque)
{
    ReplicationLedger *ledger = opaque;

    ledger_tick_in(ledger, ledger_tick(ledger) ? TICK_MS : DRAINED_MS);
}

static void ledger_cut_peer(void *opaque)
{
    replication_ledger_abandon(opaque);
}

ReplicationLedger *replication_ledger_new(BlockDriverState *bs,
                                          ReplicationMeta *meta,
                                          ReplicationChanges *changes,
                                          uint64_t log_size,
                                          uint64_t timeout_ms)
{
    ReplicationLedger *ledger = g_new0(ReplicationLedger, 1);

    ledger->bs = bs;
    ledger->meta = meta;
    ledger->changes = changes;
    ledger->log_size = log_size;
    ledger->timeout_ms = timeout_ms ?: PEER_TIMEOUT_MS;
    qemu_co_mutex_init(&ledger->lock);
    qemu_mutex_init(&ledger->stats_lock);
    ledger->tick_timer = aio_timer_new(qemu_get_aio_context(),
                                       QEMU_CLOCK_REALTIME, SCALE_MS,
                                       ledger_tick_timer, ledger);
    ledger->lose_bh = aio_bh_new(qemu_get_aio_context(), ledger_cut_peer,
                                 ledger);

    return ledger;
}

void replication_ledger_free(ReplicationLedger *ledger)
{
    if (!ledger) {
        return;
    }
    timer_free(ledger->tick_timer);
    replication_ledger_leave(ledger);
    qemu_bh_delete(ledger->lose_bh);
    replication_log_free(ledger->log);
    qemu_mutex_destroy(&ledger->stats_lock);
    g_free(ledger);
}

static int coroutine_mixed_fn ledger_load_log(ReplicationLedger *ledger,
                                              Error **errp)
{
    int64_t offset = 0, bytes = 0;
    int ret = replication_log_load(ledger->log);

    if (ret < 0) {
        error_setg_errno(errp, -ret, "Replication node '%s': failed to read "
                         "the log in its metadata", ledger_name(ledger));
        return ret;
    }
    while (replication_log_next(ledger->log, offset + bytes, &offset, &bytes)) {
        replication_changes_note(ledger->changes, offset, bytes);
    }

    return 0;
}

int coroutine_mixed_fn replication_ledger_open(ReplicationLedger *ledger,
                                               Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->meta);
    int64_t size = replication_changes_size(ledger->changes);
    uint64_t sequence = r->own.sequence;
    ReplicationOwnRecord own;
    int ret = replication_meta_load(ledger->meta, size, errp);

    if (ret < 0) {
        return ret;
    }
    ledger->by_others |= sequence && r->own.sequence != sequence;
    if (!replication_records_check_usable(r, ledger_name(ledger), errp)) {
        return -EINVAL;
    }

    g_clear_pointer(&ledger->log, replication_log_free);
    ledger->log = replication_log_new(replication_meta_child(ledger->meta),
                                      size, ledger->changes, ledger->log_size);
    own = replication_records_open(r, REPLICATION_META_ROLE_PRIMARY, size);
    ledger->knows_changes = !own.log_void && !qemu_uuid_is_null(&own.base);
    if (ledger->knows_changes) {
        ret = ledger_load_log(ledger, errp);
    }
    if (ret == 0) {
        ret = ledger_write_own(ledger, &own, errp);
    }
    if (ret < 0) {
        g_clear_pointer(&ledger->log, replication_log_free);
        return ret;
    }
    ledger_tick_in(ledger, TICK_MS);
    ret = ledger->by_others;
    ledger->by_others = false;

    return ret;
}

/* Nothing but the changes is in the log then: before, it was the primary's */
static int ledger_begin_log(ReplicationLedger *ledger)
{
    int ret;

    ledger->log = replication_log_new(replication_meta_child(ledger->meta),
                                      replication_changes_size(ledger->changes),
                                      ledger->changes, ledger->log_size);
    ret = replication_log_write_empty(ledger->log);

    return ret < 0 ? ret : replication_log_write_changes(ledger->log,
                                                         ledger->changes);
}

/* Who opened the disk as a secondary's has promoted it, but for the merge */
static bool ledger_has_taken_over(const ReplicationRecords *r)
{
    return r->own.role == REPLICATION_META_ROLE_PRIMARY;
}

/* Whether the primary of this very secondary has said that it may take over */
static bool ledger_has_started(const ReplicationRecords *r)
{
    return (replication_records_has_peer(r) || ledger_has_taken_over(r)) &&
           r->peer.kind == REPLICATION_PEER_STARTED &&
           qemu_uuid_is_equal(&r->peer.instance, &r->own.instance);
}

/* The disk is that of a primary, when what is in the overlays is merged */
static int ledger_begin_merge(ReplicationLedger *ledger,
                              ReplicationOwnRecord *own, const char *active,
                              const char *hidden, Error **errp)
{
    int ret;

    own->absorbed = replication_meta_records(ledger->meta)->peer.sequence;
    own->role = REPLICATION_META_ROLE_PRIMARY;
    own->state = REPLICATION_META_STATE_MERGING;
    pstrcpy(own->active, sizeof(own->active), active);
    pstrcpy(own->hidden, sizeof(own->hidden), hidden);
    ret = ledger_write_own(ledger, own, errp);
    if (ret < 0) {
        g_clear_pointer(&ledger->log, replication_log_free);
        return ret;
    }
    ledger->knows_changes = !own->log_void && !qemu_uuid_is_null(&own->base);
    ledger_tick_in(ledger, TICK_MS);

    return 1;
}

int replication_ledger_has_started(ReplicationLedger *ledger, Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->meta);
    int64_t size = replication_changes_size(ledger->changes);
    int ret;

    GLOBAL_STATE_CODE();

    ret = replication_meta_load(ledger->meta, size, errp);
    if (ret < 0) {
        return ret;
    }
    if (!ledger_has_started(r)) {
        error_setg(errp, "Replication node '%s' may not take over: no primary "
                   "has confirmed that it has started", ledger_name(ledger));
        error_append_hint(errp, "Use the primary's disk.\n");
        return 0;
    }

    return 1;
}

bool replication_ledger_stopped(ReplicationLedger *ledger, Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->meta);
    ReplicationOwnRecord own;

    GLOBAL_STATE_CODE();
    assert(ledger_has_started(r));

    own = r->own;
    /* Not if a failover has failed to say so, and the primary has gone on */
    own.role = REPLICATION_META_ROLE_SECONDARY;
    own.disk_id = r->peer.disk_id;
    own.current = r->peer.generation;
    own.base = r->peer.generation;
    own.absorbed = r->peer.sequence;
    own.log_void = r->peer.log_void;
    /* What was half merged is overwritten */
    own.state = REPLICATION_META_STATE_OK;
    own.active[0] = '\0';
    own.hidden[0] = '\0';

    return replication_meta_write_own(ledger->meta, &own, errp) == 0;
}

int replication_ledger_go_back(ReplicationLedger *ledger, bool to_checkpoint,
                               const char *active, const char *hidden,
                               Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->meta);
    int64_t size = replication_changes_size(ledger->changes);
    ReplicationOwnRecord own;
    int ret;

    GLOBAL_STATE_CODE();

    ret = replication_meta_load(ledger->meta, size, errp);
    if (ret < 0) {
        return ret;
    }
    own = replication_records_open(r, REPLICATION_META_ROLE_PRIMARY, size);
    if (to_checkpoint) {
        own.disk_id = r->peer.disk_id;
        own.current = r->peer.generation;
        own.base = r->peer.generation;
        own.log_void = r->peer.log_void;
        ret = ledger_begin_log(ledger);
    } else {
        /* What is overwritten differs from the primary's, as if written here */
        ledger->log = replication_log_new(replication_meta_child(ledger->meta),
                                          size, ledger->changes,
                                          ledger->log_size);
        ret = ledger_load_log(ledger, errp);
        if (ret < 0) {
            g_clear_pointer(&ledger->log, replication_log_free);
            return ret;
        }
        ret = replication_log_write_changes(ledger->log, ledger->changes);
    }
    own.log_void |= ret < 0;

    return ledger_begin_merge(ledger, &own, active, hidden, errp);
}

int replication_ledger_take_over(ReplicationLedger *ledger, const char *active,
                                 const char *hidden, Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->meta);
    ReplicationPeerRecord *peer = &ledger->taken_over;
    bool again = peer->sequence;
    ReplicationOwnRecord own;
    int ret;

    GLOBAL_STATE_CODE();

    if (again) {
        /* A primary that is not dead may have said other things since */
        ret = replication_meta_load(ledger->meta,
                                    replication_changes_size(ledger->changes),
                                    errp);
        if (ret < 0) {
            return ret;
        }
    } else {
        ret = replication_ledger_has_started(ledger, errp);
        if (ret <= 0) {
            return ret;
        }
        *peer = r->peer;
    }

    own = r->own;
    /*
     * A write that has failed may have got there all the same.  But if it was
     * not ours, of a failover to what the disk had before its primary came, it
     * is of no more meaning.
     */
    if (!again || !ledger_has_taken_over(r)) {
        own.disk_id = peer->disk_id;
        own.current = peer->generation;
    }
    /* Nor may that be one that went back, when the guest has written since */
    if (qemu_uuid_is_equal(&own.current, &peer->generation)) {
        replication_own_record_rotate(&own);
    }
    own.base = peer->generation;
    own.log_void = ledger_begin_log(ledger) < 0 || peer->log_void;

    return ledger_begin_merge(ledger, &own, active, hidden, errp);
}

void replication_ledger_merged(ReplicationLedger *ledger)
{
    GLOBAL_STATE_CODE();

    qatomic_set(&ledger->merged, true);
}

bool replication_ledger_forget_overlays(ReplicationLedger *ledger, Error **errp)
{
    GLOBAL_STATE_CODE();

    return ledger_write_own(ledger, ledger_own(ledger), errp) == 0;
}

bool replication_ledger_is_open(ReplicationLedger *ledger)
{
    return ledger->log && !(ledger->bs->open_flags & BDRV_O_INACTIVE);
}

bool replication_ledger_knows_changes(ReplicationLedger *ledger)
{
    return ledger->knows_changes;
}

/* What nobody may have heard of pushes nothing else out of the history */
static void coroutine_mixed_fn ledger_rotate(ReplicationLedger *ledger,
                                             ReplicationOwnRecord *own)
{
    if (qemu_uuid_is_equal(&ledger->unheard, &own->current)) {
        own->history[REPLICATION_META_HISTORY - 1] = own->current;
        qemu_uuid_generate(&own->current);
    } else {
        replication_own_record_rotate(own);
    }
}

/*
 * The data is going to be that of no checkpoint, and newer than that of any
 * overlays.  Without need, of no harm.
 */
static int coroutine_mixed_fn ledger_leave_base(ReplicationLedger *ledger,
                                                Error **errp)
{
    ReplicationOwnRecord own = *ledger_own(ledger);

    if (qatomic_read(&ledger->at_base)) {
        ledger_rotate(ledger, &own);
    } else if (!qatomic_read(&ledger->merged)) {
        return 0;
    }

    return ledger_write_own(ledger, &own, errp);
}

static int coroutine_fn ledger_co_leave_base(ReplicationLedger *ledger)
{
    Error *local_err = NULL;
    int ret;

    qemu_co_mutex_lock(&ledger->lock);
    ret = ledger_leave_base(ledger, &local_err);
    qemu_co_mutex_unlock(&ledger->lock);
    if (local_err) {
        ledger_report(ledger, local_err);
    }

    return ret;
}

static bool coroutine_mixed_fn
ledger_tell_peer(ReplicationLedger *ledger, ReplicationPeerKind kind, bool full,
                 Error **errp)
{
    const ReplicationOwnRecord *own = ledger_own(ledger);
    const ReplicationRecords *r = replication_meta_records(ledger->peer);
    ReplicationPeerRecord record = {
        .kind       = kind,
        .full       = full,
        .log_void   = qatomic_read(&ledger->log_void) ||
                      qatomic_read(&ledger->void_at_peer),
        .size       = own->size,
        .disk_id    = own->disk_id,
        .generation = own->current,
        .instance   = r->own.instance,
    };

    if (replication_meta_write_peer(ledger->peer, &record, errp) < 0) {
        return false;
    }
    ledger->announced = r->peer;

    return true;
}

/* The main loop cuts it, should it hang */
static int coroutine_fn ledger_co_void_at_peer(ReplicationLedger *ledger)
{
    bool ok;

    if (!qatomic_read(&ledger->told)) {
        return -ENOTCONN;
    }
    qatomic_set(&ledger->void_at_peer, true);
    ok = ledger_tell_peer(ledger, ledger->announced.kind,
                          ledger->announced.full, NULL);
    qatomic_set(&ledger->void_at_peer, ok);
    qatomic_set(&ledger->log_void, ok);

    return ok ? 0 : -EIO;
}

/*
 * The log cannot be written, because of @ret.  If a record can, that says so:
 * then at least it does not lie.
 */
static int coroutine_fn ledger_co_void_log(ReplicationLedger *ledger, int ret)
{
    ReplicationOwnRecord own;
    Error *local_err = NULL;

    error_setg_errno(&local_err, -ret, "Replication node '%s': failed to write "
                     "the log in its metadata", ledger_name(ledger));

    qemu_co_mutex_lock(&ledger->lock);
    own = *ledger_own(ledger);
    own.log_void = true;
    if (qatomic_read(&ledger->log_void) ||
        ledger_write_own(ledger, &own, NULL) == 0 ||
        ledger_co_void_at_peer(ledger) == 0) {
        ret = 0;
    }
    qemu_co_mutex_unlock(&ledger->lock);
    error_append_hint(&local_err, "%s\n", ret ?
                      "Writes that have to be in the log fail." :
                      "After a crash, the next replica gets a full copy.");
    ledger_report(ledger, local_err);

    return ret;
}

int coroutine_fn replication_ledger_co_begin(ReplicationLedger *ledger,
                                             int64_t offset, int64_t bytes,
                                             bool alone)
{
    int ret;

    if (qatomic_read(&ledger->merged) ||
        (alone && qatomic_read(&ledger->at_base))) {
        ret = ledger_co_leave_base(ledger);
        if (ret < 0) {
            return ret;
        }
    }
    if (qatomic_read(&ledger->log_void)) {
        return 0;
    }
    ret = replication_log_co_begin(ledger->log, offset, bytes);
    if (replication_log_wants_tick(ledger->log)) {
        ledger_tick(ledger);
    }

    return ret < 0 ? ledger_co_void_log(ledger, ret) : 0;
}

bool replication_ledger_go_alone(ReplicationLedger *ledger, Error **errp)
{
    ERRP_GUARD();

    GLOBAL_STATE_CODE();

    if (!replication_ledger_is_open(ledger) ||
        ledger_leave_base(ledger, errp) == 0) {
        return true;
    }
    /* Writes try again, and fail with it */
    if (!qatomic_xchg(&ledger->failed, true)) {
        replication_report_error(ledger->bs, REPLICATION_ERROR_REASON_METADATA,
                                 error_get_pretty(*errp));
    }

    return false;
}

static int coroutine_mixed_fn ledger_forget(ReplicationLedger *ledger,
                                            Error **errp)
{
    ReplicationOwnRecord own = *ledger_own(ledger);

    if (qatomic_read(&ledger->at_base)) {
        ledger_rotate(ledger, &own);
    }
    own.log_void = true;
    own.size = replication_changes_size(ledger->changes);

    return ledger_write_own(ledger, &own, errp);
}

bool coroutine_mixed_fn
replication_ledger_may_resize(ReplicationLedger *ledger, int64_t length,
                              Error **errp)
{
    BlockDriverState *bs = replication_meta_child(ledger->meta)->bs;
    int64_t has = bdrv_getlength(bs);
    int64_t wanted = replication_meta_size(MAX(length, 0));

    if (!ledger->log) {
        error_setg(errp, "Cannot resize replication node '%s': its metadata "
                   "was not read", ledger_name(ledger));
        return false;
    }
    if (has < wanted) {
        error_setg(errp, "Cannot resize replication node '%s': its metadata "
                   "'%s' has %" PRId64 " bytes, and would need %" PRId64,
                   ledger_name(ledger), bdrv_get_node_name(bs), has, wanted);
        error_append_hint(errp, "Make it larger with qemu-img resize, without "
                          "the node.\n");
        return false;
    }

    return ledger_forget(ledger, errp) == 0;
}

void coroutine_mixed_fn replication_ledger_resized(ReplicationLedger *ledger)
{
    Error *local_err = NULL;

    if (!ledger->log) {
        return;
    }
    ledger->knows_changes = false;
    replication_log_resize(ledger->log,
                           replication_changes_size(ledger->changes));
    /* If this fails, the size will tell that the log is void */
    if (ledger_forget(ledger, &local_err) < 0) {
        ledger_report(ledger, local_err);
    }
}

static BlockDriverState *ledger_link(void *opaque)
{
    ReplicationLedger *ledger = opaque;

    return replication_meta_child(ledger->peer)->bs;
}

void replication_ledger_lose_peer(ReplicationLedger *ledger)
{
    qemu_bh_schedule(ledger->lose_bh);
}

static bool ledger_read_peer(ReplicationLedger *ledger, Error **errp)
{
    int64_t size = replication_changes_size(ledger->changes);
    int ret = replication_meta_load(ledger->peer, size, errp);

    if (ret < 0) {
        return false;
    }
    ret = replication_log_load(ledger->peer_log);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Replication node '%s': failed to read "
                         "the log of its replica", ledger_name(ledger));
    }

    return ret == 0;
}

bool replication_ledger_meet(ReplicationLedger *ledger, BdrvChild *child,
                             Error **errp)
{
    GLOBAL_STATE_CODE();

    ledger->peer = replication_meta_new(ledger->bs, child);
    ledger->peer_log =
        replication_log_new(child, replication_changes_size(ledger->changes),
                            NULL, 0);
    qemu_bh_cancel(ledger->lose_bh);
    ledger->watch = replication_watch_new(ledger->bs, ledger->timeout_ms,
                                          ledger_link, ledger_cut_peer, ledger);

    return ledger_read_peer(ledger, errp);
}

BdrvChild *replication_ledger_leave(ReplicationLedger *ledger)
{
    BdrvChild *child;

    if (!ledger->peer) {
        return NULL;
    }
    qatomic_set(&ledger->told, false);
    child = replication_meta_child(ledger->peer);
    replication_watch_free(g_steal_pointer(&ledger->watch));
    g_clear_pointer(&ledger->peer_log, replication_log_free);
    g_clear_pointer(&ledger->peer, replication_meta_free);

    return child;
}

void replication_ledger_abandon(ReplicationLedger *ledger)
{
    GLOBAL_STATE_CODE();
    GRAPH_RDLOCK_GUARD_MAINLOOP();

    if (ledger->peer) {
        bdrv_cut_connection(replication_meta_child(ledger->peer)->bs);
    }
}

bool replication_ledger_judge(ReplicationLedger *ledger, bool full,
                              bool discard_peer, ReplicationRuling *ruling,
                              Error **errp)
{
    ReplicationOwnRecord own = *ledger_own(ledger);
    int64_t offset, bytes;
    ReplicationQuestion q = {
        .name           = ledger_name(ledger),
        .peer_name      = bdrv_get_node_name(
                              replication_meta_child(ledger->peer)->bs),
        .own            = &own,
        .peer           = replication_meta_records(ledger->peer),
        .peer_log_empty = !replication_log_next(ledger->peer_log, 0, &offset,
                                                &bytes),
        .full           = full,
        .discard_peer   = discard_peer,
    };

    /* In memory there may be what the log has lost */
    own.log_void = !ledger->knows_changes;

    return replication_meta_judge(&q, ruling, errp);
}

static void ledger_note_peer(ReplicationLedger *ledger,
                             const ReplicationRuling *ruling)
{
    int64_t offset = 0, bytes = 0;

    if (ruling->full) {
        replication_changes_note(ledger->changes, 0,
                                 replication_changes_size(ledger->changes));
    } else if (ruling->merge_log) {
        while (replication_log_next(ledger->peer_log, offset + bytes, &offset,
                                    &bytes)) {
            replication_changes_note(ledger->changes, offset, bytes);
        }
    }
}

/*
 * Nobody but this peer can have heard of our generation since it is ours, and
 * so the name need not be another one
 */
static bool ledger_knows_only_us(ReplicationLedger *ledger,
                                 const ReplicationOwnRecord *own)
{
    const ReplicationRecords *r = ledger->peer ?
                                  replication_meta_records(ledger->peer) : NULL;

    if (!r) {
        return false;
    }
    if (qemu_uuid_is_equal(&ledger->unheard, &own->current) &&
        qemu_uuid_is_equal(&ledger->unheard_by, &r->own.instance)) {
        return true;
    }

    return replication_records_has_peer(r) &&
           r->peer.kind == REPLICATION_PEER_SYNC &&
           qemu_uuid_is_equal(&r->peer.generation, &own->current);
}

/*
 * From now on this disk, with its log, is enough to know what the peer's may
 * lack
 */
static bool ledger_take_peer(ReplicationLedger *ledger, bool full, Error **errp)
{
    ReplicationOwnRecord own = *ledger_own(ledger);

    qatomic_set(&ledger->void_at_peer, false);
    own.log_void = replication_log_write_changes(ledger->log,
                                                 ledger->changes) < 0;
    if (!ledger_knows_only_us(ledger, &own)) {
        ledger_rotate(ledger, &own);
    }
    if (full) {
        own.base = own.current;
    }
    if (ledger_write_own(ledger, &own, errp) < 0) {
        return false;
    }
    ledger->knows_changes = true;
    qatomic_set(&ledger->failed, own.log_void);

    return true;
}

bool replication_ledger_announce(ReplicationLedger *ledger,
                                 const ReplicationRuling *ruling, Error **errp)
{
    GLOBAL_STATE_CODE();

    ledger_note_peer(ledger, ruling);
    qatomic_set(&ledger->confirmed, false);
    if (!ledger_take_peer(ledger, ruling->full, errp)) {
        return false;
    }
    if (!ledger->peer) {
        return true;
    }
    ledger->unheard = ledger_own(ledger)->current;
    ledger->unheard_by = replication_meta_records(ledger->peer)->own.instance;
    if (!ledger_tell_peer(ledger, REPLICATION_PEER_SYNC, ruling->full, errp)) {
        return false;
    }
    ledger->unheard = (QemuUUID) {};
    qatomic_set(&ledger->told, true);

    return true;
}

/* Whether nobody has written there since we did */
static bool ledger_check_announced(ReplicationLedger *ledger, Error **errp)
{
    const ReplicationRecords *r = replication_meta_records(ledger->peer);
    const ReplicationPeerRecord *ours = &ledger->announced;
    char generation[UUID_STR_LEN], other[UUID_STR_LEN];

    if (replication_meta_load_peer(ledger->peer, errp) < 0) {
        return false;
    }
    if (r->peer.sequence == ours->sequence && r->peer.kind == ours->kind &&
        qemu_uuid_is_equal(&r->peer.generation, &ours->generation) &&
        qemu_uuid_is_equal(&r->peer.instance, &ours->instance)) {
        return true;
    }
    qemu_uuid_unparse(&ours->generation, generation);
    qemu_uuid_unparse(&r->peer.generation, other);
    error_setg(errp, "The replica of replication node '%s' was brought in step "
               "with generation %s, and somebody has announced generation %s "
               "there", ledger_name(ledger), generation, other);
    error_append_hint(errp, "Another primary uses the same replica. Stop one "
                      "of the two.\n");

    return false;
}

/*
 * First here: if we crash before the replica knows, it cannot take over, and
 * what we change alone after that gets another generation.
 */
bool replication_ledger_confirm(ReplicationLedger *ledger, Error **errp)
{
    ReplicationOwnRecord own = *ledger_own(ledger);

    GLOBAL_STATE_CODE();

    if (!qatomic_read(&ledger->at_base)) {
        own.base = own.current;
        if (ledger_write_own(ledger, &own, errp) < 0) {
            return false;
        }
    }
    qatomic_set(&ledger->confirmed, true);
    /* Errors that were reported are forgotten by a start */
    qatomic_set(&ledger->failed, false);
    /* What was copied is in the log, perhaps all of the disk */
    ledger_tick_in(ledger, 0);

    return !ledger->peer ||
           (ledger_check_announced(ledger, errp) &&
            ledger_tell_peer(ledger, REPLICATION_PEER_STARTED, false, errp));
}

bool replication_ledger_is_confirmed(ReplicationLedger *ledger)
{
    return qatomic_read(&ledger->confirmed);
}

void replication_ledger_fill_stats(ReplicationLedger *ledger,
                                   BlockStatsReplicationPrimary *stats)
{
    if (!ledger->log) {
        return;
    }
    stats->has_log_regions = true;
    stats->log_regions = replication_log_regions(ledger->log);
    stats->has_cold_writes = true;
    stats->cold_writes = replication_log_cold_writes(ledger->log);

    QEMU_LOCK_GUARD(&ledger->stats_lock);
    stats->generation = qemu_uuid_unparse_strdup(&ledger->current);
    if (!qemu_uuid_is_null(&ledger->base)) {
        stats->base_generation = qemu_uuid_unparse_strdup(&ledger->base);
    }
}
