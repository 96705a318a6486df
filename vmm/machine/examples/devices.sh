#!/bin/busybox sh
# /init of the guest that examples/devices.rs boots, beside a static busybox in /bin: uses every device by the kernel's own drivers, and
# says what it finds. The image's checksum must be the same everywhere.
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev

# wait_for SECONDS CONDITION...
wait_for() {
    tenths=$(($1 * 10)); shift
    until "$@" || [ $tenths -le 0 ]; do tenths=$((tenths - 1)); sleep 0.1; done
}
memory() { awk '/MemTotal/{print $2}' /proc/meminfo; }
has_memory() { [ "$(memory)" -gt "$1" ]; }
has_less_memory() { [ "$(memory)" -lt "$1" ]; }
has_sectors() { [ "$(cat /sys/block/vda/size)" = "$1" ]; }

echo "== devices"
for d in /sys/bus/virtio/devices/*; do echo "$(cat $d/device) $(cat $d/status) $(readlink $d/driver | sed 's/.*\///')"; done
echo "== disks"
md5sum /dev/vdb
dd if=/dev/vdb of=/dev/vda bs=64k conv=fsync 2>/dev/null
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda bs=1M count=2 2>/dev/null | md5sum
blkdiscard -l 1048576 /dev/vda && dd if=/dev/vda bs=1M count=1 2>/dev/null | md5sum
echo "DO grow"; wait_for 10 has_sectors 131072; cat /sys/block/vda/size
echo "== network"
ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 -w 20 10.9.0.1; ping -c 2 -s 1400 10.9.0.1 | tail -2
echo "== entropy"
cat /sys/class/misc/hw_random/rng_available; dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -C | head -1
echo "== memory"
memory; echo "DO plug"; wait_for 20 has_memory 350000; memory
mount -t tmpfs -o size=300m none /mnt; dd if=/dev/zero of=/mnt/x bs=1M count=200 2>/dev/null; md5sum /mnt/x; rm /mnt/x
echo "DO unplug"; wait_for 10 has_less_memory 150000; memory
echo "== hotplug"
echo "DO disk"; sleep 1; echo 1 > /sys/bus/pci/rescan
wait_for 10 test -e /dev/vdc; wait_for 10 test -e /dev/pmem0
cat /sys/block/vdc/serial; md5sum /dev/vdc; md5sum /dev/pmem0
grep virtio /proc/interrupts
echo "DO quit"; sleep 60; poweroff -f
