//! Why there is no policy for a profile's name.

use std::{io, path::PathBuf};

/// Why there is no policy. The text names the profile, and what could be done.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// No profile can have this name.
    #[error("AppArmor profile name {name:?} {reason}")]
    Name {
        /// As it was asked for.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Nowhere on this node.
    #[error(
        "no AppArmor profile {name:?}: {} in a file of {}",
        if *.withheld {
            "the host's kernel has it without its policy (CONFIG_SECURITY_APPARMOR_EXPORT_BINARY is off), and it is not"
        } else {
            "it is neither loaded on the host nor"
        },
        directory.display()
    )]
    Unknown {
        /// As it was asked for.
        name: String,
        /// Where files were looked for.
        directory: PathBuf,
        /// The host's kernel has it, without the policy that it was loaded from.
        withheld: bool,
    },
    /// There is a file, and nothing to compile it with.
    #[error(
        "AppArmor profile {name:?} is in {}, and the host has no apparmor_parser to compile it (package apparmor)",
        file.display()
    )]
    NoCompiler {
        /// As it was asked for.
        name: String,
        /// Where its name is.
        file: PathBuf,
    },
    /// The compiler refused the file, or took too long or too much.
    #[error("AppArmor profile {name:?}: apparmor_parser on {}: {reason}", file.display())]
    Compiler {
        /// As it was asked for.
        name: String,
        /// The file.
        file: PathBuf,
        /// Its words, or what was done to it.
        reason: String,
    },
    /// Larger than any policy should be.
    #[error("the policy of AppArmor profile {name:?} is over {limit} bytes")]
    TooLarge {
        /// As it was asked for.
        name: String,
        /// The most there may be.
        limit: u64,
    },
    /// The host failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried on what.
        what: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The search was broken off with the daemon.
    #[error("the search for AppArmor profile {0:?} was broken off")]
    Lost(String),
}

impl ProfileError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::Io { what, source }
    }

    /// Whether the host is at fault rather than what was asked for.
    #[must_use]
    pub fn is_internal(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::Lost(_))
    }
}
