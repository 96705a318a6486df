//! What callers are shown: snapshots of pods and containers, complete in themselves.

use std::{net::IpAddr, time::SystemTime};

use crate::{ContainerId, SandboxId, spec};

/// A pod as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct SandboxView {
    /// Its id.
    pub id: SandboxId,
    /// As it was asked for.
    pub spec: spec::PodSpec,
    /// Whether containers can run in it.
    pub state: SandboxState,
    /// When RunPodSandbox began.
    pub created_at: SystemTime,
    /// First of each family first, as the CNI plugins gave them; empty once the network is gone.
    pub ips: Vec<IpAddr>,
    /// For verbose status: driver, pids, VM size, boot times, why it is not ready.
    pub info: serde_json::Value,
}

/// Ready or not (CRI PodSandboxState).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxState {
    /// The VM runs and the agent answers.
    Ready,
    /// Stopped, broken, or not adopted after a restart.
    NotReady,
}

/// A container as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct ContainerView {
    /// Its id.
    pub id: ContainerId,
    /// Its pod.
    pub sandbox_id: SandboxId,
    /// As it was asked for.
    pub spec: spec::ContainerSpec,
    /// Where its life stands.
    pub state: ContainerState,
    /// When CreateContainer succeeded.
    pub created_at: SystemTime,
    /// Absolute path of the log file; `None` when not logged.
    pub log_path: Option<std::path::PathBuf>,
    /// The user it runs as; `None` before it has started.
    pub user: Option<LinuxUser>,
}

/// Numeric ids in the guest.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LinuxUser {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplemental groups.
    pub supplemental_gids: Vec<u32>,
}

/// A container's state with what belongs to it (CRI ContainerState).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ContainerState {
    /// Not started.
    Created,
    /// Its process runs.
    Running {
        /// When it was started.
        started_at: SystemTime,
    },
    /// It has ended, or could not be started.
    Exited {
        /// `None` when it never started.
        started_at: Option<SystemTime>,
        /// When it ended.
        finished_at: SystemTime,
        /// 0-255; 128 + signal when killed by one.
        exit_code: i32,
        /// `Completed`, `Error`, `OOMKilled`, `StartError`, ...
        reason: String,
        /// For people.
        message: String,
    },
    /// Its pod could not be reached after a restart, so nothing can be said.
    Unknown,
}
