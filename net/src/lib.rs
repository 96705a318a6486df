//! Pod networks: a pinned network namespace, CNI, and a tap for the VM.
//!
//! Owns network namespaces, the execution of CNI plugins, netlink and taps. Must not know Pods as objects (it gets an id and names to
//! pass on) or VMs (it hands out an open tap).

mod attachment;
mod cni;
mod error;
mod namespace;
mod observed;
mod plan;
mod tap;
mod wiring;

use std::{collections::BTreeMap, net::IpAddr, os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

pub use error::{Execution, NetError, NetErrorKind};

/// Where things are, decided by the composition root.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Directories with CNI plugins, first match wins.
    pub plugin_dirs: Vec<PathBuf>,
    /// Directory with *.conflist, *.conf and *.json; the first in lexical order is used.
    pub conf_dir: PathBuf,
    /// libcni's result cache (subdirectory `results`).
    pub cache_dir: PathBuf,
    /// Where network namespaces are pinned, e.g. /run/caisson/netns.
    pub netns_dir: PathBuf,
    /// For each execution of a plugin.
    pub plugin_deadline: Duration,
}

/// The node's pod network. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Network {
    config: Arc<NetworkConfig>,
}

/// What a caller says about a pod's network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodNetworkSpec {
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// Bits per second, for the `bandwidth` capability.
    pub ingress_rate: Option<u64>,
    /// Bits per second, for the `bandwidth` capability.
    pub egress_rate: Option<u64>,
    /// CNI_ARGS, e.g. K8S_POD_NAME.
    pub args: BTreeMap<String, String>,
    /// For the `cgroupPath` capability.
    pub cgroup_path: Option<String>,
}

/// A port of the host that leads to the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortMapping {
    /// On the host.
    pub host_port: u16,
    /// In the pod.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// Host address to listen on; `None`: all.
    pub host_ip: Option<IpAddr>,
}

/// A network that has been set up.
#[derive(Debug)]
pub struct PodNetwork {
    /// The pinned namespace.
    pub netns: PathBuf,
    /// What the guest shall have, in order; never loopback.
    pub interfaces: Vec<GuestInterface>,
    /// Routes of the guest.
    pub routes: Vec<GuestRoute>,
    /// Permanent neighbours of the guest.
    pub neighbours: Vec<GuestNeighbour>,
    /// DNS of the CNI result.
    pub dns: Dns,
    /// Pod addresses in the order of the CNI result.
    pub ips: Vec<IpAddr>,
}

/// An interface of the guest and the tap behind it.
#[derive(Debug)]
pub struct GuestInterface {
    /// Name in the namespace and in the guest, e.g. eth0.
    pub name: String,
    /// The guest's hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
    /// With prefix length.
    pub addresses: Vec<IpNet>,
    /// Open tap (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR), one descriptor for each queue pair.
    pub tap: Vec<OwnedFd>,
}

/// A route of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRoute {
    /// Network.
    pub destination: IpNet,
    /// `None`: on link.
    pub gateway: Option<IpAddr>,
    /// [`GuestInterface::name`].
    pub interface: String,
    /// Bytes.
    pub mtu: Option<u32>,
    /// Metric.
    pub priority: Option<u32>,
    /// RT_SCOPE_*.
    pub scope: Option<u8>,
}

/// A permanent neighbour of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestNeighbour {
    /// Address.
    pub address: IpAddr,
    /// Hardware address.
    pub mac: [u8; 6],
    /// [`GuestInterface::name`].
    pub interface: String,
}

/// DNS as a CNI result states it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Servers.
    pub servers: Vec<String>,
    /// Search list.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Network {
    /// A network with this configuration; nothing is touched yet.
    #[must_use]
    pub fn new(config: NetworkConfig) -> Self {
        Self {
            config: Arc::new(config),
        }
    }
    /// Whether a pod could get a network now: configuration loads, plugins are there, STATUS (CNI 1.1) is fine. The error is the reason.
    pub async fn status(&self) -> Result<(), NetError> {
        self.check().await
    }
    /// Makes namespace, CNI interfaces and taps for pod `id`. On error everything is undone (DEL included), except that a namespace
    /// which was there before stays. Dropping the future kills the plugin that runs; [`Network::teardown`] then undoes the rest.
    pub async fn setup(&self, id: &str, spec: &PodNetworkSpec) -> Result<PodNetwork, NetError> {
        self.attach(id, spec).await
    }
    /// Takes everything of pod `id` down: taps, CNI DEL with the cached result, namespace. Idempotent, works when the namespace or
    /// the cache is already gone; goes on after failures and answers all of them together.
    pub async fn teardown(&self, id: &str, spec: &PodNetworkSpec) -> Result<(), NetError> {
        self.detach(id, spec).await
    }
}
