//! What a verb can answer instead of success, and the one place where that becomes a gRPC status.
//!
//! Must not know the verbs: a variant is a cause, not a place.

use std::io;

use tonic::{Code, Status};

/// Why a verb did not succeed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The request cannot be meant like this.
    #[error("{field}: {reason}")]
    Invalid {
        /// Field of the request.
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No such thing.
    #[error("no {what} {id}")]
    Unknown {
        /// Kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// There is one already.
    #[error("{what} {id} exists")]
    Exists {
        /// Kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// Not now.
    #[error("{what} {id} {reason}")]
    State {
        /// Kind of thing.
        what: &'static str,
        /// Its id.
        id: String,
        /// Which state is in the way.
        reason: &'static str,
    },
    /// A limit of the agent.
    #[error("there are {limit} {what} already, the most there can be")]
    Full {
        /// Kind of thing.
        what: &'static str,
        /// How many.
        limit: usize,
    },
    /// A device did not appear.
    #[error("no {what} {id} appeared within {seconds} s")]
    Missing {
        /// Kind of device.
        what: &'static str,
        /// What it was looked for by.
        id: String,
        /// How long.
        seconds: u64,
    },
    /// The guest's kernel refused.
    #[error("{step}")]
    Step {
        /// What was tried on what.
        step: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The process could not be run; the words of the init stage.
    #[error("{message}")]
    Launch {
        /// The words.
        message: String,
        /// The request asked for something that the image does not have.
        requested: bool,
    },
}

impl AgentError {
    /// An [`AgentError::Invalid`].
    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Launch { requested: true, .. } => Code::InvalidArgument,
            Self::Unknown { .. } => Code::NotFound,
            Self::Exists { .. } => Code::AlreadyExists,
            Self::State { .. } => Code::FailedPrecondition,
            Self::Full { .. } => Code::ResourceExhausted,
            Self::Missing { .. } | Self::Step { .. } | Self::Launch { .. } => Code::Internal,
        }
    }
}

/// An error with its causes, outermost first.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

impl From<AgentError> for Status {
    fn from(error: AgentError) -> Self {
        Status::new(error.code(), chain(&error))
    }
}

/// Names the step that failed.
pub(crate) trait At<T> {
    /// `step` says what was tried on what.
    fn at<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, AgentError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T, AgentError> {
        self.map_err(|error| AgentError::Step {
            step: step().into(),
            source: error.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_carries_the_step_and_the_errno() {
        let failed: Result<(), _> = Err(rustix::io::Errno::NOENT);
        let status = Status::from(failed.at(|| "mounting x").unwrap_err());
        assert_eq!(status.code(), Code::Internal);
        assert_eq!(
            status.message(),
            "mounting x: No such file or directory (os error 2)"
        );
    }
}
