//! What others may learn of pods and containers while it happens, and say to it.
//!
//! The port of whoever lets third parties into a pod's life. Calls are made by the tasks of the pod they are about, each at the point
//! that its name says, and never by the actor itself: whoever implements it may take a while, but must have an end of its own.
//! Kubernetes' clients need not wait for that: what they have asked for goes on when they go away.

use async_trait::async_trait;

use crate::{
    spec::ContainerSpec,
    view::{ContainerView, SandboxView},
};

/// Why a pod or container must not go on.
pub type HookError = Box<dyn std::error::Error + Send + Sync>;

/// Held from a call until what it was about is listed, or no longer listed. Whoever implements [`PodHooks`] knows by it when lists are
/// true.
#[derive(Default)]
pub struct Ticket(#[expect(dead_code, reason = "held, not looked at")] Option<Box<dyn Send>>);

impl Ticket {
    /// A ticket that drops `held` when lists are true.
    pub fn holding(held: impl Send + 'static) -> Self {
        Self(Some(Box::new(held)))
    }
}

/// Where a container's life stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// It is made, and listed.
    Created,
    /// It is about to run; an error keeps it from it.
    Starting,
    /// It runs. Its end is not looked for before this has been answered.
    Started,
    /// It has ended, by itself or not. May be told more than once.
    Ended,
}

/// Whoever has a say.
#[async_trait]
pub trait PodHooks: Send + Sync {
    /// The pod's guest is ready, and nobody knows of the pod yet. An error fails the pod, which is then undone.
    async fn run_pod(&self, pod: &SandboxView) -> Result<Ticket, HookError>;

    /// Nothing runs in the pod any more, and its network is still there. May be told more than once, and of a pod that never ran.
    async fn stop_pod(&self, pod: &SandboxView, containers: &[ContainerView]);

    /// Nothing is left of the pod; it is about to be forgotten with its containers.
    async fn remove_pod(&self, pod: &SandboxView, containers: &[ContainerView]) -> Ticket;

    /// A container is about to be made, and nobody knows of it yet: what it shall be. An error fails it.
    async fn create_container(
        &self,
        pod: &SandboxView,
        container: &ContainerView,
    ) -> Result<(ContainerSpec, Ticket), HookError>;

    /// A container that exists has come to this point. Only [`Moment::Starting`] may fail.
    async fn container(
        &self,
        moment: Moment,
        pod: &SandboxView,
        container: &ContainerView,
    ) -> Result<(), HookError>;

    /// Nothing is left of the container; it is about to be forgotten. Also of one whose creation failed after
    /// [`PodHooks::create_container`].
    async fn remove_container(&self, pod: &SandboxView, container: &ContainerView) -> Ticket;
}

/// Nobody has a say.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoHooks;

#[async_trait]
impl PodHooks for NoHooks {
    async fn run_pod(&self, _: &SandboxView) -> Result<Ticket, HookError> {
        Ok(Ticket::default())
    }

    async fn stop_pod(&self, _: &SandboxView, _: &[ContainerView]) {}

    async fn remove_pod(&self, _: &SandboxView, _: &[ContainerView]) -> Ticket {
        Ticket::default()
    }

    async fn create_container(
        &self,
        _: &SandboxView,
        container: &ContainerView,
    ) -> Result<(ContainerSpec, Ticket), HookError> {
        Ok((container.spec.clone(), Ticket::default()))
    }

    async fn container(&self, _: Moment, _: &SandboxView, _: &ContainerView) -> Result<(), HookError> {
        Ok(())
    }

    async fn remove_container(&self, _: &SandboxView, _: &ContainerView) -> Ticket {
        Ticket::default()
    }
}
