/*
 * Block replication: what a disk's metadata says of it
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/bswap.h"
#include "qemu/crc32c.h"
#include "qemu/cutils.h"
#include "qemu/memalign.h"
#include "block/block-io.h"
#include "block/block_int.h"
#include "replication-meta.h"

#define META_VERSION 1

static const char own_magic[8] = "QREPLOWN";
static const char peer_magic[8] = "QREPLPEE";

/* Numbers are little endian.  What is reserved is zero. */
typedef struct QEMU_PACKED RecordHeader {
    char magic[8];
    uint32_t version;
    uint32_t kind;
    uint64_t sequence;
    uint64_t size;
    uint32_t region_bytes;
    uint32_t flags;
} RecordHeader;

#define OWN_LOG_VOID    0x1
#define PEER_FULL       0x1
#define PEER_LOG_VOID   0x2

typedef struct QEMU_PACKED OwnDisk {
    RecordHeader header;
    uint32_t role;
    uint32_t state;
    uint64_t absorbed;
    uint8_t reserved[8];
    QemuUUID disk_id;
    QemuUUID current;
    QemuUUID base;
    QemuUUID instance;
    QemuUUID history[REPLICATION_META_HISTORY];
    char active[REPLICATION_META_NAME];
    char hidden[REPLICATION_META_NAME];
    uint8_t unused[1788];
    uint32_t crc32c;
} OwnDisk;

QEMU_BUILD_BUG_ON(sizeof(OwnDisk) != REPLICATION_META_RECORD);

typedef struct QEMU_PACKED PeerDisk {
    RecordHeader header;
    uint8_t reserved[24];
    QemuUUID disk_id;
    QemuUUID generation;
    QemuUUID instance;
    uint8_t unused[3980];
    uint32_t crc32c;
} PeerDisk;

QEMU_BUILD_BUG_ON(sizeof(PeerDisk) != REPLICATION_META_RECORD);

struct ReplicationMeta {
    BlockDriverState *bs;
    BdrvChild *child;
    ReplicationRecords records;

    /* Of both copies of a record, and whether each is valid */
    bool own_valid[2];
    bool peer_valid[2];
    /* The copy that was read or written last, and is the newer one */
    int own_copy;
    int peer_copy;
};

static uint32_t record_crc(const void *buf)
{
    return crc32c(0xffffffff, buf,
                  REPLICATION_META_RECORD - sizeof(uint32_t));
}

static void record_set_header(RecordHeader *header, const char *magic,
                              uint32_t kind, uint32_t flags, uint64_t sequence,
                              int64_t size)
{
    memcpy(header->magic, magic, sizeof(header->magic));
    header->version = cpu_to_le32(META_VERSION);
    header->kind = cpu_to_le32(kind);
    header->sequence = cpu_to_le64(sequence);
    header->size = cpu_to_le64(size);
    header->region_bytes = cpu_to_le32(REPLICATION_META_REGION);
    header->flags = cpu_to_le32(flags);
}

void replication_own_record_encode(const ReplicationOwnRecord *own,
                                   uint8_t *buf)
{
    OwnDisk disk = {
        .role       = cpu_to_le32(own->role),
        .state      = cpu_to_le32(own->state),
        .absorbed   = cpu_to_le64(own->absorbed),
        .disk_id    = own->disk_id,
        .current    = own->current,
        .base       = own->base,
        .instance   = own->instance,
    };

    record_set_header(&disk.header, own_magic, 0,
                      own->log_void ? OWN_LOG_VOID : 0, own->sequence,
                      own->size);
    memcpy(disk.history, own->history, sizeof(disk.history));
    pstrcpy(disk.active, sizeof(disk.active), own->active);
    pstrcpy(disk.hidden, sizeof(disk.hidden), own->hidden);
    disk.crc32c = cpu_to_le32(record_crc(&disk));
    memcpy(buf, &disk, sizeof(disk));
}

void replication_peer_record_encode(const ReplicationPeerRecord *peer,
                                    uint8_t *buf)
{
    PeerDisk disk = {
        .disk_id    = peer->disk_id,
        .generation = peer->generation,
        .instance   = peer->instance,
    };
    uint32_t flags = (peer->full ? PEER_FULL : 0) |
                     (peer->log_void ? PEER_LOG_VOID : 0);

    record_set_header(&disk.header, peer_magic, peer->kind, flags,
                      peer->sequence, peer->size);
    disk.crc32c = cpu_to_le32(record_crc(&disk));
    memcpy(buf, &disk, sizeof(disk));
}

/* What can be said of any record; the rest only if this is VALID */
static ReplicationRecordStatus record_check(const uint8_t *buf,
                                            const char *magic)
{
    RecordHeader header;

    if (buffer_is_zero(buf, REPLICATION_META_RECORD)) {
        return REPLICATION_RECORD_FRESH;
    }
    memcpy(&header, buf, sizeof(header));
    if (memcmp(header.magic, magic, sizeof(header.magic)) ||
        ldl_le_p(buf + REPLICATION_META_RECORD - sizeof(uint32_t)) !=
        record_crc(buf)) {
        return REPLICATION_RECORD_CORRUPT;
    }
    if (le32_to_cpu(header.version) != META_VERSION ||
        le32_to_cpu(header.region_bytes) != REPLICATION_META_REGION) {
        return REPLICATION_RECORD_UNKNOWN;
    }

    return (int64_t)le64_to_cpu(header.size) < 0 || !header.sequence ?
           REPLICATION_RECORD_CORRUPT : REPLICATION_RECORD_VALID;
}

ReplicationRecordStatus
replication_own_record_decode(ReplicationOwnRecord *own, const uint8_t *buf)
{
    ReplicationRecordStatus status = record_check(buf, own_magic);
    uint32_t role, state, flags;
    OwnDisk disk;

    *own = (ReplicationOwnRecord) {};
    if (status != REPLICATION_RECORD_VALID) {
        return status;
    }
    memcpy(&disk, buf, sizeof(disk));
    role = le32_to_cpu(disk.role);
    state = le32_to_cpu(disk.state);
    flags = le32_to_cpu(disk.header.flags);
    if (role > REPLICATION_META_ROLE_SECONDARY ||
        state > REPLICATION_META_STATE_MERGING || flags & ~OWN_LOG_VOID) {
        return REPLICATION_RECORD_UNKNOWN;
    }
    *own = (ReplicationOwnRecord) {
        .sequence   = le64_to_cpu(disk.header.sequence),
        .size       = le64_to_cpu(disk.header.size),
        .disk_id    = disk.disk_id,
        .current    = disk.current,
        .base       = disk.base,
        .role       = role,
        .state      = state,
        .log_void   = flags & OWN_LOG_VOID,
        .absorbed   = le64_to_cpu(disk.absorbed),
        .instance   = disk.instance,
    };
    memcpy(own->history, disk.history, sizeof(own->history));
    pstrcpy(own->active, sizeof(own->active), disk.active);
    pstrcpy(own->hidden, sizeof(own->hidden), disk.hidden);

    return REPLICATION_RECORD_VALID;
}

ReplicationRecordStatus
replication_peer_record_decode(ReplicationPeerRecord *peer, const uint8_t *buf)
{
    ReplicationRecordStatus status = record_check(buf, peer_magic);
    uint32_t kind, flags;
    PeerDisk disk;

    *peer = (ReplicationPeerRecord) {};
    if (status != REPLICATION_RECORD_VALID) {
        return status;
    }
    memcpy(&disk, buf, sizeof(disk));
    kind = le32_to_cpu(disk.header.kind);
    flags = le32_to_cpu(disk.header.flags);
    if (kind > REPLICATION_PEER_STARTED ||
        flags & ~(PEER_FULL | PEER_LOG_VOID)) {
        return REPLICATION_RECORD_UNKNOWN;
    }
    *peer = (ReplicationPeerRecord) {
        .sequence   = le64_to_cpu(disk.header.sequence),
        .kind       = kind,
        .full       = flags & PEER_FULL,
        .log_void   = flags & PEER_LOG_VOID,
        .size       = le64_to_cpu(disk.header.size),
        .disk_id    = disk.disk_id,
        .generation = disk.generation,
        .instance   = disk.instance,
    };

    return REPLICATION_RECORD_VALID;
}

void replication_own_record_rotate(ReplicationOwnRecord *own)
{
    if (!qemu_uuid_is_null(&own->current)) {
        memmove(&own->history[1], &own->history[0],
                sizeof(own->history) - sizeof(own->history[0]));
        own->history[0] = own->current;
    }
    qemu_uuid_generate(&own->current);
}

/* After another length of the disk, nobody knows what is where */
static void own_record_set_size(ReplicationOwnRecord *own, int64_t size)
{
    if (own->size != size && own->size) {
        own->log_void = true;
    }
    own->size = size;
}

ReplicationOwnRecord replication_records_open(const ReplicationRecords *r,
                                              ReplicationMetaRole role,
                                              int64_t size)
{
    ReplicationOwnRecord own = r->own;

    if (!replication_records_has_peer(r)) {
        own.absorbed = MAX(own.absorbed, r->peer.sequence);
    }
    own.role = role;
    own_record_set_size(&own, size);
    if (role == REPLICATION_META_ROLE_SECONDARY) {
        qemu_uuid_generate(&own.instance);
    } else if (qemu_uuid_is_null(&own.current)) {
        qemu_uuid_generate(&own.disk_id);
        replication_own_record_rotate(&own);
    }

    return own;
}

bool replication_records_has_peer(const ReplicationRecords *r)
{
    return r->peer_status == REPLICATION_RECORD_VALID &&
           r->peer.kind != REPLICATION_PEER_NONE &&
           r->own.role != REPLICATION_META_ROLE_PRIMARY &&
           r->peer.sequence > r->own.absorbed;
}

bool replication_records_is_fresh(const ReplicationRecords *r)
{
    return !replication_records_has_peer(r) &&
           (r->own_status == REPLICATION_RECORD_FRESH ||
            (r->own_status == REPLICATION_RECORD_VALID &&
             qemu_uuid_is_null(&r->own.current)));
}

/* Why nothing is known, or NULL */
static const char *records_unreadable(const ReplicationRecords *r)
{
    if (r->own_status == REPLICATION_RECORD_UNKNOWN ||
        r->peer_status == REPLICATION_RECORD_UNKNOWN) {
        return "is of a newer version";
    }
    if (r->own_status == REPLICATION_RECORD_CORRUPT ||
        (r->peer_status == REPLICATION_RECORD_CORRUPT &&
         r->own.role != REPLICATION_META_ROLE_PRIMARY)) {
        return "is damaged";
    }

    return NULL;
}

bool replication_records_check_usable(const ReplicationRecords *r,
                                      const char *name, Error **errp)
{
    const char *unreadable = records_unreadable(r);
    char generation[UUID_STR_LEN];

    if (unreadable) {
        error_setg(errp, "The metadata of replication node '%s' %s", name,
                   unreadable);
        error_append_hint(errp, "If the disk is known to be whole, fill the "
                          "metadata with zeroes: then the next replica gets a "
                          "full copy.\n");
        return false;
    }
    if (r->own.state == REPLICATION_META_STATE_MERGING) {
        error_setg(errp, "Half of the data of replication node '%s' is in the "
                   "overlays '%s' and '%s', which were being merged", name,
                   r->own.active, r->own.hidden);
        error_append_hint(errp, "Commit the overlays to the disk, and fill the "
                          "metadata with zeroes. If they are not there, use "
                          "the other side's disk.\n");
        return false;
    }
    if (!replication_records_has_peer(r)) {
        return true;
    }

    qemu_uuid_unparse(&r->peer.generation, generation);
    if (r->peer.kind == REPLICATION_PEER_SYNC) {
        error_setg(errp, "The disk of replication node '%s' was being brought "
                   "in step with generation %s, and is a mixture", name,
                   generation);
    } else {
        error_setg(errp, "The disk of replication node '%s' was overwritten "
                   "since the last checkpoint of generation %s, which was lost "
                   "with the secondary's process", name, generation);
    }
    error_append_hint(errp, "Use the primary's disk. This one can be its "
                      "replica again.\n");

    return false;
}

/* What the peer's disk is, whichever of its records says so */
typedef struct PeerView {
    bool syncing;
    bool started;
    /* One of the two has changed more than the logs have */
    bool log_void;
    int64_t size;
    QemuUUID disk_id;
    QemuUUID current;
    QemuUUID base;
} PeerView;

static PeerView peer_view(const ReplicationRecords *r)
{
    if (replication_records_has_peer(r)) {
        return (PeerView) {
            .syncing    = r->peer.kind == REPLICATION_PEER_SYNC,
            .started    = r->peer.kind == REPLICATION_PEER_STARTED,
            .log_void   = r->peer.log_void ||
                          (r->own.log_void &&
                           r->peer.kind != REPLICATION_PEER_STARTED),
            .size       = r->peer.size,
            .disk_id    = r->peer.disk_id,
            .current    = r->peer.generation,
            .base       = r->peer.generation,
        };
    }

    return (PeerView) {
        .log_void   = r->own.log_void,
        .size       = r->own.size,
        .disk_id    = r->own.disk_id,
        .current    = r->own.current,
        .base       = r->own.base,
    };
}

static bool same_generation(const QemuUUID *a, const QemuUUID *b)
{
    return !qemu_uuid_is_null(a) && qemu_uuid_is_equal(a, b);
}

static bool in_history(const ReplicationOwnRecord *own,
                       const QemuUUID *generation)
{
    for (int i = 0; i < REPLICATION_META_HISTORY; i++) {
        if (same_generation(&own->history[i], generation)) {
            return true;
        }
    }

    return false;
}

/* As in: Replication node 'top0' has generation ... */
static void G_GNUC_PRINTF(4, 5)
judge_refuse(const ReplicationQuestion *q, const PeerView *view, Error **errp,
             const char *format, ...)
{
    char own[UUID_STR_LEN], peer[UUID_STR_LEN];
    g_autofree char *text = NULL;
    va_list ap;

    va_start(ap, format);
    text = g_strdup_vprintf(format, ap);
    va_end(ap);
    qemu_uuid_unparse(&q->own->current, own);
    qemu_uuid_unparse(&view->current, peer);
    error_setg(errp, "Replication node '%s' has generation %s, its peer '%s' "
               "%s %s: %s", q->name, own, q->peer_name,
               view->syncing ? "is being brought in step with" :
               "has generation", peer, text);
}

static void judge_hint(Error **errp, bool discard)
{
    if (discard) {
        error_append_hint(errp, "Use the peer's disk, or give up what only the "
                          "peer has with discard-peer=true.\n");
    } else {
        error_append_hint(errp, "If the peer's disk may be overwritten, use "
                          "sync=full.\n");
    }
}

/* What nobody can compare: all is copied, if the user says so */
static bool judge_unknown(const ReplicationQuestion *q, const PeerView *view,
                          const char *unreadable, Error **errp)
{
    if (unreadable) {
        error_setg(errp, "The metadata '%s' of the peer of replication node "
                   "'%s' %s", q->peer_name, q->name, unreadable);
        if (q->peer->own_status == REPLICATION_RECORD_UNKNOWN ||
            q->peer->peer_status == REPLICATION_RECORD_UNKNOWN) {
            error_append_hint(errp, "Use a QEMU that knows it, or fill it with "
                              "zeroes.\n");
            return false;
        }
    } else if (!same_generation(&view->disk_id, &q->own->disk_id)) {
        judge_refuse(q, view, errp, "that is of another disk");
    } else if (view->size != q->own->size) {
        judge_refuse(q, view, errp, "that is of a disk of %" PRId64 " bytes, "
                     "and this one has %" PRId64, view->size, q->own->size);
    } else {
        judge_refuse(q, view, errp, "nothing is known of the peer's");
    }
    judge_hint(errp, false);

    return false;
}

/*
 * Whether the peer has data of its own, which a copy to it would destroy; then
 * @errp says which
 */
static bool judge_has_own_data(const ReplicationQuestion *q,
                               const PeerView *view, Error **errp)
{
    const ReplicationOwnRecord *own = q->own;

    if (q->peer->own.state == REPLICATION_META_STATE_MERGING) {
        judge_refuse(q, view, errp, "the peer's data is half in the overlays "
                     "'%s' and '%s', which were being merged",
                     q->peer->own.active, q->peer->own.hidden);
    } else if (view->syncing ||
               same_generation(&view->current, &own->base) ||
               same_generation(&view->current, &own->current)) {
        return false;
    } else if (same_generation(&view->base, &own->current)) {
        judge_refuse(q, view, errp, "the peer's is the newer one, and this "
                     "node's disk is stale");
    } else if (same_generation(&view->base, &own->base)) {
        if (q->peer_log_empty && !q->peer->own.log_void) {
            return false;
        }
        judge_refuse(q, view, errp, "both have changed since they were in "
                     "step");
    } else {
        return false;
    }
    judge_hint(errp, true);

    return true;
}

/*
 * Whether a primary that is none of ours has started with the secondary as it
 * is open now: it may still write there, and nobody could tell the two apart
 */
static bool judge_is_in_use(const ReplicationQuestion *q)
{
    const ReplicationPeerRecord *peer = &q->peer->peer;
    const ReplicationOwnRecord *own = q->own;

    if (!replication_records_has_peer(q->peer) ||
        peer->kind != REPLICATION_PEER_STARTED ||
        !qemu_uuid_is_equal(&peer->instance, &q->peer->own.instance)) {
        return false;
    }

    return !same_generation(&peer->disk_id, &own->disk_id) ||
           (!same_generation(&peer->generation, &own->current) &&
            !same_generation(&peer->generation, &own->base) &&
            !in_history(own, &peer->generation));
}

bool replication_meta_judge(const ReplicationQuestion *q,
                            ReplicationRuling *ruling, Error **errp)
{
    ERRP_GUARD();
    const ReplicationOwnRecord *own = q->own;
    const char *unreadable = records_unreadable(q->peer);
    PeerView view = peer_view(q->peer);

    *ruling = (ReplicationRuling) { .full = true };
    if (unreadable) {
        ruling->reason = "the peer's metadata is damaged";
        if (q->full &&
            q->peer->own_status != REPLICATION_RECORD_UNKNOWN &&
            q->peer->peer_status != REPLICATION_RECORD_UNKNOWN) {
            return true;
        }
        return judge_unknown(q, &view, unreadable, errp);
    }
    if (q->peer->own_status == REPLICATION_RECORD_VALID &&
        q->peer->own.role == REPLICATION_META_ROLE_PRIMARY) {
        judge_refuse(q, &view, errp, "the peer's is in use by a primary");
        error_append_hint(errp, "Open the peer's disk with mode=secondary and "
                          "this metadata first.\n");
        return false;
    }
    if (judge_is_in_use(q)) {
        judge_refuse(q, &view, errp, "it runs with another primary");
        error_append_hint(errp, "If that has ended, stop the secondary, or "
                          "remove its node and add it again.\n");
        return false;
    }
    if (replication_records_is_fresh(q->peer)) {
        ruling->reason = "the peer has had no data";
        return true;
    }
    if (!same_generation(&view.disk_id, &own->disk_id) ||
        view.size != own->size) {
        ruling->reason = "the peer's is another disk";
        return q->full || judge_unknown(q, &view, NULL, errp);
    }
    if (!q->discard_peer && judge_has_own_data(q, &view, errp)) {
        return false;
    }

    ruling->merge_log = !view.started;
    if (q->full) {
        ruling->reason = "that was asked for";
    } else if (q->peer->own.state == REPLICATION_META_STATE_MERGING) {
        ruling->reason = "the peer was half merged";
    } else if (own->log_void || view.log_void) {
        ruling->reason = "a log is void";
    } else if (same_generation(&view.current, &own->current) ||
               same_generation(&view.current, &own->base) ||
               (!view.syncing &&
                (same_generation(&view.base, &own->current) ||
                 same_generation(&view.base, &own->base)))) {
        ruling->full = false;
    } else if (in_history(own, &view.current)) {
        ruling->reason = "the peer is stale";
    } else {
        ruling->reason = "nothing is known of the peer's generation";
        return judge_unknown(q, &view, NULL, errp);
    }

    return true;
}

int64_t replication_meta_size(int64_t size)
{
    int64_t regions = DIV_ROUND_UP(size, REPLICATION_META_REGION);

    return REPLICATION_META_LOG +
           QEMU_ALIGN_UP(DIV_ROUND_UP(regions, 8), REPLICATION_META_RECORD);
}

ReplicationMeta *replication_meta_new(BlockDriverState *bs, BdrvChild *child)
{
    ReplicationMeta *meta = g_new0(ReplicationMeta, 1);

    meta->bs = bs;
    meta->child = child;

    return meta;
}

void replication_meta_free(ReplicationMeta *meta)
{
    g_free(meta);
}

BdrvChild *replication_meta_child(ReplicationMeta *meta)
{
    return meta->child;
}

const ReplicationRecords *replication_meta_records(ReplicationMeta *meta)
{
    return &meta->records;
}

/*
 * Of two copies.  The first record that is ever written gets both, so if one is
 * damaged and the other is nothing but zeroes, that was interrupted.
 */
static ReplicationRecordStatus
meta_combine(const ReplicationRecordStatus *status)
{
    for (int i = 0; i < 2; i++) {
        if (status[i] == REPLICATION_RECORD_UNKNOWN) {
            return status[i];
        }
    }
    for (int i = 0; i < 2; i++) {
        if (status[i] == REPLICATION_RECORD_VALID) {
            return status[i];
        }
    }

    return status[0] == REPLICATION_RECORD_FRESH ||
           status[1] == REPLICATION_RECORD_FRESH ? REPLICATION_RECORD_FRESH :
                                                   REPLICATION_RECORD_CORRUPT;
}

static void meta_decode_own(ReplicationMeta *meta, const uint8_t *buf)
{
    ReplicationRecordStatus status[2];
    ReplicationOwnRecord copies[2];

    for (int i = 0; i < 2; i++) {
        status[i] = replication_own_record_decode(&copies[i], buf +
                                                  i * REPLICATION_META_RECORD);
        meta->own_valid[i] = status[i] == REPLICATION_RECORD_VALID;
    }
    meta->own_copy = copies[1].sequence > copies[0].sequence;
    meta->records.own = copies[meta->own_copy];
    meta->records.own_status = meta_combine(status);
}

static void meta_decode_peer(ReplicationMeta *meta, const uint8_t *buf)
{
    ReplicationRecordStatus status[2];
    ReplicationPeerRecord copies[2];

    for (int i = 0; i < 2; i++) {
        status[i] = replication_peer_record_decode(&copies[i], buf +
                                                   i * REPLICATION_META_RECORD);
        meta->peer_valid[i] = status[i] == REPLICATION_RECORD_VALID;
    }
    meta->peer_copy = copies[1].sequence > copies[0].sequence;
    meta->records.peer = copies[meta->peer_copy];
    meta->records.peer_status = meta_combine(status);
}

static const char *meta_name(ReplicationMeta *meta)
{
    return bdrv_get_node_name(meta->child->bs);
}

static int meta_error(ReplicationMeta *meta, int ret, const char *what,
                      Error **errp)
{
    error_setg_errno(errp, -ret, "Replication node '%s': failed to %s its "
                     "metadata '%s'", bdrv_get_node_name(meta->bs), what,
                     meta_name(meta));
    return ret;
}

int coroutine_mixed_fn replication_meta_load(ReplicationMeta *meta,
                                             int64_t size, Error **errp)
{
    int64_t wanted = replication_meta_size(size);
    int64_t length = bdrv_getlength(meta->child->bs);
    uint8_t *buf;
    int ret;

    if (length < 0) {
        return meta_error(meta, length, "get the length of", errp);
    }
    if (length < wanted) {
        error_setg(errp, "The metadata '%s' of replication node '%s' has "
                   "%" PRId64 " bytes, and a disk of %" PRId64 " bytes needs "
                   "%" PRId64, meta_name(meta), bdrv_get_node_name(meta->bs),
                   length, size, wanted);
        error_append_hint(errp, "Make it larger with qemu-img resize.\n");
        return -ENOSPC;
    }

    buf = qemu_blockalign(meta->child->bs, REPLICATION_META_LOG);
    ret = bdrv_pread(meta->child, 0, REPLICATION_META_LOG, buf, 0);
    if (ret == 0) {
        meta_decode_own(meta, buf + REPLICATION_META_OWN);
        meta_decode_peer(meta, buf + REPLICATION_META_PEER);
    } else {
        meta_error(meta, ret, "read", errp);
    }
    qemu_vfree(buf);

    return ret;
}

int coroutine_mixed_fn replication_meta_load_peer(ReplicationMeta *meta,
                                                  Error **errp)
{
    uint8_t *buf = qemu_blockalign(meta->child->bs,
                                   2 * REPLICATION_META_RECORD);
    int ret = bdrv_pread(meta->child, REPLICATION_META_PEER,
                         2 * REPLICATION_META_RECORD, buf, 0);

    if (ret == 0) {
        meta_decode_peer(meta, buf);
    } else {
        meta_error(meta, ret, "read", errp);
    }
    qemu_vfree(buf);

    return ret;
}

/* To the copy that is not @copy, and to that as well if it is not valid */
static int coroutine_mixed_fn
meta_write(ReplicationMeta *meta, int64_t offset, const uint8_t *buf, int *copy,
           bool *valid, Error **errp)
{
    int ret = 0;

    do {
        int to = !*copy;

        valid[to] = false;
        ret = bdrv_pwrite(meta->child, offset + to * REPLICATION_META_RECORD,
                          REPLICATION_META_RECORD, buf, BDRV_REQ_FUA);
        if (ret < 0) {
            return meta_error(meta, ret, "write", errp);
        }
        valid[to] = true;
        *copy = to;
    } while (!valid[!*copy]);

    return 0;
}

int coroutine_mixed_fn
replication_meta_write_own(ReplicationMeta *meta,
                           const ReplicationOwnRecord *own, Error **errp)
{
    uint8_t *buf = qemu_blockalign(meta->child->bs, REPLICATION_META_RECORD);
    ReplicationOwnRecord record = *own;
    int ret;

    record.sequence = meta->records.own.sequence + 1;
    replication_own_record_encode(&record, buf);
    ret = meta_write(meta, REPLICATION_META_OWN, buf, &meta->own_copy,
                     meta->own_valid, errp);
    if (ret == 0) {
        meta->records.own = record;
        meta->records.own_status = REPLICATION_RECORD_VALID;
    }
    qemu_vfree(buf);

    return ret;
}

int coroutine_mixed_fn
replication_meta_write_peer(ReplicationMeta *meta,
                            const ReplicationPeerRecord *peer, Error **errp)
{
    uint8_t *buf = qemu_blockalign(meta->child->bs, REPLICATION_META_RECORD);
    ReplicationPeerRecord record = *peer;
    int ret;

    record.sequence = MAX(meta->records.peer.sequence,
                          meta->records.own.absorbed) + 1;
    replication_peer_record_encode(&record, buf);
    ret = meta_write(meta, REPLICATION_META_PEER, buf, &meta->peer_copy,
                     meta->peer_valid, errp);
    if (ret == 0) {
        meta->records.peer = record;
        meta->records.peer_status = REPLICATION_RECORD_VALID;
    }
    qemu_vfree(buf);

    return ret;
}
