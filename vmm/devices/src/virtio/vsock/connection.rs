//! One connection between a host's socket and a port of the guest.
//!
//! ```text
//!  Command -> Connecting -> Open -> Closing (both ends told, RST awaited) -> gone
//!                 |           \---> Flushing (the guest has gone; what it sent still goes to the host) -> gone
//!                 \-> gone (refused)
//! ```
//!
//! Credit (virtio 1.2, 5.10.6.3). Towards the host, the guest may have [`BUFFER_BYTES`] on the way; they lie here while the host's
//! socket is full, and never more: a guest that sends beyond its credit is reset. Towards the guest, the host's socket is read only
//! while the guest has room; without any, the guest is asked once, and answers when it has.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    num::Wrapping,
    os::unix::net::UnixStream,
    time::Instant,
};

use vmm_sys_util::epoll::EventSet;

use super::{
    backend::{Command, Parsed},
    packet::{Header, MAX_PAYLOAD, Op, shutdown},
};

/// Bytes of the guest that one connection holds at most: the credit that the guest gets.
pub const BUFFER_BYTES: u32 = 256 << 10;

/// The guest is told about room when this much has become free since it last heard. Less than half of the credit, so that a guest
/// that sends in pieces of [`MAX_PAYLOAD`] is never without.
const TELL_FREED: u32 = BUFFER_BYTES / 4;

/// Buffers larger than this are given back when they are empty.
const KEEP_CAPACITY: usize = 16 << 10;

#[derive(Debug)]
enum Phase {
    Command(Command),
    /// `sent`: the guest has got the request.
    Connecting {
        sent: bool,
    },
    Open,
    Closing(Instant),
    Flushing,
    Gone,
}

/// A packet's part that the connection decides about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub(crate) op: Op,
    pub(crate) flags: u32,
}

impl Outgoing {
    fn plain(op: Op) -> Self {
        Self { op, flags: 0 }
    }
}

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    local_port: u32,
    guest_port: u32,
    phase: Phase,
    host: HostState,
    guest: GuestState,
    /// From the guest, on the way to the host.
    held: VecDeque<u8>,
    /// Bytes that have left `held` for the host (or were of no use to it).
    forwarded: Wrapping<u32>,
    /// What the guest knows of `forwarded`.
    told_forwarded: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    credit_asked: bool,
    credit_wanted: bool,
    reset_wanted: bool,
}

/// What is known of the host's end.
#[derive(Debug, Default)]
struct HostState {
    readable: bool,
    writable: bool,
    /// It will send no more, and everything has been read.
    ended: bool,
    /// It takes no more.
    deaf: bool,
    /// Our direction to it has been closed.
    finished: bool,
}

/// What is known of the guest's end.
#[derive(Debug, Default)]
struct GuestState {
    room: u32,
    taken: Wrapping<u32>,
    /// The shutdown flags that it sent.
    closed: u32,
    /// The shutdown flags that it was sent.
    told: u32,
}

impl Connection {
    pub(crate) fn new(stream: UnixStream, local_port: u32) -> Self {
        Self {
            stream,
            local_port,
            guest_port: 0,
            phase: Phase::Command(Command::default()),
            host: HostState {
                writable: true,
                ..HostState::default()
            },
            guest: GuestState::default(),
            held: VecDeque::new(),
            forwarded: Wrapping(0),
            told_forwarded: Wrapping(0),
            sent: Wrapping(0),
            credit_asked: false,
            credit_wanted: false,
            reset_wanted: false,
        }
    }

    /// Nothing is left to do: it can be dropped.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.phase, Phase::Gone)
    }

    /// The guest has not heard of it yet.
    pub(crate) fn is_unheard_of(&self) -> bool {
        matches!(self.phase, Phase::Command(_) | Phase::Connecting { sent: false })
    }

    /// Since when it waits for the guest's last word.
    pub(crate) fn closing_since(&self) -> Option<Instant> {
        match self.phase {
            Phase::Closing(since) => Some(since),
            _ => None,
        }
    }

    /// Is this packet's sender the one that this connection belongs to?
    pub(crate) fn belongs_to(&self, guest_port: u32) -> bool {
        !self.is_unheard_of() && self.guest_port == guest_port
    }

    /// Takes an event of the host's socket.
    pub(crate) fn host_event(&mut self, ready: EventSet) {
        let hung_up = ready.intersects(EventSet::HANG_UP | EventSet::ERROR);
        self.host.readable |= hung_up || ready.intersects(EventSet::IN | EventSet::READ_HANG_UP);
        self.host.writable |= ready.contains(EventSet::OUT);
        match &mut self.phase {
            Phase::Command(command) => match command.read(&self.stream) {
                Parsed::Unfinished => {}
                Parsed::Invalid => self.phase = Phase::Gone,
                Parsed::Connect(port) => {
                    self.guest_port = port;
                    self.phase = Phase::Connecting { sent: false };
                }
            },
            Phase::Connecting { .. } => {}
            Phase::Open | Phase::Closing(_) | Phase::Flushing => {
                if hung_up {
                    self.discard();
                }
                self.flush();
            }
            Phase::Gone => {}
        }
        if let Phase::Connecting { sent } = self.phase
            && hung_up
        {
            // The host has lost patience. Only a guest that has heard of it needs to know.
            self.phase = Phase::Gone;
            if sent {
                self.phase = Phase::Connecting { sent };
                self.reset_wanted = true;
            }
        }
    }

    /// Takes a packet of the guest. `payload` is empty when its length was a lie.
    pub(crate) fn packet(&mut self, header: &Header, payload: &[u8]) {
        self.guest.room = header.buf_alloc;
        self.guest.taken = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_asked = false;
        }
        match (Op::from_wire(header.op), &self.phase) {
            (Some(Op::Reset), _) => self.guest_gone(),
            (_, Phase::Command(_) | Phase::Flushing | Phase::Gone) => {}
            (Some(Op::Response), Phase::Connecting { sent: true }) => self.connected(),
            (_, Phase::Connecting { .. }) => self.reset(),
            (Some(Op::ReadWrite), _) => self.data(header.len, payload),
            (Some(Op::Shutdown), _) => self.guest_shutdown(header.flags),
            (Some(Op::CreditUpdate), _) => {}
            (Some(Op::CreditRequest), _) => self.credit_wanted = true,
            (Some(Op::Request | Op::Response) | None, _) => self.reset(),
        }
    }

    /// What is to be said next. A packet with data is read into `payload`, at most `room` bytes.
    pub(crate) fn next(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Outgoing> {
        payload.clear();
        if self.reset_wanted {
            self.reset_wanted = false;
            self.phase = Phase::Gone;
            return Some(Outgoing::plain(Op::Reset));
        }
        match &mut self.phase {
            Phase::Connecting { sent } if !*sent => {
                *sent = true;
                return Some(Outgoing::plain(Op::Request));
            }
            Phase::Open => {}
            _ => return None,
        }
        self.read_host(room, payload)
            .or_else(|| self.tell_shutdown())
            .or_else(|| {
                let freed = (self.forwarded - self.told_forwarded).0;
                let tell = self.credit_wanted || freed >= TELL_FREED;
                tell.then(|| Outgoing::plain(Op::CreditUpdate))
            })
    }

    /// Fills in what every packet says about credit, which the guest then knows.
    pub(crate) fn stamp(&mut self, header: &mut Header) {
        header.src_port = self.local_port;
        header.dst_port = self.guest_port;
        header.buf_alloc = BUFFER_BYTES;
        header.fwd_cnt = self.forwarded.0;
        self.told_forwarded = self.forwarded;
        self.credit_wanted = false;
    }

    /// Bytes that the guest can take. A guest that claims to have taken more than it got has no room.
    fn credit(&self) -> u32 {
        self.guest.room.saturating_sub((self.sent - self.guest.taken).0)
    }

    fn connected(&mut self) {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.local_port);
        // The first bytes in an empty socket: what does not take them whole is broken.
        match (&self.stream).write(answer.as_bytes()) {
            Ok(n) if n == answer.len() => {}
            _ => self.reset(),
        }
    }

    fn data(&mut self, length: u32, payload: &[u8]) {
        let fits = u32::try_from(self.held.len() + payload.len()).is_ok_and(|total| total <= BUFFER_BYTES);
        let honest = usize::try_from(length).is_ok_and(|length| length == payload.len());
        if !fits || !honest || self.guest.closed & shutdown::SEND != 0 {
            self.reset();
            return;
        }
        let mut rest = payload;
        if self.held.is_empty() && self.host.writable && !self.host.deaf {
            let written = self.write(payload);
            rest = payload.get(written..).unwrap_or_default();
        }
        self.held.extend(rest);
        if self.host.deaf {
            self.discard();
        }
    }

    /// Moves held bytes to the host, and then passes on that there will be no more.
    fn flush(&mut self) {
        while self.host.writable && !self.host.deaf && !self.held.is_empty() {
            let held = std::mem::take(&mut self.held);
            let written = self.write(held.as_slices().0);
            self.held = held;
            self.held.drain(..written);
        }
        if self.host.deaf {
            self.discard();
        }
        if !self.held.is_empty() {
            return;
        }
        if self.held.capacity() > KEEP_CAPACITY {
            self.held = VecDeque::new();
        }
        if matches!(self.phase, Phase::Flushing) {
            self.phase = Phase::Gone;
        }
        if self.guest.closed & shutdown::SEND != 0 && !self.host.finished {
            self.host.finished = true;
            self.shutdown(Shutdown::Write);
        }
        if self.guest.closed == shutdown::BOTH && matches!(self.phase, Phase::Open | Phase::Closing(_)) {
            // Everything has been passed on: the last word of an orderly end.
            self.reset_wanted = true;
        }
    }

    /// Writes what the host's socket takes now; that counts as forwarded.
    fn write(&mut self, bytes: &[u8]) -> usize {
        loop {
            return match (&self.stream).write(bytes) {
                Ok(written) => {
                    self.forwarded += u32::try_from(written).unwrap_or(u32::MAX);
                    written
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.host.writable = false;
                    0
                }
                Err(_) => {
                    self.host.deaf = true;
                    0
                }
            };
        }
    }

    /// The host takes no more: what is held is of no use, and neither will be what comes.
    fn discard(&mut self) {
        self.host.deaf = true;
        self.forwarded += u32::try_from(self.held.len()).unwrap_or(u32::MAX);
        self.held = VecDeque::new();
    }

    fn read_host(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Outgoing> {
        if !self.host.readable || self.host.ended || self.guest.closed & shutdown::RECEIVE != 0 {
            return None;
        }
        let credit = self.credit();
        if credit == 0 {
            let ask = !std::mem::replace(&mut self.credit_asked, true);
            return ask.then(|| Outgoing::plain(Op::CreditRequest));
        }
        let most = usize::try_from(credit)
            .unwrap_or(usize::MAX)
            .min(room)
            .min(MAX_PAYLOAD);
        if most == 0 {
            return None;
        }
        payload.resize(most, 0);
        let read = loop {
            match (&self.stream).read(payload) {
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                other => break other,
            }
        };
        match read {
            Ok(count) if count > 0 => {
                payload.truncate(count);
                self.sent += u32::try_from(count).unwrap_or(u32::MAX);
                return Some(Outgoing::plain(Op::ReadWrite));
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => self.host.readable = false,
            Ok(_) => self.host.ended = true,
            Err(_) => {
                self.host.ended = true;
                self.discard();
            }
        }
        payload.clear();
        None
    }

    fn tell_shutdown(&mut self) -> Option<Outgoing> {
        let mut flags = 0;
        if self.host.ended {
            flags |= shutdown::SEND;
        }
        if self.host.deaf {
            flags |= shutdown::RECEIVE;
        }
        if flags & !self.guest.told == 0 {
            return None;
        }
        self.guest.told |= flags;
        if self.guest.told == shutdown::BOTH {
            self.phase = Phase::Closing(Instant::now());
        }
        Some(Outgoing {
            op: Op::Shutdown,
            flags: self.guest.told,
        })
    }

    fn guest_shutdown(&mut self, flags: u32) {
        self.guest.closed |= flags & shutdown::BOTH;
        if self.guest.closed & shutdown::RECEIVE != 0 {
            // The host's writer is to hear of it.
            self.shutdown(Shutdown::Read);
        }
        self.flush();
    }

    /// The guest's end does not exist any more. What it sent before still belongs to the host.
    fn guest_gone(&mut self) {
        self.reset_wanted = false;
        match self.phase {
            Phase::Open | Phase::Closing(_) => {
                self.phase = Phase::Flushing;
                self.flush();
            }
            Phase::Flushing => {}
            Phase::Command(_) | Phase::Connecting { .. } | Phase::Gone => self.phase = Phase::Gone,
        }
    }

    /// The guest broke the rules: both ends are cut off at once.
    fn reset(&mut self) {
        self.discard();
        self.shutdown(Shutdown::Both);
        self.host.ended = true;
        self.reset_wanted = true;
    }

    fn shutdown(&self, how: Shutdown) {
        // Fails only when the other end has gone, which an event tells as well.
        drop(self.stream.shutdown(how));
    }
}
