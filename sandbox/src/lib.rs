//! Pods as microVMs: one actor per pod, its journal, its recovery.
//!
//! Owns what happens to a pod between the CRI call and the guest: identity and name reservation, the order of network, VM and agent,
//! undo, stop, and what is remembered on disk. Must not know CRI types, gRPC servers, how images are fetched, which hypervisor runs
//! (it has the port), or how CNI is called (it has `caisson-net`).

mod actor;
mod announce;
mod apparmor;
mod boot;
mod cgroup;
mod charged;
mod console;
mod container;
mod containers;
pub mod cpuset;
mod disks;
mod entry;
mod error;
pub mod events;
mod files;
mod grow;
pub mod hooks;
mod identity;
mod journal;
pub mod limits;
mod networks;
mod pinning;
mod reach;
mod recovery;
mod registry;
mod scratch;
pub mod spec;
pub mod streams;
mod undo;
mod update;
pub mod usage;
pub mod view;
pub(crate) mod volumes;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_hypervisor::Hypervisor;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use actor::{Actor, Inbox};
use cgroup::Cgroups;
use journal::{Journal, PodPhase, PodRecord};
use registry::{Handle, Node, Outcome, Registry, Reply, Request, Terminate};

pub use caisson_agent_api::{capabilities, v1 as guest};
pub use caisson_apparmor::Settings as AppArmorSettings;
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
    /// Memory that a VM may grow to, MiB; 0: as much as the host has.
    pub max_memory_mib: u64,
    /// vCPUs that a VM may grow to; 0: those that it was booted with.
    pub max_vcpus: u32,
    /// Memory that guest kernel and agent need beyond the containers' limits, MiB.
    pub guest_overhead_mib: u64,
    /// Memory of the pod's cgroup that is kept for the VMM and its helpers, MiB.
    pub host_reserve_mib: u64,
    /// Size of each pod's writable disk (sparse), bytes.
    pub scratch_bytes: u64,
    /// The helper that serves shared volumes.
    pub file_server: PathBuf,
    /// Size of the disk that an emptyDir gets (sparse), bytes.
    pub empty_dir_bytes: u64,
    /// Where AppArmor profiles of the host are.
    pub apparmor: AppArmorSettings,
    /// How many images and other disks may be attached to one VM.
    pub attach_slots: u32,
    /// From RunPodSandbox to an answering agent, at most.
    pub boot_deadline: Duration,
    /// For each call to the agent.
    pub agent_deadline: Duration,
}

fn host_memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(info.mem_unit.into()) >> 20
}

/// Images whose disks containers use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagesInUse {
    /// Ids, sorted.
    pub ids: Vec<String>,
    /// False when there may be others: a record that cannot be read does not say which.
    pub complete: bool,
}

/// All pods of this node. Cheap to clone; methods only message actors, so dropping a returned future loses nothing.
#[derive(Clone)]
pub struct Sandboxes {
    inner: Arc<Inner>,
}

struct Inner {
    node: Arc<Node>,
    registry: Arc<Registry>,
    rates: usage::Rates,
    /// Ended with the last clone; VMs go on.
    actors: Mutex<JoinSet<()>>,
}

impl Sandboxes {
    /// Reads the journal, adopts what still runs, cleans up what does not, and starts serving.
    pub async fn open(
        config: SandboxesConfig,
        hypervisor: Arc<dyn Hypervisor>,
        network: Arc<dyn PodNetworks>,
    ) -> Result<Self, SandboxError> {
        Self::open_with_hooks(config, hypervisor, network, Arc::new(hooks::NoHooks)).await
    }

    /// The same, with somebody who has a say in what happens to pods.
    pub async fn open_with_hooks(
        config: SandboxesConfig,
        hypervisor: Arc<dyn Hypervisor>,
        network: Arc<dyn PodNetworks>,
        hooks: Arc<dyn hooks::PodHooks>,
    ) -> Result<Self, SandboxError> {
        let (root, run) = (config.root.clone(), config.run.clone());
        let (journal, cgroups) = journal::blocking(move || {
            journal::private_dir(&run.join("vm"))?;
            scratch::sweep(&root)?;
            Ok((Journal::open(&root)?, Cgroups::detect()))
        })
        .await?;
        let host_cpus =
            std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX));
        let node = Arc::new(Node {
            profiles: Arc::new(caisson_apparmor::Profiles::new(config.apparmor.clone())),
            config,
            hypervisor,
            network,
            hooks,
            journal,
            cgroups,
            listeners: events::Listeners::default(),
            host_cpus,
            host_memory_mib: host_memory_mib(),
            template_lane: tokio::sync::Mutex::default(),
            watcher: Arc::default(),
            closing: watch::Sender::new(false),
        });
        let inner = Inner {
            node,
            registry: Arc::default(),
            rates: usage::Rates::default(),
            actors: Mutex::default(),
        };
        for (actor, inbox) in recovery::recover(&inner.node, &inner.registry).await? {
            inner.serve(actor, inbox);
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Stops serving, in an order that leaves nothing half written. VMs and containers go on; a boot that goes on is rolled back by the
    /// next [`Sandboxes::open`]. Every later call finds no pods.
    pub async fn close(&self) {
        self.inner.node.closing.send_replace(true);
        self.inner.registry.clear();
        let mut actors =
            std::mem::take(&mut *self.inner.actors.lock().unwrap_or_else(PoisonError::into_inner));
        while actors.join_next().await.is_some() {}
        self.inner.node.listeners.close();
    }

    /// Runs a pod. A retry with the same identity joins the call in progress; a pod of the same identity that is ready is answered as it is.
    pub async fn run(&self, spec: spec::PodSpec) -> Result<SandboxId, SandboxError> {
        if self.closing() {
            return Err(SandboxError::Gone(spec.identity.name));
        }
        let identity = spec.identity.clone();
        let (id, handle) = self.inner.registry.reserve(&identity, || self.inner.boot(spec));
        let mut outcome = handle.outcome.clone();
        let joined = matches!(*outcome.borrow(), Outcome::Pending);
        let end = match outcome
            .wait_for(|outcome| !matches!(outcome, Outcome::Pending))
            .await
        {
            Ok(end) => end.clone(),
            Err(_) => return Err(SandboxError::Gone(id.0)),
        };
        match end {
            Outcome::Failed(error) if joined => Err(error.into()),
            Outcome::Ready if joined || handle.latest().sandbox.state == view::SandboxState::Ready => Ok(id),
            _ => Err(SandboxError::NameTaken {
                name: format!(
                    "pod sandbox name {}/{} uid {} attempt {}",
                    identity.namespace, identity.name, identity.uid, identity.attempt
                ),
                id: format!("pod sandbox {}, which is not ready", id.0),
            }),
        }
    }

    /// Stops a pod: kills its VM, tears the network down. Idempotent; unknown ids are Ok.
    pub async fn stop(&self, id: &str) -> Result<(), SandboxError> {
        self.terminate(id, Terminate::Stop).await
    }

    /// Removes a pod and its containers (stopping it first). Idempotent; unknown ids are Ok.
    pub async fn remove(&self, id: &str) -> Result<(), SandboxError> {
        self.terminate(id, Terminate::Remove).await
    }

    async fn terminate(
        &self,
        id: &str,
        ask: impl FnOnce(Reply<()>) -> Terminate,
    ) -> Result<(), SandboxError> {
        let handle = match self.inner.registry.pod(id) {
            Err(SandboxError::NoSandbox(_)) => return Ok(()),
            other => other?,
        };
        let id = handle.latest().sandbox.id.0.clone();
        let (reply, answer) = oneshot::channel();
        if let Err(mpsc::error::TrySendError::Full(_)) = handle.terminate.try_send(ask(reply)) {
            return Err(SandboxError::Busy(id));
        }
        match answer.await {
            Ok(result) => result,
            Err(_) if self.closing() => Err(SandboxError::Gone(id)),
            // Removed before it read the message.
            Err(_) if self.inner.registry.pod(&id).is_err() => Ok(()),
            Err(_) => Err(SandboxError::Gone(id)),
        }
    }

    /// One pod. `id` may be a unique prefix, here and below.
    pub async fn status(&self, id: &str) -> Result<view::SandboxView, SandboxError> {
        Ok(self.inner.registry.pod(id)?.latest().sandbox.clone())
    }

    /// All pods that RunPodSandbox has answered with, or that an earlier daemon left.
    pub async fn list(&self) -> Vec<view::SandboxView> {
        let latest = self
            .inner
            .registry
            .handles()
            .into_iter()
            .map(|handle| handle.latest());
        latest
            .filter(|latest| latest.listed)
            .map(|latest| latest.sandbox.clone())
            .collect()
    }

    /// Whether there is no pod at all, not even one that boots and is not listed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.inner.registry.handles().is_empty()
    }

    /// Creates a container. A retry with the same name and attempt joins the call in progress.
    pub async fn create_container(
        &self,
        sandbox: &str,
        spec: spec::ContainerSpec,
    ) -> Result<ContainerId, SandboxError> {
        spec.check()?;
        let handle = self.inner.registry.pod(sandbox)?;
        let spec = Box::new(spec);
        self.ask(&handle, "container creation", |reply| Request::Create {
            spec,
            reply,
        })
        .await
    }

    /// Starts a created container.
    pub async fn start_container(&self, id: &str) -> Result<(), SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        self.ask(&handle, "container start", |reply| Request::Start {
            id: view.id,
            reply,
        })
        .await
    }

    /// Sends the stop signal, and SIGKILL after `grace`. Idempotent; unknown ids are Ok.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), SandboxError> {
        let Some((handle, view)) = self.known_container(id)? else {
            return Ok(());
        };
        let id = view.id.clone();
        let result = self
            .ask(&handle, "container stop", |reply| Request::Stop {
                id: view.id,
                grace,
                reply,
            })
            .await;
        match result {
            // The pod's own end was faster.
            Err(SandboxError::Cancelled { .. }) if self.has_ended(&id) => Ok(()),
            other => other,
        }
    }

    /// Removes a container (killing it first). Idempotent; unknown ids are Ok.
    pub async fn remove_container(&self, id: &str) -> Result<(), SandboxError> {
        let Some((handle, view)) = self.known_container(id)? else {
            return Ok(());
        };
        self.ask(&handle, "container removal", |reply| Request::Remove {
            id: view.id,
            reply,
        })
        .await
    }

    /// One container.
    pub async fn container_status(&self, id: &str) -> Result<view::ContainerView, SandboxError> {
        Ok(self.inner.registry.container(id)?.1)
    }

    /// All containers.
    pub async fn list_containers(&self) -> Vec<view::ContainerView> {
        let latest = self
            .inner
            .registry
            .handles()
            .into_iter()
            .map(|handle| handle.latest());
        latest.flat_map(|latest| latest.containers.clone()).collect()
    }

    /// Runs a command in a running container and collects what it prints.
    pub async fn exec_sync(&self, id: &str, exec: spec::ExecSpec) -> Result<spec::ExecOutput, SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        self.ask(&handle, "command", |reply| Request::Exec {
            id: view.id,
            exec,
            reply,
        })
        .await
    }

    /// Closes and opens the container's log file again, after rotation.
    pub async fn reopen_log(&self, id: &str) -> Result<(), SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        self.ask(&handle, "log rotation", |reply| Request::ReopenLog {
            id: view.id,
            reply,
        })
        .await
    }

    /// Changes limits of a container that is created or runs. What the VM cannot hold is refused.
    pub async fn update_container(&self, id: &str, change: limits::LimitChange) -> Result<(), SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        let change = Box::new(change);
        self.ask(&handle, "container update", |reply| Request::Update {
            id: view.id,
            change,
            reply,
        })
        .await
    }

    /// Changes limits of a pod. What its VM cannot hold is refused.
    pub async fn resize(&self, id: &str, change: limits::PodLimitChange) -> Result<(), SandboxError> {
        let handle = self.inner.registry.pod(id)?;
        self.ask(&handle, "resize", |reply| Request::Resize { change, reply })
            .await
    }

    /// Everything that happens to pods and containers from now on.
    pub fn events(&self) -> Result<events::Subscription, SandboxError> {
        if self.closing() {
            return Err(SandboxError::Gone("of this node".into()));
        }
        self.inner.node.listeners.subscribe()
    }

    /// Ends the streams of events, in order. Whoever listens anew until [`Sandboxes::close`] is served.
    pub fn end_events(&self) {
        self.inner.node.listeners.close();
    }

    /// Image disks that containers use, so that image removal keeps them.
    pub async fn images_in_use(&self) -> ImagesInUse {
        let mut all = ImagesInUse {
            ids: Vec::new(),
            complete: true,
        };
        for handle in self.inner.registry.handles() {
            let latest = handle.latest();
            all.ids.extend(latest.images.iter().cloned());
            all.complete &= latest.images_complete;
        }
        all.ids.sort();
        all.ids.dedup();
        all
    }

    fn closing(&self) -> bool {
        *self.inner.node.closing.borrow()
    }

    fn known_container(&self, id: &str) -> Result<Option<(Handle, view::ContainerView)>, SandboxError> {
        match self.inner.registry.container(id) {
            Err(SandboxError::NoContainer(_)) => Ok(None),
            other => other.map(Some),
        }
    }

    fn has_ended(&self, id: &ContainerId) -> bool {
        match self.inner.registry.container(&id.0) {
            Ok((_, view)) => matches!(view.state, view::ContainerState::Exited { .. }),
            Err(_) => true,
        }
    }

    async fn ask<T>(
        &self,
        handle: &Handle,
        what: &str,
        request: impl FnOnce(Reply<T>) -> Request,
    ) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        if let Err(mpsc::error::TrySendError::Full(_)) = handle.requests.try_send(request(reply)) {
            return Err(SandboxError::Busy(handle.latest().sandbox.id.0.clone()));
        }
        match answer.await {
            Ok(result) => result,
            Err(_) if self.closing() => Err(SandboxError::Gone(handle.latest().sandbox.id.0.clone())),
            Err(_) => Err(SandboxError::Cancelled {
                what: format!("{what} in pod sandbox {}", handle.latest().sandbox.id.0),
                why: "the pod sandbox was stopped",
            }),
        }
    }
}

impl Inner {
    fn boot(&self, spec: spec::PodSpec) -> (SandboxId, Handle) {
        let id = SandboxId(new_id());
        // Plugins know a pod by what other runtimes call its infra container; here that is the sandbox.
        let mut spec = spec;
        spec.network
            .args
            .insert("K8S_POD_INFRA_CONTAINER_ID".to_owned(), id.0.clone());
        let record = PodRecord {
            id: id.clone(),
            spec,
            created_at: SystemTime::now(),
            phase: PodPhase::Booting,
            vm: None,
            ips: Vec::new(),
            cgroup: None,
            size: None,
            ceiling: None,
            file_server: None,
            socket_server: None,
            info: serde_json::Value::Null,
        };
        let (actor, inbox, handle) = Actor::new(self.node.clone(), Arc::downgrade(&self.registry), record);
        self.serve(actor, inbox);
        (id, handle)
    }

    fn serve(&self, actor: Actor, inbox: Inbox) {
        use tracing::Instrument;
        let identity = &actor.record.spec.identity;
        // The actor outlives the call that made it, so its lines must not carry that call's span.
        let span = tracing::info_span!(
            parent: None,
            "sandbox",
            sandbox.id = %actor.record.id.0,
            pod.namespace = identity.namespace,
            pod.name = identity.name,
        );
        let mut actors = self.actors.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(ended) = actors.try_join_next() {
            if let Err(error) = ended {
                tracing::error!(%error, "actor of a pod sandbox ended badly");
            }
        }
        actors.spawn(actor.run(inbox).instrument(span));
    }
}

/// 64 hexadecimal digits that nobody can guess and nobody else has.
pub(crate) fn new_id() -> String {
    format!(
        "{}{}",
        uuid::Uuid::new_v4().simple(),
        uuid::Uuid::new_v4().simple()
    )
}
