//! What every virtio device is (virtio 1.2, chapter 2), whatever its transport: features, configuration space, queues, and the life
//! cycle reset -> activated -> reset.

use std::{fmt, io, sync::atomic::Ordering};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{
    chain::Buffers,
    interrupt::Interrupt,
    state::{DeviceState, RestoreError, SaveError},
};
use crate::ports::GuestRam;

/// Rounds of a whole queue that are served before other events get their turn.
const ROUNDS: u32 = 4;

/// Bit of the available ring's flags (2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Device types (virtio 1.2, chapter 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceType {
    /// Network card.
    Net,
    /// Disk.
    Block,
    /// Entropy source.
    Rng,
    /// Memory balloon.
    Balloon,
    /// Socket device.
    Vsock,
    /// Memory device.
    Mem,
    /// Persistent memory.
    Pmem,
}

impl DeviceType {
    /// Device ID of the specification.
    #[must_use]
    pub fn id(self) -> u16 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
            Self::Rng => 4,
            Self::Balloon => 5,
            Self::Vsock => 19,
            Self::Mem => 24,
            Self::Pmem => 27,
        }
    }

    /// As a word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "block",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "mem",
            Self::Pmem => "pmem",
        }
    }
}

/// Why a device did not start. The host's fault, never the guest's.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the {device} device")]
pub struct ActivateError {
    /// Which device.
    pub device: &'static str,
    /// What failed.
    #[source]
    pub source: io::Error,
}

/// A virtio device, as its transport sees it. Called on vCPU threads, so nothing here may take long, except for the end of a worker.
pub trait VirtioDevice: Send {
    /// What it is.
    fn device_type(&self) -> DeviceType;

    /// Feature bits that it offers. The transport adds those of the ring and of itself.
    fn features(&self) -> u64;

    /// Greatest size of each of its queues, each a power of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads configuration space; bytes outside of it are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes configuration space. Mostly, nothing can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// Whom to tell when configuration space changes by itself. Called once, before anything else.
    fn connect(&mut self, _interrupt: &Interrupt) {}

    /// The driver is ready: work begins. Called only after construction or [`VirtioDevice::reset`].
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// All work ends, before it returns; as new. May be called at any time, also twice.
    fn reset(&mut self);

    /// All work ends, before it returns, and nothing is forgotten: what was begun is finished, and the queues come back as far as they have
    /// been served. The next [`VirtioDevice::activate`] goes on from there. Until then the device leaves the guest's memory alone.
    fn suspend(&mut self) -> Vec<ActiveQueue>;

    /// What it has beside its queues; asked for between [`VirtioDevice::suspend`] and the next activation.
    fn state(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Plain)
    }

    /// Becomes what another one of its kind was. Called only on a new device, before it is activated.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        match state {
            DeviceState::Plain => Ok(()),
            _ => Err(self.foreign_state()),
        }
    }

    /// The error for a state of another kind of device.
    fn foreign_state(&self) -> RestoreError {
        RestoreError::Mismatch {
            device: self.device_type().name(),
            what: "kind",
        }
    }
}

/// What a driver has set up.
#[derive(Debug)]
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestRam,
    /// Features that both sides know.
    pub features: u64,
    /// Queues by index; `None` for those that the driver has not enabled, or placed where there is no memory.
    pub queues: Vec<Option<ActiveQueue>>,
    /// Interrupts of the device.
    pub interrupt: Interrupt,
}

impl Activation {
    /// Takes a queue.
    pub fn queue(&mut self, index: usize) -> Option<ActiveQueue> {
        self.queues.get_mut(index).and_then(Option::take)
    }

    /// Was the feature bit negotiated?
    #[must_use]
    pub fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }
}

/// A queue in use.
pub struct ActiveQueue {
    /// Its index on the device.
    pub index: u16,
    /// Its state.
    pub queue: Queue,
    /// Readable when the driver has offered buffers. Watched for its edges, so nobody need read it.
    pub kick: EventFd,
}

impl fmt::Debug for ActiveQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ActiveQueue")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

/// Whether a queue has more to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing is left; the driver rings when there is more.
    All,
    /// The worker said that it takes no more for now. Kicks are not asked for.
    Held,
}

/// What became of one chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Give it back, with so many bytes written to it.
    Used(u32),
    /// It is being worked on; whoever does gives it back.
    Kept,
    /// Not now: it stays in the queue, and so does what follows.
    NotNow,
}

impl ActiveQueue {
    /// Serves what is in the queue, chain by chain. A chain that makes no sense is given back without `work` having seen it.
    ///
    /// A driver that offers without end does not keep the worker here: the queue rings by itself, then.
    pub fn serve<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        interrupt: &Interrupt,
        mut work: impl FnMut(u16, Buffers<'m>) -> Outcome,
    ) -> Served {
        let mut fruitless = false;
        for _ in 0..ROUNDS {
            // Fails only when the ring is not in memory; then there is nothing in it either.
            drop(self.queue.disable_notification(memory));
            let mut moved = false;
            let mut used = false;
            let mut held = false;
            for _ in 0..self.queue.size() {
                let Some(chain) = self.queue.pop_descriptor_chain(memory) else {
                    break;
                };
                let head = chain.head_index();
                let outcome = match Buffers::of(memory, chain) {
                    Ok(buffers) => work(head, buffers),
                    Err(_) => Outcome::Used(0),
                };
                match outcome {
                    Outcome::Used(length) => used |= self.queue.add_used(memory, head, length).is_ok(),
                    Outcome::Kept => {}
                    Outcome::NotNow => {
                        self.queue.go_to_previous_position();
                        held = true;
                        break;
                    }
                }
                moved = true;
            }
            if used {
                self.notify(memory, interrupt);
            }
            if held {
                return Served::Held;
            }
            if !self.queue.enable_notification(memory).unwrap_or(false) {
                return Served::All;
            }
            // Something came just before it was asked for; but a ring whose index makes no sense yields nothing, however often it
            // is asked.
            if fruitless && !moved {
                return Served::All;
            }
            fruitless = !moved;
        }
        // Cannot fail: the counter is not that full.
        drop(self.kick.write(1));
        Served::All
    }

    /// Gives a chain back, without telling the driver yet.
    pub fn give_back(&mut self, memory: &GuestMemoryMmap, head: u16, length: u32) {
        // A used ring that is not in memory is the driver's own loss.
        drop(self.queue.add_used(memory, head, length));
    }

    /// Tells the driver that chains were given back, if it wants to know.
    pub fn notify(&mut self, memory: &GuestMemoryMmap, interrupt: &Interrupt) {
        let needed = self.queue.needs_notification(memory).unwrap_or(true);
        if needed && (self.queue.event_idx_enabled() || !self.wants_no_interrupts(memory)) {
            interrupt.queue(self.index);
        }
    }

    /// The driver's flag that counts when there are no event indices.
    fn wants_no_interrupts(&self, memory: &GuestMemoryMmap) -> bool {
        let flags: Result<u16, _> = memory.load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed);
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT != 0)
    }
}

/// Reads from a configuration space of these bytes; beyond it there are zeros.
pub(crate) fn read_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (slot, byte) in data.iter_mut().zip(space.iter().skip(start)) {
        *slot = *byte;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;
    use virtio_queue::desc::{RawDescriptor, split::Descriptor};

    use super::*;
    use crate::{
        pci::Msix,
        ports::{MsiMessage, MsiVectors},
    };

    struct Silent;

    impl MsiVectors for Silent {
        fn update(&self, _index: u16, _message: MsiMessage, _masked: bool) -> io::Result<()> {
            Ok(())
        }
        fn trigger(&self, _index: u16) -> io::Result<()> {
            Ok(())
        }
        fn eventfd(&self, _index: u16) -> io::Result<EventFd> {
            EventFd::new(0)
        }
    }

    const DESCRIPTORS: u64 = 0;
    const AVAILABLE: u64 = 0x4000;
    const USED: u64 = 0x6000;

    proptest! {
        /// From any index, over the end of its 16 bits, and with a worker that holds, keeps or gives back as it likes.
        #[test]
        fn each_chain_is_seen_in_order_and_given_back_once_wherever_the_index_is(
            bits in 0u32..9,
            start in prop_oneof![Just(0u16), Just(u16::MAX - 3), any::<u16>()],
            rounds in prop::collection::vec((1u16..300, any::<u64>()), 1..6),
        ) {
            let size = 1u16 << bits;
            let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
            let mut queue = Queue::new(256).unwrap();
            queue.set_size(size);
            queue.set_desc_table_address(Some(DESCRIPTORS as u32), Some(0));
            queue.set_avail_ring_address(Some(AVAILABLE as u32), Some(0));
            queue.set_used_ring_address(Some(USED as u32), Some(0));
            queue.set_next_avail(start);
            queue.set_next_used(start);
            queue.set_ready(true);
            prop_assert!(queue.is_valid(&memory));
            let mut queue = ActiveQueue { index: 0, queue, kick: EventFd::new(0).unwrap() };
            let interrupt = Interrupt::new(Arc::new(Msix::new(Arc::new(Silent), 1)), 1);
            for head in 0..size {
                let raw = RawDescriptor::from(Descriptor::new(0x8000, 16, 0, 0));
                memory.write_obj(raw, GuestAddress(DESCRIPTORS + 16 * u64::from(head))).unwrap();
            }
            memory.store(start, GuestAddress(USED + 2), Ordering::SeqCst).unwrap();
            let slot = |ring: u64, each: u64, index: u16| GuestAddress(ring + 4 + each * u64::from(index % size));
            let (mut offered, mut seen, mut returned) = (start, start, start);
            for (many, choices) in rounds {
                // No more than the ring holds.
                let room = size - offered.wrapping_sub(returned);
                for _ in 0..many.min(room) {
                    memory.write_obj(offered % size, slot(AVAILABLE, 2, offered)).unwrap();
                    offered = offered.wrapping_add(1);
                }
                memory.store(offered, GuestAddress(AVAILABLE + 2), Ordering::SeqCst).unwrap();
                let (mut kept, mut turn) = (Vec::new(), 0u32);
                let served = queue.serve(&memory, &interrupt, |head, _| {
                    let choice = choices.rotate_right(2 * turn) & 3;
                    turn += 1;
                    assert_eq!(head, seen % size, "in order");
                    if choice == 3 {
                        return Outcome::NotNow;
                    }
                    seen = seen.wrapping_add(1);
                    if choice == 2 {
                        kept.push(head);
                        return Outcome::Kept;
                    }
                    Outcome::Used(7)
                });
                for head in kept {
                    queue.give_back(&memory, head, 9);
                }
                let used: u16 = memory.load(GuestAddress(USED + 2), Ordering::SeqCst).unwrap();
                prop_assert_eq!(used, seen, "what was seen is given back, and nothing else");
                let mut heads: Vec<u32> = Vec::new();
                while returned != used {
                    let at = slot(USED, 8, returned);
                    heads.push(memory.read_obj(at).unwrap());
                    returned = returned.wrapping_add(1);
                }
                let all = heads.len();
                heads.sort_unstable();
                heads.dedup();
                prop_assert_eq!(heads.len(), all, "none twice");
                if served == Served::All {
                    prop_assert_eq!(seen, offered);
                }
                prop_assert_eq!(queue.queue.next_avail(), seen);
            }
            // At last everything is.
            queue.serve(&memory, &interrupt, |_, _| {
                seen = seen.wrapping_add(1);
                Outcome::Used(0)
            });
            prop_assert_eq!(seen, offered);
        }
    }
}
