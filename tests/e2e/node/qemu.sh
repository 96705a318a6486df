#!/bin/bash
# Prints the program that emulates the node: QEMU of trixie-backports with its own libraries, fetched once. Before QEMU 10.2 an emulated CPU
# can lose an interrupt that comes while it enters or leaves a nested guest (`interrupt_request` was changed by two threads, unprotected): a
# process or a whole guest of the node then sleeps for ever, once in some dozens of them.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}
place="$cache/node-qemu-$(sha256sum <"$0" | cut -c1-16)"

if [ ! -x "$place/qemu" ]; then
    mkdir -p "$cache"
    exec 9>"$cache/node-qemu.lock"
    flock 9
fi
if [ ! -x "$place/qemu" ]; then
    work=$(mktemp -d "$cache/node-qemu-work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    "$here/../../../guest/debian-suite.sh" --with-dependencies trixie,trixie-backports "$work" qemu-system-x86 >&2
    mkdir "$work/result"
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$work/result/root"
    done
    cat >"$work/result/qemu" <<WRAPPER
#!/bin/sh
usr=$place/root/usr
export QEMU_MODULE_DIR=\$usr/lib/x86_64-linux-gnu/qemu
exec "\$usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" --library-path "\$usr/lib/x86_64-linux-gnu" "\$usr/bin/qemu-system-x86_64" \\
    -L "\$usr/share/qemu" -L "\$usr/share/seabios" "\$@"
WRAPPER
    chmod +x "$work/result/qemu"
    sed "s#^usr=.*#usr=$work/result/root/usr#" "$work/result/qemu" | sh -s -- --version >&2
    rm -rf "$place"
    mv "$work/result" "$place"
fi
echo "$place/qemu"
