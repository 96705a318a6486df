#!/bin/bash
# containerd and runc from Debian unstable, unpacked for themselves: the runtime that ours is compared with. Nothing is installed.
#
#   containerd.sh DIRECTORY
#
# Leaves DIRECTORY/bin (containerd, containerd-shim-runc-v2, runc) and DIRECTORY/versions. Does nothing when they are there.
set -euo pipefail

dir=$1
[ -e "$dir/versions" ] && exit 0
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{debs,root}
"$(dirname "$0")/../guest/debian-suite.sh" sid "$work/debs" containerd runc libc6 libseccomp2
# This one runs on the machine itself.
mkdir "$work/own"
(cd "$work/own" && apt-get -qq -o APT::Sandbox::User=root download patchelf)
dpkg-deb -x "$work"/own/patchelf_*.deb "$work/own"
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done

rm -rf "$dir"
mkdir -p "$dir"/{bin,lib}
cp "$work"/root/usr/bin/{containerd,containerd-shim-runc-v2} "$work/root/usr/sbin/runc" "$dir/bin/" 2>/dev/null ||
    cp "$work"/root/usr/bin/{containerd,containerd-shim-runc-v2,runc} "$dir/bin/"
libraries=$work/root/usr/lib/x86_64-linux-gnu
cp "$libraries"/{ld-linux-x86-64.so.2,libc.so.6,libseccomp.so.2,libm.so.6,libresolv.so.2,libpthread.so.0,libdl.so.2} "$dir/lib/"
# Built for a newer libc than the machine's.
for program in "$dir"/bin/*; do
    if readelf -l "$program" | grep -q 'program interpreter'; then
        "$work/own/usr/bin/patchelf" --set-interpreter "$dir/lib/ld-linux-x86-64.so.2" --set-rpath "$dir/lib" "$program"
    fi
    "$program" -v >"$work/version" || { echo "containerd.sh: $program does not run" >&2; exit 1; }
    echo "${program##*/} $(grep -oE '[0-9]+\.[0-9]+\.[0-9]+[^ ]*' "$work/version" | head -1)"
done >"$work/versions"
mv "$work/versions" "$dir/versions"
cat "$dir/versions"
