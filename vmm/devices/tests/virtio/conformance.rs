//! What every device must withstand, whatever it is. `conforms!` makes the tests for one: it takes how to make the device, the queue
//! whose requests it answers, a check that it still works, on a device that has just been started, and perhaps what must hold for there to
//! be such a device.

use crate::machine::{DEVICE_CONFIG, DRIVER_OK, Driver, MEMORY, Machine, NEEDS_RESET, NEXT, Piece, WRITE};

/// Makes the tests for a device.
#[macro_export]
macro_rules! conforms {
    ($make:expr, $queue:expr, $works:expr) => {
        conforms!($make, $queue, $works, || true);
    };
    // With a condition that must hold on the test's thread, else the test is skipped.
    ($make:expr, $queue:expr, $works:expr, $condition:expr) => {
        mod conforms {
            use super::*;
            use $crate::conformance;

            #[test]
            fn reset_twice_and_started_again_it_works() {
                if !($condition)() {
                    return;
                }
                conformance::restarts(|machine| $make(machine), |driver| $works(driver));
            }

            #[test]
            fn a_queue_of_size_one_works() {
                if !($condition)() {
                    return;
                }
                conformance::smallest_queue(|machine| $make(machine));
            }

            #[test]
            fn nonsense_in_a_queue_is_given_back_and_harms_nobody() {
                if !($condition)() {
                    return;
                }
                conformance::nonsense(|machine| $make(machine), $queue, |driver| $works(driver));
            }

            #[test]
            fn an_index_that_makes_no_sense_stops_the_queue_until_a_reset() {
                if !($condition)() {
                    return;
                }
                conformance::runaway_index(|machine| $make(machine), $queue, |driver| $works(driver));
            }

            #[test]
            fn configuration_space_takes_any_access() {
                if !($condition)() {
                    return;
                }
                conformance::odd_configuration(|machine| $make(machine), |driver| $works(driver));
            }

            #[test]
            fn queues_outside_of_memory_are_none() {
                if !($condition)() {
                    return;
                }
                conformance::lost_queues(|machine| $make(machine), |driver| $works(driver));
            }

            #[test]
            fn suspended_and_resumed_it_goes_on_where_it_was() {
                if !($condition)() {
                    return;
                }
                conformance::suspends(|machine| $make(machine), |driver| $works(driver));
            }

            #[test]
            fn kept_and_restored_in_another_machine_it_goes_on_where_it_was() {
                if !($condition)() {
                    return;
                }
                conformance::moves(|machine| $make(machine), |driver| $works(driver));
            }

            #[test]
            fn it_leaves_the_bus_while_it_works() {
                if !($condition)() {
                    return;
                }
                conformance::leaves(|machine| $make(machine));
            }
        }
    };
}

type Device = Box<dyn caisson_devices::virtio::VirtioDevice>;

fn is_well(driver: &Driver<'_>) {
    assert_eq!(driver.status() & (DRIVER_OK | NEEDS_RESET), DRIVER_OK);
    assert!(driver.machine.board.events.lock().unwrap().is_empty());
}

pub(crate) fn restarts(make: impl Fn(&Machine) -> Device, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.reset();
    for _ in 0..2 {
        driver.start(0, 256);
        works(&mut driver);
        is_well(&driver);
        driver.reset();
        driver.reset();
        assert!(machine.board.doorbells.lock().unwrap().is_empty());
    }
    // Started and reset before anything happened.
    driver.start(0, 256);
    driver.start(0, 256);
    works(&mut driver);
}

pub(crate) fn smallest_queue(make: impl Fn(&Machine) -> Device) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 1);
    for queue in 0..driver.u16(0x12) {
        driver.write(0x16, &queue.to_le_bytes());
        assert_eq!(driver.u16(0x18), 1);
        driver.offer(queue, 0, &[]);
        driver.kick(queue);
    }
    is_well(&driver);
    driver.reset();
}

/// Descriptors in pairs: flags of each, and where they point.
fn nonsense_pieces() -> Vec<(&'static str, Vec<(Piece, u16)>)> {
    let piece = |at, len, flags| Piece { at, len, flags };
    let inside = crate::machine::DATA;
    vec![
        ("a loop of one", vec![(piece(inside, 16, NEXT), 0)]),
        (
            "a loop of two",
            vec![(piece(inside, 16, NEXT), 1), (piece(inside, 16, NEXT), 0)],
        ),
        (
            "a buffer outside of memory",
            vec![(piece(MEMORY as u64, 64, WRITE), 0)],
        ),
        (
            "a buffer across the end of memory",
            vec![(piece(MEMORY as u64 - 8, 64, 0), 0)],
        ),
        (
            "a buffer at the end of addresses",
            vec![(piece(u64::MAX - 7, 64, WRITE), 0)],
        ),
        ("a buffer of all lengths", vec![(piece(0, u32::MAX, 0), 0)]),
        ("an empty readable buffer", vec![(piece(inside, 0, 0), 0)]),
        ("an empty writable buffer", vec![(piece(inside, 0, WRITE), 0)]),
        ("a single readable byte", vec![(piece(inside, 1, 0), 0)]),
        ("a single writable byte", vec![(piece(inside, 1, WRITE), 0)]),
        (
            "a next descriptor that is not there",
            vec![(piece(inside, 16, NEXT), 0x7fff)],
        ),
        (
            "readable after writable",
            vec![(piece(inside, 16, WRITE | NEXT), 1), (piece(inside, 16, 0), 0)],
        ),
        (
            "an indirect table outside of memory",
            vec![(piece(u64::MAX - 64, 64, 4), 0)],
        ),
        ("an indirect table that is none", vec![(piece(inside, 17, 4), 0)]),
        ("an empty indirect table", vec![(piece(inside, 0, 4), 0)]),
        (
            "an indirect table with a next",
            vec![(piece(inside, 32, 4 | NEXT), 1)],
        ),
    ]
}

pub(crate) fn nonsense(make: impl Fn(&Machine) -> Device, queue: u16, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    offer_nonsense(&mut driver, queue);
    driver.start(0, 256);
    works(&mut driver);
}

/// All of it, one after the other; each is to be given back.
pub(crate) fn offer_nonsense(driver: &mut Driver<'_>, queue: u16) {
    for (what, pieces) in nonsense_pieces() {
        for (index, (piece, next)) in (0..).zip(&pieces) {
            driver.describe(queue, index, *piece, *next);
        }
        driver.make_available(queue, 0);
        driver.kick(queue);
        let (head, length) = driver.wait_used(queue);
        assert_eq!(head, 0, "{what}");
        let room = pieces.iter().filter(|(piece, _)| piece.flags & WRITE != 0);
        let room: u64 = room.map(|(piece, _)| u64::from(piece.len)).sum();
        assert!(u64::from(length) <= room, "{what}: {length} bytes used of {room}");
        is_well(driver);
    }
}

pub(crate) fn runaway_index(make: impl Fn(&Machine) -> Device, queue: u16, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    let ring = *driver.ring(queue);
    driver.fill(ring.avail + 2, &0x7fff_u16.to_le_bytes());
    driver.kick(queue);
    is_well(&driver);
    // Heads that are no descriptors.
    driver.start(0, 256);
    let ring = *driver.ring(queue);
    for slot in 0..u64::from(ring.size) {
        driver.fill(ring.avail + 4 + 2 * slot, &0xffff_u16.to_le_bytes());
    }
    driver.fill(ring.avail + 2, &ring.size.to_le_bytes());
    driver.kick(queue);
    is_well(&driver);
    driver.start(0, 256);
    works(&mut driver);
    is_well(&driver);
}

pub(crate) fn odd_configuration(make: impl Fn(&Machine) -> Device, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    let mut whole = vec![0; 4096];
    for (at, byte) in (0..).zip(&mut whole) {
        driver.read(DEVICE_CONFIG + at, std::slice::from_mut(byte));
    }
    for at in (0..96).chain(4080..4096) {
        for length in 1..=16.min(4096 - at) {
            let mut bytes = vec![0xee; length];
            driver.read(DEVICE_CONFIG + at as u64, &mut bytes);
            assert_eq!(bytes, whole[at..at + length], "{length} bytes at {at}");
        }
    }
    let mut beyond = [0xee; 16];
    driver.read(0x2ff8, &mut beyond);
    assert_eq!(beyond, [0; 16]);
    for at in (0..96).chain(4080..4096) {
        for length in [1, 2, 3, 4, 7, 8, 16] {
            driver.write(DEVICE_CONFIG + at, &vec![0xff; length]);
        }
    }
    is_well(&driver);
    driver.start(0, 256);
    works(&mut driver);
}

pub(crate) fn lost_queues(make: impl Fn(&Machine) -> Device, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.reset();
    driver.set_status(3);
    driver.accept(driver.offered());
    driver.set_status(11);
    for queue in 0..driver.u16(0x12) {
        driver.write(0x16, &queue.to_le_bytes());
        for register in [0x20, 0x28, 0x30] {
            driver.write(register, &(MEMORY as u64 - 64).to_le_bytes());
        }
        driver.write(0x1c, &1u16.to_le_bytes());
        assert_eq!(driver.u16(0x1c), 1);
    }
    driver.set_status(15);
    for queue in 0..driver.u16(0x12) {
        driver.kick(queue);
    }
    is_well(&driver);
    driver.start(0, 256);
    works(&mut driver);
}

pub(crate) fn suspends(make: impl Fn(&Machine) -> Device, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    // Before a driver was there it has a state as well.
    driver.function.suspend();
    assert_eq!(driver.function.state().unwrap().transport.status, 0);
    driver.function.resume();
    driver.start(0, 256);
    for _ in 0..2 {
        // Means nothing while it works.
        driver.function.resume();
        works(&mut driver);
        assert!(driver.function.state().is_err(), "a device at work has no state");
        driver.function.suspend();
        driver.function.suspend();
        driver.function.resume();
        is_well(&driver);
    }
    works(&mut driver);
    // A driver that begins anew finds a new device.
    driver.function.suspend();
    driver.start(0, 256);
    works(&mut driver);
    is_well(&driver);
}

pub(crate) fn moves(make: impl Fn(&Machine) -> Device, works: impl Fn(&mut Driver<'_>)) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    works(&mut driver);
    driver.function.suspend();
    let state = driver.function.state().unwrap();
    let json = serde_json::to_string(&state).unwrap();
    let (memory, memories) = (driver.bytes(0, MEMORY), driver.memories());
    // What the host has is the next one's.
    drop(driver);
    drop(machine);

    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.fill(0, &memory);
    driver.remember(memories);
    let mut other = state.clone();
    other.config[0] ^= 1;
    assert!(driver.function.restore(&other).is_err(), "of another function");
    other = state.clone();
    other.transport.queues.pop();
    assert!(driver.function.restore(&other).is_err(), "with other queues");
    other = state.clone();
    other.vectors.pop();
    assert!(driver.function.restore(&other).is_err(), "with other vectors");
    driver
        .function
        .restore(&serde_json::from_str(&json).unwrap())
        .unwrap();
    machine.root.restored(driver.address);
    assert_eq!(driver.function.state().unwrap(), state);
    assert!(driver.function.restore(&state).is_err(), "it is not new any more");
    driver.function.resume();
    works(&mut driver);
    is_well(&driver);
    driver.start(0, 256);
    works(&mut driver);
}

pub(crate) fn leaves(make: impl Fn(&Machine) -> Device) {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    assert!(!machine.board.doorbells.lock().unwrap().is_empty());
    machine.root.remove(driver.address).unwrap();
    assert!(machine.board.doorbells.lock().unwrap().is_empty());
    assert_eq!(machine.config_u32(driver.address, 0), u32::MAX);
    assert!(!machine.mmio.read(driver.bar, &mut [0; 4]));
}
