//! What callers ask for: pods and containers in the words of this domain. CRI types stop before here.

use std::{
    collections::BTreeMap,
    path::{Component, Path, PathBuf},
};

use caisson_agent_api::v1 as guest;
use caisson_net::PodNetworkSpec;
use serde::{Deserialize, Serialize};

use crate::{SandboxError, cpuset::Cpuset};

/// A pod to run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PodSpec {
    /// Kubernetes name, namespace and uid, and how often kubelet has tried.
    pub identity: PodIdentity,
    /// Runtime handler as asked for; empty is the default.
    pub handler: String,
    /// Kept and answered as they are.
    pub labels: BTreeMap<String, String>,
    /// Kept and answered as they are.
    pub annotations: BTreeMap<String, String>,
    /// Host name in the guest.
    pub hostname: String,
    /// Directory for container logs; empty when containers shall not be logged.
    pub log_directory: PathBuf,
    /// resolv.conf as kubelet wants it; `None` takes the CNI result's, else the host's.
    pub dns: Option<guest::DnsConfig>,
    /// Port mappings and bandwidth for the CNI plugins.
    pub network: PodNetworkSpec,
    /// Kernel parameters of the pod.
    pub sysctls: BTreeMap<String, String>,
    /// All containers share one PID namespace (CRI NamespaceMode POD for pid).
    pub share_pid_namespace: bool,
    /// Containers run in the guest's own PID namespace (CRI NamespaceMode NODE for pid): a VM's host is its guest.
    #[serde(default)]
    pub guest_pid_namespace: bool,
    /// The user namespace of all containers; `None`: the guest's own.
    #[serde(default)]
    pub user_namespace: Option<guest::UserNamespace>,
    /// cgroup that kubelet made for the pod; `None` or a host without cgroup v2: limits are not enforced on the VM.
    pub cgroup_parent: Option<String>,
    /// Sum of the containers' limits as known when the pod starts.
    pub limits: PodLimits,
    /// CPUs and memory nodes of the host for the VM, besides those of its containers.
    #[serde(default)]
    pub cpuset: Cpuset,
}

impl PodSpec {
    /// A pod of which nothing but a name is known.
    pub(crate) fn unknown(identity: PodIdentity) -> Self {
        Self {
            identity,
            handler: String::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            hostname: String::new(),
            log_directory: PathBuf::new(),
            dns: None,
            network: PodNetworkSpec::default(),
            sysctls: BTreeMap::new(),
            share_pid_namespace: false,
            guest_pid_namespace: false,
            user_namespace: None,
            cgroup_parent: None,
            limits: PodLimits::default(),
            cpuset: Cpuset::default(),
        }
    }
}

/// Whose pod this is. Unique among pods that are not removed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PodIdentity {
    /// Pod name.
    pub name: String,
    /// Pod namespace.
    pub namespace: String,
    /// Pod uid.
    pub uid: String,
    /// Attempt.
    pub attempt: u32,
}

/// Limits that size the VM (design: "VM size follows the pod"). `None`: no container has such a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodLimits {
    /// Thousandths of a CPU.
    pub cpu_milli: Option<u64>,
    /// Bytes.
    pub memory_bytes: Option<u64>,
}

/// A container to create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerSpec {
    /// Name in its pod.
    pub name: String,
    /// How often kubelet has tried.
    pub attempt: u32,
    /// Kept and answered as they are.
    pub labels: BTreeMap<String, String>,
    /// Kept and answered as they are.
    pub annotations: BTreeMap<String, String>,
    /// The image to run.
    pub image: ContainerImage,
    /// What the guest runs; ids of volumes and disk serials are filled in by this room: leave `image_serial` empty, and put pushed
    /// files into `files`.
    pub guest: guest::ContainerSpec,
    /// Host files that are copied into the guest at creation.
    pub files: Vec<PushedFiles>,
    /// What else is mounted from the host.
    #[serde(default)]
    pub volumes: Vec<HostVolume>,
    /// Block devices of the host.
    #[serde(default)]
    pub disks: Vec<HostDisk>,
    /// Host file that receives the termination message before the container is seen to be exited.
    pub termination_file: Option<PathBuf>,
    /// Log file relative to the pod's log directory; `None`: output is drained and dropped.
    pub log_path: Option<PathBuf>,
    /// What StopContainer sends first; a number of signal(7).
    pub stop_signal: u32,
    /// CPUs and memory nodes of the host; the guest does not see them.
    #[serde(default)]
    pub cpuset: Cpuset,
    /// Images that are mounted besides.
    #[serde(default)]
    pub image_volumes: Vec<ImageVolume>,
    /// Mounts as the caller asked for them, answered in the container's status.
    pub mounts: Vec<MountRecord>,
}

impl ContainerSpec {
    /// A container of which nothing but a name is known.
    #[cfg(test)]
    pub(crate) fn unknown(name: String) -> Self {
        Self {
            name,
            attempt: 0,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            image: ContainerImage {
                id: String::new(),
                user_reference: String::new(),
                reference: String::new(),
                disk: Vec::new(),
            },
            guest: guest::ContainerSpec::default(),
            files: Vec::new(),
            volumes: Vec::new(),
            disks: Vec::new(),
            termination_file: None,
            log_path: None,
            stop_signal: 15,
            cpuset: Cpuset::default(),
            image_volumes: Vec::new(),
            mounts: Vec::new(),
        }
    }

    /// Absolute path of the log file; `None` when the container is not logged.
    pub(crate) fn log_file(&self, log_directory: &Path) -> Option<PathBuf> {
        let file = self.log_path.as_ref()?;
        (!log_directory.as_os_str().is_empty() && !file.as_os_str().is_empty())
            .then(|| log_directory.join(file))
    }

    /// What no caller may ask.
    pub(crate) fn check(&self) -> Result<(), SandboxError> {
        let plain = |path: &Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        if let Some(path) = self.log_path.as_deref().filter(|path| !plain(path)) {
            return Err(SandboxError::Invalid {
                what: format!("log_path {:?}", path.display()),
                reason: "it is not a plain path below the pod's log directory".into(),
            });
        }
        let pushed = self.files.iter().map(|file| &file.container_path);
        let mounted = self.volumes.iter().map(|volume| &volume.container_path);
        let nodes = self.disks.iter().map(|disk| &disk.container_path);
        if let Some(path) = pushed
            .chain(mounted)
            .chain(nodes)
            .find(|path| !path.starts_with('/'))
        {
            return Err(SandboxError::Invalid {
                what: format!("container_path {path:?}"),
                reason: "it is not absolute".into(),
            });
        }
        Ok(())
    }
}

/// Records of older versions have one file for each image.
fn one_or_several<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<PathBuf>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Files {
        One(PathBuf),
        Several(Vec<PathBuf>),
    }
    Ok(match Files::deserialize(from)? {
        Files::One(path) => vec![path],
        Files::Several(paths) => paths,
    })
}

/// An image, as much of it as a container needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerImage {
    /// Config digest, `sha256:...`.
    pub id: String,
    /// As the user named it.
    pub user_reference: String,
    /// A `repo@digest` or the id.
    pub reference: String,
    /// Files that make its disk, one behind the other, attached read-only.
    #[serde(deserialize_with = "one_or_several")]
    pub disk: Vec<PathBuf>,
}

/// A host file or small directory, copied into guest memory and bind-mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PushedFiles {
    /// File or directory on the host.
    pub host_path: PathBuf,
    /// Absolute, in the container.
    pub container_path: String,
    /// The guest's mount is read-only.
    pub readonly: bool,
}

/// A path of the host that a container has mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostVolume {
    /// Absolute, on the host; symbolic links are followed.
    pub host_path: PathBuf,
    /// Absolute, in the container.
    pub container_path: String,
    /// Nothing can be written to what is at the path itself.
    pub readonly: bool,
    /// Nor to what is mounted below it.
    pub recursive_readonly: bool,
    /// Whether what is mounted below it on the host later appears.
    pub propagation: Propagation,
}

/// A block device of the host that a container has as one of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDisk {
    /// The device node on the host; symbolic links are followed.
    pub host_path: PathBuf,
    /// Of the node in the container, absolute.
    pub container_path: String,
    /// It cannot be written to.
    pub readonly: bool,
}

/// How later mounts travel between a container and what it has mounted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Propagation {
    /// Not at all.
    #[default]
    Private,
    /// They appear (rslave, Kubernetes' HostToContainer).
    Slave,
    /// And the container's own appear to the pod's other containers (rshared, Bidirectional); never on the host.
    Shared,
}

/// A mount as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Host path.
    pub host_path: String,
    /// Path in the container.
    pub container_path: String,
    /// Read-only.
    pub readonly: bool,
    /// Read-only also where something is mounted below.
    #[serde(default)]
    pub recursive_readonly: bool,
    /// How later mounts travel.
    #[serde(default)]
    pub propagation: Propagation,
    /// What is mounted, when it is no path of the host's.
    #[serde(default)]
    pub image: Option<MountedImage>,
}

/// An image in a mount, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountedImage {
    /// Name, digest or id.
    pub image: String,
    /// As the user named it.
    pub user_specified: String,
    /// Below the image's root.
    pub sub_path: String,
}

/// An image, or a directory or file of it, mounted read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageVolume {
    /// Config digest, `sha256:...`.
    pub image_id: String,
    /// Files that make its disk, one behind the other, attached read-only.
    #[serde(deserialize_with = "one_or_several")]
    pub disk: Vec<PathBuf>,
    /// Absolute, in the container.
    pub container_path: String,
    /// Relative to the image's root; empty: all of it.
    pub sub_path: String,
}

/// A command to run in a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSpec {
    /// argv.
    pub args: Vec<Vec<u8>>,
    /// No deadline when `None`.
    pub timeout: Option<std::time::Duration>,
}

/// Which streams a caller wants to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamSpec {
    /// Bytes for the process.
    pub stdin: bool,
    /// Standard output, or everything that a terminal shows.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// On a terminal of its own. Attaching takes what the container has.
    pub terminal: bool,
}

/// What a command has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutput {
    /// 0-255; 128 + signal when killed by one.
    pub exit_code: i32,
    /// At most [`crate::EXEC_OUTPUT_LIMIT`] bytes.
    pub stdout: Vec<u8>,
    /// At most [`crate::EXEC_OUTPUT_LIMIT`] bytes.
    pub stderr: Vec<u8>,
}
