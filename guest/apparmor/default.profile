# What confines a container that names no AppArmor profile, or RuntimeDefault. It has the whole of the container's own files and network;
# what it is kept from are the guest kernel's interfaces, which the other containers of the pod depend on. Mounts are left to
# CAP_SYS_ADMIN: a pod that is given it, for FUSE or containers of its own, runs in a VM so that it may use it. Signals are left to PID
# namespaces: PID 1 of a shared one is not confined, and containers are used to talk to it.
#
# Compiled by guest/initramfs.sh for the classes in `features`, which both guest kernels have; mounts and signals are not among them. No
# includes: the result depends on nothing but this file, that one, and the compiler.

profile caisson-default flags=(attach_disconnected,mediate_deleted) {
  file,
  capability,
  network,
  # Whom the seccomp filter lets through: nobody but the agent talks to the host over vsock.
  deny network vsock,

  # Each other, and not the agent.
  ptrace (read, readby, trace, tracedby) peer=caisson-default,

  # Of /proc only the directories of processes can be written to, and the sizes of System V shared memory.
  deny /proc/* w,
  deny /proc/{acpi,asound,bus,driver,dynamic_debug,fs,irq,scsi,sysvipc,tty}/** w,
  deny /proc/sys/{[^k],k[^e]}** w,
  deny /proc/sys/kernel/{[^s],s[^h],sh[^m]}** w,
  deny /proc/{kcore,sysrq-trigger} rwklx,

  # Of /sys only the container's cgroup.
  deny /sys/{[^f],f[^s]}** wkl,
  deny /sys/fs/{[^c],c[^g],cg[^r]}** wkl,
  deny /sys/firmware/** rwkl,
  deny /sys/kernel/{debug,security,tracing}/** rwkl,
  deny /sys/devices/virtual/powercap/** rwkl,
}
