#!/bin/bash
# critest inside a fresh node, on the driver that its KVM makes the default. Needs what `make build guest-tuned` and peers.sh leave.
#
#   critest.sh [CRITEST-WORDS...]     as target/release/critest takes them (--focus REGEXP, --skip REGEXP)
#
# Ends as that program does: with its counts, and with an error when a spec fails that docs/conformance.md does not list. The reports
# stay in target/node-critest.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
cd "$checkout"
results=target/node-critest
export CAISSON_KERNEL=${CAISSON_KERNEL:-$checkout/guest/out/tuned/vmlinux} CAISSON_INITRAMFS=${CAISSON_INITRAMFS:-$checkout/guest/out/tuned/initramfs.cpio}
# An emulated machine's conditions come late.
export CAISSON_TEST_PATIENCE=${CAISSON_TEST_PATIENCE:-4}
export NODE_NAME=${NODE_NAME:-critest-$$}

rm -rf "$results"
mkdir -p "$results"
./target/release/packages || exit 1
# Copies, so that somebody may go on building meanwhile.
mkdir "$results/bin"
cp --reflink=auto target/release/{caissond,caisson-vmm,caisson-vhost-vsock,caisson-file-server,caisson-layer-converter,packages,critest} \
    "$CAISSON_KERNEL" "$CAISSON_INITRAMFS" "$results/bin/"
# The node's own disk holds what runs in it: what comes through 9p comes page by page and is never cached.
export CAISSON_BIN_DIR=/var/lib/caisson-tests
CAISSON_KERNEL=$CAISSON_BIN_DIR/$(basename "$CAISSON_KERNEL") CAISSON_INITRAMFS=$CAISSON_BIN_DIR/$(basename "$CAISSON_INITRAMFS")
trap '"$here/run.sh" cp -r /tmp/critest /run/node/ 2>/dev/null; cp -r "${TMPDIR:-/tmp}/caisson-node/$NODE_NAME"/{console,exchange/critest} "$results/" 2>/dev/null; "$here/run.sh" --stop' EXIT
"$here/run.sh" --start && "$here/run.sh" cp -r "$checkout/$results/bin" "$CAISSON_BIN_DIR" || exit 1
"$here/run.sh" "$CAISSON_BIN_DIR/caissond" --kernel "$CAISSON_KERNEL" --initramfs "$CAISSON_INITRAMFS" check | grep hypervisor # a fresh node has no network for pods; critest makes its own
# What emulates the node is not above suspicion (mend-qemu.pl): a spec that fails is tried once more, and both are told of.
"$here/run.sh" "$CAISSON_BIN_DIR/critest" --report /tmp/critest --attempts 2 "$@"
