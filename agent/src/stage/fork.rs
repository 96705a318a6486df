//! How the second half is born: by clone3, into its cgroup and namespaces, as a child of the agent.
#![expect(unsafe_code, reason = "clone3, unshare and signal have no safe form")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{At, StageError};

/// Which namespaces are new.
#[derive(Debug, Default)]
pub(super) struct Birth {
    pub(super) new_mount_namespace: bool,
    pub(super) new_pid_namespace: bool,
}

/// Who is running after the call.
pub(super) enum Half {
    /// The first half, with the child's PID (in its own namespace) and pidfd.
    Parent { pid: u32, pidfd: OwnedFd },
    /// The second half.
    Child,
}

/// Forks. The child's parent is this process's parent, and it is in `cgroup` from its first instruction: a limit of one process is
/// then enough for a container of one process.
pub(super) fn child_of_the_agent(birth: &Birth, cgroup: Option<&OwnedFd>) -> Result<Half, StageError> {
    let mut pidfd: libc::c_int = -1;
    let flag = |flag: libc::c_int| u64::from(flag.cast_unsigned());
    // SAFETY: clone_args is plain data, for which all bits zero is valid.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flag(libc::CLONE_PARENT) | flag(libc::CLONE_PIDFD);
    arguments.pidfd = std::ptr::from_mut(&mut pidfd).addr() as u64;
    if birth.new_mount_namespace {
        arguments.flags |= flag(libc::CLONE_NEWNS);
    }
    if birth.new_pid_namespace {
        arguments.flags |= flag(libc::CLONE_NEWPID);
    }
    if let Some(cgroup) = cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: without CLONE_VM and CLONE_THREAD this is a fork: the child gets a copy of everything, and as this process has a single
    // thread, no lock can be held by anybody else. `arguments` and `pidfd` outlive the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            std::ptr::from_mut(&mut arguments),
            size_of::<libc::clone_args>(),
        )
    };
    match u32::try_from(pid) {
        Ok(0) => Ok(Half::Child),
        Ok(pid) => Ok(Half::Parent {
            pid,
            // SAFETY: the kernel has just opened this descriptor for us, and nothing else owns it.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        Err(_) => Err(std::io::Error::last_os_error()).at(|| "creating the container's process"),
    }
}

/// As in linux/sched.h; the libc crate's constant does not fit its own type.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// From now on, the kernel reaps what this process would have to wait for, adopted orphans included. SIGCHLD's default is no such
/// thing: it neither reaps nor wakes a sleeper up, because it is ignored before it is delivered.
pub(super) fn children_reap_themselves() {
    // SAFETY: SIG_IGN is no handler: no code of ours runs in a signal's context. The call cannot fail for SIGCHLD.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// In the child: its cgroup becomes the root of what it sees, and `hostname`, when not empty, its own.
pub(super) fn own_views(hostname: &str) -> Result<(), StageError> {
    let mut flags = UnshareFlags::NEWCGROUP;
    if !hostname.is_empty() {
        flags |= UnshareFlags::NEWUTS;
    }
    // SAFETY: CLONE_FILES is not among the flags, so no descriptor changes its owner.
    unsafe { unshare_unsafe(flags) }.at(|| "leaving the agent's namespaces")?;
    if !hostname.is_empty() {
        rustix::system::sethostname(hostname.as_bytes())
            .at(|| format!("setting the host name {hostname}"))?;
    }
    Ok(())
}
