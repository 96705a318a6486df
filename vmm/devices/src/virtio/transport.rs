//! What a driver sees of any virtio device (virtio 1.2, sections 2.1, 2.2 and 3.1): status, features, queues. Its registers are those
//! of the common configuration structure (4.1.4.3).
//!
//! ```text
//!  reset -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK (the device works)
//!    ^_________________________________________________|  by writing zero, at any time
//! ```
//!
//! A driver that leaves this order gets nothing for it: bits that it may not set stay clear, registers that it may not write keep
//! their value.

use virtio_bindings::{
    virtio_config::{
        VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
        VIRTIO_F_VERSION_1,
    },
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::{
    device::{ActivateError, Activation, ActiveQueue, VirtioDevice},
    interrupt::Interrupt,
    state::{DeviceState, QueueState, RestoreError, SaveError, TransportState},
};
use crate::ports::GuestRam;

/// Bytes of the common configuration structure.
pub(super) const COMMON_BYTES: usize = 0x3c;

/// Queues that a device may have: one page of doorbells, four bytes each.
pub const MAX_QUEUES: usize = 1024;

const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// Features that every device here has.
const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the transport is to do after a register was written.
#[derive(Debug)]
pub(super) enum Consequence {
    Nothing,
    /// The device works: these queues want doorbells.
    Started(Vec<u16>),
    /// The device could not be started.
    Failed(ActivateError),
    /// The driver wants to begin anew: end the doorbells, then call [`Driven::reset`].
    Reset,
}

/// A device and its driver's view of it.
pub(super) struct Driven {
    device: Box<dyn VirtioDevice>,
    memory: GuestRam,
    interrupt: Interrupt,
    kicks: Vec<EventFd>,
    queues: Vec<Queue>,
    offered: u64,
    accepted: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    status: u8,
    /// Nothing happens, and [`Driven::resume`] goes on where it was.
    suspended: bool,
}

impl Driven {
    pub(super) fn new(
        mut device: Box<dyn VirtioDevice>,
        memory: GuestRam,
        interrupt: Interrupt,
        kicks: Vec<EventFd>,
    ) -> Result<Self, virtio_queue::Error> {
        let sizes = device.queue_sizes().iter();
        let queues = sizes
            .map(|size| Queue::new(*size))
            .collect::<Result<Vec<_>, _>>()?;
        device.connect(&interrupt);
        Ok(Self {
            offered: device.features() | RING_FEATURES,
            device,
            memory,
            interrupt,
            kicks,
            queues,
            accepted: 0,
            device_select: 0,
            driver_select: 0,
            queue_select: 0,
            status: 0,
            suspended: false,
        })
    }

    pub(super) fn device(&mut self) -> &mut dyn VirtioDevice {
        self.device.as_mut()
    }

    /// Everything as it was in the beginning.
    pub(super) fn reset(&mut self) {
        self.device.reset();
        self.interrupt.reset();
        for queue in &mut self.queues {
            queue.reset();
        }
        self.accepted = 0;
        self.device_select = 0;
        self.driver_select = 0;
        self.queue_select = 0;
        self.status = 0;
        self.suspended = false;
    }

    /// Reads registers; no access has a side effect, and none is too odd.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        super::device::read_space(&self.registers(), offset, data);
    }

    fn registers(&self) -> [u8; COMMON_BYTES] {
        let mut space = [0; COMMON_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            for (slot, byte) in space.iter_mut().skip(at).zip(bytes) {
                *slot = *byte;
            }
        };
        put(0x00, &self.device_select.to_le_bytes());
        put(0x04, &half(self.offered, self.device_select).to_le_bytes());
        put(0x08, &self.driver_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.driver_select).to_le_bytes());
        put(0x10, &self.interrupt.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.status, self.interrupt.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.size().to_le_bytes());
            put(
                0x1a,
                &self.interrupt.queue_vector(self.queue_select).to_le_bytes(),
            );
            put(0x1c, &u16::from(queue.ready()).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.desc_table().to_le_bytes());
            put(0x28, &queue.avail_ring().to_le_bytes());
            put(0x30, &queue.used_ring().to_le_bytes());
        }
        space
    }

    /// Writes one register, as wide as it is; 64-bit ones also by halves.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Consequence {
        match (offset, data) {
            (0x14, &[status]) => return self.set_status(status),
            (_, &[a, b]) => self.write_u16(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_u32(offset, u32::from_le_bytes([a, b, c, d])),
            (0x20 | 0x28 | 0x30, &[a, b, c, d, e, f, g, h]) => {
                self.write_u32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_u32(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
        Consequence::Nothing
    }

    fn write_u16(&mut self, offset: u64, value: u16) {
        match offset {
            0x10 => self.interrupt.set_config_vector(value),
            0x16 => self.queue_select = value,
            0x1a => self.interrupt.set_queue_vector(self.queue_select, value),
            0x18 => {
                if let Some(queue) = self.queue_to_set_up() {
                    // Ignores sizes that are no power of two, or beyond the greatest.
                    queue.set_size(value);
                }
            }
            0x1c if value == 1 => {
                if let Some(queue) = self.queue_to_set_up() {
                    queue.set_ready(true);
                }
            }
            _ => {}
        }
    }

    fn write_u32(&mut self, offset: u64, value: u32) {
        match offset {
            0x00 => self.device_select = value,
            0x08 => self.driver_select = value,
            0x0c if self.status & FEATURES_OK == 0 => set_half(&mut self.accepted, self.driver_select, value),
            _ => {
                let Some(queue) = self.queue_to_set_up() else {
                    return;
                };
                let (low, high) = if offset & 4 == 0 {
                    (Some(value), None)
                } else {
                    (None, Some(value))
                };
                match offset & !7 {
                    0x20 => queue.set_desc_table_address(low, high),
                    0x28 => queue.set_avail_ring_address(low, high),
                    0x30 => queue.set_used_ring_address(low, high),
                    _ => {}
                }
            }
        }
    }

    /// The selected queue, while the driver may still set it up.
    fn queue_to_set_up(&mut self) -> Option<&mut Queue> {
        let may = self.status & FEATURES_OK != 0 && self.status & DRIVER_OK == 0;
        let queue = self.queues.get_mut(usize::from(self.queue_select))?;
        (may && !queue.ready()).then_some(queue)
    }

    fn set_status(&mut self, status: u8) -> Consequence {
        if status == 0 {
            return Consequence::Reset;
        }
        // What the device alone sets; and bits cannot be taken back but by a reset.
        let mut fresh = status & !self.status & !NEEDS_RESET;
        if fresh & FEATURES_OK != 0 && !self.features_are_acceptable() {
            fresh &= !FEATURES_OK;
        }
        if fresh & DRIVER_OK != 0 && (self.status | fresh) & FEATURES_OK == 0 {
            fresh &= !DRIVER_OK;
        }
        self.status |= fresh;
        if fresh & DRIVER_OK == 0 {
            return Consequence::Nothing;
        }
        match self.activate() {
            Ok(queues) => Consequence::Started(queues),
            Err(e) => {
                self.status |= NEEDS_RESET;
                Consequence::Failed(e)
            }
        }
    }

    /// The device ends its work, and the queues know how far it has come.
    pub(super) fn suspend(&mut self) {
        for ActiveQueue { index, queue, .. } in self.device.suspend() {
            let own = self.queues.get_mut(usize::from(index));
            // A state that a queue says of itself makes a queue.
            if let (Some(own), Ok(queue)) = (own, Queue::try_from(queue.state())) {
                *own = queue;
            }
        }
        self.suspended = true;
    }

    /// The device goes on, if it was at work.
    pub(super) fn resume(&mut self) -> Consequence {
        let was_suspended = std::mem::take(&mut self.suspended);
        if !was_suspended || self.status & DRIVER_OK == 0 || self.status & NEEDS_RESET != 0 {
            return Consequence::Nothing;
        }
        match self.activate() {
            Ok(queues) => Consequence::Started(queues),
            Err(e) => {
                self.status |= NEEDS_RESET;
                Consequence::Failed(e)
            }
        }
    }

    /// What the driver has set up, and what the device has of its own; while it is suspended.
    pub(super) fn state(&self) -> Result<(TransportState, DeviceState), SaveError> {
        if !self.suspended {
            return Err(SaveError::Working(self.device.device_type().name()));
        }
        let queues = (0..).zip(&self.queues).map(|(index, queue)| QueueState {
            size: queue.size(),
            vector: self.interrupt.queue_vector(index),
            ready: queue.ready(),
            descriptors: queue.desc_table(),
            available: queue.avail_ring(),
            used: queue.used_ring(),
            next_available: queue.next_avail(),
            next_used: queue.next_used(),
        });
        let transport = TransportState {
            features: self.accepted,
            status: self.status,
            isr: self.interrupt.isr(),
            generation: self.interrupt.generation(),
            device_select: self.device_select,
            driver_select: self.driver_select,
            queue_select: self.queue_select,
            config_vector: self.interrupt.config_vector(),
            queues: queues.collect(),
        };
        Ok((transport, self.device.state()?))
    }

    /// Becomes what another one was; suspended from then on.
    pub(super) fn restore(
        &mut self,
        transport: &TransportState,
        device: &DeviceState,
    ) -> Result<(), RestoreError> {
        let name = self.device.device_type().name();
        let differs = |what| RestoreError::Mismatch { device: name, what };
        if self.status != 0 {
            return Err(RestoreError::Used(name));
        }
        if transport.features & !self.offered != 0 {
            return Err(differs("features"));
        }
        let mut queues = Vec::with_capacity(self.queues.len());
        for (own, state) in self.queues.iter().zip(&transport.queues) {
            let event_idx = transport.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
            let queue = Queue::try_from(virtio_queue::QueueState {
                max_size: own.max_size(),
                next_avail: state.next_available,
                next_used: state.next_used,
                event_idx_enabled: event_idx,
                size: state.size,
                ready: state.ready,
                desc_table: state.descriptors,
                avail_ring: state.available,
                used_ring: state.used,
            });
            queues.push(queue.map_err(|_| differs("queues"))?);
        }
        if queues.len() != self.queues.len() || queues.len() != transport.queues.len() {
            return Err(differs("queues"));
        }
        self.device.restore(device)?;
        self.queues = queues;
        for (index, state) in (0..).zip(&transport.queues) {
            self.interrupt.set_queue_vector(index, state.vector);
        }
        self.interrupt.set_config_vector(transport.config_vector);
        self.interrupt.restore(transport.isr, transport.generation);
        self.accepted = transport.features;
        self.status = transport.status;
        self.device_select = transport.device_select;
        self.driver_select = transport.driver_select;
        self.queue_select = transport.queue_select;
        self.suspended = true;
        Ok(())
    }

    fn features_are_acceptable(&self) -> bool {
        self.accepted & !self.offered == 0 && self.accepted & 1 << VIRTIO_F_VERSION_1 != 0
    }

    /// Starts the device; the queues that it works on.
    fn activate(&mut self) -> Result<Vec<u16>, ActivateError> {
        let memory = self.memory.memory();
        let event_idx = self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        let mut in_use = Vec::new();
        for ((index, queue), kick) in (0..).zip(&mut self.queues).zip(&self.kicks) {
            queue.set_event_idx(event_idx);
            // A queue outside of memory is no queue. There is no error to tell, and no one to tell it to.
            let usable = queue.ready() && queue.is_valid(&*memory);
            let copy = usable.then(|| Queue::try_from(queue.state()).ok()).flatten();
            queues.push(match copy {
                Some(queue) => {
                    in_use.push(index);
                    let kick = kick.try_clone().map_err(|source| ActivateError {
                        device: self.device.device_type().name(),
                        source,
                    })?;
                    Some(ActiveQueue { index, queue, kick })
                }
                None => None,
            });
        }
        self.device.activate(Activation {
            memory: self.memory.clone(),
            features: self.accepted,
            queues,
            interrupt: self.interrupt.clone(),
        })?;
        Ok(in_use)
    }
}

/// The low or the high half of a number of feature bits; there are no others.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_half(features: &mut u64, select: u32, value: u32) {
    match select {
        0 => *features = (*features & !0xffff_ffff) | u64::from(value),
        1 => *features = (*features & 0xffff_ffff) | u64::from(value) << 32,
        _ => {}
    }
}
