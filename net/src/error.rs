//! Every way in which a pod's network can fail, and what kind of failure each is.
//!
//! The texts name what was tried on what; the cause stays in the error's source. Causes from netlink become `io::Error`s here, so that
//! the netlink crate, which breaks its interface often, is no part of this crate's own interface.

use std::{fmt, io, path::PathBuf, time::Duration};

/// What a caller can do about a [`NetError`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NetErrorKind {
    /// No usable configuration, or a plugin is missing: the node is not ready for pods.
    NotReady,
    /// A plugin has refused, or answered what no plugin may answer.
    Plugin,
    /// A plugin has not answered in time and was killed.
    Deadline,
    /// The caller's id or arguments cannot be passed to plugins.
    InvalidArgument,
    /// The kernel or the file system has refused.
    Internal,
}

/// The execution of a plugin: which one, what for, and for which network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Execution {
    /// `type` of the plugin's configuration.
    pub plugin: String,
    /// CNI_COMMAND.
    pub command: &'static str,
    /// Name of the network.
    pub network: String,
}

impl fmt::Display for Execution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "CNI plugin {:?}, {} for network {:?}",
            self.plugin, self.command, self.network
        )
    }
}

/// Why a network could not be made or taken down.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// No usable CNI configuration.
    #[error("no CNI network configuration in {0}")]
    NoConfiguration(PathBuf),
    /// There are files, and none of them can be used.
    #[error("no valid CNI network configuration in {directory}: {}", problems.join("; "))]
    InvalidConfiguration {
        /// Where they are.
        directory: PathBuf,
        /// One sentence for each file.
        problems: Vec<String>,
    },
    /// A plugin that the configuration names is in none of the directories.
    #[error("CNI plugin {plugin:?} of network {network:?} is in none of {directories:?}")]
    PluginMissing {
        /// `type` of its configuration.
        plugin: String,
        /// Name of the network.
        network: String,
        /// Where it was looked for.
        directories: Vec<PathBuf>,
    },
    /// A plugin has answered with an error object.
    #[error("{execution}: {message} (code {code}{}{details})", if details.is_empty() { "" } else { ": " })]
    PluginRefused {
        /// What was tried.
        execution: Execution,
        /// `code` of the CNI specification, or the plugin's own (100 and above).
        code: u64,
        /// `msg`.
        message: String,
        /// `details`, may be empty.
        details: String,
    },
    /// A plugin has crashed, or answered something that is no CNI answer.
    #[error("{execution}: {problem}")]
    PluginBroken {
        /// What was tried.
        execution: Execution,
        /// What came instead of an answer.
        problem: String,
    },
    /// A plugin has not answered in time and was killed.
    #[error("{execution}: no answer within {deadline:?}, killed")]
    PluginDeadline {
        /// What was tried.
        execution: Execution,
        /// How long it had.
        deadline: Duration,
    },
    /// A plugin could not be started.
    #[error("{execution}: cannot start {}", path.display())]
    PluginStart {
        /// What was tried.
        execution: Execution,
        /// The executable.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// The id or an argument has characters that CNI forbids.
    #[error("invalid argument for CNI: {0}")]
    InvalidArgument(String),
    /// A file or the pinned namespace could not be handled.
    #[error("cannot {action} {}", path.display())]
    File {
        /// A verb and its words, e.g. `write the CNI cache`.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// An interface could not be read or configured.
    #[error("cannot {action} on interface {interface:?} in the pod's network namespace")]
    Interface {
        /// A verb and its words, e.g. `redirect frames`.
        action: &'static str,
        /// Its name.
        interface: String,
        /// Cause.
        source: io::Error,
    },
    /// What could not be taken down, everything else was. Never empty.
    #[error("cannot take down the network: {}", chains(.0))]
    Teardown(Vec<NetError>),
}

impl NetError {
    /// What a caller can do about it.
    #[must_use]
    pub fn kind(&self) -> NetErrorKind {
        match self {
            Self::NoConfiguration(_) | Self::InvalidConfiguration { .. } | Self::PluginMissing { .. } => {
                NetErrorKind::NotReady
            }
            Self::PluginRefused { .. } | Self::PluginBroken { .. } => NetErrorKind::Plugin,
            Self::PluginDeadline { .. } => NetErrorKind::Deadline,
            Self::InvalidArgument(_) => NetErrorKind::InvalidArgument,
            Self::PluginStart { .. } | Self::File { .. } | Self::Interface { .. } => NetErrorKind::Internal,
            Self::Teardown(all) => all.first().map_or(NetErrorKind::Internal, Self::kind),
        }
    }

    pub(crate) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    pub(crate) fn interface<E: IntoIo>(action: &'static str, interface: &str) -> impl FnOnce(E) -> Self {
        move |source| Self::Interface {
            action,
            interface: interface.to_owned(),
            source: source.into_io(),
        }
    }
}

/// Several failures have no single source, so this is the one text that spells the causes out.
fn chains(all: &[NetError]) -> String {
    all.iter()
        .map(|error| {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                text = format!("{text}: {cause}");
                source = cause.source();
            }
            text
        })
        .collect::<Vec<_>>()
        .join("; ")
}

/// Causes that are told as `io::Error`s.
pub(crate) trait IntoIo {
    fn into_io(self) -> io::Error;
}

impl IntoIo for io::Error {
    fn into_io(self) -> io::Error {
        self
    }
}

impl IntoIo for nix::errno::Errno {
    fn into_io(self) -> io::Error {
        self.into()
    }
}

impl IntoIo for rtnetlink::Error {
    fn into_io(self) -> io::Error {
        match self {
            Self::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_teardown_error_tells_every_failure_with_its_causes() {
        let execution = Execution {
            plugin: "bridge".into(),
            command: "DEL",
            network: "pods".into(),
        };
        let error = NetError::Teardown(vec![
            NetError::PluginRefused {
                execution: execution.clone(),
                code: 11,
                message: "busy".into(),
                details: String::new(),
            },
            NetError::PluginRefused {
                execution,
                code: 7,
                message: "no".into(),
                details: "why".into(),
            },
            NetError::file("unpin the network namespace", "/n/x")(io::Error::from_raw_os_error(libc::EBUSY)),
        ]);
        let text = error.to_string();
        assert!(
            text.contains(r#"CNI plugin "bridge", DEL for network "pods": busy (code 11);"#),
            "{text}"
        );
        assert!(text.contains("no (code 7: why)"), "{text}");
        assert!(text.contains("/n/x: Device or resource busy"), "{text}");
        assert_eq!(error.kind(), NetErrorKind::Plugin);
    }
}
