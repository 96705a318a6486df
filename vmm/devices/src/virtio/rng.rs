//! The entropy device (virtio 1.2, section 5.4): the host's kernel's random bytes.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestAddressSpace;

use super::{
    chain::Buffers,
    device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, VirtioDevice},
    interrupt::Interrupt,
    worker::{Host, Serve, Source, Worker},
};
use crate::ports::{GuestRam, ThreadKind};

/// Bytes that one request gets at most; a driver that wants more asks again.
pub const MAX_REQUEST: usize = 4096;

const QUEUE_SIZES: [u16; 1] = [16];

/// The device.
#[derive(Debug)]
pub struct Rng {
    host: Host,
    worker: Option<Worker<Server>>,
}

impl Rng {
    /// A source of entropy.
    #[must_use]
    pub fn new(host: Host) -> Self {
        Self { host, worker: None }
    }
}

/// Answers one request; the bytes written.
pub fn fill(mut buffers: Buffers<'_>) -> io::Result<u32> {
    let mut bytes = [0; MAX_REQUEST];
    let wanted = buffers.writable.len().min(MAX_REQUEST);
    let Some(random) = bytes.get_mut(..wanted) else {
        return Ok(0);
    };
    let mut done = 0;
    while let Some(rest) = random.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match getrandom(rest, GetRandomFlags::empty()) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    buffers.writable.write(random);
    Ok(u32::try_from(wanted).unwrap_or_default())
}

struct Server {
    queue: ActiveQueue,
    memory: GuestRam,
    interrupt: Interrupt,
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        vec![Source::edge(&self.queue.kick, 0)]
    }

    fn serve(&mut self, _token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        let mut failure = Ok(());
        self.queue.serve(&memory, &self.interrupt, |_, buffers| {
            let length = fill(buffers).unwrap_or_else(|e| {
                failure = Err(e);
                0
            });
            Outcome::Used(length)
        });
        failure
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queue(0) else {
            return Ok(());
        };
        let server = Server {
            queue,
            memory: activation.memory,
            interrupt: activation.interrupt,
        };
        let worker = Worker::start(ThreadKind::Rng, &self.host, move || Ok(server));
        self.worker = Some(worker.map_err(|source| ActivateError {
            device: "rng",
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
