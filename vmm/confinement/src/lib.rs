//! What a VMM process takes from itself before a guest runs.
//!
//! In this order: a PID namespace ([`into_pid_namespace`], which forks), then everything that concerns the process ([`confine`]: namespaces, an
//! empty root directory, the user, capabilities), both while it has one thread; then on each thread its filter of system calls
//! ([`Filters::enter`]). Nothing can be taken back. Must not know what the process does: it keeps its open descriptors, and those are all it has.

mod filters;
mod process;

pub use filters::{Enforcement, Filters, ThreadKind};
pub use process::{Plan, confine, into_pid_namespace};

/// Why a process or a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// A system call failed.
    #[error("cannot {what}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A filter could not be built.
    #[error("cannot build the filter of system calls for {thread}")]
    Filter {
        /// Kind of thread.
        thread: &'static str,
        /// The cause.
        #[source]
        source: seccompiler::BackendError,
    },
    /// A filter could not be installed.
    #[error("cannot install the filter of system calls for {thread}")]
    Install {
        /// Kind of thread.
        thread: &'static str,
        /// The cause.
        #[source]
        source: seccompiler::Error,
    },
}
