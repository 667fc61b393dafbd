#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# test_deb.sh BUILD TREE CACHE
#
# Make the Debian package, install it in a fresh root of this release, protect a
# VM with what is there, lose a side, and remove it without a trace.

set -euo pipefail
SCRIPTS=$(dirname "$(readlink -f "$0")")
ROOT=$(readlink -f "$SCRIPTS/../..")
build=$1 tree=$2
# shellcheck disable=SC2034 # fresh.sh uses it
CACHE=$3
. "$SCRIPTS/common.sh"
STEP=deb
. "$ROOT/.ci/fresh.sh"
# shellcheck disable=SC2034 # the same
RELEASE=$(. /etc/os-release && echo "$VERSION_CODENAME")
SECONDS_FOR_PAIR=600

trap end_fresh EXIT
trap 'exit 143' INT TERM HUP
if ! make_fresh; then
    echo "a fresh Debian: $WHY_NOT"
    exit 77
fi

apt() {
    in_fresh env DEBIAN_FRONTEND=noninteractive apt-get -qq -y \
        --no-install-recommends -o Dpkg::Use-Pty=0 "$@"
}

traces() {
    # shellcheck disable=SC2016 # the inner shell expands it
    in_fresh sh -c 'dpkg -l qemu-replication 2>/dev/null | grep ^i
        find /opt /usr /etc /var/lib -path "*qemu-replication*"'
}

pair() {
    cp "$SCRIPTS/test_deb_pair.sh" "$FRESH/pair.sh"
    in_fresh timeout "$SECONDS_FOR_PAIR" bash /pair.sh
}

deb=$("$SCRIPTS/deb.sh" "$build" "$tree" "$FRESH")
in_fresh dpkg-deb --info "/${deb##*/}" | grep Depends:
apt update
apt install "/${deb##*/}"
in_fresh sh -c 'cd / && md5sum -c --quiet' \
    <"$FRESH/var/lib/dpkg/info/qemu-replication.md5sums"
pair
# again, over what is there
apt install --reinstall "/${deb##*/}"
in_fresh rm -r /etc/qemu-replication /var/lib/qemu-replication
apt purge qemu-replication
[ -z "$(traces)" ] || die "left: $(traces)"
