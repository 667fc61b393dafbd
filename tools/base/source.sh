#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# source.sh qemu CACHE BASE  print the folder of an unpacked QEMU source; if
#                            it cannot be had, print why; exit status 3 if
#                            Debian does not have it
# source.sh mirror CACHE     print the address of the mirror
# source.sh meson CACHE      print the folder of a meson new enough for QEMU,
#                            for PYTHONPATH; an empty line: Debian's is
#
# Sources come from Debian's archive, from the mirror that this machine uses,
# through apt lists in CACHE: the machine's apt configuration stays as it is.
# bases/BASE/source holds the beginning of the version and the Debian suites
# to look in; a BASE that has none is the beginning of a version in sid.

set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
. "$here/common.sh"
STEP=source

# bookworm's meson is older than QEMU wants
BOOKWORM_MESON_SUITE=bookworm-backports
UNAVAILABLE=3

what=$1
cache=$2
# common.sh wants it
# shellcheck disable=SC2034
CACHE=$cache
base=${3:-$REFERENCE}
# lists of suites that are newer than this machine are kept apart
lists=$cache/apt
[ "$base" = "$REFERENCE" ] || lists+=-$base
where=$here/../../bases/$base/source
read -r PREFIX SUITES < <(grep -v '^#' "$where" 2>/dev/null || echo "$base sid")
read -ra SUITES <<<"$SUITES"

private() {
    private_apt "$lists" "$lists/sources.list" "$@"
}

# shellcheck disable=SC2016 # apt and awk expand these, not the shell
mirror() {
    local format='$(ORIGIN) $(LABEL) $(REPO_URI)'
    local filter='$1 == "Debian" && $2 == "Debian" { print $3; exit }'
    local uri
    uri=$(apt-get indextargets --format "$format" 'Created-By: Packages' |
          awk "$filter")
    if [ -z "$uri" ]; then
        # This machine has no lists; the same sources, read into ours.
        private_apt "$cache/apt-own" own apt-get update >&2 || return 1
        uri=$(private_apt "$cache/apt-own" own apt-get indextargets \
                  --format "$format" 'Created-By: Packages' | awk "$filter")
    fi
    [ -n "$uri" ] || {
        echo "no mirror of Debian is among apt's sources" >&2
        return 1
    }
    echo "$uri"
}

keyring() {
    local file
    for file in /usr/share/keyrings/debian-archive-keyring.{pgp,gpg}; do
        [ ! -e "$file" ] || { echo "$file"; return; }
    done
    die "Debian's archive keys are missing: install debian-archive-keyring"
}

update_lists() {
    local uri options suite
    uri=$(mirror) || return 1
    options="[signed-by=$(keyring)]"
    mkdir -p "$lists"
    {
        for suite in "${SUITES[@]}"; do
            echo "deb-src $options $uri $suite main"
        done
        # meson is asked for without a base
        ! is_debian_12 || [ "$base" != "$REFERENCE" ] ||
            echo "deb $options $uri $BOOKWORM_MESON_SUITE main"
    } >"$lists/sources.list"
    # apt calls it a success to keep old lists where no new ones came
    private apt-get -o APT::Update::Error-Mode=any update
}

# The archive is asked at most once a day, so that a rebuild needs no network.
refresh_lists() {
    if [ -z "$(find "$lists/updated" -mtime -1 2>/dev/null)" ]; then
        mkdir -p "$cache/log"
        update_lists >"$cache/log/apt-update.log" 2>&1 || return 1
        touch "$lists/updated"
    fi
}

# The versions of QEMU that the suite lists, the newest first.
listed_versions() {
    private apt-cache --only-source showsrc qemu |
        sed -n 's/^Version: //p' |
        grep "^\([0-9]*:\)\?${PREFIX//./\\.}[.+~-]" | sort -rVu
}

download_qemu() {
    local version=$1 into=$2 files=$cache/source/files part
    mkdir -p "$files"
    part=$(mktemp -d "$cache/source/part.XXXXXX")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$part'" EXIT
    # apt does not download again what is there, and checks it
    cd "$files"
    logged "$cache/log/source.log" "downloading QEMU ${version#*:}" \
        private apt-get --download-only --only-source source "qemu=$version"
    logged "$cache/log/unpack.log" "unpacking QEMU ${version#*:}" \
        dpkg-source -x "qemu_${version#*:}.dsc" "$part/tree"
    mv "$part/tree" "$into"
}

# Print the folder of the newest listed version that can be had. The lists
# may name files that the archive has removed meanwhile.
newest_qemu() {
    local version tree
    for version in $(listed_versions); do
        # files are called without the epoch
        tree=$cache/source/qemu-${version#*:}
        if [ -d "$tree" ] || (download_qemu "$version" "$tree"); then
            say "QEMU ${version#*:}, from Debian's archive"
            echo "$tree"
            return
        fi
        say "QEMU ${version#*:} is listed, but cannot be had"
    done
    return 1
}

cached_qemu() {
    find "$cache/source" -maxdepth 1 -name "qemu-${PREFIX}[.+~-]*" | sort -V |
        tail -n 1
}

# Say why no version could be had; exit status 3 if Debian has none.
no_qemu() {
    if ! has_room; then
        echo "the cache $cache cannot be written to, or is full"
        return 1
    elif [ ! -e "$lists/updated" ]; then
        echo "cannot read the lists of Debian's archive:" \
             "$(tail -n 1 "$cache/log/apt-update.log")"
        return 1
    elif [ -z "$(listed_versions)" ]; then
        echo "${SUITES[*]} of Debian's archive has no QEMU $PREFIX any more"
        return $UNAVAILABLE
    fi
    echo "cannot download QEMU $PREFIX, which Debian's archive lists:" \
         "$(grep '^E: ' "$cache/log/source.log" | head -n 1)"
    ! grep -q '^E: .* 404 ' "$cache/log/source.log" || return $UNAVAILABLE
    return 1
}

qemu() {
    local tree why status=0
    mkdir -p "$cache/source"
    if refresh_lists && tree=$(newest_qemu); then
        echo "$tree"
        return
    fi
    why=$(no_qemu) || status=$?
    # what the lists name may be gone: read them again next time
    rm -f "$lists/updated"
    tree=$(cached_qemu)
    if [ -z "$tree" ]; then
        echo "$why"
        exit "$status"
    fi
    say "$why: using the cached $(basename "$tree")"
    echo "$tree"
}

meson() {
    local dir=$cache/meson
    if is_debian_12 && [ ! -d "$dir" ]; then
        refresh_lists ||
            die "cannot reach Debian's archive for meson:" \
                "$(tail -n 5 "$cache/log/apt-update.log")"
        rm -rf "$dir.part"
        mkdir -p "$dir.part/deb"
        cd "$dir.part/deb"
        logged "$cache/log/meson.log" "downloading meson" \
            private apt-get download meson
        dpkg-deb -x ./*.deb "$dir.part"
        mv "$dir.part" "$dir"
    fi
    ! is_debian_12 || echo "$dir/usr/lib/python3/dist-packages"
}

exec 8>"$cache/source.lock"
flock 8
"$what"
