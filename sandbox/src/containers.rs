//! The containers of a pod, as its actor keeps them: what is asked of them, what their tasks report, how they are shown.

use std::{sync::Arc, time::SystemTime};

use caisson_lifecycle::{
    container::{Effect, Event, State, step},
    exit, sandbox,
};

use crate::{
    ContainerId, SandboxError,
    actor::{Actor, answer},
    container::{self, Ending, Output, Started, Stop},
    entry::{Entry, Fate, Made, Work, phase, shown},
    hooks::{Moment, Ticket},
    journal::{ContainerPhase, ContainerRecord},
    registry::{Reply, Request},
    spec::ContainerSpec,
    streams::Reach,
    view::{ContainerState, ContainerView},
};

/// Tasks for containers that may run at a time in one pod.
const WORK_LIMIT: usize = 512;

impl Actor {
    /// Takes up what an earlier daemon began: running containers are watched again.
    pub(crate) fn resume(&mut self) {
        let running: Vec<_> = self
            .containers
            .values()
            .filter(|entry| matches!(entry.state, State::Running { .. }))
            .map(|entry| entry.record.id.clone())
            .collect();
        for id in running {
            self.watch(&id);
        }
        self.seek_agent();
    }

    pub(crate) async fn request(&mut self, asked: Request) {
        match asked {
            Request::Create { spec, reply } => self.create(*spec, reply).await,
            Request::Start { id, reply } => self.start(&id, reply),
            Request::Stop { id, grace, reply } => self.stop(&id, grace, reply),
            Request::Remove { id, reply } => self.remove(&id, reply),
            Request::Exec { id, exec, reply } => {
                let live = match self.running(&id, "run a command in") {
                    Ok(_) => self.live.clone(),
                    Err(error) => return answer(reply, Err(error)),
                };
                let Some(live) = live else {
                    return answer(reply, Err(self.no_guest("run a command in", &id)));
                };
                let mut reply = reply;
                self.spawn_work(async move {
                    let command = Box::pin(container::exec(live, id.clone(), exec));
                    tokio::select! {
                        result = command => answer(reply, result),
                        // Nobody waits for what it prints; dropped, it is killed in the guest.
                        () = reply.closed() => {
                            tracing::debug!(container.id = %id.0, "command given up with its caller");
                        }
                    }
                    Work::Answered
                });
            }
            Request::Update { id, change, reply } => self.update(&id, *change, reply).await,
            Request::Resize { change, reply } => self.resize(change, reply),
            Request::Usage { ids, limit, reply } => self.usage(ids, limit, reply),
            Request::ReopenLog { id, reply } => {
                let log = match self.running(&id, "reopen the log of") {
                    Ok(entry) => entry.log.clone(),
                    Err(error) => return answer(reply, Err(error)),
                };
                self.spawn_work(async move {
                    let result = match log {
                        Some(log) => log.reopen().await.map_err(SandboxError::guest(format!(
                            "reopen the log of container {}",
                            id.0
                        ))),
                        None => Ok(()),
                    };
                    answer(reply, result);
                    Work::Answered
                });
            }
            Request::Reach { id, reply } => answer(reply, self.reach(&id)),
            Request::Guest { reply } => {
                let guest = self.live.as_ref().map(|live| live.guest.clone());
                let missing = || SandboxError::WrongState {
                    what: format!("reach pod sandbox {}", self.record.id.0),
                    state: self.state.as_str().into(),
                };
                answer(reply, guest.ok_or_else(missing));
            }
        }
        self.publish();
    }

    /// How a running container is reached.
    fn reach(&self, id: &ContainerId) -> Result<Reach, SandboxError> {
        let entry = self.running(id, "open streams of")?;
        let live = self
            .live
            .as_ref()
            .ok_or_else(|| self.no_guest("open streams of", id))?;
        let spec = &entry.record.spec.guest;
        Ok(Reach {
            id: id.clone(),
            guest: live.guest.clone(),
            log: entry.log.clone(),
            ended: entry.ended.subscribe(),
            stdin: spec.stdin,
            stdin_once: spec.stdin_once,
            terminal: spec.process.as_ref().is_some_and(|process| process.terminal),
            deadline: live.deadline,
        })
    }

    async fn create(&mut self, spec: ContainerSpec, reply: Reply<ContainerId>) {
        let same = |entry: &&mut Entry| {
            entry.record.spec.name == spec.name
                && entry.record.spec.attempt == spec.attempt
                && entry.state != State::Removed
        };
        if let Some(entry) = self.containers.values_mut().find(same) {
            let id = entry.record.id.clone();
            return match entry.state {
                State::Creating => entry.creating.push(reply),
                State::Created => answer(reply, Ok(id)),
                _ => answer(
                    reply,
                    Err(SandboxError::NameTaken {
                        name: format!("container name {:?} attempt {}", spec.name, spec.attempt),
                        id: format!("container {}", id.0),
                    }),
                ),
            };
        }
        let Some(live) = self.live.clone().filter(|_| self.state == sandbox::State::Ready) else {
            let what = format!(
                "create container {:?} in pod sandbox {}",
                spec.name, self.record.id.0
            );
            return answer(
                reply,
                Err(SandboxError::WrongState {
                    what,
                    state: self.state.as_str().into(),
                }),
            );
        };
        if self.work_in_progress() >= WORK_LIMIT {
            return answer(reply, Err(SandboxError::Busy(self.record.id.0.clone())));
        }
        if !spec.cpuset.is_empty()
            && let Err(error) = self.pin_with(None, &spec.cpuset).await
        {
            return answer(reply, Err(error));
        }
        let id = ContainerId(crate::new_id());
        let record = ContainerRecord {
            id: id.clone(),
            volumes: container::volume_ids(&id, &spec),
            spec,
            created_at: SystemTime::now(),
            phase: ContainerPhase::Created,
            user: None,
        };
        let mut entry = Entry::new(record, State::Creating);
        entry.creating.push(reply);
        let subject = self.subject(&entry);
        self.containers.insert(id.clone(), entry);
        self.spawn_work(async move {
            let made = Box::pin(subject.make(live)).await;
            Work::Made { id, made }
        });
    }

    fn start(&mut self, id: &ContainerId, reply: Reply<()>) {
        let output = self.output(id);
        let live = self.live.clone();
        let subject = self.subject_of(id);
        let (Some(entry), Some(subject)) = (self.containers.get_mut(id), subject) else {
            return answer(reply, Err(SandboxError::NoContainer(id.0.clone())));
        };
        let (Some(live), Some(output)) = (live, output) else {
            return answer(reply, Err(self.no_guest("start", id)));
        };
        if !entry.step(Event::StartAsked).contains(&Effect::Start) {
            return answer(reply, Err(entry.wrong_state("start")));
        }
        entry.starting = Some(reply);
        let id = id.clone();
        self.spawn_work(async move {
            let result = Box::pin(subject.start(live, output)).await;
            Work::Started { id, result }
        });
    }

    fn stop(&mut self, id: &ContainerId, grace: std::time::Duration, reply: Reply<()>) {
        let live = self.live.clone();
        let Some(entry) = self.containers.get_mut(id) else {
            return answer(reply, Ok(()));
        };
        match entry.state.shown() {
            State::Running { .. } => {}
            State::Starting => return answer(reply, Err(entry.wrong_state("stop"))),
            _ => return answer(reply, Ok(())),
        }
        let Some(live) = live else {
            return answer(reply, Err(self.no_guest("stop", id)));
        };
        let signal = (entry.stops == 0).then_some(entry.record.spec.stop_signal);
        let stop = Stop {
            signal,
            grace,
            ended: entry.ended.subscribe(),
        };
        entry.stops += 1;
        let id = id.clone();
        self.spawn_work(async move {
            let result = Box::pin(container::stop(live, id.clone(), stop)).await;
            Work::StopDone { id, result, reply }
        });
    }

    fn remove(&mut self, id: &ContainerId, reply: Reply<()>) {
        let live = self.live.clone();
        let state = self.state;
        let subject = self.subject_of(id);
        let (Some(entry), Some(subject)) = (self.containers.get_mut(id), subject) else {
            return answer(reply, Ok(()));
        };
        // A guest that is being taken apart is not asked; its container is gone with it.
        if live.is_none() && state == sandbox::State::Ready {
            return answer(reply, Err(self.no_guest("remove", id)));
        }
        let effects = entry.step(Event::RemoveAsked);
        if effects.contains(&Effect::Refuse) {
            return answer(reply, Err(entry.wrong_state("remove")));
        }
        entry.removing.push(reply);
        if effects.contains(&Effect::Remove) {
            let volumes = entry.record.volumes.clone();
            self.spawn_work(async move { Box::pin(subject.remove(live, volumes)).await });
        }
    }

    fn running(&self, id: &ContainerId, verb: &str) -> Result<&Entry, SandboxError> {
        let entry = self
            .containers
            .get(id)
            .ok_or_else(|| SandboxError::NoContainer(id.0.clone()))?;
        if !matches!(entry.state, State::Running { .. }) {
            return Err(entry.wrong_state(verb));
        }
        if self.work_in_progress() >= WORK_LIMIT {
            return Err(SandboxError::Busy(self.record.id.0.clone()));
        }
        Ok(entry)
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.work_in_progress() >= WORK_LIMIT
    }

    pub(crate) fn no_guest(&self, verb: &str, id: &ContainerId) -> SandboxError {
        SandboxError::WrongState {
            what: format!("{verb} container {} of pod sandbox {}", id.0, self.record.id.0),
            state: format!("in a pod sandbox that is {}", self.state.as_str()),
        }
    }

    pub(crate) fn output(&self, id: &ContainerId) -> Option<Output> {
        let entry = self.containers.get(id)?;
        Some(Output {
            log: entry.record.spec.log_file(&self.record.spec.log_directory),
            checkpoint: self.node.journal.log_checkpoint(&self.record.id, id),
            terminal: entry
                .record
                .spec
                .guest
                .process
                .as_ref()
                .is_some_and(|process| process.terminal),
        })
    }

    /// Follows a running container to its end.
    pub(crate) fn watch(&mut self, id: &ContainerId) {
        let Some(live) = self.live.clone() else { return };
        let Some(entry) = self.containers.get(id) else {
            return;
        };
        let ending = Ending {
            log: entry.log.clone(),
            termination_file: entry.record.spec.termination_file.clone(),
            started_at: entry.state.started_at(),
        };
        let id = id.clone();
        self.spawn_work(async move {
            let exit = Box::pin(container::watch_end(live, id.clone(), ending)).await;
            Work::Ended { id, exit }
        });
    }

    pub(crate) async fn work_done(&mut self, work: Work) {
        match work {
            Work::Made { id, made } => self.made(&id, made).await,
            Work::Announced { id, reply } => self.announced(&id, reply),
            Work::Started { id, result } => self.started(&id, result).await,
            Work::Ended { id, exit } => {
                tracing::info!(container.id = %id.0, code = exit.code, reason = exit.reason.as_str(), "container ended");
                self.advance(&id, Event::Ended(exit)).await;
                if let Some(entry) = self.containers.get(&id) {
                    self.pin_without(&entry.record.spec.cpuset).await;
                }
                self.publish();
                self.tell_then(&id, Moment::Ended, || {});
            }
            Work::StopDone { id, result, reply } => {
                if let Some(entry) = self.containers.get_mut(&id) {
                    entry.stops = entry.stops.saturating_sub(1);
                }
                if result.is_ok() {
                    self.tell_then(&id, Moment::Ended, || answer(reply, Ok(())));
                } else {
                    answer(reply, result);
                }
            }
            Work::Removed { id, result } => self.removed(&id, result).await,
            Work::Resized {
                after,
                cpuset,
                result,
                reply,
            } => self.resized(after, cpuset, result, reply).await,
            Work::Updated { id, result } => self.updated(&id, result).await,
            Work::Reached(reached) => self.reached(*reached).await,
            Work::TakenUp { id, log } => self.taken_up(&id, log),
            Work::Answered => {}
        }
        self.publish();
    }

    async fn made(&mut self, id: &ContainerId, Made { spec, result }: Made) {
        if let (Some(entry), Some(spec)) = (self.containers.get_mut(id), spec) {
            entry.record.volumes = container::volume_ids(id, &spec);
            entry.record.spec = *spec;
        }
        let had_ticket = result.is_ok();
        let (result, ticket) = match result {
            // Disks and the file server may be new: they are remembered before anybody relies on them.
            Ok(ticket) => (self.remember_attached().await, Some(ticket)),
            Err(error) => (Err(error), None),
        };
        let result = match result {
            Ok(()) => {
                self.advance(id, Event::Made).await;
                self.persist(id).await
            }
            Err(error) => Err(error),
        };
        let subject = self.subject_of(id);
        let entry = self.containers.get_mut(id);
        let (waiting, volumes) = entry
            .map(|entry| (std::mem::take(&mut entry.creating), entry.record.volumes.clone()))
            .unwrap_or_default();
        match result {
            Ok(()) => {
                tracing::info!(container.id = %id.0, "container created");
                self.publish();
                drop(ticket);
                let told = id.clone();
                self.tell_then(id, Moment::Created, move || {
                    waiting
                        .into_iter()
                        .for_each(|reply| answer(reply, Ok(told.clone())));
                });
            }
            Err(error) => {
                if let Some(entry) = self.containers.remove(id) {
                    self.pin_without(&entry.record.spec.cpuset).await;
                }
                self.publish();
                drop(ticket);
                if let Some(subject) = subject.filter(|_| had_ticket) {
                    self.tell_gone(subject);
                }
                if let Some(live) = self.live.clone() {
                    let id = id.clone();
                    self.spawn_work(async move {
                        Box::pin(container::discard(&live, &id, &volumes)).await;
                        Work::Answered
                    });
                }
                let error = Arc::new(error);
                waiting
                    .into_iter()
                    .for_each(|reply| answer(reply, Err(error.clone().into())));
            }
        }
    }

    async fn remember_attached(&mut self) -> Result<(), SandboxError> {
        let Some(live) = &self.live else { return Ok(()) };
        let (now, file_server) = (Some(live.vm.record()), live.volumes.file_server());
        let socket_server = live.volumes.socket_server();
        let known = self.record.vm == now
            && self.record.file_server == file_server
            && self.record.socket_server == socket_server;
        if !known {
            self.record.vm = now;
            self.record.file_server = file_server;
            self.record.socket_server = socket_server;
            self.node.journal.write_pod(&self.record).await?;
        }
        Ok(())
    }

    async fn started(&mut self, id: &ContainerId, result: Result<Box<Started>, SandboxError>) {
        let Some(entry) = self.containers.get_mut(id) else {
            return;
        };
        let reply = entry.starting.take();
        let error = match result {
            Ok(started) => {
                let Started { reply: told, log } = *started;
                entry.log = Some(log);
                entry.record.user = Some(container::user(&told));
                let at = container::start_time(&told);
                self.advance(id, Event::Started { at }).await;
                self.publish();
                return self.tell_started(id, reply);
            }
            Err(error) => {
                let message = error.chain();
                self.advance(
                    id,
                    Event::StartFailed {
                        at: SystemTime::now(),
                        message,
                    },
                )
                .await;
                error
            }
        };
        self.publish();
        self.tell_then(id, Moment::Ended, move || {
            if let Some(reply) = reply {
                answer(reply, Err(error));
            }
        });
    }

    async fn removed(&mut self, id: &ContainerId, result: Result<Ticket, SandboxError>) {
        let (mut result, ticket) = match result {
            Ok(ticket) => (Ok(()), Some(ticket)),
            Err(error) => (Err(error), None),
        };
        if result.is_ok() {
            // Here and not in the task: the exit that removal brings about may be written meanwhile.
            result = self.node.journal.delete_container(&self.record.id, id).await;
        }
        // Its disks may be gone with it. The slots are asked of the hypervisor after a restart, so this is no reason to fail.
        if let Err(error) = self.remember_attached().await {
            tracing::warn!(container.id = %id.0, error = %error.chain(), "disks of the VM are not on disk");
        }
        let event = if result.is_ok() {
            Event::Removed
        } else {
            Event::RemoveFailed
        };
        let Some(entry) = self.containers.get_mut(id) else {
            return;
        };
        let effects = entry.step(event);
        let waiting = std::mem::take(&mut entry.removing);
        if effects.contains(&Effect::Forget) {
            entry.ended.send_replace(true);
            let (changes, cpuset) = (
                std::mem::take(&mut entry.changes),
                entry.record.spec.cpuset.clone(),
            );
            self.containers.remove(id);
            self.pin_without(&cpuset).await;
            changes.into_iter().for_each(|change| {
                answer(change.reply, Err(SandboxError::NoContainer(id.0.clone())));
            });
        }
        self.publish();
        drop(ticket);
        let result = result.map_err(Arc::new);
        waiting
            .into_iter()
            .for_each(|reply| answer(reply, result.clone().map_err(SandboxError::from)));
    }

    /// Moves a container on; a new state is on disk before it is shown. A journal that fails is no reason to hide an exit.
    async fn advance(&mut self, id: &ContainerId, event: Event) {
        let Some(entry) = self.containers.get_mut(id) else {
            return;
        };
        let (next, effects) = step(entry.state.clone(), event.clone());
        if effects.contains(&Effect::Persist) && !matches!(next.shown(), State::Created) {
            entry.record.phase = phase(&next);
            if let Err(error) = self.persist(id).await {
                tracing::error!(container.id = %id.0, error = %error.chain(), "state of the container is not on disk");
            }
        }
        if let Some(entry) = self.containers.get_mut(id) {
            entry.step(event);
        }
    }

    pub(crate) async fn persist(&self, id: &ContainerId) -> Result<(), SandboxError> {
        match self.containers.get(id) {
            Some(entry) => {
                self.node
                    .journal
                    .write_container(&self.record.id, &entry.record)
                    .await
            }
            None => Ok(()),
        }
    }

    /// Every container ends with its pod. Whoever waits for one is told.
    pub(crate) async fn containers_ended(&mut self, fate: &Fate, keep_records: bool) {
        let now = SystemTime::now();
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            let subject = self.subject_of(&id);
            let Some(entry) = self.containers.get_mut(&id) else {
                continue;
            };
            let started_at = entry.state.started_at();
            let exit = match fate {
                Fate::Killed => exit::killed(started_at, now),
                Fate::Lost(why) => exit::vm_gone(started_at, now, why),
            };
            let (creating, starting) = (std::mem::take(&mut entry.creating), entry.starting.take());
            let removing = std::mem::take(&mut entry.removing);
            let changes = std::mem::take(&mut entry.changes);
            let (created_only, was_removing) = (
                entry.state == State::Creating,
                matches!(entry.state, State::Removing { .. }),
            );
            if was_removing {
                entry.step(Event::RemoveFailed);
            }
            if created_only {
                entry.step(Event::MakeFailed);
                self.containers.remove(&id);
                if let Some(subject) = subject {
                    self.tell_gone(subject);
                }
            } else {
                let persist = entry.step(Event::Ended(exit)).contains(&Effect::Persist);
                entry.record.phase = phase(&entry.state);
                if persist
                    && keep_records
                    && let Err(error) = self.persist(&id).await
                {
                    tracing::error!(container.id = %id.0, error = %error.chain(), "state of the container is not on disk");
                }
                // When the pod is stopped, hooks hear of it once its VM is gone.
                if matches!(fate, Fate::Lost(_)) {
                    self.tell_then(&id, Moment::Ended, || {});
                }
            }
            creating
                .into_iter()
                .for_each(|reply| answer(reply, Err(self.cancelled("container creation"))));
            starting
                .into_iter()
                .for_each(|reply| answer(reply, Err(self.cancelled("container start"))));
            changes
                .into_iter()
                .for_each(|change| answer(change.reply, Err(self.cancelled("container update"))));
            removing
                .into_iter()
                .for_each(|reply| answer(reply, Err(self.cancelled("container removal"))));
        }
    }

    fn shown(&self, state: &State) -> Option<ContainerState> {
        let shown = shown(state)?;
        // Its VM may run, but nobody hears of it.
        let unheard = self.live.is_none() && self.state == sandbox::State::Broken;
        let ended = matches!(shown, ContainerState::Exited { .. });
        Some(if unheard && !ended {
            ContainerState::Unknown
        } else {
            shown
        })
    }

    pub(crate) fn container_views(&self) -> Vec<ContainerView> {
        self.containers
            .values()
            .filter_map(|entry| {
                let state = self.shown(entry.state.shown())?;
                Some(self.view_of(entry, state))
            })
            .collect()
    }

    /// A container; `otherwise` when it is in no state that is shown.
    pub(crate) fn view_of(&self, entry: &Entry, otherwise: ContainerState) -> ContainerView {
        ContainerView {
            id: entry.record.id.clone(),
            sandbox_id: self.record.id.clone(),
            spec: entry.record.spec.clone(),
            state: self.shown(entry.state.shown()).unwrap_or(otherwise),
            created_at: entry.record.created_at,
            log_path: entry.record.spec.log_file(&self.record.spec.log_directory),
            user: entry.record.user.clone(),
        }
    }
}
