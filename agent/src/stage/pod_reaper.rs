//! PID 1 of a PID namespace that a pod's containers share: it reaps what they orphan, and does nothing else.
//!
//! Containers see this process. So it has an empty root, no capabilities, and nothing open.

use std::{os::fd::OwnedFd, process::ExitCode};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{DumpableBehavior, set_dumpable_behavior},
    thread::{CapabilitySet, CapabilitySets, set_capabilities},
};

use super::{At, StageError, fork, instructions, report, report_failure};
use crate::stage_spec::{Identity, ReportKind};

/// Argument that selects this role.
pub(crate) const ARGUMENT: &str = "pod-reaper";

/// Runs the reaper; the first half returns, the second never does when all is well.
pub(crate) fn main() -> ExitCode {
    let hidden = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let Ok(control) = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3) else {
        return ExitCode::FAILURE;
    };
    match hidden
        .at(|| "hiding the pod's reaper")
        .and_then(|()| first_half(&control))
    {
        Ok(fork::Half::Parent { .. }) => ExitCode::SUCCESS,
        Ok(fork::Half::Child) => match second_half(&control) {
            Ok(()) => {
                drop(control);
                reap()
            }
            Err(error) => {
                report_failure(&control, &error);
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            report_failure(&control, &error);
            ExitCode::FAILURE
        }
    }
}

fn first_half(control: &OwnedFd) -> Result<fork::Half, StageError> {
    instructions(control)?;
    let birth = fork::Birth {
        new_mount_namespace: true,
        new_pid_namespace: true,
    };
    let half = fork::child_of_the_agent(&birth, None)?;
    if let fork::Half::Parent { pid, pidfd } = &half {
        use std::os::fd::AsFd;
        report(control, ReportKind::Spawned(*pid), &[pidfd.as_fd()])?;
    }
    Ok(half)
}

fn second_half(control: &OwnedFd) -> Result<(), StageError> {
    rustix::process::setsid().at(|| "starting a session")?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .at(|| "making the mount namespace private")?;
    let null = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .at(|| "opening /dev/null")?;
    mount("tmpfs", "/tmp", "tmpfs", MountFlags::RDONLY, c"size=4k,mode=0555")
        .at(|| "mounting an empty root")?;
    rustix::process::chdir("/tmp").at(|| "entering the empty root")?;
    rustix::process::pivot_root(".", ".").at(|| "changing the root")?;
    unmount(".", UnmountFlags::DETACH).at(|| "removing the old root")?;
    rustix::process::chdir("/").at(|| "entering the root")?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none).at(|| "dropping capabilities")?;
    // The console goes last: until here, there may be something to say.
    rustix::stdio::dup2_stdin(&null).at(|| "closing stdin")?;
    rustix::stdio::dup2_stderr(&null).at(|| "closing stderr")?;
    report(control, ReportKind::Identity(Identity::default()), &[])
}

fn reap() -> ExitCode {
    fork::children_reap_themselves();
    let hour = rustix::time::Timespec {
        tv_sec: 3600,
        tv_nsec: 0,
    };
    loop {
        match rustix::thread::nanosleep(&hour) {
            rustix::thread::NanosleepRelativeResult::Ok
            | rustix::thread::NanosleepRelativeResult::Interrupted(_)
            | rustix::thread::NanosleepRelativeResult::Err(_) => {}
        }
    }
}
