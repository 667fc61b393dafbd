#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# source.sh qemu CACHE     print the folder of an unpacked QEMU source
# source.sh meson CACHE    print the folder of a meson new enough for QEMU,
#                          for PYTHONPATH; an empty line: Debian's is
#
# Both come from Debian's archive, from the mirror that this machine uses,
# through apt lists in CACHE: the machine's apt configuration stays as it is.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=source

SUITE=trixie
SERIES=10.0
# bookworm's meson is older than QEMU wants
BOOKWORM_MESON_SUITE=bookworm-backports

what=$1
cache=$2
lists=$cache/apt

private() {
    private_apt_get "$lists" "$lists/sources.list" "$@"
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
        private_apt_get "$cache/apt-own" own update >&2 || return 1
        uri=$(private_apt_get "$cache/apt-own" own indextargets \
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
    local uri options
    uri=$(mirror) || return 1
    options="[signed-by=$(keyring)]"
    mkdir -p "$lists"
    {
        echo "deb-src $options $uri $SUITE main"
        ! is_debian_12 ||
            echo "deb $options $uri $BOOKWORM_MESON_SUITE main"
    } >"$lists/sources.list"
    # apt calls it a success to keep old lists where no new ones came
    private -o APT::Update::Error-Mode=any update
}

# The archive is asked at most once a day, so that a rebuild needs no network.
refresh_lists() {
    if [ -z "$(find "$lists/updated" -mtime -1 2>/dev/null)" ]; then
        mkdir -p "$cache/log"
        update_lists >"$cache/log/apt-update.log" 2>&1 || return 1
        touch "$lists/updated"
    fi
}

download_qemu() {
    local into=$1 part
    part=$(mktemp -d "$cache/source/part.XXXXXX")
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf '$part'" EXIT
    cd "$part"
    logged "$cache/log/source.log" "downloading QEMU $version" \
        private --download-only --only-source source qemu
    logged "$cache/log/unpack.log" "unpacking QEMU $version" \
        dpkg-source -x ./*.dsc tree
    mv tree "$into"
}

qemu() {
    local version tree=''
    mkdir -p "$cache/source"
    if refresh_lists; then
        version=$(private --print-uris --only-source source qemu |
                  sed -n 's/.* qemu_\(.*\)\.dsc .*/\1/p')
        [[ $version == "$SERIES".* ]] ||
            die "$SUITE holds QEMU '$version', this driver is for $SERIES:" \
                "set QEMU_SRC to a tree of $SERIES"
        tree=$cache/source/qemu-$version
        [ -d "$tree" ] || (download_qemu "$tree") || tree=''
    fi
    if [ -n "$tree" ]; then
        say "QEMU $version, from Debian's archive"
    else
        # what the lists name may be gone: read them again next time
        rm -f "$lists/updated"
        tree=$(find "$cache/source" -maxdepth 1 -name "qemu-$SERIES.*" |
               sort -V | tail -n 1)
        [ -n "$tree" ] ||
            die "cannot get QEMU from Debian's archive:" \
                "$(tail -n 5 "$cache/log/apt-update.log")"
        say "Debian's archive is out of reach: using the cached" \
            "$(basename "$tree")"
    fi
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
            private download meson
        dpkg-deb -x ./*.deb "$dir.part"
        mv "$dir.part" "$dir"
    fi
    ! is_debian_12 || echo "$dir/usr/lib/python3/dist-packages"
}

mkdir -p "$cache"
exec 8>"$cache/source.lock"
flock 8
"$what"
