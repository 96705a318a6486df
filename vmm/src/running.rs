//! A VM that runs, and what can be done to it.

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use caisson_devices::{
    pci::PciAddress,
    virtio::{block::BlockHandle, mem::MemHandle},
};
use caisson_machine::{End, Machine};
use caisson_vmm_api::{
    control::{Refusal, State, Status},
    spec::VmSpec,
};

use crate::{
    control::{Ending, Operations, Refused, Resize},
    machine::{Booted, Places},
};

/// The VM.
#[derive(Debug)]
pub(crate) struct Running {
    id: String,
    machine: Machine,
    places: Places,
    vcpus_max: u32,
    /// At boot.
    memory_mib: u64,
    memory: Option<MemHandle>,
    changing: Mutex<Changing>,
}

/// What requests change.
#[derive(Debug)]
struct Changing {
    paused: bool,
    /// By serial; those that may be removed have a place.
    disks: BTreeMap<String, Attached>,
    free_slots: u32,
}

#[derive(Debug)]
struct Attached {
    handle: BlockHandle,
    /// Absent: it was there at boot, and stays.
    place: Option<PciAddress>,
}

impl Running {
    pub(crate) fn new(spec: &VmSpec, booted: Booted) -> Self {
        let disks = booted
            .disks
            .into_iter()
            .map(|(serial, handle)| (serial, Attached { handle, place: None }));
        Self {
            id: spec.id.clone(),
            changing: Mutex::new(Changing {
                paused: false,
                disks: disks.collect(),
                free_slots: spec.attach_slots,
            }),
            machine: booted.machine,
            places: booted.places,
            vcpus_max: spec.vcpus.max,
            memory_mib: spec.memory.boot_mib,
            memory: booted.memory,
        }
    }

    /// Waits for the end.
    pub(crate) fn wait(&self) -> End {
        let end = self.machine.wait();
        self.places.flush();
        end
    }

    /// Exits of vCPUs by reason.
    pub(crate) fn exits(&self) -> Vec<(String, u64)> {
        let counts = self.machine.exits();
        counts
            .iter()
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect()
    }

    /// Memory that was there at boot stays; the rest is asked of the memory device, and the guest takes it in its own time.
    fn resize_memory(&self, mib: u64) -> Result<(), Refused> {
        let unsupported = |what: &str| {
            let message = format!("cannot resize memory to {mib} MiB: {what}");
            Err(Refused::new(Refusal::Unsupported, message))
        };
        let Some(more) = mib.checked_sub(self.memory_mib) else {
            return unsupported("it is less than at boot");
        };
        match &self.memory {
            Some(memory) => memory
                .request(more.saturating_mul(1 << 20))
                .map_err(|e| Refused::failed(&e)),
            None if more == 0 => Ok(()),
            None => unsupported("the VM has no memory device"),
        }
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        // A thread that panics takes the process with it.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn no_disk(serial: &str) -> Refused {
    Refused::new(Refusal::NotFound, format!("there is no disk {serial}"))
}

impl Operations for Running {
    fn id(&self) -> &str {
        &self.id
    }

    fn status(&self) -> Status {
        let exits = self.exits();
        let changing = self.changing();
        Status {
            state: if changing.paused {
                State::Paused
            } else {
                State::Running
            },
            vcpus: self.machine.cpus().into(),
            vcpus_max: self.vcpus_max,
            memory_mib: self.memory_mib + self.memory.as_ref().map_or(0, |memory| memory.plugged() >> 20),
            disks: changing
                .disks
                .iter()
                .filter(|(_, disk)| disk.place.is_some())
                .map(|(serial, _)| serial.clone())
                .collect(),
            free_slots: changing.free_slots,
            exits,
        }
    }

    fn add_disk(&self, serial: &str, files: Vec<OwnedFd>, read_only: bool) -> Result<(), Refused> {
        let mut changing = self.changing();
        if changing.disks.contains_key(serial) {
            return Err(Refused::new(
                Refusal::Exists,
                format!("a disk {serial} is attached already"),
            ));
        }
        if changing.free_slots == 0 {
            return Err(Refused::new(Refusal::NoSlot, "every slot for disks is in use"));
        }
        let (handle, place) = self
            .places
            .add_disk(serial, files, read_only)
            .map_err(|e| Refused::failed(&e))?;
        let attached = Attached {
            handle,
            place: Some(place),
        };
        changing.disks.insert(serial.to_owned(), attached);
        changing.free_slots -= 1;
        Ok(())
    }

    fn remove_disk(&self, serial: &str) -> Result<(), Refused> {
        let mut changing = self.changing();
        let attached = changing.disks.get(serial).ok_or_else(|| no_disk(serial))?;
        let place = attached.place.ok_or_else(|| {
            Refused::new(
                Refusal::Unsupported,
                format!("disk {serial} belongs to the VM from its start"),
            )
        })?;
        self.places.remove(place).map_err(|e| Refused::failed(&e))?;
        changing.disks.remove(serial);
        changing.free_slots += 1;
        Ok(())
    }

    fn resize_disk(&self, serial: &str) -> Result<(), Refused> {
        let changing = self.changing();
        let attached = changing.disks.get(serial).ok_or_else(|| no_disk(serial))?;
        attached
            .handle
            .resized()
            .map(drop)
            .map_err(|e| Refused::failed(&e))
    }

    fn resize(&self, what: Resize) -> Result<(), Refused> {
        match what {
            Resize::Vcpus(count) => {
                let count = u8::try_from(count)
                    .map_err(|_| Refused::new(Refusal::Invalid, format!("{count} vCPUs are too many")))?;
                self.machine.grow_cpus(count).map_err(|e| Refused::failed(&e))
            }
            Resize::MemoryMib(mib) => self.resize_memory(mib),
        }
    }

    fn pause(&self, paused: bool) -> Result<(), Refused> {
        let mut changing = self.changing();
        if paused {
            self.machine.pause().map_err(|e| Refused::failed(&e))?;
        } else {
            self.machine.resume();
        }
        changing.paused = paused;
        Ok(())
    }

    fn end(&self, how: Ending) -> Result<(), Refused> {
        match how {
            Ending::Now => {
                self.machine.stop();
                Ok(())
            }
            Ending::ByTheGuest => Err(Refused::new(
                Refusal::Unsupported,
                "the machine has no power button: whoever wants the guest to end tells its agent",
            )),
        }
    }
}
