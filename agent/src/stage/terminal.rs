//! The process's standard streams: a terminal of the container's own devpts, or what the agent handed over.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{AtFlags, FileType, Gid, OFlags, Uid, statat},
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
};

use super::{At, StageError, mounts, report};
use crate::{
    rootfs,
    stage_spec::{Identity, ReportKind},
};

/// f_type of devpts.
const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Opens a new terminal in the container at `root`, sends its controlling side to the agent, and answers the other.
pub(super) fn open_in(control: &OwnedFd, root: &OwnedFd, console: bool) -> Result<OwnedFd, StageError> {
    // The container may have put anything at this place: it is opened as a location first, and looked at.
    let location = rootfs::open(root, "/dev/pts/ptmx", OFlags::PATH).at(|| "finding /dev/pts/ptmx")?;
    let kind = rustix::fs::fstatfs(&location)
        .at(|| "looking at /dev/pts/ptmx")?
        .f_type;
    let stat = statat(&location, c"", AtFlags::EMPTY_PATH).at(|| "looking at /dev/pts/ptmx")?;
    if kind != DEVPTS_SUPER_MAGIC || FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return Err(StageError::Invalid(
            "/dev/pts/ptmx of the container is no terminal multiplexer".to_owned(),
        ));
    }
    let master = rootfs::open(
        root,
        "/dev/pts/ptmx",
        OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK,
    )
    .at(|| "opening /dev/pts/ptmx")?;
    unlockpt(&master).at(|| "unlocking the terminal")?;
    let slave = ioctl_tiocgptpeer(
        &master,
        OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC,
    )
    .at(|| "opening the terminal")?;
    if console {
        mounts::console(root, &slave)?;
    }
    report(control, ReportKind::Terminal(true), &[master.as_fd()])?;
    Ok(slave)
}

/// Puts the streams in place as 0, 1 and 2, owned by the user; a terminal becomes the controlling one.
pub(super) fn take_stdio(
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
    identity: &Identity,
) -> Result<(), StageError> {
    if let Some(slave) = terminal {
        own(&slave, identity);
        for place in [
            rustix::stdio::dup2_stdin(&slave),
            rustix::stdio::dup2_stdout(&slave),
            rustix::stdio::dup2_stderr(&slave),
        ] {
            place.at(|| "attaching the terminal")?;
        }
        return rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())
            .at(|| "making the terminal the controlling one");
    }
    let missing = StageError::Protocol("a standard stream is missing");
    let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) else {
        return Err(missing);
    };
    for fd in [&stdin, &stdout, &stderr] {
        own(fd, identity);
    }
    rustix::stdio::dup2_stdin(&stdin).at(|| "attaching stdin")?;
    rustix::stdio::dup2_stdout(&stdout).at(|| "attaching stdout")?;
    rustix::stdio::dup2_stderr(&stderr).at(|| "attaching stderr")
}

/// A process without privileges must be able to open /dev/stdout again. /dev/null stays whose it is.
fn own(fd: &OwnedFd, identity: &Identity) {
    let Ok(stat) = rustix::fs::fstat(fd) else {
        return;
    };
    let terminal = rustix::termios::isatty(fd);
    if !terminal && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice {
        return;
    }
    // A terminal keeps its group (tty), as login leaves it.
    let group = if terminal {
        None
    } else {
        Some(Gid::from_raw(identity.gid))
    };
    if rustix::fs::fchown(fd, Some(Uid::from_raw(identity.uid)), group).is_err() {
        // Only the reopening by path would need it.
    }
}
