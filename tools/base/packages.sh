#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# packages.sh CACHE LIST...
#
# Install the Debian packages of each LIST (a file, a package a line) that
# this machine lacks. Root, or sudo, is asked for only if one is missing.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=packages

cache=$1
shift

missing() {
    local package
    while read -r package; do
        dpkg-query -W -f '${db:Status-Abbrev}\n' "$package" 2>/dev/null |
            grep -q '^.i' || echo "$package"
    done < <(sed 's/#.*//; /^[[:space:]]*$/d' "$@" | sort -u)
}

install_packages() {
    local apt=("${SUDO[@]}" env DEBIAN_FRONTEND=noninteractive apt-get
               "${APT_OPTIONS[@]}" -o DPkg::Lock::Timeout=300 -y
               --no-install-recommends)
    # An update is needed only where the lists are missing or out of date.
    "${apt[@]}" install "$@" ||
        { "${apt[@]}" update && "${apt[@]}" install "$@"; }
}

command -v apt-get >/dev/null ||
    die "this needs Debian (12 or 13): there is no apt-get here"
mapfile -t packages < <(missing "$@")
[ ${#packages[@]} -gt 0 ] || exit 0

SUDO=()
if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null ||
        die "these packages are missing, and neither root nor sudo is" \
            "there to install them: ${packages[*]}"
    SUDO=(sudo)
    say "sudo is needed to install packages"
    sudo -v || die "no leave to install: ${packages[*]}"
fi
say "missing: ${packages[*]}"
logged "$cache/log/packages.log" "installing ${#packages[@]} packages" \
    install_packages "${packages[@]}"
