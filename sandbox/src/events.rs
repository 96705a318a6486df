//! What happens to pods and containers, told to whoever listens.
//!
//! Events are made by comparing what was told with what is shown now, at the one place where a pod is shown: so each step of a life is told
//! once, in order, and never before a caller could see it. Who listens has a queue of its own with a bound; who does not keep up is cut off
//! and told so, because a gap that nobody notices is worse than a new listing. Must not know who listens or what they make of it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::SystemTime,
};

use tokio::sync::mpsc;

use crate::{
    ContainerId, SandboxError,
    view::{ContainerState, ContainerView, SandboxState, SandboxView},
};

/// Events that may wait for one listener; one more cuts it off.
pub const EVENT_QUEUE: usize = 4096;

/// Listeners at a time.
const MAX_LISTENERS: usize = 64;

/// A step of a life (CRI ContainerEventType).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Change {
    /// It is there.
    Created,
    /// It runs.
    Started,
    /// It does not run any more.
    Stopped,
    /// Nothing of it is left.
    Deleted,
}

/// Something happened.
#[derive(Debug, Clone)]
pub struct Event {
    /// Id of the container, or of the pod, that it happened to.
    pub subject: String,
    /// What happened.
    pub change: Change,
    /// When it was told; within a pod never earlier than the event before.
    pub at: SystemTime,
    /// The pod after it.
    pub picture: Arc<Picture>,
}

/// A pod and its containers at one moment.
#[derive(Debug)]
pub struct Picture {
    /// The pod.
    pub sandbox: SandboxView,
    /// Those that are there.
    pub containers: Vec<ContainerView>,
}

/// Who listens.
#[derive(Default)]
pub(crate) struct Listeners {
    all: Mutex<Vec<Listener>>,
}

struct Listener {
    queue: mpsc::Sender<Event>,
    cut_off: Arc<AtomicBool>,
}

/// One who listens. Dropping it ends that.
#[derive(Debug)]
pub struct Subscription {
    queue: mpsc::Receiver<Event>,
    cut_off: Arc<AtomicBool>,
}

impl Subscription {
    /// The next event; `None` when the daemon stops serving. An error says that events were lost because they were not taken.
    pub async fn next(&mut self) -> Option<Result<Event, SandboxError>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// As [`Subscription::next`], for streams.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event, SandboxError>>> {
        self.queue.poll_recv(context).map(|event| match event {
            Some(event) => Some(Ok(event)),
            // Told once; then it is over.
            None => self
                .cut_off
                .swap(false, Ordering::AcqRel)
                .then_some(Err(SandboxError::Lagged { limit: EVENT_QUEUE })),
        })
    }
}

impl Listeners {
    /// Everything that happens from now on.
    pub(crate) fn subscribe(&self) -> Result<Subscription, SandboxError> {
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|listener| !listener.queue.is_closed());
        if all.len() >= MAX_LISTENERS {
            return Err(SandboxError::TooManyListeners(MAX_LISTENERS));
        }
        let (sender, queue) = mpsc::channel(EVENT_QUEUE);
        let cut_off = Arc::new(AtomicBool::new(false));
        all.push(Listener {
            queue: sender,
            cut_off: cut_off.clone(),
        });
        Ok(Subscription { queue, cut_off })
    }

    pub(crate) fn tell(&self, events: &[Event]) {
        if events.is_empty() {
            return;
        }
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|listener| {
            events
                .iter()
                .all(|event| match listener.queue.try_send(event.clone()) {
                    Ok(()) => true,
                    Err(mpsc::error::TrySendError::Closed(_)) => false,
                    Err(mpsc::error::TrySendError::Full(_)) => {
                        tracing::warn!(
                            limit = EVENT_QUEUE,
                            "listener for events does not keep up, cut off"
                        );
                        listener.cut_off.store(true, Ordering::Release);
                        false
                    }
                })
        });
    }

    /// Ends all subscriptions, in order.
    pub(crate) fn close(&self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// How far a container's life has been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Created,
    Running,
    Exited,
}

/// Something that happened to a container, or to the pod itself when there is none.
pub(crate) type Step = (Option<ContainerId>, Change);

/// How far a pod's life has been told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// `None` before its first event; else whether it is ready.
    ready: Option<bool>,
    containers: BTreeMap<ContainerId, Stage>,
}

impl Told {
    /// What has to be told to come from what was told to what is shown now. A pod that was never ready, and so never answered by
    /// RunPodSandbox, is not told of at all.
    pub(crate) fn advance(&mut self, state: SandboxState, containers: &[ContainerView]) -> Vec<Step> {
        let mut steps = Vec::new();
        let ready = state == SandboxState::Ready;
        match self.ready {
            None if !ready => return steps,
            None => steps.extend([Change::Created, Change::Started].map(|change| (None, change))),
            Some(false) if ready => steps.push((None, Change::Started)),
            Some(_) => {}
        }
        for view in containers {
            self.container(view, &mut steps);
        }
        let gone: Vec<_> = self
            .containers
            .keys()
            .filter(|id| !containers.iter().any(|view| view.id == **id))
            .cloned()
            .collect();
        for id in gone {
            if self.containers.remove(&id) == Some(Stage::Running) {
                steps.push((Some(id.clone()), Change::Stopped));
            }
            steps.push((Some(id), Change::Deleted));
        }
        if self.ready == Some(true) && !ready {
            steps.push((None, Change::Stopped));
        }
        self.ready = Some(ready);
        steps
    }

    /// As [`Told::advance`], for a pod of which nothing is left.
    pub(crate) fn end(&mut self) -> Vec<Step> {
        if self.ready.is_none() {
            return Vec::new();
        }
        let mut steps = self.advance(SandboxState::NotReady, &[]);
        steps.push((None, Change::Deleted));
        self.ready = None;
        steps
    }

    /// Takes what an earlier daemon has left as told: whoever listens from now on will list it.
    pub(crate) fn assume(
        ready: bool,
        containers: impl Iterator<Item = (ContainerId, ContainerState)>,
    ) -> Self {
        let known = containers.filter_map(|(id, state)| Some((id, Stage::of(&state)?)));
        Self {
            ready: Some(ready),
            containers: known.collect(),
        }
    }

    fn container(&mut self, view: &ContainerView, steps: &mut Vec<Step>) {
        // Of what is not known nothing has happened yet.
        let Some(now) = Stage::of(&view.state) else { return };
        let was = self.containers.get(&view.id).copied();
        let mut tell = |change| steps.push((Some(view.id.clone()), change));
        if was.is_none() {
            tell(Change::Created);
        }
        let ran = match &view.state {
            ContainerState::Running { .. } => true,
            ContainerState::Exited { started_at, .. } => started_at.is_some(),
            ContainerState::Created | ContainerState::Unknown => false,
        };
        if ran && was.is_none_or(|was| was < Stage::Running) {
            tell(Change::Started);
        }
        if now == Stage::Exited && was != Some(Stage::Exited) {
            tell(Change::Stopped);
        }
        // A life goes forward only.
        let now = was.map_or(now, |was| was.max(now));
        self.containers.insert(view.id.clone(), now);
    }
}

impl Stage {
    fn of(state: &ContainerState) -> Option<Self> {
        match state {
            ContainerState::Created => Some(Self::Created),
            ContainerState::Running { .. } => Some(Self::Running),
            ContainerState::Exited { .. } => Some(Self::Exited),
            ContainerState::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{SandboxId, spec};

    fn sandbox() -> SandboxView {
        let identity = spec::PodIdentity {
            name: "p".into(),
            namespace: "n".into(),
            uid: "u".into(),
            attempt: 0,
        };
        SandboxView {
            id: SandboxId("p".into()),
            spec: spec::PodSpec::unknown(identity),
            state: SandboxState::Ready,
            created_at: SystemTime::UNIX_EPOCH,
            ips: Vec::new(),
            info: serde_json::Value::Null,
        }
    }

    fn event() -> Event {
        Event {
            subject: "p".into(),
            change: Change::Started,
            at: SystemTime::UNIX_EPOCH,
            picture: Arc::new(Picture {
                sandbox: sandbox(),
                containers: Vec::new(),
            }),
        }
    }

    #[tokio::test]
    async fn who_does_not_take_events_is_cut_off_and_told_so_and_others_are_not() {
        let listeners = Listeners::default();
        let (mut slow, mut quick) = (listeners.subscribe().unwrap(), listeners.subscribe().unwrap());
        for _ in 0..=EVENT_QUEUE {
            listeners.tell(&[event()]);
            quick.next().await.unwrap().unwrap();
        }
        for _ in 0..EVENT_QUEUE {
            slow.next().await.unwrap().unwrap();
        }
        assert!(matches!(
            slow.next().await,
            Some(Err(SandboxError::Lagged { limit: EVENT_QUEUE }))
        ));
        assert!(slow.next().await.is_none());
        listeners.tell(&[event()]);
        assert!(quick.next().await.unwrap().is_ok());
    }

    #[test]
    fn listeners_are_limited_and_those_that_are_gone_do_not_count() {
        let listeners = Listeners::default();
        let all: Vec<_> = (0..MAX_LISTENERS)
            .map(|_| listeners.subscribe().unwrap())
            .collect();
        assert!(matches!(
            listeners.subscribe(),
            Err(SandboxError::TooManyListeners(_))
        ));
        drop(all);
        listeners.subscribe().unwrap();
    }

    fn container(id: u8, state: u8) -> Option<ContainerView> {
        let started_at = SystemTime::UNIX_EPOCH;
        let exited = |started_at| ContainerState::Exited {
            started_at,
            finished_at: SystemTime::UNIX_EPOCH,
            exit_code: 0,
            reason: String::new(),
            message: String::new(),
        };
        let state = match state % 6 {
            0 => return None,
            1 => ContainerState::Created,
            2 => ContainerState::Running { started_at },
            3 => exited(Some(started_at)),
            4 => exited(None),
            _ => ContainerState::Unknown,
        };
        Some(ContainerView {
            id: ContainerId(id.to_string()),
            sandbox_id: SandboxId("p".into()),
            spec: spec::ContainerSpec::unknown("c".into()),
            state,
            created_at: started_at,
            log_path: None,
            user: None,
        })
    }

    proptest! {
        #[test]
        fn each_life_is_told_forward_and_each_step_once(pictures in proptest::collection::vec((any::<bool>(), any::<[u8; 3]>()), 0..40)) {
            let mut told = Told::default();
            let mut last: BTreeMap<Option<ContainerId>, Change> = BTreeMap::new();
            let mut steps = Vec::new();
            for (ready, states) in pictures {
                let views: Vec<_> = (0..).zip(states).filter_map(|(id, state)| container(id, state)).collect();
                let state = if ready { SandboxState::Ready } else { SandboxState::NotReady };
                steps.extend(told.advance(state, &views));
                prop_assert!(told.advance(state, &views).is_empty(), "told twice");
            }
            steps.extend(told.end());
            for (subject, change) in steps {
                let before = last.get(&subject).copied();
                let fits = match change {
                    Change::Created => matches!(before, None | Some(Change::Deleted)),
                    // A pod that was unreachable may be ready again.
                    Change::Started => matches!(before, Some(Change::Created)) || (subject.is_none() && before == Some(Change::Stopped)),
                    // A container may end without ever having run.
                    Change::Stopped => matches!(before, Some(Change::Created | Change::Started)),
                    Change::Deleted => matches!(before, Some(Change::Created | Change::Stopped)),
                };
                prop_assert!(fits, "{subject:?}: {change:?} after {before:?}");
                last.insert(subject, change);
            }
            prop_assert!(last.values().all(|change| *change == Change::Deleted), "{last:?}");
        }
    }
}
