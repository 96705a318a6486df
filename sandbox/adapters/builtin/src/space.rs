//! Which disks of a VM wait for space on the host.
//!
//! The VMM writes a line into its log when a disk begins to wait or ends to, at most a few in a while, and knows the disks when it is asked. So
//! it is asked when its log has grown, and from then on until no disk has waited for longer than it may have kept silent: a VM that writes
//! nothing is left alone.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::{Process, disk};
use caisson_vmm_api::control::{Reply, Request, Status};
use tokio::{sync::watch, time::Instant};

use crate::client::{Failure, ask, unexpected};

/// How often the log is looked at, or the VMM asked.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long after the last disk that waited the VMM is asked on: longer than the window in which it limits its lines.
const ATTENTION: Duration = Duration::from_secs(40);

/// Most disks that are told of.
const DISKS_MAX: usize = 256;

/// Sees to one VM for as long as it runs.
pub(crate) struct Keeper {
    id: String,
    control: PathBuf,
    log: PathBuf,
    told: watch::Sender<BTreeSet<String>>,
}

impl Keeper {
    pub(crate) fn new(id: &str, control: &Path, log: &Path, told: watch::Sender<BTreeSet<String>>) -> Self {
        Self {
            id: id.to_owned(),
            control: control.to_owned(),
            log: log.to_owned(),
            told,
        }
    }

    /// Until the VM's end.
    pub(crate) async fn run(self, vmm: Process) {
        tokio::select! {
            biased;
            _ = vmm.wait() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(&self) {
        // A VM that is adopted may wait already.
        let mut seen = None;
        let mut attentive_until = Instant::now();
        loop {
            let length = std::fs::metadata(&self.log).map_or(0, |log| log.len());
            if seen.replace(length) != Some(length) {
                attentive_until = Instant::now() + ATTENTION;
            }
            if Instant::now() < attentive_until {
                match self.ask().await {
                    Ok(full) => {
                        if !full.is_empty() {
                            attentive_until = Instant::now() + ATTENTION;
                        }
                        self.tell(full);
                    }
                    Err(failure) => {
                        tracing::debug!(vm = %self.id, error = %failure.of("status"), "cannot ask for full disks");
                    }
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    async fn ask(&self) -> Result<BTreeSet<String>, Failure> {
        match ask(&self.control, Request::Status, Vec::new()).await? {
            Reply::Status(Status { full_disks, .. }) => Ok(full_disks
                .into_iter()
                .filter(|serial| disk::check_serial(serial).is_ok())
                .take(DISKS_MAX)
                .collect()),
            other => Err(unexpected(&other)),
        }
    }

    fn tell(&self, now: BTreeSet<String>) {
        self.told.send_if_modified(|told| {
            let differs = *told != now;
            *told = now;
            differs
        });
    }
}
