//! Why an image could not be had, and the small classification that callers map to their own protocol.

use std::{error::Error, io, path::PathBuf, sync::Arc};

/// What kind of failure it is: enough for a protocol edge to choose its code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request itself is malformed.
    Invalid,
    /// The registry has no such image, or none for this platform.
    NotFound,
    /// The registry wants other credentials.
    Unauthorized,
    /// The registry cannot be reached, or answers what is no registry's answer. Trying again later may help.
    Unavailable,
    /// The signature policy does not let it in.
    Unsigned,
    /// The content is refused: wrong digest, hostile archive, too large, or of a type that is not understood.
    Refused,
    /// The disk of the store is full.
    Exhausted,
    /// No progress within the configured time.
    Deadline,
    /// A fault of this node.
    Internal,
}

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not a reference. The text holds the reference and what is wrong with it.
    #[error("invalid image reference {0}")]
    Reference(String),
    /// A registry did not give what was asked.
    #[error("cannot pull {image}")]
    Registry {
        /// The reference that was pulled.
        image: String,
        /// What was tried and what came of it.
        source: RegistryError,
    },
    /// What the registry gave is refused.
    #[error("image {image} is refused: {reason}")]
    Content {
        /// The reference that was pulled.
        image: String,
        /// Which part, and why.
        reason: String,
    },
    /// The policy for this name wants a signature that there is not.
    #[error("the signature of image {image} is not accepted: {reason}")]
    Signature {
        /// The reference that was pulled.
        image: String,
        /// What is missing or wrong.
        reason: String,
    },
    /// The archive of a layer is refused, or could not be converted.
    #[error("layer {layer} of {image} cannot be converted")]
    Layer {
        /// The reference that was pulled.
        image: String,
        /// Digest of the layer.
        layer: String,
        /// Whether it is the content that is at fault.
        hostile: bool,
        /// What the converter or the decompressor said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The file system of the store is full.
    #[error("no space left for images in {}", path.display())]
    Exhausted {
        /// Directory of the store.
        path: PathBuf,
        /// What failed.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A file of the store could not be read or written.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// A verb.
        doing: &'static str,
        /// Of what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process that reads layers could not be started, or did not answer.
    #[error("cannot have layers converted")]
    Converter(#[source] io::Error),
    /// The index could not be read or written.
    #[error("cannot {doing} the image index {}", path.display())]
    Index {
        /// A verb.
        doing: &'static str,
        /// File of the index.
        path: PathBuf,
        /// What the database said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The store's configuration cannot be used.
    #[error("image store configuration: {0}")]
    Configuration(String),
    /// The pull that this one had joined failed; one error serves all who waited.
    #[error(transparent)]
    Joined(Arc<ImageError>),
    /// The task that did the work was stopped.
    #[error("{0} was interrupted")]
    Interrupted(&'static str),
}

impl ImageError {
    /// What kind of failure this is.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Reference(_) => ErrorKind::Invalid,
            Self::Registry { source, .. } => source.kind,
            Self::Content { .. } | Self::Layer { hostile: true, .. } => ErrorKind::Refused,
            Self::Signature { .. } => ErrorKind::Unsigned,
            Self::Exhausted { .. } => ErrorKind::Exhausted,
            Self::Io { source, .. } if is_storage_full(source) => ErrorKind::Exhausted,
            Self::Joined(error) => error.kind(),
            Self::Layer { .. }
            | Self::Io { .. }
            | Self::Converter(_)
            | Self::Index { .. }
            | Self::Configuration(_)
            | Self::Interrupted(_) => ErrorKind::Internal,
        }
    }

    /// The error and its causes in one line, each said once.
    #[must_use]
    pub fn chain(&self) -> String {
        describe(self)
    }
}

/// A request to a registry that failed.
#[derive(Debug, thiserror::Error)]
#[error("{tried}: {reason}")]
pub struct RegistryError {
    /// What kind of failure it is.
    pub kind: ErrorKind,
    /// The request, with its address.
    pub tried: String,
    /// What came of it.
    pub reason: String,
    /// What the transport said.
    #[source]
    pub source: Option<Box<dyn Error + Send + Sync>>,
    /// Whether the same request may succeed a moment later.
    pub(crate) transient: bool,
    /// How long the registry wants to be left alone first.
    pub(crate) retry_after: Option<std::time::Duration>,
}

impl RegistryError {
    pub(crate) fn new(kind: ErrorKind, tried: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            kind,
            tried: tried.into(),
            reason: reason.into(),
            source: None,
            transient: false,
            retry_after: None,
        }
    }

    pub(crate) fn transient(mut self) -> Self {
        self.transient = true;
        self
    }

    pub(crate) fn because(mut self, source: impl Error + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }
}

/// An error with all its causes, in one line.
pub(crate) fn describe(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        // Some libraries repeat their source in their own text.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

/// Whether the cause, at any depth, is a full disk or quota.
pub(crate) fn is_storage_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(io) = cause.downcast_ref::<io::Error>() {
            if matches!(
                io.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) {
                return true;
            }
            // An io::Error hands out its payload's source, not the payload.
            if io.get_ref().is_some_and(|inner| is_storage_full(inner)) {
                return true;
            }
        }
        next = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_found_below_other_errors() {
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let wrapped = io::Error::other(io::Error::other(full));
        assert!(is_storage_full(&wrapped));
        assert!(!is_storage_full(&io::Error::other("else")));
    }

    #[test]
    fn a_joined_error_keeps_its_kind_and_text() {
        let cause = ImageError::Reference("\"X\"".into());
        let joined = ImageError::Joined(Arc::new(cause));
        assert_eq!(joined.kind(), ErrorKind::Invalid);
        assert_eq!(joined.chain(), "invalid image reference \"X\"");
    }
}
