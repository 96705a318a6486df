#!/bin/bash
# caissond in the foreground for trying by hand: state below one directory, a bridge network for pods, HTTP registries on loopback.
#
#   run-by-hand.sh DIRECTORY
set -euo pipefail

here=$(cd "$(dirname "$0")/.." && pwd)
dir=$1
mkdir -p "$dir/cni"
cat >"$dir/cni/10-caisson.conflist" <<CONFLIST
{
  "cniVersion": "1.0.0",
  "name": "caisson",
  "plugins": [
    { "type": "bridge", "bridge": "caisson0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
      "ipam": { "type": "host-local", "dataDir": "$dir/cni/leases",
                "ranges": [[{ "subnet": "10.89.0.0/16" }], [{ "subnet": "fd00:89::/64" }]],
                "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }] } },
    { "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }
  ]
}
CONFLIST
guest=$here/guest/out/distribution
echo "CRI socket: unix://$dir/run/caisson.sock   (end with Ctrl-C; pods go on and are found again at the next start)"
exec "$here/target/release/caissond" --root "$dir/root" --run-dir "$dir/run" --listen "$dir/run/caisson.sock" --nri-socket "$dir/run/nri.sock" \
    --cni-conf-dir "$dir/cni" --cni-bin-dir /usr/lib/cni --kernel "$guest/vmlinuz" --initramfs "$guest/initramfs.cpio"
