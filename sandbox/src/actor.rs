//! The one task that owns a pod.
//!
//! It keeps the state, hands everything slow to child tasks, and is itself never longer away than one write to the journal. What it
//! hears first when several things happen: the VM's end, then the pod's end, then what its children report, then requests. It must not
//! decide which state follows which event (the lifecycle does) or know how anything is done in the guest (`container`) or on the host
//! (`boot`, `undo`).

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Weak},
    time::SystemTime,
};

use caisson_hypervisor::{Vm, VmExit};
use caisson_lifecycle::{
    container,
    sandbox::{self, Effect, Event, State},
};
use serde_json::json;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::{JoinError, JoinSet},
};

use crate::{
    ContainerId, SandboxError,
    boot::{Boot, BootEnd},
    container::Live,
    entry::{self, Entry, Fate, Work},
    events::{self, Picture, Told},
    hooks::Ticket,
    journal::{KeptImages, PodPhase, PodRecord},
    registry::{Handle, Node, Outcome, Registry, Reply, Request, Snapshot, Terminate},
    undo::{self, Farewell, UndoStack},
    view::{SandboxState, SandboxView},
};

/// Requests that may wait for a pod; more are refused.
const MAILBOX: usize = 128;

/// In a pod's information: the disks that wait for space on the host.
const WAITING: &str = "disksWaitingForSpace";

/// Events of one boot.
const BOOT_EVENTS: usize = 8;

/// What children that make or unmake the pod report.
enum Vital {
    Boot(Box<BootEnd>),
    CleanUp {
        undo: UndoStack,
        failures: Vec<SandboxError>,
        deep: bool,
        /// Held until the pod is no longer listed.
        ticket: Option<Ticket>,
    },
}

/// Where the actor hears of the world.
pub(crate) struct Inbox {
    requests: mpsc::Receiver<Request>,
    terminate: mpsc::Receiver<Terminate>,
    progress: mpsc::Receiver<Event>,
}

/// Who waits for what.
#[derive(Default)]
struct Waiters {
    stop: Vec<Reply<()>>,
    remove: Vec<Reply<()>>,
}

/// The actor's children, by what their end means.
#[derive(Default)]
struct Children {
    vital: JoinSet<Vital>,
    vm: JoinSet<VmExit>,
    work: JoinSet<Work>,
}

/// A pod.
pub(crate) struct Actor {
    pub(crate) node: Arc<Node>,
    registry: Weak<Registry>,
    pub(crate) record: PodRecord,
    pub(crate) state: State,
    /// Why it is not ready, for people.
    pub(crate) why: Option<String>,
    /// `None` while boot or clean-up has it.
    undo: Option<UndoStack>,
    vm: Option<Arc<dyn Vm>>,
    /// Disks of the VM whose writes wait for space on the host.
    full_disks: Option<watch::Receiver<BTreeSet<String>>>,
    /// The VM runs, but its agent has not answered yet.
    unheard: bool,
    pub(crate) live: Option<Live>,
    pub(crate) containers: BTreeMap<ContainerId, Entry>,
    /// Images that records mention which cannot be read.
    kept_images: KeptImages,
    waiters: Waiters,
    boot_cancel: Option<oneshot::Sender<()>>,
    boot_error: Option<SandboxError>,
    /// What the clean-up that runs tells hooks, once containers have ended.
    farewell: Option<watch::Sender<Option<Arc<Farewell>>>>,
    outcome: watch::Sender<Outcome>,
    snapshot: watch::Sender<Arc<Snapshot>>,
    told: Told,
    children: Children,
}

/// What an earlier daemon left of a pod.
pub(crate) struct Remains {
    pub(crate) state: State,
    pub(crate) why: Option<String>,
    pub(crate) undo: UndoStack,
    pub(crate) vm: Option<Arc<dyn Vm>>,
    pub(crate) live: Option<Live>,
    pub(crate) containers: BTreeMap<ContainerId, Entry>,
    pub(crate) kept_images: KeptImages,
}

impl Actor {
    /// A pod that is to be booted.
    pub(crate) fn new(node: Arc<Node>, registry: Weak<Registry>, record: PodRecord) -> (Self, Inbox, Handle) {
        let remains = Remains {
            state: State::Reserved,
            why: None,
            undo: UndoStack::default(),
            vm: None,
            live: None,
            containers: BTreeMap::new(),
            kept_images: KeptImages::default(),
        };
        let (mut actor, mut inbox, handle) = Self::adopt(node, registry, record, remains);
        let (progress, events) = mpsc::channel(BOOT_EVENTS);
        inbox.progress = events;
        let (cancel, cancelled) = oneshot::channel();
        actor.undo = None;
        actor.boot_cancel = Some(cancel);
        let boot = Boot::new(actor.node.clone(), actor.record.clone(), progress);
        let boot = async move { Vital::Boot(Box::new(Box::pin(boot.run(cancelled)).await)) };
        actor.children.vital.spawn(boot);
        (actor, inbox, handle)
    }

    /// A pod of an earlier daemon. Must be called within the runtime.
    pub(crate) fn adopt(
        node: Arc<Node>,
        registry: Weak<Registry>,
        record: PodRecord,
        remains: Remains,
    ) -> (Self, Inbox, Handle) {
        let (requests, requests_in) = mpsc::channel(MAILBOX);
        let (terminate, terminate_in) = mpsc::channel(MAILBOX);
        let (_, progress) = mpsc::channel(1);
        let outcome = if remains.state.is_booting() {
            Outcome::Pending
        } else {
            Outcome::Ready
        };
        let (outcome, outcome_out) = watch::channel(outcome);
        let empty = Snapshot {
            sandbox: view(&record, remains.state, None, json!({})),
            listed: false,
            containers: Vec::new(),
            images: Vec::new(),
            images_complete: true,
        };
        let (snapshot, snapshot_out) = watch::channel(Arc::new(empty));
        let mut actor = Self {
            node,
            registry,
            record,
            state: remains.state,
            why: remains.why,
            undo: Some(remains.undo),
            vm: None,
            full_disks: None,
            unheard: remains.vm.is_some() && remains.live.is_none(),
            live: remains.live,
            containers: remains.containers,
            kept_images: remains.kept_images,
            waiters: Waiters::default(),
            boot_cancel: None,
            boot_error: None,
            farewell: None,
            outcome,
            snapshot,
            told: Told::default(),
            children: Children::default(),
        };
        if let Some(vm) = remains.vm {
            actor.hold(vm);
        }
        if actor.state != State::Reserved {
            let known = actor
                .containers
                .iter()
                .filter_map(|(id, entry)| Some((id.clone(), entry::shown(entry.state.shown())?)));
            actor.told = Told::assume(actor.state == State::Ready, known);
        }
        actor.publish();
        let inbox = Inbox {
            requests: requests_in,
            terminate: terminate_in,
            progress,
        };
        let handle = Handle {
            requests,
            terminate,
            snapshot: snapshot_out,
            outcome: outcome_out,
        };
        (actor, inbox, handle)
    }

    /// Serves the pod until it is removed, or until the daemon stops serving (then the VM goes on without us).
    pub(crate) async fn run(mut self, mut inbox: Inbox) {
        self.resume();
        let mut closing = self.node.closing.subscribe();
        while self.state != State::Removed {
            tokio::select! {
                biased;
                () = ends(&mut closing) => return,
                Some(exit) = self.children.vm.join_next() => self.vm_exited(exit).await,
                asked = inbox.terminate.recv() => match asked {
                    Some(asked) => self.terminate(asked).await,
                    None => return,
                },
                Some(event) = inbox.progress.recv() => self.apply(event).await,
                () = changes(&mut self.full_disks) => self.disks_changed(),
                Some(report) = self.children.vital.join_next() => self.vital(report, &mut inbox).await,
                Some(report) = self.children.work.join_next() => match report {
                    Ok(work) => self.work_done(work).await,
                    Err(error) => self.child_failed(&error),
                },
                asked = inbox.requests.recv() => match asked {
                    Some(asked) => self.request(asked).await,
                    None => return,
                },
            }
        }
    }

    async fn terminate(&mut self, asked: Terminate) {
        let event = match asked {
            Terminate::Stop(reply) => {
                self.waiters.stop.push(reply);
                Event::StopAsked
            }
            Terminate::Remove(reply) => {
                self.waiters.remove.push(reply);
                Event::RemoveAsked
            }
        };
        self.apply(event).await;
    }

    async fn vm_exited(&mut self, exit: Result<VmExit, JoinError>) {
        match exit {
            Ok(exit) => {
                tracing::error!(reason = exit.reason, "VM ended");
                if self.state == State::Ready || self.unheard_vm().is_some() {
                    self.why = Some(format!("its VM ended: {}", exit.reason));
                }
                self.unheard = false;
                self.apply(Event::VmExited).await;
            }
            Err(error) => self.child_failed(&error),
        }
    }

    /// The host's disks have become full, or have space again. The pod stays ready: it goes on where it was.
    fn disks_changed(&mut self) {
        let waiting = self.waiting_disks();
        let before = self.latest().sandbox.info.get(WAITING).is_some();
        match (waiting.is_empty(), before) {
            (false, _) => {
                tracing::error!(disks = ?waiting, "the host has no space for what the pod writes: it waits")
            }
            (true, true) => {
                tracing::info!("the host has space again: the pod goes on");
                self.set_clock();
            }
            (true, false) => {}
        }
        self.publish();
    }

    /// A VM that its driver had to stop has missed the time until now.
    pub(crate) fn set_clock(&mut self) {
        let Some(live) = self.live.clone() else { return };
        self.spawn_work(async move {
            if let Err(error) = live.guest.set_clock(SystemTime::now(), live.deadline).await {
                tracing::warn!(%error, "the guest's clock stays behind");
            }
            Work::Answered
        });
    }

    fn waiting_disks(&self) -> BTreeSet<String> {
        let full = self.vm.as_ref().and(self.full_disks.as_ref());
        full.map(|full| full.borrow().clone()).unwrap_or_default()
    }

    async fn vital(&mut self, report: Result<Vital, JoinError>, inbox: &mut Inbox) {
        match report {
            Ok(Vital::Boot(end)) => {
                // What the boot reported on its way comes first.
                while let Ok(event) = inbox.progress.try_recv() {
                    self.apply(event).await;
                }
                self.boot_ended(*end).await;
            }
            Ok(Vital::CleanUp {
                undo,
                failures,
                deep,
                ticket,
            }) => {
                self.undo = Some(undo);
                self.cleaned(failures, deep).await;
                drop(ticket);
            }
            // A panic in boot or clean-up: what it held is unknown, so everything is tried again.
            Err(error) => {
                self.child_failed(&error);
                self.undo = Some(UndoStack::full(&self.record));
                let what = SandboxError::io("finish a task of the pod sandbox")(std::io::Error::other(error));
                let booting = matches!(
                    self.state,
                    State::Stopping {
                        phase: sandbox::Phase::Boot,
                        ..
                    }
                );
                if self.state.is_booting() || booting {
                    self.boot_cancel = None;
                    self.boot_error = Some(what);
                    self.apply(Event::BootFailed).await;
                } else {
                    self.cleaned(vec![what], false).await;
                }
            }
        }
    }

    async fn boot_ended(&mut self, end: BootEnd) {
        self.boot_cancel = None;
        self.record = end.record;
        self.undo = Some(end.undo);
        match end.result {
            Ok(booted) => {
                let live = Live::new(&self.node, &self.record, booted.vm.clone(), booted.guest);
                self.live = Some(live);
                self.hold(booted.vm);
                self.apply(Event::BootDone).await;
                drop(booted.ticket);
            }
            Err(error) => {
                self.vm = end.vm;
                self.why = Some(error.chain());
                self.boot_error = Some(error);
                self.apply(Event::BootFailed).await;
            }
        }
    }

    async fn cleaned(&mut self, failures: Vec<SandboxError>, deep: bool) {
        if failures.is_empty() {
            self.vm = None;
            self.record.ips.clear();
            return self.apply(Event::Cleaned { deep }).await;
        }
        let failures: Vec<String> = failures.iter().map(SandboxError::chain).collect();
        self.why = Some(format!("clean-up failed: {}", failures.join("; ")));
        if let Some(SandboxError::Boot { undo, .. }) = &mut self.boot_error {
            undo.clone_from(&failures);
        }
        let error = Arc::new(SandboxError::CleanUp {
            id: self.record.id.0.clone(),
            failures,
        });
        self.apply(Event::CleanUpFailed).await;
        for reply in self.waiters.stop.drain(..).chain(self.waiters.remove.drain(..)) {
            answer(reply, Err(SandboxError::Shared(error.clone())));
        }
    }

    pub(crate) async fn apply(&mut self, event: Event) {
        let before = self.state;
        let (next, effects) = sandbox::step(before, event);
        self.state = next;
        if next != before {
            tracing::info!(from = ?before, to = ?next, "pod sandbox");
        }
        for effect in effects {
            match effect {
                Effect::CancelBoot => self.boot_cancel = None,
                Effect::KillContainers => {
                    let keep =
                        !matches!(self.state, State::Stopping { goal, .. } if goal != sandbox::Goal::Stop);
                    self.end_containers(&Fate::Killed, keep).await;
                }
                Effect::LoseContainers => {
                    let why = self.why.clone().unwrap_or_default();
                    self.end_containers(&Fate::Lost(why), true).await;
                }
                Effect::CleanUp { deep } => self.clean_up(deep),
                Effect::Answer | Effect::AnswerFailure => self.answer(),
            }
        }
        self.publish();
        if let Some(promise) = self.farewell.take() {
            promise.send_replace(Some(Arc::new(Farewell {
                pod: self.shown_pod(),
                containers: self.container_views(),
            })));
        }
    }

    /// Ends what containers do, and the containers.
    async fn end_containers(&mut self, fate: &Fate, keep_records: bool) {
        self.live = None;
        self.children.work.abort_all();
        self.containers_ended(fate, keep_records).await;
    }

    fn clean_up(&mut self, deep: bool) {
        let (node, mut record, vm) = (self.node.clone(), self.record.clone(), self.vm.clone());
        self.children.vm.abort_all();
        let mut undo = self.undo.take().unwrap_or_default();
        let (promise, mut farewell) = watch::channel(None);
        self.farewell = Some(promise);
        self.children.vital.spawn(async move {
            let mut failures = undo
                .unwind(&node, &record, vm.as_ref(), deep, Some(&mut farewell))
                .await;
            if failures.is_empty() && !deep {
                // Also of a boot that was broken off before its first record.
                undo = UndoStack::record();
                record.phase = PodPhase::Stopped;
                record.vm = None;
                record.ips.clear();
                failures.extend(node.journal.write_pod(&record).await.err());
            }
            let mut ticket = None;
            if failures.is_empty()
                && deep
                && let Some(farewell) = undo::kept(&mut farewell).await
            {
                ticket = Some(node.hooks.remove_pod(&farewell.pod, &farewell.containers).await);
            }
            Vital::CleanUp {
                undo,
                failures,
                deep,
                ticket,
            }
        });
    }

    /// Tells everybody whose wish has come to its end; what they are told fits what they see.
    fn answer(&mut self) {
        if self.state == State::Removed
            && let Some(registry) = self.registry.upgrade()
        {
            registry.forget(&self.record.id);
        }
        if matches!(*self.outcome.borrow(), Outcome::Pending) {
            let outcome = if self.state == State::Ready {
                Outcome::Ready
            } else {
                let error = self.boot_error.take().unwrap_or_else(|| self.cancelled("boot"));
                Outcome::Failed(Arc::new(error))
            };
            self.show(true);
            self.outcome.send_replace(outcome);
        }
        self.publish();
        if matches!(self.state, State::Stopped | State::Removed) {
            self.waiters
                .stop
                .drain(..)
                .for_each(|reply| answer(reply, Ok(())));
        }
        if self.state == State::Removed {
            self.waiters
                .remove
                .drain(..)
                .for_each(|reply| answer(reply, Ok(())));
        }
    }

    pub(crate) fn cancelled(&self, what: &str) -> SandboxError {
        SandboxError::Cancelled {
            what: format!("{what} of pod sandbox {}", self.record.id.0),
            why: "the pod sandbox was stopped",
        }
    }

    /// The VM whose agent is still to be heard.
    pub(crate) fn unheard_vm(&self) -> Option<Arc<dyn Vm>> {
        let waits = self.unheard && self.state == State::Broken && self.live.is_none();
        self.vm.clone().filter(|_| waits)
    }

    fn hold(&mut self, vm: Arc<dyn Vm>) {
        let watched = vm.clone();
        self.children.vm.spawn(async move { watched.wait().await });
        let mut full = vm.full_disks();
        // Also what was so before anybody looked.
        full.mark_changed();
        self.full_disks = Some(full);
        self.vm = Some(vm);
    }

    pub(crate) fn spawn_work(&mut self, work: impl Future<Output = Work> + Send + 'static) {
        use tracing::Instrument;
        self.children
            .work
            .spawn(work.instrument(tracing::Span::current()));
    }

    pub(crate) fn work_in_progress(&self) -> usize {
        self.children.work.len()
    }

    #[expect(clippy::unused_self, reason = "reads as what the pod does")]
    fn child_failed(&self, error: &JoinError) {
        if error.is_panic() {
            tracing::error!(%error, "task of the pod sandbox panicked");
        }
    }

    /// The pod as it was shown last.
    pub(crate) fn latest(&self) -> Arc<Snapshot> {
        self.snapshot.borrow().clone()
    }

    /// Shows the pod as it is now.
    pub(crate) fn publish(&mut self) {
        // Until RunPodSandbox has answered with the id, nobody could have it, and kubelet takes an unknown pod for garbage.
        let listed = !matches!(*self.outcome.borrow(), Outcome::Pending);
        self.show(listed);
    }

    fn show(&mut self, listed: bool) {
        let mut info = self.record.info.clone();
        let waiting = self.waiting_disks();
        if !waiting.is_empty() && info.is_object() {
            info[WAITING] = json!(waiting);
        }
        let snapshot = Snapshot {
            sandbox: view(&self.record, self.state, self.why.as_deref(), info),
            listed,
            containers: self.container_views(),
            images: self
                .containers
                .values()
                .filter(|entry| entry.state != container::State::Removed)
                .map(|entry| entry.record.spec.image.id.clone())
                .chain(self.kept_images.ids.iter().cloned())
                .collect(),
            images_complete: self.kept_images.complete,
        };
        let snapshot = Arc::new(snapshot);
        self.snapshot.send_replace(snapshot.clone());
        if listed {
            self.tell(&snapshot);
        }
    }

    /// Tells listeners what has happened since they were told last.
    fn tell(&mut self, snapshot: &Snapshot) {
        let gone = self.state == State::Removed;
        let steps = if gone {
            self.told.end()
        } else {
            self.told.advance(snapshot.sandbox.state, &snapshot.containers)
        };
        if steps.is_empty() {
            return;
        }
        let picture = Arc::new(Picture {
            sandbox: snapshot.sandbox.clone(),
            containers: if gone {
                Vec::new()
            } else {
                snapshot.containers.clone()
            },
        });
        let at = std::time::SystemTime::now();
        let events: Vec<_> = steps
            .into_iter()
            .map(|(container, change)| events::Event {
                subject: container.map_or_else(|| self.record.id.0.clone(), |id| id.0),
                change,
                at,
                picture: picture.clone(),
            })
            .collect();
        self.node.listeners.tell(&events);
    }
}

/// Waits until disks become full or have space again.
async fn changes(full: &mut Option<watch::Receiver<BTreeSet<String>>>) {
    if let Some(receiver) = full
        && receiver.changed().await.is_ok()
    {
        return;
    }
    // The VM is gone, or its driver cannot tell.
    *full = None;
    std::future::pending().await
}

/// Waits until the daemon stops serving.
async fn ends(closing: &mut watch::Receiver<bool>) {
    if closing.wait_for(|closing| *closing).await.is_err() {
        tracing::debug!("the node is gone");
    }
}

fn view(record: &PodRecord, state: State, why: Option<&str>, mut info: serde_json::Value) -> SandboxView {
    if !info.is_object() {
        info = json!({});
    }
    info["state"] = json!(state.as_str());
    if let Some(why) = why.filter(|_| state != State::Ready) {
        info["why"] = json!(why);
    }
    let ready = state == State::Ready;
    SandboxView {
        id: record.id.clone(),
        spec: record.spec.clone(),
        state: if ready {
            SandboxState::Ready
        } else {
            SandboxState::NotReady
        },
        created_at: record.created_at,
        ips: record.ips.clone(),
        info,
    }
}

/// Answers a caller, who may have gone away.
pub(crate) fn answer<T>(reply: Reply<T>, result: Result<T, SandboxError>) {
    if reply.send(result).is_err() {
        tracing::debug!("the caller is gone");
    }
}
