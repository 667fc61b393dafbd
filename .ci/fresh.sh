# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# A Debian 13 on which nothing was ever installed, for one run: what a machine
# that has built before hides, shows there. It shares with other runs what was
# downloaded and compiled (packages, QEMU's source, ccache), each checked by
# those who use it, and nothing that was installed or unpacked. Needs common.sh,
# $ROOT, $SCRIPTS (the folder of that) and $CACHE.

RELEASE=trixie

# The folder that is its /, if there is one; what is kept is beside it.
FRESH=''
KEPT=$CACHE/ci
# Why there is none
WHY_NOT=''

# Where its root has the checkout and its cache
FRESH_CHECKOUT=/root/qemu-replication
FRESH_CACHE=/root/.cache/qemu-replication

may_mount() {
    mount --bind "$1" "$1" 2>/dev/null && umount "$1"
}

# share DIR PATH: have a folder of the host in the fresh root, too.
share() {
    mkdir -p "$1" "$FRESH$2"
    mount --bind "$1" "$FRESH$2"
}

furnish() {
    mount -t proc proc "$FRESH/proc" &&
        mount --bind /dev "$FRESH/dev" &&
        mount --bind /dev/pts "$FRESH/dev/pts" &&
        mount -t tmpfs tmpfs "$FRESH/dev/shm" || return
    share "$KEPT/archives" /var/cache/apt/archives &&
        share "$KEPT/debs" "$FRESH_CACHE/debs" &&
        share "$CACHE/source/files" "$FRESH_CACHE/source/files" &&
        share "${CCACHE_DIR:-$HOME/.cache/ccache}" /root/.cache/ccache || return
    cp -L /etc/resolv.conf /etc/hosts "$FRESH/etc/" || return
    # the proxies of apt, if this machine has some
    apt-config dump | grep -i '^Acquire::[^ ]*proxy' \
        >"$FRESH/etc/apt/apt.conf.d/99proxy" || true
}

# What git knows of the checkout, else all of it.
copy_checkout() {
    mkdir -p "$FRESH$FRESH_CHECKOUT"
    local git=(git -c "safe.directory=$ROOT" -C "$ROOT")
    if [ -e "$ROOT/.git" ] && command -v git >/dev/null; then
        (cd "$ROOT" && "${git[@]}" ls-files -z |
             xargs -0 cp -P --parents -t "$FRESH$FRESH_CHECKOUT")
    else
        tar -C "$ROOT" -c --exclude=./.git --exclude=__pycache__ . |
            tar -C "$FRESH$FRESH_CHECKOUT" -x
    fi
}

# in_fresh COMMAND...: run a command in the checkout in the fresh root.
in_fresh() {
    local name environment=(HOME=/root LANG=C.UTF-8
        PATH=/usr/lib/ccache:/usr/sbin:/usr/bin:/sbin:/bin)
    for name in http_proxy https_proxy no_proxy; do
        [ -z "${!name:-}" ] || environment+=("$name=${!name}")
    done
    # shellcheck disable=SC2016 # the inner shell expands it
    chroot "$FRESH" env -i "${environment[@]}" \
        sh -c 'cd "$1" && shift && exec "$@"' - "$FRESH_CHECKOUT" "$@"
}

# It brings two libraries that nothing here wants. The lists go, as a fresh
# Debian has none.
add_ccache() {
    in_fresh sh -c 'apt-get -qq update &&
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends \
            install ccache && rm -rf /var/lib/apt/lists/*'
}

# Make it, or set WHY_NOT.
make_fresh() {
    local mirror log=$KEPT/fresh.log
    WHY_NOT='only root can make one'
    [ "$(id -u)" = 0 ] || return
    mkdir -p "$KEPT/archives"
    exec 7>"$KEPT/lock"
    flock 7
    remove_left_over
    WHY_NOT='debootstrap cannot be installed'
    "$SCRIPTS/packages.sh" "$CACHE" "$ROOT/.ci/packages" || return
    FRESH=$(mktemp -d "$KEPT/root.XXXXXX")
    chmod 755 "$FRESH"
    WHY_NOT='nothing can be mounted here'
    may_mount "$FRESH" || return
    WHY_NOT='no mirror of Debian is known'
    mirror=$("$SCRIPTS/source.sh" mirror "$CACHE") || return
    say "making a fresh Debian, $RELEASE"
    WHY_NOT="making it failed, see $log"
    {
        debootstrap --variant=minbase --cache-dir="$KEPT/archives" \
            "$RELEASE" "$FRESH" "$mirror" &&
            furnish && copy_checkout && add_ccache
    } >"$log" 2>&1 </dev/null 7>&- || {
        tail -n 20 "$log" >&2
        return 1
    }
    WHY_NOT=''
}

# Those that were started in the fresh root, and whatever they have started.
processes_in() {
    find /proc -mindepth 2 -maxdepth 2 -path '/proc/[0-9]*/root' \
        \( -lname "$1" -o -lname "$1/*" \) -printf '%P\n' 2>/dev/null |
        cut -d / -f 1
}

end_processes() {
    local signal pids
    for signal in TERM TERM KILL KILL; do
        mapfile -t pids < <(processes_in "$1")
        [ ${#pids[@]} -gt 0 ] || return 0
        kill -"$signal" "${pids[@]}" 2>/dev/null
        sleep 2
    done
}

# The newest first
mounts_in() {
    awk -v top="$1/" 'index($5, top) == 1 { print $5 }' /proc/self/mountinfo |
        tac
}

# remove_root DIR: end what runs in a fresh root, unmount and remove it.
remove_root() {
    local place
    end_processes "$1"
    for place in $(mounts_in "$1"); do
        umount "$place" || umount -l "$place"
    done
    if [ -n "$(mounts_in "$1")" ]; then
        say "cannot unmount what is in $1"
        return 1
    fi
    rm -rf --one-file-system "$1"
}

# Of a run that was killed: who has the lock is alone.
remove_left_over() {
    local root
    for root in "$KEPT"/root.*; do
        [ ! -d "$root" ] || remove_root "$root"
    done
}

end_fresh() {
    [ -n "$FRESH" ] || return 0
    local root=$FRESH
    FRESH=''
    remove_root "$root"
    exec 7>&-
}
