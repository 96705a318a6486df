//! The border of this room: what devices need from the machine they are in, and what the machine needs from devices.
//!
//! The machine (KVM, or a test) implements [`Interrupts`], [`Doorbells`] and [`MemoryControl`]; the process implements [`Threads`] and
//! [`Events`]; devices implement [`BusDevice`]. Nothing in here knows KVM: the same devices run under a test's machine.

use std::{
    fmt, io,
    sync::Arc,
    thread::{Builder, JoinHandle},
};

use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

/// All memory of the guest that devices may reach: RAM, plugged RAM and pmem. Regions come and go while devices run, so each round of
/// work takes a snapshot with `memory()`.
pub type GuestRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// Something that answers to a range of addresses: PIO ports or MMIO. Called on vCPU threads, so it must not wait. Accesses are 1, 2,
/// 4 or 8 bytes long as a rule, but nothing relies on it, nor on their alignment.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what is at `offset` bytes from the start of the range. What there is nothing at reads as ones.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data`, written at `offset` bytes from the start of the range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// The interrupt of one vector: what a PCI function writes, and where to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Address that is written.
    pub address: u64,
    /// Data that is written.
    pub data: u32,
}

/// Makes interrupts for devices.
pub trait Interrupts: Send + Sync {
    /// Room for `vectors` message signalled interrupts. They are released when the last reference is dropped.
    fn msi(&self, vectors: u16) -> io::Result<Arc<dyn MsiVectors>>;

    /// An edge-triggered interrupt line: each write to the event is one interrupt.
    fn line(&self, gsi: u32) -> io::Result<EventFd>;
}

/// The message signalled interrupts of one function. All start masked.
pub trait MsiVectors: Send + Sync {
    /// The guest has changed a vector, on a vCPU thread. Called only when something changes that matters: when a vector becomes
    /// unmasked, when it becomes masked, and when its message changes while it is unmasked.
    fn update(&self, index: u16, message: MsiMessage, masked: bool) -> io::Result<()>;

    /// Raises the interrupt, from any thread. Only called while the vector is unmasked (the function remembers what is pending).
    fn trigger(&self, index: u16) -> io::Result<()>;

    /// An event that raises the interrupt when it is written, for data paths in the host's kernel (vhost). What is written while the
    /// vector is masked is delivered once it is unmasked.
    fn eventfd(&self, index: u16) -> io::Result<EventFd>;
}

/// A write of the guest that wakes a device's thread without an exit to user space (ioeventfd).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Guest-physical address that is written to, with any width.
    pub address: u64,
}

/// Arranges doorbells. Where it cannot, the write arrives at the device's [`BusDevice`], which rings by itself.
pub trait Doorbells: Send + Sync {
    /// Writes to the doorbell ring `event` from now on.
    fn register(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;

    /// The end of it; the same pair as registered.
    fn unregister(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()>;
}

/// Changes what is at the guest's physical addresses while it runs. Every successful change is seen in [`GuestRam`] as well.
pub trait MemoryControl: Send + Sync {
    /// Puts a mapping (of a file, say) there. `read_only`: the guest cannot write to it. The mapping itself is writable in any case
    /// (private then), because devices write wherever a guest tells them to.
    fn map(&self, region: GuestRegionMmap, read_only: bool) -> io::Result<()>;

    /// Puts zeroed RAM there, of the machine's own kind (anonymous, memfd, huge pages).
    fn add_ram(&self, start: GuestAddress, bytes: u64) -> io::Result<()>;

    /// Takes away what [`MemoryControl::map`] or [`MemoryControl::add_ram`] put there, with the same start and size.
    fn unmap(&self, start: GuestAddress, bytes: u64) -> io::Result<()>;
}

/// What a thread of a device is for: each kind has its own system call filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ThreadKind {
    /// Reads and writes disk images.
    Block,
    /// Moves frames between a tap and the guest.
    Net,
    /// Moves bytes between Unix sockets and the guest.
    Vsock,
    /// Entropy.
    Rng,
    /// Gives memory back to the host.
    Balloon,
    /// Flushes persistent memory.
    Pmem,
    /// Plugs and unplugs memory.
    Mem,
}

impl ThreadKind {
    /// Name of such a thread, at most 15 bytes.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::Net => "net",
            Self::Vsock => "vsock",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Pmem => "pmem",
            Self::Mem => "mem",
        }
    }
}

/// Confines the threads that devices start.
pub trait Threads: Send + Sync {
    /// Called first thing on each new thread. If it fails, the thread ends, and the device is not started.
    fn enter(&self, kind: ThreadKind) -> io::Result<()>;

    /// Starts a thread. Whoever wants a thread is often a vCPU's, whose confinement the new one must not inherit.
    fn spawn(&self, builder: Builder, work: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        builder.spawn(work)
    }
}

/// Threads without any confinement.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unconfined;

impl Threads for Unconfined {
    fn enter(&self, _kind: ThreadKind) -> io::Result<()> {
        Ok(())
    }
}

/// What somebody outside of the VM should know about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DeviceEvent {
    /// The host has no space for what the guest writes to this disk; its writes wait.
    DiskFull {
        /// Serial of the disk.
        disk: String,
    },
    /// There is space again, and nothing waits any more.
    DiskHasSpace {
        /// Serial of the disk.
        disk: String,
    },
    /// The device cannot go on: its thread has met an error of the host, not of the guest.
    Failed {
        /// Which device.
        device: String,
        /// What happened.
        reason: String,
    },
}

impl fmt::Display for DeviceEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiskFull { disk } => write!(f, "no space on the host for disk {disk}: writes wait"),
            Self::DiskHasSpace { disk } => write!(f, "space on the host again for disk {disk}"),
            Self::Failed { device, reason } => write!(f, "device {device} failed: {reason}"),
        }
    }
}

/// Hears of [`DeviceEvent`]s, on the device's thread; must not wait.
pub trait Events: Send + Sync {
    /// Something happened.
    fn happened(&self, event: DeviceEvent);
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unheard;

impl Events for Unheard {
    fn happened(&self, _event: DeviceEvent) {}
}
