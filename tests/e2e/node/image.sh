#!/bin/bash
# Builds the node: kernel, initramfs and root file system of a Debian machine that can run VMs. Root only, cached.
#
#   image.sh        prints the directory that has vmlinux, initramfs.cpio and root.ext4
#
# Debian 12 with systemd and the unified cgroup hierarchy, the kernel of bookworm-backports (not its cloud flavour, which lacks 9p), the
# peers that the tests talk to. Made again when this directory changes; delete ${CAISSON_CACHE:-~/.cache/caisson}/node-* for newer packages.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
repository=$(cd "$here/../../.." && pwd)
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}

packages=(
    systemd-sysv dbus udev kmod procps e2fsprogs       # a machine
    openssh-server                                     # how commands get in and results out
    iproute2 iptables nftables containernetworking-plugins docker-registry socat busybox ca-certificates gcc libc6-dev  # what tests use
    qemu-system-x86 libelf1                            # the other driver
    apparmor sudo                                      # profiles of this machine's kernel, which critest loads as any user would
    fio iperf3 strace                                  # measuring and looking
)
# What such a machine may load; what these need comes along.
modules=(
    arch/x86/kvm drivers/vhost drivers/block drivers/virtio drivers/net/{tun,tap,macvlan,macvtap,veth,dummy,virtio_net,geneve,ifb,vrf}.ko.xz
    drivers/net/{ipvlan,vxlan,wireguard} drivers/char/hw_random/virtio-rng.ko.xz drivers/block/loop.ko.xz
    fs/{9p,ext4,xfs,erofs,squashfs,overlayfs,nfs,configfs,fuse} fs/binfmt_misc.ko.xz net/9p
    net/{8021q,802,bridge,core,ipv4,ipv6,netfilter,netlink,packet,sched,tls,unix,vmw_vsock,xfrm,key}
    arch/x86/crypto crypto lib
)

mkdir -p "$cache"
deb="$cache/linux-image-6.12-amd64.deb"
if [ ! -s "$deb" ]; then
    fetched=$(mktemp -d "$cache/fetch.XXXXXX")
    trap 'rm -rf "$fetched"' EXIT
    "$repository/guest/debian-suite.sh" bookworm-backports "$fetched" 'linux-image-6.12.*+deb12-amd64' >&2
    mv "$fetched"/linux-image-6.12*.deb "$deb"
fi
key=$({ dpkg-deb -f "$deb" Package Version; cat "$0"; cd "$here/root"; find . -type f | sort | xargs tail -n +1; } | sha256sum | cut -c1-16)
node="$cache/node-$key"
if [ -e "$node/root.ext4" ]; then
    echo "$node"
    exit
fi

# One at a time: others wait and find it done.
exec 9>"$cache/node.lock"
flock 9
if [ -e "$node/root.ext4" ]; then
    echo "$node"
    exit
fi
for tool in mmdebstrap mke2fs depmod cpio zstd; do
    command -v $tool >/dev/null || { echo "node image: $tool is missing: run make setup" >&2; exit 1; }
done
echo "node image: building $node (about 3 minutes)" >&2
work=$(mktemp -d "$cache/node-work.XXXXXX")
trap 'rm -rf "$work"' EXIT

# The packages apart, so that a change of settings need not unpack them again.
tar="$cache/node-packages-$(echo "${packages[@]}" | sha256sum | cut -c1-16).tar"
if [ ! -s "$tar" ]; then
    uri=$("$repository/guest/debian-suite.sh" --archive)
    mmdebstrap --quiet --variant=minbase --include="$(IFS=,; echo "${packages[*]}")" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        bookworm "$work/root.tar" "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $uri bookworm main" >&2
    mv "$work/root.tar" "$tar"
fi
mkdir "$work/root" "$work/kernel" "$work/initramfs" "$work/result"
tar -C "$work/root" -xf "$tar" --exclude='./dev/*'
root="$work/root"

# Modules, uncompressed: xz costs seconds under emulation.
dpkg-deb -x "$deb" "$work/kernel"
release=$(basename "$work"/kernel/lib/modules/*)
tree="$work/kernel/lib/modules/$release"
mkdir -p "$work/kernel/usr/lib/modules"
depmod -b "$work/kernel" "$release"
for part in "${modules[@]}"; do
    find "$tree/kernel/$part" -name '*.ko.xz'
done | sed 's,.*/,,; s,\.ko\.xz,,' | sort -u | xargs modprobe -d "$work/kernel" -S "$release" -a --show-depends 2>/dev/null |
    sed -n 's/^insmod \([^ ]*\).*/\1/p' | sort -u >"$work/wanted"
while read -r path; do
    to="$root/lib/modules/$release/${path#*"/$release/"}"
    mkdir -p "$(dirname "$to")"
    xz -dc "$path" >"${to%.xz}"
done <"$work/wanted"
cp "$tree"/modules.{order,builtin,builtin.modinfo} "$root/lib/modules/$release/"
depmod -b "$root" "$release"

# The kernel as ELF for PVH: neither firmware nor decompression under emulation. Its compressed form is one of the places that look
# like a zstd frame.
LC_ALL=C grep -obUaP '\x28\xb5\x2f\xfd' "$work"/kernel/boot/vmlinuz-* | cut -d: -f1 | while read -r offset; do
    tail -c+$((offset + 1)) "$work"/kernel/boot/vmlinuz-* | zstd -dcq 2>/dev/null >"$work/result/vmlinux" || true # what follows the frame is noise
    if [ "$(head -c4 "$work/result/vmlinux" | tail -c3)" = ELF ]; then break; fi
done
[ -s "$work/result/vmlinux" ] || { echo "node image: no ELF kernel inside $deb" >&2; exit 1; }

# First user space: the disk's modules, the disk, and over to systemd.
mkdir -p "$work"/initramfs/{bin,dev,proc,sys,root,lib64,modules}
cp "$root/bin/busybox" "$work/initramfs/bin/"
for library in libc.so.6 libresolv.so.2 libm.so.6; do
    install -D "$root/lib/x86_64-linux-gnu/$library" "$work/initramfs/lib/x86_64-linux-gnu/$library"
done
cp -L "$root/lib64/ld-linux-x86-64.so.2" "$work/initramfs/lib64/"
modprobe -d "$root" -S "$release" -a --show-depends virtio_blk crc32c_generic ext4 | sed -n 's/^insmod \([^ ]*\).*/\1/p' | awk '!seen[$0]++' |
    while read -r path; do
        cp "$path" "$work/initramfs/modules/"
        basename "$path" >>"$work/initramfs/modules/order"
    done
cat >"$work/initramfs/init" <<'INIT'
#!/bin/busybox sh
export PATH=/bin
busybox mount -t proc proc /proc
busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
while read -r module; do insmod "/modules/$module"; done </modules/order
tries=100
until mount -t ext4 -o rw,noatime /dev/vda /root || [ $tries = 0 ]; do
    tries=$((tries - 1))
    sleep 0.1
done
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root /sbin/init
INIT
chmod +x "$work/initramfs/init"
(cd "$work/initramfs" && find . | sort | cpio --quiet -o -H newc) >"$work/result/initramfs.cpio"

# The machine's own settings; services that a node in a VM has no use for go.
cp -rT "$here/root" "$root"
ln -sf /etc/systemd/system/node.service "$root/etc/systemd/system/multi-user.target.wants/node.service"
ln -sf /usr/lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
rm -f "$root"/etc/systemd/system/*.wants/{docker-registry,nftables,fstrim,apt-*,dpkg-*,e2scrub*,ssh,iperf3,remote-fs}* \
    "$root"/etc/systemd/system/sysinit.target.wants/systemd-pstore.service
for unit in getty.target serial-getty@ttyS0 apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap \
    fstrim.timer ssh docker-registry logrotate.timer systemd-tmpfiles-clean.timer dev-hugepages.mount proc-sys-fs-binfmt_misc.automount \
    systemd-{udevd,udev-trigger,udevd-control.socket,udevd-kernel.socket,hwdb-update,modules-load,sysusers,firstboot,repart,binfmt,sysctl} \
    systemd-{update-utmp,update-utmp-runlevel,journal-flush,random-seed,machine-id-commit,pstore,networkd,user-sessions,logind,pcrphase,pcrphase-sysinit} \
    systemd-{ask-password-wall.path,ask-password-console.path,journald-audit.socket,initctl.socket,tmpfiles-setup-dev} kmod-static-nodes ldconfig \
    apparmor modprobe@{configfs,dm_mod,drm,fuse,loop,efi_pstore}; do
    [[ $unit == *.* ]] || unit=$unit.service
    ln -sfn /dev/null "$root/etc/systemd/system/$unit"
done
: >"$root/etc/fstab"
echo node >"$root/etc/hostname"
printf '127.0.0.1 localhost node\n::1 localhost\n' >"$root/etc/hosts"
echo 0123456789abcdef0123456789abcdef >"$root/etc/machine-id"
mkdir -p "$root/run/sshd"

truncate -s 12G "$work/result/root.ext4"
mke2fs -q -t ext4 -O ^has_journal -E lazy_itable_init=1,nodiscard -d "$root" "$work/result/root.ext4"
rm -rf "$node"
mv "$work/result" "$node"
echo "$node"
