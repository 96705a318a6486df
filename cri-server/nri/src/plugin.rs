//! One plugin: how it comes in, and how it is called.
//!
//! ```text
//! connected -> RegisterPlugin -> Configure -> Synchronize -> called for its events -> closed
//! ```

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use prost::Message as _;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::Instant,
};

use crate::{
    Node, NriError, Settings,
    connection::{Connection, Incoming},
    envelope,
    error::{CallError, JoinError},
    frame::MAX_MESSAGE_BYTES,
    launch::Process,
    v1alpha1::{
        ConfigureRequest, ConfigureResponse, Container, ContainerRequest, ContainerUpdate, Empty, Event,
        PodRequest, PodSandbox, RegisterPluginRequest, StateChangeEvent, SynchronizeRequest,
        SynchronizeResponse, UpdateContainersRequest, UpdateContainersResponse,
    },
    wire::{self, RUNTIME_SERVICE, code},
};

/// What a message of a synchronization may hold, so that its envelope still fits.
const SYNCHRONIZE_BYTES: usize = MAX_MESSAGE_BYTES - (64 << 10);

/// How long a plugin may take to say that it has heard of the daemon's end.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_millis(500);

/// Longest name of a plugin.
const MAX_NAME_BYTES: usize = 128;

/// Who a plugin is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    /// Two digits.
    pub(crate) index: String,
    pub(crate) name: String,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.index, self.name)
    }
}

impl Identity {
    /// Checks both parts.
    pub(crate) fn new(index: &str, name: &str) -> Result<Self, JoinError> {
        let refuse = |what, value: &str, wanted| {
            Err(JoinError::Identity {
                what,
                value: value.chars().take(MAX_NAME_BYTES).collect(),
                wanted,
            })
        };
        if index.len() != 2 || !index.bytes().all(|byte| byte.is_ascii_digit()) {
            return refuse("index", index, "two digits");
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+".contains(&byte);
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
            return refuse(
                "name",
                name,
                "1 to 128 letters, digits and characters of \"-_.+\"",
            );
        }
        Ok(Self {
            index: index.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// A plugin that is configured.
pub(crate) struct Plugin {
    pub(crate) identity: Identity,
    events: i32,
    connection: Arc<Connection>,
    request_timeout: Duration,
    /// It knows StateChange only.
    old: AtomicBool,
    /// When the daemon has started it; ended with it.
    _process: Option<Process>,
}

impl Plugin {
    /// Waits for registration, and configures. `launched` has what is known of a plugin that the daemon has started.
    pub(crate) async fn join(
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
        launched: Option<(Identity, String, Process)>,
        settings: &Settings,
    ) -> Result<(Self, mpsc::Receiver<Incoming>), JoinError> {
        let (connection, mut incoming) = Connection::new(stream);
        let (known, config, process) = match launched {
            Some((identity, config, process)) => (Some(identity), config, Some(process)),
            None => (None, String::new(), None),
        };
        let limit = settings.registration_timeout;
        let identity = tokio::time::timeout(limit, registration(&connection, &mut incoming, known))
            .await
            .unwrap_or(Err(JoinError::Silent(limit)))?;
        let milliseconds = |limit: Duration| i64::try_from(limit.as_millis()).unwrap_or(i64::MAX);
        let request = ConfigureRequest {
            config,
            runtime_name: settings.runtime_name.clone(),
            runtime_version: settings.runtime_version.clone(),
            registration_timeout: milliseconds(settings.registration_timeout),
            request_timeout: milliseconds(settings.request_timeout),
            nri_version: wire::NRI_VERSION.into(),
        };
        let configured: ConfigureResponse = connection
            .call("Configure", &request, settings.request_timeout)
            .await
            .map_err(|error| JoinError::Call("Configure", error))?;
        let events = match configured.events {
            0 => wire::ALL_EVENTS,
            events if events & !wire::ALL_EVENTS == 0 => events,
            other => return Err(JoinError::Events(other)),
        };
        let plugin = Self {
            identity,
            events,
            connection: Arc::new(connection),
            request_timeout: settings.request_timeout,
            old: AtomicBool::new(false),
            _process: process,
        };
        Ok((plugin, incoming))
    }

    /// Tells what there is; what the plugin wants to be updated comes back. All messages share one deadline.
    pub(crate) async fn synchronize(
        &self,
        pods: Vec<PodSandbox>,
        containers: Vec<Container>,
    ) -> Result<Vec<ContainerUpdate>, JoinError> {
        let deadline = Instant::now() + self.request_timeout;
        let mut parts = split(pods, containers)?;
        let last = parts.pop().unwrap_or_default();
        for mut part in parts {
            part.more = true;
            let answer = self.synchronize_part(&part, deadline).await?;
            if !answer.more || !answer.update.is_empty() {
                return Err(JoinError::Split);
            }
        }
        Ok(self.synchronize_part(&last, deadline).await?.update)
    }

    async fn synchronize_part(
        &self,
        part: &SynchronizeRequest,
        deadline: Instant,
    ) -> Result<SynchronizeResponse, JoinError> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.connection
            .call("Synchronize", part, left)
            .await
            .map_err(|error| JoinError::Call("Synchronize", error))
    }

    /// Whether it wants to hear of this.
    pub(crate) fn wants(&self, event: Event) -> bool {
        self.events & wire::bit(event) != 0 && !self.connection.is_closed()
    }

    /// Calls it. `None`: it does not want to hear of this, or was of no use and is disconnected.
    pub(crate) async fn ask<R: prost::Message + Default>(
        &self,
        event: Event,
        request: &impl prost::Message,
    ) -> Result<Option<R>, NriError> {
        if !self.wants(event) {
            return Ok(None);
        }
        let method = wire::method(event);
        let answer = self.connection.call(method, request, self.request_timeout).await;
        if matches!(&answer, Err(CallError::Status { code, .. }) if *code == code::UNIMPLEMENTED) {
            // Who subscribes to everything may be older than the event.
            tracing::debug!(plugin = %self.identity, method, "NRI plugin does not know the call");
            return Ok(None);
        }
        self.weigh(method, answer)
    }

    /// Tells it of a pod.
    pub(crate) async fn tell_pod(&self, event: Event, pod: &PodSandbox) -> Result<(), NriError> {
        let request = PodRequest {
            pod: Some(pod.clone()),
        };
        self.tell(event, &request, pod, None).await
    }

    /// Tells it of a container.
    pub(crate) async fn tell_container(
        &self,
        event: Event,
        pod: &PodSandbox,
        container: &Container,
    ) -> Result<(), NriError> {
        let request = ContainerRequest {
            pod: Some(pod.clone()),
            container: Some(container.clone()),
        };
        self.tell(event, &request, pod, Some(container)).await
    }

    async fn tell(
        &self,
        event: Event,
        request: &impl prost::Message,
        pod: &PodSandbox,
        container: Option<&Container>,
    ) -> Result<(), NriError> {
        if !self.wants(event) {
            return Ok(());
        }
        let method = wire::method(event);
        let known = !(self.old.load(Ordering::Relaxed) && wire::was_state_change(event));
        if known {
            let answer: Result<Empty, _> = self.connection.call(method, request, self.request_timeout).await;
            let unknown =
                matches!(&answer, Err(CallError::Status { code, .. }) if *code == code::UNIMPLEMENTED);
            if !(unknown && wire::was_state_change(event)) {
                return self.weigh(method, answer).map(drop);
            }
            self.old.store(true, Ordering::Relaxed);
        }
        let change = StateChangeEvent {
            event: event.into(),
            pod: Some(pod.clone()),
            container: container.cloned(),
        };
        let answer: Result<Empty, _> = self
            .connection
            .call("StateChange", &change, self.request_timeout)
            .await;
        self.weigh(method, answer).map(drop)
    }

    fn weigh<R>(&self, method: &'static str, answer: Result<R, CallError>) -> Result<Option<R>, NriError> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.is_fatal() => {
                tracing::error!(plugin = %self.identity, method, %error, "NRI plugin disconnected");
                self.connection.close();
                Ok(None)
            }
            Err(error) => Err(NriError::Refused {
                plugin: self.identity.to_string(),
                method,
                message: error.to_string(),
            }),
        }
    }

    /// Says that the daemon ends, and disconnects.
    pub(crate) async fn shut_down(&self) {
        let told: Result<Empty, _> = self
            .connection
            .call("Shutdown", &Empty {}, SHUTDOWN_TIMEOUT)
            .await;
        if let Err(error) = told {
            tracing::debug!(plugin = %self.identity, %error, "NRI plugin has not taken leave");
        }
        self.connection.close();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    pub(crate) fn connection(&self) -> Arc<Connection> {
        self.connection.clone()
    }
}

/// Serves what a plugin asks until its connection ends.
pub(crate) async fn serve(
    identity: Identity,
    connection: Arc<Connection>,
    mut incoming: mpsc::Receiver<Incoming>,
    node: Arc<dyn Node>,
) {
    loop {
        let asked = tokio::select! {
            () = connection.ended() => None,
            asked = incoming.recv() => asked,
        };
        let Some(asked) = asked else { return };
        let result = match known_method(&asked.request) {
            Ok("UpdateContainers") => update_containers(&identity, &asked.request, node.as_ref()).await,
            Ok(_) => Err((code::INVALID_ARGUMENT, "the plugin is registered already".into())),
            Err(refusal) => Err(refusal),
        };
        if let Err(error) = connection.answer(&asked, result).await {
            tracing::debug!(plugin = %identity, %error, "NRI plugin was not answered");
        }
    }
}

fn known_method(request: &envelope::Request) -> Result<&'static str, (i32, String)> {
    if request.service == RUNTIME_SERVICE
        && let Some(known) = ["RegisterPlugin", "UpdateContainers"]
            .into_iter()
            .find(|known| *known == request.method)
    {
        return Ok(known);
    }
    let (service, method): (String, String) = (
        request.service.chars().take(100).collect(),
        request.method.chars().take(100).collect(),
    );
    Err((
        code::UNIMPLEMENTED,
        format!("the runtime does not serve {service}/{method}"),
    ))
}

async fn update_containers(
    identity: &Identity,
    request: &envelope::Request,
    node: &dyn Node,
) -> Result<Vec<u8>, (i32, String)> {
    let request = UpdateContainersRequest::decode(request.payload.as_slice()).map_err(|_| {
        (
            code::INVALID_ARGUMENT,
            "the UpdateContainersRequest cannot be read".to_owned(),
        )
    })?;
    for eviction in &request.evict {
        tracing::info!(plugin = %identity, container.id = eviction.container_id, reason = eviction.reason, "NRI plugin evicts a container");
        node.evict(eviction);
    }
    let failed = apply_updates(&identity.to_string(), request.update, node).await;
    Ok(UpdateContainersResponse { failed }.encode_to_vec())
}

/// Updates containers; those that failed, but for whom that was not to matter, come back.
pub(crate) async fn apply_updates(
    plugin: &str,
    updates: Vec<ContainerUpdate>,
    node: &dyn Node,
) -> Vec<ContainerUpdate> {
    let mut failed = Vec::new();
    for update in updates {
        if let Err(reason) = node.update(&update).await {
            tracing::warn!(
                plugin,
                container.id = update.container_id,
                reason,
                "update for an NRI plugin failed"
            );
            if !update.ignore_failure {
                failed.push(update);
            }
        }
    }
    failed
}

async fn registration(
    connection: &Connection,
    incoming: &mut mpsc::Receiver<Incoming>,
    known: Option<Identity>,
) -> Result<Identity, JoinError> {
    loop {
        let asked = tokio::select! {
            () = connection.ended() => return Err(JoinError::Closed),
            asked = incoming.recv() => asked.ok_or(JoinError::Closed)?,
        };
        let refusal = match known_method(&asked.request) {
            Ok("RegisterPlugin") => match identity(&asked.request, known.as_ref()) {
                Ok(identity) => {
                    connection
                        .answer(&asked, Ok(Vec::new()))
                        .await
                        .map_err(|_| JoinError::Closed)?;
                    return Ok(identity);
                }
                Err(error) => {
                    let refusal = (code::INVALID_ARGUMENT, error.to_string());
                    if connection.answer(&asked, Err(refusal)).await.is_ok() {
                        connection.flush().await;
                    }
                    return Err(error);
                }
            },
            Ok(_) => (code::UNKNOWN, "the plugin has not registered yet".to_owned()),
            Err(refusal) => refusal,
        };
        connection
            .answer(&asked, Err(refusal))
            .await
            .map_err(|_| JoinError::Closed)?;
    }
}

/// Who registers. What the daemon has started is who its file says it is.
fn identity(request: &envelope::Request, known: Option<&Identity>) -> Result<Identity, JoinError> {
    if let Some(known) = known {
        return Ok(known.clone());
    }
    let request = RegisterPluginRequest::decode(request.payload.as_slice())
        .map_err(|error| JoinError::Call("RegisterPlugin", CallError::Malformed(error)))?;
    Identity::new(&request.plugin_idx, &request.plugin_name)
}

/// Messages that each fit.
fn split(pods: Vec<PodSandbox>, containers: Vec<Container>) -> Result<Vec<SynchronizeRequest>, JoinError> {
    let mut parts = Vec::new();
    let mut part = SynchronizeRequest::default();
    let mut used = 0;
    let mut room = |bytes: usize, name: &str, part: &mut SynchronizeRequest| {
        // Tag and length of the field.
        let bytes = bytes.saturating_add(16);
        if bytes > SYNCHRONIZE_BYTES {
            return Err(JoinError::Oversize(name.to_owned()));
        }
        if used + bytes > SYNCHRONIZE_BYTES {
            parts.push(std::mem::take(part));
            used = 0;
        }
        used += bytes;
        Ok(())
    };
    for pod in pods {
        room(pod.encoded_len(), &format!("pod sandbox {}", pod.id), &mut part)?;
        part.pods.push(pod);
    }
    for container in containers {
        room(
            container.encoded_len(),
            &format!("container {}", container.id),
            &mut part,
        )?;
        part.containers.push(container);
    }
    parts.push(part);
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indexes_are_two_digits_and_names_are_plain() {
        assert_eq!(
            Identity::new("07", "a-b_c.d+e").unwrap().to_string(),
            "07-a-b_c.d+e"
        );
        for (index, name) in [
            ("7", "a"),
            ("a7", "a"),
            ("007", "a"),
            ("07", ""),
            ("07", "a b"),
            ("07", "ä"),
        ] {
            assert!(Identity::new(index, name).is_err(), "{index} {name}");
        }
        assert!(Identity::new("07", &"x".repeat(MAX_NAME_BYTES + 1)).is_err());
    }

    #[test]
    fn a_large_inventory_is_told_in_messages_that_fit_and_lose_nothing() {
        let pods: Vec<_> = (0..20)
            .map(|n| PodSandbox {
                id: n.to_string(),
                annotations: [("a".to_owned(), "x".repeat(400 << 10))].into(),
                ..Default::default()
            })
            .collect();
        let containers = vec![Container::default(); 3];
        let parts = split(pods.clone(), containers.clone()).unwrap();
        assert!(parts.len() > 1);
        assert!(parts.iter().all(|part| part.encoded_len() <= SYNCHRONIZE_BYTES));
        let all: Vec<_> = parts.iter().flat_map(|part| part.pods.clone()).collect();
        assert_eq!(all, pods);
        let all: Vec<_> = parts.iter().flat_map(|part| part.containers.clone()).collect();
        assert_eq!(all, containers);
        let huge = PodSandbox {
            name: "x".repeat(MAX_MESSAGE_BYTES),
            ..Default::default()
        };
        assert!(split(vec![huge], Vec::new()).is_err());
        assert_eq!(split(Vec::new(), Vec::new()).unwrap().len(), 1);
    }
}
