//! The AppArmor profile that the process has from its execve on.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{Mode, OFlags, openat},
    io::Errno,
};

use super::{At, StageError};

/// The guest's own /proc, in which the process will find itself whatever namespaces it enters.
pub(super) fn open_proc() -> Result<OwnedFd, StageError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open("/proc", flags, Mode::empty()).at(|| "opening /proc")
}

/// Confines this process with a loaded profile, when it calls execve and not before.
pub(super) fn confine_after_exec(proc: &OwnedFd, profile: &str) -> Result<(), StageError> {
    let step = || format!("entering AppArmor profile {profile:?}");
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let file = openat(proc, "thread-self/attr/apparmor/exec", flags, Mode::empty()).at(step)?;
    match rustix::io::write(&file, format!("exec {profile}").as_bytes()) {
        Ok(_) => Ok(()),
        Err(Errno::NOENT) => Err(StageError::Invalid(format!(
            "no AppArmor profile {profile} in the guest's kernel"
        ))),
        Err(error) => Err(error).at(step),
    }
}
