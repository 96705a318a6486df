//! The network device, on real taps in a namespace of the test's thread.

use std::{fs::File, sync::Arc};

use caisson_devices::{
    followed_memory::FollowedMemory,
    ports::MemoryControl,
    virtio::{
        VirtioDevice,
        net::{HEADER_BYTES, Net, NetConfig, NetError},
    },
};
use vm_memory::GuestAddress;

use crate::{
    machine::{DATA, DEVICE_CONFIG, Driver, Machine, readable, writable},
    wire::{KIND, Wire, enter_namespace, frame, queues},
};

const RX: u16 = 0;
const TX: u16 = 1;
const MRG_RXBUF: u64 = 1 << 15;
const GUEST_TSO: u64 = 1 << 7 | 1 << 8;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const BUFFERS: u64 = DATA + 0x100_0000;

fn net(machine: &Machine, wire: &Wire) -> Box<dyn VirtioDevice> {
    Box::new(card(machine, wire))
}

fn card(machine: &Machine, wire: &Wire) -> Net {
    let config = NetConfig {
        taps: wire
            .queues
            .iter()
            .map(|queue| queue.try_clone().unwrap())
            .collect(),
        mac: MAC,
        mtu: 1500,
        offloads: true,
    };
    Net::new(config, machine.host()).unwrap()
}

/// Offers `count` buffers of `bytes` each.
fn offer(driver: &mut Driver<'_>, count: u16, bytes: usize) {
    for head in 0..count {
        driver.offer(RX, head, &[writable(BUFFERS + 0x2_0000 * u64::from(head), bytes)]);
    }
    driver.kick(RX);
}

/// The next frame with its header, and how many buffers it took.
fn received(driver: &mut Driver<'_>) -> (Vec<u8>, u16) {
    loop {
        let (mut head, mut length) = driver.wait_used(RX);
        let at = |head: u16| BUFFERS + 0x2_0000 * u64::from(head);
        let mut bytes = driver.bytes(at(head), length as usize);
        let buffers = u16::from_le_bytes([bytes[10], bytes[11]]);
        for _ in 1..buffers {
            (head, length) = driver.wait_used(RX);
            bytes.extend(driver.bytes(at(head), length as usize));
        }
        // The host's own stack speaks too.
        if bytes.get(HEADER_BYTES + 12..HEADER_BYTES + 14) == Some(&KIND) {
            return (bytes.split_off(HEADER_BYTES), buffers);
        }
    }
}

fn send(driver: &mut Driver<'_>, queue: u16, frame: &[u8]) {
    let whole = [&[0; HEADER_BYTES], frame].concat();
    driver.fill(DATA, &whole);
    driver.offer(
        queue,
        0,
        &[readable(DATA, 7), readable(DATA + 7, whole.len() - 7)],
    );
    driver.kick(queue);
    driver.wait_used(queue);
}

fn heard(driver: &Driver<'_>, wire: &Wire) -> Vec<u8> {
    let mut found = None;
    driver.vectors.wait_until("a frame on the wire", || {
        found = wire.receive();
        found.is_some()
    });
    found.unwrap()
}

mod with_a_tap {
    use super::*;

    thread_local! {
        static WIRE: std::cell::RefCell<Option<Wire>> = const { std::cell::RefCell::new(None) };
    }

    fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
        WIRE.set(None);
        let wire = Wire::new(1);
        let device = net(machine, &wire);
        WIRE.set(Some(wire));
        device
    }

    fn works(driver: &mut Driver<'_>) {
        let sent = frame(200);
        send(driver, TX, &sent);
        WIRE.with_borrow(|wire| assert_eq!(heard(driver, wire.as_ref().unwrap()), sent));
    }

    conforms!(make, TX, works, enter_namespace);
}

#[test]
fn nonsense_in_the_receive_queue_harms_nobody() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    // Frames for everything that is done to the queue.
    for _ in 0..200 {
        wire.send(&frame(100));
    }
    driver.start(0, 256);
    crate::conformance::offer_nonsense(&mut driver, RX);
    driver.start(0, 256);
    offer(&mut driver, 64, 1526);
    received(&mut driver);
}

#[test]
fn frames_go_both_ways_whatever_was_negotiated() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    for without in [
        0,
        MRG_RXBUF,
        GUEST_TSO,
        MRG_RXBUF | GUEST_TSO,
        1 << 29,
        !(1 << 32),
    ] {
        driver.start(without, 256);
        offer(&mut driver, 100, 1526);
        for bytes in [60, 61, 1000, 1514] {
            let to_guest = frame(bytes);
            wire.send(&to_guest);
            assert_eq!(received(&mut driver), (to_guest, 1));
            let to_host = frame(bytes);
            send(&mut driver, TX, &to_host);
            assert_eq!(heard(&driver, &wire), to_host);
        }
    }
    assert_eq!(driver.u32(DEVICE_CONFIG), u32::from_le_bytes([2, 0, 0, 0]));
    assert_eq!(
        (driver.u16(DEVICE_CONFIG + 6), driver.u16(DEVICE_CONFIG + 10)),
        (1, 1500)
    );
}

#[test]
fn a_frame_may_take_several_buffers_and_many_frames_arrive_in_order() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    driver.start(GUEST_TSO, 256);
    offer(&mut driver, 200, 300);
    let frames: Vec<_> = [1514, 60, 288, 289, 900].into_iter().map(frame).collect();
    for frame in &frames {
        wire.send(frame);
    }
    let back: Vec<_> = frames.iter().map(|_| received(&mut driver)).collect();
    let counts: Vec<_> = back.iter().map(|(_, count)| *count).collect();
    assert_eq!(counts, [6, 1, 1, 2, 4]);
    assert!(back.iter().zip(&frames).all(|((bytes, _), frame)| bytes == frame));
}

#[test]
fn frames_wait_while_the_guest_has_no_buffers() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    driver.start(0, 256);
    let frames: Vec<_> = (0..20).map(|_| frame(500)).collect();
    for frame in &frames {
        wire.send(frame);
    }
    // Too few for the longest frame, then enough.
    offer(&mut driver, 10, 1526);
    for head in 10..120 {
        driver.offer(RX, head, &[writable(BUFFERS + 0x2_0000 * u64::from(head), 1526)]);
    }
    driver.kick(RX);
    for frame in &frames {
        assert_eq!(received(&mut driver).0, *frame);
    }
}

#[test]
fn a_segmentation_offload_passes_through_as_one_frame() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    driver.start(0, 256);
    // IPv4 and TCP headers of a segment of 40,000 bytes, checksums left to the other side.
    let mut segment = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    let total = 40_040u16.to_be_bytes();
    segment.extend([
        0x45, 0, total[0], total[1], 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    segment.extend([
        0x30, 0x39, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0,
    ]);
    segment.extend((0..40_000u32).map(|at| (at % 253) as u8));
    // NEEDS_CSUM, TCPv4, header length, segment size, where the checksum starts and is.
    let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
    driver.fill(DATA, &[header.as_slice(), &segment].concat());
    driver.offer(
        TX,
        0,
        &[readable(DATA, 12 + 54), readable(DATA + 12 + 54, 40_000)],
    );
    driver.kick(TX);
    driver.wait_used(TX);
    let mut bytes = vec![0; 1 << 17];
    let mut count = 0;
    driver.vectors.wait_until("a frame on the wire", || {
        count = std::io::Read::read(&mut &wire.host, &mut bytes).unwrap_or(0);
        count > 30_000
    });
    assert_eq!(count, segment.len());
    assert_eq!(bytes[54..count], segment[54..]);
}

#[test]
fn frames_that_are_none_are_dropped() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let mut driver = machine.plug(net(&machine, &wire));
    driver.start(0, 256);
    for length in [
        1,
        HEADER_BYTES,
        HEADER_BYTES + 1,
        HEADER_BYTES + 13,
        70_000,
        1 << 20,
    ] {
        driver.offer(TX, 0, &[readable(DATA, length)]);
        driver.kick(TX);
        assert_eq!(driver.wait_used(TX), (0, 0));
    }
    // A header full of nonsense.
    driver.fill(DATA, &[0xff; 200]);
    driver.offer(TX, 0, &[readable(DATA, 200)]);
    driver.kick(TX);
    driver.wait_used(TX);
    let good = frame(100);
    send(&mut driver, TX, &good);
    assert_eq!(heard(&driver, &wire), good);
}

#[test]
fn a_driver_uses_as_many_queues_as_it_asks_for() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(3);
    let mut driver = machine.plug(net(&machine, &wire));
    driver.start(0, 256);
    assert_eq!(driver.u16(0x12), 7, "three pairs and a control queue");
    assert_eq!(driver.u16(DEVICE_CONFIG + 8), 3);
    let mut control = |class: u8, command: u8, pairs: u16| {
        let [low, high] = pairs.to_le_bytes();
        driver
            .request(6, &[&[class, command], &[low, high]], &[1])
            .remove(0)
    };
    assert_eq!(control(4, 0, 3), 0);
    assert_eq!(control(4, 0, 2), 0);
    assert_eq!(control(4, 0, 2), 0, "twice is no error");
    for (class, command, pairs) in [(4, 0, 0), (4, 0, 4), (4, 1, 1), (0, 0, 1)] {
        assert_eq!(control(class, command, pairs), 1);
    }
    for pair in [0, 1] {
        let sent = frame(300);
        send(&mut driver, 2 * pair + TX, &sent);
        assert_eq!(heard(&driver, &wire), sent);
    }
}

/// One for each queue; nothing, said aloud, where the host has no vhost-net.
fn vhost_net(count: usize) -> Option<Vec<File>> {
    let open = |_| File::options().read(true).write(true).open("/dev/vhost-net");
    match (0..count).map(open).collect() {
        Ok(files) => Some(files),
        Err(e) => {
            eprintln!("SKIPPED: cannot open /dev/vhost-net: {e}");
            None
        }
    }
}

#[test]
fn the_kernel_serves_what_it_is_given_and_follows_the_memory() {
    let (true, Some(files)) = (enter_namespace(), vhost_net(1)) else {
        return;
    };
    let machine = Machine::new();
    let wire = Wire::new(1);
    let memory = Arc::new(FollowedMemory::new(machine.slots(), machine.ram.clone()));
    let device = card(&machine, &wire)
        .with_vhost(files, memory.clone(), &machine.ram)
        .unwrap();
    let mut driver = machine.plug(Box::new(device));
    for without in [0, MRG_RXBUF | GUEST_TSO, 1 << 29] {
        driver.start(without, 256);
        offer(&mut driver, 100, 1526);
        for bytes in [60, 1000, 1514] {
            let to_guest = frame(bytes);
            wire.send(&to_guest);
            assert_eq!(received(&mut driver).0, to_guest);
            let to_host = frame(bytes);
            send(&mut driver, TX, &to_host);
            assert_eq!(heard(&driver, &wire), to_host);
            // The kernel lets go of its rings, and takes them up where it was.
            driver.function.suspend();
            driver.function.resume();
        }
    }
    // From memory that was not there when the device began.
    let plugged = 4 << 30;
    memory.add_ram(GuestAddress(plugged), 2 << 20).unwrap();
    let late = frame(700);
    driver.fill(plugged, &[&[0; HEADER_BYTES], late.as_slice()].concat());
    driver.offer(TX, 0, &[readable(plugged, HEADER_BYTES + late.len())]);
    driver.kick(TX);
    driver.wait_used(TX);
    assert_eq!(heard(&driver, &wire), late);
    memory.unmap(GuestAddress(plugged), 2 << 20).unwrap();
    let last = frame(100);
    send(&mut driver, TX, &last);
    assert_eq!(heard(&driver, &wire), last);
}

#[test]
fn the_kernel_serves_several_queues() {
    let (true, Some(files)) = (enter_namespace(), vhost_net(2)) else {
        return;
    };
    let machine = Machine::new();
    let wire = Wire::new(2);
    let memory = Arc::new(FollowedMemory::new(machine.slots(), machine.ram.clone()));
    let device = card(&machine, &wire)
        .with_vhost(files, memory, &machine.ram)
        .unwrap();
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    assert_eq!(driver.request(4, &[&[4, 0], &[2, 0]], &[1]), [0]);
    for pair in [0, 1, 0] {
        let sent = frame(300);
        send(&mut driver, 2 * pair + TX, &sent);
        assert_eq!(heard(&driver, &wire), sent);
    }
}

#[test]
fn descriptors_that_are_no_vhost_net_are_refused() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let wire = Wire::new(1);
    let memory = Arc::new(FollowedMemory::new(machine.slots(), machine.ram.clone()));
    let with = |files| {
        card(&machine, &wire)
            .with_vhost(files, memory.clone(), &machine.ram)
            .map(drop)
    };
    assert!(matches!(
        with(vec![]),
        Err(NetError::VhostCount { count: 0, pairs: 1 })
    ));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(with(vec![file]), Err(NetError::Vhost(0, _))));
}

#[test]
fn descriptors_that_are_no_tap_are_refused() {
    if !enter_namespace() {
        return;
    }
    let machine = Machine::new();
    let make = |taps, mtu| {
        let config = NetConfig {
            taps,
            mac: MAC,
            mtu,
            offloads: true,
        };
        Net::new(config, machine.host()).map(drop)
    };
    assert!(matches!(make(vec![], 1500), Err(NetError::Pairs { count: 0 })));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(make(vec![file], 1500), Err(NetError::Tap(0, _))));
    assert!(matches!(
        make(queues(1, 0).unwrap(), 1500),
        Err(NetError::Tap(0, _))
    ));
    assert!(matches!(
        make(queues(1, libc::IFF_VNET_HDR).unwrap(), 60),
        Err(NetError::Mtu { mtu: 60 })
    ));
}
