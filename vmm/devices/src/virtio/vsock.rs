//! The socket device of virtio 1.2, section 5.10, with *hybrid vsock* on the host's side: whoever connects to a Unix socket and writes
//! `CONNECT <port>\n` reaches that vsock port of the guest.
//!
//! Host-initiated stream connections only: a guest's own requests are answered with RST, always. Split as
//!
//! - `packet`: the header on the wire;
//! - `connection`: one connection's states, credit in both directions, half-closes;
//! - `muxer`: all connections, and which one speaks next;
//! - `backend`: the Unix socket and its handshake;
//! - `device`: the device on a thread of this process;
//! - this module: the queues.
//!
//! The event queue says one thing: that the guest has moved, and that its connections are gone. Only a guest that comes from a snapshot hears it.

mod backend;
mod connection;
mod device;
mod muxer;
mod packet;

use std::{
    io::{Read, Write},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::UnixListener,
    },
};

use virtio_queue::{Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::{GuestMemory, bitmap::BitmapSlice};

pub use backend::VsockDialer;
pub use connection::BUFFER_BYTES;
pub use device::VsockDevice;
pub use muxer::MAX_CONNECTIONS;
pub use packet::{HEADER_BYTES, HOST_CID, Header, MAX_PAYLOAD, Op, STREAM, shutdown};

use crate::complaints::Complaints;
use muxer::Muxer;

/// Index of the queue that carries packets to the guest.
pub const RX_QUEUE: usize = 0;
/// Index of the queue that carries packets from the guest.
pub const TX_QUEUE: usize = 1;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The CID is one of the reserved ones.
    #[error("{0} is not a guest's context id: 3 to 4294967294 are")]
    Cid(u64),
    /// The event queue of the host's side could not be set up.
    #[error("cannot wait for the hybrid vsock socket")]
    Listener(#[source] std::io::Error),
}

/// What became of a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Descriptor chains were given back: the guest is to be notified if it wants to be.
    pub used: bool,
    /// There is more to send, but the guest has given no buffers: ask to be notified of new ones.
    pub starved: bool,
}

/// The device. Its embedder calls the `process` verbs from one thread, when a queue was kicked or [`Vsock::as_raw_fd`] is readable.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    muxer: Muxer,
    complaints: Complaints,
    payload: Vec<u8>,
}

impl Vsock {
    /// A device whose host side listens on `listener`.
    pub fn new(guest_cid: u64, listener: UnixListener) -> Result<Self, VsockError> {
        // 0 to 2 are the hypervisor, the local and the host's; the upper half is reserved, and the highest is "any".
        if !(3..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(VsockError::Cid(guest_cid));
        }
        Ok(Self {
            guest_cid,
            muxer: Muxer::new(guest_cid, listener).map_err(VsockError::Listener)?,
            complaints: Complaints::new("vsock"),
            payload: Vec::new(),
        })
    }

    /// Reaches the guest's ports from inside of this process.
    #[must_use]
    pub fn dialer(&self) -> VsockDialer {
        self.muxer.dialer()
    }

    /// Device configuration space: the guest's context id. Bytes outside of it read as zero.
    #[must_use]
    pub fn config(&self, offset: u32, size: u32) -> Vec<u8> {
        let space = self.guest_cid.to_le_bytes();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        // Nothing in a configuration space is longer than it.
        let size = usize::try_from(size).unwrap_or(usize::MAX).min(256);
        let mut bytes: Vec<u8> = space.iter().skip(start).take(size).copied().collect();
        bytes.resize(size, 0);
        bytes
    }

    /// Number of connections, those that are opening and closing included.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.muxer.len()
    }

    /// The guest's driver started afresh: every connection it knew is gone. Those it has not heard of yet stay.
    pub fn reset(&mut self) {
        self.muxer.reset();
    }

    /// Takes what happened on the host's sockets; follow with [`Vsock::process_rx`].
    pub fn process_host(&mut self) {
        self.muxer.poll(&mut self.complaints);
    }

    /// Takes packets from the guest, at most as many as the queue is long; follow with [`Vsock::process_rx`].
    pub fn process_tx<M: GuestMemory>(&mut self, queue: &mut Queue, memory: &M) -> Progress {
        let mut progress = Progress::default();
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                break;
            };
            let head = chain.head_index();
            match Reader::new(memory, chain) {
                Ok(mut reader) => self.take_packet(&mut reader),
                Err(e) => self
                    .complaints
                    .say(format_args!("unusable buffers from the guest: {e}")),
            }
            if let Err(e) = queue.add_used(memory, head, 0) {
                self.complaints
                    .say(format_args!("tx queue cannot be written: {e}"));
                break;
            }
            progress.used = true;
        }
        progress
    }

    /// Gives packets to the guest until there are none, or no buffers.
    pub fn process_rx<M: GuestMemory>(&mut self, queue: &mut Queue, memory: &M) -> Progress {
        let mut progress = Progress::default();
        while self.muxer.has_work() {
            let Some(chain) = queue.pop_descriptor_chain(memory) else {
                progress.starved = true;
                break;
            };
            let head = chain.head_index();
            let written = match Writer::new(memory, chain) {
                Ok(mut writer) => match self.give_packet(&mut writer) {
                    Some(written) => written,
                    None => {
                        queue.go_to_previous_position();
                        break;
                    }
                },
                Err(e) => {
                    self.complaints
                        .say(format_args!("unusable buffers from the guest: {e}"));
                    0
                }
            };
            if let Err(e) = queue.add_used(memory, head, written) {
                self.complaints
                    .say(format_args!("rx queue cannot be written: {e}"));
                break;
            }
            progress.used = true;
        }
        progress
    }

    fn take_packet<B: BitmapSlice>(&mut self, reader: &mut Reader<'_, B>) {
        let mut bytes = [0; HEADER_BYTES];
        if reader.read_exact(&mut bytes).is_err() {
            self.complaints
                .say(format_args!("packet without a whole header from the guest"));
            return;
        }
        let header = Header::decode(&bytes);
        self.payload.clear();
        let length = usize::try_from(header.len).unwrap_or(usize::MAX);
        // A length that does not fit is judged by whoever the packet is for.
        if length > 0 && length <= MAX_PAYLOAD && length <= reader.available_bytes() {
            self.payload.resize(length, 0);
            if reader.read_exact(&mut self.payload).is_err() {
                self.payload.clear();
            }
        }
        self.muxer.take(&header, &self.payload, &mut self.complaints);
    }

    /// Bytes written, zero for buffers that hold no packet; `None` when there is nothing to say.
    fn give_packet<B: BitmapSlice>(&mut self, writer: &mut Writer<'_, B>) -> Option<u32> {
        let Some(room) = writer.available_bytes().checked_sub(HEADER_BYTES) else {
            self.complaints
                .say(format_args!("buffer from the guest is too small for a header"));
            return Some(0);
        };
        let header = self.muxer.give(room.min(MAX_PAYLOAD), &mut self.payload)?;
        let whole = writer
            .write_all(&header.encode())
            .and_then(|()| writer.write_all(&self.payload));
        if let Err(e) = whole {
            // The room was checked; memory that vanished meanwhile is the guest's loss.
            self.complaints
                .say(format_args!("packet lost on its way to the guest: {e}"));
        }
        u32::try_from(writer.bytes_written()).ok()
    }
}

impl AsRawFd for Vsock {
    /// Readable when [`Vsock::process_host`] has something to do.
    fn as_raw_fd(&self) -> RawFd {
        self.muxer.as_raw_fd()
    }
}
