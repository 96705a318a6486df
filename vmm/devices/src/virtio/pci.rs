//! A virtio device as a PCI function (virtio 1.2, section 4.1), without the legacy interface and without interrupt pins: one BAR with
//! a page for each structure.
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | device configuration |
//! | 0x3000 | doorbells, four bytes for each queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |
//!
//! Doorbells are registered with the machine while the device works and its BAR answers, so that a kick wakes the device's thread and
//! nobody else; where the machine has none, the write arrives here.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    device::{DeviceType, VirtioDevice},
    interrupt::Interrupt,
    state::{FunctionState, RestoreError, SaveError},
    transport::{Consequence, Driven, MAX_QUEUES},
};
use crate::{
    complaints::Complaints,
    pci::{Bar, BarKind, Capability, ConfigSpace, Identity, MAX_VECTORS, Msix, PciFunction},
    ports::{DeviceEvent, Doorbell, Doorbells, Events, GuestRam, Interrupts},
};

const VENDOR: u16 = 0x1af4;
/// Device IDs are the virtio device type plus this.
const FIRST_DEVICE: u16 = 0x1040;
/// At least 0x40, so that no legacy driver feels meant.
const SUBSYSTEM: u16 = 0x1100;

const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x8000;
const PAGE: u64 = 0x1000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const NOTIFY_MULTIPLIER: u64 = 4;

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Why a device is no function.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// Too many queues, or sizes that are none.
    #[error("a {0} device with these queues cannot be attached")]
    Queues(&'static str),
    /// The machine has no interrupts for it.
    #[error("cannot get interrupts for the {0} device")]
    Interrupts(&'static str, #[source] io::Error),
    /// No event for a doorbell.
    #[error("cannot make doorbells for the {0} device")]
    Doorbells(&'static str, #[source] io::Error),
}

/// What the machine lends to a function.
#[derive(Clone)]
pub struct Attachment {
    /// Guest memory.
    pub memory: GuestRam,
    /// Interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Hears of failures.
    pub events: Arc<dyn Events>,
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").finish_non_exhaustive()
    }
}

/// Where doorbells are, and for which queues.
struct Ringing {
    bar: Option<u64>,
    queues: Vec<u16>,
    registered: Vec<(Doorbell, u16)>,
    complaints: Complaints,
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    kind: DeviceType,
    space: Mutex<ConfigSpace>,
    msix: Arc<Msix>,
    msix_capability: u16,
    /// Where the data of the configuration access window is.
    window_data: u16,
    interrupt: Interrupt,
    driven: Mutex<Driven>,
    kicks: Vec<EventFd>,
    doorbells: Arc<dyn Doorbells>,
    ringing: Mutex<Ringing>,
    events: Arc<dyn Events>,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci")
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Makes a function of a device; put it on a [`crate::pci::PciRoot`].
    pub fn new(device: Box<dyn VirtioDevice>, attachment: Attachment) -> Result<Arc<Self>, VirtioPciError> {
        let kind = device.device_type();
        let name = kind.name();
        let queues = device.queue_sizes().len();
        // One vector for each queue and one for the configuration; a driver with fewer vectors shares them.
        let vectors = u16::try_from(queues + 1).unwrap_or(MAX_VECTORS).min(MAX_VECTORS);
        if queues > MAX_QUEUES {
            return Err(VirtioPciError::Queues(name));
        }
        let port = attachment
            .interrupts
            .msi(vectors)
            .map_err(|e| VirtioPciError::Interrupts(name, e))?;
        let msix = Arc::new(Msix::new(port, vectors));
        let interrupt = Interrupt::new(Arc::clone(&msix), queues);
        let event = || EventFd::new(EFD_NONBLOCK);
        let events = (0..queues).map(|_| event()).collect::<io::Result<Vec<_>>>();
        let kicks = events.map_err(|e| VirtioPciError::Doorbells(name, e))?;
        let copies = kicks
            .iter()
            .map(EventFd::try_clone)
            .collect::<io::Result<Vec<_>>>();
        let copies = copies.map_err(|e| VirtioPciError::Doorbells(name, e))?;
        let driven = Driven::new(device, attachment.memory, interrupt.clone(), copies)
            .map_err(|_| VirtioPciError::Queues(name))?;
        let (space, msix_capability, window_data) = space(kind, vectors);
        Ok(Arc::new(Self {
            kind,
            space: Mutex::new(space),
            msix,
            msix_capability,
            window_data,
            interrupt,
            driven: Mutex::new(driven),
            kicks,
            doorbells: attachment.doorbells,
            ringing: Mutex::new(Ringing {
                bar: None,
                queues: Vec::new(),
                registered: Vec::new(),
                complaints: Complaints::new(name),
            }),
            events: attachment.events,
        }))
    }

    /// What it is.
    #[must_use]
    pub fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn driven(&self) -> MutexGuard<'_, Driven> {
        self.driven.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.space.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ringing(&self) -> MutexGuard<'_, Ringing> {
        self.ringing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut driven = self.driven();
        let consequence = driven.write(offset, data);
        self.follow_up(driven, consequence);
    }

    fn follow_up(&self, mut driven: MutexGuard<'_, Driven>, consequence: Consequence) {
        match consequence {
            Consequence::Nothing => {}
            Consequence::Started(queues) => {
                self.ring_for(queues);
                // What was offered before there was a doorbell.
                for kick in &self.kicks {
                    drop(kick.write(1));
                }
            }
            Consequence::Failed(e) => {
                drop(driven);
                self.interrupt.config_changed();
                self.events.happened(DeviceEvent::Failed {
                    device: self.kind.name().to_owned(),
                    reason: format!("{e}: {}", e.source),
                });
            }
            Consequence::Reset => {
                self.ring_for(Vec::new());
                driven.reset();
            }
        }
    }

    /// The device ends its work until [`VirtioPci::resume`], and leaves the guest's memory alone. To be called while no vCPU runs.
    pub fn suspend(&self) {
        self.driven().suspend();
    }

    /// The device goes on where it was.
    pub fn resume(&self) {
        let mut driven = self.driven();
        let consequence = driven.resume();
        self.follow_up(driven, consequence);
    }

    /// What it is, while it is suspended.
    pub fn state(&self) -> Result<FunctionState, SaveError> {
        let (transport, device) = self.driven().state()?;
        Ok(FunctionState {
            kind: self.kind,
            config: self.space().bytes().to_vec(),
            vectors: self.msix.state(),
            transport,
            device,
        })
    }

    /// Becomes what another function of its kind was: on the bus, before a driver has found it, with the guest's memory as it was then. Its BARs
    /// follow by [`crate::pci::PciRoot::restored`], its work begins with [`VirtioPci::resume`].
    pub fn restore(&self, state: &FunctionState) -> Result<(), RestoreError> {
        let differs = |what| RestoreError::Mismatch {
            device: self.kind.name(),
            what,
        };
        if state.kind != self.kind {
            return Err(differs("kind"));
        }
        if state.vectors.len() != usize::from(self.msix.vectors()) {
            return Err(differs("number of vectors"));
        }
        let mut driven = self.driven();
        let control = {
            let mut space = self.space();
            if !space.restore(&state.config) {
                return Err(differs("configuration space"));
            }
            space.u16_at(self.msix_capability.saturating_add(2))
        };
        driven.restore(&state.transport, &state.device)?;
        self.msix.restore(&state.vectors);
        self.msix.set_control(control);
        Ok(())
    }

    /// From now on these queues have doorbells, and no others.
    fn ring_for(&self, queues: Vec<u16>) {
        let mut ringing = self.ringing();
        ringing.queues = queues;
        self.follow(&mut ringing);
    }

    /// Brings the machine's doorbells to what is wanted.
    fn follow(&self, ringing: &mut Ringing) {
        let wanted: Vec<(Doorbell, u16)> = match ringing.bar {
            Some(bar) => ringing
                .queues
                .iter()
                .map(|&queue| {
                    let address = bar + NOTIFY + NOTIFY_MULTIPLIER * u64::from(queue);
                    (Doorbell { address }, queue)
                })
                .collect(),
            None => Vec::new(),
        };
        let stale: Vec<_> = ringing
            .registered
            .iter()
            .filter(|known| !wanted.contains(known))
            .copied()
            .collect();
        for (doorbell, queue) in stale {
            let Some(kick) = self.kicks.get(usize::from(queue)) else {
                continue;
            };
            if let Err(e) = self.doorbells.unregister(doorbell, kick) {
                ringing.complaints.say(format_args!("doorbell stays: {e}"));
            }
            ringing.registered.retain(|known| *known != (doorbell, queue));
        }
        for (doorbell, queue) in wanted {
            if ringing.registered.contains(&(doorbell, queue)) {
                continue;
            }
            let Some(kick) = self.kicks.get(usize::from(queue)) else {
                continue;
            };
            match self.doorbells.register(doorbell, kick) {
                Ok(()) => ringing.registered.push((doorbell, queue)),
                // Kicks arrive as exits, then: slower, and nothing is lost.
                Err(e) => ringing.complaints.say(format_args!("no doorbell: {e}")),
            }
        }
    }

    /// What the configuration access window points at, if the access is one of its data.
    fn window(&self, offset: u16, length: usize) -> Option<(u8, u64)> {
        if offset != self.window_data || !matches!(length, 1 | 2 | 4) {
            return None;
        }
        let space = self.space();
        let head = self.window_data.checked_sub(16)?;
        let mut bar = [0];
        space.read(head + 4, &mut bar);
        let (at, bytes) = (space.u32_at(head + 8), space.u32_at(head + 12));
        let whole = bytes as usize == length && at.is_multiple_of(bytes);
        let [bar] = bar;
        whole.then_some((bar, u64::from(at)))
    }
}

/// The configuration space; also where the MSI-X capability and the window's data are.
fn space(kind: DeviceType, vectors: u16) -> (ConfigSpace, u16, u16) {
    let mut space = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE + kind.id(),
        revision: 1,
        class: match kind {
            DeviceType::Net => [0x02, 0x00, 0x00],
            DeviceType::Block => [0x01, 0x80, 0x00],
            DeviceType::Mem | DeviceType::Pmem => [0x05, 0x80, 0x00],
            _ => [0x08, 0x80, 0x00],
        },
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    });
    // There is room for one BAR and six small capabilities.
    space.add_bar(BAR, BAR_BYTES, BarKind::Memory64);
    let [table, pending] = [TABLE, PENDING].map(|at| (at as u32 | u32::from(BAR)).to_le_bytes());
    let control = (vectors - 1).to_le_bytes();
    let msix = [control.as_slice(), &table, &pending].concat();
    let msix_capability = space.add_capability(&Capability {
        id: CAPABILITY_MSIX,
        body: &msix,
        writable: &[0, 0xc0],
    });
    for (kind, offset, length) in [
        (CFG_COMMON, COMMON, super::transport::COMMON_BYTES as u64),
        (CFG_ISR, ISR, 1),
        (CFG_DEVICE, DEVICE, PAGE),
    ] {
        space.add_capability(&structure(&body(kind, offset, length, &[]), &[]));
    }
    let multiplier = (NOTIFY_MULTIPLIER as u32).to_le_bytes();
    space.add_capability(&structure(&body(CFG_NOTIFY, NOTIFY, PAGE, &multiplier), &[]));
    let mut writable = [0; 18];
    // The BAR, and from the offset on everything.
    for (at, mask) in writable.iter_mut().enumerate() {
        *mask = if at == 2 || at >= 6 { 0xff } else { 0 };
    }
    let window = space.add_capability(&structure(&body(CFG_PCI, 0, 0, &[0; 4]), &writable));
    (
        space,
        msix_capability.map_or(u16::MAX, u16::from),
        window.map_or(u16::MAX, |at| u16::from(at) + 16),
    )
}

/// A vendor capability that points to a structure (4.1.4), from its length on.
fn body(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let [offset, length] = [offset, length].map(|number| (number as u32).to_le_bytes());
    let bytes = 16 + more.len() as u8;
    [&[bytes, kind, BAR, 0, 0, 0], offset.as_slice(), &length, more].concat()
}

fn structure<'a>(body: &'a [u8], writable: &'a [u8]) -> Capability<'a> {
    Capability {
        id: CAPABILITY_VENDOR,
        body,
        writable,
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        match self.window(offset, data.len()) {
            Some((bar, at)) => self.read_bar(bar, at, data),
            None => self.space().read(offset, data),
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let control = self.msix_capability.saturating_add(2);
        let mut space = self.space();
        space.write(offset, data);
        let touched = usize::from(offset) + data.len() > usize::from(control) && offset < control + 2;
        let value = space.u16_at(control);
        drop(space);
        if touched {
            self.msix.set_control(value);
        }
        if let Some((bar, at)) = self.window(offset, data.len()) {
            self.write_bar(bar, at, data);
        }
    }

    fn bars(&self) -> Vec<Bar> {
        self.space().bars()
    }

    fn place_bar(&self, index: u8, address: u64) {
        self.space().place_bar(index, address);
    }

    fn set_multi_function(&self) {
        self.space().set_multi_function();
    }

    fn read_bar(&self, index: u8, offset: u64, data: &mut [u8]) {
        let within = offset % PAGE;
        match offset - within {
            _ if index != BAR => data.fill(0xff),
            COMMON => self.driven().read(within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (within, data.first_mut()) {
                    *first = self.interrupt.take_isr();
                }
            }
            DEVICE => self.driven().device().read_config(within, data),
            TABLE => self.msix.read_table(within, data),
            PENDING => self.msix.read_pending(within, data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, index: u8, offset: u64, data: &[u8]) {
        let within = offset % PAGE;
        match offset - within {
            _ if index != BAR => {}
            COMMON => self.write_common(within, data),
            DEVICE => self.driven().device().write_config(within, data),
            NOTIFY => {
                let queue = usize::try_from(within / NOTIFY_MULTIPLIER).unwrap_or(usize::MAX);
                if let Some(kick) = self.kicks.get(queue) {
                    // Fails only when the counter is full: then it is ringing.
                    drop(kick.write(1));
                }
            }
            TABLE => self.msix.write_table(within, data),
            _ => {}
        }
    }

    fn moved(&self, index: u8, address: Option<u64>) {
        if index == BAR {
            let mut ringing = self.ringing();
            ringing.bar = address;
            self.follow(&mut ringing);
        }
    }

    fn removed(&self) {
        let mut driven = self.driven();
        self.moved(BAR, None);
        driven.reset();
    }
}
