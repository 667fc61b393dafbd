#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# install.sh --refuse PREFIX     refuse a folder that has anything else in it
# install.sh BUILD TREE PREFIX   install what was built in BUILD from TREE
#
# It is put together beside PREFIX, tried out, and takes its place. QEMU finds
# its files by where its program is, so PREFIX may be moved later. Firmware
# comes from Debian's packages, through links.

set -euo pipefail
. "$(dirname "$(readlink -f "$0")")/common.sh"
STEP=install

programs=(qemu-system-x86_64 qemu-img qemu-io qemu-nbd
          storage-daemon/qemu-storage-daemon)
tools=$(dirname "$(readlink -f "$0")")/..
# gives QEMU a command, for docs/protect-a-vm.txt
qmp=$tools/guide/qmp.py
ha=$tools/../ha
helpers=(qemu-bridge-helper qemu-pr-helper)
# By its first line we know what we have installed, and then comes what that is.
note=README
title='QEMU with block replication, a folder of its own: remove it to uninstall'

# What is in a folder, without what an installation of ours there has.
others() {
    if [ "$(head -n 1 "$1/$note" 2>/dev/null)" = "$title" ]; then
        comm -23 <(contents "$1") <(sed -n 's/^  //p' "$1/$note" | sort)
    else
        ls -A "$1"
    fi
}

contents() {
    (cd "$1" && find . -mindepth 1 | sort)
}

# Refuse whatever is more than an installation of ours, by its real path.
check_prefix() {
    local above other=''
    ! dpkg-query -S "$prefix" >/dev/null 2>&1 ||
        die "$prefix belongs to Debian's packages: choose another prefix"
    [ ! -e "$prefix" ] || [ -d "$prefix" ] ||
        die "$prefix is not a folder: choose another prefix"
    [ ! -d "$prefix" ] || other=$(others "$prefix")
    [ -z "$other" ] ||
        die "$prefix has other files, such as ${other%%$'\n'*}:" \
            "choose a folder for this alone"
    above=$(existing "$(dirname "$prefix")")
    [ -w "$above" ] || die "cannot write to $above: choose another prefix"
}

# The machine is set up, for which it needs its firmware, and quits.
try_out() {
    local output
    output=$(timeout 60 "$new/bin/qemu-system-x86_64" -machine q35 -S \
                 -display none -monitor stdio <<<quit 2>&1) ||
        die "what was built does not run: $output"
}

assemble() {
    local name share=$new/share/qemu
    mkdir -p "$new"/{bin,libexec} "$share/keymaps"
    for name in "${programs[@]}"; do
        install -m 755 "$build/$name" "$new/bin/"
    done
    install -m 755 "$qmp" "$new/bin/qmp"
    for name in "${helpers[@]}"; do
        install -m 755 "$build/$name" "$new/libexec/"
    done
    assemble_ha
    for name in "$tree"/pc-bios/keymaps/*; do
        [[ $name == */meson.build ]] ||
            install -m 644 "$name" "$share/keymaps/"
    done
    link_firmware "$share"
    printf '%s\n\nQEMU %s, %s\n\n' "$title" "$(cat "$tree/VERSION")" \
        'see docs/block-replication.txt where it came from' >"$new/$note"
    contents "$new" | sed 's/^/  /' >>"$new/$note"
}

# The keepers of ha/, with what they use: QEMU's module for QMP, the watcher.
assemble_ha() {
    local lib=$new/lib/qemu-replication
    mkdir -p "$lib"/{qemu_replication,qemu/qmp,top} "$new/share/systemd"
    install -m 644 "$ha"/qemu_replication/*.py "$lib/qemu_replication/"
    install -m 755 "$ha/qemu_replication/tap-up" "$lib/qemu_replication/"
    install -m 644 "$tree"/python/qemu/qmp/*.py "$lib/qemu/qmp/"
    install -m 644 "$tools"/top/{top,figures,view,watch}.py "$lib/top/"
    install -m 755 "$ha/qemu-replication" "$new/bin/"
    install -m 755 "$ha/ocf-vm" "$new/libexec/"
    install -m 644 "$ha"/*.service "$new/share/systemd/"
}

# Whoever ends this leaves what was there.
clean_up() {
    [ -e "$prefix" ] || [ ! -e "$work/old" ] || mv -T "$work/old" "$prefix"
    rm -rf "$work"
}

case $1 in
    --refuse)
        prefix=$2
        check_prefix
        exit ;;
esac
build=$1 tree=$2 prefix=$3
check_prefix
mkdir -p "$(dirname "$prefix")"
work=$(mktemp -d "$prefix.XXXXXX")
trap clean_up EXIT
new=$work/new
mkdir -m 755 "$new"
assemble
try_out
# who runs a program of an older installation goes on with it
[ ! -e "$prefix" ] || mv "$prefix" "$work/old"
mv -T "$new" "$prefix" || die "cannot make $prefix: nothing has changed"
say "installed: programs in $prefix/bin, helpers in $prefix/libexec," \
    "keymaps and links to firmware in $prefix/share/qemu"
