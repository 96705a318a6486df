//! Processes that outlive the daemon: how they are named in the journal, found again, watched and killed.
//!
//! A [`ProcessRef`] is what the journal keeps; a [`Process`] is a pidfd on the same process, so that no signal ever hits a stranger
//! who got the same pid. Must not know what the processes do.

#![expect(
    unsafe_code,
    reason = "the runtime wants a promise that a registered descriptor stays the same"
)]

use std::{
    fmt, io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{HypervisorError, OWNER_ENV};

/// What a process does for its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessRole {
    /// Runs the guest.
    Vmm,
    /// Serves the vsock device from outside the VMM.
    Vsock,
    /// Serves the pod's shared volumes.
    FileServer,
}

/// A process that can be found again: the pid alone may have been reused, pid and start time together cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// What it does.
    pub role: ProcessRole,
    /// Process id.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks after boot.
    pub start_time: u64,
}

impl ProcessRef {
    /// Names the process that has this pid now.
    pub fn of(role: ProcessRole, pid: i32) -> io::Result<Self> {
        Ok(Self {
            role,
            pid,
            start_time: Stat::read(pid)?.start_time,
        })
    }

    /// Whether the process still runs. A zombie doesn't.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        Stat::read(self.pid).is_ok_and(|stat| stat.start_time == self.start_time && !stat.ended)
    }

    /// Gets hold of the process; `None` when it is gone or its pid belongs to another one. Needs a tokio runtime.
    pub fn open(&self) -> io::Result<Option<Process>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let pidfd = match pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // Only now that the pidfd pins the process can the start time prove that it is the one meant.
        match Stat::read(self.pid) {
            Ok(stat) if stat.start_time == self.start_time => Process::new(self.clone(), pidfd).map(Some),
            Ok(_) => Ok(None),
            Err(e) if is_gone(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It was not our child, so that nobody tells us how.
    Unknown,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signaled(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("ended"),
        }
    }
}

/// A process held by its pidfd. Clones share it. Dropping the last clone neither kills nor waits.
#[derive(Debug, Clone)]
pub struct Process(Arc<Held>);

#[derive(Debug)]
struct Held {
    reference: ProcessRef,
    pidfd: AsyncFd<OwnedFd>,
    ended: OnceLock<Ended>,
}

impl Process {
    pub(crate) fn new(reference: ProcessRef, pidfd: OwnedFd) -> io::Result<Self> {
        // SAFETY: an OwnedFd always names the same descriptor, and keeps it open until the AsyncFd that owns it is dropped.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        Ok(Self(Arc::new(Held {
            reference,
            pidfd,
            ended: OnceLock::new(),
        })))
    }

    /// What the journal keeps of it.
    #[must_use]
    pub fn reference(&self) -> &ProcessRef {
        &self.0.reference
    }

    /// Whether it has ended. Does not block.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.0.ended.get().is_some() || is_readable(self.0.pidfd.get_ref())
    }

    /// Waits for its end and reaps it when it is our child. Cancel-safe; answers at once ever after.
    pub async fn wait(&self) -> io::Result<Ended> {
        let held = &*self.0;
        while !self.has_ended() {
            let mut guard = held.pidfd.readable().await?;
            if !is_readable(held.pidfd.get_ref()) {
                guard.clear_ready();
            }
        }
        Ok(*held.ended.get_or_init(|| reap(held.pidfd.get_ref())))
    }

    /// Sends SIGKILL; Ok when it is gone already. Does not wait.
    pub fn signal_kill(&self) -> io::Result<()> {
        match pidfd_send_signal(self.0.pidfd.get_ref(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Kills it and waits until it is gone, `deadline` at most.
    pub async fn kill(&self, deadline: Duration) -> Result<Ended, HypervisorError> {
        let pid = self.0.reference.pid;
        let failed = |what: &str, source| HypervisorError::Io {
            what: format!("{what} process {pid}"),
            source,
        };
        self.signal_kill().map_err(|e| failed("kill", e))?;
        match tokio::time::timeout(deadline, self.wait()).await {
            Ok(ended) => ended.map_err(|e| failed("wait for", e)),
            Err(_) => Err(HypervisorError::Deadline {
                what: format!("the end of killed process {pid}"),
                limit: deadline,
            }),
        }
    }
}

/// Gets hold of a child of this process. A task reaps it when it ends, whoever waits for it or not. Needs a tokio runtime.
pub fn adopt_child(role: ProcessRole, pid: i32) -> io::Result<Process> {
    let raw = Pid::from_raw(pid).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
    let process = Process::new(ProcessRef::of(role, pid)?, pidfd_open(raw, PidfdFlags::NONBLOCK)?)?;
    let reaped = process.clone();
    tokio::spawn(async move {
        match reaped.wait().await {
            Ok(ended) => tracing::debug!(pid, %ended, "process of a VM ended"),
            Err(error) => tracing::warn!(pid, %error, "cannot wait for a process of a VM"),
        }
    });
    Ok(process)
}

fn is_readable(pidfd: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&now)), Ok(n) if n > 0)
}

fn reap(pidfd: &OwnedFd) -> Ended {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match waitid(WaitId::PidFd(pidfd.as_fd()), options) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(status), _) => Ended::Exited(status),
            (None, Some(signal)) => Ended::Signaled(signal),
            (None, None) => Ended::Unknown,
        },
        // ECHILD: an earlier daemon's child, or reaped by someone else.
        Ok(None) | Err(_) => Ended::Unknown,
    }
}

/// The two facts of /proc/PID/stat (proc(5)) that are needed here.
struct Stat {
    start_time: u64,
    ended: bool,
}

impl Stat {
    fn read(pid: i32) -> io::Result<Self> {
        let text = std::fs::read(format!("/proc/{pid}/stat"))?;
        Self::parse(&String::from_utf8_lossy(&text))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc stat line"))
    }

    /// The second field is the program's name in parentheses and may hold anything, so fields count from the last `)`.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let mut fields = rest.split_ascii_whitespace();
        let state = fields.next()?;
        // `state` is field 3; 18 more lie between it and field 22.
        let start_time = fields.nth(18)?.parse().ok()?;
        Some(Self {
            start_time,
            ended: matches!(state, "Z" | "X" | "x"),
        })
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
}

/// Kills every process with `OWNER_ENV=id` in its environment and waits for its end; answers how many there were.
///
/// Searches again until it finds none, since a process may fork while it is being looked for. The caller itself is never counted.
pub async fn sweep(id: &str, deadline: Duration) -> Result<usize, HypervisorError> {
    let mut marker = format!("{OWNER_ENV}={id}").into_bytes();
    marker.push(0);
    let until = Instant::now() + deadline;
    let mut killed = 0;
    loop {
        let wanted = marker.clone();
        let left = until.saturating_duration_since(Instant::now());
        let search = tokio::task::spawn_blocking(move || find(&wanted));
        let found = match tokio::time::timeout(left, search).await {
            Ok(Ok(found)) => found,
            Ok(Err(e)) => return Err(search_failed(io::Error::other(e))),
            Err(_) => return Err(late(format!("the search for processes of VM {id}"), deadline)),
        };
        let mut processes = Vec::new();
        for (pid, pidfd) in found.map_err(search_failed)? {
            let Ok(reference) = ProcessRef::of(ProcessRole::Vmm, pid) else {
                continue;
            };
            processes.push(Process::new(reference, pidfd).map_err(search_failed)?);
        }
        if processes.is_empty() {
            return Ok(killed);
        }
        // All first: one that is killed alone might be restarted by its sibling.
        for process in &processes {
            process.signal_kill().map_err(|source| HypervisorError::Io {
                what: format!("kill process {}", process.reference().pid),
                source,
            })?;
        }
        for process in &processes {
            let left = until.saturating_duration_since(Instant::now());
            if tokio::time::timeout(left, process.wait()).await.is_err() {
                return Err(late(survivors(id, &processes), deadline));
            }
            killed += 1;
        }
    }
}

fn survivors(id: &str, processes: &[Process]) -> String {
    let pids: Vec<_> = processes
        .iter()
        .filter(|p| !p.has_ended())
        .map(|p| p.reference().pid.to_string())
        .collect();
    format!("the end of killed processes {} of VM {id}", pids.join(", "))
}

fn late(what: String, limit: Duration) -> HypervisorError {
    HypervisorError::Deadline { what, limit }
}

fn search_failed(source: io::Error) -> HypervisorError {
    HypervisorError::Io {
        what: "search /proc for processes of a VM".into(),
        source,
    }
}

/// `marker` ends in the NUL that ends an environment entry.
fn find(marker: &[u8]) -> io::Result<Vec<(i32, OwnedFd)>> {
    let own = std::process::id().cast_signed();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        if pid == own || !environment_has(pid, marker) {
            continue;
        }
        let Some(raw) = Pid::from_raw(pid) else { continue };
        let Ok(pidfd) = pidfd_open(raw, PidfdFlags::NONBLOCK) else {
            continue;
        };
        // The first look may have been at a predecessor with the same pid; this one is at the process that the pidfd pins,
        // or at a later one, and then the pidfd says that its own has ended.
        if environment_has(pid, marker) && !is_readable(&pidfd) {
            found.push((pid, pidfd));
        }
    }
    Ok(found)
}

fn environment_has(pid: i32, marker: &[u8]) -> bool {
    // Gone, a zombie, a kernel thread, or not ours to see: none of them is a process of the VM.
    let Ok(environment) = std::fs::read(format!("/proc/{pid}/environ")) else {
        return false;
    };
    environment
        .split_inclusive(|&byte| byte == 0)
        .any(|entry| entry == marker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_with_parentheses_and_blanks_does_not_shift_the_fields() {
        let line = "42 (a) b (c) S 1 42 42 0 -1 4194304 1 0 0 0 5 6 0 0 20 0 1 0 987654 1 2 3\n";
        let stat = Stat::parse(line).expect("parses");
        assert_eq!(stat.start_time, 987_654);
        assert!(!stat.ended);
        assert!(Stat::parse("42 (x) Z 1 2").is_none());
        assert!(Stat::parse("").is_none());
    }

    #[test]
    fn this_very_process_is_alive_and_a_successor_of_its_pid_is_not_it() {
        let pid = std::process::id().cast_signed();
        let me = ProcessRef::of(ProcessRole::Vmm, pid).expect("own stat");
        assert!(me.is_alive());
        let other = ProcessRef {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!other.is_alive());
    }

    #[tokio::test]
    async fn opening_a_reference_whose_start_time_differs_finds_nothing() {
        let pid = std::process::id().cast_signed();
        let me = ProcessRef::of(ProcessRole::Vmm, pid).expect("own stat");
        let other = ProcessRef {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(other.open().expect("opens").is_none());
        let nobody = ProcessRef {
            role: ProcessRole::Vmm,
            pid: 0,
            start_time: 0,
        };
        assert!(nobody.open().expect("opens").is_none());
    }

    #[test]
    fn ends_are_described_for_people() {
        assert_eq!(Ended::Exited(1).to_string(), "exited with status 1");
        assert_eq!(Ended::Signaled(9).to_string(), "was killed by signal 9");
        assert_eq!(Ended::Unknown.to_string(), "ended");
    }
}
