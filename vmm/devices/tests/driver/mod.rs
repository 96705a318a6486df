//! The driver's side of a vsock device: rings in guest memory, written as a guest writes them.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    reason = "each test binary uses its part"
)]

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use caisson_devices::virtio::vsock::{HEADER_BYTES, HOST_CID, Header, Op, STREAM, Vsock};
use virtio_queue::{
    Queue, QueueT,
    desc::{RawDescriptor, split::Descriptor},
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const CID: u64 = 77;
pub const QUEUE_SIZE: u16 = 64;
pub const MEMORY: usize = 16 << 20;
const RX_RING: u64 = 0;
const TX_RING: u64 = 0x1_0000;
const RX_BUFFERS: u64 = 0x10_0000;
const TX_BUFFERS: u64 = 0x40_0000;
const TX_BUFFER: u64 = 0x1_1000;
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// One ring as its driver sees it.
struct Ring {
    descriptors: u64,
    avail: u64,
    used: u64,
    avail_idx: u16,
    used_idx: u16,
}

impl Ring {
    /// The `MockSplitQueue` of virtio-queue lets the rings overlap when they are used in full; so they are laid out here.
    fn new(base: u64) -> (Self, Queue) {
        let size = u64::from(QUEUE_SIZE);
        let avail = base + 16 * size;
        let used = (avail + 6 + 2 * size).next_multiple_of(4);
        let mut queue = Queue::new(QUEUE_SIZE).unwrap();
        queue.set_size(QUEUE_SIZE);
        queue.set_desc_table_address(Some(base as u32), Some(0));
        queue.set_avail_ring_address(Some(avail as u32), Some(0));
        queue.set_used_ring_address(Some(used as u32), Some(0));
        queue.set_ready(true);
        let ring = Self {
            descriptors: base,
            avail,
            used,
            avail_idx: 0,
            used_idx: 0,
        };
        (ring, queue)
    }

    fn describe(&self, memory: &GuestMemoryMmap, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let raw = RawDescriptor::from(Descriptor::new(addr, len, flags, next));
        let at = GuestAddress(self.descriptors + 16 * u64::from(index));
        memory.write_obj(raw, at).unwrap();
    }

    fn offer(&mut self, memory: &GuestMemoryMmap, head: u16) {
        let slot = self.avail + 4 + 2 * u64::from(self.avail_idx % QUEUE_SIZE);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail_idx = self.avail_idx.wrapping_add(1);
        memory
            .write_obj(self.avail_idx, GuestAddress(self.avail + 2))
            .unwrap();
    }

    fn take_used(&mut self, memory: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let idx: u16 = memory.read_obj(GuestAddress(self.used + 2)).unwrap();
        if idx == self.used_idx {
            return None;
        }
        let slot = self.used + 4 + 8 * u64::from(self.used_idx % QUEUE_SIZE);
        self.used_idx = self.used_idx.wrapping_add(1);
        let head: u32 = memory.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }
}

/// A guest with its device.
pub struct Driver {
    pub device: Vsock,
    pub memory: GuestMemoryMmap,
    rx: Ring,
    tx: Ring,
    pub rx_queue: Queue,
    pub tx_queue: Queue,
    rx_buffer: u32,
    free_tx: Vec<u16>,
    socket: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Driver {
    /// `rx_buffer`: bytes of each buffer for the device to write to.
    pub fn new(rx_buffer: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("vsock");
        let device = Vsock::new(CID, UnixListener::bind(&socket).unwrap()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap();
        let (rx, rx_queue) = Ring::new(RX_RING);
        let (tx, tx_queue) = Ring::new(TX_RING);
        let mut driver = Self {
            device,
            memory,
            rx,
            tx,
            rx_queue,
            tx_queue,
            rx_buffer,
            free_tx: (0..QUEUE_SIZE / 2).collect(),
            socket,
            _dir: dir,
        };
        for index in 0..QUEUE_SIZE {
            driver.give_rx(index);
        }
        driver
    }

    pub fn give_rx(&mut self, index: u16) {
        let addr = RX_BUFFERS + u64::from(index) * u64::from(self.rx_buffer);
        self.rx
            .describe(&self.memory, index, addr, self.rx_buffer, WRITE, 0);
        self.rx.offer(&self.memory, index);
    }

    /// As after a reboot: new rings, nothing in flight.
    pub fn reboot(&mut self) {
        self.memory.write_slice(&[0; 0x2_0000], GuestAddress(0)).unwrap();
        (self.rx, self.rx_queue) = Ring::new(RX_RING);
        (self.tx, self.tx_queue) = Ring::new(TX_RING);
        self.free_tx = (0..QUEUE_SIZE / 2).collect();
        self.device.reset();
        for index in 0..QUEUE_SIZE {
            self.give_rx(index);
        }
    }

    /// A host's connection that has asked for `port`.
    pub fn dial(&self, port: u32) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Lets the device do all it can.
    pub fn run(&mut self) {
        self.device.process_host();
        self.device.process_tx(&mut self.tx_queue, &self.memory);
        self.device.process_rx(&mut self.rx_queue, &self.memory);
        while let Some((head, _)) = self.tx.take_used(&self.memory) {
            self.free_tx.push(head / 2);
        }
    }

    /// Packets that the device has sent, in order.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while let Some((head, len)) = self.rx.take_used(&self.memory) {
            let addr = RX_BUFFERS + u64::from(head) * u64::from(self.rx_buffer);
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
            if bytes.len() >= HEADER_BYTES {
                let payload = bytes.split_off(HEADER_BYTES);
                let header = Header::decode(&bytes.try_into().unwrap());
                assert_eq!(header.len as usize, payload.len());
                packets.push((header, payload));
            }
            self.give_rx(head);
        }
        packets
    }

    pub fn can_send(&self) -> bool {
        !self.free_tx.is_empty()
    }

    /// Puts a packet into the tx queue; header and payload in a descriptor each.
    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        let slot = self.free_tx.pop().expect("tx queue is full");
        let addr = TX_BUFFERS + u64::from(slot) * TX_BUFFER;
        self.memory
            .write_slice(&header.encode(), GuestAddress(addr))
            .unwrap();
        let payload_at = addr + 64;
        self.memory
            .write_slice(payload, GuestAddress(payload_at))
            .unwrap();
        let head = slot * 2;
        let flags = if payload.is_empty() { 0 } else { NEXT };
        self.tx
            .describe(&self.memory, head, addr, HEADER_BYTES as u32, flags, head + 1);
        self.tx
            .describe(&self.memory, head + 1, payload_at, payload.len() as u32, 0, 0);
        self.tx.offer(&self.memory, head);
    }

    /// Puts arbitrary descriptors into the tx queue, from index 0 on.
    pub fn send_raw(&mut self, descriptors: &[(u64, u32, u16, u16)]) {
        for (index, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            self.tx
                .describe(&self.memory, index as u16, addr, len, flags, next);
        }
        self.tx.offer(&self.memory, 0);
    }

    /// As [`Driver::send_raw`], for the rx queue.
    pub fn give_raw(&mut self, descriptors: &[(u64, u32, u16, u16)]) {
        for (index, &(addr, len, flags, next)) in descriptors.iter().enumerate() {
            self.rx
                .describe(&self.memory, index as u16, addr, len, flags, next);
        }
        self.rx.offer(&self.memory, 0);
    }

    pub fn used_tx(&self) -> u16 {
        self.memory.read_obj(GuestAddress(self.tx.used + 2)).unwrap()
    }

    pub fn corrupt_avail(&self, idx: u16) {
        self.memory
            .write_obj(idx, GuestAddress(self.tx.avail + 2))
            .unwrap();
    }
}

/// A packet of the guest towards `port` of the host.
pub fn packet(op: Op, from: u32, to: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: from,
        dst_port: to,
        kind: STREAM,
        op: op as u16,
        buf_alloc: 64 << 10,
        ..Header::default()
    }
}

pub fn op(header: &Header) -> Option<Op> {
    Op::from_wire(header.op)
}

/// What can be read now; `None` at the end.
pub fn read_now(mut stream: &UnixStream) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 16];
    match stream.read(&mut bytes) {
        Ok(0) => None,
        Ok(n) => {
            bytes.truncate(n);
            Some(bytes)
        }
        Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => Some(Vec::new()),
        Err(_) => None,
    }
}

/// A guest's application with one accepted connection; it keeps the rules of credit.
pub struct Peer {
    pub port: u32,
    pub host_port: u32,
    pub buffer: u32,
    pub received: Vec<u8>,
    pub read: u32,
    sent: u32,
    host_alloc: u32,
    host_taken: u32,
    pub host_closed: u32,
    pub reset: bool,
    /// What the device was told of `read`.
    told: u32,
}

impl Peer {
    /// Accepts the connection that the device asks for.
    pub fn accept(driver: &mut Driver, host: &UnixStream, port: u32, buffer: u32) -> Self {
        driver.run();
        let packets = driver.received();
        let (request, _) = packets
            .iter()
            .find(|(h, _)| op(h) == Some(Op::Request) && h.dst_port == port)
            .expect("no request");
        let mut peer = Self {
            port,
            host_port: request.src_port,
            buffer,
            received: Vec::new(),
            read: 0,
            sent: 0,
            host_alloc: request.buf_alloc,
            host_taken: request.fwd_cnt,
            host_closed: 0,
            reset: false,
            told: 0,
        };
        peer.say(driver, Op::Response, 0, &[]);
        driver.run();
        let answer = read_now(host).unwrap();
        assert_eq!(answer, format!("OK {}\n", peer.host_port).as_bytes());
        peer
    }

    pub fn say(&mut self, driver: &mut Driver, what: Op, flags: u32, payload: &[u8]) {
        let header = Header {
            len: payload.len() as u32,
            flags,
            buf_alloc: self.buffer,
            fwd_cnt: self.read,
            ..packet(what, self.port, self.host_port)
        };
        self.told = self.read;
        driver.send(&header, payload);
    }

    /// Takes a packet of the device.
    pub fn take(&mut self, driver: &mut Driver, header: &Header, payload: &[u8]) {
        self.host_alloc = header.buf_alloc;
        self.host_taken = header.fwd_cnt;
        match op(header).unwrap() {
            Op::ReadWrite => {
                self.received.extend(payload);
                let unread = (self.received.len() as u32).wrapping_sub(self.read);
                assert!(unread <= self.buffer, "the device sent beyond its credit");
            }
            Op::CreditRequest => self.say(driver, Op::CreditUpdate, 0, &[]),
            Op::Shutdown => self.host_closed |= header.flags,
            Op::Reset => self.reset = true,
            Op::CreditUpdate => {}
            other => panic!("{other:?}"),
        }
    }

    /// Takes everything that the device has sent to this peer.
    pub fn take_all(&mut self, driver: &mut Driver) {
        for (header, payload) in driver.received() {
            if header.dst_port == self.port && header.src_port == self.host_port {
                self.take(driver, &header, &payload);
            }
        }
    }

    pub fn credit(&self) -> u32 {
        self.host_alloc
            .saturating_sub(self.sent.wrapping_sub(self.host_taken))
    }

    /// Sends what credit and queue allow; the count.
    pub fn write(&mut self, driver: &mut Driver, bytes: &[u8]) -> usize {
        let most = (self.credit() as usize).min(bytes.len()).min(64 << 10);
        if most == 0 || !driver.can_send() {
            return 0;
        }
        self.sent = self.sent.wrapping_add(most as u32);
        self.say(driver, Op::ReadWrite, 0, &bytes[..most]);
        most
    }

    /// The application reads; the driver tells as Linux does: when the buffer ran empty or three quarters have been read.
    pub fn consume(&mut self, driver: &mut Driver, most: u32) {
        let unread = (self.received.len() as u32) - self.read;
        self.read += unread.min(most);
        let empty = self.read as usize == self.received.len();
        let untold = self.read - self.told;
        if untold > 0 && (empty || untold > self.buffer / 4 * 3) && driver.can_send() {
            self.say(driver, Op::CreditUpdate, 0, &[]);
        }
    }
}
