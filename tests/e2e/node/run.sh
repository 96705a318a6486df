#!/bin/bash
# A node for commands: a VM of this checkout that stays up, with working KVM inside.
#
#   run.sh COMMAND...     boots the node unless it is up, runs the command in it, ends with the command's exit code
#   run.sh                an interactive shell
#   run.sh --start | --stop | --status | --console
#   run.sh --once COMMAND...   a fresh node for this command alone
#
# Environment: NODE_NAME (default: one node for each checkout), NODE_MEMORY (4G), NODE_CPUS (2), NODE_QEMU, and
# NODE_THREADS (single, or multi: one for each CPU; single is the default for a mended QEMU: mend-qemu.pl). The checkout and the cache
# are visible inside at their own paths, read-only; /run/node is a directory of the host, writable, `run.sh --status` says which.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
checkout=$(cd "$here/../../.." && pwd)
cache=${CAISSON_CACHE:-$HOME/.cache/caisson}
name=${NODE_NAME:-$(basename "$checkout")-$(echo "$checkout" | sha256sum | cut -c1-8)}
start_limit=${NODE_START_LIMIT:-240}

[ "${1-}" != --once ] || name=$name-once-$$
state=${TMPDIR:-/tmp}/caisson-node/$name

up() { [ -s "$state/pid" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null && [ -e "$state/ready" ]; }

secure_shell() { # ssh arguments...
    ssh -F none -i "$state/key" -p "$(cat "$state/port")" -o StrictHostKeyChecking=yes -o UserKnownHostsFile="$state/known_hosts" -o LogLevel=ERROR \
        -o ControlMaster=auto -o ControlPath="$state/control" -o ControlPersist=3600 -o ServerAliveInterval=15 -o ServerAliveCountMax=20 "$@"
}

launch() { # port
    local share="-fsdev local,security_model=none,multidevs=remap" qemu threads=multi
    qemu=${NODE_QEMU:-$("$here/qemu.sh")}
    # One thread for all CPUs is as fast, and nothing can happen between two instructions of an emulated CPU.
    [ ! -e "$(dirname "$qemu")/mended" ] || threads=single
    # TCG of QEMU 7.2 emulates cmpxchg16b wrongly now and then, so the kernel is told not to use it (not tried without since 10.0 is used).
    # Its SVM does not intercept xsetbv: KVM never learns which registers a guest saves, and the guest's processes lose their SSE
    # registers at a switch. Without xsave, everybody uses fxsave.
    # Polling before a halt costs an emulated CPU a sixth of what a pod's test takes.
    # shellcheck disable=SC2086
    setsid "$qemu" -nodefaults -no-user-config -display none -no-reboot -name "caisson-node-$name" \
        -machine q35 -accel "tcg,thread=${NODE_THREADS:-$threads}" -cpu max,+svm,+npt,-xsave -smp "${NODE_CPUS:-2}" -m "${NODE_MEMORY:-4G}" \
        -kernel "$image/vmlinux" -initrd "$image/initramfs.cpio" \
        -append "console=ttyS0 quiet loglevel=4 clearcpuid=cx16 mitigations=off audit=0 lsm=landlock,apparmor,bpf nokaslr net.ifnames=0 systemd.unified_cgroup_hierarchy=1 systemd.show_status=0 random.trust_cpu=on panic=-1 tsc=reliable nowatchdog kvm.halt_poll_ns=0 rcupdate.rcu_expedited=1" \
        -drive "if=none,id=root,file=$image/root.ext4,format=raw,snapshot=on,cache=unsafe,discard=unmap,detect-zeroes=unmap" -device virtio-blk-pci,drive=root \
        -device virtio-rng-pci -serial "file:$state/console" -monitor none \
        -netdev "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:$1-:22" -device virtio-net-pci,netdev=net,romfile= \
        $share,id=exchange,path="$state/exchange" -device virtio-9p-pci,fsdev=exchange,mount_tag=exchange \
        $share,id=checkout,path="$checkout",readonly=on -device virtio-9p-pci,fsdev=checkout,mount_tag=checkout \
        $share,id=cache,path="$cache",readonly=on -device virtio-9p-pci,fsdev=cache,mount_tag=cache \
        </dev/null >"$state/qemu.log" 2>&1 9>&- &
    echo $! >"$state/pid"
    echo "$1" >"$state/port"
}

start() {
    mkdir -p "$state"
    exec 9>"$state/lock"
    flock 9
    if up; then
        exec 9>&-
        return
    fi
    command -v ssh >/dev/null || { echo "node: ssh is missing: run make setup" >&2; exit 1; }
    image=$("$here/image.sh")
    [ ! -e "$state/console" ] || mv "$state/console" "$state/console.before"
    rm -rf "$state"/{exchange,key,key.pub,host_key*,known_hosts,control,ready,pid,port}
    mkdir -p "$state/exchange"
    ssh-keygen -q -t ed25519 -N '' -C node -f "$state/key"
    ssh-keygen -q -t ed25519 -N '' -C node -f "$state/host_key"
    mv "$state/host_key" "$state/key.pub" "$state/exchange/"
    printf 'checkout %s ro\ncache %s ro\n' "$checkout" "$cache" >"$state/exchange/shares"
    local begin=$SECONDS try
    for try in 1 2 3 4 5; do
        launch $((20000 + (RANDOM * 32768 + RANDOM) % 12000))
        sleep 0.2
        ! kill -0 "$(cat "$state/pid")" 2>/dev/null && grep -q 'Could not set up host forwarding' "$state/qemu.log" && [ $try -lt 5 ] || break
    done
    echo "[127.0.0.1]:$(cat "$state/port") $(cut -d' ' -f1,2 "$state/host_key.pub")" >"$state/known_hosts"
    until secure_shell -o ConnectTimeout=5 root@127.0.0.1 true 2>"$state/ssh.log"; do
        if ! kill -0 "$(cat "$state/pid")" 2>/dev/null || [ $((SECONDS - begin)) -gt "$start_limit" ]; then
            echo "node: did not come up; its console ends with" >&2
            tail -n 20 "$state/console" "$state/qemu.log" "$state/ssh.log" >&2 || true
            kill -9 "$(cat "$state/pid")" 2>/dev/null || true
            exit 125
        fi
        sleep 0.1
    done
    # The first VM that comes and the last one that goes, and each local APIC that a guest switches on, make KVM patch the kernel's code
    # (preempt_notifier_key, apic_sw_disabled), which QEMU's threads do not all see at once: on a busy machine the node dies of it. One VM
    # that stays, with one virtual CPU that never runs, spares it that: KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU.
    secure_shell root@127.0.0.1 'setsid perl -e "open(K, q(+<), q(/dev/kvm)) && (\$vm = ioctl(K, 0xae01, 0)) && open(V, q(+<&=), \$vm) && ioctl(V, 0xae60, 0) && ioctl(V, 0xae41, 0) && sleep" </dev/null >/dev/null 2>&1 &'
    touch "$state/ready"
    awk -v s=$((SECONDS - begin)) '{ printf "node: up in %d s (%.0f s of CPU time)\n", s, ($14 + $15) / 100 }' "/proc/$(cat "$state/pid")/stat" >&2
    exec 9>&-
}

stop() {
    if [ -s "$state/pid" ]; then
        secure_shell -O exit root@127.0.0.1 2>/dev/null || true
        kill "$(cat "$state/pid")" 2>/dev/null || true
    fi
    rm -rf "$state"
}

# A connection that has ended is made anew apart from the caller's output: the kept one would hold a pipe open.
connect() {
    secure_shell -O check root@127.0.0.1 2>/dev/null && return
    secure_shell -fN root@127.0.0.1 </dev/null >/dev/null 2>>"$state/ssh.log"
}

# Runs "$@" in the node, in the same directory, with the environment that the tests look at.
execute() {
    set +e
    local words="cd $(printf %q "$PWD") 2>/dev/null || cd $(printf %q "$checkout"); export HOME=/root CAISSON_CACHE=$(printf %q "$cache")" variable
    for variable in $(compgen -e | grep -E '^(CAISSON_|RUST_|BENCH_)' | grep -v '^CAISSON_CACHE$' || true); do
        words+="; export $variable=$(printf %q "${!variable}")"
    done
    connect
    if [ $# = 0 ]; then
        secure_shell -t root@127.0.0.1 "$words; exec bash -l"
    else
        secure_shell -T root@127.0.0.1 "$words; exec $(printf '%q ' "$@")"
    fi
    local code=$?
    # The connection breaks a moment before the process ends.
    local tries=30
    while [ $code = 255 ] && up && [ $tries -gt 0 ]; do
        tries=$((tries - 1))
        sleep 0.1
    done
    if [ $code = 255 ] && ! up; then
        echo "node: it ended; its console ends with" >&2
        tail -n 30 "$state/console" "$state/qemu.log" >&2
    fi
    return $code
}

case ${1-} in
--start) start ;;
--stop) stop ;;
--status)
    if up; then echo "node $name is up: process $(cat "$state/pid"), /run/node is $state/exchange, console $state/console"; else echo "node $name is down"; fi
    ;;
--console) tail -n +1 -f "$state/console" ;;
--once)
    shift
    trap stop EXIT
    start
    execute "$@"
    exit
    ;;
--*) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" >&2; exit 2 ;;
*)
    start
    execute "$@"
    ;;
esac
