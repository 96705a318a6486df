//! Which CPUs of the host a pod's VM runs on, as its containers come, change and go. The actor does it itself, one at a time, since each
//! time is worked out from what all containers have.

use std::sync::Arc;

use caisson_hypervisor::Vm;
use caisson_lifecycle::container::State;

use crate::{
    ContainerId, SandboxError,
    actor::Actor,
    cpuset::{self, Cpuset},
    journal::{PodRecord, blocking},
    registry::Node,
};

/// Pins a VM.
pub(crate) async fn pin(
    node: &Node,
    record: &PodRecord,
    vm: &Arc<dyn Vm>,
    wanted: Cpuset,
) -> Result<(), SandboxError> {
    let id = record.id.0.clone();
    let parent = record.spec.cgroup_parent.as_deref();
    let place = node.cgroups.place(record.cgroup.as_deref(), parent, &id)?;
    let processes: Vec<_> = vm.record().processes.iter().map(|process| process.pid).collect();
    blocking(move || cpuset::pin(&place, &processes, &wanted, &id)).await
}

impl Actor {
    /// Pins the VM to what its containers have, one of which has `own` instead of what it had, or is new.
    pub(crate) async fn pin_with(&self, id: Option<&ContainerId>, own: &Cpuset) -> Result<(), SandboxError> {
        let Some(live) = &self.live else { return Ok(()) };
        let others = self.containers.values().filter(|entry| {
            Some(&entry.record.id) != id && !matches!(entry.state, State::Exited(_) | State::Removed)
        });
        let sets = others
            .map(|entry| &entry.record.spec.cpuset)
            .chain([own, &self.record.spec.cpuset]);
        pin(&self.node, &self.record, &live.vm, cpuset::union(sets)).await
    }

    /// Gives back what a container had that is gone, or did not come about.
    pub(crate) async fn pin_without(&self, own: &Cpuset) {
        if own.is_empty() {
            return;
        }
        if let Err(error) = self.pin_with(None, &Cpuset::default()).await {
            tracing::warn!(sandbox.id = %self.record.id.0, error = %error.chain(), "CPUs of a container not given back");
        }
    }
}
