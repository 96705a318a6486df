//! Plugins of the Node Resource Interface in the life of pods: what `caisson-nri` serves, joined to the pods of this node.
//!
//! Says in NRI's words what there is (`describe`), has wishes granted (`translate::adjusted`), and stands as the hooks of every pod. Which event
//! goes to whom, and what two plugins' wishes come to, is decided in `caisson-nri`; when a pod's hooks are called, in `caisson-sandbox`.

mod describe;

use std::{
    os::unix::net::UnixListener,
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use caisson_cri_api::v1;
use caisson_nri::{
    Node, Nri, NriError, Serving, Settings,
    v1alpha1::{Container, ContainerEviction, ContainerUpdate, PodSandbox},
};
use caisson_sandbox::{
    Sandboxes,
    hooks::{HookError, Moment, PodHooks, Ticket},
    limits::LimitChange,
    spec::ContainerSpec,
    view::{ContainerState, ContainerView, SandboxView},
};

use crate::{
    outcome::unbroken,
    status::{RpcError, chain},
    translate::{self, Refusals, nri_limits},
};

/// Plugins, and the pods that they are told of.
#[derive(Clone)]
pub struct Plugins {
    nri: Arc<Nri>,
    pods: Arc<Pods>,
}

/// The pods of this node, known once they are open.
#[derive(Default)]
struct Pods {
    sandboxes: Mutex<Option<Sandboxes>>,
}

impl Pods {
    fn sandboxes(&self) -> Option<Sandboxes> {
        self.sandboxes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl Plugins {
    /// No plugins yet, and no pods: [`Plugins::serve`] joins them.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let pods = Arc::<Pods>::default();
        Self {
            nri: Nri::new(settings, pods.clone()),
            pods,
        }
    }

    /// As pods know it.
    #[must_use]
    pub fn hooks(&self) -> Arc<dyn PodHooks> {
        Arc::new(self.clone())
    }

    /// Starts what is installed and takes what connects to `listener`, which does not block.
    pub async fn serve(
        &self,
        sandboxes: Sandboxes,
        listener: Option<UnixListener>,
    ) -> Result<Serving, NriError> {
        *self.pods.sandboxes.lock().unwrap_or_else(PoisonError::into_inner) = Some(sandboxes);
        self.nri.serve(listener).await
    }

    /// Takes leave of all plugins.
    pub async fn close(&self) {
        self.nri.close().await;
        *self.pods.sandboxes.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What a client's change of limits comes to when plugins have had their say.
    pub async fn update_container(
        &self,
        sandboxes: &Sandboxes,
        container: &str,
        asked: v1::LinuxContainerResources,
    ) -> Result<v1::LinuxContainerResources, RpcError> {
        let (pod, container) = described(sandboxes, container).await?;
        let wanted = nri_limits::from_cri(&asked);
        let nri = self.nri.clone();
        let changed = whole(async move { nri.update_container(&pod, &container, wanted).await }).await??;
        let Some(changed) = changed else {
            return Ok(asked);
        };
        let mut refusals = Refusals::default();
        let changed = nri_limits::to_cri(&changed, "update.linux.resources", &mut refusals);
        let changed = v1::LinuxContainerResources {
            // Which plugins do not know.
            oom_score_adj: asked.oom_score_adj,
            ..changed
        };
        Ok(refusals.settle(changed)?)
    }

    /// Tells that limits of a container have changed.
    pub async fn container_updated(&self, sandboxes: &Sandboxes, container: &str) {
        // Removed meanwhile: its removal is told.
        if let Ok((pod, container)) = described(sandboxes, container).await {
            self.nri.post_update_container(&pod, &container).await;
        }
    }

    /// Tells that limits of a pod are about to change.
    pub async fn update_pod(
        &self,
        sandboxes: &Sandboxes,
        request: &v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<(), RpcError> {
        let pod = describe::pod(&sandboxes.status(&request.pod_sandbox_id).await?);
        let overhead = request.overhead.as_ref().map(nri_limits::from_cri);
        let resources = request.resources.as_ref().map(nri_limits::from_cri);
        Ok(self.nri.update_pod_sandbox(&pod, overhead, resources).await?)
    }

    /// Tells that limits of a pod have changed.
    pub async fn pod_updated(&self, sandboxes: &Sandboxes, pod: &str) {
        if let Ok(view) = sandboxes.status(pod).await {
            self.nri.post_update_pod_sandbox(&describe::pod(&view)).await;
        }
    }
}

async fn described(sandboxes: &Sandboxes, container: &str) -> Result<(PodSandbox, Container), RpcError> {
    let container = sandboxes.container_status(container).await?;
    let pod = sandboxes.status(&container.sandbox_id.0).await?;
    Ok((describe::pod(&pod), describe::container(&container)))
}

/// Half an event is none.
async fn whole<T: Send + 'static>(call: impl Future<Output = T> + Send + 'static) -> Result<T, RpcError> {
    unbroken("tell NRI plugins", call).await
}

#[async_trait]
impl Node for Pods {
    async fn inventory(&self) -> (Vec<PodSandbox>, Vec<Container>) {
        let Some(sandboxes) = self.sandboxes() else {
            return (Vec::new(), Vec::new());
        };
        let pods = sandboxes.list().await;
        let containers = sandboxes.list_containers().await;
        // As the reference: who has ended takes no part any more.
        let lives = |container: &&ContainerView| {
            matches!(
                container.state,
                ContainerState::Created | ContainerState::Running { .. }
            )
        };
        (
            pods.iter().map(describe::pod).collect(),
            containers.iter().filter(lives).map(describe::container).collect(),
        )
    }

    async fn update(&self, update: &ContainerUpdate) -> Result<(), String> {
        let Some(sandboxes) = self.sandboxes() else {
            return Err("the daemon is not ready yet, or no longer".into());
        };
        let mut refusals = Refusals::default();
        let wanted = update
            .linux
            .as_ref()
            .and_then(|linux| linux.resources.clone())
            .unwrap_or_default();
        let change = nri_limits::change(&wanted, "update.linux.resources", &mut refusals);
        let change = refusals.settle(change).map_err(|refusals| refusals.to_string())?;
        if change == LimitChange::default() {
            return Ok(());
        }
        sandboxes
            .update_container(&update.container_id, change)
            .await
            .map_err(|error| error.chain())
    }

    fn evict(&self, eviction: &ContainerEviction) {
        let (sandboxes, id) = (self.sandboxes(), eviction.container_id.clone());
        // Its end is told to plugins, which may be what waits for this answer.
        tokio::spawn(async move {
            let Some(sandboxes) = sandboxes else { return };
            if let Err(error) = sandboxes.stop_container(&id, std::time::Duration::ZERO).await {
                tracing::warn!(
                    container.id = id,
                    error = error.chain(),
                    "a container could not be evicted"
                );
            }
        });
    }
}

#[async_trait]
impl PodHooks for Plugins {
    async fn run_pod(&self, pod: &SandboxView) -> Result<Ticket, HookError> {
        let (nri, pod) = (self.nri.clone(), describe::pod(pod));
        let ticket = whole(async move { nri.run_pod_sandbox(&pod).await }).await??;
        Ok(Ticket::holding(ticket))
    }

    async fn stop_pod(&self, pod: &SandboxView, containers: &[ContainerView]) {
        let (nri, pod, containers) = (self.nri.clone(), describe::pod(pod), ended(containers));
        note(whole(async move { nri.stop_pod_sandbox(&pod, &containers).await }).await);
    }

    async fn remove_pod(&self, pod: &SandboxView, containers: &[ContainerView]) -> Ticket {
        let (nri, pod, containers) = (self.nri.clone(), describe::pod(pod), ended(containers));
        let ticket = whole(async move { nri.remove_pod_sandbox(&pod, &containers).await }).await;
        note(ticket).map(Ticket::holding).unwrap_or_default()
    }

    async fn create_container(
        &self,
        pod: &SandboxView,
        container: &ContainerView,
    ) -> Result<(ContainerSpec, Ticket), HookError> {
        let (nri, pod, told) = (
            self.nri.clone(),
            describe::pod(pod),
            describe::new_container(container),
        );
        let spec = container.spec.clone();
        let adjusted = whole(async move {
            let created = nri.create_container(&pod, told.clone()).await?;
            let wanted = created.adjust;
            // Mounts are looked at on the host, where a dead NFS server may hold a thread.
            let adjusted = tokio::task::spawn_blocking(move || translate::adjusted(spec, &wanted)).await;
            match adjusted {
                Ok(Ok(spec)) => Ok((spec, Ticket::holding(created.ticket))),
                refused => {
                    // The next call takes a ticket of its own.
                    drop(created.ticket);
                    drop(nri.remove_container(&pod, &told).await);
                    Err(match refused {
                        Ok(Err(refusals)) => Box::new(Refused(refusals)) as HookError,
                        _ => Box::new(RpcError::TaskLost("read what NRI plugins want")),
                    })
                }
            }
        });
        adjusted.await?
    }

    async fn container(
        &self,
        moment: Moment,
        pod: &SandboxView,
        container: &ContainerView,
    ) -> Result<(), HookError> {
        let (nri, pod, container) = (
            self.nri.clone(),
            describe::pod(pod),
            describe::container(container),
        );
        let told = whole(async move {
            match moment {
                Moment::Created => nri.post_create_container(&pod, &container).await,
                Moment::Starting => nri.start_container(&pod, &container).await?,
                Moment::Started => nri.post_start_container(&pod, &container).await,
                Moment::Ended => nri.stop_container(&pod, &container).await,
            }
            Ok::<_, NriError>(())
        });
        Ok(told.await??)
    }

    async fn remove_container(&self, pod: &SandboxView, container: &ContainerView) -> Ticket {
        let (nri, pod, container) = (
            self.nri.clone(),
            describe::pod(pod),
            describe::container(container),
        );
        let ticket = whole(async move { nri.remove_container(&pod, &container).await }).await;
        note(ticket).map(Ticket::holding).unwrap_or_default()
    }
}

/// A wish of NRI plugins that cannot be granted.
#[derive(Debug, thiserror::Error)]
#[error("NRI plugins want what cannot be had: {0}")]
struct Refused(Refusals);

fn ended(containers: &[ContainerView]) -> Vec<Container> {
    containers.iter().map(describe::container).collect()
}

fn note<T>(result: Result<T, RpcError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::error!(error = chain(&error), "NRI plugins were not told");
            None
        }
    }
}
