//! A VM that runs and whose agent did not answer the new daemon: asked again and again, until it answers, the VM ends, or the pod is stopped.
//!
//! ```text
//! Broken (VM runs, containers unknown) -- the agent answers --> Ready, containers as the guest has them
//! ```

use std::{sync::Arc, time::Duration};

use caisson_guest::GuestClient;
use caisson_hypervisor::Vm;
use caisson_lifecycle::sandbox::Event;

use crate::{
    ContainerId, SandboxError,
    actor::Actor,
    container::{Live, discard},
    entry::{Entry, Work},
    guest,
    recovery::{self, RECONNECT_DEADLINE},
};

/// First pause between two attempts; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// An agent that has answered, and what it has.
pub(crate) struct Reached {
    guest: GuestClient,
    known: Vec<guest::ContainerInfo>,
}

/// Asks an agent who it is and what it has, within `limit` for each.
pub(crate) async fn attempt(vm: &Arc<dyn Vm>, limit: Duration) -> Result<Reached, SandboxError> {
    let (guest, _) = GuestClient::connect(vm.vsock(), limit)
        .await
        .map_err(SandboxError::guest("reach its agent"))?;
    let known = guest
        .list_containers(limit)
        .await
        .map_err(SandboxError::guest("list its containers"))?;
    Ok(Reached { guest, known })
}

impl Reached {
    pub(crate) fn into_parts(self) -> (GuestClient, Vec<guest::ContainerInfo>) {
        (self.guest, self.known)
    }
}

/// Ends the commands that an earlier daemon has run: nobody reads what they print, and nobody waits for them.
pub(crate) async fn end_commands(live: &Live, known: &[guest::ContainerInfo]) {
    for info in known {
        for exec in &info.exec_ids {
            let ended = live
                .guest
                .remove_exec(&info.container_id, exec, live.deadline)
                .await;
            match ended {
                Ok(()) => {
                    tracing::info!(
                        container.id = info.container_id,
                        exec.id = exec,
                        "command of an earlier daemon ended"
                    );
                }
                Err(error) => {
                    tracing::warn!(container.id = info.container_id, exec.id = exec, %error, "command of an earlier daemon not ended");
                }
            }
        }
    }
}

impl Actor {
    /// Begins to ask again, when there is a VM that does not answer.
    pub(crate) fn seek_agent(&mut self) {
        let Some(vm) = self.unheard_vm() else { return };
        let limit = RECONNECT_DEADLINE.min(self.node.config.boot_deadline);
        self.spawn_work(async move {
            let mut pause = FIRST_PAUSE;
            loop {
                tokio::time::sleep(pause).await;
                match Box::pin(attempt(&vm, limit)).await {
                    Ok(reached) => return Work::Reached(Box::new(reached)),
                    Err(error) => {
                        pause = (pause * 2).min(LONGEST_PAUSE);
                        tracing::debug!(error = %error.chain(), ?pause, "agent still silent");
                    }
                }
            }
        });
    }

    /// Takes the pod up where the agent has it.
    pub(crate) async fn reached(&mut self, reached: Reached) {
        let Some(vm) = self.unheard_vm() else { return };
        let (guest, known) = reached.into_parts();
        let live = Live::new(&self.node, &self.record, vm, guest);
        for entry in self.containers.values() {
            live.disks.resume(&entry.record.id, &entry.record.spec);
        }
        self.join(&known).await;
        let strangers = self.strangers(&known);
        self.live = Some(live.clone());
        self.why = None;
        // It may have been silent because its driver had to stop it.
        self.set_clock();
        self.apply(Event::AgentFound).await;
        for id in self.containers.keys().cloned().collect::<Vec<_>>() {
            self.take_up(&live, &id);
        }
        let volumes = recovery::volumes_of(self.containers.values());
        self.spawn_work(async move {
            live.volumes.resume(&live.guest, &volumes).await;
            end_commands(&live, &known).await;
            for id in strangers {
                discard(&live, &id, &[]).await;
            }
            Work::Answered
        });
    }

    /// Brings each container to where the guest has it.
    async fn join(&mut self, known: &[guest::ContainerInfo]) {
        for id in self.containers.keys().cloned().collect::<Vec<_>>() {
            let Some(entry) = self.containers.get_mut(&id) else {
                continue;
            };
            let mut record = entry.record.clone();
            let changed = recovery::join(&mut record, known);
            let (_, joined) = recovery::as_recorded(record);
            entry.record = joined.record;
            entry.state = joined.state;
            if matches!(entry.state, caisson_lifecycle::container::State::Exited(_)) {
                entry.ended.send_replace(true);
            }
            if changed && let Err(error) = self.persist(&id).await {
                tracing::error!(container.id = %id.0, error = %error.chain(), "state of the container is not on disk");
            }
        }
    }

    /// Containers of the guest that nobody knows any more: they were removed while it was silent.
    fn strangers(&self, known: &[guest::ContainerInfo]) -> Vec<ContainerId> {
        known
            .iter()
            .map(|info| ContainerId(info.container_id.clone()))
            .filter(|id| {
                !self.containers.contains_key(id) && !self.node.journal.knows_container(&self.record.id, id)
            })
            .collect()
    }

    /// Goes on with the log of a running container, and waits for its end.
    fn take_up(&mut self, live: &Live, id: &ContainerId) {
        let running =
            |entry: &Entry| matches!(entry.state, caisson_lifecycle::container::State::Running { .. });
        if !self.containers.get(id).is_some_and(running) {
            return;
        }
        let Some(output) = self.output(id) else { return };
        let (live, id) = (live.clone(), id.clone());
        self.spawn_work(async move {
            let log = match output.copy(&live, &id).await {
                Ok(log) => Some(log),
                Err(error) => {
                    tracing::error!(container.id = %id.0, error = %error.chain(), "log does not go on");
                    None
                }
            };
            Work::TakenUp { id, log }
        });
    }

    pub(crate) fn taken_up(&mut self, id: &ContainerId, log: Option<Arc<caisson_guest::logs::ContainerLog>>) {
        if let Some(entry) = self.containers.get_mut(id) {
            entry.log = log;
            self.watch(id);
        }
    }
}
