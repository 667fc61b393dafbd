#!/bin/bash
# SPDX-License-Identifier: GPL-2.0-or-later
#
# node-init.sh NAME PACKAGES EXTRA ETC CIB
#
# The first process of a node of a cluster, in namespaces of its own: what was
# unpacked in PACKAGES and EXTRA is laid over /usr, and ETC over /etc, for this
# node alone; CIB is what the cluster remembers.  Then its daemons start.  Nothing
# is installed.

set -eu
name=$1 packages=$2 extra=$3 etc=$4 cib=$5

hostname "$name"
mount -t proc proc /proc
mount -t overlay overlay -o "ro,lowerdir=$extra/usr:$packages/usr:/usr" /usr
mount -t overlay overlay -o "ro,lowerdir=$etc:$packages/etc:/etc" /etc
for folder in /var /run /dev/shm; do
    mount -t tmpfs tmpfs "$folder"
done
mkdir -p /var/{tmp,log/{pacemaker,cluster},lib/{corosync,heartbeat/cores}} \
    /var/lib/pacemaker/{blackbox,cib,cores,pengine} /run/{lock,resource-agents}
ln -s /run /var/run
mount --bind "$cib" /var/lib/pacemaker/cib
chown -R hacluster:haclient /var/lib/pacemaker /var/log/pacemaker
chmod 750 /var/lib/pacemaker/*
ip link set lo up

corosync -f &
until corosync-cfgtool -s >/dev/null 2>&1; do sleep 0.1; done
pacemakerd -f &
# reap whoever is left
while true; do sleep 1; done
