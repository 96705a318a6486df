//! PCI configuration space that a guest reads without an exit.
//!
//! A kernel reads some hundred registers of each function while it boots, and asks every empty place whether there is something. Nothing
//! in configuration space changes but by a write or by hotplug, so the guest gets to see a copy as memory that it cannot write to: its
//! reads are plain loads, its writes are exits as before, and bring the copy up to date.
//!
//! The one register that is more than its value, the window of virtio's PCI configuration access capability (virtio 1.2, 4.1.4.9), shows
//! what was there at the last write to the function; it exists for firmware, and there is none.

#![expect(unsafe_code, reason = "maps one page at many places")]

use std::{
    fs::File,
    io::{self, Write},
    sync::{Arc, Mutex, PoisonError},
};

use caisson_devices::ports::BusDevice;
use rustix::{
    fs::{MemfdFlags, memfd_create},
    mm::{MapFlags, ProtFlags},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::{
    Error,
    layout::{ECAM, PAGE},
    memory::{Ram, Slots},
};

/// Bytes of configuration space of one function; as many again and more, which is only there for ECAM, reads as absent.
const FUNCTION: u64 = PAGE;
const FUNCTIONS: u64 = 8;
const DEVICES: u64 = (ECAM.end - ECAM.start) / FUNCTION / FUNCTIONS;
/// What is copied of it: the registers that all functions have. The rest never changes.
const REGISTERS: u64 = 256;

/// The copy, and the space that it is a copy of.
pub struct ConfigMirror {
    space: Arc<dyn BusDevice>,
    /// None where KVM has no such memory. Locked while it is changed: the last copy must be of the last state.
    copy: Option<Mutex<Arc<GuestRegionMmap>>>,
}

impl std::fmt::Debug for ConfigMirror {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConfigMirror")
            .field("copied", &self.copy.is_some())
            .finish_non_exhaustive()
    }
}

/// Configuration space as it is shown before there is anything; None where KVM has no such memory.
#[derive(Debug)]
pub(crate) struct Unmirrored(Option<Arc<GuestRegionMmap>>);

impl Unmirrored {
    /// Shows it. A slot like all others, so this belongs before the interrupt controllers.
    pub(crate) fn show(slots: &Slots) -> Result<Self, Error> {
        let shown = || {
            let region = Arc::new(empty()?);
            match slots.show_for_ever(Arc::clone(&region)) {
                Ok(()) => Ok(Some(region)),
                Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(None),
                Err(e) => Err(e),
            }
        };
        shown().map(Self).map_err(|source| Error::Kvm {
            what: "show PCI configuration space to the guest",
            source,
        })
    }
}

impl ConfigMirror {
    /// Shows what `space` has now.
    pub(crate) fn new(space: Arc<dyn BusDevice>, shown: &Unmirrored) -> Self {
        let mirror = Self {
            space,
            copy: shown.0.clone().map(Mutex::new),
        };
        for device in 0..DEVICES {
            mirror.refresh_at(device * FUNCTIONS * FUNCTION);
        }
        mirror
    }

    /// A function has come or gone: whoever adds and removes them says so, before the guest is told.
    pub fn refresh(&self, device: u8, function: u8) {
        const HEADER_TYPE: u64 = 0xe;
        const MULTI_FUNCTION: u8 = 0x80;
        let first = u64::from(device) % DEVICES * FUNCTIONS * FUNCTION;
        let function = u64::from(function) % FUNCTIONS;
        self.refresh_at(first + function * FUNCTION);
        // From now on, the others are asked for.
        let mut header = [0];
        self.space.read(first + HEADER_TYPE, &mut header);
        if function == 0 && header[0] & MULTI_FUNCTION != 0 {
            for other in 1..FUNCTIONS {
                self.refresh_at(first + other * FUNCTION);
            }
        }
    }

    /// Copies the registers of the function that begins at this offset.
    fn refresh_at(&self, start: u64) {
        let Some(copy) = &self.copy else { return };
        let copy = copy.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut registers, mut seen) = ([0; REGISTERS as usize], [0; REGISTERS as usize]);
        for (index, register) in registers.chunks_mut(4).enumerate() {
            self.space.read(start + 4 * index as u64, register);
        }
        let place = MemoryRegionAddress(start);
        // Neither can fail: the place is inside. A page that is as it should be is not written to, or it would become our own.
        if copy.read_slice(&mut seen, place).is_ok() && seen != registers {
            copy.write_slice(&registers, place).ok();
        }
    }
}

impl BusDevice for ConfigMirror {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.space.write(offset, data);
        self.refresh_at(offset - offset % FUNCTION);
    }
}

/// Memory in which every first function is absent: it reads as ones. All of these are one page, until something comes there. Nobody
/// asks for other functions where there is no first one.
fn empty() -> io::Result<GuestRegionMmap> {
    let region = Ram::default().region(GuestAddress(ECAM.start), ECAM.end - ECAM.start)?;
    let mut ones = File::from(memfd_create("caisson-absent", MemfdFlags::CLOEXEC)?);
    ones.write_all(&[0xff; PAGE as usize])?;
    for device in 0..DEVICES {
        let place = MemoryRegionAddress(device * FUNCTIONS * FUNCTION);
        let place = region.get_slice(place, PAGE as usize).map_err(io::Error::other)?;
        // SAFETY: the page lies within the region, as `get_slice` has checked, and is replaced by one of the same size and rights, which
        // stays mapped until the region as a whole is unmapped. Nothing refers to what was there.
        unsafe {
            rustix::mm::mmap(
                place.ptr_guard_mut().as_ptr().cast(),
                PAGE as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED,
                &ones,
                0,
            )
        }?;
    }
    Ok(region)
}
