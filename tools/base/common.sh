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

default_cache() {
    if [ -n "${QEMU_REPLICATION_CACHE:-}" ]; then
        echo "$QEMU_REPLICATION_CACHE"
    else
        : "${HOME:?is not set: set HOME or QEMU_REPLICATION_CACHE}"
        echo "${XDG_CACHE_HOME:-$HOME/.cache}/qemu-replication"
    fi
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
    mkdir -p "$(dirname "$log")"
    if ! "$@" 2>&1 </dev/null | tee "$log" | show_progress "$title"; then
        tail -n 40 "$log" >&2
        die "$title failed; all of its output is in $log"
    fi
    say "$title: done in $((SECONDS - start)) s"
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
