//! Why a profile cannot be used.

use crate::emit::MAX_INSTRUCTIONS;

/// What is wrong with a profile. Each names the place.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// Not JSON, or not of this shape.
    #[error("seccomp profile is malformed")]
    Malformed(#[from] serde_json::Error),
    /// A value that is not known, or that cannot be enforced here.
    #[error("seccomp profile: {field}: {reason}")]
    Value {
        /// Where, e.g. `syscalls[3].args[0].op`.
        field: String,
        /// Why.
        reason: String,
    },
    /// More rules than a kernel takes.
    #[error("seccomp profile compiles to {0} instructions; a kernel takes {MAX_INSTRUCTIONS}")]
    TooLong(usize),
}

impl SeccompError {
    pub(crate) fn value(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Value {
            field: field.into(),
            reason: reason.into(),
        }
    }
}
