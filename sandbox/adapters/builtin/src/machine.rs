//! A running VM: its process, and the verbs on it.
//!
//! Disks come and go over the control socket in a task of their own, so that a caller who goes away leaves no half-plugged disk; end and kill
//! are a matter of the pidfd alone, and never talk to the VMM.

use std::{collections::BTreeSet, io, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use caisson_hypervisor::{
    Disk, Ended, HypervisorError, KILL_DEADLINE, Process, ProcessRole, Vm, VmExit, VmGrowth, VmRecord,
    console::{last_lines, sanitize},
    logs,
    user::{Lease, Users},
};
use caisson_vmm_api::exit::{Cause, ExitRecord, RECORD_BYTES_MAX};
use tokio::{sync::watch, task::AbortHandle};

use crate::{NAME, disks::Disks, growth, launch::Paths, space};

/// How long an adopted VM may take to name its disks; a restarted daemon has many VMs to adopt.
const ADOPT_DEADLINE: Duration = Duration::from_secs(3);

/// A VM of this driver.
pub(crate) struct BuiltinVm {
    id: String,
    paths: Paths,
    vmm: Process,
    disks: Arc<Disks>,
    keeper: AbortHandle,
    full: watch::Receiver<BTreeSet<String>>,
    full_keeper: AbortHandle,
    /// Kept from other VMs while this one is.
    _user: Option<Lease>,
}

impl Drop for BuiltinVm {
    fn drop(&mut self) {
        self.keeper.abort();
        self.full_keeper.abort();
    }
}

impl BuiltinVm {
    pub(crate) fn new(
        id: String,
        paths: Paths,
        vmm: Process,
        user: Option<Lease>,
        slots: Vec<Option<String>>,
    ) -> Self {
        let logs = vec![paths.console.clone(), paths.log.clone()];
        let keeper = tokio::spawn(logs::keep_bounded(logs)).abort_handle();
        let (told, full) = watch::channel(BTreeSet::new());
        let waiting = space::Keeper::new(&id, &paths.control, &paths.log, told);
        let full_keeper = tokio::spawn(waiting.run(vmm.clone())).abort_handle();
        Self {
            full,
            full_keeper,
            disks: Arc::new(Disks::new(paths.control.clone(), slots)),
            id,
            paths,
            vmm,
            keeper,
            _user: user,
        }
    }

    /// Takes over what `record` names. Slots are then what the VMM says: the earlier daemon may have ended between plugging and writing.
    pub(crate) async fn adopt(record: VmRecord, users: &Users) -> Result<Option<Self>, HypervisorError> {
        if record.driver != NAME {
            return Err(HypervisorError::Spec(format!(
                "VM {} belongs to driver {}",
                record.id, record.driver
            )));
        }
        let Some(reference) = record.processes.iter().find(|p| p.role == ProcessRole::Vmm) else {
            return Ok(None);
        };
        let opened = reference.open().map_err(|source| HypervisorError::Io {
            what: format!("open process {}", reference.pid),
            source,
        })?;
        let Some(vmm) = opened.filter(|process| !process.has_ended()) else {
            return Ok(None);
        };
        let user = users.recall(vmm.reference().pid);
        let vm = Self::new(record.id, Paths::in_dir(&record.dir), vmm, user, record.slots);
        // A wedged VMM is adopted too: it can still be killed.
        match tokio::time::timeout(ADOPT_DEADLINE, vm.disks.reconcile()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(vm = %vm.id, %error, "cannot ask an adopted VM for its disks"),
            Err(_) => tracing::warn!(vm = %vm.id, limit = ?ADOPT_DEADLINE, "an adopted VM does not answer"),
        }
        Ok(Some(vm))
    }
}

/// What the VMM said itself, or else how its process ended and the end of its log.
pub(crate) fn describe_end(ended: Ended, paths: &Paths) -> String {
    match read_record(&paths.exit_record) {
        Some(ExitRecord {
            cause: cause @ (Cause::Failure { .. } | Cause::Panic { .. }),
            ..
        }) => format!("caisson-vmm {ended}: {}", sanitize(cause.to_string().as_bytes())),
        Some(record) => record.cause.to_string(),
        None => {
            let tail = last_lines(&paths.log, 20).unwrap_or_default();
            if tail.is_empty() {
                format!("caisson-vmm {ended}")
            } else {
                format!("caisson-vmm {ended}: {tail}")
            }
        }
    }
}

fn read_record(path: &Path) -> Option<ExitRecord> {
    let length = std::fs::metadata(path).ok()?.len();
    // Written by a process that the guest may have taken over.
    if length > RECORD_BYTES_MAX as u64 {
        return None;
    }
    ExitRecord::decode(&std::fs::read(path).ok()?).ok()
}

#[async_trait]
impl Vm for BuiltinVm {
    fn record(&self) -> VmRecord {
        VmRecord {
            driver: NAME.into(),
            id: self.id.clone(),
            dir: self.paths.dir.clone(),
            processes: vec![self.vmm.reference().clone()],
            slots: self.disks.slots().clone(),
        }
    }

    fn vsock(&self) -> &Path {
        &self.paths.vsock
    }

    fn console(&self) -> &Path {
        &self.paths.console
    }

    async fn attach(&self, disk: Disk) -> Result<(), HypervisorError> {
        let disks = self.disks.clone();
        finish(tokio::spawn(async move { disks.attach(disk).await })).await
    }

    async fn detach(&self, serial: &str) -> Result<(), HypervisorError> {
        let (disks, serial) = (self.disks.clone(), serial.to_owned());
        finish(tokio::spawn(async move { disks.detach(&serial).await })).await
    }

    async fn grow(&self, growth: VmGrowth) -> Result<(), HypervisorError> {
        let control = self.paths.control.clone();
        finish(tokio::spawn(async move { growth::grow(&control, growth).await })).await
    }

    fn full_disks(&self) -> watch::Receiver<BTreeSet<String>> {
        self.full.clone()
    }

    async fn wait(&self) -> VmExit {
        let ended = self.vmm.wait().await.unwrap_or(Ended::Unknown);
        VmExit {
            reason: describe_end(ended, &self.paths),
        }
    }

    async fn kill(&self) -> Result<(), HypervisorError> {
        self.vmm.kill(KILL_DEADLINE).await.map(drop)
    }
}

async fn finish(task: tokio::task::JoinHandle<Result<(), HypervisorError>>) -> Result<(), HypervisorError> {
    task.await.unwrap_or_else(|e| {
        Err(HypervisorError::Io {
            what: "finish a change of the VM".into(),
            source: io::Error::other(e),
        })
    })
}
