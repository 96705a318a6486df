//! Processes that outlive the daemon: how they are named in the journal, found again, watched and killed.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::HypervisorError;

/// What a process does for its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProcessRole {
    /// Runs the guest.
    Vmm,
    /// Serves the vsock device from outside the VMM.
    Vsock,
}

/// A process that can be found again: the pid alone may have been reused, pid and start time together cannot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// What it does.
    pub role: ProcessRole,
    /// Process id.
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks after boot.
    pub start_time: u64,
}

/// Kills every process with `OWNER_ENV=id` in its environment; answers how many there were.
pub(crate) async fn sweep(_id: &str, _deadline: Duration) -> Result<usize, HypervisorError> {
    Err(HypervisorError::Spec("not there yet".into()))
}
