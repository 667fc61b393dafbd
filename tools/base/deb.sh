#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# deb.sh BUILD TREE FOLDER
#
# Make a Debian package of what install.sh lays, for this release of Debian:
# all of it in /opt/qemu-replication, and links where systemd, a shell and
# Pacemaker look.  Prints its path.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=deb

here=$(dirname "$(readlink -f "$0")")
build=$1 tree=$2 folder=$3
prefix=/opt/qemu-replication
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

lay() {
    mkdir -p "$root"/usr/{bin,lib/systemd/system} \
        "$root"/usr/{lib/ocf/resource.d,share/doc}/qemu-replication
    chmod -R 755 "$root"
    "$here/install.sh" "$build" "$tree" "$root$prefix" 2>"$work/log" || {
        cat "$work/log" >&2
        return 1
    }
    ln -s "$prefix/bin/qemu-replication" "$root/usr/bin/"
    ln -s "$prefix/share/systemd/qemu-replication@.service" \
        "$root/usr/lib/systemd/system/"
    ln -s "$prefix/libexec/ocf-vm" \
        "$root/usr/lib/ocf/resource.d/qemu-replication/vm"
    install -m 644 "$here/../../COPYING" \
        "$root/usr/share/doc/qemu-replication/copyright"
}

programs() {
    local file
    for file in "$root$prefix"/{bin,libexec}/*; do
        [ "$(head -c 4 "$file" | tail -c 3)" != ELF ] || echo "$file"
    done
}

# What the programs are linked with, by the versions that they need.
libraries() {
    mkdir -p "$work/debian"
    printf '%s\n' 'Source: qemu-replication' '' 'Package: qemu-replication' \
        'Architecture: any' >"$work/debian/control"
    (cd "$work" && dpkg-shlibdeps -O "$@" 2>"$work/log") |
        sed 's/^shlibs:Depends=//' || { cat "$work/log" >&2; return 1; }
}

describe() {
    local firmware
    firmware=$(sed '/^#/d; /^$/d' "$here/packages/install" | paste -sd ,)
    mkdir "$root/DEBIAN"
    cat >"$root/DEBIAN/control" <<END
Package: qemu-replication
Version: $version
Architecture: $(dpkg --print-architecture)
Maintainer: whoever has built it <root@localhost>
Installed-Size: $(du -sk "$root" | cut -f 1)
Depends: $1, iproute2, python3 (>= 3.11), ${firmware//,/, }
Suggests: pacemaker, corosync
Section: otherosfs
Priority: optional
Description: QEMU with block replication, and keepers of protected VMs
 A VM goes on on a second host when the first one dies, with its memory and
 its disks.  All of it is in $prefix, and takes the place of no
 other QEMU.
END
    (cd "$root" && find opt usr -type f -print0 | xargs -0 md5sum) \
        >"$root/DEBIAN/md5sums"
    cat >"$root/DEBIAN/postinst" <<'END'
#!/bin/sh
[ ! -d /run/systemd/system ] || systemctl daemon-reload || true
END
    chmod 755 "$root/DEBIAN/postinst"
    cp "$root/DEBIAN/postinst" "$root/DEBIAN/postrm"
}

version=$(cat "$tree/VERSION")+replication~deb$(. /etc/os-release &&
                                                    echo "$VERSION_ID")
lay
mapfile -t elf < <(programs)
strip --strip-unneeded "${elf[@]}"
depends=$(libraries "${elf[@]}")
describe "$depends"
mkdir -p "$folder"
path=$folder/qemu-replication_${version}_$(dpkg --print-architecture).deb
dpkg-deb --root-owner-group -Zgzip -b "$root" "$path" >/dev/null
echo "$path"
