#!/bin/bash
# Prints the program that emulates the node: QEMU of trixie-backports with its own libraries, fetched once and mended. Before QEMU 10.2 an
# emulated CPU can lose an interrupt that comes while it enters or leaves a nested guest (`interrupt_request` was changed by two threads,
# unprotected), and a process or a whole guest sleeps for ever; and up to now one can get an interrupt twice, which `mend-qemu.pl` takes from it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}
place="$cache/node-qemu-$(cat "$here/qemu.sh" "$here/mend-qemu.pl" | sha256sum | cut -c1-16)"

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
    # Another build of it may look otherwise: then it serves as it is, with a thread for each CPU (run.sh), for all but a guest in a hundred.
    if "$here/mend-qemu.pl" "$work/result/root/usr/bin/qemu-system-x86_64"; then
        touch "$work/result/mended"
    else
        echo "node: QEMU could not be mended: a nested guest may hang or fail now and then" >&2
    fi
    sed "s#^usr=.*#usr=$work/result/root/usr#" "$work/result/qemu" | sh -s -- --version >&2
    rm -rf "$place"
    mv "$work/result" "$place"
fi
echo "$place/qemu"
