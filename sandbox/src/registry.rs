//! Which pods there are: names and ids, and the way to each pod's actor.
//!
//! Owns the reservation of names and the resolution of id prefixes. The lock is held for look-ups only. Must not know how an actor
//! works; it holds a mailbox and the latest picture.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use caisson_apparmor::Profiles;
use caisson_guest::GuestClient;
use caisson_hypervisor::Hypervisor;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    ContainerId, PodNetworks, SandboxError, SandboxId, SandboxesConfig,
    cgroup::Cgroups,
    events::Listeners,
    hooks::PodHooks,
    journal::Journal,
    limits::{LimitChange, PodLimitChange},
    spec::{ContainerSpec, ExecOutput, ExecSpec, PodIdentity},
    streams::Reach,
    usage::Readings,
    view::{ContainerView, SandboxState, SandboxView},
    volumes::watch::Watcher,
};

/// What every pod needs of its node.
pub(crate) struct Node {
    pub(crate) config: SandboxesConfig,
    pub(crate) hypervisor: Arc<dyn Hypervisor>,
    pub(crate) network: Arc<dyn PodNetworks>,
    pub(crate) hooks: Arc<dyn PodHooks>,
    pub(crate) journal: Journal,
    pub(crate) cgroups: Cgroups,
    pub(crate) listeners: Listeners,
    pub(crate) host_cpus: u32,
    pub(crate) host_memory_mib: u64,
    /// So that the first pods don't all make the same template.
    pub(crate) template_lane: tokio::sync::Mutex<()>,
    /// For volumes that kubelet changes.
    pub(crate) watcher: Arc<Watcher>,
    /// AppArmor profiles of the host.
    pub(crate) profiles: Arc<Profiles>,
    /// True once the daemon stops serving.
    pub(crate) closing: watch::Sender<bool>,
}

impl Node {
    /// Where the VM of this pod has its sockets. Half the id, since the path of a Unix socket has 107 bytes at most.
    pub(crate) fn run_dir(&self, id: &SandboxId) -> PathBuf {
        self.config.run.join("vm").join(id.0.get(..32).unwrap_or(&id.0))
    }
}

/// Where an answer goes. The caller may be gone.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// What callers ask of a pod, apart from its end.
pub(crate) enum Request {
    Create {
        spec: Box<ContainerSpec>,
        reply: Reply<ContainerId>,
    },
    Start {
        id: ContainerId,
        reply: Reply<()>,
    },
    Stop {
        id: ContainerId,
        grace: Duration,
        reply: Reply<()>,
    },
    Remove {
        id: ContainerId,
        reply: Reply<()>,
    },
    Exec {
        id: ContainerId,
        exec: ExecSpec,
        reply: Reply<ExecOutput>,
    },
    ReopenLog {
        id: ContainerId,
        reply: Reply<()>,
    },
    Update {
        id: ContainerId,
        change: Box<LimitChange>,
        reply: Reply<()>,
    },
    Resize {
        change: PodLimitChange,
        reply: Reply<()>,
    },
    /// What these containers use, or all when none is named.
    Usage {
        ids: Vec<String>,
        limit: Duration,
        reply: Reply<Readings>,
    },
    /// How a running container is reached.
    Reach {
        id: ContainerId,
        reply: Reply<Reach>,
    },
    /// How the pod's guest is reached.
    Guest {
        reply: Reply<GuestClient>,
    },
}

/// A pod's end, which goes before everything else that callers ask.
pub(crate) enum Terminate {
    Stop(Reply<()>),
    Remove(Reply<()>),
}

/// How far RunPodSandbox is.
#[derive(Clone)]
pub(crate) enum Outcome {
    Pending,
    Ready,
    Failed(Arc<SandboxError>),
}

/// A pod and its containers as they are now.
pub(crate) struct Snapshot {
    pub(crate) sandbox: SandboxView,
    /// False while it boots: callers don't know the id yet.
    pub(crate) listed: bool,
    pub(crate) containers: Vec<ContainerView>,
    /// Ids of images in use, also by containers that are being made.
    pub(crate) images: Vec<String>,
    /// False when there may be more, which only a record knows that cannot be read.
    pub(crate) images_complete: bool,
}

impl Snapshot {
    /// Whether a guest can be asked.
    pub(crate) fn runs(&self) -> bool {
        self.sandbox.state == SandboxState::Ready
    }
}

/// The way to a pod's actor.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) requests: mpsc::Sender<Request>,
    pub(crate) terminate: mpsc::Sender<Terminate>,
    pub(crate) snapshot: watch::Receiver<Arc<Snapshot>>,
    pub(crate) outcome: watch::Receiver<Outcome>,
}

impl Handle {
    pub(crate) fn latest(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }
}

/// All pods of this node.
#[derive(Default)]
pub(crate) struct Registry {
    tables: Mutex<Tables>,
}

#[derive(Default)]
struct Tables {
    pods: BTreeMap<String, Handle>,
    names: HashMap<PodIdentity, SandboxId>,
}

impl Registry {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Nothing between lock and unlock leaves the tables half changed.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod that has this name, or the one that `make` makes now.
    pub(crate) fn reserve(
        &self,
        identity: &PodIdentity,
        make: impl FnOnce() -> (SandboxId, Handle),
    ) -> (SandboxId, Handle) {
        let mut tables = self.tables();
        if let Some(id) = tables.names.get(identity)
            && let Some(handle) = tables.pods.get(&id.0)
        {
            return (id.clone(), handle.clone());
        }
        let (id, handle) = make();
        tables.names.insert(identity.clone(), id.clone());
        tables.pods.insert(id.0.clone(), handle.clone());
        (id, handle)
    }

    /// Enters a pod of an earlier daemon. Its name is reserved unless it is `None` or taken.
    pub(crate) fn adopt(&self, id: &SandboxId, identity: Option<&PodIdentity>, handle: Handle) {
        let mut tables = self.tables();
        tables.pods.insert(id.0.clone(), handle);
        if let Some(identity) = identity {
            tables.names.entry(identity.clone()).or_insert_with(|| id.clone());
        }
    }

    pub(crate) fn forget(&self, id: &SandboxId) {
        let mut tables = self.tables();
        tables.pods.remove(&id.0);
        tables.names.retain(|_, owner| owner != id);
    }

    /// Drops every handle, so that actors end.
    pub(crate) fn clear(&self) {
        let tables = std::mem::take(&mut *self.tables());
        drop(tables);
    }

    pub(crate) fn handles(&self) -> Vec<Handle> {
        self.tables().pods.values().cloned().collect()
    }

    /// The pod with this id or unique prefix.
    pub(crate) fn pod(&self, id: &str) -> Result<Handle, SandboxError> {
        let tables = self.tables();
        if let Some(handle) = tables.pods.get(id) {
            return Ok(handle.clone());
        }
        let found = unique(
            id,
            tables
                .pods
                .range(id.to_owned()..)
                .take_while(|(full, _)| full.starts_with(id))
                .map(|(_, handle)| handle),
        )?;
        found
            .cloned()
            .ok_or_else(|| SandboxError::NoSandbox(id.to_owned()))
    }

    /// The container with this id or unique prefix, and its pod.
    pub(crate) fn container(&self, id: &str) -> Result<(Handle, ContainerView), SandboxError> {
        let mut prefixed = Vec::new();
        for handle in self.handles() {
            for view in &handle.latest().containers {
                if view.id.0 == id {
                    return Ok((handle, view.clone()));
                }
                if view.id.0.starts_with(id) {
                    prefixed.push((handle.clone(), view.clone()));
                }
            }
        }
        unique(id, prefixed.into_iter())?.ok_or_else(|| SandboxError::NoContainer(id.to_owned()))
    }
}

fn unique<T>(id: &str, mut found: impl Iterator<Item = T>) -> Result<Option<T>, SandboxError> {
    if id.is_empty() {
        return Err(SandboxError::Invalid {
            what: "id".into(),
            reason: "it is empty".into(),
        });
    }
    let first = found.next();
    match found.next() {
        Some(_) => Err(SandboxError::Ambiguous(id.to_owned())),
        None => Ok(first),
    }
}
