//! All connections of a device, and which one speaks next.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    time::Duration,
};

use vmm_sys_util::epoll::EventSet;

use crate::complaints::Complaints;

use super::{
    backend::{HostEvent, HostSide, VsockDialer},
    connection::Connection,
    packet::{HOST_CID, Header, Op, STREAM},
};

/// Connections of one device, those that are opening and closing included. One more is closed at once.
pub const MAX_CONNECTIONS: usize = 1024;

/// Answers to packets that belong to no connection, waiting for buffers. More are dropped: only a hostile guest gets there.
const MAX_REFUSALS: usize = 256;

/// How long a connection that both ends have closed waits for the guest's last word. Linux' own patience.
const CLOSING_PATIENCE: Duration = Duration::from_secs(8);

/// Batches of events that are taken before the guest gets its turn. More than one, because a new connection mostly has its command
/// with it.
const POLL_ROUNDS: usize = 4;

/// Local ports are handed out from here on, in turn, so that one is not used again while its former connection is remembered.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// All connections of one device.
#[derive(Debug)]
pub(crate) struct Muxer {
    guest_cid: u64,
    host: HostSide,
    connections: HashMap<u32, Connection>,
    next_port: u32,
    /// Connections that may have something to say, in turn; each is in it once.
    waiting: VecDeque<u32>,
    is_waiting: HashSet<u32>,
    refusals: VecDeque<Header>,
}

impl Muxer {
    pub(crate) fn new(guest_cid: u64, listener: UnixListener) -> std::io::Result<Self> {
        Ok(Self {
            guest_cid,
            host: HostSide::new(listener)?,
            connections: HashMap::new(),
            next_port: FIRST_PORT,
            waiting: VecDeque::new(),
            is_waiting: HashSet::new(),
            refusals: VecDeque::new(),
        })
    }

    pub(crate) fn dialer(&self) -> VsockDialer {
        self.host.dialer()
    }

    pub(crate) fn len(&self) -> usize {
        self.connections.len()
    }

    /// May there be something for the guest?
    pub(crate) fn has_work(&self) -> bool {
        !self.refusals.is_empty() || !self.waiting.is_empty()
    }

    /// Forgets every connection that the guest has heard of.
    pub(crate) fn reset(&mut self) {
        self.refusals.clear();
        self.connections
            .retain(|_, connection| connection.is_unheard_of());
    }

    /// Takes what happened on the host's sockets. What is left after some rounds keeps the descriptor readable.
    pub(crate) fn poll(&mut self, complaints: &mut Complaints) {
        for _ in 0..POLL_ROUNDS {
            let events = self.host.events().unwrap_or_else(|e| {
                complaints.say(format_args!("cannot ask for events of the host's sockets: {e}"));
                Vec::new()
            });
            if events.is_empty() {
                return;
            }
            for event in events {
                match event {
                    HostEvent::Incoming => self.accept(complaints),
                    HostEvent::Socket { local_port, ready } => self.socket_event(local_port, ready),
                }
            }
        }
    }

    fn socket_event(&mut self, local_port: u32, ready: EventSet) {
        if let Some(connection) = self.connections.get_mut(&local_port) {
            connection.host_event(ready);
            self.settle(local_port);
        }
    }

    /// Takes a packet of the guest.
    pub(crate) fn take(&mut self, header: &Header, payload: &[u8], complaints: &mut Complaints) {
        if header.src_cid != self.guest_cid {
            complaints.say(format_args!("packet of a foreign context id {}", header.src_cid));
            return;
        }
        let ours = header.dst_cid == HOST_CID && header.kind == STREAM;
        let connection = self
            .connections
            .get_mut(&header.dst_port)
            .filter(|c| ours && c.belongs_to(header.src_port));
        match connection {
            Some(connection) => {
                connection.packet(header, payload);
                self.settle(header.dst_port);
            }
            None => self.refuse(header, complaints),
        }
    }

    /// The next packet for the guest, its data in `payload`, at most `room` bytes.
    pub(crate) fn give(&mut self, room: usize, payload: &mut Vec<u8>) -> Option<Header> {
        payload.clear();
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(port) = self.waiting.pop_front() {
            self.is_waiting.remove(&port);
            let Some(connection) = self.connections.get_mut(&port) else {
                continue;
            };
            let Some(outgoing) = connection.next(room, payload) else {
                continue;
            };
            let mut header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                len: u32::try_from(payload.len()).unwrap_or_default(),
                kind: STREAM,
                op: outgoing.op as u16,
                flags: outgoing.flags,
                ..Header::default()
            };
            connection.stamp(&mut header);
            // It may have more to say; whether it has is found out in its next turn.
            self.settle(port);
            return Some(header);
        }
        None
    }

    fn accept(&mut self, complaints: &mut Complaints) {
        loop {
            match self.host.accept() {
                Ok(Some(stream)) => self.admit(stream, complaints),
                Ok(None) => return,
                Err(e) => {
                    complaints.say(format_args!("cannot accept a connection: {e}"));
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream, complaints: &mut Complaints) {
        // There is no timer: what the guest never answered is cleared away when somebody comes.
        self.connections.retain(|_, connection| {
            connection
                .closing_since()
                .is_none_or(|since| since.elapsed() < CLOSING_PATIENCE)
        });
        if self.connections.len() >= MAX_CONNECTIONS {
            complaints.say(format_args!(
                "{MAX_CONNECTIONS} connections are the limit; one more was closed"
            ));
            return;
        }
        let port = self.free_port();
        if let Err(e) = self.host.watch(&stream, port) {
            complaints.say(format_args!("cannot watch a connection: {e}"));
            return;
        }
        self.connections.insert(port, Connection::new(stream, port));
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port >= LAST_PORT { FIRST_PORT } else { port + 1 };
            // There are far more ports than connections.
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// After anything happened to a connection: it goes, or gets its turn.
    fn settle(&mut self, port: u32) {
        if self.connections.get(&port).is_some_and(Connection::is_gone) {
            self.connections.remove(&port);
        } else if self.is_waiting.insert(port) {
            self.waiting.push_back(port);
        }
    }

    /// Answers a packet that belongs to no connection.
    fn refuse(&mut self, header: &Header, complaints: &mut Complaints) {
        if header.op == Op::Reset as u16 {
            return;
        }
        if header.op == Op::Request as u16 {
            complaints.say(format_args!(
                "refused the guest's connection from port {} to cid {} port {}",
                header.src_port, header.dst_cid, header.dst_port
            ));
        }
        if self.refusals.len() >= MAX_REFUSALS {
            return;
        }
        self.refusals.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: self.guest_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }
}

impl AsRawFd for Muxer {
    fn as_raw_fd(&self) -> RawFd {
        self.host.as_raw_fd()
    }
}
