#!/bin/bash
# Prints the program that emulates the node: QEMU of bookworm-backports, fetched once and put beside this machine's own, whose libraries it
# uses. QEMU 7.2 of Debian 12 emulates a machine that loses a wake-up now and then: a process or a whole nested guest sleeps for ever.
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
    "$here/../../../guest/debian-suite.sh" bookworm-backports "$work" qemu-system-x86 qemu-system-common qemu-system-data >&2
    mkdir "$work/result"
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$work/result/root"
    done
    cat >"$work/result/qemu" <<WRAPPER
#!/bin/sh
exec "$place/root/usr/bin/qemu-system-x86_64" -L "$place/root/usr/share/qemu" -L /usr/share/seabios "\$@"
WRAPPER
    chmod +x "$work/result/qemu"
    missing=$(ldd "$work/result/root/usr/bin/qemu-system-x86_64" | grep 'not found' || true)
    [ -z "$missing" ] || { echo "node: QEMU of bookworm-backports lacks libraries of this machine (run make setup): $missing" >&2; exit 1; }
    rm -rf "$place"
    mv "$work/result" "$place"
fi
echo "$place/qemu"
