//! What is left to a process that holds a guest's memory: no new privileges, and the system calls it needs.
//!
//! A call that is not on the list answers ENOSYS instead of killing the process: a C library that tries a new call falls back to the
//! older one, and a taken-over process gets no further either way.

use std::collections::BTreeMap;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfinementError {
    #[error("cannot give up new privileges")]
    Privileges(#[source] rustix::io::Errno),
    #[error("cannot build the filter of system calls")]
    Filter(#[source] seccompiler::BackendError),
    #[error("cannot install the filter of system calls")]
    Install(#[source] seccompiler::Error),
}

/// What the device and the libraries below it do once the sockets are open.
const ALLOWED: &[libc::c_long] = &[
    // Sockets and event descriptors that are open, come over a socket, or are accepted.
    libc::SYS_accept4,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_statx,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory, the guest's included.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads: the one that serves the hypervisor starts with its connection.
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_gettid,
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

/// Calls of many uses, with the one value that their argument of this index may have.
const ALLOWED_WITH: &[(libc::c_long, u8, u64)] = &[
    // Sockets that do not block.
    (libc::SYS_ioctl, 1, libc::FIONBIO),
    // Names of threads.
    (libc::SYS_prctl, 0, libc::PR_SET_NAME.unsigned_abs() as u64),
];

/// Raises the number of open files as far as it goes: a connection is one. Best effort: the limit is met one connection at a time.
pub(crate) fn raise_file_limit() {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(e) = setrlimit(Resource::Nofile, limit) {
        eprintln!("vsock: the limit of open files stays as it is: {e}");
    }
}

/// Applies to every thread, those that are running included.
pub(crate) fn confine() -> Result<(), ConfinementError> {
    rustix::thread::set_no_new_privs(true).map_err(ConfinementError::Privileges)?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = ALLOWED.iter().map(|call| (*call, Vec::new())).collect();
    for (call, argument, value) in ALLOWED_WITH {
        let rule = SeccompCondition::new(*argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(ConfinementError::Filter)?;
        rules.insert(*call, vec![rule]);
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

#[cfg(test)]
mod tests {
    use std::{fs::File, net::TcpListener, os::unix::net::UnixStream, process::Command};

    use super::*;

    /// Makes this test program the one that is confined and tries to get out.
    const ESCAPEE: &str = "CAISSON_TEST_ESCAPEE";

    /// What lets a process that is taken over reach others; each with the errno that it got.
    fn attempts() -> Vec<(&'static str, Option<i32>)> {
        let errno = |result: std::io::Result<()>| result.err().and_then(|error| error.raw_os_error());
        let kernel = |result: rustix::io::Result<()>| result.err().map(|error| error.raw_os_error());
        vec![
            ("open", errno(File::open("/etc/passwd").map(drop))),
            ("create", errno(File::create("/tmp/caisson-escapee").map(drop))),
            ("connect", errno(UnixStream::connect("/run/escapee").map(drop))),
            ("listen", errno(TcpListener::bind("127.0.0.1:0").map(drop))),
            ("execute", errno(Command::new("/bin/true").spawn().map(drop))),
            ("remove", errno(std::fs::remove_file("/tmp/caisson-escapee"))),
            (
                "signal",
                kernel(rustix::process::test_kill_process(rustix::process::getpid())),
            ),
            (
                "become root",
                kernel(rustix::thread::set_thread_uid(rustix::process::Uid::ROOT)),
            ),
        ]
    }

    #[test]
    fn a_confined_process_opens_connects_and_starts_nothing() {
        if std::env::var_os(ESCAPEE).is_some() {
            // Before and after: what the filter does not stop would prove nothing.
            let free = attempts();
            confine().unwrap();
            for ((name, before), (_, after)) in free.into_iter().zip(attempts()) {
                println!("attempt {name}: {before:?} {after:?}");
                assert_ne!(before, Some(libc::ENOSYS), "{name} fails without the filter");
                assert_eq!(after, Some(libc::ENOSYS), "{name}");
            }
            return;
        }
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture"])
            .arg("confinement::tests::a_confined_process_opens_connects_and_starts_nothing")
            .env(ESCAPEE, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&child.stdout);
        assert!(
            child.status.success(),
            "{said}{}",
            String::from_utf8_lossy(&child.stderr)
        );
        assert_eq!(said.matches("attempt ").count(), 8, "{said}");
    }
}
