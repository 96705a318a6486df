//! Tells the hooks of a pod what happens to its containers, at the points where the actor stands.

use std::sync::Arc;

use crate::{
    ContainerId, SandboxError,
    actor::{Actor, answer},
    container::{self, Live, Started},
    entry::{Entry, Made, Work},
    hooks::{Moment, PodHooks},
    registry::Reply,
    view::{ContainerState, ContainerView, SandboxView},
};

/// What a hook is told of.
#[derive(Clone)]
pub(crate) struct Subject {
    hooks: Arc<dyn PodHooks>,
    pod: SandboxView,
    container: ContainerView,
}

impl Subject {
    /// Tells a moment that nothing depends on.
    async fn tell(&self, moment: Moment) {
        if let Err(error) = self.hooks.container(moment, &self.pod, &self.container).await {
            tracing::warn!(container.id = %self.container.id.0, ?moment, error, "a hook failed what goes on all the same");
        }
    }

    fn refused(&self, what: &str) -> impl FnOnce(crate::hooks::HookError) -> SandboxError + use<> {
        let what = format!("{what} container {}", self.container.id.0);
        move |source| SandboxError::Hook { what, source }
    }

    /// Has the container made as the hooks want it.
    pub(crate) async fn make(self, live: Live) -> Made {
        let id = self.container.id.clone();
        let (spec, ticket) = match self.hooks.create_container(&self.pod, &self.container).await {
            Ok(adjusted) => adjusted,
            Err(source) => {
                return Made {
                    spec: None,
                    result: Err(self.refused("create")(source)),
                };
            }
        };
        let made = match spec.check() {
            Ok(()) => Box::pin(container::make(live, id, spec.clone())).await,
            Err(error) => Err(error),
        };
        let result = match made {
            Ok(()) => Ok(ticket),
            Err(error) => {
                // It will never be listed; and the next call takes a ticket of its own.
                drop(ticket);
                drop(self.hooks.remove_container(&self.pod, &self.container).await);
                Err(error)
            }
        };
        Made {
            spec: Some(Box::new(spec)),
            result,
        }
    }

    /// Starts the container, if the hooks let it.
    pub(crate) async fn start(
        self,
        live: Live,
        output: container::Output,
    ) -> Result<Box<Started>, SandboxError> {
        let id = self.container.id.clone();
        self.hooks
            .container(Moment::Starting, &self.pod, &self.container)
            .await
            .map_err(self.refused("start"))?;
        Box::pin(container::start(live, id, output)).await.map(Box::new)
    }

    /// Takes the container out of the guest, which may be gone.
    pub(crate) async fn remove(self, live: Option<Live>, volumes: Vec<String>) -> Work {
        let id = self.container.id.clone();
        let result = match Box::pin(container::remove(live, id.clone(), volumes)).await {
            Ok(()) => Ok(self.hooks.remove_container(&self.pod, &self.container).await),
            Err(error) => Err(error),
        };
        Work::Removed { id, result }
    }
}

impl Actor {
    /// The pod as it is shown.
    pub(crate) fn shown_pod(&self) -> SandboxView {
        self.latest().sandbox.clone()
    }

    /// A container, whether it is listed or not.
    pub(crate) fn subject(&self, entry: &Entry) -> Subject {
        Subject {
            hooks: self.node.hooks.clone(),
            pod: self.shown_pod(),
            container: self.view_of(entry, ContainerState::Created),
        }
    }

    pub(crate) fn subject_of(&self, id: &ContainerId) -> Option<Subject> {
        self.containers.get(id).map(|entry| self.subject(entry))
    }

    /// Tells of a container, and answers who waits for it afterwards.
    pub(crate) fn tell_then(
        &mut self,
        id: &ContainerId,
        moment: Moment,
        then: impl FnOnce() + Send + 'static,
    ) {
        let Some(subject) = self.subject_of(id) else {
            return then();
        };
        self.spawn_work(async move {
            subject.tell(moment).await;
            then();
            Work::Answered
        });
    }

    /// Tells that a container runs; its end is looked for afterwards.
    pub(crate) fn tell_started(&mut self, id: &ContainerId, reply: Option<Reply<()>>) {
        let Some(subject) = self.subject_of(id) else {
            return;
        };
        let id = id.clone();
        self.spawn_work(async move {
            subject.tell(Moment::Started).await;
            Work::Announced { id, reply }
        });
    }

    /// Everybody who asked has heard that it runs.
    pub(crate) fn announced(&mut self, id: &ContainerId, reply: Option<Reply<()>>) {
        self.watch(id);
        if let Some(reply) = reply {
            answer(reply, Ok(()));
        }
    }

    /// Tells that a container which was never listed will not be.
    pub(crate) fn tell_gone(&mut self, subject: Subject) {
        self.spawn_work(async move {
            drop(
                subject
                    .hooks
                    .remove_container(&subject.pod, &subject.container)
                    .await,
            );
            Work::Answered
        });
    }
}
