//! Why the guest could not be asked, or what it answered.

use std::{fmt, io, path::PathBuf, time::Duration};

use caisson_agent_api::stream::FrameError;

/// Longest text taken over from the agent, in bytes: it is the guest's word, and ends in logs and CRI errors.
const MAX_AGENT_TEXT: usize = 16 << 10;

/// Why the guest could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The agent refused or failed; its own words.
    #[error("{verb} failed in the guest: {message}")]
    Agent {
        /// The verb, e.g. `StartContainer`.
        verb: &'static str,
        /// gRPC status code of the guest protocol.
        code: tonic::Code,
        /// The agent's message.
        message: String,
    },
    /// Nothing was heard in time.
    #[error("the agent did not answer {verb} within {limit:?}")]
    Deadline {
        /// The verb.
        verb: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// A command ran longer than it may; it has been killed.
    #[error("command timed out after {0:?}")]
    ExecTimeout(Duration),
    /// An output connection ended before the stream did.
    #[error("stream connection broke at offset {0}")]
    StreamBroken(u64),
    /// The agent could not be reached at all.
    #[error("no agent behind {}: {reached} (tried for {tried:?})", socket.display())]
    Unreachable {
        /// The hybrid vsock socket.
        socket: PathBuf,
        /// How far it got.
        reached: Reached,
        /// How long it was tried.
        tried: Duration,
    },
    /// The connection broke during a call, or could not be made for it.
    #[error("connection to the agent failed during {verb}")]
    Transport {
        /// The verb.
        verb: &'static str,
        /// What tonic saw.
        #[source]
        source: Box<tonic::Status>,
    },
    /// The wanted bytes of an output stream are gone.
    #[error("output at offset {wanted} is gone, the agent still has it from {lowest} on")]
    OffsetUnavailable {
        /// First byte wanted.
        wanted: u64,
        /// Lowest offset that can be had.
        lowest: u64,
    },
    /// Nothing in the pod accepts connections to this port.
    #[error("cannot connect to the port in the pod")]
    PortRefused(#[source] io::Error),
    /// The agent sent what the guest protocol does not allow.
    #[error("the agent broke the guest protocol in {0}")]
    Protocol(&'static str),
    /// A malformed message on a stream connection, theirs or (an id that is too long) ours.
    #[error("malformed stream message")]
    Frame(#[from] FrameError),
    /// The log or its checkpoint could not be opened or written.
    #[error("cannot {action} {}", path.display())]
    Log {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// What a caller can do about a [`GuestError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestErrorKind {
    /// The request was malformed.
    Invalid,
    /// Unknown id.
    NotFound,
    /// The id is taken.
    AlreadyExists,
    /// Not in this state.
    WrongState,
    /// No answer in time, or the command ran too long.
    Timeout,
    /// The VM or its agent is gone, or the connection broke.
    Unreachable,
    /// Everything else.
    Internal,
}

/// How far an attempt to reach the agent got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reached {
    /// The vsock socket does not exist.
    SocketAbsent,
    /// The vsock socket exists, nobody listens on it.
    SocketDead,
    /// The VM's vsock device closed the connection without a connection to this port: nobody listens in the guest.
    PortRefused(u32),
    /// The VM's vsock device took CONNECT and said nothing: the guest has no driver yet, or does not run.
    PortSilent(u32),
    /// The connection stands, but Hello was not answered.
    HelloUnanswered,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SocketAbsent => f.write_str("the vsock socket does not exist"),
            Self::SocketDead => f.write_str("nothing listens on the vsock socket"),
            Self::PortRefused(port) => write!(f, "the guest refused the connection to port {port}"),
            Self::PortSilent(port) => write!(f, "the guest did not answer the connection to port {port}"),
            Self::HelloUnanswered => f.write_str("connected, but Hello was not answered"),
        }
    }
}

impl GuestError {
    /// Sorts the error by what a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> GuestErrorKind {
        match self {
            Self::Agent { code, .. } => match code {
                tonic::Code::InvalidArgument => GuestErrorKind::Invalid,
                tonic::Code::NotFound => GuestErrorKind::NotFound,
                tonic::Code::AlreadyExists => GuestErrorKind::AlreadyExists,
                tonic::Code::FailedPrecondition => GuestErrorKind::WrongState,
                tonic::Code::DeadlineExceeded => GuestErrorKind::Timeout,
                _ => GuestErrorKind::Internal,
            },
            Self::Deadline { .. } | Self::ExecTimeout(_) => GuestErrorKind::Timeout,
            Self::StreamBroken(_) | Self::Unreachable { .. } | Self::Transport { .. } => {
                GuestErrorKind::Unreachable
            }
            Self::PortRefused(_) => GuestErrorKind::WrongState,
            Self::OffsetUnavailable { .. } | Self::Protocol(_) | Self::Frame(_) | Self::Log { .. } => {
                GuestErrorKind::Internal
            }
        }
    }

    /// Tells the agent's own answer from what the transport made up: only the latter has a source.
    pub(crate) fn from_status(verb: &'static str, status: tonic::Status) -> Self {
        if std::error::Error::source(&status).is_some() {
            return Self::Transport {
                verb,
                source: Box::new(status),
            };
        }
        Self::Agent {
            verb,
            code: status.code(),
            message: cut(status.message()),
        }
    }
}

/// The first [`MAX_AGENT_TEXT`] bytes, at a character boundary.
fn cut(text: &str) -> String {
    let end = (0..=MAX_AGENT_TEXT.min(text.len()))
        .rev()
        .find(|&end| text.is_char_boundary(end))
        .unwrap_or(0);
    text.get(..end).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_agent_text_is_cut_at_a_character() {
        let text = "é".repeat(MAX_AGENT_TEXT);
        let short = cut(&text);
        assert!(short.len() <= MAX_AGENT_TEXT && text.starts_with(&short));
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn the_agents_answer_is_told_from_a_broken_transport() {
        let theirs = GuestError::from_status("Hello", tonic::Status::not_found("no such"));
        assert_eq!(theirs.kind(), GuestErrorKind::NotFound);
        let ours = tonic::Status::from_error(Box::new(io::Error::other("broken")));
        assert_eq!(
            GuestError::from_status("Hello", ours).kind(),
            GuestErrorKind::Unreachable
        );
    }
}
