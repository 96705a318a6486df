#!/bin/bash
# Builds the guest's initramfs: the agent as /init, the directories that it mounts on, and modules when the kernel needs some.
#
#   initramfs.sh OUTPUT-FILE AGENT [MODULES-DIRECTORY]
#
# A cpio archive (newc), uncompressed: the kernel's unpacking then is a copy, and hosts share its page cache. The same inputs give the
# same bytes.
set -euo pipefail

output=$(realpath -m "$1") agent=$2 modules=${3:-}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root"/{dev,proc,sys,run,tmp,etc}
install -m 0755 "$agent" "$root/init"
if [ -n "$modules" ]; then
    mkdir -p "$root/lib/modules"
    install -m 0644 "$modules"/* "$root/lib/modules/"
fi
find "$root" -exec touch -h -d @0 {} +
mkdir -p "$(dirname "$output")"
(cd "$root" && find . -mindepth 1 -printf '%P\0' | LC_ALL=C sort -z | cpio --quiet --null --create --format=newc --owner=+0:+0 --reproducible) >"$output.new"
mv "$output.new" "$output"
