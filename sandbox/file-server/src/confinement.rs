//! What is left to a process that a guest talks to: the capabilities that a file server needs, no new privileges, no network (the
//! daemon starts it in an empty network namespace), and the system calls of files.
//!
//! A call that is not on the list answers ENOSYS instead of killing the process: a C library that tries a new call falls back to the
//! older one, and a taken-over process gets no further either way.

use std::collections::{BTreeMap, HashSet};

use caps::{CapSet, Capability};
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CapabilitiesSecureBits, set_capabilities_secure_bits},
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfinementError {
    #[error("cannot keep capabilities over a change of user")]
    SecureBits(#[source] rustix::io::Errno),
    #[error("cannot drop capabilities")]
    Capabilities(#[source] caps::errors::CapsError),
    #[error("cannot give up new privileges")]
    Privileges(#[source] rustix::io::Errno),
    #[error("cannot build the filter of system calls")]
    Filter(#[source] seccompiler::BackendError),
    #[error("cannot install the filter of system calls")]
    Install(#[source] seccompiler::Error),
}

/// What serving other users' files takes. The last one is for linkat(2) by descriptor; `open_by_handle_at`, which it would also allow,
/// is not among the system calls.
const CAPABILITIES: [Capability; 9] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FOWNER,
    Capability::CAP_FSETID,
    Capability::CAP_MKNOD,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_DAC_READ_SEARCH,
];

/// What the file system, the connections and the runtime below them do.
const ALLOWED: &[libc::c_long] = &[
    // Names and attributes.
    libc::SYS_openat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_setxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_getdents64,
    // Content.
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_fallocate,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Connections.
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    // Whose files they become.
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_umask,
    // Memory and threads.
    libc::SYS_brk,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    // Signals, time, random numbers, and the end.
    libc::SYS_clock_gettime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
];

/// Raises the number of open files as far as it goes: each file that a guest has seen is one. Best effort: without it, the guest sees
/// EMFILE earlier.
pub(crate) fn raise_file_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        eprintln!("files: the limit of open files stays as it is: {error}");
    }
}

/// Gives everything up that is not listed; `connects`: but for connecting to Unix sockets. Before any thread is started: threads
/// inherit it.
pub(crate) fn confine(connects: bool) -> Result<(), ConfinementError> {
    // A thread acts as the user who asks while it creates a file, with its capabilities: whether that user may has been decided by the
    // guest's kernel, which knows the user's other groups.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_SETUID_FIXUP | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED,
    )
    .map_err(ConfinementError::SecureBits)?;
    let kept: HashSet<Capability> = CAPABILITIES.into_iter().collect();
    for capability in caps::all() {
        if !kept.contains(&capability) && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false) {
            caps::drop(None, CapSet::Bounding, capability).map_err(ConfinementError::Capabilities)?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(ConfinementError::Capabilities)?;
    caps::clear(None, CapSet::Inheritable).map_err(ConfinementError::Capabilities)?;
    caps::set(None, CapSet::Effective, &kept).map_err(ConfinementError::Capabilities)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(ConfinementError::Capabilities)?;
    rustix::thread::set_no_new_privs(true).map_err(ConfinementError::Privileges)?;
    filter_system_calls(connects)
}

fn filter_system_calls(connects: bool) -> Result<(), ConfinementError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    let first_is = |value: libc::c_int| {
        SeccompCondition::new(
            0,
            SeccompCmpArgLen::Dword,
            SeccompCmpOp::Eq,
            u64::from(value.unsigned_abs()),
        )
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(ConfinementError::Filter)
    };
    rules.insert(libc::SYS_prctl, vec![first_is(libc::PR_SET_NAME)?]);
    if connects {
        // Names of sockets are paths, and there are none but those of the volumes; abstract ones are the network namespace's, which is
        // empty.
        rules.insert(libc::SYS_socket, vec![first_is(libc::AF_UNIX)?]);
        for call in [libc::SYS_connect, libc::SYS_poll, libc::SYS_ppoll] {
            rules.insert(call, Vec::new());
        }
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
    seccompiler::apply_filter_all_threads(&program).map_err(ConfinementError::Install)
}
