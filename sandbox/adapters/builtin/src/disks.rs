//! Disks that come and go while the VM runs: the slots, and the request for each. Must not know the VM's process.

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
};

use caisson_hypervisor::{Disk, HypervisorError, disk};
use caisson_vmm_api::control::{Refusal, Reply, Request, Status};
use tokio::sync::Mutex as AsyncMutex;

use crate::client::{self, Failure, unexpected};

/// The hotplug slots.
pub(crate) struct Disks {
    socket: PathBuf,
    /// Attach and detach take turns.
    turn: AsyncMutex<()>,
    /// Serial of the disk in each slot. A slot is taken before the VMM is asked, and freed after it has let go.
    slots: Mutex<Vec<Option<String>>>,
}

impl Disks {
    pub(crate) fn new(socket: PathBuf, slots: Vec<Option<String>>) -> Self {
        Self {
            socket,
            turn: AsyncMutex::new(()),
            slots: Mutex::new(slots),
        }
    }

    /// Locked; for a look only, never over a wait.
    pub(crate) fn slots(&self) -> MutexGuard<'_, Vec<Option<String>>> {
        // Whoever panicked held it for one assignment, which is either done or not.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_slot(&self, serial: &str) -> Result<(), HypervisorError> {
        let mut slots = self.slots();
        if slots.iter().flatten().any(|held| held == serial) {
            return Err(HypervisorError::Spec(format!(
                "a disk {serial} is attached already"
            )));
        }
        let count = slots.len();
        let free = slots.iter_mut().find(|held| held.is_none());
        let free = free.ok_or_else(|| HypervisorError::NoSlot {
            serial: serial.to_owned(),
            slots: count,
        })?;
        *free = Some(serial.to_owned());
        Ok(())
    }

    fn free_slot(&self, serial: &str) {
        for held in self.slots().iter_mut() {
            held.take_if(|held| held == serial);
        }
    }

    pub(crate) async fn attach(&self, disk: Disk) -> Result<(), HypervisorError> {
        disk::check_serial(&disk.serial)?;
        let _turn = self.turn.lock().await;
        let files: Vec<OwnedFd> = disk::open(&disk)?.into_iter().map(OwnedFd::from).collect();
        self.take_slot(&disk.serial)?;
        let request = Request::AddDisk {
            serial: disk.serial.clone(),
            read_only: disk.read_only,
        };
        let added = client::ask(&self.socket, request, files).await.and_then(done);
        match &added {
            Ok(()) => {}
            Err(Failure::Refused(..)) => self.free_slot(&disk.serial),
            // Nobody knows whether it is there, unless the VMM says it.
            Err(_) => drop(self.reconcile_in_turn().await),
        }
        added.map_err(|failure| failure.of("add_disk"))
    }

    pub(crate) async fn detach(&self, serial: &str) -> Result<(), HypervisorError> {
        let _turn = self.turn.lock().await;
        if !self.slots().iter().flatten().any(|held| held == serial) {
            return Ok(());
        }
        let request = Request::RemoveDisk {
            serial: serial.to_owned(),
        };
        match client::ask(&self.socket, request, Vec::new())
            .await
            .and_then(done)
        {
            Ok(()) | Err(Failure::Refused(Refusal::NotFound, _)) => {}
            Err(failure) => return Err(failure.of("remove_disk")),
        }
        self.free_slot(serial);
        Ok(())
    }

    /// Makes the slots say what the VMM has.
    pub(crate) async fn reconcile(&self) -> Result<(), HypervisorError> {
        let _turn = self.turn.lock().await;
        self.reconcile_in_turn().await
    }

    async fn reconcile_in_turn(&self) -> Result<(), HypervisorError> {
        let answer = client::ask(&self.socket, Request::Status, Vec::new()).await;
        match answer.map_err(|failure| failure.of("status"))? {
            Reply::Status(Status { disks, .. }) => {
                settle(&mut self.slots(), disks);
                Ok(())
            }
            other => Err(unexpected(&other).of("status")),
        }
    }
}

fn done(reply: Reply) -> Result<(), Failure> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

/// Disks keep their slots; those that are gone free theirs, and unknown ones take free ones.
fn settle(slots: &mut [Option<String>], mut attached: Vec<String>) {
    for held in slots.iter_mut() {
        match held
            .as_ref()
            .and_then(|held| attached.iter().position(|serial| serial == held))
        {
            Some(index) => drop(attached.swap_remove(index)),
            None => *held = None,
        }
    }
    for (slot, serial) in slots.iter_mut().filter(|held| held.is_none()).zip(attached) {
        *slot = Some(serial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_become_what_the_vmm_says_without_moving_a_disk() {
        let some = |serial: &str| Some(serial.to_owned());
        let mut slots = [some("a"), None, some("gone"), some("b")];
        settle(&mut slots, vec!["new".into(), "b".into(), "a".into()]);
        assert_eq!(slots, [some("a"), some("new"), None, some("b")]);
    }

    #[test]
    fn a_slot_is_taken_once_for_each_serial_and_the_budget_is_an_error() {
        let disks = Disks::new("/nowhere".into(), vec![None, None]);
        disks.take_slot("a").unwrap();
        assert!(matches!(disks.take_slot("a"), Err(HypervisorError::Spec(_))));
        disks.take_slot("b").unwrap();
        assert!(matches!(
            disks.take_slot("c"),
            Err(HypervisorError::NoSlot { slots: 2, .. })
        ));
        disks.free_slot("a");
        disks.take_slot("c").unwrap();
        assert_eq!(*disks.slots(), [Some("c".to_owned()), Some("b".to_owned())]);
    }
}
