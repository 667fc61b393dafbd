# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# What every script of tools/base needs: messages, progress, the cache, apt.

# The word in front of each message: the step of the work at hand.
STEP=run

die() {
    echo "error: $*" >&2
    exit 1
}

# The base that the checkout itself is for.
# shellcheck disable=SC2034 # who reads this file uses it
REFERENCE=10.0

# Messages go to stderr: stdout is for results.
say() {
    echo "[$STEP] $*" >&2
}

# Nothing, if nobody says where it is.
default_cache() {
    if [ -n "${QEMU_REPLICATION_CACHE:-}" ]; then
        readlink -m -- "$QEMU_REPLICATION_CACHE"
    elif [ -n "${XDG_CACHE_HOME:-${HOME:-}}" ]; then
        readlink -m -- "${XDG_CACHE_HOME:-$HOME/.cache}/qemu-replication"
    fi
}

# The nearest folder above $1, or $1, that there is.
existing() {
    local folder=$1
    until [ -d "$folder" ]; do
        folder=$(dirname "$folder")
    done
    echo "$folder"
}

# cannot_use PATH WHY: of the cache
cannot_use() {
    die "$1 $2: name another folder for the cache in QEMU_REPLICATION_CACHE"
}

# Make the cache, or say in a line why it is of no use.
use_cache() {
    [ -n "$CACHE" ] || die "HOME is not set: set that, or" \
        "QEMU_REPLICATION_CACHE to a folder for downloads and builds"
    # configure and make take none of them, and a colon separates paths
    [[ ! $CACHE =~ [[:space:]:\"\'\`\$\\] ]] ||
        cannot_use "${CACHE//$'\n'/?}" "has a space, colon, quote, \$ or \\"
    mkdir -p "$CACHE" 2>/dev/null || cannot_use "$CACHE" "cannot be made"
    has_room || cannot_use "$CACHE" "cannot be written to, or is full"
}

has_room() {
    local probe=$CACHE/probe.$$ status=0
    { head -c 1M /dev/zero >"$probe"; } 2>/dev/null || status=$?
    rm -f "$probe"
    return $status
}

# Pass the output of a command through, and say how far it is: ninja's
# [N/M], else the time it takes. In place on a terminal, else every 10 s.
show_progress() {
    local title=$1 every=10 line count='' next rc
    local shown='' start=$SECONDS
    [ ! -t 2 ] || every=1
    next=$every
    while true; do
        rc=0
        IFS= read -r -t 1 line || rc=$?
        # above 128: nothing to read for a second
        [ $rc = 0 ] || [ $rc -gt 128 ] || break
        if [[ $line =~ ^\[([0-9]+/[0-9]+)\] ]]; then
            count=${BASH_REMATCH[1]}
        fi
        if [ $((SECONDS - start)) -ge $next ]; then
            next=$((SECONDS - start + every))
            shown="[$STEP] $title ${count:+$count }$((SECONDS - start)) s"
            if [ -t 2 ]; then
                printf '\r%s\033[K' "$shown" >&2
            else
                printf '%s\n' "$shown" >&2
            fi
        fi
    done
    if [ -t 2 ] && [ -n "$shown" ]; then
        printf '\r\033[K' >&2
    fi
}

# logged LOG TITLE COMMAND...: run COMMAND with its output in LOG, showing
# progress; when it fails, show the end of LOG and give up.
logged() {
    local log=$1 title=$2 start=$SECONDS
    shift 2
    mkdir -p "${log%/*}"
    if ! "$@" 2>&1 </dev/null | tee "$log" | show_progress "$title"; then
        tail -n 40 "$log" >&2
        [ -z "${CACHE:-}" ] || has_room || cannot_use "$CACHE" "is full"
        die "$title failed; all of its output is in $log"
    fi
    say "$title: done in $((SECONDS - start)) s"
}

# link_firmware DIR: have a QEMU find what Debian's packages have for x86:
# seabios, ipxe-qemu, whose files Debian 13 has moved, and qemu-system-data.
link_firmware() {
    local name
    for name in /usr/share/seabios/*.bin \
        /usr/{lib/ipxe,share}/qemu/{efi,pxe}-*.rom \
        /usr/share/qemu/{kvmvapic,linuxboot,linuxboot_dma,multiboot}.bin \
        /usr/share/qemu/{multiboot_dma,pvh}.bin /usr/share/qemu/qboot.rom; do
        # an older package has less
        [ ! -e "$name" ] || [ -e "$1/${name##*/}" ] || ln -sfn "$name" "$1/"
    done
}

# Debian 12 has another meson than Debian 13 and what comes after it.
is_debian_12() {
    [ "$(. /etc/os-release && echo "${VERSION_ID:-}")" = 12 ]
}

# As root, apt downloads as user _apt, who cannot enter a private cache.
APT_OPTIONS=(-qq -o Dpkg::Use-Pty=0 -o Acquire::Languages=none
             -o Acquire::Retries=2 -o Acquire::http::Timeout=20)
if [ "$(id -u)" = 0 ]; then
    APT_OPTIONS+=(-o APT::Sandbox::User=root)
fi

# private_apt DIR SOURCES TOOL ARGUMENT...: apt-get or apt-cache with index
# lists of our own under DIR and the sources in file SOURCES ("own": those of
# the user): the machine's apt state is not touched.
private_apt() {
    local dir=$1 sources=$2 tool=$3
    shift 3
    mkdir -p "$dir/lists/partial" "$dir/cache/archives/partial"
    local options=(-o "Dir::State::Lists=$dir/lists" -o "Dir::Cache=$dir/cache")
    if [ "$sources" != own ]; then
        options+=(-o "Dir::Etc::sourcelist=$sources"
                  -o Dir::Etc::sourceparts=/dev/null)
    fi
    "$tool" "${APT_OPTIONS[@]}" "${options[@]}" "$@"
}
