//! What concerns the whole process: namespaces (namespaces(7)), root directory, user, capabilities (capabilities(7)).

#![expect(
    unsafe_code,
    reason = "namespaces are left and entered, and the user changed, while the process has one thread"
)]

use std::io;

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags},
    thread::{CapabilitySet, CapabilitySets, UnshareFlags},
};

use crate::ConfinementError;

/// How far the process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan {
    /// User and group to become; absent: it stays who it is, without capabilities.
    pub user: Option<(u32, u32)>,
    /// Mount, network, IPC, UTS and cgroup namespaces of its own, and an empty root directory. Needs CAP_SYS_ADMIN.
    pub namespaces: bool,
}

/// Any directory that every system has: it is covered in the process's own mount namespace only.
const COVERED: &str = "/proc";

fn system(what: &'static str) -> impl FnOnce(rustix::io::Errno) -> ConfinementError {
    move |errno| ConfinementError::System {
        what,
        source: errno.into(),
    }
}

fn last_error(what: &'static str) -> ConfinementError {
    ConfinementError::System {
        what,
        source: io::Error::last_os_error(),
    }
}

/// Goes on in a child that is the first process of a PID namespace of its own, and a child of this process's parent, which can wait for it.
///
/// Returns in the child only. `report` is called in the parent with the child's pid as seen from there, and ends the parent. To be called
/// while the process has one thread. Needs CAP_SYS_ADMIN.
pub fn into_pid_namespace(
    report: impl FnOnce(i32) -> std::process::ExitCode,
) -> Result<(), ConfinementError> {
    // SAFETY: the flag concerns children yet to be made; no descriptor table is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(system("make a PID namespace"))?;
    // clone(2) without a stack, as fork does, but with CLONE_PARENT: whoever started this process gets the child's exit status.
    let flags = libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: no memory is shared with the child and no pointer is passed. The process has one thread (promised by the caller), so
    // that no lock can be held by a thread that the child lacks.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    match i32::try_from(pid) {
        Ok(0) => Ok(()),
        Ok(pid) if pid > 0 => {
            let code = report(pid);
            // Not this process's to undo anything: the child owns what there is.
            let status = i32::from(code != std::process::ExitCode::SUCCESS);
            // SAFETY: ends the process; nothing of it is used afterwards.
            unsafe { libc::_exit(status) }
        }
        _ => Err(last_error("fork into the PID namespace")),
    }
}

/// Takes from the process what `plan` says, and in any case capabilities and the way to new privileges. To be called while it has one thread.
pub fn confine(plan: &Plan) -> Result<(), ConfinementError> {
    if plan.namespaces {
        let flags = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP;
        // SAFETY: CLONE_FILES is not among the flags, so that every descriptor stays what it is.
        unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(system("make namespaces"))?;
        empty_root()?;
    }
    drop_bounding_set();
    if let Some((uid, gid)) = plan.user {
        become_user(uid, gid)?;
    }
    rustix::thread::clear_ambient_capability_set().map_err(system("clear ambient capabilities"))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(system("give up capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(system("give up new privileges"))
}

/// An empty file system of two pages, read-only, in place of everything that was mounted.
fn empty_root() -> Result<(), ConfinementError> {
    use rustix::mount;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount::mount_change("/", private).map_err(system("keep mounts to itself"))?;
    mount::mount(
        "caisson",
        COVERED,
        "tmpfs",
        flags,
        c"size=8k,nr_inodes=2,mode=0555",
    )
    .map_err(system("mount an empty file system"))?;
    rustix::process::chdir(COVERED).map_err(system("enter the empty file system"))?;
    // Both the same: the old root comes to lie upon the new one (pivot_root(2), NOTES), and is taken away.
    rustix::process::pivot_root(".", ".").map_err(system("make the empty file system the root"))?;
    mount::unmount(".", UnmountFlags::DETACH).map_err(system("take the old root away"))?;
    rustix::process::chdir("/").map_err(system("enter the empty root"))?;
    mount::mount_remount("/", flags | MountFlags::RDONLY, c"")
        .map_err(system("make the empty root read-only"))
}

/// Best effort: a process without CAP_SETPCAP cannot shrink it, nor gain anything from it under no_new_privs.
fn drop_bounding_set() {
    for capability in 0..64 {
        // SAFETY: takes a number by value; unknown ones are refused with EINVAL.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
    }
}

fn become_user(uid: u32, gid: u32) -> Result<(), ConfinementError> {
    // SAFETY: a list of length 0 is not read.
    let left = unsafe { libc::setgroups(0, std::ptr::null()) };
    check(left, "leave all groups")?;
    // SAFETY: takes numbers by value.
    let group = unsafe { libc::setresgid(gid, gid, gid) };
    check(group, "change the group")?;
    // SAFETY: takes numbers by value.
    let user = unsafe { libc::setresuid(uid, uid, uid) };
    check(user, "change the user")
}

fn check(result: libc::c_int, what: &'static str) -> Result<(), ConfinementError> {
    if result < 0 { Err(last_error(what)) } else { Ok(()) }
}
