#!/bin/bash
# The end-to-end suite inside a fresh node, with KVM. Needs what `make build guest-tuned crictl` leaves.
#
#   suite.sh            every test binary of tests/e2e that a node can run
#   suite.sh NAME...    these alone (pods, isolation, ...); NAME=FILTER runs the tests of NAME that contain FILTER
#
# Output comes as it happens. Ends with the sum of all, and with an error when a test failed or a binary ended without a result. The guest is
# the tuned kernel's unless CAISSON_KERNEL and CAISSON_INITRAMFS say otherwise. Results stay in target/node: one log for each binary,
# the node's console and kernel log.
set -uo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
cd "$checkout"
results=target/node
export CAISSON_KERNEL=${CAISSON_KERNEL:-$checkout/guest/out/tuned/vmlinux} CAISSON_INITRAMFS=${CAISSON_INITRAMFS:-$checkout/guest/out/tuned/initramfs.cpio}
# An emulated machine's conditions come late.
export CAISSON_TEST_PATIENCE=${CAISSON_TEST_PATIENCE:-4}
export NODE_NAME=${NODE_NAME:-suite-$$}
# What the tests' daemons say, kept of binaries that fail.
exchange=${TMPDIR:-/tmp}/caisson-node/$NODE_NAME/exchange
export CAISSON_TEST_LOGS=/run/node/logs

# Copies, and adds to each test what it took.
timed() {
    local line last=$SECONDS
    while IFS= read -r line || [ -n "$line" ]; do
        if [[ $line =~ ^(test\ .*\ \.\.\.\ )?(ok|FAILED)$ ]]; then
            line+=" ($((SECONDS - last)) s)"
            last=$SECONDS
        fi
        printf '%s\n' "$line"
    done
}

rm -rf "$results"
mkdir -p "$results"
# Cargo compiles; only executables go in. architecture asks cargo, which a node has not.
${CARGO:-cargo} test --release -p caisson-e2e --no-run --message-format=json-render-diagnostics >"$results/cargo.json" || exit 1
declare -A executables
while IFS=$'\t' read -r name path; do
    executables[$name]=$path
done < <(sed -nE '/"kind":\["test"\]/s/.*"name":"([a-z_0-9]+)","src_path".*"executable":"([^"]+)".*/\1\t\2/p' "$results/cargo.json")
[ ${#executables[@]} -gt 0 ] || { echo "node suite: cargo named no test executables" >&2; exit 1; }
./target/release/packages || exit 1
# Copies, so that somebody may go on building meanwhile.
mkdir "$results/bin"
for name in "${!executables[@]}"; do
    cp --reflink=auto "${executables[$name]}" "$results/bin/test-$name"
    executables[$name]=/var/lib/caisson-tests/test-$name
done
cp --reflink=auto target/release/{caissond,caisson-vmm,caisson-vhost-vsock,caisson-file-server,caisson-layer-converter,packages} "$results/bin/"
cp --reflink=auto "$CAISSON_KERNEL" "$CAISSON_INITRAMFS" "$results/bin/"
# The node's own disk holds what runs in it: an executable or a kernel that comes through 9p comes page by page and is never cached.
export CAISSON_BIN_DIR=/var/lib/caisson-tests
CAISSON_KERNEL=$CAISSON_BIN_DIR/$(basename "$CAISSON_KERNEL") CAISSON_INITRAMFS=$CAISSON_BIN_DIR/$(basename "$CAISSON_INITRAMFS")
boot() {
    "$here/run.sh" --start && "$here/run.sh" cp -r "$checkout/$results/bin" "$CAISSON_BIN_DIR"
}

wanted=("$@")
if [ $# = 0 ]; then
    mapfile -t wanted < <(printf '%s\n' "${!executables[@]}" | grep -vx architecture | sort)
    echo "node suite: architecture is left out: it asks cargo, which a node has not; make e2e runs it"
fi

began=$SECONDS
trap 'cp "${TMPDIR:-/tmp}/caisson-node/$NODE_NAME/console" "$results/console.log"; "$here/run.sh" --stop' EXIT
boot || exit 1
"$here/run.sh" "$CAISSON_BIN_DIR/caissond" --kernel "$CAISSON_KERNEL" --initramfs "$CAISSON_INITRAMFS" check | tee "$results/check.log"
passed=0 failed=0 skipped=0 deaths=0 broken=()
run_binary() { # of name and filter; its exit code becomes code
    rm -rf "$exchange/logs"
    mkdir "$exchange/logs"
    echo "=== $name, inside the node, at $((SECONDS - began)) s"
    "$here/run.sh" "${executables[$name]}" --test-threads=1 "${filter[@]}" 2>&1 | timed | tee "$results/$name.log"
    code=${PIPESTATUS[0]}
}
for one in "${wanted[@]}"; do
    name=${one%%=*} filter=()
    [ "$name" = "$one" ] || filter=("${one#*=}")
    if [ -z "${executables[$name]-}" ]; then
        echo "node suite: there is no test binary $name" >&2
        exit 2
    fi
    run_binary
    # Nested virtualization under emulation is not a machine one would buy: one death of the node itself is not the product's.
    if [ "$code" != 0 ] && [ "$deaths" = 0 ] && ! timeout 60 "$here/run.sh" true 2>/dev/null; then
        deaths=1
        echo "node suite: the node itself died under $name; the end of its console:"
        tail -n 40 "${TMPDIR:-/tmp}/caisson-node/$NODE_NAME/console"
        cp "${TMPDIR:-/tmp}/caisson-node/$NODE_NAME/console" "$results/console-of-the-dead.log"
        echo "node suite: once more, in a fresh node"
        "$here/run.sh" --stop
        boot || exit 1
        run_binary
    fi
    line=$(grep -E '^test result: ' "$results/$name.log" | tail -n 1)
    if [[ $line =~ ([0-9]+)\ passed\;\ ([0-9]+)\ failed\;\ ([0-9]+)\ ignored ]]; then
        passed=$((passed + BASH_REMATCH[1])) failed=$((failed + BASH_REMATCH[2])) skipped=$((skipped + BASH_REMATCH[3]))
    fi
    reasons=$(grep -cE '^(test .* \.\.\. )?skipped: ' "$results/$name.log")
    passed=$((passed - reasons)) skipped=$((skipped + reasons))
    if [ "$code" != 0 ] || [ -z "$line" ]; then
        broken+=("$name ($code)")
        cp -r "$exchange/logs" "$results/$name-daemons"
        "$here/run.sh" dmesg 2>/dev/null | tail -n 30
    fi
done
"$here/run.sh" dmesg >"$results/dmesg.log" 2>/dev/null
[ $deaths = 0 ] || echo "node suite: the node died once, see $results/console-of-the-dead.log"
awk -v s=$((SECONDS - began)) 'BEGIN { printf "node suite: %.1f min\n", s / 60 }'
if [ ${#broken[@]} -gt 0 ]; then
    echo "node suite: failed: ${broken[*]}; see $results"
    [ $failed -gt 0 ] || failed=1
fi
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ] && [ $passed -gt 0 ]
