//! The balloon (virtio 1.2, section 5.5): the guest gives pages back to the host, those it was asked for and, by free page reporting,
//! those that it does not use anyway.
//!
//! Statistics and hints are not offered. Which index the reporting queue has without them is a matter on which kernels differ (2 or 4):
//! both work, as does 3.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use super::{
    chain::{Buffers, Pieces},
    device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, VirtioDevice, read_space},
    discard::{discard, discard_in},
    interrupt::Interrupt,
    state::{DeviceState, RestoreError, SaveError},
    worker::{Host, Serve, Source, Worker},
};
use crate::{
    complaints::Complaints,
    ports::{GuestRam, ThreadKind},
};

/// Feature bits (5.5.3): the guest may take pages back when it runs out of memory, and it reports free pages.
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

/// Page numbers in one request to inflate; Linux sends 256.
pub const MAX_PAGES: usize = 4096;

/// Bytes of a page of the balloon, whatever the guest's pages are.
const BALLOON_PAGE: u64 = 4096;

/// Inflate, deflate, and three that can be the reporting queue.
const QUEUE_SIZES: [u16; 5] = [128; 5];
const INFLATE: usize = 0;
const DEFLATE: usize = 1;

#[derive(Debug, Default)]
struct Shared {
    target: AtomicU32,
    actual: AtomicU32,
    given_back: AtomicU64,
    interrupt: Mutex<Option<Interrupt>>,
}

/// The device.
#[derive(Debug)]
pub struct Balloon {
    host: Host,
    shared: Arc<Shared>,
    worker: Option<Worker<Server>>,
}

/// Reaches a balloon that is in use.
#[derive(Debug, Clone)]
pub struct BalloonHandle(Arc<Shared>);

impl BalloonHandle {
    /// Asks the guest to bring the balloon to this size, in pages of 4 KiB.
    pub fn set_target(&self, pages: u32) {
        if self.0.target.swap(pages, Ordering::SeqCst) != pages {
            let interrupt = self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(interrupt) = interrupt.as_ref() {
                interrupt.config_changed();
            }
        }
    }

    /// The size that the guest says the balloon has, in pages of 4 KiB.
    #[must_use]
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    /// Bytes that have gone back to the host so far.
    #[must_use]
    pub fn given_back(&self) -> u64 {
        self.0.given_back.load(Ordering::Relaxed)
    }
}

impl Balloon {
    /// An empty balloon, and what reaches it later.
    #[must_use]
    pub fn new(host: Host) -> (Self, BalloonHandle) {
        let shared = Arc::<Shared>::default();
        let handle = BalloonHandle(Arc::clone(&shared));
        let device = Self {
            host,
            shared,
            worker: None,
        };
        (device, handle)
    }
}

/// Gives back the pages whose numbers these are; the bytes given back.
pub fn inflate(memory: &GuestMemoryMmap, mut numbers: Pieces<'_>) -> io::Result<u64> {
    let mut bytes = 0;
    let mut number = [0; 4];
    for _ in 0..MAX_PAGES {
        if !numbers.read(&mut number) {
            break;
        }
        let address = GuestAddress(u64::from(u32::from_le_bytes(number)) * BALLOON_PAGE);
        if let Some((region, within)) = memory.to_region_addr(address) {
            let offset = usize::try_from(within.0).unwrap_or(usize::MAX);
            bytes += discard_in(region, offset, BALLOON_PAGE as usize)?;
        }
    }
    Ok(bytes)
}

struct Server {
    queues: Vec<ActiveQueue>,
    shared: Arc<Shared>,
    memory: GuestRam,
    interrupt: Interrupt,
    complaints: Complaints,
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        let queues = (0..).zip(&self.queues);
        queues
            .map(|(token, queue)| Source::edge(&queue.kick, token))
            .collect()
    }

    fn serve(&mut self, token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        let Self {
            queues,
            shared,
            complaints,
            ..
        } = self;
        let Some(queue) = usize::try_from(token).ok().and_then(|at| queues.get_mut(at)) else {
            return Ok(());
        };
        let kind = usize::from(queue.index);
        queue.serve(&memory, &self.interrupt, |_, Buffers { readable, writable }| {
            let outcome = match kind {
                INFLATE => inflate(&memory, readable),
                // The guest takes its pages back by touching them.
                DEFLATE => Ok(0),
                _ => discard(&memory, &writable),
            };
            match outcome {
                Ok(bytes) => {
                    shared.given_back.fetch_add(bytes, Ordering::Relaxed);
                }
                Err(e) => complaints.say(format_args!("pages stay where they are: {e}")),
            }
            Outcome::Used(0)
        });
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let target = self.shared.target.load(Ordering::SeqCst).to_le_bytes();
        let actual = self.shared.actual.load(Ordering::SeqCst).to_le_bytes();
        read_space(&[target, actual].concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // Only how large the balloon is can be written, as a whole.
        if let (4, Ok(pages)) = (offset, data.try_into()) {
            self.shared
                .actual
                .store(u32::from_le_bytes(pages), Ordering::SeqCst);
        }
    }

    fn connect(&mut self, interrupt: &Interrupt) {
        let mut slot = self
            .shared
            .interrupt
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *slot = Some(interrupt.clone());
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues: Vec<_> = activation.queues.into_iter().flatten().collect();
        if queues.is_empty() {
            return Ok(());
        }
        let server = Server {
            queues,
            shared: Arc::clone(&self.shared),
            memory: activation.memory,
            interrupt: activation.interrupt,
            complaints: Complaints::new("balloon"),
        };
        let worker = Worker::start(ThreadKind::Balloon, &self.host, move || Ok(server));
        self.worker = Some(worker.map_err(|source| ActivateError {
            device: "balloon",
            source,
        })?);
        Ok(())
    }

    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let server = self.worker.take().and_then(Worker::stop);
        server.map_or_else(Vec::new, |server| server.queues)
    }

    fn state(&self) -> Result<DeviceState, SaveError> {
        Ok(DeviceState::Balloon {
            target: self.shared.target.load(Ordering::SeqCst),
            actual: self.shared.actual.load(Ordering::SeqCst),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Balloon { target, actual } = state else {
            return Err(self.foreign_state());
        };
        self.shared.target.store(*target, Ordering::SeqCst);
        self.shared.actual.store(*actual, Ordering::SeqCst);
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.worker.take().map(Worker::stop));
        self.shared.actual.store(0, Ordering::SeqCst);
    }
}
