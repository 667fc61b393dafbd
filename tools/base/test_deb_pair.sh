#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# Protect a VM by two keepers on this machine, where the package is installed,
# kill QEMU on the one side, and have it protected again.

set -euo pipefail
mkdir -p /etc/qemu-replication /srv/{east,west}
cat >/etc/qemu-replication/vm1.toml <<'END'
run = "/run/qemu-replication/{host}"
state = "/var/lib/qemu-replication/{host}"
[vm]
name = "vm1"
qemu = "/opt/qemu-replication/bin/qemu-system-x86_64"
arguments = ["-machine", "pc,accel=tcg", "-m", "64", "-nodefaults"]
[[disk]]
file = "/srv/{host}/disk0.qcow2"
size = "64M"
[host.east]
address = "127.0.0.2"
[host.west]
address = "127.0.0.3"
[limits]
checkpoint_ms = 500
END

on() {
    qemu-replication "$2" vm1 --host "$1" "${@:3}"
}

for host in east west; do
    on $host check
    on $host keeper &
    until on $host status >/dev/null || [ $? != 3 ]; do sleep 0.1; done
done
trap 'on east stop --force; on west stop --force; kill $(jobs -p)' EXIT
/opt/qemu-replication/bin/qemu-img create -q -f qcow2 \
    /srv/east/disk0.qcow2 64M
on east protect --no-wait
on west standby
on east protect
on west status
kill -9 "$(cat /run/qemu-replication/east/qemu.pid)"
on west failover
on west protect
on west status
/usr/lib/ocf/resource.d/qemu-replication/vm meta-data | grep -q promote
