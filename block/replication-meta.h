/*
 * Block replication: what a disk's metadata says of it
 *
 * Beside each disk there is a small file, the metadata.  It has a record of its
 * own side, one that the peer writes over NBD, and the write-intent log, which
 * is in replication-log.h.  docs/replication-metadata.txt has the format.
 *
 * A generation is a UUID that stands for the data of a disk.  Two disks that
 * count from the same one, their base, differ only within their two logs.
 *
 * Who calls what:
 *
 *   the owner of a disk     replication_meta_new(), _load() and _write_own(),
 *                           on the node's child "metadata"
 *   a primary that syncs    the same functions but _write_own() on its link to
 *                           the peer's metadata; then replication_meta_judge(),
 *                           and _write_peer() to announce itself
 *   a secondary             _load_peer(), to see who has announced itself
 *
 * A ReplicationMeta has no lock.  Functions marked coroutine_mixed_fn may be
 * called in a coroutine, with the graph lock, or in the main loop without a
 * coroutine, where they poll.  For the same ReplicationMeta they must not run
 * at the same time: the node is drained, or the caller has a lock of its own.
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#ifndef BLOCK_REPLICATION_META_H
#define BLOCK_REPLICATION_META_H

#include "block/block-common.h"
#include "qemu/uuid.h"

/* What is where */
#define REPLICATION_META_RECORD  4096
#define REPLICATION_META_OWN     0
#define REPLICATION_META_PEER    (2 * REPLICATION_META_RECORD)
#define REPLICATION_META_LOG     (4 * REPLICATION_META_RECORD)

/* A bit of the log for so many bytes of the disk */
#define REPLICATION_META_REGION_BITS 20
#define REPLICATION_META_REGION (1LL << REPLICATION_META_REGION_BITS)

#define REPLICATION_META_HISTORY 8

/* Of the name of an overlay, with a NUL at the end */
#define REPLICATION_META_NAME    1024

typedef enum ReplicationMetaRole {
    REPLICATION_META_ROLE_NONE,
    REPLICATION_META_ROLE_PRIMARY,
    REPLICATION_META_ROLE_SECONDARY,
} ReplicationMetaRole;

typedef enum ReplicationMetaState {
    REPLICATION_META_STATE_OK,
    /* A part of the data is in the overlays that the record names */
    REPLICATION_META_STATE_MERGING,
} ReplicationMetaState;

/* Written by the owner of the disk */
typedef struct ReplicationOwnRecord {
    /* 0 if there is none; else replication_meta_write_own() counts it up */
    uint64_t sequence;

    int64_t size;
    /* The same for a disk and its replicas; null if it has had no data */
    QemuUUID disk_id;

    /* Of the data, and of the last checkpoint that both sides had, or null */
    QemuUUID current;
    QemuUUID base;
    /* What was current before, the last one first; null where there is none */
    QemuUUID history[REPLICATION_META_HISTORY];

    ReplicationMetaRole role;
    ReplicationMetaState state;
    /* Something was changed, and the log does not say what */
    bool log_void;

    /* The sequence of the peer record that this one takes account of */
    uint64_t absorbed;

    /* Made up whenever a secondary opens the disk */
    QemuUUID instance;

    char active[REPLICATION_META_NAME];
    char hidden[REPLICATION_META_NAME];
} ReplicationOwnRecord;

typedef enum ReplicationPeerKind {
    REPLICATION_PEER_NONE,
    /* The disk is being brought in step with generation @generation */
    REPLICATION_PEER_SYNC,
    /* It has been, and replication runs */
    REPLICATION_PEER_STARTED,
} ReplicationPeerKind;

/* Written by the primary whose replica the disk is */
typedef struct ReplicationPeerRecord {
    uint64_t sequence;
    ReplicationPeerKind kind;
    /* SYNC: everything is copied, and what is overwritten is of no more use */
    bool full;
    /* The primary has changed something, and its log does not say what */
    bool log_void;
    int64_t size;
    QemuUUID disk_id;
    QemuUUID generation;
    /* Of the secondary that the primary means */
    QemuUUID instance;
} ReplicationPeerRecord;

typedef enum ReplicationRecordStatus {
    /* Nothing but zeroes */
    REPLICATION_RECORD_FRESH,
    REPLICATION_RECORD_VALID,
    /* Neither copy is valid */
    REPLICATION_RECORD_CORRUPT,
    /* It has a version that we do not know */
    REPLICATION_RECORD_UNKNOWN,
} ReplicationRecordStatus;

/* What the metadata says, apart from the log */
typedef struct ReplicationRecords {
    ReplicationRecordStatus own_status;
    ReplicationOwnRecord own;
    ReplicationRecordStatus peer_status;
    ReplicationPeerRecord peer;
} ReplicationRecords;

/* Of a record, for the tests: from and to REPLICATION_META_RECORD bytes */
void replication_own_record_encode(const ReplicationOwnRecord *own,
                                   uint8_t *buf);
void replication_peer_record_encode(const ReplicationPeerRecord *peer,
                                    uint8_t *buf);
ReplicationRecordStatus
replication_own_record_decode(ReplicationOwnRecord *own, const uint8_t *buf);
ReplicationRecordStatus
replication_peer_record_decode(ReplicationPeerRecord *peer, const uint8_t *buf);

/*
 * Another generation is current from now on, and the old one is history.  Does
 * not touch the base.
 */
void replication_own_record_rotate(ReplicationOwnRecord *own);

/*
 * What the owner is to write when it opens the disk of @size bytes: the own
 * record of @r in another role, with a name for a disk that has none yet.  An
 * announcement that is not for this role is over.  A secondary gets a new
 * instance, a primary a generation if its disk has none.
 */
ReplicationOwnRecord replication_records_open(const ReplicationRecords *r,
                                              ReplicationMetaRole role,
                                              int64_t size);

/*
 * Whether the peer record counts: it was written since the own record took
 * account of one, and the disk is not a primary's
 */
bool replication_records_has_peer(const ReplicationRecords *r);

/* Whether the disk has had no data: neither record says of what generation */
bool replication_records_is_fresh(const ReplicationRecords *r);

/*
 * Whether the guest may use the disk of node @name as it is, with these
 * records: it is whole, and of one point in time
 */
bool replication_records_check_usable(const ReplicationRecords *r,
                                      const char *name, Error **errp);

/* What has to be copied to a peer */
typedef struct ReplicationRuling {
    bool full;
    /* The peer's log says what the peer changed; else there is nothing to it */
    bool merge_log;
    /* Why it is full, for a message; or NULL */
    const char *reason;
} ReplicationRuling;

typedef struct ReplicationQuestion {
    /* The names of the node and of the one that leads to the peer's metadata */
    const char *name;
    const char *peer_name;

    /* Valid, as a primary has it */
    const ReplicationOwnRecord *own;
    const ReplicationRecords *peer;
    bool peer_log_empty;

    /* The user wants all to be copied, or gives up what only the peer has */
    bool full;
    bool discard_peer;
} ReplicationQuestion;

/*
 * What a primary has to copy to its peer, or an error if that may lose what
 * only the peer has.  A pure function.
 */
bool replication_meta_judge(const ReplicationQuestion *q,
                            ReplicationRuling *ruling, Error **errp);

typedef struct ReplicationMeta ReplicationMeta;

/* How large the metadata of a disk of @size bytes has to be */
int64_t replication_meta_size(int64_t size);

/* The metadata in @child, for messages of node @bs.  Nothing is read. */
ReplicationMeta *replication_meta_new(BlockDriverState *bs, BdrvChild *child);
void replication_meta_free(ReplicationMeta *meta);

BdrvChild *replication_meta_child(ReplicationMeta *meta);

/*
 * Read both records.  Returns a negative errno if they could not be read, or
 * the metadata is too small for a disk of @size bytes.  That records are
 * invalid is no error here.
 */
int coroutine_mixed_fn replication_meta_load(ReplicationMeta *meta,
                                             int64_t size, Error **errp);

/* Read the peer record again; the node need not be drained */
int coroutine_mixed_fn replication_meta_load_peer(ReplicationMeta *meta,
                                                  Error **errp);

/* What was read or written last */
const ReplicationRecords *replication_meta_records(ReplicationMeta *meta);

/*
 * Write a record in place of the older of its two copies, with FUA.  @own or
 * @peer need no sequence.  On failure, the metadata has the old record, or the
 * new one; it is written once more by the next call.
 */
int coroutine_mixed_fn
replication_meta_write_own(ReplicationMeta *meta,
                           const ReplicationOwnRecord *own, Error **errp);
int coroutine_mixed_fn
replication_meta_write_peer(ReplicationMeta *meta,
                            const ReplicationPeerRecord *peer, Error **errp);

#endif /* BLOCK_REPLICATION_META_H */
