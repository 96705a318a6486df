#!/bin/bash
# `make bench-vmm`: the built-in VMM beside QEMU on the same KVM, inside a fresh node. Needs what `make build guest-tuned` leaves.
#
#   bench.sh [RUNS [VMS [SECONDS]]]      boots of each (10), idle VMs of each (20), seconds of each figure of disk and network (8)
#
# Two parts, boots and memory, then disks and network; each fails alone and says so, and prints its tables as they are ready. What was
# printed stays in target/node-bench/results.md, messages in messages.log. BENCH_PARTS="boot io" chooses. About 20 minutes.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
cd "$checkout"
export NODE_NAME=${NODE_NAME:-bench-$$} NODE_MEMORY=${NODE_MEMORY:-6G}
export CAISSON_KERNEL=${CAISSON_KERNEL:-$checkout/guest/out/tuned/vmlinux} CAISSON_INITRAMFS=${CAISSON_INITRAMFS:-$checkout/guest/out/tuned/initramfs.cpio}
results=target/node-bench
# Seconds after which a part is given up: twice what it should take.
boot_limit=${BENCH_BOOT_LIMIT:-1500} io_limit=${BENCH_IO_LIMIT:-1200}

fail() { echo "bench-vmm: $1" >&2; exit 1; }
${CARGO:-cargo} build --release -p caisson-builtin --example bench || fail "the bench does not build"
./target/release/packages || fail "no packages"
# 9p is no place to measure: everything is copied in.
mkdir -p $results
programs=(caissond caisson-vmm caisson-vhost-vsock caisson-file-server caisson-layer-converter packages bench-io)
(cd target/release && cp --reflink=auto "${programs[@]}" examples/bench "$checkout/$results/") || fail "programs are missing: run make build"
[ -s "$CAISSON_KERNEL" ] && [ -s "$CAISSON_INITRAMFS" ] || fail "the guest is missing: run make guest-tuned"
trap '"$here/run.sh" --stop' EXIT
in_node() { "$here/run.sh" "$@"; }
inputs="$(printf "$results/%s " "${programs[@]}" bench) $CAISSON_KERNEL $CAISSON_INITRAMFS"
fresh_node() {
    "$here/run.sh" --start || return 1
    in_node bash -c "mkdir /tmp/bench && cp $inputs /tmp/bench" || return 1
    # KVM's counters, the histogram of exits, and QEMU's vsock; without one of them its figures are left out.
    in_node bash -c 'mount -t debugfs debugfs /sys/kernel/debug; mount -t tracefs tracefs /sys/kernel/tracing; modprobe -a kvm-amd vhost_vsock vhost_net tun' 2>/dev/null
    true
}
fresh_node || fail "there is no node"
export CAISSON_BIN_DIR=/tmp/bench
CAISSON_KERNEL=/tmp/bench/$(basename "$CAISSON_KERNEL") CAISSON_INITRAMFS=/tmp/bench/$(basename "$CAISSON_INITRAMFS")

failed=()
part() { # name limit command...
    local name=$1 limit=$2 began=$SECONDS code
    shift 2
    # The limit is kept inside: whatever it started there goes with it.
    in_node timeout --kill-after=30 "$limit" "$@" 2> >(tee -a $results/messages.log >&2) | tee -a $results/results.md
    code=${PIPESTATUS[0]}
    [ "$code" != 124 ] || echo "- $name: given up after $limit s"
    [ "$code" = 0 ] || failed+=("$name ($code)")
    echo "bench-vmm: $name took $((SECONDS - began)) s" >&2
    # The next part deserves a node that lives.
    if ! timeout 60 "$here/run.sh" true 2>/dev/null; then
        echo "bench-vmm: the node died under $name; the end of its console:" >&2
        tail -n 30 "${TMPDIR:-/tmp}/caisson-node/$NODE_NAME/console" >&2
        "$here/run.sh" --stop
        fresh_node || fail "there is no other node"
    fi
}

: >$results/messages.log
{
    echo "host: $(nproc) x $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), Linux $(uname -r), load $(cut -d' ' -f1-3 /proc/loadavg)"
    in_node bash -c 'echo "node: $(nproc) x $(sed -n "s/^model name[^:]*: //p" /proc/cpuinfo | head -n 1), Linux $(uname -r)"'
} | tee $results/results.md
for one in ${BENCH_PARTS:-boot io}; do
    case $one in
    boot) part boots "$boot_limit" /tmp/bench/bench "$CAISSON_KERNEL" "$CAISSON_INITRAMFS" /tmp/bench/caisson-vmm "${1:-10}" "${2:-20}" ;;
    io) part "disks and network" "$io_limit" /tmp/bench/bench-io "${3:-8}" ;;
    *) fail "there is no part $one" ;;
    esac
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "bench-vmm: incomplete: ${failed[*]}; what there is: $results" >&2
    exit 1
fi
