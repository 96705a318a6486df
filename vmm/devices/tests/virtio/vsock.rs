//! The socket device with its own thread; what it says on its queues is tested beside its core.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
};

use caisson_devices::virtio::{
    VirtioDevice,
    vsock::{HEADER_BYTES, HOST_CID, Header, Op, RX_QUEUE, STREAM, TX_QUEUE, VsockDevice},
};

use crate::machine::{DATA, DEVICE_CONFIG, Driver, Machine, readable, writable};

const CID: u64 = 42;
const RX: u16 = RX_QUEUE as u16;
const TX: u16 = TX_QUEUE as u16;
const BUFFERS: u64 = DATA + 0x1_0000;
const BUFFER: u64 = 4096;

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
    Box::new(VsockDevice::new(CID, listener, machine.host()).unwrap())
}

fn packet(op: Op, from: u32, to: u32, len: usize) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: from,
        dst_port: to,
        len: len as u32,
        kind: STREAM,
        op: op as u16,
        buf_alloc: 64 << 10,
        ..Header::default()
    }
}

fn offer_rx(driver: &mut Driver<'_>) {
    for head in 0..8 {
        driver.offer(
            RX,
            head,
            &[writable(BUFFERS + BUFFER * u64::from(head), BUFFER as usize)],
        );
    }
    driver.kick(RX);
}

fn receive(driver: &mut Driver<'_>) -> (Header, Vec<u8>) {
    let (head, len) = driver.wait_used(RX);
    let mut bytes = driver.bytes(BUFFERS + BUFFER * u64::from(head), len as usize);
    let payload = bytes.split_off(HEADER_BYTES);
    (Header::decode(&bytes.try_into().unwrap()), payload)
}

fn send(driver: &mut Driver<'_>, header: &Header, payload: &[u8]) {
    let bytes = [header.encode().as_slice(), payload].concat();
    driver.fill(DATA, &bytes);
    driver.offer(TX, 0, &[readable(DATA, bytes.len())]);
    driver.kick(TX);
    driver.wait_used(TX);
}

/// A connection to nowhere is refused.
fn works(driver: &mut Driver<'_>) {
    offer_rx(driver);
    send(driver, &packet(Op::Request, 7, 9, 0), &[]);
    let (answer, _) = receive(driver);
    assert_eq!((answer.op, answer.dst_port), (Op::Reset as u16, 7));
}

conforms!(make, TX, works);

#[test]
fn a_host_connection_carries_bytes_both_ways_and_outlives_nothing() {
    let machine = Machine::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let device = VsockDevice::new(CID, listener, machine.host()).unwrap();
    let mut driver = machine.plug(Box::new(device));
    // Somebody dials before the guest is there.
    let mut host = UnixStream::connect(&socket).unwrap();
    host.write_all(b"CONNECT 1021\n").unwrap();
    driver.start(0, 256);
    assert_eq!(driver.u64(DEVICE_CONFIG), CID);
    offer_rx(&mut driver);
    let (request, _) = receive(&mut driver);
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1021));
    send(&mut driver, &packet(Op::Response, 1021, request.src_port, 0), &[]);
    let mut greeting = vec![0; format!("OK {}\n", request.src_port).len()];
    host.read_exact(&mut greeting).unwrap();
    host.write_all(b"to the guest").unwrap();
    let (data, payload) = receive(&mut driver);
    assert_eq!(
        (data.op, payload.as_slice()),
        (Op::ReadWrite as u16, b"to the guest".as_slice())
    );
    send(
        &mut driver,
        &packet(Op::ReadWrite, 1021, request.src_port, 5),
        b"hello",
    );
    let mut bytes = [0; 5];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    // The driver starts anew: the connection is over, the next one works.
    driver.reset();
    assert_eq!(host.read(&mut bytes).unwrap(), 0);
    driver.start(0, 256);
    works(&mut driver);
}
