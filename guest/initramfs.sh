#!/bin/bash
# Builds the guest's initramfs: the agent as /init, the directories that it mounts on, the default AppArmor profile, and modules when the
# kernel needs some.
#
#   initramfs.sh OUTPUT-FILE AGENT [MODULES-DIRECTORY]
#
# A cpio archive (newc), uncompressed: the kernel's unpacking then is a copy, and hosts share its page cache. The same inputs give the
# same bytes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=$(realpath -m "$1") agent=$2 modules=${3:-}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT

mkdir -p "$root"/{dev,proc,sys,run,tmp,etc}
install -m 0755 "$agent" "$root/init"
# Compiled for the guests' kernels, whatever this machine's can do; no configuration or cache of this machine's has a say.
parser=$(PATH=$PATH:/usr/sbin:/sbin command -v apparmor_parser) || { echo "initramfs: apparmor_parser is missing: run make setup" >&2; exit 1; }
"$parser" --config-file /dev/null --features-file "$here/apparmor/features" --skip-kernel-load --skip-cache --quiet \
    --ofile "$root/etc/apparmor-default" "$here/apparmor/default.profile"
[ -s "$root/etc/apparmor-default" ] || { echo "initramfs: the default AppArmor profile came out empty" >&2; exit 1; }
if [ -n "$modules" ]; then
    mkdir -p "$root/lib/modules"
    install -m 0644 "$modules"/* "$root/lib/modules/"
fi
find "$root" -exec touch -h -d @0 {} +
mkdir -p "$(dirname "$output")"
(cd "$root" && find . -mindepth 1 -printf '%P\0' | LC_ALL=C sort -z | cpio --quiet --null --create --format=newc --owner=+0:+0 --reproducible) >"$output.new"
mv "$output.new" "$output"
