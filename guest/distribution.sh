#!/bin/bash
# Prepares the distribution kernel: Debian's cloud kernel 6.12 of bookworm-backports, unpacked, never installed.
#
#   distribution.sh OUTPUT
#
# Leaves OUTPUT/vmlinuz and OUTPUT/modules/: the modules that the guest needs, uncompressed, and `caisson.order`, which names them in
# the order in which the agent loads them. The package is cached in ${CAISSON_CACHE:-~/.cache/caisson}.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=$1
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}
mkdir -p "$cache" "$output"

# Network and block devices, the vsock transport, image and container file systems; then what pods commonly use. vsock_loopback is left
# out on purpose: a container must not reach the agent's ports.
# fuse is loaded when the first shared volume appears, so it is not in the order.
modules=(virtio_blk virtio_net virtio_rng virtio_balloon vmw_vsock_virtio_transport erofs overlay fuse)

package="$cache/linux-image-6.12-cloud-amd64.deb"
if [ ! -s "$package" ]; then
    fetched=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$fetched"' EXIT
    "$here/debian-suite.sh" bookworm-backports "$fetched" 'linux-image-6.12.*-cloud-amd64'
    mv "$fetched"/linux-image-6.12*.deb "$package"
fi

key=$({ dpkg-deb -f "$package" Package Version; cat "$0"; } | sha256sum | cut -c1-16)
prepared="$cache/distribution-$key"
if [ ! -e "$prepared/vmlinuz" ]; then
    work=$(mktemp -d "$cache/unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    dpkg-deb -x "$package" "$work/root"
    release=$(basename "$work"/root/lib/modules/*)
    mkdir -p "$work/root/usr/lib/modules" "$work/result/modules"
    depmod -b "$work/root" "$release"
    for module in "${modules[@]}"; do
        modprobe -d "$work/root" -S "$release" --show-depends "$module" | sed -n 's/^insmod \([^ ]*\).*/\1/p'
    done | awk '!seen[$0]++' >"$work/paths"
    while read -r path; do
        name=$(basename "$path" | sed 's/\.ko.*/.ko/')
        case $path in
        *.xz) xz -dc "$path" ;;
        *.zst) zstd -dcq "$path" ;;
        *.gz) gzip -dc "$path" ;;
        *) cat "$path" ;;
        esac >"$work/result/modules/$name"
        strip --strip-debug "$work/result/modules/$name"
        echo "/lib/modules/$name"
    done <"$work/paths" >"$work/result/modules/caisson.order"
    cp "$work"/root/boot/vmlinuz-* "$work/result/vmlinuz"
    rm -rf "$prepared"
    mv "$work/result" "$prepared"
fi
mkdir -p "$output/modules"
cp "$prepared/vmlinuz" "$output/vmlinuz"
cp "$prepared"/modules/* "$output/modules/"
