#!/bin/bash
# Installs what building and testing need, from Debian's packages; does nothing when all is there.
set -euo pipefail

packages=(
    build-essential protobuf-compiler pkg-config         # build; protoc only for the tests' CRI client
    flex bison bc libelf-dev libssl-dev lz4 zstd xz-utils kmod cpio  # guest kernel and initramfs
    qemu-system-x86 e2fsprogs iproute2 iptables          # run
    containernetworking-plugins docker-registry busybox  # test peers
    mmdebstrap debian-archive-keyring openssh-client  # node VM
    apparmor                                             # compiles the guest's default profile, and those of tests
    ca-certificates curl
)

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f '${Status}\n' "$package" 2>/dev/null | grep -q '^install ok installed$' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    [ "$(id -u)" = 0 ] || { echo "setup: run as root to install: ${missing[*]}" >&2; exit 1; }
    echo "setup: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # A service that a package would start (docker-registry) is not wanted on this machine.
    policy=/usr/sbin/policy-rc.d
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
        trap 'rm -f $policy' EXIT
    fi
    apt-get -qq update
    apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
fi

for tool in cargo; do
    command -v $tool >/dev/null || { echo "setup: $tool is missing: install Rust 1.95 or later (https://rustup.rs)" >&2; exit 1; }
done
