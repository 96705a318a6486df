//! PID 1 of the guest: makes the kernel's file systems available, loads modules, starts the agent, and from then on only reaps.
//!
//! Because the agent is another process, `wait` for any child never takes an exit code that the agent waits for. When the agent is
//! gone, the VM is switched off: without it nobody could learn how the containers end.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::Path,
    process::{Command, ExitCode},
};

use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount, mount_move},
    process::{DumpableBehavior, Pid, WaitOptions, set_dumpable_behavior},
    system::{RebootCommand, reboot},
};

use crate::{
    apparmor, clock,
    console::complain,
    error::{AgentError, At, chain},
    kernel_modules,
};

/// What is mounted for the agent, relative to the new root: type, place, flags, options.
const FILE_SYSTEMS: [(&str, &str, MountFlags, &std::ffi::CStr); 5] = [
    ("proc", "proc", NO_EXEC, c""),
    ("sysfs", "sys", NO_EXEC, c""),
    ("devtmpfs", "dev", MountFlags::NOSUID, c"mode=0755"),
    ("tmpfs", "run", MountFlags::NOSUID, c"mode=0755"),
    ("cgroup2", "sys/fs/cgroup", NO_EXEC, c"nsdelegate"),
];

const NO_EXEC: MountFlags = MountFlags::NOSUID
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC);

/// Where the root of the guest is made ready before it is moved over the initramfs.
const NEW_ROOT: &str = "/caisson-root";

/// Runs as PID 1; returns only when the VM cannot be switched off.
pub(crate) fn main() -> ExitCode {
    let started = clock::boot_nanos();
    // A container in the guest's own PID namespace sees this process, and must not look into it.
    if let Err(error) = set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        complain(&format!("hiding init: {error}"));
    }
    let agent = match prepare().and_then(|()| start_agent(started)) {
        Ok(agent) => agent,
        Err(error) => {
            complain(&format!("cannot start: {}", chain(&error)));
            return power_off();
        }
    };
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == agent => {
                complain(&format!("the agent ended with {status:?}; switching off"));
                return power_off();
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                complain(&format!("waiting for children: {error}; switching off"));
                return power_off();
            }
        }
    }
}

/// Everything that the agent finds ready.
fn prepare() -> Result<(), AgentError> {
    // The initramfs becomes a tmpfs of our own with the initramfs below it: only a root with a parent mount can be pivoted away
    // by containers, and the agent's binary stays where no container's path leads.
    fs::create_dir_all(NEW_ROOT).at(|| format!("creating {NEW_ROOT}"))?;
    mount(
        "tmpfs",
        NEW_ROOT,
        "tmpfs",
        MountFlags::NOSUID,
        c"mode=0755,size=16m",
    )
    .at(|| "mounting the root")?;
    for (kind, place, flags, options) in FILE_SYSTEMS {
        let target = Path::new(NEW_ROOT).join(place);
        fs::create_dir_all(&target).at(|| format!("creating {}", target.display()))?;
        mount(kind, &target, kind, flags, options).at(|| format!("mounting {kind} on /{place}"))?;
    }
    for directory in ["dev/pts", "dev/shm", "dev/mqueue", "tmp", "etc"] {
        let target = Path::new(NEW_ROOT).join(directory);
        fs::create_dir_all(&target).at(|| format!("creating /{directory}"))?;
    }
    let pts = Path::new(NEW_ROOT).join("dev/pts");
    mount(
        "devpts",
        &pts,
        "devpts",
        NO_EXEC.difference(MountFlags::NODEV),
        c"mode=0620,ptmxmode=0666,gid=5",
    )
    .at(|| "mounting devpts on /dev/pts")?;
    kernel_defaults(&Path::new(NEW_ROOT).join("proc"));
    take_console(&Path::new(NEW_ROOT).join("dev/console"));
    // A test of the kernel's kind needs a writable initramfs; what is loaded is dropped from memory.
    let modules = kernel_modules::load(Path::new(kernel_modules::ORDER_FILE))?;
    if modules > 0 {
        fs::write(Path::new(NEW_ROOT).join("proc/sys/kernel/modules_disabled"), "1")
            .at(|| "forbidding further kernel modules")?;
        fs::remove_dir_all("/lib/modules").at(|| "dropping the loaded modules' files")?;
    }
    apparmor::keep_default_policy(Path::new(NEW_ROOT))?;
    switch_root()
}

/// What the kernel's own defaults get wrong for a pod. Best effort: a guest without them still works.
fn kernel_defaults(proc: &Path) {
    for (file, value) in [
        // Inherited by the agent, and undone by each container's own value: when memory is short, a container dies, not the pod.
        ("self/oom_score_adj", "-1000"),
        // As kubelet sets it on a node, and so what programs in pods are used to.
        ("sys/vm/overcommit_memory", "1"),
    ] {
        if let Err(error) = fs::write(proc.join(file), value) {
            complain(&format!("writing {value} to /proc/{file}: {error}"));
        }
    }
}

/// Makes [`NEW_ROOT`] the root of this process and its children.
fn switch_root() -> Result<(), AgentError> {
    rustix::process::chdir(NEW_ROOT).at(|| format!("entering {NEW_ROOT}"))?;
    // The agent's binary is in the initramfs: nobody may write to it from now on, not even through /proc/<pid>/exe.
    if let Err(error) = rustix::mount::mount_remount("/", MountFlags::RDONLY, c"") {
        complain(&format!("making the initramfs read-only: {error}"));
    }
    mount_move(".", "/").at(|| "moving the root over the initramfs")?;
    rustix::process::chroot(".").at(|| "changing the root")?;
    rustix::process::chdir("/").at(|| "entering the root")
}

/// The kernel opens /dev/console for PID 1 only when the initramfs has the node.
fn take_console(path: &Path) {
    let Ok(console) = rustix::fs::open(
        path,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    ) else {
        return;
    };
    for taken in [
        rustix::stdio::dup2_stdin(&console),
        rustix::stdio::dup2_stdout(&console),
        rustix::stdio::dup2_stderr(&console),
    ] {
        if taken.is_err() {
            // Nowhere to say it.
        }
    }
}

fn start_agent(started: u64) -> Result<Pid, AgentError> {
    let child = Command::new("/proc/self/exe")
        .arg0("caisson-agent")
        .args(["agent", &started.to_string()])
        .env_clear()
        .spawn()
        .at(|| "starting the agent")?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or(rustix::io::Errno::SRCH).at(|| "starting the agent")
}

fn power_off() -> ExitCode {
    rustix::fs::sync();
    for command in [RebootCommand::PowerOff, RebootCommand::Restart] {
        if let Err(error) = reboot(command) {
            complain(&format!("switching off: {error}"));
        }
    }
    // PID 1 that exits makes the kernel panic, and panic=-1 makes that a reset.
    ExitCode::FAILURE
}
