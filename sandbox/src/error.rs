//! What can go wrong with a pod or container, and which kind of answer a caller should give.
//!
//! Texts say what was tried on what; causes are in the chain of sources, printed once at the edge.

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use caisson_apparmor::ProfileError;
use caisson_guest::{GuestError, GuestErrorKind};
use caisson_hypervisor::HypervisorError;
use caisson_lifecycle::sizing::SizeError;
use caisson_net::{NetError, NetErrorKind};

use crate::hooks::HookError;

/// Why a call on a pod or container failed. The text says what was tried on what; the chain of sources has the cause.
///
/// More variants than a small crate should have: each is one [`ErrorKind`] with the words that only it needs.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// No pod with this id or prefix.
    #[error("no pod sandbox {0:?}")]
    NoSandbox(String),
    /// No container with this id or prefix.
    #[error("no container {0:?}")]
    NoContainer(String),
    /// A prefix fits several ids.
    #[error("id prefix {0:?} is ambiguous")]
    Ambiguous(String),
    /// The request makes no sense, or asks for what does not exist.
    #[error("invalid {what}: {reason}")]
    Invalid {
        /// Which part of the request.
        what: String,
        /// Why it cannot be had.
        reason: String,
    },
    /// The name belongs to a pod or container that is not removed.
    #[error("{name} is reserved for {id}")]
    NameTaken {
        /// The name in the caller's words.
        name: String,
        /// Whose it is.
        id: String,
    },
    /// Right request, wrong state.
    #[error("cannot {what}: it is {state}")]
    WrongState {
        /// What was asked of what, e.g. `start container 1234`.
        what: String,
        /// The state it is in.
        state: String,
    },
    /// The VM cannot be sized.
    #[error("cannot size the VM of pod sandbox {id}")]
    Size {
        /// The pod.
        id: String,
        /// Which numbers disagree.
        #[source]
        source: SizeError,
    },
    /// A step of the boot failed; everything was undone, or `undo` says what was not.
    #[error(
        "cannot run pod sandbox {id}: {step} failed{}{}",
        Console(console),
        Undo(undo)
    )]
    Boot {
        /// The pod.
        id: String,
        /// Which step, e.g. `launch`.
        step: &'static str,
        /// The cause.
        #[source]
        source: Box<SandboxError>,
        /// End of the VM's console, cleaned; `None` when there is none.
        console: Option<String>,
        /// What could not be undone; empty when nothing is left.
        undo: Vec<String>,
    },
    /// What ran was broken off because the pod was stopped or removed meanwhile.
    #[error("{what} was broken off: {why}")]
    Cancelled {
        /// What ran.
        what: String,
        /// Why it ended.
        why: &'static str,
    },
    /// The agent refused, failed, or did not answer.
    #[error("cannot {what}")]
    Guest {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: GuestError,
    },
    /// Somebody who has a say in it does not let it go on.
    #[error("cannot {what}")]
    Hook {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: HookError,
    },
    /// A command ran longer than its timeout and was killed.
    #[error("command in container {id} timed out after {limit:?}")]
    ExecTimeout {
        /// The container.
        id: String,
        /// The timeout it was given.
        limit: Duration,
    },
    /// A listener did not take its events in time.
    #[error("more than {limit} events were not taken in time: list again and listen anew")]
    Lagged {
        /// How many may wait.
        limit: usize,
    },
    /// Nobody else may listen.
    #[error("{0} clients listen for events already, the most there can be")]
    TooManyListeners(usize),
    /// The VM is too small for it and cannot grow so far.
    #[error("cannot {what}: {reason}")]
    Unmet {
        /// What was asked of what.
        what: String,
        /// Which numbers disagree.
        reason: String,
    },
    /// The hypervisor failed.
    #[error("cannot {what}")]
    Hypervisor {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: HypervisorError,
    },
    /// The pod's network could not be made or taken down.
    #[error("cannot {what}")]
    Network {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: Box<NetError>,
    },
    /// A volume cannot be had.
    #[error("cannot mount host path {} at {container_path}", host_path.display())]
    Volume {
        /// As it was asked for.
        host_path: PathBuf,
        /// Where in the container.
        container_path: String,
        /// The cause.
        #[source]
        source: Box<SandboxError>,
    },
    /// The host has no AppArmor policy for the guest.
    #[error("cannot {what}")]
    AppArmor {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: ProfileError,
    },
    /// The VM ended when it should not have.
    #[error("the VM of pod sandbox {id} ended: {reason}")]
    VmDied {
        /// The pod.
        id: String,
        /// What the host saw.
        reason: String,
    },
    /// A file operation on the host failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A record on disk cannot be used. It is kept as it is.
    #[error("cannot use record {path}: {reason}")]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Host clean-up went on to its end, but some of it failed; asking again tries what is left.
    #[error("cannot clean up pod sandbox {id}: {}", failures.join("; "))]
    CleanUp {
        /// The pod.
        id: String,
        /// Each failure with its whole chain of causes.
        failures: Vec<String>,
    },
    /// A host program failed.
    #[error("{program} failed: {reason}")]
    Program {
        /// The program.
        program: &'static str,
        /// Exit status and what it printed on standard error.
        reason: String,
    },
    /// Too many requests wait for this pod.
    #[error("too many requests wait for pod sandbox {0}")]
    Busy(String),
    /// Nothing was heard in time.
    #[error("{what} did not finish within {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The bound.
        limit: Duration,
    },
    /// The pod's task is gone; only a daemon that shuts down answers this.
    #[error("pod sandbox {0} is no longer served")]
    Gone(String),
    /// The answer of a call that several callers had joined.
    #[error(transparent)]
    Shared(#[from] Arc<SandboxError>),
}

/// What kind of failure a caller should see; every error has exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request makes no sense, or asks for what does not exist.
    Invalid,
    /// Unknown pod or container.
    NotFound,
    /// The name is taken by another pod or container.
    AlreadyExists,
    /// Right request, wrong state.
    WrongState,
    /// No memory, slot or disk space left for it.
    Exhausted,
    /// Nothing was heard in time.
    Deadline,
    /// The call ended because the pod was stopped or removed meanwhile.
    Cancelled,
    /// The host or the guest failed.
    Internal,
}

impl SandboxError {
    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NoSandbox(_) | Self::NoContainer(_) => ErrorKind::NotFound,
            Self::Ambiguous(_) | Self::Invalid { .. } => ErrorKind::Invalid,
            Self::NameTaken { .. } => ErrorKind::AlreadyExists,
            Self::WrongState { .. } | Self::Unmet { .. } => ErrorKind::WrongState,
            Self::Size { .. } | Self::Busy(_) | Self::Lagged { .. } | Self::TooManyListeners(_) => {
                ErrorKind::Exhausted
            }
            Self::Boot { source, .. } | Self::Volume { source, .. } => source.kind(),
            Self::Shared(source) => source.kind(),
            Self::Cancelled { .. } => ErrorKind::Cancelled,
            Self::Guest { source, .. } => guest_kind(source),
            Self::ExecTimeout { .. } | Self::Deadline { .. } => ErrorKind::Deadline,
            Self::Hypervisor { source, .. } => match source {
                HypervisorError::NoSlot { .. } => ErrorKind::Exhausted,
                HypervisorError::Deadline { .. } => ErrorKind::Deadline,
                HypervisorError::Io { source, .. } => io_kind(source),
                _ => ErrorKind::Internal,
            },
            Self::Io { source, .. } => io_kind(source),
            Self::Network { source, .. } => network_kind(source),
            Self::AppArmor { source, .. } if source.is_internal() => ErrorKind::Internal,
            Self::AppArmor { .. } => ErrorKind::Invalid,
            Self::Hook { .. }
            | Self::VmDied { .. }
            | Self::Record { .. }
            | Self::CleanUp { .. }
            | Self::Program { .. }
            | Self::Gone(_) => ErrorKind::Internal,
        }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    pub(crate) fn guest(what: impl Into<String>) -> impl FnOnce(GuestError) -> Self {
        let what = what.into();
        move |source| Self::Guest { what, source }
    }

    pub(crate) fn hypervisor(what: impl Into<String>) -> impl FnOnce(HypervisorError) -> Self {
        let what = what.into();
        move |source| Self::Hypervisor { what, source }
    }

    /// The text with its whole chain of sources, for where an error must become a string.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(error) = next {
            text.push_str(": ");
            text.push_str(&error.to_string());
            next = error.source();
        }
        text
    }
}

fn guest_kind(error: &GuestError) -> ErrorKind {
    match (error, error.kind()) {
        (GuestError::Log { source, .. }, _) => io_kind(source),
        // The id is ours, so what the guest does not know is not what the caller has named.
        (_, GuestErrorKind::NotFound | GuestErrorKind::AlreadyExists | GuestErrorKind::Internal) => {
            ErrorKind::Internal
        }
        (_, GuestErrorKind::Invalid) => ErrorKind::Invalid,
        (_, GuestErrorKind::WrongState) => ErrorKind::WrongState,
        (_, GuestErrorKind::Timeout | GuestErrorKind::Unreachable) => ErrorKind::Deadline,
    }
}

fn network_kind(error: &NetError) -> ErrorKind {
    match (error, error.kind()) {
        (NetError::File { source, .. }, _) => io_kind(source),
        // Right request, but the node has no network to give.
        (_, NetErrorKind::NotReady) => ErrorKind::WrongState,
        (_, NetErrorKind::Deadline) => ErrorKind::Deadline,
        (_, NetErrorKind::InvalidArgument) => ErrorKind::Invalid,
        (_, NetErrorKind::Plugin | NetErrorKind::Internal) => ErrorKind::Internal,
    }
}

fn io_kind(error: &std::io::Error) -> ErrorKind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::Exhausted,
        _ => ErrorKind::Internal,
    }
}

struct Console<'a>(&'a Option<String>);

impl fmt::Display for Console<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(tail) if !tail.is_empty() => write!(f, " (end of its console: {tail})"),
            Some(_) => write!(f, " (its console is empty)"),
            None => Ok(()),
        }
    }
}

struct Undo<'a>(&'a [String]);

impl fmt::Display for Undo<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return Ok(());
        }
        write!(
            f,
            " (not undone, stop or remove tries again: {})",
            self.0.join("; ")
        )
    }
}
