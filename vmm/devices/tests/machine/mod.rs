//! A machine without KVM, and the driver of a guest in it: it finds a function on the PCI bus, sets it up as a kernel does, and speaks
//! to it through queues in memory and interrupts.

#![allow(missing_docs, unreachable_pub, reason = "helpers of tests")]

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex},
    time::Duration,
};

use caisson_devices::{
    bus::Bus,
    pci::{Ecam, PciAddress, PciRoot, Window},
    ports::{
        BusDevice, DeviceEvent, Doorbell, Doorbells, Events, GuestRam, Interrupts, MemoryControl, MsiMessage,
        MsiVectors, Unconfined,
    },
    virtio::{Attachment, Host, VirtioDevice, VirtioPci},
};
use virtio_queue::desc::{RawDescriptor, split::Descriptor};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
};
use vmm_sys_util::eventfd::EventFd;

/// How long a condition may take that must come about.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub const MEMORY: usize = 64 << 20;
pub const WINDOW: u64 = 0x40_0000_0000;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
/// Rings begin here, 128 KiB each; data may go from 16 MiB on.
const RINGS: u64 = 0x10_0000;
const RING_BYTES: u64 = 0x2_0000;
pub const DATA: u64 = 16 << 20;

/// Interrupts that came, by vector.
#[derive(Default)]
pub struct Vectors {
    raised: Mutex<HashMap<u16, u64>>,
    came: Condvar,
    messages: Mutex<HashMap<u16, Option<MsiMessage>>>,
}

impl Vectors {
    pub fn count(&self, vector: u16) -> u64 {
        *self.raised.lock().unwrap().get(&vector).unwrap_or(&0)
    }

    /// Waits until `done`, looking again at each interrupt.
    pub fn wait_until(&self, what: &str, mut done: impl FnMut() -> bool) {
        let start = std::time::Instant::now();
        while !done() {
            assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
            // Not everything that is waited for raises an interrupt.
            let guard = self.raised.lock().unwrap();
            drop(self.came.wait_timeout(guard, Duration::from_millis(5)).unwrap());
        }
    }
}

impl MsiVectors for Vectors {
    fn update(&self, index: u16, message: MsiMessage, masked: bool) -> io::Result<()> {
        self.messages
            .lock()
            .unwrap()
            .insert(index, (!masked).then_some(message));
        Ok(())
    }

    fn trigger(&self, index: u16) -> io::Result<()> {
        let known = self.messages.lock().unwrap().get(&index).copied().flatten();
        assert!(known.is_some(), "vector {index} was raised while masked");
        *self.raised.lock().unwrap().entry(index).or_default() += 1;
        self.came.notify_all();
        Ok(())
    }

    fn eventfd(&self, _index: u16) -> io::Result<EventFd> {
        EventFd::new(0)
    }
}

/// Everything that a device needs around it.
#[derive(Default)]
pub struct Board {
    pub vectors: Mutex<Vec<Arc<Vectors>>>,
    pub doorbells: Mutex<Vec<(u64, EventFd)>>,
    pub events: Mutex<Vec<DeviceEvent>>,
}

struct Shared(Arc<Board>);

impl Interrupts for Shared {
    fn msi(&self, _vectors: u16) -> io::Result<Arc<dyn MsiVectors>> {
        let vectors = Arc::new(Vectors::default());
        self.0.vectors.lock().unwrap().push(vectors.clone());
        Ok(vectors)
    }

    fn line(&self, _gsi: u32) -> io::Result<EventFd> {
        EventFd::new(0)
    }
}

impl Doorbells for Shared {
    fn register(&self, doorbell: Doorbell, event: &EventFd) -> io::Result<()> {
        let mut doorbells = self.0.doorbells.lock().unwrap();
        assert!(doorbells.iter().all(|(at, _)| *at != doorbell.address), "twice");
        doorbells.push((doorbell.address, event.try_clone()?));
        Ok(())
    }

    fn unregister(&self, doorbell: Doorbell, _event: &EventFd) -> io::Result<()> {
        let mut doorbells = self.0.doorbells.lock().unwrap();
        let before = doorbells.len();
        doorbells.retain(|(at, _)| *at != doorbell.address);
        assert_eq!(doorbells.len() + 1, before, "unknown doorbell");
        Ok(())
    }
}

impl Events for Shared {
    fn happened(&self, event: DeviceEvent) {
        self.0.events.lock().unwrap().push(event);
    }
}

/// Memory that comes and goes.
pub struct Slots {
    ram: GuestRam,
    /// Calls, as words.
    pub calls: Mutex<Vec<String>>,
    /// The next call fails.
    pub refuse: Mutex<bool>,
}

impl Slots {
    fn called(&self, call: String) -> io::Result<()> {
        if std::mem::take(&mut *self.refuse.lock().unwrap()) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.calls.lock().unwrap().push(call);
        Ok(())
    }

    fn insert(&self, region: GuestRegionMmap) {
        let lock = self.ram.lock().unwrap();
        let memory = self.ram.memory().insert_region(Arc::new(region)).unwrap();
        lock.replace(memory);
    }

    pub fn taken(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl MemoryControl for Slots {
    fn map(&self, region: GuestRegionMmap, read_only: bool) -> io::Result<()> {
        let at = vm_memory::GuestMemoryRegion::start_addr(&region).0;
        self.called(format!("map {at:#x} {read_only}"))?;
        self.insert(region);
        Ok(())
    }

    fn add_ram(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        self.called(format!("add {:#x} {bytes:#x}", start.0))?;
        self.insert(GuestRegionMmap::from_range(start, bytes as usize, None).unwrap());
        Ok(())
    }

    fn unmap(&self, start: GuestAddress, bytes: u64) -> io::Result<()> {
        self.called(format!("unmap {:#x} {bytes:#x}", start.0))?;
        let lock = self.ram.lock().unwrap();
        let (memory, _) = self.ram.memory().remove_region(start, bytes).unwrap();
        lock.replace(memory);
        Ok(())
    }
}

/// A machine with a PCI bus and memory.
pub struct Machine {
    pub board: Arc<Board>,
    pub mmio: Bus,
    pub root: Arc<PciRoot>,
    pub ram: GuestRam,
    ecam: Ecam,
}

impl Machine {
    pub fn new() -> Self {
        let mmio = Bus::new();
        let root = Arc::new(PciRoot::new(
            Window::new(WINDOW..WINDOW + (1 << 30)),
            mmio.clone(),
        ));
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        Self {
            board: Arc::default(),
            mmio,
            ecam: Ecam::new(root.clone()),
            root,
            ram: GuestMemoryAtomic::new(memory),
        }
    }

    pub fn slots(&self) -> Arc<Slots> {
        Arc::new(Slots {
            ram: self.ram.clone(),
            calls: Mutex::default(),
            refuse: Mutex::default(),
        })
    }

    pub fn host(&self) -> Host {
        Host {
            threads: Arc::new(Unconfined),
            events: Arc::new(Shared(self.board.clone())),
        }
    }

    /// Puts a device on the bus; its driver has found it, and nothing more.
    pub fn plug(&self, device: Box<dyn VirtioDevice>) -> Driver<'_> {
        let queues = device.queue_sizes().len();
        let attachment = Attachment {
            memory: self.ram.clone(),
            interrupts: Arc::new(Shared(self.board.clone())),
            doorbells: Arc::new(Shared(self.board.clone())),
            events: Arc::new(Shared(self.board.clone())),
        };
        let function = VirtioPci::new(device, attachment).unwrap();
        let address = self.root.add(Arc::clone(&function) as _).unwrap();
        let vectors = self.board.vectors.lock().unwrap().last().unwrap().clone();
        let mut driver = Driver {
            machine: self,
            function,
            address,
            bar: 0,
            vectors,
            rings: (0..queues).map(|_| None).collect(),
            msix: 0,
        };
        driver.find();
        driver
    }

    pub fn config(&self, address: PciAddress, offset: u64, data: &mut [u8]) {
        self.ecam.read(ecam_offset(address) + offset, data);
    }

    pub fn set_config(&self, address: PciAddress, offset: u64, data: &[u8]) {
        self.ecam.write(ecam_offset(address) + offset, data);
    }

    pub fn config_u32(&self, address: PciAddress, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.config(address, offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Rings as a vCPU would: by the doorbell, or by an exit.
    pub fn ring(&self, address: u64) {
        let doorbells = self.board.doorbells.lock().unwrap();
        let event = doorbells.iter().find(|(at, _)| *at == address);
        match event {
            Some((_, event)) => event.write(1).unwrap(),
            None => {
                drop(doorbells);
                self.mmio.write(address, &[0; 2]);
            }
        }
    }
}

fn ecam_offset(address: PciAddress) -> u64 {
    u64::from(address.device) << 15 | u64::from(address.function) << 12
}

/// One ring as its driver sees it.
#[derive(Clone, Copy)]
pub struct Ring {
    pub size: u16,
    pub descriptors: u64,
    pub avail: u64,
    pub used: u64,
    avail_idx: u16,
    used_idx: u16,
}

/// One piece of a chain.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    pub at: u64,
    pub len: u32,
    pub flags: u16,
}

pub fn readable(at: u64, len: usize) -> Piece {
    Piece {
        at,
        len: len as u32,
        flags: 0,
    }
}

pub fn writable(at: u64, len: usize) -> Piece {
    Piece {
        at,
        len: len as u32,
        flags: WRITE,
    }
}

/// What a driver remembers of its device, whatever machine it is in.
pub struct Memories {
    bar: u64,
    rings: Vec<Option<Ring>>,
    msix: u64,
}

/// The driver of one function.
pub struct Driver<'m> {
    pub machine: &'m Machine,
    pub function: Arc<VirtioPci>,
    pub address: PciAddress,
    pub bar: u64,
    pub vectors: Arc<Vectors>,
    rings: Vec<Option<Ring>>,
    msix: u64,
}

pub const COMMON: u64 = 0;
pub const DEVICE_CONFIG: u64 = 0x2000;
pub const NOTIFY: u64 = 0x3000;
pub const TABLE: u64 = 0x4000;
pub const DRIVER_OK: u8 = 4;
pub const FEATURES_OK: u8 = 8;
pub const NEEDS_RESET: u8 = 64;
pub const VERSION_1: u64 = 1 << 32;

impl Driver<'_> {
    pub fn memories(&self) -> Memories {
        let Self { bar, msix, .. } = *self;
        let rings = self.rings.clone();
        Memories { bar, rings, msix }
    }

    /// Goes on in another machine, where it was.
    pub fn remember(&mut self, memories: Memories) {
        (self.bar, self.rings, self.msix) = (memories.bar, memories.rings, memories.msix);
    }

    /// Walks the capabilities, as a driver does, and lets the function answer.
    fn find(&mut self) {
        let mut structures = HashMap::new();
        let mut at = u64::from(self.machine.config_u32(self.address, 0x34) & 0xff);
        let mut seen = VecDeque::new();
        while at != 0 {
            assert!(!seen.contains(&at), "the list is a loop");
            seen.push_back(at);
            let head = self.machine.config_u32(self.address, at).to_le_bytes();
            if head[0] == 0x11 {
                self.msix = at;
            } else {
                assert_eq!(head[0], 9);
                let offset = self.machine.config_u32(self.address, at + 8);
                structures.insert(head[3], u64::from(offset));
            }
            at = u64::from(head[1]);
        }
        for (kind, offset) in [(1, COMMON), (2, NOTIFY), (3, 0x1000), (4, DEVICE_CONFIG), (5, 0)] {
            assert_eq!(structures.get(&kind), Some(&offset));
        }
        let low = self.machine.config_u32(self.address, 0x10);
        assert_eq!(low & 0xf, 4, "a 64-bit BAR");
        self.bar = u64::from(low & !0xf) | u64::from(self.machine.config_u32(self.address, 0x14)) << 32;
        self.machine.set_config(self.address, 4, &6u16.to_le_bytes());
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) {
        assert!(self.machine.mmio.read(self.bar + offset, data));
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        assert!(self.machine.mmio.write(self.bar + offset, data));
    }

    pub fn u8(&self, offset: u64) -> u8 {
        let mut bytes = [0];
        self.read(offset, &mut bytes);
        bytes[0]
    }

    pub fn u16(&self, offset: u64) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    pub fn u32(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn u64(&self, offset: u64) -> u64 {
        u64::from(self.u32(offset)) | u64::from(self.u32(offset + 4)) << 32
    }

    pub fn status(&self) -> u8 {
        self.u8(0x14)
    }

    pub fn set_status(&self, bits: u8) {
        self.write(0x14, &[bits]);
    }

    pub fn reset(&mut self) {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.rings.fill(None);
    }

    pub fn offered(&self) -> u64 {
        self.write(0, &0u32.to_le_bytes());
        let low = u64::from(self.u32(4));
        self.write(0, &1u32.to_le_bytes());
        low | u64::from(self.u32(4)) << 32
    }

    pub fn accept(&self, features: u64) {
        for half in 0..2u32 {
            self.write(8, &half.to_le_bytes());
            self.write(12, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    /// Everything until the device works: all that it offers but `without`, and queues of at most `size`.
    pub fn start(&mut self, without: u64, size: u16) -> u64 {
        self.reset();
        self.set_status(1);
        self.set_status(3);
        let features = self.offered() & !without;
        self.accept(features);
        self.set_status(11);
        assert_eq!(self.status(), 11, "the features were accepted");
        self.machine
            .set_config(self.address, self.msix + 2, &0x8000u16.to_le_bytes());
        self.write(0x10, &0u16.to_le_bytes());
        self.unmask(0);
        for index in 0..self.u16(0x12) {
            self.set_up_queue(index, size);
        }
        self.set_status(15);
        features
    }

    pub fn unmask(&self, vector: u64) {
        for (word, value) in [0xfee0_0000u32, 0, vector as u32, 0].into_iter().enumerate() {
            self.write(TABLE + 16 * vector + 4 * word as u64, &value.to_le_bytes());
        }
    }

    fn set_up_queue(&mut self, index: u16, size: u16) {
        self.write(0x16, &index.to_le_bytes());
        let size = self.u16(0x18).min(size);
        self.write(0x18, &size.to_le_bytes());
        let ring = self.fresh_ring(index, size);
        self.write(0x1a, &(index + 1).to_le_bytes());
        assert_eq!(self.u16(0x1a), index + 1);
        self.unmask(u64::from(index) + 1);
        for (register, at) in [(0x20, ring.descriptors), (0x28, ring.avail), (0x30, ring.used)] {
            self.write(register, &(at as u32).to_le_bytes());
            self.write(register + 4, &((at >> 32) as u32).to_le_bytes());
        }
        self.write(0x1c, &1u16.to_le_bytes());
    }

    /// A ring in zeroed memory.
    pub fn fresh_ring(&mut self, index: u16, size: u16) -> Ring {
        let base = RINGS + RING_BYTES * u64::from(index);
        let avail = base + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size)).next_multiple_of(4);
        self.fill(base, &vec![0; (used - base) as usize + 6 + 8 * usize::from(size)]);
        let ring = Ring {
            size,
            descriptors: base,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
        };
        self.rings[usize::from(index)] = Some(ring);
        ring
    }

    pub fn ring(&mut self, queue: u16) -> &mut Ring {
        self.rings[usize::from(queue)].as_mut().unwrap()
    }

    pub fn fill(&self, at: u64, bytes: &[u8]) {
        self.machine
            .ram
            .memory()
            .write_slice(bytes, GuestAddress(at))
            .unwrap();
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.machine
            .ram
            .memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    pub fn describe(&mut self, queue: u16, index: u16, piece: Piece, next: u16) {
        let ring = *self.ring(queue);
        let raw = RawDescriptor::from(Descriptor::new(piece.at, piece.len, piece.flags, next));
        self.machine
            .ram
            .memory()
            .write_obj(raw, GuestAddress(ring.descriptors + 16 * u64::from(index)))
            .unwrap();
    }

    /// Puts a chain at descriptor `head` and those that follow, without a kick.
    pub fn offer(&mut self, queue: u16, head: u16, pieces: &[Piece]) {
        for (index, piece) in (head..).zip(pieces) {
            let last = usize::from(index - head) + 1 == pieces.len();
            let flags = piece.flags | if last { 0 } else { NEXT };
            self.describe(queue, index, Piece { flags, ..*piece }, index + 1);
        }
        self.make_available(queue, head);
    }

    pub fn make_available(&mut self, queue: u16, head: u16) {
        let ring = self.ring(queue);
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        let (avail, idx) = (ring.avail, ring.avail_idx);
        self.fill(slot, &head.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.machine
            .ram
            .memory()
            .store(idx, GuestAddress(avail + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        // With event indices: interrupt for the very next one.
        let ring = *self.ring(queue);
        let used_event = ring.avail + 4 + 2 * u64::from(ring.size);
        self.fill(used_event, &ring.used_idx.to_le_bytes());
    }

    pub fn kick(&self, queue: u16) {
        self.machine.ring(self.bar + NOTIFY + 4 * u64::from(queue));
    }

    /// The next chain that was given back, if there is one.
    pub fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let ring = *self.ring(queue);
        let memory = self.machine.ram.memory();
        let idx: u16 = memory
            .load(GuestAddress(ring.used + 2), std::sync::atomic::Ordering::SeqCst)
            .unwrap();
        if idx == ring.used_idx {
            return None;
        }
        let slot = ring.used + 4 + 8 * u64::from(ring.used_idx % ring.size);
        self.ring(queue).used_idx = ring.used_idx.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((head as u16, len))
    }

    /// Waits for the next chain that is given back.
    pub fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let vectors = self.vectors.clone();
        let mut found = None;
        vectors.wait_until("a used buffer", || {
            found = self.used(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// One request and its answer: bytes to read, and how many to write; the bytes written.
    pub fn request(&mut self, queue: u16, out: &[&[u8]], room: &[usize]) -> Vec<u8> {
        let mut at = DATA;
        let mut pieces = Vec::new();
        for bytes in out {
            self.fill(at, bytes);
            pieces.push(readable(at, bytes.len()));
            at += bytes.len() as u64 + 3;
        }
        let answer = at;
        for len in room {
            pieces.push(writable(at, *len));
            at += *len as u64;
        }
        self.offer(queue, 0, &pieces);
        self.kick(queue);
        let (head, _) = self.wait_used(queue);
        assert_eq!(head, 0);
        self.bytes(answer, (at - answer) as usize)
    }
}
