#!/bin/bash
# `make bench-vmm`: the built-in VMM beside QEMU on the same KVM, inside a fresh node. Needs what `make build guest-tuned` leaves.
#
#   bench.sh [RUNS [VMS [SECONDS]]]      boots of each (10), idle VMs of each (20), seconds of each figure of disk and network (8)
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
cd "$checkout"
export NODE_NAME=${NODE_NAME:-bench-$$} NODE_MEMORY=${NODE_MEMORY:-6G}
export CAISSON_KERNEL=${CAISSON_KERNEL:-$checkout/guest/out/tuned/vmlinux} CAISSON_INITRAMFS=${CAISSON_INITRAMFS:-$checkout/guest/out/tuned/initramfs.cpio}

${CARGO:-cargo} build --release -p caisson-builtin --example bench
./target/release/packages
# 9p is no place to measure: everything is copied in.
mkdir -p target/node-bench
cp --reflink=auto target/release/{caissond,caisson-vmm,caisson-vhost-vsock,caisson-file-server,caisson-layer-converter,packages,bench-io,examples/bench} target/node-bench/
trap '"$here/run.sh" --stop' EXIT
"$here/run.sh" --start
in_node() { "$here/run.sh" "$@"; }
in_node bash -c "mkdir /tmp/bench && cp target/node-bench/* $CAISSON_KERNEL $CAISSON_INITRAMFS /tmp/bench && mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null; uname -r; grep -m1 'model name' /proc/cpuinfo"
export CAISSON_BIN_DIR=/tmp/bench
CAISSON_KERNEL=/tmp/bench/$(basename "$CAISSON_KERNEL") CAISSON_INITRAMFS=/tmp/bench/$(basename "$CAISSON_INITRAMFS")
echo "host: $(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r)"
in_node /tmp/bench/bench "$CAISSON_KERNEL" "$CAISSON_INITRAMFS" /tmp/bench/caisson-vmm "${1:-10}" "${2:-20}"
in_node /tmp/bench/bench-io "${3:-8}"
