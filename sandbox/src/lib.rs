//! Pods as microVMs: one actor per pod, its journal, its recovery.
//!
//! Owns what happens to a pod between the CRI call and the guest: identity and name reservation, the order of network, VM and agent,
//! undo, stop, and what is remembered on disk. Must not know CRI types, gRPC servers, how images are fetched, which hypervisor runs
//! (it has the port), or how CNI is called (it has `caisson-net`).

mod error;
mod networks;
pub mod spec;
pub mod view;

use std::{path::PathBuf, sync::Arc, time::Duration};

use caisson_hypervisor::Hypervisor;
use serde::{Deserialize, Serialize};

pub use caisson_agent_api::v1 as guest;
pub use error::{ErrorKind, SandboxError};
pub use networks::PodNetworks;

/// Most bytes of each output that ExecSync keeps.
pub const EXEC_OUTPUT_LIMIT: usize = 16 << 20;

/// A pod's id: 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SandboxId(pub String);

/// A container's id: 64 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ContainerId(pub String);

/// What this room needs to work, decided by the composition root.
pub struct SandboxesConfig {
    /// Durable state (journal, writable disks): survives a reboot of the daemon.
    pub root: PathBuf,
    /// Sockets and logs of VMs: gone after a reboot of the host.
    pub run: PathBuf,
    /// Guest kernel.
    pub kernel: PathBuf,
    /// Guest initramfs.
    pub initramfs: PathBuf,
    /// More words for the kernel command line.
    pub cmdline: Vec<String>,
    /// VM size when the pod has no limits.
    pub default_memory_mib: u64,
    /// vCPUs when the pod has no limits.
    pub default_vcpus: u32,
    /// Memory that guest kernel and agent need beyond the containers' limits, MiB.
    pub guest_overhead_mib: u64,
    /// Memory of the pod's cgroup that is kept for the VMM and its helpers, MiB.
    pub host_reserve_mib: u64,
    /// Size of each pod's writable disk (sparse), bytes.
    pub scratch_bytes: u64,
    /// How many images may be attached to one VM.
    pub attach_slots: u32,
    /// From RunPodSandbox to an answering agent, at most.
    pub boot_deadline: Duration,
    /// For each call to the agent.
    pub agent_deadline: Duration,
}

/// All pods of this node. Cheap to clone; methods only message actors, so dropping a returned future loses nothing.
#[derive(Clone)]
pub struct Sandboxes {
    _inner: Arc<()>,
}

#[allow(
    clippy::todo,
    clippy::unused_async,
    unused_variables,
    reason = "laid out for the rooms that build on it; replaced by the actor"
)]
impl Sandboxes {
    /// Reads the journal, adopts what still runs, cleans up what does not, and starts serving.
    pub async fn open(
        config: SandboxesConfig,
        hypervisor: Arc<dyn Hypervisor>,
        network: Arc<dyn PodNetworks>,
    ) -> Result<Self, SandboxError> {
        todo!()
    }
    /// Runs a pod. A retry with the same identity joins the call in progress; a pod of the same identity that is ready is answered as it is.
    pub async fn run(&self, spec: spec::PodSpec) -> Result<SandboxId, SandboxError> {
        todo!()
    }
    /// Stops a pod: kills its VM, tears the network down. Idempotent; unknown ids are Ok.
    pub async fn stop(&self, id: &str) -> Result<(), SandboxError> {
        todo!()
    }
    /// Removes a pod and its containers (stopping it first). Idempotent; unknown ids are Ok.
    pub async fn remove(&self, id: &str) -> Result<(), SandboxError> {
        todo!()
    }
    /// One pod. `id` may be a unique prefix, here and below.
    pub async fn status(&self, id: &str) -> Result<view::SandboxView, SandboxError> {
        todo!()
    }
    /// All pods.
    pub async fn list(&self) -> Vec<view::SandboxView> {
        todo!()
    }
    /// Creates a container. A retry with the same name and attempt joins the call in progress.
    pub async fn create_container(
        &self,
        sandbox: &str,
        spec: spec::ContainerSpec,
    ) -> Result<ContainerId, SandboxError> {
        todo!()
    }
    /// Starts a created container.
    pub async fn start_container(&self, id: &str) -> Result<(), SandboxError> {
        todo!()
    }
    /// Sends the stop signal, and SIGKILL after `grace`. Idempotent; unknown ids are Ok.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), SandboxError> {
        todo!()
    }
    /// Removes a container (killing it first). Idempotent; unknown ids are Ok.
    pub async fn remove_container(&self, id: &str) -> Result<(), SandboxError> {
        todo!()
    }
    /// One container.
    pub async fn container_status(&self, id: &str) -> Result<view::ContainerView, SandboxError> {
        todo!()
    }
    /// All containers.
    pub async fn list_containers(&self) -> Vec<view::ContainerView> {
        todo!()
    }
    /// Runs a command in a running container and collects what it prints.
    pub async fn exec_sync(&self, id: &str, exec: spec::ExecSpec) -> Result<spec::ExecOutput, SandboxError> {
        todo!()
    }
    /// Closes and opens the container's log file again, after rotation.
    pub async fn reopen_log(&self, id: &str) -> Result<(), SandboxError> {
        todo!()
    }
    /// Image disks that containers use, so that image removal keeps them.
    pub async fn images_in_use(&self) -> Vec<String> {
        todo!()
    }
}
