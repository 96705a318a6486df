//! What every handler works with: the rooms that do the work, and the few settings that answers are made of.

use std::{path::PathBuf, sync::Arc};

use caisson_hypervisor::Hypervisor;
use caisson_image::ImageStore;
use caisson_net::Network;
use caisson_sandbox::{SandboxError, Sandboxes, view::ContainerState};
use caisson_streaming::Endpoint;

use crate::{
    config::CgroupDriver,
    nri::Plugins,
    pod_cidr::PodCidrStore,
    status::{RpcError, chain},
};

/// Shared by all calls; each handler is a function of it and a request.
#[derive(Clone)]
pub struct Runtime {
    /// Pods and containers.
    pub sandboxes: Sandboxes,
    /// Images.
    pub images: ImageStore,
    /// The pod network, asked for its status only.
    pub network: Network,
    /// The driver, asked to describe itself only.
    pub hypervisor: Arc<dyn Hypervisor>,
    /// Plugins that have a say; absent when NRI is switched off.
    pub nri: Option<Plugins>,
    /// The node's range of pod addresses, as kubelet has told it.
    pub pod_cidr: Arc<PodCidrStore>,
    /// Where clients are sent for streams.
    pub streaming: Endpoint,
    /// What answers are made of.
    pub settings: Arc<Settings>,
}

impl Runtime {
    /// The whole id of a container that runs; `what` names what is to be done with it.
    pub async fn running_container(&self, id: &str, what: &str) -> Result<String, RpcError> {
        let view = self.sandboxes.container_status(id).await?;
        let state = match view.state {
            ContainerState::Running { .. } => return Ok(view.id.0),
            ContainerState::Created => "created",
            ContainerState::Exited { .. } => "exited",
            ContainerState::Unknown => "unknown",
        };
        Err(RpcError::Sandbox(SandboxError::WrongState {
            what: format!("{what} container {}", view.id.0),
            state: state.into(),
        }))
    }

    /// Deletes the disks of removed images that no container uses any more. A failure is told and tried again next time.
    pub async fn collect_images(&self) {
        let in_use = self.sandboxes.images_in_use().await;
        if !in_use.complete {
            tracing::warn!(
                "disks of removed images stay: a record that cannot be read does not say which one is in use"
            );
            return;
        }
        if let Err(error) = self.images.collect(&in_use.ids).await {
            tracing::warn!(error = chain(&error), "disks of removed images stay");
        }
    }
}

/// Settings that are told to clients.
#[derive(Debug)]
pub struct Settings {
    /// Guest kernel; without it no pod can run.
    pub kernel: PathBuf,
    /// Guest initramfs; without it no pod can run.
    pub initramfs: PathBuf,
    /// Where pods keep their writable disks.
    pub sandboxes_root: PathBuf,
    /// For kubelet.
    pub cgroup_driver: CgroupDriver,
    /// The effective configuration, for verbose Status.
    pub config: serde_json::Value,
}

/// Name by which this runtime is known to clients.
pub const NAME: &str = "caisson";

/// Version of this daemon.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Version of the interface that is served.
pub const API_VERSION: &str = "v1";
