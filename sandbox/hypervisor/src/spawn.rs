//! Starts processes that do not die with the daemon and get nothing from it but what is listed.
//!
//! A [`DetachedCommand`] says all that the new process shall have; everything else (environment, descriptors, signal state,
//! terminal, session) is taken away between fork and exec. Must not know which program it starts.

#![expect(
    unsafe_code,
    reason = "what a process shall not inherit is taken away between fork and exec"
)]

use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::OpenOptionsExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{HypervisorError, OWNER_ENV, Process, ProcessRole, process};

/// Who a process runs as.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// All supplementary groups; none are kept.
    pub groups: Vec<u32>,
}

/// A process to be started: everything that it gets.
#[derive(Debug)]
pub struct DetachedCommand {
    /// What it does for the VM.
    pub role: ProcessRole,
    /// The VM's id, which becomes [`OWNER_ENV`].
    pub owner: String,
    /// Program, as an absolute path.
    pub program: PathBuf,
    /// The program's file, open: executed instead of looking the path up, which the new user might not reach. Not for scripts, whose
    /// interpreter would not find it.
    pub program_file: Option<OwnedFd>,
    /// Its arguments, without its name.
    pub args: Vec<OsString>,
    /// Its environment besides [`OWNER_ENV`]; nothing is inherited.
    pub env: Vec<(OsString, OsString)>,
    /// Gets standard output and error; created with mode 0600, appended to.
    pub log: PathBuf,
    /// Descriptors that it inherits, under the very numbers that they have here.
    pub fds: Vec<OwnedFd>,
    /// cgroup v2 directory that it joins before it runs.
    pub cgroup: Option<PathBuf>,
    /// Identity to change to; absent: that of the daemon.
    pub credentials: Option<Credentials>,
    /// Namespaces to leave, `CLONE_NEW*` flags.
    pub unshare: libc::c_int,
    /// Limits, `RLIMIT_*`: soft and hard at once.
    pub rlimits: Vec<(u32, u64)>,
    /// Never regain privilege: no_new_privs, and an empty capability bounding set.
    pub confined: bool,
}

impl DetachedCommand {
    /// A command with no arguments that inherits nothing and is not confined.
    #[must_use]
    pub fn new(role: ProcessRole, owner: &str, program: PathBuf, log: PathBuf) -> Self {
        Self {
            role,
            owner: owner.to_owned(),
            program,
            program_file: None,
            args: Vec::new(),
            env: Vec::new(),
            log,
            fds: Vec::new(),
            cgroup: None,
            credentials: None,
            unshare: 0,
            rlimits: Vec::new(),
            confined: false,
        }
    }

    /// Starts it and closes the daemon's copies of the descriptors. A task reaps it when it ends, whoever waits for it or not.
    ///
    /// Blocks for a fork; needs a tokio runtime. Starting is over when the program has been exec'd; an error means that no
    /// process is left.
    pub fn spawn(self) -> Result<Process, HypervisorError> {
        let program = self.program.clone();
        let start = |reason: String| HypervisorError::Start {
            program: program.clone(),
            reason,
        };
        if self.owner.as_bytes().contains(&0) || self.owner.is_empty() {
            return Err(HypervisorError::Spec(
                "the VM's id is empty or holds a NUL".into(),
            ));
        }
        let log = open_log(&self.log)?;
        let log_error = log.try_clone().map_err(|source| HypervisorError::Io {
            what: format!("duplicate the log file {}", self.log.display()),
            source,
        })?;
        let cgroup = self.cgroup.as_deref().map(open_cgroup).transpose()?;
        let plan = ChildPlan {
            cgroup: cgroup.as_ref().map(AsRawFd::as_raw_fd),
            fds: self.fds.iter().map(AsRawFd::as_raw_fd).collect(),
            rlimits: self.rlimits,
            unshare: self.unshare,
            confined: self.confined,
            credentials: self.credentials,
        };

        let executed = match &self.program_file {
            Some(file) => PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())),
            None => self.program.clone(),
        };
        let mut command = Command::new(executed);
        command
            .arg0(&self.program)
            .args(&self.args)
            .env_clear()
            .env(OWNER_ENV, &self.owner)
            .envs(self.env)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_error);
        // SAFETY: the closure runs between fork and exec, and makes nothing but system calls on memory prepared above: it
        // neither allocates nor takes locks (`ChildPlan::apply`).
        unsafe { command.pre_exec(move || plan.apply()) };
        let child = command.spawn().map_err(|e| start(e.to_string()))?;
        let pid = child.id().cast_signed();
        process::adopt_child(self.role, pid).map_err(|e| {
            // Still our unreaped child, so the pid cannot mean another process.
            let mut child = child;
            if child.kill().is_ok() {
                drop(child.wait());
            }
            start(e.to_string())
        })
    }
}

fn open_log(path: &Path) -> Result<File, HypervisorError> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| HypervisorError::Io {
            what: format!("open the log file {}", path.display()),
            source,
        })
}

fn open_cgroup(path: &Path) -> Result<File, HypervisorError> {
    let procs = path.join("cgroup.procs");
    OpenOptions::new()
        .write(true)
        .open(&procs)
        .map_err(|source| HypervisorError::Io {
            what: format!("open {}", procs.display()),
            source,
        })
}

/// What the child does to itself before exec, with all memory allocated beforehand.
struct ChildPlan {
    cgroup: Option<RawFd>,
    fds: Vec<RawFd>,
    rlimits: Vec<(u32, u64)>,
    unshare: libc::c_int,
    confined: bool,
    credentials: Option<Credentials>,
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

impl ChildPlan {
    /// Order matters: what needs privilege first, then the loss of it. Only system calls: this runs in a forked copy of a
    /// process with many threads.
    fn apply(&self) -> io::Result<()> {
        // SAFETY: setsid takes nothing; it succeeds since a process just forked leads no group.
        check(unsafe { libc::setsid() })?;
        default_signals();
        if let Some(fd) = self.cgroup {
            // SAFETY: two bytes of static memory; the descriptor was inherited by the fork. "0" means the writer.
            let written = unsafe { libc::write(fd, c"0\n".as_ptr().cast(), 2) };
            if written != 2 {
                return Err(io::Error::last_os_error());
            }
        }
        for &(resource, limit) in &self.rlimits {
            let limit = libc::rlimit {
                rlim_cur: limit,
                rlim_max: limit,
            };
            // SAFETY: `limit` lives across the call, which reads it only.
            check(unsafe { libc::setrlimit(resource as _, &raw const limit) })?;
        }
        if self.unshare != 0 {
            // SAFETY: takes flags by value; the child has one thread.
            check(unsafe { libc::unshare(self.unshare) })?;
        }
        if self.confined {
            drop_bounding_set();
        }
        if let Some(who) = &self.credentials {
            become_user(who)?;
        }
        if self.confined {
            // SAFETY: PR_SET_NO_NEW_PRIVS takes its arguments by value; the unused ones must be 0.
            check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        }
        self.close_all_but_passed()
    }

    fn close_all_but_passed(&self) -> io::Result<()> {
        // Marked rather than closed: the standard library reports a failed exec through a descriptor of its own.
        // SAFETY: takes numbers and flags by value, and touches only this process's descriptor table.
        check(unsafe {
            libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) as libc::c_int
        })?;
        for &fd in &self.fds {
            // SAFETY: F_SETFD takes its argument by value; the descriptor was inherited by the fork.
            check(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) })?;
        }
        Ok(())
    }
}

/// Ignored signals stay ignored over exec; the standard library has cleared the mask already. KILL and STOP refuse, which is fine.
fn default_signals() {
    // x86-64's and arm64's kernel_sigaction with a 64-bit mask: handler SIG_DFL (0), no flags, no restorer, empty mask.
    let default = [0_u64; 4];
    for signal in 1..=64 {
        // SAFETY: `default` lives across the call, which reads it only. The raw call, since the C library hides signals 32 and 33.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                default.as_ptr(),
                std::ptr::null_mut::<u64>(),
                size_of::<u64>(),
            )
        };
    }
}

/// Best effort: without CAP_SETPCAP there is nothing to drop that could be regained under no_new_privs by a user without privilege.
fn drop_bounding_set() {
    for capability in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number by value; unknown numbers are refused with EINVAL.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability as libc::c_ulong, 0, 0, 0) };
    }
}

fn become_user(who: &Credentials) -> io::Result<()> {
    // Raw system calls: the C library's versions signal every thread that the parent had.
    // SAFETY: `groups` outlives the call, and its length is the one given.
    check(unsafe {
        libc::syscall(libc::SYS_setgroups, who.groups.len(), who.groups.as_ptr()) as libc::c_int
    })?;
    // SAFETY: takes numbers by value.
    check(unsafe { libc::syscall(libc::SYS_setresgid, who.gid, who.gid, who.gid) as libc::c_int })?;
    // SAFETY: takes numbers by value.
    check(unsafe { libc::syscall(libc::SYS_setresuid, who.uid, who.uid, who.uid) as libc::c_int })
}
