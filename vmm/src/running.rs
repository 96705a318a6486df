//! A VM that runs, and what can be done to it.

use std::{
    collections::BTreeMap,
    io::{self, Read},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use caisson_devices::{
    pci::PciAddress,
    virtio::{block::BlockHandle, mem::MemHandle, vsock::VsockDialer},
};
use caisson_machine::{End, Machine};
use caisson_vmm_api::{
    control::{ANSWER_SECONDS, Refusal, State, Status},
    spec::VmSpec,
};

use crate::{
    control::{Added, Ending, Kind, Operations, Refused, Resize},
    machine::{Booted, Places},
    saved::{Function, StateError, VmState},
};

/// With which a vsock connection of the host begins that somebody in the guest has accepted.
const ACCEPTED: &[u8] = b"OK ";

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
    /// Reaches the guest's ports.
    vsock: Option<VsockDialer>,
    changing: Mutex<Changing>,
}

/// What requests change.
#[derive(Debug)]
struct Changing {
    paused: bool,
    /// By kind and name; those that may be removed have a place.
    devices: BTreeMap<(Kind, String), Attached>,
    free_slots: u32,
}

#[derive(Debug)]
struct Attached {
    handle: Handle,
    /// Absent: it was there at boot, and stays.
    place: Option<PciAddress>,
}

/// What is needed of a device later.
#[derive(Debug)]
enum Handle {
    Disk(BlockHandle),
    Nic,
    /// Where persistent memory lies.
    Memory(u64),
}

impl Running {
    pub(crate) fn new(spec: &VmSpec, booted: Booted) -> Self {
        let disks = booted.disks.into_iter().map(|(serial, handle)| {
            let handle = Handle::Disk(handle);
            ((Kind::Disk, serial), Attached { handle, place: None })
        });
        Self {
            id: spec.id.clone(),
            changing: Mutex::new(Changing {
                paused: false,
                devices: disks.collect(),
                free_slots: spec.attach_slots,
            }),
            machine: booted.machine,
            places: booted.places,
            vcpus_max: spec.vcpus.max,
            memory_mib: spec.memory.boot_mib,
            memory: booted.memory,
            vsock: booted.vsock,
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

    fn attach(&self, device: Added, mut files: Vec<OwnedFd>) -> Result<Attached, Refused> {
        let attached = match device {
            Added::Disk { serial, read_only } => {
                let added = self.places.add_disk(&serial, files, read_only);
                added.map(|(handle, place)| (Handle::Disk(handle), place))
            }
            Added::Nic { mac, mtu, queues, .. } => {
                // As many taps as queues, and then vhost-net; a wrong number of those is the device's to refuse.
                let vhost = files.split_off(queues.min(files.len()));
                let added = self.places.add_nic(files, vhost, mac, mtu);
                added.map(|place| (Handle::Nic, place))
            }
            Added::Pmem { read_only, .. } => {
                let missing = || Refused::new(Refusal::Invalid, "persistent memory without a file");
                let file = files.pop().ok_or_else(missing)?;
                let added = self.places.add_pmem(self.machine.vm(), file, read_only);
                added.map(|(place, start)| (Handle::Memory(start), place))
            }
        };
        let (handle, place) = attached.map_err(|e| Refused::failed(&e))?;
        Ok(Attached {
            handle,
            place: Some(place),
        })
    }

    /// Tells whoever listens on a port of the guest to end it; waits for the answer, not for the end.
    fn ask_to_end(&self, port: u32) -> Result<(), Refused> {
        if self.changing().paused {
            let message = "a guest that is paused cannot be asked anything";
            return Err(Refused::new(Refusal::Invalid, message));
        }
        let Some(vsock) = &self.vsock else {
            return Err(Refused::new(Refusal::Unsupported, "the VM has no vsock"));
        };
        let answered = vsock.dial(port).and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(ANSWER_SECONDS)))?;
            stream.read_exact(&mut [0; ACCEPTED.len()])
        });
        answered.map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let message = format!("nobody in the guest listens on port {port}");
                Refused::new(Refusal::Unsupported, message)
            }
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                let message = format!("the guest did not answer within {ANSWER_SECONDS} s");
                Refused::new(Refusal::Busy, message)
            }
            _ => Refused::failed(&e),
        })
    }

    fn state(&self, msrs: &[u32]) -> Result<VmState, StateError> {
        let machine = self.machine.state(msrs)?;
        let states = self
            .places
            .states()
            .map_err(|(e, place)| StateError::Function(e, place))?;
        let functions = states.into_iter().map(|(place, state)| Function {
            device: place.device,
            function: place.function,
            state,
        });
        let console = self.places.console();
        Ok(VmState::new(&self.id, machine, console, functions.collect()))
    }

    fn changing(&self) -> MutexGuard<'_, Changing> {
        // A thread that panics takes the process with it.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn article(kind: Kind) -> &'static str {
    match kind {
        Kind::Disk => "disk",
        Kind::Nic => "NIC",
        Kind::Pmem => "persistent memory",
    }
}

fn none(kind: Kind, name: &str) -> Refused {
    Refused::new(Refusal::NotFound, format!("there is no {} {name}", article(kind)))
}

impl Operations for Running {
    fn id(&self) -> &str {
        &self.id
    }

    fn status(&self) -> Status {
        let exits = self.exits();
        let changing = self.changing();
        let added = |kind| {
            let of_kind = changing
                .devices
                .iter()
                .filter(move |((other, _), device)| *other == kind && device.place.is_some());
            of_kind.map(|((_, name), _)| name.clone()).collect()
        };
        Status {
            state: if changing.paused {
                State::Paused
            } else {
                State::Running
            },
            vcpus: self.machine.cpus().into(),
            vcpus_max: self.vcpus_max,
            memory_mib: self.memory_mib + self.memory.as_ref().map_or(0, |memory| memory.plugged() >> 20),
            disks: added(Kind::Disk),
            nics: added(Kind::Nic),
            pmems: added(Kind::Pmem),
            full_disks: self.places.full_disks(),
            free_slots: changing.free_slots,
            exits,
        }
    }

    fn add(&self, device: Added, files: Vec<OwnedFd>) -> Result<(), Refused> {
        let mut changing = self.changing();
        let (kind, name) = match &device {
            Added::Disk { serial, .. } => (Kind::Disk, serial.clone()),
            Added::Nic { name, .. } => (Kind::Nic, name.clone()),
            Added::Pmem { name, .. } => (Kind::Pmem, name.clone()),
        };
        if changing.devices.contains_key(&(kind, name.clone())) {
            let message = format!("{} {name} is attached already", article(kind));
            return Err(Refused::new(Refusal::Exists, message));
        }
        if changing.free_slots == 0 {
            return Err(Refused::new(Refusal::NoSlot, "every slot for devices is in use"));
        }
        let attached = self.attach(device, files)?;
        changing.devices.insert((kind, name), attached);
        changing.free_slots -= 1;
        Ok(())
    }

    fn remove(&self, kind: Kind, name: &str) -> Result<(), Refused> {
        let mut changing = self.changing();
        let key = (kind, name.to_owned());
        let attached = changing.devices.get(&key).ok_or_else(|| none(kind, name))?;
        let place = attached.place.ok_or_else(|| {
            let message = format!("{} {name} belongs to the VM from its start", article(kind));
            Refused::new(Refusal::Unsupported, message)
        })?;
        self.places.remove(place).map_err(|e| Refused::failed(&e))?;
        if let Some(Attached {
            handle: Handle::Memory(start),
            ..
        }) = changing.devices.remove(&key)
        {
            self.machine.vm().free_plug_space(start);
        }
        changing.free_slots += 1;
        Ok(())
    }

    fn resize_disk(&self, serial: &str) -> Result<(), Refused> {
        let changing = self.changing();
        let attached = changing.devices.get(&(Kind::Disk, serial.to_owned()));
        let Some(Attached {
            handle: Handle::Disk(handle),
            ..
        }) = attached
        else {
            return Err(none(Kind::Disk, serial));
        };
        handle.resized().map(drop).map_err(|e| Refused::failed(&e))
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
            if let Err(e) = self.machine.pause() {
                // Those that stand still would do so for ever.
                self.machine.resume();
                return Err(Refused::failed(&e));
            }
            self.places.suspend();
        } else {
            self.places.resume();
            self.machine.resume();
        }
        changing.paused = paused;
        Ok(())
    }

    fn save(&self, file: OwnedFd, msrs: &[u32]) -> Result<(), Refused> {
        let changing = self.changing();
        if !changing.paused {
            return Err(Refused::new(Refusal::Invalid, "only a paused VM can be saved"));
        }
        let written = self.state(msrs).and_then(|state| state.write(file));
        written.map_err(|e| match e {
            StateError::NoFile => Refused::new(Refusal::Invalid, e.to_string()),
            _ => Refused::failed(&e),
        })
    }

    fn end(&self, how: Ending) -> Result<(), Refused> {
        match how {
            Ending::Now => {
                self.machine.stop();
                Ok(())
            }
            Ending::ByTheGuest(port) => self.ask_to_end(port),
        }
    }
}
