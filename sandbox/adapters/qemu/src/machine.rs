//! A running VM: its processes, and the verbs on them.
//!
//! Disks come and go by QMP in a task of their own, so that a caller who goes away leaves no half-plugged disk; end and kill are a
//! matter of pidfds alone, and never talk to QEMU.

use std::{
    collections::BTreeSet,
    io,
    path::Path,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use caisson_hypervisor::{
    Disk, Ended, HypervisorError, KILL_DEADLINE, Process, ProcessRole, Vm, VmExit, VmRecord,
    console::last_lines,
    logs,
    user::{Lease, Users},
};
use serde_json::Value;
use tokio::{sync::watch, task::AbortHandle};

use crate::{
    NAME,
    disks::Disks,
    launch::Paths,
    qmp::{COMMAND_DEADLINE, Qmp},
    space,
};

/// How long an adopted VM may take to name its disks; a restarted daemon has many VMs to adopt.
const ADOPT_DEADLINE: Duration = Duration::from_secs(3);
/// How long QEMU may outlive its vsock backend: when a VM ends, both go, in any order.
const BACKEND_GRACE: Duration = Duration::from_secs(2);

/// A VM of this driver.
pub(crate) struct QemuVm {
    id: String,
    paths: Paths,
    vmm: Process,
    /// Absent when it was gone already as the VM was adopted.
    backend: Option<Process>,
    disks: Arc<Disks>,
    /// Why this driver itself killed the VMM.
    cause: OnceLock<String>,
    keeper: AbortHandle,
    full: watch::Receiver<BTreeSet<String>>,
    full_keeper: AbortHandle,
    /// Kept from other VMs while this one is.
    _user: Option<Lease>,
}

impl Drop for QemuVm {
    fn drop(&mut self) {
        self.keeper.abort();
        self.full_keeper.abort();
    }
}

impl QemuVm {
    pub(crate) fn new(
        id: String,
        paths: Paths,
        (vmm, backend): (Process, Option<Process>),
        user: Option<Lease>,
        qmp: Qmp,
        slots: Vec<Option<String>>,
    ) -> Self {
        let keeper = tokio::spawn(logs::keep_bounded(paths.logs())).abort_handle();
        let disks = Arc::new(Disks::new(qmp, slots));
        let (told, full) = watch::channel(BTreeSet::new());
        let waiting = space::Keeper::new(&id, Qmp::new(paths.stops.clone()), told);
        let full_keeper = tokio::spawn(waiting.run(vmm.clone())).abort_handle();
        Self {
            id,
            paths,
            vmm,
            backend,
            disks,
            cause: OnceLock::new(),
            keeper,
            full,
            full_keeper,
            _user: user,
        }
    }

    /// Takes over what `record` names. Slots are then what QEMU says: the earlier daemon may have ended between plugging and writing.
    pub(crate) async fn adopt(record: VmRecord, users: &Users) -> Result<Option<Self>, HypervisorError> {
        if record.driver != NAME {
            return Err(HypervisorError::Spec(format!(
                "VM {} belongs to driver {}",
                record.id, record.driver
            )));
        }
        let mut vmm = None;
        let mut backend = None;
        for reference in &record.processes {
            let opened = reference.open().map_err(|source| HypervisorError::Io {
                what: format!("open process {}", reference.pid),
                source,
            })?;
            match reference.role {
                ProcessRole::Vmm => vmm = opened.filter(|process| !process.has_ended()),
                ProcessRole::Vsock => backend = opened,
                // Not this driver's.
                ProcessRole::FileServer => {}
            }
        }
        let Some(vmm) = vmm else {
            if let Some(backend) = backend {
                backend.kill(KILL_DEADLINE).await?;
            }
            return Ok(None);
        };
        let paths = Paths::in_dir(&record.dir);
        let qmp = Qmp::new(paths.qmp.clone());
        let user = users.recall(vmm.reference().pid);
        let vm = Self::new(record.id, paths, (vmm, backend), user, qmp, record.slots);
        // A wedged QEMU is adopted too: it can still be killed.
        match tokio::time::timeout(ADOPT_DEADLINE, vm.disks.reconcile()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(vm = %vm.id, %error, "cannot ask an adopted VM for its disks"),
            Err(_) => tracing::warn!(vm = %vm.id, limit = ?ADOPT_DEADLINE, "an adopted VM does not answer"),
        }
        Ok(Some(vm))
    }

    fn end_of_vmm(&self, ended: Ended) -> VmExit {
        let reason = match self.cause.get() {
            Some(cause) => cause.clone(),
            None => describe_end("qemu", ended, &self.paths.qemu_log),
        };
        VmExit { reason }
    }

    /// Answers only when the backend ended and QEMU did not follow.
    async fn backend_lost(&self) -> String {
        let ended = match &self.backend {
            Some(backend) => backend.wait().await.unwrap_or(Ended::Unknown),
            None => Ended::Unknown,
        };
        tokio::time::sleep(BACKEND_GRACE).await;
        format!(
            "qemu was killed, since its vsock backend was lost: {}",
            describe_end("caisson-vhost-vsock", ended, &self.paths.backend_log)
        )
    }
}

/// `qemu exited with status 1: the last lines of its log`.
pub(crate) fn describe_end(program: &str, ended: Ended, log: &Path) -> String {
    let tail = match ended {
        Ended::Exited(0) => String::new(),
        _ => last_lines(log, 20).unwrap_or_default(),
    };
    if tail.is_empty() {
        format!("{program} {ended}")
    } else {
        format!("{program} {ended}: {tail}")
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn record(&self) -> VmRecord {
        let processes = std::iter::once(&self.vmm).chain(&self.backend);
        VmRecord {
            driver: NAME.into(),
            id: self.id.clone(),
            dir: self.paths.dir.clone(),
            processes: processes.map(|process| process.reference().clone()).collect(),
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

    fn full_disks(&self) -> watch::Receiver<BTreeSet<String>> {
        self.full.clone()
    }

    async fn wait(&self) -> VmExit {
        let lost = tokio::select! {
            biased;
            ended = self.vmm.wait() => return self.end_of_vmm(ended.unwrap_or(Ended::Unknown)),
            lost = self.backend_lost() => lost,
        };
        // A VM that nobody can talk to is no VM.
        if !self.vmm.has_ended() {
            self.cause.get_or_init(|| lost);
            if let Err(error) = self.vmm.signal_kill() {
                tracing::error!(vm = %self.id, %error, "cannot kill QEMU");
            }
        }
        self.end_of_vmm(self.vmm.wait().await.unwrap_or(Ended::Unknown))
    }

    async fn kill(&self) -> Result<(), HypervisorError> {
        kill_all(std::iter::once(&self.vmm).chain(&self.backend)).await
    }
}

/// Signals all, then waits for each.
pub(crate) async fn kill_all<'a>(
    processes: impl Iterator<Item = &'a Process>,
) -> Result<(), HypervisorError> {
    let processes: Vec<&Process> = processes.collect();
    let until = Instant::now() + KILL_DEADLINE;
    let mut first_error = None;
    for process in &processes {
        if let Err(source) = process.signal_kill() {
            let what = format!("kill process {}", process.reference().pid);
            first_error.get_or_insert(HypervisorError::Io { what, source });
        }
    }
    for process in &processes {
        // Even after the deadline, one that is gone counts as gone.
        let left = until
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(10));
        if let Err(error) = process.kill(left).await {
            first_error.get_or_insert(error);
        }
    }
    first_error.map_or(Ok(()), Err)
}

async fn finish(task: tokio::task::JoinHandle<Result<(), HypervisorError>>) -> Result<(), HypervisorError> {
    task.await.unwrap_or_else(|e| {
        Err(HypervisorError::Io {
            what: "finish a disk operation".into(),
            source: io::Error::other(e),
        })
    })
}

/// Waits until QEMU answers on its control socket.
pub(crate) async fn first_answer(qmp: &Qmp) -> Result<(), HypervisorError> {
    let mut session = qmp.session().await;
    session
        .connect(START_DEADLINE)
        .await
        .map_err(|e| e.of("connect"))?;
    session
        .execute("query-status", Value::Null)
        .await
        .map(drop)
        .map_err(|e| e.of("query-status"))
}

/// Longest time from QEMU's start to its first answer; generous, for machines that emulate and are loaded.
const START_DEADLINE: Duration = COMMAND_DEADLINE.saturating_mul(2);
