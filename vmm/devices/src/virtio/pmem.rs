//! Persistent memory (virtio 1.2, section 5.19): a file that lies in the guest's memory, read without a copy in the guest's own page
//! cache. The only request is to flush it.

use std::{fmt, fs::File, io, sync::Arc};

use rustix::fs::{SeekFrom, fdatasync, seek};
use vm_memory::{FileOffset, GuestAddress, GuestAddressSpace, GuestRegionMmap, MmapRegion};

use super::{
    chain::Buffers,
    device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, VirtioDevice, read_space},
    interrupt::Interrupt,
    worker::{Host, Serve, Source, Worker},
};
use crate::{
    complaints::Complaints,
    ports::{GuestRam, MemoryControl, ThreadKind},
};

/// What place and size of persistent memory must be a multiple of: a Linux guest adds memory in such pieces.
pub const ALIGNMENT: u64 = 2 << 20;

const QUEUE_SIZES: [u16; 1] = [64];
/// The only type of request.
const FLUSH: u32 = 0;
const DONE: u32 = 0;
const FAILED: u32 = 1;

/// What persistent memory is made of.
#[derive(Debug)]
pub struct PmemConfig {
    /// Its contents; a multiple of [`ALIGNMENT`] long.
    pub file: File,
    /// Where it lies.
    pub address: u64,
    /// The guest cannot change it.
    pub read_only: bool,
}

/// Why there is no persistent memory.
#[derive(Debug, thiserror::Error)]
pub enum PmemError {
    /// The file cannot be asked for its size.
    #[error("cannot get the size of a file for persistent memory")]
    Size(#[source] io::Error),
    /// Not aligned, or empty.
    #[error(
        "persistent memory of {bytes:#x} bytes at {address:#x}: both must be multiples of {ALIGNMENT:#x}"
    )]
    Alignment {
        /// Its address.
        address: u64,
        /// Its size.
        bytes: u64,
    },
    /// The file cannot be mapped.
    #[error("cannot map a file for persistent memory")]
    Map(#[source] vm_memory::mmap::MmapRegionError),
    /// The machine does not take it.
    #[error("cannot put persistent memory at {address:#x}")]
    Place {
        /// Its address.
        address: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The device. While it exists, its memory is in the guest.
pub struct Pmem {
    host: Host,
    memory: Arc<dyn MemoryControl>,
    file: Arc<File>,
    address: u64,
    bytes: u64,
    read_only: bool,
    worker: Option<Worker<Server>>,
}

impl fmt::Debug for Pmem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pmem")
            .field("address", &self.address)
            .field("bytes", &self.bytes)
            .finish_non_exhaustive()
    }
}

impl Pmem {
    /// Puts a file into the guest's memory.
    pub fn new(config: PmemConfig, memory: Arc<dyn MemoryControl>, host: Host) -> Result<Self, PmemError> {
        let PmemConfig {
            file,
            address,
            read_only,
        } = config;
        let bytes = seek(&file, SeekFrom::End(0)).map_err(|e| PmemError::Size(e.into()))?;
        let misaligned = PmemError::Alignment { address, bytes };
        if bytes == 0 || !bytes.is_multiple_of(ALIGNMENT) || !address.is_multiple_of(ALIGNMENT) {
            return Err(misaligned);
        }
        let size = usize::try_from(bytes).map_err(|_| misaligned)?;
        // Devices write wherever a guest tells them to: without effect on the file, if it is not to be changed.
        let sharing = if read_only {
            libc::MAP_PRIVATE
        } else {
            libc::MAP_SHARED
        };
        let file = Arc::new(file);
        let region = MmapRegion::build(
            Some(FileOffset::from_arc(Arc::clone(&file), 0)),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            sharing | libc::MAP_NORESERVE,
        )
        .map_err(PmemError::Map)?;
        let place = |source| PmemError::Place { address, source };
        let region = GuestRegionMmap::new(region, GuestAddress(address))
            .ok_or_else(|| place(io::ErrorKind::InvalidInput.into()))?;
        memory.map(region, read_only).map_err(place)?;
        Ok(Self {
            host,
            memory,
            file,
            address,
            bytes,
            read_only,
            worker: None,
        })
    }
}

impl Drop for Pmem {
    fn drop(&mut self) {
        self.reset();
        if let Err(e) = self.memory.unmap(GuestAddress(self.address), self.bytes) {
            Complaints::new("pmem").say(format_args!("memory stays in the guest: {e}"));
        }
    }
}

/// Does one request; the bytes written.
pub fn request(mut buffers: Buffers<'_>, flush: impl FnOnce() -> io::Result<()>) -> u32 {
    let mut kind = [0; 4];
    let known = buffers.readable.read(&mut kind) && u32::from_le_bytes(kind) == FLUSH;
    let answer = if known && flush().is_ok() { DONE } else { FAILED };
    if buffers.writable.write(&answer.to_le_bytes()) {
        4
    } else {
        0
    }
}

struct Server {
    queue: ActiveQueue,
    file: Arc<File>,
    read_only: bool,
    memory: GuestRam,
    interrupt: Interrupt,
    complaints: Complaints,
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::edge(&self.queue.kick, 0)]
    }

    fn serve(&mut self, _token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        let Self {
            queue,
            file,
            read_only,
            complaints,
            ..
        } = self;
        queue.serve(&memory, &self.interrupt, |_, buffers| {
            Outcome::Used(request(buffers, || {
                if *read_only {
                    return Ok(());
                }
                fdatasync(&*file).map_err(|e| {
                    complaints.say(format_args!("cannot flush: {e}"));
                    e.into()
                })
            }))
        });
        Ok(())
    }
}

impl VirtioDevice for Pmem {
    fn device_type(&self) -> DeviceType {
        DeviceType::Pmem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = [self.address.to_le_bytes(), self.bytes.to_le_bytes()];
        read_space(&space.concat(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queue(0) else {
            return Ok(());
        };
        let server = Server {
            queue,
            file: Arc::clone(&self.file),
            read_only: self.read_only,
            memory: activation.memory,
            interrupt: activation.interrupt,
            complaints: Complaints::new("pmem"),
        };
        let worker = Worker::start(ThreadKind::Pmem, &self.host, move || Ok(server));
        self.worker = Some(worker.map_err(|source| ActivateError {
            device: "pmem",
            source,
        })?);
        Ok(())
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let server = self.worker.take().and_then(Worker::stop);
        server.map_or_else(Vec::new, |server| vec![server.queue])
    }

    fn reset(&mut self) {
        drop(self.worker.take().map(Worker::stop));
    }
}
