#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# fetch-debs.sh [--depends] CACHE PACKAGE...
#
# Download packages of this machine's own Debian release into CACHE/debs,
# install nothing, and print the path of each .deb, one a line.
# With --depends take what each PACKAGE depends on in its place: a
# metapackage such as linux-image-cloud-amd64 leads to the real kernel.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=fetch

depends=no
if [ "${1:-}" = --depends ]; then
    depends=yes
    shift
fi
[ $# -ge 2 ] || die "usage: fetch-debs.sh [--depends] CACHE PACKAGE..."
mkdir -p "$1"
cache=$(readlink -f "$1")
shift

# The machine's own lists are enough if they are fresh. If they are not, the
# same sources are read into lists of ours: that needs no root.
system_lists() {
    apt-get "${APT_OPTIONS[@]}" "$@"
}
private_lists() {
    private_apt "$cache/apt-own" own apt-get "$@"
}

# The packages to download, as apt with the lists $1 sees them.
wanted() {
    local apt=$1
    shift
    if [ "$depends" = no ]; then
        printf '%s\n' "$@"
        return
    fi
    local lists=/var/lib/apt/lists
    [ "$apt" = system_lists ] || lists=$cache/apt-own/lists
    apt-cache -o "Dir::State::Lists=$lists" depends --important "$@" |
        sed -n 's/^ *Depends: \([^<]*\)$/\1/p'
}

fetch() {
    local apt=$1 names uris
    shift
    names=$(wanted "$apt" "$@") && [ -n "$names" ] || return 1
    # apt names no file that is there already: ask where none is.
    # shellcheck disable=SC2086 # one word per package
    uris=$(cd "$cache/debs/none" && "$apt" download --print-uris $names) ||
        return 1
    # shellcheck disable=SC2086
    "$apt" download $names || return 1
    awk -v dir="$PWD" '{ print dir "/" $2 }' <<<"$uris"
}

log=$cache/log/fetch.log
mkdir -p "$cache/debs/none" "$cache/log"
cd "$cache/debs"
exec 9>"$cache/debs.lock"
flock 9
if ! paths=$(fetch system_lists "$@" 2>"$log"); then
    say "reading the package lists"
    private_lists update 2>>"$log" ||
        die "cannot read the package lists: $(tail -n 5 "$log")"
    paths=$(fetch private_lists "$@" 2>>"$log") ||
        die "cannot download $*: $(tail -n 5 "$log")"
fi
echo "$paths"
