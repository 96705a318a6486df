//! Changes of limits and questions for usage, as the pod's actor serves them.
//!
//! One change of a container at a time, in the order they were asked: each is worked out from what the one before has left. The record is
//! written after the guest has taken the change, so what is remembered never promises more than there is.

use crate::{
    ContainerId, SandboxError,
    actor::{Actor, answer},
    charged,
    container::Live,
    cpuset::Cpuset,
    entry::{Change, Work},
    grow::{Room, grow},
    guest,
    journal::blocking,
    limits::{self, LimitChange, PodLimitChange},
    registry::Reply,
    spec::PodLimits,
    usage::{Readings, nanos},
};
use caisson_lifecycle::{container::State, sandbox, sizing::VmSize};
use serde_json::json;

/// Changes of one container that may wait.
const CHANGES_LIMIT: usize = 64;

impl Actor {
    pub(crate) async fn update(&mut self, id: &ContainerId, change: LimitChange, reply: Reply<()>) {
        let Some(entry) = self.containers.get(id) else {
            return answer(reply, Err(SandboxError::NoContainer(id.0.clone())));
        };
        if entry.changes.len() >= CHANGES_LIMIT {
            return answer(reply, Err(SandboxError::Busy(self.record.id.0.clone())));
        }
        if !change.cpuset.is_empty()
            && let Err(error) = self.pin_changed(id, &change.cpuset).await
        {
            return answer(reply, Err(error));
        }
        let Some(entry) = self.containers.get_mut(id) else {
            return answer(reply, Err(SandboxError::NoContainer(id.0.clone())));
        };
        entry.changes.push_back(Change { change, reply });
        if entry.changes.len() == 1 {
            self.next_change(id);
        }
    }

    /// The host's part of a change goes first: it is the one that may not be possible.
    async fn pin_changed(&self, id: &ContainerId, change: &Cpuset) -> Result<(), SandboxError> {
        let Some(entry) = self.containers.get(id) else {
            return Err(SandboxError::NoContainer(id.0.clone()));
        };
        if !matches!(entry.state, State::Created | State::Running { .. }) {
            return Err(entry.wrong_state("update"));
        }
        let own = entry.record.spec.cpuset.changed(change);
        self.pin_with(Some(id), &own).await
    }

    /// Begins the first of the changes that wait; those that cannot be are answered.
    fn next_change(&mut self, id: &ContainerId) {
        while let Some(entry) = self.containers.get(id) {
            let Some(Change { change, .. }) = entry.changes.front() else {
                return;
            };
            let (before, score) = (
                entry.record.spec.guest.resources.clone().unwrap_or_default(),
                change.oom_score_adj,
            );
            let after = change.apply(&before);
            match self.may_change(id, &before, &after) {
                Ok((live, needed)) => {
                    let (id, pod) = (id.clone(), self.record.id.0.clone());
                    return self.spawn_work(async move {
                        let result = async {
                            let size = grow(&live, &pod, needed).await?;
                            live.guest
                                .update_container(&id.0, after.clone(), score, live.deadline)
                                .await
                                .map_err(SandboxError::guest(format!("update container {}", id.0)))?;
                            Ok(Box::new((after, size)))
                        };
                        let result = result.await;
                        Work::Updated { id, result }
                    });
                }
                Err(error) => self.end_change(id, Err(error)),
            }
        }
    }

    fn may_change(
        &self,
        id: &ContainerId,
        before: &guest::Resources,
        after: &guest::Resources,
    ) -> Result<(Live, VmSize), SandboxError> {
        let entry = self
            .containers
            .get(id)
            .ok_or_else(|| SandboxError::NoContainer(id.0.clone()))?;
        if !matches!(entry.state, State::Created | State::Running { .. }) {
            return Err(entry.wrong_state("update"));
        }
        let live = self.live.clone().ok_or_else(|| self.no_guest("update", id))?;
        let needed = limits::check_container(&id.0, before, after, self.room()?)?;
        Ok((live, needed))
    }

    /// How large the VM is and can become. A pod's cgroup on the host bounds it too: kubelet raises that one first.
    fn room(&self) -> Result<Room, SandboxError> {
        let size = self.record.size.ok_or_else(|| SandboxError::Unmet {
            what: format!("change limits in pod sandbox {}", self.record.id.0),
            reason: "the size of its VM is not in its record, which an older version has written".into(),
        })?;
        let node = &self.node;
        let cgroup_max = self
            .record
            .cgroup
            .as_deref()
            .and_then(|leaf| node.cgroups.memory_max(leaf))
            .map(|bytes| (bytes >> 20).saturating_sub(node.config.host_reserve_mib));
        let ceiling = self.record.ceiling.map(|most| VmSize {
            memory_mib: most
                .memory_mib
                .min(cgroup_max.unwrap_or(u64::MAX))
                .max(size.memory_mib),
            ..most
        });
        Ok(Room { size, ceiling })
    }

    /// The guest has answered the change at the front.
    pub(crate) async fn updated(
        &mut self,
        id: &ContainerId,
        result: Result<Box<(guest::Resources, VmSize)>, SandboxError>,
    ) {
        if let Ok(done) = &result
            && let Err(error) = self.has_grown(done.1).await
        {
            tracing::error!(sandbox.id = %self.record.id.0, error = %error.chain(), "size of the VM is not on disk");
        }
        let cpuset = self
            .containers
            .get(id)
            .and_then(|entry| Some(entry.changes.front()?.change.cpuset.clone()));
        let cpuset = cpuset.unwrap_or_default();
        let result = match (result, self.containers.get_mut(id)) {
            (Ok(done), Some(entry)) => {
                entry.record.spec.guest.resources = Some(done.0);
                entry.record.spec.cpuset = entry.record.spec.cpuset.changed(&cpuset);
                let score = entry.changes.front().and_then(|first| first.change.oom_score_adj);
                if let (Some(score), Some(process)) = (score, &mut entry.record.spec.guest.process) {
                    process.oom_score_adj = score;
                }
                self.persist(id).await
            }
            (Ok(_), None) => Ok(()),
            (Err(error), _) => {
                self.pin_without(&cpuset).await;
                Err(error)
            }
        };
        self.end_change(id, result);
        self.next_change(id);
    }

    /// Answers the change at the front. What is shown by then has it.
    fn end_change(&mut self, id: &ContainerId, result: Result<(), SandboxError>) {
        self.publish();
        let first = self
            .containers
            .get_mut(id)
            .and_then(|entry| entry.changes.pop_front());
        if let Some(Change { reply, .. }) = first {
            answer(reply, result);
        }
    }

    /// Remembers a VM's new size.
    async fn has_grown(&mut self, size: VmSize) -> Result<(), SandboxError> {
        if self.record.size == Some(size) {
            return Ok(());
        }
        self.record.size = Some(size);
        self.record.info["vm"] = json!({ "memory_mib": size.memory_mib, "vcpus": size.vcpus });
        self.node.journal.write_pod(&self.record).await
    }

    /// Takes new limits of the pod, growing its VM when it has to. They are what later changes are measured by.
    pub(crate) fn resize(&mut self, change: PodLimitChange, reply: Reply<()>) {
        let (live, after, needed) = match self.may_resize(&change) {
            Ok(checked) => checked,
            Err(error) => return answer(reply, Err(error)),
        };
        let pod = self.record.id.0.clone();
        self.spawn_work(async move {
            let result = grow(&live, &pod, needed).await;
            Work::Resized {
                after,
                cpuset: change.cpuset,
                result,
                reply,
            }
        });
    }

    fn may_resize(&self, change: &PodLimitChange) -> Result<(Live, PodLimits, VmSize), SandboxError> {
        let id = &self.record.id.0;
        let live = self.live.clone().filter(|_| self.state == sandbox::State::Ready);
        let live = live.ok_or_else(|| SandboxError::WrongState {
            what: format!("resize pod sandbox {id}"),
            state: self.state.as_str().into(),
        })?;
        let before = self.record.spec.limits;
        let after = PodLimits {
            cpu_milli: change.limits.cpu_milli.or(before.cpu_milli),
            memory_bytes: change.limits.memory_bytes.or(before.memory_bytes),
        };
        let overhead = self.node.config.guest_overhead_mib;
        let needed = limits::check_pod(id, before, after, self.room()?, overhead)?;
        Ok((live, after, needed))
    }

    /// The VM is as large as the pod's new limits need, or is not.
    pub(crate) async fn resized(
        &mut self,
        after: PodLimits,
        cpuset: Cpuset,
        result: Result<VmSize, SandboxError>,
        reply: Reply<()>,
    ) {
        let result = match result {
            Ok(size) => self.take_limits(after, &cpuset, size).await,
            Err(error) => Err(error),
        };
        self.publish();
        answer(reply, result);
    }

    async fn take_limits(
        &mut self,
        after: PodLimits,
        cpuset: &Cpuset,
        size: VmSize,
    ) -> Result<(), SandboxError> {
        self.has_grown(size).await?;
        let mut record = self.record.clone();
        record.spec.limits = after;
        record.spec.cpuset = record.spec.cpuset.changed(cpuset);
        if record.spec == self.record.spec {
            return Ok(());
        }
        let previous = std::mem::replace(&mut self.record, record);
        let pinned = if cpuset.is_empty() {
            Ok(())
        } else {
            self.pin_with(None, &Cpuset::default()).await
        };
        let done = match pinned {
            Ok(()) => self.node.journal.write_pod(&self.record).await,
            Err(error) => Err(error),
        };
        if done.is_err() {
            self.record = previous;
            self.pin_without(cpuset).await;
        }
        done
    }

    pub(crate) fn usage(&mut self, ids: Vec<String>, limit: std::time::Duration, reply: Reply<Readings>) {
        let Some(live) = self.live.clone() else {
            let what = format!("ask pod sandbox {} what it uses", self.record.id.0);
            let state = self.state.as_str().into();
            return answer(reply, Err(SandboxError::WrongState { what, state }));
        };
        if self.is_busy() {
            return answer(reply, Err(SandboxError::Busy(self.record.id.0.clone())));
        }
        let what = format!("ask the guest of pod sandbox {} what it uses", self.record.id.0);
        let leaf = self.record.cgroup.clone();
        self.spawn_work(async move {
            let stats = live.guest.stats(ids, limit.min(live.deadline)).await;
            let now = nanos(std::time::SystemTime::now());
            let host = leaf.map(|leaf| blocking(move || Ok(charged::read(&leaf, now))));
            let host = match host {
                Some(reading) => reading.await.ok().flatten(),
                None => None,
            };
            let readings = stats.map(|guest| Readings { guest, host });
            answer(reply, readings.map_err(SandboxError::guest(what)));
            Work::Answered
        });
    }
}
