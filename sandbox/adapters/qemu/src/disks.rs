//! Disks that come and go while the VM runs: the slots, and the QMP dialogue for each.
//!
//! Must not know the VM's processes.

use std::{
    fs::File,
    os::{fd::AsFd, unix::fs::FileTypeExt},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use caisson_hypervisor::{Disk, HypervisorError, disk};
use serde_json::json;

use crate::{
    arguments::SlotNames,
    qmp::{Failure, Qmp, Session},
};

/// How long the guest may take to let go of a disk.
const UNPLUG_DEADLINE: Duration = Duration::from_secs(10);
/// A request to unplug that the guest was not ready for is lost: it is repeated.
const UNPLUG_RETRY: Duration = Duration::from_secs(2);

/// The hotplug slots.
pub(crate) struct Disks {
    qmp: Qmp,
    /// Serial of the disk in each slot. A slot is taken before QEMU is asked, and freed after it has let go.
    slots: Mutex<Vec<Option<String>>>,
}

impl Disks {
    pub(crate) fn new(qmp: Qmp, slots: Vec<Option<String>>) -> Self {
        Self {
            qmp,
            slots: Mutex::new(slots),
        }
    }

    /// Locked; for a look only, never over a wait.
    pub(crate) fn slots(&self) -> MutexGuard<'_, Vec<Option<String>>> {
        // Whoever panicked held it for one assignment, which is either done or not.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slot_of(&self, serial: &str) -> Option<usize> {
        self.slots()
            .iter()
            .position(|held| held.as_deref() == Some(serial))
    }

    fn take_slot(&self, serial: &str) -> Result<usize, HypervisorError> {
        let mut slots = self.slots();
        if slots.iter().flatten().any(|held| held == serial) {
            return Err(HypervisorError::Spec(format!(
                "a disk {serial} is attached already"
            )));
        }
        let count = slots.len();
        match slots.iter_mut().enumerate().find(|(_, held)| held.is_none()) {
            Some((slot, held)) => {
                *held = Some(serial.to_owned());
                Ok(slot)
            }
            None => Err(HypervisorError::NoSlot {
                serial: serial.to_owned(),
                slots: count,
            }),
        }
    }

    fn set(&self, slot: usize, serial: Option<String>) {
        if let Some(held) = self.slots().get_mut(slot) {
            *held = serial;
        }
    }

    pub(crate) async fn attach(&self, disk: Disk) -> Result<(), HypervisorError> {
        disk::check_serial(&disk.serial)?;
        // The session comes first: it makes attach and detach take turns.
        let mut session = self.qmp.session().await;
        let file = disk::open(&disk)?;
        let slot = self.take_slot(&disk.serial)?;
        let names = SlotNames::of(slot);
        let plugged = plug(&mut session, &names, &disk, &file).await;
        if plugged.is_err() && unplug_rest(&mut session, &names).await.is_ok() {
            self.set(slot, None);
        }
        plugged
    }

    pub(crate) async fn detach(&self, serial: &str) -> Result<(), HypervisorError> {
        let mut session = self.qmp.session().await;
        let Some(slot) = self.slot_of(serial) else {
            return Ok(());
        };
        let names = SlotNames::of(slot);
        unplug(&mut session, &names, serial).await?;
        unplug_rest(&mut session, &names).await?;
        self.set(slot, None);
        Ok(())
    }

    /// Makes the slots say what QEMU has, and removes what was left half-way.
    pub(crate) async fn reconcile(&self) -> Result<(), HypervisorError> {
        let mut session = self.qmp.session().await;
        let count = self.slots().len();
        for slot in 0..count {
            let names = SlotNames::of(slot);
            let path = format!("/machine/peripheral/{}", names.device);
            match session
                .execute("qom-get", json!({"path": path, "property": "serial"}))
                .await
            {
                Ok(serial) => self.set(slot, serial.as_str().map(str::to_owned)),
                Err(Failure::Refused { .. }) => {
                    unplug_rest(&mut session, &names).await?;
                    self.set(slot, None);
                }
                Err(failure) => return Err(failure.of("qom-get")),
            }
        }
        Ok(())
    }
}

async fn plug(
    session: &mut Session<'_>,
    names: &SlotNames,
    disk: &Disk,
    file: &File,
) -> Result<(), HypervisorError> {
    session
        .execute_with("add-fd", json!({"fdset-id": names.fdset}), file.as_fd())
        .await
        .map_err(|e| e.of("add-fd"))?;
    let kind = file.metadata().map_err(|source| HypervisorError::Io {
        what: format!("inspect disk {}", disk.path.display()),
        source,
    })?;
    let node = json!({
        // QEMU has a driver of its own for the host's disks.
        "driver": if kind.file_type().is_block_device() { "host_device" } else { "file" },
        "node-name": names.node,
        "filename": format!("/dev/fdset/{}", names.fdset),
        "read-only": disk.read_only,
        "auto-read-only": false,
        "locking": "off",
        "discard": "unmap",
    });
    session
        .execute("blockdev-add", node)
        .await
        .map_err(|e| e.of("blockdev-add"))?;
    let device = json!({
        "driver": "virtio-blk-pci",
        "id": names.device,
        "bus": names.bus,
        "addr": names.address,
        "drive": names.node,
        "serial": disk.serial,
        "disable-legacy": "on",
        // By itself QEMU stops the whole VM when the host's disk is full, and nobody would let it go on.
        "werror": "report",
        "rerror": "report",
    });
    session
        .execute("device_add", device)
        .await
        .map_err(|e| e.of("device_add"))?;
    Ok(())
}

/// Asks until the guest has let go.
async fn unplug(session: &mut Session<'_>, names: &SlotNames, serial: &str) -> Result<(), HypervisorError> {
    let until = Instant::now() + UNPLUG_DEADLINE;
    loop {
        match session.execute("device_del", json!({"id": names.device})).await {
            Ok(_) => {}
            Err(failure) if failure.is_not_found() => return Ok(()),
            // "already in the process of unplug": the guest has been asked and has not answered yet.
            Err(Failure::Refused { .. }) if Instant::now() < until => {}
            Err(failure) => return Err(failure.of("device_del")),
        }
        let left = until.saturating_duration_since(Instant::now());
        if session
            .unplugged(&names.device, UNPLUG_RETRY.min(left))
            .await
            .map_err(|e| e.of("device_del"))?
        {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(HypervisorError::Deadline {
                what: format!("the guest's release of disk {serial}"),
                limit: UNPLUG_DEADLINE,
            });
        }
    }
}

/// Removes what stands behind a device that is gone or never came. What isn't there is fine.
async fn unplug_rest(session: &mut Session<'_>, names: &SlotNames) -> Result<(), HypervisorError> {
    if let Err(failure) = session
        .execute("blockdev-del", json!({"node-name": names.node}))
        .await
    {
        match failure {
            Failure::Refused { ref reason, .. } if reason.starts_with("Failed to find node") => {}
            other => return Err(other.of("blockdev-del")),
        }
    }
    match session
        .execute("remove-fd", json!({"fdset-id": names.fdset}))
        .await
    {
        Ok(_) | Err(Failure::Refused { .. }) => Ok(()),
        Err(failure) => Err(failure.of("remove-fd")),
    }
}
