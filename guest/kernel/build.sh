#!/bin/bash
# Builds the tuned guest kernel from Debian's linux-source-6.12 with the fragments in config/.
#
#   build.sh OUTPUT
#
# Leaves OUTPUT/vmlinux (ELF with PVH entry, stripped), OUTPUT/bzImage and OUTPUT/config. The same sources, fragments and compiler give
# the same bytes: time, user, host and path are fixed. Results are cached by the hash of their inputs in
# ${CAISSON_CACHE:-~/.cache/caisson}; nothing is rebuilt when the hash is known. Needs about 3 GB of space while it builds.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
output=$1
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}
mkdir -p "$cache" "$output"

# The source package's version is part of the hash, so the list of packages is read even when nothing is built.
version_file="$cache/linux-source-6.12.deb"
if [ ! -s "$version_file" ]; then
    fetched=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$fetched"' EXIT
    "$here/../debian-suite.sh" bookworm-backports "$fetched" linux-source-6.12
    mv "$fetched"/linux-source-6.12_*.deb "$version_file"
fi
package=$(dpkg-deb -f "$version_file" Package)_$(dpkg-deb -f "$version_file" Version)
key=$({ echo "$package"; gcc -dumpfullversion; cat "$here"/config/*.config "$0"; } | sha256sum | cut -c1-16)
kernel="$cache/kernel-$key"

if [ ! -e "$kernel/vmlinux" ]; then
    echo "guest kernel: building $package ($key), about 13 CPU-minutes" >&2
    # A path that doesn't vary: it ends up in the image.
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    dpkg-deb -x "$version_file" "$work/package"
    tar -C "$work" -xf "$work/package/usr/src/linux-source-6.12.tar.xz"
    cd "$work/linux-source-6.12"
    cat "$here"/config/*.config >"$work/all.config"
    make -s KCONFIG_ALLCONFIG="$work/all.config" allnoconfig

    # A symbol that the sources renamed, or a dependency that is off, would silently drop a feature.
    missing=0
    while IFS= read -r line; do
        symbol=${line%%=*}
        case $line in
        *=n) if grep -q "^$symbol=" .config; then echo "guest kernel: $symbol is on, the fragments say off" >&2; missing=1; fi ;;
        *) if ! grep -qxF "$line" .config; then echo "guest kernel: $line is not in the resulting configuration" >&2; missing=1; fi ;;
        esac
    done < <(grep -h '^CONFIG' "$here"/config/*.config)
    [ "$missing" = 0 ] || exit 1

    export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=caisson KBUILD_BUILD_HOST=caisson KBUILD_BUILD_VERSION=1
    make -s -j"$(nproc)" KCFLAGS="-ffile-prefix-map=$work=." vmlinux bzImage
    mkdir -p "$work/result"
    strip --strip-debug -o "$work/result/vmlinux" vmlinux
    cp arch/x86/boot/bzImage .config "$work/result/"
    mv "$work/result/.config" "$work/result/config"
    rm -rf "$kernel"
    mv "$work/result" "$kernel"
    rm -rf "$work"
fi
cp "$kernel"/{vmlinux,bzImage,config} "$output/"
