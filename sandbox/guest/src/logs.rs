//! Container logs: from the agent's output streams to a file in the CRI format.
//!
//! Owns the log file, its rotation, and the checkpoint that makes a restart lose nothing and repeat nothing: (inode, file size, source
//! offset of each stream, partial-line flag of each stream), saved after write(2) and before the agent is told that it may forget.
//! After a crash a torn record behind the checkpoint is cut off, and reading goes on at the checkpoint's offsets.

use std::{path::PathBuf, time::Duration};

use crate::{GuestClient, GuestError};

/// Which container's output goes where.
#[derive(Debug, Clone)]
pub struct LogTarget {
    /// The container.
    pub container_id: String,
    /// It has a terminal: one stream only, written as stdout.
    pub terminal: bool,
    /// The log file; `None`: output is read, acknowledged and dropped.
    pub path: Option<PathBuf>,
    /// Where the checkpoint is kept.
    pub checkpoint: PathBuf,
}

/// A running copy of one container's output to its log.
#[derive(Debug)]
pub struct ContainerLog {}

#[allow(
    clippy::todo,
    clippy::unused_async,
    unused_variables,
    reason = "laid out for the rooms that build on it; replaced by the implementation"
)]
impl ContainerLog {
    /// Opens (or goes on with) the log and starts copying in a task of its own, which ends when all streams have ended.
    pub async fn start(client: GuestClient, target: LogTarget) -> Result<Self, GuestError> {
        todo!()
    }
    /// Closes the file and opens it anew by its path (after rotation); answers when the next line would go to the new file.
    pub async fn reopen(&self) -> Result<(), GuestError> {
        todo!()
    }
    /// Waits until every byte of all streams is in the file, `limit` at most. True when complete.
    pub async fn drained(&self, limit: Duration) -> bool {
        todo!()
    }
    /// Why copying stopped before the end, e.g. a full disk; `None` while all is well.
    pub async fn failure(&self) -> Option<String> {
        todo!()
    }
}
