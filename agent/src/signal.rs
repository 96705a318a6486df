//! Signals to processes and to whole containers.
#![expect(
    unsafe_code,
    reason = "real-time signals, and signals to a group by pidfd, have no safe form"
)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    ptr,
};

use rustix::{
    io::Errno,
    process::{Pid, Signal, kill_process, pidfd_send_signal},
};

use caisson_agent_api::v1;

use crate::{
    error::{AgentError, At},
    guest::Guest,
};

/// A signal by number, real-time ones included.
fn named(number: u32) -> Result<Signal, AgentError> {
    match i32::try_from(number) {
        Ok(raw @ 1..=64) => {
            // SAFETY: the number is one of the kernel's, and it goes to another process: no C library of ours handles it.
            Ok(unsafe { Signal::from_raw_unchecked(raw) })
        }
        _ => Err(AgentError::invalid(
            "signal",
            format!("{number} is not a signal (1 to 64)"),
        )),
    }
}

/// Sends to one process; one that has ended takes none, which is no error.
pub(crate) fn send(pidfd: impl AsFd, number: u32) -> Result<(), AgentError> {
    match pidfd_send_signal(pidfd, named(number)?) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).at(|| format!("sending signal {number}")),
    }
}

/// The pidfd's process leads a group, and all of the group is meant (PIDFD_SIGNAL_PROCESS_GROUP of linux/pidfd.h, since 6.9).
const PROCESS_GROUP: libc::c_uint = 1 << 2;

/// Kills a process with all of its group: a command that has run too long is often a shell that waits for another.
pub(crate) fn kill_group(leader: impl AsFd) -> Result<(), AgentError> {
    // SAFETY: the descriptor is borrowed for the call, a null siginfo is allowed, and nothing is written.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            leader.as_fd().as_raw_fd(),
            libc::SIGKILL,
            ptr::null::<libc::siginfo_t>(),
            PROCESS_GROUP,
        )
    };
    match io::Error::last_os_error() {
        _ if sent == 0 => Ok(()),
        error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        error => Err(error).at(|| "killing a process group"),
    }
}

/// `SignalContainer`.
pub(crate) fn container(guest: &Guest, request: &v1::SignalContainerRequest) -> Result<(), AgentError> {
    let container = guest.container(&request.container_id)?;
    let signal = named(request.signal)?;
    let process = container.started()?.process;
    if !request.all {
        return process.signal(request.signal);
    }
    if signal == Signal::KILL {
        return container.cgroup.kill();
    }
    for pid in container.cgroup.processes()? {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
            continue;
        };
        match kill_process(pid, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error).at(|| format!("sending signal {} to {pid:?}", request.signal)),
        }
    }
    Ok(())
}

/// `SignalExec`.
pub(crate) fn exec(guest: &Guest, request: &v1::SignalExecRequest) -> Result<(), AgentError> {
    let container = guest.container(&request.container_id)?;
    let process = container.exec(&request.exec_id)?;
    if named(request.signal)? == Signal::KILL {
        return process.kill_group();
    }
    process.signal(request.signal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_outside_the_kernels_range_are_refused() {
        assert!(named(0).is_err());
        assert!(named(65).is_err());
        assert!(named(u32::MAX).is_err());
        assert_eq!(named(9).unwrap(), Signal::KILL);
        assert!(named(34).is_ok());
    }
}
