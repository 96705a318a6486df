#!/bin/bash
# Fetches fsck.erofs and dump.erofs >= 1.8 (Debian 12 has 1.5, which lacks what the tests check) from the Debian mirror that this host
# already uses, through an apt configuration of its own: nothing is installed, and the host's package lists are not touched.
# Prints the path of a wrapper script around fsck.erofs.
#
# usage: fetch-erofs-utils.sh [destination]      default: ${CAISSON_CACHE:-$HOME/.cache/caisson}/erofs-utils-1.8
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
dest=${1:-${CAISSON_CACHE:-$HOME/.cache/caisson}/erofs-utils-1.8}
if [ -x "$dest/fsck.erofs" ]; then
    echo "$dest/fsck.erofs"
    exit 0
fi

mkdir -p "$(dirname "$dest")"
work=$(mktemp -d "$dest.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/debs" "$work/out/root"
"$here/../../../../guest/debian-suite.sh" trixie "$work/debs" erofs-utils libc6 libgcc-s1 libuuid1 libselinux1 libpcre2-8-0 zlib1g \
    liblz4-1 liblzma5 libzstd1 libdeflate0 libfuse3-4 libxxhash0 >&2
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/out/root"
done

# The programs run with the C library they were built for, not with the host's.
loader=$(cd "$work/out/root" && find . -name 'ld-linux-*.so.*' | sort | head -n 1)
for tool in fsck.erofs dump.erofs mkfs.erofs; do
    program=$(cd "$work/out/root" && find . -name "$tool" -type f | head -n 1)
    cat >"$work/out/$tool" <<EOF
#!/bin/sh
here=\$(dirname "\$(readlink -f "\$0")")
libraries=\$(find "\$here/root" -name '*.so.*' -printf '%h\n' | sort -u | tr '\n' ':')
exec "\$here/root/${loader#./}" --library-path "\$libraries" "\$here/root/${program#./}" "\$@"
EOF
    chmod +x "$work/out/$tool"
done
"$work/out/fsck.erofs" --version >&2
mv -T "$work/out" "$dest"
echo "$dest/fsck.erofs"
