//! The socket device in the VMM's own process: its queues on a thread, beside the host's sockets.

use std::{io, os::unix::net::UnixListener};

use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::{Progress, RX_QUEUE, TX_QUEUE, Vsock, VsockDialer, VsockError};
use crate::{
    ports::{GuestRam, ThreadKind},
    virtio::{
        device::{ActivateError, Activation, ActiveQueue, DeviceType, Outcome, VirtioDevice, read_space},
        interrupt::Interrupt,
        state::{DeviceState, RestoreError},
        worker::{Host, Serve, Source, Worker},
    },
};

/// Receive, transmit, events. A guest keeps a page of memory for each receive buffer, and touches all of them.
const QUEUE_SIZES: [u16; 3] = [64, 128, 16];

/// Rounds of a whole transmit queue before the host's sockets get their turn.
const ROUNDS: u32 = 4;

/// Token of the host's sockets; the queues' are their indices.
const HOST: u64 = 3;
const EVENTS: u64 = 2;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET of linux/virtio_vsock.h.
const TRANSPORT_RESET: u32 = 0;

/// A [`Vsock`] with a thread of its own.
#[derive(Debug)]
pub struct VsockDevice {
    host: Host,
    guest_cid: u64,
    dialer: VsockDialer,
    /// Here while nothing runs.
    idle: Option<Vsock>,
    /// The guest has connections of which nothing is here: it has to hear of it.
    moved: bool,
    worker: Option<Worker<Server>>,
}

impl VsockDevice {
    /// A device whose host side listens on `listener`.
    pub fn new(guest_cid: u64, listener: UnixListener, host: Host) -> Result<Self, VsockError> {
        let vsock = Vsock::new(guest_cid, listener)?;
        Ok(Self {
            host,
            guest_cid,
            dialer: vsock.dialer(),
            idle: Some(vsock),
            moved: false,
            worker: None,
        })
    }
}

impl VsockDevice {
    /// Reaches the guest's ports from inside of this process.
    #[must_use]
    pub fn dialer(&self) -> VsockDialer {
        self.dialer.clone()
    }
}

struct Server {
    vsock: Vsock,
    rx: ActiveQueue,
    tx: ActiveQueue,
    events: Option<ActiveQueue>,
    /// An event that the guest has given no buffer for yet.
    moved: bool,
    memory: GuestRam,
    interrupt: Interrupt,
}

impl Server {
    /// Tells the guest that it has moved, once: it ends every connection that it has (virtio 1.2, 5.10.6.5).
    fn serve_events(&mut self, memory: &GuestMemoryMmap) {
        let (Some(events), moved) = (self.events.as_mut(), &mut self.moved) else {
            return;
        };
        if !*moved {
            return;
        }
        events.serve(memory, &self.interrupt, |_, mut buffers| {
            if !*moved {
                return Outcome::NotNow;
            }
            let told = buffers.writable.write(&TRANSPORT_RESET.to_le_bytes());
            *moved = !told;
            Outcome::Used(if told { 4 } else { 0 })
        });
    }

    /// Takes packets until the guest offers none, each round followed by what they called forth.
    fn serve_tx(&mut self, memory: &GuestMemoryMmap) {
        let mut fruitless = false;
        for _ in 0..ROUNDS {
            // Fails only when the ring is not in memory; then there is nothing in it either.
            drop(self.tx.queue.disable_notification(memory));
            let progress = self.vsock.process_tx(&mut self.tx.queue, memory);
            if progress.used {
                self.tx.notify(memory, &self.interrupt);
            }
            self.serve_rx(memory);
            let more = self.tx.queue.enable_notification(memory).unwrap_or(false);
            // An index that makes no sense must not be asked for ever.
            if !more || (fruitless && !progress.used) {
                return;
            }
            fruitless = !progress.used;
        }
        // The driver offers without end: the queue rings by itself, after the others.
        drop(self.tx.kick.write(1));
    }

    /// Gives packets to the guest. When it has no buffers left, it is asked to say when it has.
    fn serve_rx(&mut self, memory: &GuestMemoryMmap) {
        let mut fruitless = false;
        loop {
            drop(self.rx.queue.disable_notification(memory));
            let Progress { used, starved } = self.vsock.process_rx(&mut self.rx.queue, memory);
            if used {
                self.rx.notify(memory, &self.interrupt);
            }
            let more = starved && self.rx.queue.enable_notification(memory).unwrap_or(false);
            if !more || (fruitless && !used) {
                return;
            }
            fruitless = !used;
        }
    }
}

impl Serve for Server {
    fn sources(&self) -> Vec<Source> {
        let mut sources = vec![
            Source::edge(&self.rx.kick, RX_QUEUE as u64),
            Source::edge(&self.tx.kick, TX_QUEUE as u64),
            Source::level(&self.vsock, HOST),
        ];
        // A guest that has not moved hears nothing, and its buffers for events wake nobody.
        let events = self.events.as_ref().filter(|_| self.moved);
        sources.extend(events.map(|events| Source::edge(&events.kick, EVENTS)));
        sources
    }

    fn serve(&mut self, token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        match token {
            HOST => {
                self.vsock.process_host();
                self.serve_rx(&memory);
            }
            EVENTS => self.serve_events(&memory),
            token if token == TX_QUEUE as u64 => self.serve_tx(&memory),
            _ => self.serve_rx(&memory),
        }
        Ok(())
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        let (Some(rx), Some(tx)) = (activation.queue(RX_QUEUE), activation.queue(TX_QUEUE)) else {
            return Ok(());
        };
        let failed = |source| ActivateError {
            device: "vsock",
            source,
        };
        let lost = || {
            failed(io::Error::other(
                "the host's side was lost with an earlier thread",
            ))
        };
        let server = Server {
            vsock: self.idle.take().ok_or_else(lost)?,
            rx,
            tx,
            events: activation.queue(EVENTS as usize),
            moved: self.moved,
            memory: activation.memory,
            interrupt: activation.interrupt,
        };
        self.worker = Some(Worker::start(ThreadKind::Vsock, &self.host, move || Ok(server)).map_err(failed)?);
        Ok(())
    }

    /// Connections stay: whoever has one waits.
    fn suspend(&mut self) -> Vec<ActiveQueue> {
        let Some(server) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        self.idle = Some(server.vsock);
        self.moved = server.moved;
        [server.rx, server.tx].into_iter().chain(server.events).collect()
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        if *state != DeviceState::Plain {
            return Err(self.foreign_state());
        }
        self.moved = true;
        Ok(())
    }

    fn reset(&mut self) {
        self.moved = false;
        if let Some(server) = self.worker.take().and_then(Worker::stop) {
            let mut vsock = server.vsock;
            vsock.reset();
            self.idle = Some(vsock);
        }
    }
}
