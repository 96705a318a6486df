//! How a device speaks to its driver: used buffers and changes of configuration, by MSI-X vectors that the driver has chosen.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, Ordering},
    },
};

use vmm_sys_util::eventfd::EventFd;

use crate::pci::Msix;

/// The driver wants no interrupt for this.
pub const NO_VECTOR: u16 = 0xffff;

/// Bits of the ISR status register (virtio 1.2, 4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

#[derive(Debug)]
struct Shared {
    msix: Arc<Msix>,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
}

/// Interrupts of one device; clones speak for the same device, from any thread.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<Shared>);

impl Interrupt {
    /// For a device of so many queues, without vectors yet.
    #[must_use]
    pub fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self(Arc::new(Shared {
            msix,
            config: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }))
    }

    /// Buffers of the queue have been used.
    pub fn queue(&self, index: u16) {
        let vector = self.queue_vector(index);
        // Who has a vector does not read the register.
        if vector == NO_VECTOR {
            self.0.isr.fetch_or(ISR_QUEUE, Ordering::SeqCst);
        } else {
            self.0.msix.trigger(vector);
        }
    }

    /// Configuration space is not what it was.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.0.isr.fetch_or(ISR_CONFIG, Ordering::SeqCst);
        self.0.msix.trigger(self.config_vector());
    }

    /// An event that raises the queue's interrupt, for data paths in the host's kernel; `None` if the driver wants none.
    pub fn queue_event(&self, index: u16) -> io::Result<Option<EventFd>> {
        match self.queue_vector(index) {
            NO_VECTOR => Ok(None),
            vector => self.0.msix.eventfd(vector).map(Some),
        }
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.0.config.load(Ordering::Relaxed)
    }

    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        let vector = self.0.queues.get(usize::from(index));
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// A vector that the function does not have becomes none, which the driver sees when it reads it back.
    fn checked(&self, vector: u16) -> u16 {
        if vector < self.0.msix.vectors() {
            vector
        } else {
            NO_VECTOR
        }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.0.config.store(self.checked(vector), Ordering::Relaxed);
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(slot) = self.0.queues.get(usize::from(index)) {
            slot.store(self.checked(vector), Ordering::Relaxed);
        }
    }

    pub(super) fn generation(&self) -> u8 {
        self.0.generation.load(Ordering::SeqCst)
    }

    pub(super) fn isr(&self) -> u8 {
        self.0.isr.load(Ordering::SeqCst)
    }

    /// As it was in another function; vectors are set apart.
    pub(super) fn restore(&self, isr: u8, generation: u8) {
        self.0.isr.store(isr, Ordering::SeqCst);
        self.0.generation.store(generation, Ordering::SeqCst);
    }

    /// Reading the register clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.0.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn reset(&self) {
        self.set_config_vector(NO_VECTOR);
        for vector in &self.0.queues {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.take_isr();
    }
}
