//! The block device (virtio 1.2, section 5.2): disks of one file, or of several behind each other, read-only or not.
//!
//! - `request`: what a driver asks, checked;
//! - `disk`: the files;
//! - `job`: a request on its way, which keeps the guest's memory;
//! - `ring`: many requests at once, by io_uring where the host has it;
//! - `server`: the queue, and what happens when the host's disk is full;
//! - this module: the device and its configuration space.

mod disk;
mod job;
mod request;
mod ring;
mod server;

use std::{
    collections::VecDeque,
    fs::File,
    sync::{Arc, Mutex, PoisonError},
};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

pub use disk::{DiskError, MAX_FILES};
pub use request::{
    Command, Extent, Geometry, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS, Request, SECTOR,
    SERIAL_BYTES, Status,
};
pub use server::RETRY;

use super::{
    device::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice, read_space},
    interrupt::Interrupt,
    state::{DeviceState, SaveError},
    worker::{Host, Worker},
};
use crate::ports::{DeviceEvent, ThreadKind};
use disk::Disk;
use job::Job;
use ring::Ring;
use server::Server;

/// A guest's kernel sets memory aside for every request that it may have under way: some 64 KiB for this many, for each disk.
const QUEUE_SIZES: [u16; 1] = [128];

/// Buffers in one request: the queue, without header and status.
const MAX_SEGMENTS: u32 = 126;

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockConfig {
    /// Files that lie behind each other, each a whole number of sectors long; opened to be written unless `read_only`.
    pub files: Vec<File>,
    /// The guest can only read.
    pub read_only: bool,
    /// By which the guest recognizes the disk; at most [`SERIAL_BYTES`] bytes count.
    pub serial: String,
    /// Bytes that the guest should read and write at once: a power of two from 512 on.
    pub block_bytes: u32,
}

/// What the device, its thread and its handle share.
#[derive(Debug)]
struct Shared {
    disk: Disk,
    read_only: bool,
    serial: [u8; SERIAL_BYTES],
    block_bytes: u32,
    interrupt: Mutex<Option<Interrupt>>,
}

impl Shared {
    fn serial(&self) -> String {
        let text = self.serial.split(|byte| *byte == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    host: Host,
    shared: Arc<Shared>,
    asynchronous: bool,
    worker: Option<Worker<Server>>,
    /// Requests that waited for space when the device was suspended.
    shelved: VecDeque<Job>,
}

/// Reaches a disk that is in use.
#[derive(Debug, Clone)]
pub struct BlockHandle(Arc<Shared>);

impl BlockHandle {
    /// The last file has another size now: the guest is told. Returns the bytes of the disk.
    pub fn resized(&self) -> Result<u64, DiskError> {
        if self.0.disk.measure()? {
            let interrupt = self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(interrupt) = interrupt.as_ref() {
                interrupt.config_changed();
            }
        }
        Ok(self.0.disk.capacity())
    }
}

impl Block {
    /// A disk, and what reaches it later.
    pub fn new(config: BlockConfig, host: Host) -> Result<(Self, BlockHandle), DiskError> {
        let mut serial = [0; SERIAL_BYTES];
        for (slot, byte) in serial.iter_mut().zip(config.serial.bytes()) {
            *slot = byte;
        }
        let shared = Arc::new(Shared {
            disk: Disk::new(config.files)?,
            read_only: config.read_only,
            serial,
            block_bytes: config.block_bytes.max(SECTOR as u32).next_power_of_two(),
            interrupt: Mutex::new(None),
        });
        let handle = BlockHandle(Arc::clone(&shared));
        let device = Self {
            host,
            shared,
            asynchronous: true,
            worker: None,
            shelved: VecDeque::new(),
        };
        Ok((device, handle))
    }

    /// Never uses io_uring: one request is done after the other, as where the host does not have it.
    #[must_use]
    pub fn one_by_one(mut self) -> Self {
        self.asynchronous = false;
        self
    }

    fn space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| {
            for (slot, byte) in space.iter_mut().skip(at).zip(bytes) {
                *slot = *byte;
            }
        };
        put(0, &(self.shared.disk.capacity() / SECTOR).to_le_bytes());
        put(12, &MAX_SEGMENTS.to_le_bytes());
        put(20, &self.shared.block_bytes.to_le_bytes());
        if !self.shared.read_only {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &(MAX_RANGES as u32).to_le_bytes());
            put(44, &(self.shared.block_bytes / SECTOR as u32).to_le_bytes());
            put(48, &MAX_ZERO_SECTORS.to_le_bytes());
            put(52, &(MAX_RANGES as u32).to_le_bytes());
            put(56, &[1]);
        }
        space
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        let others = if self.shared.read_only {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        always | others
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.space(), offset, data);
    }

    fn connect(&mut self, interrupt: &Interrupt) {
        let mut slot = self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Some(interrupt.clone());
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queue(0) else {
            return Ok(());
        };
        let failed = |source| ActivateError {
            device: "block",
            source,
        };
        // With writes that are flushes at once, nothing is gained by many at a time.
        let write_through = !self.shared.read_only && !activation.has(VIRTIO_BLK_F_FLUSH);
        let asynchronous = self.asynchronous && !write_through;
        let (shared, host) = (Arc::clone(&self.shared), self.host.clone());
        let Activation {
            memory, interrupt, ..
        } = activation;
        let waiting = std::mem::take(&mut self.shelved);
        let worker = Worker::start(ThreadKind::Block, &self.host, move || {
            let ring = asynchronous.then(|| Ring::new(&shared.disk));
            let ring = ring.and_then(Result::ok);
            let mut server = Server::new(shared, queue, ring, memory, interrupt, host, write_through)?;
            server.go_on_waiting(waiting);
            Ok(server)
        });
        self.worker = Some(worker.map_err(failed)?);
        Ok(())
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let parts = self.worker.take().and_then(Worker::stop).map(Server::into_parts);
        parts.map_or_else(Vec::new, |(queue, waiting)| {
            self.shelved = waiting;
            vec![queue]
        })
    }

    fn state(&self) -> Result<DeviceState, SaveError> {
        if self.shelved.is_empty() {
            Ok(DeviceState::Plain)
        } else {
            Err(SaveError::Waiting(self.shared.serial()))
        }
    }

    fn reset(&mut self) {
        drop(self.suspend());
        if !self.shelved.is_empty() {
            // Their driver has given them up.
            self.shelved.clear();
            self.host.events.happened(DeviceEvent::DiskHasSpace {
                disk: self.shared.serial(),
            });
        }
    }
}
