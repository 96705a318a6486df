//! Which disks a pod's VM has, and for whom: a disk is attached for the first container that needs it and taken away after the last.
//!
//! Who uses what is known here only as far as this daemon was told; the guest has the last word, and refuses to let go of a disk that
//! something has mounted. What could not be taken away is tried again whenever a container goes. Must not know what is on a disk.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use caisson_hypervisor::Disk;

use crate::{ContainerId, SandboxError, container::Live, spec::ContainerSpec};

/// For whom a disk is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Holder<'a> {
    /// Until this container is removed, and all others that have the disk.
    Container(&'a ContainerId),
    /// As long as the VM lives.
    Pod,
}

/// The disks of one VM that are there for containers.
#[derive(Debug, Default)]
pub(crate) struct PodDisks {
    /// One attach or detach at a time, so that two containers of one image share its disk.
    lane: tokio::sync::Mutex<()>,
    /// By serial; nobody holds what is there without a container.
    holders: Mutex<BTreeMap<String, BTreeSet<ContainerId>>>,
}

impl PodDisks {
    fn holders(&self) -> MutexGuard<'_, BTreeMap<String, BTreeSet<ContainerId>>> {
        // Each change is one insertion or removal.
        self.holders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what a container of an earlier daemon has.
    pub(crate) fn resume(&self, id: &ContainerId, spec: &ContainerSpec) {
        for serial in serials(spec) {
            self.holders().entry(serial).or_default().insert(id.clone());
        }
    }

    /// Attaches a disk unless it is there.
    pub(crate) async fn attach(
        &self,
        live: &Live,
        disk: Disk,
        holder: Holder<'_>,
    ) -> Result<(), SandboxError> {
        let _lane = self.lane.lock().await;
        if let Holder::Container(id) = holder {
            let mut holders = self.holders();
            holders.entry(disk.serial.clone()).or_default().insert(id.clone());
        }
        if is_attached(live, &disk.serial) {
            return Ok(());
        }
        // The first of its files names it; an error about another one names that.
        let what = match disk.files.first() {
            Some(file) => format!("attach disk {}", file.display()),
            None => format!("attach disk {}", disk.serial),
        };
        live.vm.attach(disk).await.map_err(SandboxError::hypervisor(what))
    }

    /// The container is gone: takes away what nobody else holds. A disk that stays costs a slot, and is no reason to fail.
    pub(crate) async fn let_go(&self, live: &Live, id: &ContainerId) {
        let _lane = self.lane.lock().await;
        let idle: Vec<String> = {
            let mut holders = self.holders();
            for held_by in holders.values_mut() {
                held_by.remove(id);
            }
            let idle = holders.iter().filter(|(_, held_by)| held_by.is_empty());
            idle.map(|(serial, _)| serial.clone()).collect()
        };
        for serial in idle {
            match take_away(live, &serial).await {
                Ok(()) => drop(self.holders().remove(&serial)),
                Err(error) => {
                    tracing::warn!(disk = serial, error = %error.chain(), "disk stays with the VM for now");
                }
            }
        }
    }
}

/// The disks that a container has by its specification.
fn serials(spec: &ContainerSpec) -> Vec<String> {
    let image = std::iter::once(crate::container::image_serial(&spec.image.id));
    let volumes = spec
        .image_volumes
        .iter()
        .map(|volume| crate::container::image_serial(&volume.image_id));
    image.chain(volumes).collect()
}

fn is_attached(live: &Live, serial: &str) -> bool {
    let slots = live.vm.record().slots;
    slots.iter().flatten().any(|taken| taken == serial)
}

/// The guest first: not every hypervisor can ask it.
async fn take_away(live: &Live, serial: &str) -> Result<(), SandboxError> {
    if !is_attached(live, serial) {
        return Ok(());
    }
    let what = || format!("take disk {serial} away");
    live.guest
        .release_disk(serial, live.deadline)
        .await
        .map_err(SandboxError::guest(what()))?;
    live.vm
        .detach(serial)
        .await
        .map_err(SandboxError::hypervisor(what()))
}
