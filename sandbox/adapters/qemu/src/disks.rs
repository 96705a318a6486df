//! Disks that come and go while the VM runs: the slots, and the QMP dialogue for each.
//!
//! Must not know the VM's processes.

use std::{
    fs::File,
    io::{self, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::FileTypeExt,
    },
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use caisson_hypervisor::{Disk, HypervisorError, disk};
use rustix::fs::{MemfdFlags, memfd_create};
use serde_json::{Value, json};

use crate::{
    arguments::{ON_WRITE_ERROR, PARTS_PER_SLOT, SlotNames},
    qmp::{Failure, Qmp, Session},
};

/// Bytes of a sector in a descriptor of extents.
const SECTOR: u64 = 512;
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
        let files = disk::open(&disk)?;
        let slot = self.take_slot(&disk.serial)?;
        let names = SlotNames::of(slot);
        let plugged = plug(&mut session, &names, &disk, &files).await;
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
    files: &[File],
) -> Result<(), HypervisorError> {
    let node = match files {
        [file] => single(session, names, disk, file).await?,
        parts => concatenation(session, names, disk, parts).await?,
    };
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
        "werror": ON_WRITE_ERROR,
        "rerror": "report",
    });
    session
        .execute("device_add", device)
        .await
        .map_err(|e| e.of("device_add"))?;
    Ok(())
}

/// Passes a file and answers QEMU's name for it.
async fn pass(session: &mut Session<'_>, fdset: u32, file: &File) -> Result<String, HypervisorError> {
    session
        .execute_with("add-fd", json!({"fdset-id": fdset}), file.as_fd())
        .await
        .map_err(|e| e.of("add-fd"))?;
    Ok(format!("/dev/fdset/{fdset}"))
}

/// The node of a disk that is one file.
async fn single(
    session: &mut Session<'_>,
    names: &SlotNames,
    disk: &Disk,
    file: &File,
) -> Result<Value, HypervisorError> {
    let kind = file.metadata().map_err(|source| inspecting(disk, source))?;
    Ok(json!({
        // QEMU has a driver of its own for the host's disks.
        "driver": if kind.file_type().is_block_device() { "host_device" } else { "file" },
        "node-name": names.node,
        "filename": pass(session, names.fdset, file).await?,
        "read-only": disk.read_only,
        "auto-read-only": false,
        "locking": "off",
        "discard": "unmap",
    }))
}

/// The node of a disk that is several files: a VMDK descriptor of flat extents, the one format of QEMU's that puts files behind each other.
async fn concatenation(
    session: &mut Session<'_>,
    names: &SlotNames,
    disk: &Disk,
    parts: &[File],
) -> Result<Value, HypervisorError> {
    if !disk.read_only {
        return Err(HypervisorError::Spec(format!(
            "disk {} is made of several files and writable",
            disk.serial
        )));
    }
    let mut extents = Vec::with_capacity(parts.len());
    for (fdset, part) in (names.parts..).zip(parts) {
        let bytes = part.metadata().map_err(|source| inspecting(disk, source))?.len();
        extents.push((bytes, pass(session, fdset, part).await?));
    }
    let descriptor = extents_file(&vmdk(&extents)).map_err(|source| HypervisorError::Io {
        what: format!("describe disk {}", disk.serial),
        source,
    })?;
    Ok(json!({
        "driver": "vmdk",
        "node-name": names.node,
        "read-only": true,
        "file": {
            "driver": "file",
            "filename": pass(session, names.fdset, &descriptor).await?,
            "read-only": true,
            "auto-read-only": false,
            "locking": "off",
        },
    }))
}

/// VMware's "Virtual Disk Format 1.1", as QEMU reads it. There is no empty line before the extents: QEMU would take the first of them twice.
fn vmdk(extents: &[(u64, String)]) -> String {
    let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n\
                    createType=\"twoGbMaxExtentFlat\"\n"
        .to_owned();
    for (bytes, name) in extents {
        // The access is the node's, which is read-only; a line that says RDONLY is passed over.
        text.push_str(&format!("RW {} FLAT \"{name}\" 0\n", bytes / SECTOR));
    }
    text
}

/// The text as a file that is opened for reading only: QEMU takes a descriptor only for what it was opened for.
fn extents_file(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create("extents", MemfdFlags::CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

fn inspecting(disk: &Disk, source: io::Error) -> HypervisorError {
    HypervisorError::Io {
        what: format!("inspect disk {}", disk.serial),
        source,
    }
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
        Ok(_) | Err(Failure::Refused { .. }) => {}
        Err(failure) => return Err(failure.of("remove-fd")),
    }
    remove_parts(session, names).await
}

async fn remove_parts(session: &mut Session<'_>, names: &SlotNames) -> Result<(), HypervisorError> {
    let sets = session
        .execute("query-fdsets", Value::Null)
        .await
        .map_err(|e| e.of("query-fdsets"))?;
    let ids = sets.as_array().into_iter().flatten();
    let ids = ids.filter_map(|set| u32::try_from(set.get("fdset-id")?.as_u64()?).ok());
    for id in ids.filter(|id| (names.parts..names.parts + PARTS_PER_SLOT).contains(id)) {
        match session.execute("remove-fd", json!({"fdset-id": id})).await {
            Ok(_) | Err(Failure::Refused { .. }) => {}
            Err(failure) => return Err(failure.of("remove-fd")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_stand_behind_each_other_and_behind_no_empty_line() {
        let text = vmdk(&[
            (8192, "/dev/fdset/100000".into()),
            (4096, "/dev/fdset/100001".into()),
        ]);
        assert!(!text.contains("\n\n"), "{text}");
        assert!(
            text.ends_with("RW 16 FLAT \"/dev/fdset/100000\" 0\nRW 8 FLAT \"/dev/fdset/100001\" 0\n"),
            "{text}"
        );
        let mut file = extents_file(&text).unwrap();
        assert_eq!(io::read_to_string(&mut file).unwrap(), text);
        assert!(file.write_all(b"x").is_err());
    }
}
