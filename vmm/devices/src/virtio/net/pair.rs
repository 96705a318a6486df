//! One pair of queues and its queue of the tap: frames go through without being copied here.
//!
//! Receiving: a frame may take several of the guest's buffers (merged), so enough of them for the longest frame are taken off the queue
//! before the tap is read; what a frame did not need is put back. Without enough buffers the tap is not read: a frame that did not fit
//! would be lost.

use std::{collections::VecDeque, io};

use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};

use super::tap::{HEADER_BYTES, Tap};
use crate::{
    complaints::Complaints,
    ports::GuestRam,
    virtio::{
        chain::{Buffers, Pieces},
        device::{ActiveQueue, Outcome, Served},
        interrupt::Interrupt,
        worker::{Serve, Source},
    },
};

/// Longest frame that a driver may send or get: what segmentation offload makes of 64 KiB.
pub const MAX_FRAME: usize = (64 << 10) + 14 + 4;

/// Frames in one direction before the other gets its turn.
const BUDGET: usize = 256;

/// Buffers that one frame may be spread over.
const MAX_MERGED: usize = 64;

const RX: u64 = 0;
const TX: u64 = 1;
const TAP: u64 = 2;

/// Where the header says how many buffers a frame took.
const NUM_BUFFERS: usize = 10;

/// What was negotiated, as far as frames are concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Framing {
    /// A frame may take several buffers.
    pub(super) merged: bool,
    /// Bytes of the longest frame that the tap gives.
    pub(super) longest: usize,
}

/// The thread of a pair.
pub(super) struct Pair {
    tap: Tap,
    rx: ActiveQueue,
    tx: ActiveQueue,
    framing: Framing,
    memory: GuestRam,
    interrupt: Interrupt,
    complaints: Complaints,
    /// The tap may have frames: its edges are not told again.
    readable: bool,
    /// The tap had no room for a frame.
    blocked: bool,
}

/// A buffer of the guest that no frame is in yet.
struct Offered<'m> {
    head: u16,
    buffer: Pieces<'m>,
}

impl Pair {
    pub(super) fn new(
        tap: Tap,
        rx: ActiveQueue,
        tx: ActiveQueue,
        framing: Framing,
        memory: GuestRam,
        interrupt: Interrupt,
    ) -> Self {
        Self {
            tap,
            rx,
            tx,
            framing,
            memory,
            interrupt,
            complaints: Complaints::new("net"),
            readable: true,
            blocked: false,
        }
    }

    /// Both, as far as they have been served.
    pub(super) fn into_queues(self) -> [ActiveQueue; 2] {
        [self.rx, self.tx]
    }

    /// Frames from the tap to the guest.
    fn receive(&mut self, memory: &GuestMemoryMmap) {
        let mut offered = VecDeque::new();
        let mut received = 0;
        let mut used = false;
        while self.readable && received < BUDGET {
            if !self.collect(memory, &mut offered, &mut used) {
                // Too little to read a frame into, even after asking for more.
                break;
            }
            match self.frame(memory, &mut offered) {
                Ok(true) => {
                    received += 1;
                    used = true;
                }
                Ok(false) => self.readable = false,
                Err(e) => {
                    self.complaints.say(format_args!("cannot read the tap: {e}"));
                    self.readable = false;
                }
            }
        }
        for _ in offered {
            self.rx.queue.go_to_previous_position();
        }
        if used {
            self.rx.notify(memory, &self.interrupt);
        }
        if received == BUDGET {
            // Cannot fail: the counter is not that full.
            drop(self.rx.kick.write(1));
        }
    }

    /// Takes buffers off the queue until the longest frame fits; whether it does. If not, the driver has been asked to ring.
    fn collect<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        offered: &mut VecDeque<Offered<'m>>,
        used: &mut bool,
    ) -> bool {
        let wanted = HEADER_BYTES + self.framing.longest;
        let most = if self.framing.merged { MAX_MERGED } else { 1 };
        let room = |offered: &VecDeque<Offered<'_>>| -> usize {
            offered.iter().take(most).map(|offer| offer.buffer.len()).sum()
        };
        let mut asked = false;
        loop {
            while offered.len() < most && (offered.is_empty() || room(offered) < wanted) {
                let Some(chain) = self.rx.queue.pop_descriptor_chain(memory) else {
                    break;
                };
                let head = chain.head_index();
                match Buffers::of(memory, chain) {
                    Ok(buffers) if buffers.writable.len() >= HEADER_BYTES => offered.push_back(Offered {
                        head,
                        buffer: buffers.writable,
                    }),
                    _ if offered.is_empty() => {
                        self.rx.give_back(memory, head, 0);
                        *used = true;
                    }
                    // Buffers are given back in order; this one gets its turn once those before it have been used.
                    _ => {
                        self.rx.queue.go_to_previous_position();
                        return true;
                    }
                }
            }
            // A full set, or a full queue, of small buffers is all that there will ever be.
            let full = offered.len() >= most || offered.len() >= usize::from(self.rx.queue.size());
            if full || (!offered.is_empty() && room(offered) >= wanted) {
                return true;
            }
            if asked {
                return false;
            }
            asked = true;
            if !self.rx.queue.enable_notification(memory).unwrap_or(false) {
                return false;
            }
        }
    }

    /// One frame from the tap; whether there was one.
    fn frame<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        offered: &mut VecDeque<Offered<'m>>,
    ) -> io::Result<bool> {
        let most = if self.framing.merged { MAX_MERGED } else { 1 };
        let mut vectors = Vec::new();
        for offer in offered.iter().take(most) {
            vectors.extend_from_slice(&offer.buffer.iovecs());
        }
        let Some(bytes) = self.tap.receive(&vectors)? else {
            return Ok(false);
        };
        let mut left = bytes;
        let mut taken = Vec::new();
        while let Some(offer) = offered.pop_front() {
            let length = offer.buffer.len().min(left);
            left -= length;
            taken.push((offer, length));
            if left == 0 || taken.len() == most {
                break;
            }
        }
        let count = u16::try_from(taken.len()).unwrap_or_default();
        if let Some((first, _)) = taken.first_mut() {
            let mut header = first.buffer.clone();
            header.take(NUM_BUFFERS);
            header.write(&count.to_le_bytes());
        }
        for (offer, length) in taken {
            let length = u32::try_from(length).unwrap_or_default();
            self.rx.give_back(memory, offer.head, length);
        }
        Ok(true)
    }

    /// Frames from the guest to the tap.
    fn transmit(&mut self, memory: &GuestMemoryMmap) {
        let Self {
            tap,
            tx,
            complaints,
            blocked,
            ..
        } = self;
        *blocked = false;
        let served = tx.serve(memory, &self.interrupt, |_, buffers| {
            let frame = buffers.readable;
            if frame.len() <= HEADER_BYTES || frame.len() > HEADER_BYTES + MAX_FRAME {
                complaints.say(format_args!(
                    "dropped a frame of {} bytes with its header",
                    frame.len()
                ));
                return Outcome::Used(0);
            }
            match tap.send(&frame.iovecs()) {
                Ok(Some(_)) => Outcome::Used(0),
                Ok(None) => Outcome::NotNow,
                // A frame that the host does not take, for instance because its interface is down, is lost, as on any wire.
                Err(e) => {
                    complaints.say(format_args!("dropped a frame: {e}"));
                    Outcome::Used(0)
                }
            }
        });
        *blocked = served == Served::Held;
    }
}

impl Serve for Pair {
    fn sources(&self) -> Vec<Source> {
        vec![
            Source::edge(&self.rx.kick, RX),
            Source::edge(&self.tx.kick, TX),
            Source::edge_both(&self.tap, TAP),
        ]
    }

    fn serve(&mut self, token: u64) -> io::Result<()> {
        let memory = self.memory.memory();
        match token {
            RX => self.receive(&memory),
            TX => self.transmit(&memory),
            _ => {
                self.readable = true;
                self.receive(&memory);
                if self.blocked {
                    self.transmit(&memory);
                }
            }
        }
        Ok(())
    }
}
