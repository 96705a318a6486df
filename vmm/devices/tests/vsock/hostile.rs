//! Guests that break the rules: the device neither panics nor stalls for the connections that keep them.

use caisson_devices::virtio::vsock::{
    BUFFER_BYTES, HEADER_BYTES, HOST_CID, Header, MAX_CONNECTIONS, Op, STREAM, Vsock, shutdown,
};
use proptest::prelude::*;

use crate::driver::{CID, Driver, MEMORY, NEXT, Peer, QUEUE_SIZE, WRITE, op, packet, read_now};

/// The device still serves: a new connection carries a byte each way.
fn still_serves(driver: &mut Driver) {
    driver.received();
    let host = driver.dial(99);
    let mut peer = Peer::accept(driver, &host, 99, 4096);
    std::io::Write::write_all(&mut &host, b"ping").unwrap();
    driver.run();
    peer.take_all(driver);
    assert_eq!(peer.received, b"ping");
    assert_eq!(peer.write(driver, b"pong"), 4);
    driver.run();
    assert_eq!(read_now(&host).unwrap(), b"pong");
}

#[test]
fn a_guest_cannot_connect_to_anything() {
    let mut driver = Driver::new(4096);
    for (cid, port) in [
        (HOST_CID, 1021),
        (HOST_CID, 22),
        (0, 1),
        (1, 1021),
        (CID, 1021),
        (3, 5),
    ] {
        let request = Header {
            dst_cid: cid,
            ..packet(Op::Request, 4000, port)
        };
        driver.send(&request, &[]);
        driver.run();
        let answers = driver.received();
        assert_eq!(answers.len(), 1);
        let answer = &answers[0].0;
        assert_eq!(op(answer), Some(Op::Reset));
        assert_eq!(
            (answer.src_cid, answer.src_port, answer.dst_cid, answer.dst_port),
            (cid, port, CID, 4000)
        );
    }
    assert_eq!(driver.device.connections(), 0);
    still_serves(&mut driver);
}

#[test]
fn packets_that_belong_to_no_connection_are_reset_and_resets_are_not_answered() {
    let mut driver = Driver::new(4096);
    for what in [
        Op::Response,
        Op::ReadWrite,
        Op::Shutdown,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        driver.send(&packet(what, 1021, 1 << 30), &[]);
        driver.run();
        assert_eq!(
            driver.received().iter().map(|(h, _)| op(h)).collect::<Vec<_>>(),
            [Some(Op::Reset)]
        );
    }
    driver.send(&packet(Op::Reset, 1021, 1 << 30), &[]);
    driver.run();
    assert!(driver.received().is_empty());
}

#[test]
fn an_unknown_socket_type_is_reset_in_kind() {
    let mut driver = Driver::new(4096);
    let header = Header {
        kind: 2,
        ..packet(Op::ReadWrite, 5, 6)
    };
    driver.send(&header, &[]);
    driver.run();
    let answers = driver.received();
    assert_eq!((answers[0].0.kind, op(&answers[0].0)), (2, Some(Op::Reset)));
}

#[test]
fn a_foreign_context_id_is_not_answered() {
    let mut driver = Driver::new(4096);
    let header = Header {
        src_cid: CID + 1,
        ..packet(Op::Request, 5, 6)
    };
    driver.send(&header, &[]);
    driver.run();
    assert!(driver.received().is_empty());
    still_serves(&mut driver);
}

#[test]
fn sending_beyond_the_credit_resets_the_connection() {
    let mut driver = Driver::new(4096);
    let host = driver.dial(7);
    let mut peer = Peer::accept(&mut driver, &host, 7, 4096);
    let piece = vec![1; 64 << 10];
    // The host never reads: its socket fills, then the device's buffer, then it is over.
    for _ in 0..64 {
        peer.say(&mut driver, Op::ReadWrite, 0, &piece);
        driver.run();
        peer.take_all(&mut driver);
        if peer.reset {
            break;
        }
    }
    assert!(peer.reset);
    assert_eq!(driver.device.connections(), 0);
    still_serves(&mut driver);
}

#[test]
fn a_length_that_is_a_lie_resets_the_connection() {
    for lie in [1, 5000, 65537, u32::MAX] {
        let mut driver = Driver::new(4096);
        let host = driver.dial(7);
        let mut peer = Peer::accept(&mut driver, &host, 7, 4096);
        let header = Header {
            len: lie,
            ..packet(Op::ReadWrite, 7, peer.host_port)
        };
        driver.send(&header, &[]);
        driver.run();
        peer.take_all(&mut driver);
        assert!(peer.reset, "{lie}");
        assert_eq!(read_now(&host), None);
    }
}

#[test]
fn data_after_the_guests_own_shutdown_and_unknown_operations_reset_the_connection() {
    for header in [
        Header {
            op: 8,
            ..packet(Op::Reset, 7, 0)
        },
        Header {
            op: 0,
            ..packet(Op::Reset, 7, 0)
        },
        packet(Op::Request, 7, 0),
        packet(Op::Response, 7, 0),
    ] {
        let mut driver = Driver::new(4096);
        let host = driver.dial(7);
        let mut peer = Peer::accept(&mut driver, &host, 7, 4096);
        driver.send(
            &Header {
                dst_port: peer.host_port,
                ..header
            },
            &[],
        );
        driver.run();
        peer.take_all(&mut driver);
        assert!(peer.reset, "{header:?}");
    }
    let mut driver = Driver::new(4096);
    let host = driver.dial(7);
    let mut peer = Peer::accept(&mut driver, &host, 7, 4096);
    peer.say(&mut driver, Op::Shutdown, shutdown::SEND, &[]);
    peer.say(&mut driver, Op::ReadWrite, 0, b"more");
    driver.run();
    peer.take_all(&mut driver);
    assert!(peer.reset);
}

#[test]
fn a_credit_that_lies_stops_only_its_own_connection() {
    let mut driver = Driver::new(4096);
    let host = driver.dial(7);
    let mut peer = Peer::accept(&mut driver, &host, 7, 4096);
    let lie = Header {
        fwd_cnt: 12345,
        ..packet(Op::CreditUpdate, 7, peer.host_port)
    };
    driver.send(&lie, &[]);
    std::io::Write::write_all(&mut &host, b"held").unwrap();
    driver.run();
    let packets = driver.received();
    assert!(
        packets.iter().all(|(h, _)| op(h) == Some(Op::CreditRequest)),
        "{packets:?}"
    );
    peer.say(&mut driver, Op::CreditUpdate, 0, &[]);
    driver.run();
    peer.take_all(&mut driver);
    assert_eq!(peer.received, b"held");
    still_serves(&mut driver);
}

#[test]
fn hostile_descriptors_are_given_back() {
    let end = MEMORY as u64;
    let cases: [&[(u64, u32, u16, u16)]; 10] = [
        // Too short for a header; nothing at all.
        &[(0x40_0000, 43, 0, 0)],
        &[(0x40_0000, 0, 0, 0)],
        // Beyond memory, across its end, and around the end of the address space.
        &[(end, 44, 0, 0)],
        &[(end - 10, 44, 0, 0)],
        &[(u64::MAX - 10, 44, 0, 0)],
        &[(0x40_0000, 44, NEXT, 1), (u64::MAX, u32::MAX, 0, 0)],
        // Writable where readable is due.
        &[(0x40_0000, 4096, WRITE, 0)],
        // A cycle, and a next that is no index.
        &[(0x40_0000, 44, NEXT, 1), (0x40_0000, 44, NEXT, 0)],
        &[(0x40_0000, 44, NEXT, 60_000)],
        // An indirect table beyond memory.
        &[(end, 16, 4, 0)],
    ];
    for case in cases {
        let mut driver = Driver::new(4096);
        driver.send_raw(case);
        driver.run();
        assert_eq!(driver.used_tx(), 1, "{case:?}");
        // The rx queue's turn: the same, as a place to write a reset to.
        let mut driver = Driver::new(64);
        driver.reboot();
        driver.give_raw(case);
        driver.send(&packet(Op::Request, 1, 1), &[]);
        driver.run();
        driver.run();
    }
}

#[test]
fn an_impossible_ring_index_does_not_spin() {
    let mut driver = Driver::new(4096);
    driver.corrupt_avail(QUEUE_SIZE + 1);
    driver.run();
    driver.corrupt_avail(u16::MAX);
    driver.run();
    assert_eq!(driver.used_tx(), 0);
}

/// Both ends of every connection are in this process.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let limits = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limits).unwrap();
    assert!(
        maximum.is_none_or(|m| m > 4 * MAX_CONNECTIONS as u64),
        "{maximum:?} files are too few"
    );
}

#[test]
fn more_connections_than_the_limit_are_closed_at_once_and_those_given_up_make_room() {
    allow_many_files();
    let mut driver = Driver::new(4096);
    let mut hosts = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        hosts.push(driver.dial(7));
        driver.run();
        driver.received();
    }
    assert_eq!(driver.device.connections(), MAX_CONNECTIONS);
    let one_more = driver.dial(7);
    driver.run();
    assert_eq!(read_now(&one_more), None);
    // All give up; the guest, which never answered, is told.
    drop(hosts);
    for _ in 0..MAX_CONNECTIONS {
        driver.run();
        driver.received();
    }
    assert_eq!(driver.device.connections(), 0);
    still_serves(&mut driver);
}

#[test]
fn refusals_are_bounded_while_the_guest_gives_no_buffers() {
    let mut driver = Driver::new(4096);
    let mut answered = 0;
    for round in 0..2000 {
        driver.send(&packet(Op::Request, round, 1), &[]);
        driver.device.process_tx(&mut driver.tx_queue, &driver.memory);
        if round % 16 == 0 {
            driver.run();
        }
    }
    for _ in 0..100 {
        driver.run();
        answered += driver.received().len();
    }
    assert!(answered > 0 && answered <= 2000);
    still_serves(&mut driver);
}

#[test]
fn reserved_context_ids_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    for (name, cid) in [
        ("a", 0),
        ("b", 1),
        ("c", 2),
        ("d", u64::from(u32::MAX)),
        ("e", 1 << 32),
    ] {
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join(name)).unwrap();
        assert!(Vsock::new(cid, listener).is_err(), "{cid}");
    }
}

#[test]
fn the_configuration_space_holds_the_context_id_and_nothing_else() {
    let driver = Driver::new(4096);
    assert_eq!(driver.device.config(0, 8), CID.to_le_bytes());
    assert_eq!(driver.device.config(4, 8), [0; 8]);
    assert_eq!(driver.device.config(u32::MAX, 4), [0; 4]);
    assert_eq!(driver.device.config(0, u32::MAX).len(), 256);
}

fn any_header() -> impl Strategy<Value = Header> {
    (
        prop_oneof![4 => Just(CID), 1 => any::<u64>()],
        prop_oneof![4 => Just(HOST_CID), 1 => any::<u64>()],
        prop_oneof![4 => Just(7u32), 1 => any::<u32>()],
        prop_oneof![4 => Just(1u32 << 30), 1 => any::<u32>()],
        prop_oneof![2 => Just(0u32), 2 => 0u32..200, 1 => any::<u32>()],
        prop_oneof![6 => Just(STREAM), 1 => any::<u16>()],
        prop_oneof![6 => 1u16..8, 1 => any::<u16>()],
        any::<u32>(),
        (
            prop_oneof![Just(0u32), Just(BUFFER_BYTES), any::<u32>()],
            prop_oneof![Just(0u32), any::<u32>()],
        ),
    )
        .prop_map(
            |(src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, (buf_alloc, fwd_cnt))| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #[test]
    fn no_sequence_of_packets_breaks_the_device(
        packets in proptest::collection::vec((any_header(), 0usize..200, any::<bool>()), 1..60),
    ) {
        let mut driver = Driver::new(512);
        let host = driver.dial(7);
        driver.run();
        driver.received();
        for (header, payload, write) in packets {
            driver.send(&header, &vec![0; payload]);
            if write {
                // The connection may be gone by now.
                drop(std::io::Write::write(&mut &host, b"from the host"));
            }
            driver.run();
            driver.received();
            drop(read_now(&host));
        }
        assert_eq!(HEADER_BYTES, 44);
        still_serves(&mut driver);
    }

    #[test]
    fn no_descriptors_break_the_device(
        chains in proptest::collection::vec(
            proptest::collection::vec((
                prop_oneof![0u64..(1 << 25), any::<u64>()],
                prop_oneof![0u32..70_000, any::<u32>()],
                0u16..8,
                prop_oneof![0u16..8, any::<u16>()],
            ), 1..8),
            1..20,
        ),
    ) {
        let mut driver = Driver::new(512);
        for chain in chains {
            driver.send_raw(&chain);
            driver.give_raw(&chain);
            driver.run();
        }
    }
}
