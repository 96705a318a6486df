//! What can go wrong with plugins.

use std::{path::PathBuf, time::Duration};

use crate::frame::FrameError;

/// Why a call to plugins failed, or NRI cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum NriError {
    /// A plugin has answered with an error: what it was told of must not go on.
    #[error("NRI plugin {plugin} failed {method}: {message}")]
    Refused {
        /// Index and name.
        plugin: String,
        /// The call.
        method: &'static str,
        /// In the plugin's words.
        message: String,
    },
    /// Two plugins want to change one thing.
    #[error("NRI plugins {first} and {second} both change {what} of container {container}")]
    Conflict {
        /// Who changed it first.
        first: String,
        /// Who wants to change it, too.
        second: String,
        /// Which part.
        what: String,
        /// Whose.
        container: String,
    },
    /// A plugin has rejected what others have asked for.
    #[error("NRI plugin {plugin} rejects the adjustment of container {container}: {reason}")]
    Rejected {
        /// Who.
        plugin: String,
        /// Of which container.
        container: String,
        /// In the plugin's words.
        reason: String,
    },
    /// A plugin asks for an update of the container that is only being created.
    #[error("NRI plugin {plugin} asks for an update of container {container}, which is being created")]
    SelfUpdate {
        /// Who.
        plugin: String,
        /// Of which container.
        container: String,
    },
    /// The socket cannot be served.
    #[error("cannot serve NRI on its socket")]
    Socket(#[source] std::io::Error),
    /// The directory of plugins cannot be used.
    #[error("cannot use the NRI plugins in {path}: {reason}")]
    Plugins {
        /// Which directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Why one call to one plugin has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// It said so.
    #[error("{message}")]
    Status {
        /// gRPC's code.
        code: i32,
        /// Its words.
        message: String,
    },
    /// Longer than a message can be.
    #[error(transparent)]
    TooLarge(FrameError),
    /// It did not answer in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// It has gone, or has broken the protocol.
    #[error("the connection is closed")]
    Closed,
    /// Its answer cannot be read.
    #[error("the answer cannot be read")]
    Malformed(#[source] prost::DecodeError),
}

impl CallError {
    /// Whether the plugin is of no more use: it is disconnected, and what it was asked goes on without it.
    pub(crate) fn is_fatal(&self) -> bool {
        match self {
            Self::Status { .. } | Self::TooLarge(_) => false,
            Self::Timeout(_) | Self::Closed | Self::Malformed(_) => true,
        }
    }
}

/// Why a plugin was not taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error("it did not register within {0:?}")]
    Silent(Duration),
    #[error("the connection was closed before it registered")]
    Closed,
    #[error("it registered with the {what} {value:?}, which is not {wanted}")]
    Identity {
        what: &'static str,
        value: String,
        wanted: &'static str,
    },
    #[error("{0} failed")]
    Call(&'static str, #[source] CallError),
    #[error("it subscribes to events {0:#x}, which do not exist")]
    Events(i32),
    #[error("it does not take a synchronization in several messages")]
    Split,
    #[error("{0} is too large for a message")]
    Oversize(String),
    #[error("cannot start it")]
    Launch(#[source] std::io::Error),
    #[error("there are {0} plugins already, the most there can be")]
    TooMany(usize),
}
