//! The error edge: every failure of a call, and the one place where it becomes a gRPC status.
//!
//! Each [`RpcError`] maps to exactly one code, by cause. The message is the error's text with its chain of sources, each once.

#![expect(
    clippy::disallowed_methods,
    reason = "the one place where a tonic::Status is made"
)]

use std::error::Error;

use caisson_image::{ErrorKind as ImageErrorKind, ImageError};
use caisson_nri::NriError;
use caisson_sandbox::{ErrorKind, SandboxError};
use caisson_streaming::TooManyTokens;
use tonic::{Code, Status};

use crate::translate::Refusals;

/// Why a CRI call failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// The request is malformed, or asks for what cannot be had; names the fields.
    #[error(transparent)]
    Refused(#[from] Refusals),
    /// The call is not served, for a reason that lasts.
    #[error("caisson does not implement {method}: {reason}")]
    NotYet {
        /// The call.
        method: &'static str,
        /// What would be needed.
        reason: &'static str,
    },
    /// A container was asked for whose image is not here.
    #[error("image {0:?} is not in the store: pull it first")]
    ImageMissing(String),
    /// The answer would be wrong because the pod is not in a state to give it.
    #[error("pod sandbox {0} is not ready")]
    PodNotReady(String),
    /// A pod or container failed.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// An image failed.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// No more streaming sessions can be promised.
    #[error(transparent)]
    Streaming(#[from] TooManyTokens),
    /// A plugin does not let it happen.
    #[error(transparent)]
    Nri(#[from] NriError),
    /// A host file that the answer is made of cannot be read.
    #[error("cannot {what}")]
    Io {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// A task of the daemon itself was lost.
    #[error("the daemon lost the task that was to {0}")]
    TaskLost(&'static str),
}

impl RpcError {
    /// The gRPC code of this failure.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Refused(_) => Code::InvalidArgument,
            Self::NotYet { .. } => Code::Unimplemented,
            Self::ImageMissing(_) => Code::NotFound,
            Self::PodNotReady(_) => Code::FailedPrecondition,
            Self::Sandbox(error) => sandbox_code(error.kind()),
            Self::Image(error) => image_code(error.kind()),
            Self::Streaming(_) => Code::ResourceExhausted,
            Self::Nri(_) | Self::Io { .. } | Self::TaskLost(_) => Code::Internal,
        }
    }

    /// Whether it is what the caller had reckoned with, and so nothing that an admin must see: a probe whose command ran too long.
    #[must_use]
    pub fn is_expected(&self) -> bool {
        matches!(self, Self::Sandbox(SandboxError::ExecTimeout { .. }))
    }

    /// The text with its chain of sources. A source that the text before it already ends with is not repeated.
    #[must_use]
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// Text and sources of any error, each once.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let words = source.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = source.source();
    }
    text
}

impl From<&RpcError> for Status {
    fn from(error: &RpcError) -> Self {
        let text = error.chain();
        let text = match error {
            RpcError::Image(image) if image.kind() == ImageErrorKind::Unsigned => {
                format!("{SIGNATURE_VALIDATION_FAILED}: {text}")
            }
            _ => text,
        };
        Self::new(error.code(), text)
    }
}

/// By this beginning of an error kubelet knows that a signature is at fault, and says so in the pod's status.
const SIGNATURE_VALIDATION_FAILED: &str = "SignatureValidationFailed";

/// The answer to a call of a service that is not the CRI.
#[must_use]
pub fn unknown_service(name: &str) -> Status {
    Status::unimplemented(format!("this socket serves runtime.v1 of the CRI, not {name:?}"))
}

/// The answer to a call that took longer than its client gives it.
#[must_use]
pub fn deadline_passed(limit: std::time::Duration) -> Status {
    Status::deadline_exceeded(format!("not done within the {limit:?} that the client gave"))
}

fn sandbox_code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::NotFound => Code::NotFound,
        ErrorKind::AlreadyExists => Code::AlreadyExists,
        ErrorKind::WrongState => Code::FailedPrecondition,
        ErrorKind::Exhausted => Code::ResourceExhausted,
        ErrorKind::Deadline => Code::DeadlineExceeded,
        ErrorKind::Cancelled => Code::Aborted,
        ErrorKind::Internal => Code::Internal,
    }
}

fn image_code(kind: ImageErrorKind) -> Code {
    match kind {
        ImageErrorKind::Invalid => Code::InvalidArgument,
        ImageErrorKind::NotFound => Code::NotFound,
        ImageErrorKind::Unauthorized => Code::PermissionDenied,
        ImageErrorKind::Unavailable => Code::Unavailable,
        // What kubelet knows by its text is only recognized there without a code.
        ImageErrorKind::Unsigned => Code::Unknown,
        ImageErrorKind::Refused => Code::FailedPrecondition,
        ImageErrorKind::Exhausted => Code::ResourceExhausted,
        ImageErrorKind::Deadline => Code::DeadlineExceeded,
        ImageErrorKind::Internal => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_sandbox_failure_has_its_own_code() {
        let kinds = [
            ErrorKind::Invalid,
            ErrorKind::NotFound,
            ErrorKind::AlreadyExists,
            ErrorKind::WrongState,
            ErrorKind::Exhausted,
            ErrorKind::Deadline,
            ErrorKind::Cancelled,
            ErrorKind::Internal,
        ];
        let mut codes: Vec<i32> = kinds.into_iter().map(|kind| sandbox_code(kind) as i32).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), kinds.len());
    }

    #[test]
    fn the_message_has_every_source_once() {
        let error = RpcError::from(SandboxError::Io {
            what: "write /x".into(),
            source: std::io::Error::other("disk on fire"),
        });
        let status = Status::from(&error);
        assert_eq!(status.message(), "cannot write /x: disk on fire");
        assert_eq!(status.code(), Code::Internal);
    }

    #[test]
    fn a_refused_request_names_each_field() {
        let mut refusals = Refusals::default();
        refusals.add("config.a", "is wrong");
        refusals.add("config.b", "is missing");
        let error = RpcError::from(refusals);
        assert_eq!(error.code(), Code::InvalidArgument);
        assert_eq!(error.chain(), "config.a: is wrong; config.b: is missing");
    }
}
