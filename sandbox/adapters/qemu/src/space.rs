//! A VM whose disk finds no space on the host: QEMU stops it (`werror=enospc`), keeps the write, and tries it again when it is told to go on.
//!
//! ```text
//! runs --STOP event, status io-error--> waits --cont, and no STOP for RETRY--> runs
//!                                       ^  |
//!                                       +--+ cont every RETRY, which may end in another STOP
//! ```
//!
//! QEMU's own control socket for this, so that nobody waits for anybody. What the VM was stopped for otherwise is none of this module's
//! business, and neither is its end: whoever kills the VM does so by pidfd.

use std::{collections::BTreeSet, io, time::Duration};

use caisson_hypervisor::{Process, disk};
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::qmp::{COMMAND_DEADLINE, Failure, Qmp, Session};

/// How often a VM that waits for space tries again; also how long it must run before it counts as having found some.
const RETRY: Duration = Duration::from_millis(500);

/// Pause before a broken connection is opened anew.
const RECONNECT: Duration = Duration::from_secs(5);

/// Most disks that are told of.
const DISKS_MAX: usize = 256;

/// Sees to one VM's stops for as long as it runs.
pub(crate) struct Keeper {
    id: String,
    qmp: Qmp,
    told: watch::Sender<BTreeSet<String>>,
}

impl Keeper {
    pub(crate) fn new(id: &str, qmp: Qmp, told: watch::Sender<BTreeSet<String>>) -> Self {
        Self {
            id: id.to_owned(),
            qmp,
            told,
        }
    }

    /// Until the VM's end.
    pub(crate) async fn run(self, vmm: Process) {
        loop {
            let failure = tokio::select! {
                biased;
                _ = vmm.wait() => return,
                failure = self.watch() => failure,
            };
            if is_missing(&failure) {
                tracing::debug!(vm = %self.id, "this VM was started without a socket for stops");
                return;
            }
            tracing::debug!(vm = %self.id, error = %failure.of("wait for a stop"), "connected anew");
            tokio::time::sleep(RECONNECT).await;
        }
    }

    /// Answers only a broken connection.
    async fn watch(&self) -> Failure {
        let mut session = self.qmp.session().await;
        loop {
            if let Err(failure) = self.step(&mut session).await {
                return failure;
            }
        }
    }

    async fn step(&self, session: &mut Session<'_>) -> Result<(), Failure> {
        session.connect(COMMAND_DEADLINE).await?;
        let status = session.execute("query-status", Value::Null).await?;
        let waits = status.get("status").and_then(Value::as_str) == Some("io-error");
        if !waits {
            self.tell(BTreeSet::new());
            return session.stopped(None).await.map(drop);
        }
        let devices = session.execute("query-block", Value::Null).await?;
        self.tell(full(session, &devices).await?);
        tokio::time::sleep(RETRY).await;
        session.execute("cont", json!({})).await?;
        session.stopped(Some(RETRY)).await.map(drop)
    }

    fn tell(&self, now: BTreeSet<String>) {
        self.told.send_if_modified(|told| {
            let differs = *told != now;
            *told = now;
            differs
        });
    }
}

/// Serials of the disks that QEMU says have found no space. Not empty: something has stopped the VM.
async fn full(session: &mut Session<'_>, devices: &Value) -> Result<BTreeSet<String>, Failure> {
    let mut full = BTreeSet::new();
    for device in full_devices(devices).take(DISKS_MAX) {
        let property = json!({"path": format!("/machine/peripheral/{device}"), "property": "serial"});
        match session.execute("qom-get", property).await {
            Ok(serial) => full.extend(serial.as_str().map(str::to_owned)),
            Err(Failure::Refused { .. }) => {}
            Err(failure) => return Err(failure),
        }
    }
    full.retain(|serial| disk::check_serial(serial).is_ok());
    if full.is_empty() {
        full.insert("unknown".into());
    }
    Ok(full)
}

/// Ids of the devices that `query-block` says have no space. Pure.
fn full_devices(devices: &Value) -> impl Iterator<Item = &str> {
    let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    devices
        .iter()
        .filter(|device| device.get("io-status").and_then(Value::as_str) == Some("nospace"))
        .filter_map(|device| device.get("qdev")?.as_str())
        // `/machine/peripheral/ID/virtio-backend`, or the id itself.
        .filter_map(|path| {
            path.split('/')
                .rfind(|part| !part.is_empty() && *part != "virtio-backend")
        })
}

fn is_missing(failure: &Failure) -> bool {
    matches!(failure, Failure::Broken(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_found_by_its_device() {
        let devices = json!([
            {"device": "", "qdev": "/machine/peripheral/cold0/virtio-backend", "io-status": "nospace"},
            {"device": "", "qdev": "/machine/peripheral/hot2/virtio-backend", "io-status": "ok"},
            {"device": "", "qdev": "hot3", "io-status": "nospace"},
            {"device": "", "qdev": "hot4", "io-status": "failed"},
            {"device": "floppy0"},
        ]);
        assert_eq!(full_devices(&devices).collect::<Vec<_>>(), ["cold0", "hot3"]);
        assert_eq!(full_devices(&json!({"no": "list"})).count(), 0);
    }
}
