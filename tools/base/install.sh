#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# install.sh BUILD TREE PREFIX
#
# Install what was built in BUILD from TREE. QEMU finds its files by where
# its program is, so PREFIX may be moved later. Firmware comes from Debian's
# packages, through links.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=install

build=$1 tree=$2 prefix=$3
programs=(qemu-system-x86_64 qemu-img qemu-io qemu-nbd
          storage-daemon/qemu-storage-daemon)
helpers=(qemu-bridge-helper qemu-pr-helper)
share=$prefix/share/qemu
# seabios, ipxe-qemu, whose files Debian 13 has moved, and what
# qemu-system-data has for x86
firmware=(
    /usr/share/seabios/*.bin
    /usr/{lib/ipxe,share}/qemu/{efi,pxe}-*.rom
    /usr/share/qemu/{kvmvapic,linuxboot,linuxboot_dma,multiboot}.bin
    /usr/share/qemu/{multiboot_dma,pvh}.bin
    /usr/share/qemu/qboot.rom
)

# Refuse to write over files of packages.
refuse_packaged() {
    local name package
    for name in "${programs[@]}"; do
        name=$prefix/bin/${name##*/}
        package=$(dpkg-query -S "$name" 2>/dev/null) || continue
        die "$name is a file of package ${package%%:*}: choose another prefix"
    done
}

# The machine is set up, for which it needs its firmware, and quits.
try_out() {
    local output
    output=$(timeout 60 "$prefix/bin/qemu-system-x86_64" -machine q35 -S \
                 -display none -monitor stdio <<<quit 2>&1) ||
        die "$prefix/bin/qemu-system-x86_64 does not run: $output"
}

refuse_packaged
mkdir -p "$prefix"/{bin,libexec} "$share/keymaps"
for name in "${programs[@]}"; do
    install -m 755 "$build/$name" "$prefix/bin/"
done
for name in "${helpers[@]}"; do
    install -m 755 "$build/$name" "$prefix/libexec/"
done
for name in "$tree"/pc-bios/keymaps/*; do
    [[ $name == */meson.build ]] || install -m 644 "$name" "$share/keymaps/"
done
for name in "${firmware[@]}"; do
    # an older package has less
    [ ! -e "$name" ] || ln -sfn "$name" "$share/"
done
try_out
say "installed: programs in $prefix/bin, helpers in $prefix/libexec," \
    "keymaps and links to firmware in $share"
