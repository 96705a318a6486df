//! What is left to a process that reads what a registry sent: the descriptors it was given, memory within a limit, and the system calls
//! that read, write and allocate. No user of the host, no capability, no new descriptor of any kind, no other process, no new code.
//!
//! A call that is not on the list answers ENOSYS instead of killing the process: a C library that tries a new call falls back to the
//! older one, and a taken-over process gets no further either way.

use std::collections::BTreeMap;

use caps::CapSet;
use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// A resource limit.
    #[error("cannot limit {0}")]
    Limit(&'static str, #[source] rustix::io::Errno),
    /// Changing to a user that owns nothing.
    #[error("cannot become nobody")]
    Identity(#[source] rustix::io::Errno),
    /// Capabilities.
    #[error("cannot drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    /// `PR_SET_NO_NEW_PRIVS`.
    #[error("cannot give up new privileges")]
    Privileges(#[source] rustix::io::Errno),
    /// The filter's program.
    #[error("cannot build the filter of system calls")]
    Filter(#[source] seccompiler::BackendError),
    /// The kernel does not take it.
    #[error("cannot install the filter of system calls")]
    Install(#[source] seccompiler::Error),
}

/// What the work takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// Address space in bytes.
    pub memory_bytes: u64,
    /// Largest file that is written, bytes.
    pub file_bytes: u64,
}

/// `nobody` of every distribution: owns no file.
const NOBODY: u32 = 65534;
/// More than any layer takes: what computes longer is stuck.
const CPU_SECONDS: u64 = 3600;

const ALLOWED: &[libc::c_long] = &[
    // The descriptors it has.
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory. Of mmap and mprotect, see below.
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Signals, time, random numbers, and the end.
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
];

/// Gives everything up that is not needed. The process has one thread, and every descriptor it will ever have.
pub fn confine(needs: Needs) -> Result<(), ConfinementError> {
    limit(Resource::Core, 0, "core dumps")?;
    limit(Resource::As, needs.memory_bytes, "memory")?;
    limit(Resource::Fsize, needs.file_bytes, "the size of files")?;
    limit(Resource::Cpu, CPU_SECONDS, "time")?;
    limit(Resource::Nofile, 0, "descriptors")?;
    if rustix::process::geteuid().is_root() {
        for capability in caps::all() {
            if caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, capability).map_err(ConfinementError::Capabilities)?;
            }
        }
        become_nobody().map_err(ConfinementError::Identity)?;
    }
    for set in [
        CapSet::Ambient,
        CapSet::Inheritable,
        CapSet::Effective,
        CapSet::Permitted,
    ] {
        caps::clear(None, set).map_err(ConfinementError::Capabilities)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(ConfinementError::Privileges)?;
    filter_system_calls()
}

fn limit(resource: Resource, value: u64, what: &'static str) -> Result<(), ConfinementError> {
    let limit = Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    setrlimit(resource, limit).map_err(|error| ConfinementError::Limit(what, error))
}

fn become_nobody() -> rustix::io::Result<()> {
    let (group, user) = (
        rustix::fs::Gid::from_raw(NOBODY),
        rustix::fs::Uid::from_raw(NOBODY),
    );
    set_thread_groups(&[])?;
    set_thread_res_gid(group, group, group)?;
    set_thread_res_uid(user, user, user)
}

fn filter_system_calls() -> Result<(), ConfinementError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    // Nothing becomes code.
    let not_executable = SeccompCondition::new(
        2,
        SeccompCmpArgLen::Dword,
        SeccompCmpOp::MaskedEq(u64::from(libc::PROT_EXEC.unsigned_abs())),
        0,
    )
    .and_then(|condition| SeccompRule::new(vec![condition]))
    .map_err(ConfinementError::Filter)?;
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![not_executable.clone()]);
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        SeccompAction::Allow,
        std::env::consts::ARCH
            .try_into()
            .map_err(ConfinementError::Filter)?,
    )
    .map_err(ConfinementError::Filter)?;
    let program: BpfProgram = filter.try_into().map_err(ConfinementError::Filter)?;
    seccompiler::apply_filter(&program).map_err(ConfinementError::Install)
}
