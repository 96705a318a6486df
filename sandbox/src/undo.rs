//! What a pod has taken of the host, in the order it was taken, and how each is given back.
//!
//! An undo is pushed *before* the acquisition, since what fails or is broken off may have been done in part; so each is idempotent
//! and fine with nothing to undo. The stack travels with the pod: a failed boot, StopPodSandbox, RemovePodSandbox and recovery all
//! unwind it. Unwinding goes on after failures; what failed stays on the stack for the next try.

use std::{fs, path::PathBuf, sync::Arc};

use caisson_hypervisor::Vm;
use tokio::sync::watch;

use crate::{
    SandboxError,
    cgroup::{self, Place},
    journal::{PodRecord, absent_is_fine, blocking},
    registry::Node,
    view::{ContainerView, SandboxView},
};

/// Something taken of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Undo {
    /// The pod's directory in the journal.
    Record,
    /// Namespace, CNI interfaces, taps.
    Network,
    /// The writable disk.
    Scratch,
    /// Sockets and logs of the VM.
    RunDir,
    /// The leaf in the pod's cgroup.
    Cgroup(PathBuf),
    /// The leaf in the cpuset hierarchy of a host with cgroup v1.
    Cpuset,
    /// Every process of the VM.
    Vm,
}

/// What must be undone, last first.
#[derive(Debug, Clone, Default)]
pub(crate) struct UndoStack(Vec<Undo>);

/// A pod and its containers as they are shown once they have ended.
pub(crate) struct Farewell {
    pub(crate) pod: SandboxView,
    pub(crate) containers: Vec<ContainerView>,
}

/// A farewell that the actor has promised.
pub(crate) type Promised = watch::Receiver<Option<Arc<Farewell>>>;

/// The farewell, unless the actor has gone.
pub(crate) async fn kept(promised: &mut Promised) -> Option<Arc<Farewell>> {
    let farewell = promised.wait_for(Option::is_some).await.ok()?;
    farewell.clone()
}

impl UndoStack {
    /// Only the record: a pod that has been stopped, or not booted yet.
    pub(crate) fn record() -> Self {
        Self(vec![Undo::Record])
    }

    /// Everything that a boot takes, in its order.
    pub(crate) fn full(record: &PodRecord) -> Self {
        let mut stack = Self::record();
        stack.push(Undo::Network);
        stack.push(Undo::Scratch);
        stack.push(Undo::RunDir);
        if let Some(leaf) = &record.cgroup {
            stack.push(Undo::Cgroup(leaf.clone()));
        }
        stack.push(Undo::Cpuset);
        stack.push(Undo::Vm);
        stack
    }

    pub(crate) fn push(&mut self, undo: Undo) {
        self.0.push(undo);
    }

    /// Undoes everything, the record only when `deep` and when all else worked. Answers what failed.
    ///
    /// `farewell`: how hooks are told of the pod once its VM is gone; waited for until then.
    pub(crate) async fn unwind(
        &mut self,
        node: &Node,
        record: &PodRecord,
        vm: Option<&Arc<dyn Vm>>,
        deep: bool,
        mut farewell: Option<&mut Promised>,
    ) -> Vec<SandboxError> {
        let (mut failures, mut left) = (Vec::new(), Vec::new());
        while let Some(undo) = self.0.pop() {
            if undo == Undo::Record && (!deep || !failures.is_empty()) {
                left.push(undo);
                continue;
            }
            if let Err(error) = undo.run(node, record, vm).await {
                tracing::warn!(sandbox.id = %record.id.0, step = ?undo, error = %error.chain(), "clean-up failed");
                failures.push(error);
                left.push(undo.clone());
            }
            if undo == Undo::Vm
                && let Some(promised) = farewell.as_deref_mut()
                && let Some(farewell) = kept(promised).await
            {
                node.hooks.stop_pod(&farewell.pod, &farewell.containers).await;
            }
        }
        left.reverse();
        self.0 = left;
        failures
    }
}

impl Undo {
    async fn run(
        &self,
        node: &Node,
        record: &PodRecord,
        vm: Option<&Arc<dyn Vm>>,
    ) -> Result<(), SandboxError> {
        let id = &record.id.0;
        match self {
            Self::Record => node.journal.delete_pod(&record.id).await,
            Self::Network => node
                .network
                .teardown(id, &record.spec.network)
                .await
                .map_err(|source| SandboxError::Network {
                    what: format!("take down the network of pod sandbox {id}"),
                    source: Box::new(source),
                }),
            Self::Scratch => {
                let path = node.journal.scratch(&record.id);
                blocking(move || {
                    absent_is_fine(fs::remove_file(&path))
                        .map_err(SandboxError::io(format!("delete {}", path.display())))
                })
                .await
            }
            Self::RunDir => {
                let path = node.run_dir(&record.id);
                blocking(move || {
                    absent_is_fine(fs::remove_dir_all(&path))
                        .map_err(SandboxError::io(format!("delete {}", path.display())))
                })
                .await
            }
            Self::Cgroup(leaf) => cgroup::remove(leaf).await,
            Self::Cpuset => {
                let parent = record.spec.cgroup_parent.as_deref();
                match node.cgroups.place(record.cgroup.as_deref(), parent, id) {
                    Ok(Place::Legacy(leaf)) => cgroup::remove_legacy(&leaf).await,
                    // Below a parent that names no group, nothing can have been made.
                    Ok(Place::Unified { .. } | Place::Nowhere) | Err(_) => Ok(()),
                }
            }
            Self::Vm => {
                kill(node, id, vm).await?;
                // Its file server ends with its connections; it is not waited for, but seen to be gone.
                if record.file_server.is_some() || record.socket_server.is_some() {
                    sweep(node, id).await?;
                }
                Ok(())
            }
        }
    }
}

/// By pidfd through the driver's handle where there is one; else, or when that failed, by the mark that every process of a VM carries.
async fn kill(node: &Node, id: &str, vm: Option<&Arc<dyn Vm>>) -> Result<(), SandboxError> {
    if let Some(vm) = vm {
        match vm.kill().await {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::warn!(sandbox.id = %id, %error, "kill failed, looking for the VM's processes")
            }
        }
    }
    sweep(node, id).await
}

async fn sweep(node: &Node, id: &str) -> Result<(), SandboxError> {
    node.hypervisor
        .sweep(id)
        .await
        .map(|_| ())
        .map_err(SandboxError::hypervisor(format!(
            "kill the processes of pod sandbox {id}"
        )))
}
