//! Who is told what, in which order.
//!
//! Plugins are called one after the other, in the order of their indexes, and one event at a time for the whole node, as the reference
//! does. A plugin that fails an event ends it, and with it the call that it is about, where the caller lets it; a plugin that does not
//! answer is disconnected, and the event goes on. Each end is told once.
//!
//! A plugin that comes later is told of everything there is, and is in the order from then on. So that nothing falls between the two,
//! whoever makes or removes something holds a [`Ticket`] from the event until it is listed, or no longer listed; admission waits for that.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use tokio::sync::{Mutex, MutexGuard, OwnedRwLockReadGuard, RwLock};

use crate::{
    Node, NriError, Settings,
    error::JoinError,
    merge::{Creation, Update},
    plugin::{Plugin, apply_updates},
    told::Told,
    v1alpha1::{
        Container, ContainerAdjustment, ContainerEviction, ContainerRequest, ContainerState, ContainerUpdate,
        CreateContainerResponse, Empty, Event, LinuxResources, PluginInstance, PodSandbox,
        StopContainerResponse, UpdateContainerRequest, UpdateContainerResponse, UpdatePodSandboxRequest,
        ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
    },
};

/// Plugins that are served at a time.
const MAX_PLUGINS: usize = 64;

/// Keeps new plugins waiting while something is told of that is not listed yet, or no longer. Dropped when the list is true again.
#[must_use]
pub struct Ticket {
    _guard: OwnedRwLockReadGuard<()>,
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket")
    }
}

/// What plugins made of a creation.
#[derive(Debug)]
pub struct Created {
    /// What they ask for, all together.
    pub adjust: ContainerAdjustment,
    /// To be held until the container is listed, or will never be.
    pub ticket: Ticket,
}

/// All plugins.
pub struct Nri {
    pub(crate) settings: Settings,
    pub(crate) node: Arc<dyn Node>,
    state: Mutex<State>,
    listed: Arc<RwLock<()>>,
    /// Plugins that are connected or about to be.
    places: AtomicUsize,
}

#[derive(Default)]
struct State {
    /// In the order of their calls.
    plugins: Vec<Arc<Plugin>>,
    told: Told,
    closing: bool,
}

/// One of the places for plugins.
pub(crate) struct Place {
    nri: Arc<Nri>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.nri.places.fetch_sub(1, Ordering::Relaxed);
    }
}

impl State {
    fn sweep(&mut self) {
        self.plugins.retain(|plugin| {
            if plugin.is_closed() {
                tracing::info!(plugin = %plugin.identity, "NRI plugin is gone");
            }
            !plugin.is_closed()
        });
    }

    async fn tell_pod(&self, event: Event, pod: &PodSandbox) -> Result<(), NriError> {
        for plugin in &self.plugins {
            plugin.tell_pod(event, pod).await?;
        }
        Ok(())
    }

    async fn tell_container(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<(), NriError> {
        for plugin in &self.plugins {
            plugin.tell_container(event, pod, container).await?;
        }
        Ok(())
    }

    /// Tells the end of a container, unless it was told; what plugins want to be updated comes back.
    async fn stop_container(
        &mut self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Vec<ContainerUpdate>, NriError> {
        if !self.told.stop(&container.id) {
            return Ok(Vec::new());
        }
        let request = ContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
        };
        let mut merged = Update::new(&container.id, LinuxResources::default());
        for plugin in &self.plugins {
            let answer: Option<StopContainerResponse> = plugin.ask(Event::StopContainer, &request).await?;
            let updates = answer.unwrap_or_default().update;
            merged.add(&plugin.identity.to_string(), updates)?;
        }
        Ok(merged.finish().1)
    }

    async fn remove_container(
        &mut self,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<Vec<ContainerUpdate>, NriError> {
        let stopped = self.stop_container(pod, container).await;
        if self.told.remove(&container.id) {
            self.tell_container(Event::RemoveContainer, pod, container)
                .await?;
        }
        stopped
    }

    async fn stop_pod(&mut self, pod: &PodSandbox) -> Result<(), NriError> {
        if !self.told.stop(&pod.id) {
            return Ok(());
        }
        self.tell_pod(Event::StopPodSandbox, pod).await
    }

    async fn remove_pod(&mut self, pod: &PodSandbox) -> Result<(), NriError> {
        let stopped = self.stop_pod(pod).await;
        if self.told.remove(&pod.id) {
            self.tell_pod(Event::RemovePodSandbox, pod).await?;
        }
        stopped
    }
}

impl Nri {
    /// No plugins yet.
    #[must_use]
    pub fn new(settings: Settings, node: Arc<dyn Node>) -> Arc<Self> {
        Arc::new(Self {
            settings,
            node,
            state: Mutex::default(),
            listed: Arc::default(),
            places: AtomicUsize::new(0),
        })
    }

    async fn state(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().await;
        state.sweep();
        state
    }

    async fn ticket(&self) -> Ticket {
        Ticket {
            _guard: self.listed.clone().read_owned().await,
        }
    }

    /// A pod is about to be ready. Fails when a plugin fails it; then its end has been told, too.
    pub async fn run_pod_sandbox(&self, pod: &PodSandbox) -> Result<Ticket, NriError> {
        let ticket = self.ticket().await;
        let mut state = self.state().await;
        state.told.begun(&pod.id);
        let result = state.tell_pod(Event::RunPodSandbox, pod).await;
        if result.is_err() {
            note(state.remove_pod(pod).await);
        }
        result.map(|()| ticket)
    }

    /// Limits of a pod are about to change.
    pub async fn update_pod_sandbox(
        &self,
        pod: &PodSandbox,
        overhead: Option<LinuxResources>,
        resources: Option<LinuxResources>,
    ) -> Result<(), NriError> {
        let state = self.state().await;
        let request = UpdatePodSandboxRequest {
            pod: Some(pod.clone()),
            overhead_linux_resources: overhead,
            linux_resources: resources,
        };
        for plugin in &state.plugins {
            let _: Option<Empty> = plugin.ask(Event::UpdatePodSandbox, &request).await?;
        }
        Ok(())
    }

    /// Limits of a pod have changed.
    pub async fn post_update_pod_sandbox(&self, pod: &PodSandbox) {
        let state = self.state().await;
        note(state.tell_pod(Event::PostUpdatePodSandbox, pod).await);
    }

    /// A pod stops; what ran in it has ended. Its containers' ends are told before, where they were not yet.
    pub async fn stop_pod_sandbox(&self, pod: &PodSandbox, containers: &[Container]) {
        let mut updates = Vec::new();
        {
            let mut state = self.state().await;
            for container in containers {
                updates.extend(note(state.stop_container(pod, container).await).unwrap_or_default());
            }
            note(state.stop_pod(pod).await);
        }
        self.apply(updates).await;
    }

    /// A pod and its containers are about to be forgotten. The ticket is to be held until they are.
    pub async fn remove_pod_sandbox(&self, pod: &PodSandbox, containers: &[Container]) -> Ticket {
        let ticket = self.ticket().await;
        let mut updates = Vec::new();
        {
            let mut state = self.state().await;
            for container in containers {
                updates.extend(note(state.remove_container(pod, container).await).unwrap_or_default());
            }
            note(state.remove_pod(pod).await);
        }
        self.apply(updates).await;
        ticket
    }

    /// A container is about to be made: what plugins want of it. Fails when a plugin fails it, when two want different things, or when one
    /// rejects what others want; then its end has been told, too.
    pub async fn create_container(
        &self,
        pod: &PodSandbox,
        container: Container,
    ) -> Result<Created, NriError> {
        let ticket = self.ticket().await;
        let pristine = container.clone();
        let (adjust, updates, evictions) = {
            let mut state = self.state().await;
            state.told.begun(&container.id);
            match ask_creation(&state, pod, container).await {
                Ok(asked) => asked,
                Err(error) => {
                    note(state.remove_container(pod, &pristine).await);
                    return Err(error);
                }
            }
        };
        self.evict(&evictions);
        self.apply(updates).await;
        Ok(Created { adjust, ticket })
    }

    /// A container has been made.
    pub async fn post_create_container(&self, pod: &PodSandbox, container: &Container) {
        let state = self.state().await;
        note(
            state
                .tell_container(Event::PostCreateContainer, pod, container)
                .await,
        );
    }

    /// A container is about to run. Fails when a plugin fails it.
    pub async fn start_container(&self, pod: &PodSandbox, container: &Container) -> Result<(), NriError> {
        let state = self.state().await;
        state.tell_container(Event::StartContainer, pod, container).await
    }

    /// A container runs.
    pub async fn post_start_container(&self, pod: &PodSandbox, container: &Container) {
        let state = self.state().await;
        note(
            state
                .tell_container(Event::PostStartContainer, pod, container)
                .await,
        );
    }

    /// Limits of a container are about to change: to these, when plugins want others.
    pub async fn update_container(
        &self,
        pod: &PodSandbox,
        container: &Container,
        resources: LinuxResources,
    ) -> Result<Option<LinuxResources>, NriError> {
        let (own, updates, evictions) = {
            let state = self.state().await;
            let mut merged = Update::new(&container.id, resources);
            let mut evictions = Vec::new();
            for plugin in &state.plugins {
                let request = UpdateContainerRequest {
                    pod: Some(pod.clone()),
                    container: Some(container.clone()),
                    linux_resources: Some(merged.wanted.clone()),
                };
                let answer: Option<UpdateContainerResponse> =
                    plugin.ask(Event::UpdateContainer, &request).await?;
                let answer = answer.unwrap_or_default();
                merged.add(&plugin.identity.to_string(), answer.update)?;
                evictions.extend(answer.evict);
            }
            let (own, updates) = merged.finish();
            (own, updates, evictions)
        };
        self.evict(&evictions);
        self.apply(updates).await;
        Ok(own)
    }

    /// Limits of a container have changed.
    pub async fn post_update_container(&self, pod: &PodSandbox, container: &Container) {
        let state = self.state().await;
        note(
            state
                .tell_container(Event::PostUpdateContainer, pod, container)
                .await,
        );
    }

    /// A container has ended.
    pub async fn stop_container(&self, pod: &PodSandbox, container: &Container) {
        let updates = {
            let mut state = self.state().await;
            note(state.stop_container(pod, container).await).unwrap_or_default()
        };
        self.apply(updates).await;
    }

    /// A container is about to be forgotten. The ticket is to be held until it is.
    pub async fn remove_container(&self, pod: &PodSandbox, container: &Container) -> Ticket {
        let ticket = self.ticket().await;
        let updates = {
            let mut state = self.state().await;
            note(state.remove_container(pod, container).await).unwrap_or_default()
        };
        self.apply(updates).await;
        ticket
    }

    /// Disconnects all plugins, telling them why. No others are taken.
    pub async fn close(&self) {
        let plugins = {
            let mut state = self.state.lock().await;
            state.closing = true;
            std::mem::take(&mut state.plugins)
        };
        for plugin in plugins {
            plugin.shut_down().await;
        }
    }

    /// How many plugins are served now.
    pub async fn plugins(&self) -> usize {
        self.state().await.plugins.len()
    }

    pub(crate) fn place(self: &Arc<Self>) -> Result<Place, JoinError> {
        let taken = self.places.fetch_add(1, Ordering::Relaxed);
        let place = Place { nri: self.clone() };
        if taken >= MAX_PLUGINS {
            return Err(JoinError::TooMany(MAX_PLUGINS));
        }
        Ok(place)
    }

    /// Tells a new plugin of everything there is, and of all that happens from now on.
    pub(crate) async fn admit(&self, plugin: Plugin) -> Result<(), JoinError> {
        let name = plugin.identity.to_string();
        let updates = {
            let _nothing_in_between = self.listed.write().await;
            let mut state = self.state().await;
            if state.closing {
                return Err(JoinError::Closed);
            }
            let (pods, containers) = self.node.inventory().await;
            for container in &containers {
                let ended = container.state() == ContainerState::ContainerStopped;
                state.told.learn(&container.id, ended);
            }
            for pod in &pods {
                // That it may be stopped already harms nobody: its stop would be told at its removal.
                state.told.learn(&pod.id, false);
            }
            let updates = plugin.synchronize(pods, containers).await?;
            let place = state
                .plugins
                .partition_point(|other| other.identity.index <= plugin.identity.index);
            state.plugins.insert(place, Arc::new(plugin));
            tracing::info!(plugin = name, plugins = state.plugins.len(), "NRI plugin serves");
            updates
        };
        let failed = apply_updates(&name, updates, self.node.as_ref()).await;
        if !failed.is_empty() {
            tracing::warn!(
                plugin = name,
                failed = failed.len(),
                "updates at synchronization failed"
            );
        }
        Ok(())
    }

    async fn apply(&self, updates: Vec<ContainerUpdate>) {
        let failed = apply_updates("(several)", updates, self.node.as_ref()).await;
        if !failed.is_empty() {
            tracing::warn!(failed = failed.len(), "updates that NRI plugins asked for failed");
        }
    }

    fn evict(&self, evictions: &[ContainerEviction]) {
        for eviction in evictions {
            tracing::info!(
                container.id = eviction.container_id,
                reason = eviction.reason,
                "NRI plugin evicts a container"
            );
            self.node.evict(eviction);
        }
    }
}

type Asked = (ContainerAdjustment, Vec<ContainerUpdate>, Vec<ContainerEviction>);

async fn ask_creation(state: &State, pod: &PodSandbox, container: Container) -> Result<Asked, NriError> {
    let pristine = container.clone();
    let mut creation = Creation::new(container);
    let mut evictions = Vec::new();
    let mut consulted = Vec::new();
    for plugin in &state.plugins {
        let request = ContainerRequest {
            pod: Some(pod.clone()),
            container: Some(creation.container.clone()),
        };
        let answer: Option<CreateContainerResponse> = plugin.ask(Event::CreateContainer, &request).await?;
        let answer = answer.unwrap_or_default();
        creation.add(
            &plugin.identity.to_string(),
            answer.adjust.as_ref(),
            answer.update,
        )?;
        evictions.extend(answer.evict);
        consulted.push(PluginInstance {
            name: plugin.identity.name.clone(),
            index: plugin.identity.index.clone(),
        });
    }
    validate(state, pod, pristine, &creation, consulted).await?;
    let (adjust, updates) = creation.finish();
    Ok((adjust, updates, evictions))
}

async fn validate(
    state: &State,
    pod: &PodSandbox,
    pristine: Container,
    creation: &Creation,
    consulted: Vec<PluginInstance>,
) -> Result<(), NriError> {
    let event = Event::ValidateContainerAdjustment;
    if !state.plugins.iter().any(|plugin| plugin.wants(event)) {
        return Ok(());
    }
    let (adjust, updates, owners) = creation.asked();
    let container = pristine.id.clone();
    let request = ValidateContainerAdjustmentRequest {
        pod: Some(pod.clone()),
        container: Some(pristine),
        adjust: Some(adjust.clone()),
        update: updates.to_vec(),
        owners: Some(owners),
        plugins: consulted,
    };
    for plugin in &state.plugins {
        let answer: Option<ValidateContainerAdjustmentResponse> = plugin.ask(event, &request).await?;
        if let Some(answer) = answer.filter(|answer| answer.reject) {
            return Err(NriError::Rejected {
                plugin: plugin.identity.to_string(),
                container,
                reason: answer.reason,
            });
        }
    }
    Ok(())
}

/// A failure of an event whose call goes on all the same.
fn note<T>(result: Result<T, NriError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(%error, "an NRI plugin failed what goes on all the same");
            None
        }
    }
}
