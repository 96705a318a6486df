//! Connections that carry bytes: both directions, any piece size, half-closes, refusals, a guest that reboots.

use std::{io::Write, net::Shutdown, os::unix::net::UnixStream};

use caisson_devices::virtio::vsock::{BUFFER_BYTES, Op, shutdown};
use proptest::prelude::*;

use crate::driver::{Driver, Peer, op, packet, read_now};

fn connected(rx_buffer: u32, guest_buffer: u32) -> (Driver, UnixStream, Peer) {
    let mut driver = Driver::new(rx_buffer);
    let host = driver.dial(1021);
    let peer = Peer::accept(&mut driver, &host, 1021, guest_buffer);
    (driver, host, peer)
}

fn turn(driver: &mut Driver, peer: &mut Peer) {
    driver.run();
    peer.take_all(driver);
    peer.consume(driver, u32::MAX);
    driver.run();
}

/// Everything that arrives until the other end closes.
fn read_to_end(driver: &mut Driver, peer: &mut Peer, host: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    for _ in 0..10_000 {
        match read_now(host) {
            None => return all,
            Some(bytes) => all.extend(bytes),
        }
        turn(driver, peer);
    }
    panic!("no end after {} bytes", all.len());
}

#[test]
fn a_refused_connection_is_closed() {
    let mut driver = Driver::new(4096);
    let host = driver.dial(5);
    driver.run();
    let (request, _) = driver.received().remove(0);
    driver.send(&packet(Op::Reset, 5, request.src_port), &[]);
    driver.run();
    assert_eq!(read_now(&host), None);
    assert_eq!(driver.device.connections(), 0);
}

#[test]
fn what_is_not_a_command_is_closed() {
    let mut driver = Driver::new(4096);
    let mut host = driver.dial(5);
    host.write_all(b"").unwrap();
    let wrong = driver.dial(u32::MAX);
    driver.run();
    assert_eq!(read_now(&wrong), None);
    assert_eq!(read_now(&host), Some(Vec::new()));
}

#[test]
fn a_request_waits_for_a_guest_that_boots_and_one_that_gave_up_is_not_sent() {
    let mut driver = Driver::new(4096);
    let (early, gone) = (driver.dial(1021), driver.dial(1022));
    driver.device.process_host();
    drop(gone);
    driver.device.process_host();
    driver.reboot();
    driver.run();
    let packets = driver.received();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].0.dst_port, 1021);
    driver.send(&packet(Op::Response, 1021, packets[0].0.src_port), &[]);
    driver.run();
    assert!(read_now(&early).unwrap().starts_with(b"OK "));
}

#[test]
fn a_guest_that_never_answered_is_told_when_the_host_gives_up() {
    let mut driver = Driver::new(4096);
    let host = driver.dial(1021);
    driver.run();
    driver.received();
    drop(host);
    driver.run();
    assert_eq!(op(&driver.received()[0].0), Some(Op::Reset));
    assert_eq!(driver.device.connections(), 0);
}

#[test]
fn bytes_written_right_behind_the_command_are_delivered() {
    let mut driver = Driver::new(4096);
    let mut host = driver.dial(9);
    host.write_all(b"early bird").unwrap();
    let mut peer = Peer::accept(&mut driver, &host, 9, 4096);
    turn(&mut driver, &mut peer);
    assert_eq!(peer.received, b"early bird");
}

#[test]
fn the_hosts_half_close_reaches_the_guest_after_its_bytes_and_the_other_half_works_on() {
    let (mut driver, mut host, mut peer) = connected(4096, 1000);
    host.write_all(&[7; 5000]).unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    for _ in 0..20 {
        turn(&mut driver, &mut peer);
    }
    assert_eq!(peer.received.len(), 5000);
    assert_eq!(peer.host_closed, shutdown::SEND);
    assert_eq!(peer.write(&mut driver, b"answer"), 6);
    driver.run();
    assert_eq!(read_now(&host).unwrap(), b"answer");
    drop(host);
    turn(&mut driver, &mut peer);
    assert_eq!(peer.host_closed, shutdown::BOTH);
    peer.say(&mut driver, Op::Reset, 0, &[]);
    driver.run();
    assert_eq!(driver.device.connections(), 0);
}

#[test]
fn the_guests_half_close_reaches_the_host_after_its_bytes_and_the_other_half_works_on() {
    let (mut driver, mut host, mut peer) = connected(4096, 4096);
    let input: Vec<u8> = (0..700_000u32).map(|i| (i % 251) as u8).collect();
    let (mut sent, mut arrived) = (0, Vec::new());
    while sent < input.len() {
        let count = peer.write(&mut driver, &input[sent..]);
        sent += count;
        turn(&mut driver, &mut peer);
        if count == 0 {
            // Everything is full: now the host reads some.
            arrived.extend(read_now(&host).unwrap());
            turn(&mut driver, &mut peer);
        }
    }
    peer.say(&mut driver, Op::Shutdown, shutdown::SEND, &[]);
    driver.run();
    arrived.extend(read_to_end(&mut driver, &mut peer, &host));
    assert!(arrived == input);
    assert!(!peer.reset);
    host.write_all(b"still here").unwrap();
    turn(&mut driver, &mut peer);
    assert_eq!(peer.received, b"still here");
}

#[test]
fn a_guest_that_closes_is_answered_when_its_bytes_have_been_passed_on() {
    let (mut driver, host, mut peer) = connected(4096, 4096);
    let mut sent = 0;
    while peer.credit() > 0 {
        sent += peer.write(&mut driver, &[3; 10_000]);
        driver.run();
    }
    peer.say(&mut driver, Op::Shutdown, shutdown::BOTH, &[]);
    turn(&mut driver, &mut peer);
    assert!(!peer.reset, "answered before the host had it all");
    assert_eq!(read_to_end(&mut driver, &mut peer, &host).len(), sent);
    turn(&mut driver, &mut peer);
    assert!(peer.reset);
    assert_eq!(driver.device.connections(), 0);
}

#[test]
fn what_a_guest_sent_before_its_reset_still_reaches_the_host() {
    let (mut driver, host, mut peer) = connected(4096, 4096);
    let mut sent = 0;
    while peer.credit() > 0 {
        sent += peer.write(&mut driver, &[3; 60_000]);
        driver.run();
    }
    peer.say(&mut driver, Op::Reset, 0, &[]);
    driver.run();
    assert_eq!(read_to_end(&mut driver, &mut peer, &host).len(), sent);
    assert_eq!(driver.device.connections(), 0);
}

#[test]
fn a_host_that_closes_with_bytes_unread_is_told_to_the_guest() {
    let (mut driver, host, mut peer) = connected(4096, 4096);
    while peer.credit() > 0 {
        peer.write(&mut driver, &[3; 60_000]);
        driver.run();
    }
    drop(host);
    for _ in 0..4 {
        turn(&mut driver, &mut peer);
    }
    assert_eq!(peer.host_closed, shutdown::BOTH);
}

#[test]
fn a_guest_that_wants_no_more_makes_the_hosts_writes_fail() {
    let (mut driver, mut host, mut peer) = connected(4096, 4096);
    peer.say(&mut driver, Op::Shutdown, shutdown::RECEIVE, &[]);
    driver.run();
    assert_eq!(
        host.write(b"x").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe
    );
    assert_eq!(peer.write(&mut driver, b"bye"), 3);
    driver.run();
    assert_eq!(read_now(&host).unwrap(), b"bye");
}

#[test]
fn a_full_guest_stops_the_host_and_nothing_is_read_ahead() {
    let (mut driver, mut host, mut peer) = connected(4096, 10_000);
    let mut written = 0;
    while let Ok(count) = host.write(&[1; 8192]) {
        written += count;
        driver.run();
        peer.take_all(&mut driver);
        driver.run();
    }
    assert_eq!(peer.received.len(), 10_000);
    for _ in 0..10_000 {
        turn(&mut driver, &mut peer);
    }
    assert_eq!(peer.received.len(), written);
}

#[test]
fn a_reboot_closes_the_connections_that_the_guest_knew() {
    let (mut driver, host, _peer) = connected(4096, 4096);
    driver.reboot();
    driver.run();
    assert_eq!(read_now(&host), None);
    assert_eq!(driver.device.connections(), 0);
    let host = driver.dial(3);
    Peer::accept(&mut driver, &host, 3, 4096);
}

#[test]
fn one_connection_that_is_full_does_not_hold_up_another() {
    let (mut driver, mut full, mut _deaf) = connected(4096, 1000);
    while full.write(&[1; 8192]).is_ok() {
        driver.run();
    }
    driver.received();
    let mut host = driver.dial(8);
    let mut peer = Peer::accept(&mut driver, &host, 8, 4096);
    host.write_all(b"through").unwrap();
    turn(&mut driver, &mut peer);
    assert_eq!(peer.received, b"through");
}

#[derive(Debug, Clone, Copy)]
enum Step {
    HostWrites(usize),
    HostReads,
    GuestWrites(usize),
    GuestReads(u32),
    Device,
    GuestTakes,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        prop_oneof![1usize..10, 1usize..100_000].prop_map(Step::HostWrites),
        Just(Step::HostReads),
        prop_oneof![1usize..10, 1usize..100_000].prop_map(Step::GuestWrites),
        prop_oneof![1u32..10, 1u32..100_000].prop_map(Step::GuestReads),
        Just(Step::Device),
        Just(Step::GuestTakes),
    ]
}

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn every_byte_arrives_once_and_in_order_in_both_directions(
        steps in proptest::collection::vec(step(), 1..80),
        to_guest in 0usize..1_500_000,
        to_host in 0usize..1_500_000,
        guest_buffer in prop_oneof![1u32..200, Just(65_536u32), Just(BUFFER_BYTES)],
        rx_buffer in prop_oneof![46u32..200, Just(4096u32), Just(40_000u32)],
    ) {
        // Small buffers carry little: keep the number of packets in bounds.
        let scale = (guest_buffer.min(rx_buffer - 44) as usize) * 2000;
        let (downwards, upwards) = (pattern(to_guest.min(scale), 1), pattern(to_host, 2));
        let (mut driver, mut host, mut peer) = connected(rx_buffer, guest_buffer);
        let (mut written, mut arrived, mut sent) = (0, Vec::new(), 0);
        let mut rounds = 0;
        let mut steps = steps.iter().cycle();
        while peer.read as usize != downwards.len() || arrived.len() != upwards.len() {
            rounds += 1;
            prop_assert!(
                rounds < 200_000,
                "stalled: host wrote {} of {}, guest got {} and read {}; guest sent {} of {}, host got {}",
                written, downwards.len(), peer.received.len(), peer.read, sent, upwards.len(), arrived.len()
            );
            // The generated order first; whatever it leaves out comes between.
            let next = if rounds % 7 == 0 {
                [Step::HostWrites(5000), Step::HostReads, Step::GuestWrites(5000), Step::GuestReads(u32::MAX), Step::Device, Step::GuestTakes]
                    [rounds / 7 % 6]
            } else {
                *steps.next().unwrap()
            };
            match next {
                Step::HostWrites(most) => {
                    let end = (written + most).min(downwards.len());
                    written += host.write(&downwards[written..end]).unwrap_or(0);
                }
                Step::HostReads => arrived.extend(read_now(&host).unwrap()),
                Step::GuestWrites(most) => {
                    let end = (sent + most).min(upwards.len());
                    sent += peer.write(&mut driver, &upwards[sent..end]);
                }
                Step::GuestReads(most) => peer.consume(&mut driver, most),
                Step::Device => driver.run(),
                Step::GuestTakes if driver.can_send() => peer.take_all(&mut driver),
                Step::GuestTakes => {}
            }
        }
        prop_assert!(!peer.reset);
        prop_assert!(peer.received == downwards);
        prop_assert!(arrived == upwards);
    }
}
