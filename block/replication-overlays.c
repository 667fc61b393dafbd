/*
 * Block replication: the files of a secondary that makes its own overlays
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */

#include "qemu/osdep.h"
#include "qapi/error.h"
#include "qemu/error-report.h"
#include "qemu/option.h"
#include "qemu/units.h"
#include "qobject/qdict.h"
#include "block/thread-pool.h"
#include "replication-overlays.h"
#include "replication-secondary.h"

/*
 * The guest's writes, and what is copied before the primary's, are rounded to
 * subclusters, 32 in a cluster.  The copies are serialised by clusters.
 */
#define ACTIVE_CLUSTER (128 * KiB)
#define HIDDEN_CLUSTER (64 * KiB)

/* Where the overlays of a disk are that is no regular file */
#define DEFAULT_DIR "/var/tmp"

typedef struct Overlay {
    /* While it means nothing without us, and else */
    char *scratch;
    char *kept;

    /* The file is there by the name of... */
    bool is_scratch;
    bool is_kept;
} Overlay;

struct ReplicationOverlays {
    BlockDriverState *bs;
    char *wanted_dir;
    char *dir;
    Overlay active;
    Overlay hidden;
};

static const char *overlays_node(const ReplicationOverlays *o)
{
    return bdrv_get_node_name(o->bs);
}

ReplicationOverlays *replication_overlays_new(BlockDriverState *bs,
                                              const char *dir)
{
    ReplicationOverlays *o = g_new0(ReplicationOverlays, 1);

    GLOBAL_STATE_CODE();

    o->bs = bs;
    o->wanted_dir = g_strdup(dir);

    return o;
}

static void overlay_free(Overlay *overlay)
{
    g_free(overlay->scratch);
    g_free(overlay->kept);
}

void replication_overlays_free(ReplicationOverlays *o)
{
    GLOBAL_STATE_CODE();

    overlay_free(&o->active);
    overlay_free(&o->hidden);
    g_free(o->wanted_dir);
    g_free(o->dir);
    g_free(o);
}

/* The file or the device that the data of @bs is in, or NULL */
static const char *GRAPH_RDLOCK overlays_image(BlockDriverState *bs)
{
    BlockDriverState *below;

    while ((below = bdrv_primary_bs(bs))) {
        bs = below;
    }
    if (!bs->drv || !bs->drv->protocol_name || !bs->exact_filename[0] ||
        (strcmp(bs->drv->format_name, "file") &&
         strcmp(bs->drv->format_name, "host_device"))) {
        return NULL;
    }

    return bs->exact_filename;
}

/*
 * Its path as it is found from any folder, and when the host has started again:
 * what the kernel calls a device may be another one then
 */
static char *overlays_path(const char *image)
{
    struct stat sb;

    if (!image || stat(image, &sb) < 0) {
        return NULL;
    }

    return S_ISREG(sb.st_mode) ? realpath(image, NULL) :
                                 g_canonicalize_filename(image, NULL);
}

/* What leads to the disk for qemu-img; a part of a file is not that file */
static char *GRAPH_RDLOCK overlays_backing(BlockDriverState *format,
                                           const char *path)
{
    if (path && format->drv == &bdrv_raw &&
        bdrv_getlength(format) != bdrv_getlength(format->file->bs)) {
        bdrv_refresh_filename(format);
        path = format->filename;
    }

    return g_strdup(path);
}

static void overlay_name(Overlay *overlay, const char *prefix,
                         const char *which)
{
    overlay->kept = g_strdup_printf("%s.standby-%s.qcow2", prefix, which);
    overlay->scratch = g_strdup_printf("%s.standby-%s.scratch", prefix, which);
}

/* Such that no other disk of this host has the same names */
static void overlays_name(ReplicationOverlays *o, const char *path)
{
    g_autofree char *prefix = NULL;
    g_autofree char *name = NULL;
    struct stat sb;

    if (!path) {
        name = g_strdup(overlays_node(o));
    } else if (!o->wanted_dir && stat(path, &sb) == 0 && S_ISREG(sb.st_mode)) {
        o->dir = g_path_get_dirname(path);
        name = g_path_get_basename(path);
    } else {
        name = g_uri_escape_string(path + 1, NULL, true);
    }
    if (!o->dir) {
        o->dir = g_canonicalize_filename(o->wanted_dir ?: DEFAULT_DIR, NULL);
    }
    prefix = g_build_filename(o->dir, name, NULL);
    overlay_name(&o->active, prefix, "active");
    overlay_name(&o->hidden, prefix, "hidden");
}

/* What a merge has left has data that is nowhere else */
static bool overlays_check_left(ReplicationOverlays *o, Error **errp)
{
    const Overlay *overlays[] = { &o->active, &o->hidden };

    for (int i = 0; i < ARRAY_SIZE(overlays); i++) {
        if (access(overlays[i]->kept, F_OK) < 0 && errno == ENOENT) {
            continue;
        }
        error_setg(errp, "Replication node '%s' finds '%s' of an earlier one, "
                   "which may have a part of its disk's data",
                   overlays_node(o), overlays[i]->kept);
        error_append_hint(errp, "If the disk is the one to go on with, and no "
                          "guest has used it since, put the data there with "
                          "'qemu-img commit -b DISK %s'. Then, or else, remove "
                          "that file and '%s'.\n",
                          o->active.kept, o->hidden.kept);
        return false;
    }

    return true;
}

static bool overlays_create(ReplicationOverlays *o, Overlay *overlay,
                            int64_t length, int64_t cluster,
                            const char *backing, const char *backing_fmt,
                            Error **errp)
{
    ERRP_GUARD();
    QemuOpts *opts = qemu_opts_create(bdrv_qcow2.create_opts, NULL, 0,
                                      &error_abort);
    int ret;

    qemu_opt_set_number(opts, BLOCK_OPT_SIZE, length, &error_abort);
    qemu_opt_set_number(opts, BLOCK_OPT_CLUSTER_SIZE, cluster, &error_abort);
    qemu_opt_set_bool(opts, BLOCK_OPT_EXTL2, true, &error_abort);
    if (backing) {
        /* For qemu-img only, should nobody else be left */
        qemu_opt_set(opts, BLOCK_OPT_BACKING_FILE, backing, &error_abort);
        qemu_opt_set(opts, BLOCK_OPT_BACKING_FMT, backing_fmt, &error_abort);
    }
    ret = bdrv_create(&bdrv_qcow2, overlay->scratch, opts, errp);
    qemu_opts_del(opts);
    if (ret < 0) {
        error_prepend(errp, "Replication node '%s' cannot make its overlay "
                      "'%s': ", overlays_node(o), overlay->scratch);
        return false;
    }
    overlay->is_scratch = true;

    return true;
}

static BlockDriverState *overlays_open(ReplicationOverlays *o, Overlay *overlay,
                                       BlockDriverState *backing, bool direct,
                                       Error **errp)
{
    QDict *options = qdict_new();
    int flags = BDRV_O_RDWR | BDRV_O_UNMAP |
                (o->bs->open_flags & BDRV_O_INACTIVE);

    qdict_put_str(options, "driver", "qcow2");
    qdict_put_str(options, "file.driver", "file");
    qdict_put_str(options, "file.filename", overlay->scratch);
    qdict_put_str(options, "backing", bdrv_get_node_name(backing));
    qdict_put_str(options, BDRV_OPT_DISCARD, "unmap");
    qdict_put_str(options, BDRV_OPT_CACHE_DIRECT, direct ? "on" : "off");

    return bdrv_open(NULL, NULL, options, flags, errp);
}

BlockDriverState *replication_overlays_make(ReplicationOverlays *o,
                                            BlockDriverState *disk,
                                            Error **errp)
{
    BlockDriverState *format, *hidden, *active;
    g_autofree char *path = NULL;
    g_autofree char *backing = NULL;
    const char *fmt;
    int64_t length;
    bool direct;

    GLOBAL_STATE_CODE();

    bdrv_graph_rdlock_main_loop();
    format = bdrv_skip_filters(disk);
    path = overlays_path(overlays_image(disk));
    backing = overlays_backing(format, path);
    fmt = format->drv->is_format ? format->drv->format_name : "raw";
    direct = !secondary_uses_page_cache(disk);
    length = bdrv_getlength(disk);
    bdrv_graph_rdunlock_main_loop();
    if (length < 0) {
        error_setg_errno(errp, -length, "Replication node '%s': failed to get "
                         "the length of its disk", overlays_node(o));
        return NULL;
    }

    overlays_name(o, path);
    if (!overlays_check_left(o, errp) ||
        !overlays_create(o, &o->hidden, length, HIDDEN_CLUSTER, backing, fmt,
                         errp) ||
        !overlays_create(o, &o->active, length, ACTIVE_CLUSTER, o->hidden.kept,
                         "qcow2", errp)) {
        return NULL;
    }
    hidden = overlays_open(o, &o->hidden, disk, direct, errp);
    if (!hidden) {
        return NULL;
    }
    active = overlays_open(o, &o->active, hidden, direct, errp);
    bdrv_unref(hidden);

    return active;
}

static int overlays_sync_dir(ReplicationOverlays *o, Error **errp)
{
    int fd = qemu_open(o->dir, O_RDONLY, errp);
    int ret;

    if (fd < 0) {
        return -errno;
    }
    ret = fsync(fd) < 0 ? -errno : 0;
    qemu_close(fd);
    if (ret < 0) {
        error_setg_errno(errp, -ret, "Replication node '%s' cannot flush '%s'",
                         overlays_node(o), o->dir);
    }

    return ret;
}

static int overlays_rename(ReplicationOverlays *o, Overlay *overlay,
                           Error **errp)
{
    int ret;

    if (overlay->is_kept) {
        return 0;
    }
    if (rename(overlay->scratch, overlay->kept) < 0) {
        ret = -errno;
        error_setg_errno(errp, -ret, "Replication node '%s' cannot rename its "
                         "overlay '%s' to '%s'", overlays_node(o),
                         overlay->scratch, overlay->kept);
        return ret;
    }
    overlay->is_scratch = false;
    overlay->is_kept = true;

    return 0;
}

typedef struct OverlaysKeep {
    ReplicationOverlays *o;
    Error **errp;
} OverlaysKeep;

/* In a thread that may block */
static int overlays_keep(void *opaque)
{
    OverlaysKeep *keep = opaque;
    ReplicationOverlays *o = keep->o;
    int ret;

    ret = overlays_rename(o, &o->hidden, keep->errp);
    if (ret == 0) {
        ret = overlays_rename(o, &o->active, keep->errp);
    }

    return ret < 0 ? ret : overlays_sync_dir(o, keep->errp);
}

int coroutine_mixed_fn replication_overlays_keep(ReplicationOverlays *o,
                                                 Error **errp)
{
    OverlaysKeep keep = { .o = o, .errp = errp };

    return qemu_in_coroutine() ? thread_pool_submit_co(overlays_keep, &keep) :
                                 overlays_keep(&keep);
}

bool replication_overlays_are_kept(const ReplicationOverlays *o)
{
    return o->active.is_kept;
}

const char *replication_overlays_active(const ReplicationOverlays *o)
{
    return o->active.kept;
}

const char *replication_overlays_hidden(const ReplicationOverlays *o)
{
    return o->hidden.kept;
}

static const char *overlay_path(const Overlay *overlay)
{
    return overlay->is_kept ? overlay->kept : overlay->scratch;
}

void replication_overlays_leave(const ReplicationOverlays *o)
{
    /* A merge may have come to its end while the node was being closed */
    if (!o->active.is_kept && !o->active.is_scratch) {
        return;
    }
    warn_report("Replication node '%s' leaves '%s' and '%s', which have a part "
                "of its disk's data", overlays_node(o),
                overlay_path(&o->active), overlay_path(&o->hidden));
}

static void overlay_remove(Overlay *overlay)
{
    const char *path = overlay_path(overlay);

    if ((overlay->is_kept || overlay->is_scratch) && unlink(path) < 0) {
        warn_report("Could not remove '%s', which is of no more use: %s", path,
                    strerror(errno));
    }
    overlay->is_kept = false;
    overlay->is_scratch = false;
}

void replication_overlays_remove(ReplicationOverlays *o)
{
    GLOBAL_STATE_CODE();

    overlay_remove(&o->active);
    overlay_remove(&o->hidden);
}
