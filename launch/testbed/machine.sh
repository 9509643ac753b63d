#!/bin/sh
# What a machine of the testbed does first: machine.sh NAME FOLDER
# It runs as PID 1 in namespaces of its own (network, hostname, mounts, PIDs); all that it mounts goes with it.
set -eu
name=$1 folder=$2

hostname "$name"
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run      # sshd's own folder, and no sight of the host's daemons
mount -t tmpfs tmpfs /dev/shm  # memory that only this machine's processes share
mount --bind "$folder/hosts" /etc/hosts
mount --bind "$folder/ssh/client" /etc/ssh/ssh_config
mkdir /run/sshd

HOSTNAME=$name
export HOSTNAME
exec "$(command -v sshd || echo /usr/sbin/sshd)" -D -e -f "$folder/ssh/server"
