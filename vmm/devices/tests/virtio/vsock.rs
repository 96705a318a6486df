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

#[test]
fn a_connection_outlives_a_pause_and_a_guest_that_moves_hears_that_its_are_gone() {
    const EVENTS: u16 = 2;
    let machine = Machine::new();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let listener = UnixListener::bind(&socket).unwrap();
    let device = VsockDevice::new(CID, listener, machine.host()).unwrap();
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    driver.offer(EVENTS, 0, &[writable(DATA + 0x8000, 8)]);
    driver.kick(EVENTS);
    offer_rx(&mut driver);
    let mut host = UnixStream::connect(&socket).unwrap();
    host.write_all(b"CONNECT 1021\n").unwrap();
    let (request, _) = receive(&mut driver);
    send(&mut driver, &packet(Op::Response, 1021, request.src_port, 0), &[]);
    driver.function.suspend();
    let state = driver.function.state().unwrap();
    host.write_all(b"meanwhile").unwrap();
    driver.function.resume();
    let (data, payload) = receive(&mut driver);
    assert_eq!(
        (data.op, payload.as_slice()),
        (Op::ReadWrite as u16, b"meanwhile".as_slice())
    );
    assert_eq!(driver.used(EVENTS), None, "nothing has happened to it");
    driver.function.suspend();

    let (memory, memories) = (driver.bytes(0, DATA as usize + 0x10_0000), driver.memories());
    let next = Machine::new();
    let mut driver = next.plug(make(&next));
    driver.fill(0, &memory);
    driver.remember(memories);
    driver.function.restore(&state).unwrap();
    next.root.restored(driver.address);
    driver.function.resume();
    assert_eq!(driver.wait_used(EVENTS), (0, 4));
    assert_eq!(driver.bytes(DATA + 0x8000, 4), [0; 4]);
    driver.offer(EVENTS, 0, &[writable(DATA + 0x8000, 8)]);
    driver.function.suspend();
    driver.function.resume();
    // It has been told once.
    send(
        &mut driver,
        &packet(Op::ReadWrite, 1021, request.src_port, 0),
        &[],
    );
    assert_eq!(driver.used(EVENTS), None);
}

#[test]
fn this_process_reaches_a_port_of_the_guest_without_a_name_to_connect_to() {
    let machine = Machine::new();
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("vsock")).unwrap();
    let device = VsockDevice::new(CID, listener, machine.host()).unwrap();
    let dialer = device.dialer();
    let mut driver = machine.plug(Box::new(device));
    // Before there is a guest, and after.
    let mut first = dialer.dial(1020).unwrap();
    driver.start(0, 256);
    offer_rx(&mut driver);
    for (mut host, accepts) in [
        (first.try_clone().unwrap(), true),
        (dialer.dial(1020).unwrap(), false),
    ] {
        let (request, _) = receive(&mut driver);
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, 1020));
        let answer = if accepts { Op::Response } else { Op::Reset };
        send(&mut driver, &packet(answer, 1020, request.src_port, 0), &[]);
        let mut said = Vec::new();
        let expected = format!("OK {}\n", request.src_port);
        if accepts {
            said.resize(expected.len(), 0);
            host.read_exact(&mut said).unwrap();
            assert_eq!(said, expected.as_bytes());
        } else {
            assert_eq!(host.read_to_end(&mut said).unwrap(), 0, "nobody listens");
        }
    }
    driver.reset();
    assert_eq!(first.read(&mut [0]).unwrap(), 0);
}
