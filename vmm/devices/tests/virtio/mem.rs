//! The memory device.

use std::sync::Arc;

use caisson_devices::virtio::{
    VirtioDevice,
    mem::{Layout, Mem, MemError, MemHandle},
    state::DeviceState,
};

use crate::machine::{DEVICE_CONFIG, Driver, Machine, Slots};

const BLOCK: u64 = 2 << 20;
const LAYOUT: Layout = Layout {
    address: 4 << 30,
    region: 64 << 20,
    block: BLOCK,
    chunk: 8 << 20,
};
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

fn mem(machine: &Machine) -> (Mem, MemHandle, Arc<Slots>) {
    let slots = machine.slots();
    let (device, handle) = Mem::new(LAYOUT, slots.clone(), machine.host()).unwrap();
    (device, handle, slots)
}

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    Box::new(mem(machine).0)
}

/// Answer and state.
fn ask(driver: &mut Driver<'_>, kind: u16, block: u64, count: u16) -> (u16, u16) {
    let mut request = [0; 24];
    request[..2].copy_from_slice(&kind.to_le_bytes());
    request[8..16].copy_from_slice(&(LAYOUT.address.wrapping_add(block.wrapping_mul(BLOCK))).to_le_bytes());
    request[16..18].copy_from_slice(&count.to_le_bytes());
    let answer = driver.request(0, &[&request], &[10]);
    let number = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
    (number(0), number(8))
}

fn works(driver: &mut Driver<'_>) {
    assert_eq!(ask(driver, STATE, 3, 2), (ACK, 1));
    assert_eq!(ask(driver, PLUG, 0, 1), (NACK, 0), "nothing was asked for");
    assert_eq!(ask(driver, UNPLUG_ALL, 0, 0), (ACK, 0));
}

conforms!(make, 0, works);

#[test]
fn a_guest_plugs_what_it_was_asked_for_and_memory_comes_in_chunks() {
    let machine = Machine::new();
    let (device, handle, slots) = mem(&machine);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    let config = |driver: &Driver<'_>| [0, 16, 24, 32, 40, 48].map(|at| driver.u64(DEVICE_CONFIG + at));
    assert_eq!(
        config(&driver),
        [BLOCK, LAYOUT.address, LAYOUT.region, LAYOUT.region, 0, 0]
    );
    handle.request(12 << 20).unwrap();
    assert_eq!((driver.vectors.count(0), config(&driver)[5]), (1, 12 << 20));
    assert_eq!(ask(&mut driver, PLUG, 3, 2), (ACK, 0));
    assert_eq!(
        slots.taken(),
        ["add 0x100000000 0x800000", "add 0x100800000 0x800000"]
    );
    assert_eq!(ask(&mut driver, PLUG, 1, 1), (ACK, 0));
    assert!(slots.taken().is_empty());
    for (block, count, answer) in [
        (0, 4, ERROR),
        (0, 1, ACK),
        (5, 3, NACK),
        (31, 2, ERROR),
        (5, 2, ACK),
        (7, 1, NACK),
    ] {
        assert_eq!(ask(&mut driver, PLUG, block, count).0, answer, "{block} {count}");
    }
    assert_eq!((handle.plugged(), config(&driver)[4]), (12 << 20, 12 << 20));
    // Blocks 0, 1, 3, 4, 5, 6 are plugged.
    assert_eq!(ask(&mut driver, STATE, 0, 2), (ACK, 0));
    assert_eq!(ask(&mut driver, STATE, 2, 1), (ACK, 1));
    assert_eq!(ask(&mut driver, STATE, 1, 3), (ACK, 2));
    // What was unplugged is forgotten, what was not is not.
    let at = |block: u64| LAYOUT.address + block * BLOCK;
    driver.fill(at(3), &[5; 8]);
    driver.fill(at(1), &[6; 8]);
    assert_eq!(ask(&mut driver, UNPLUG, 3, 3), (ACK, 0));
    assert!(slots.taken().is_empty(), "block 6 is in the second chunk");
    assert_eq!(
        (driver.bytes(at(3), 8), driver.bytes(at(1), 8)),
        (vec![0; 8], vec![6; 8])
    );
    assert_eq!(ask(&mut driver, UNPLUG, 6, 2).0, ERROR);
    assert_eq!(ask(&mut driver, UNPLUG, 6, 1), (ACK, 0));
    assert_eq!(slots.taken(), ["unmap 0x100800000 0x800000"]);
    handle.request(0).unwrap();
    // The driver starts anew: memory stays until it says otherwise.
    driver.start(0, 256);
    assert_eq!(handle.plugged(), 4 << 20);
    assert_eq!(ask(&mut driver, UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(slots.taken(), ["unmap 0x100000000 0x800000"]);
    assert_eq!(handle.plugged(), 0);
}

#[test]
fn a_host_without_memory_makes_the_guest_wait() {
    let machine = Machine::new();
    let (device, handle, slots) = mem(&machine);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    handle.request(16 << 20).unwrap();
    *slots.refuse.lock().unwrap() = true;
    assert_eq!(ask(&mut driver, PLUG, 0, 8), (BUSY, 0));
    assert_eq!(handle.plugged(), 0);
    assert_eq!(ask(&mut driver, PLUG, 0, 8), (ACK, 0));
    assert_eq!(slots.taken().len(), 2);
}

#[test]
fn requests_that_make_no_sense_are_errors() {
    let machine = Machine::new();
    let (device, handle, slots) = mem(&machine);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    handle.request(LAYOUT.region).unwrap();
    for (kind, block, count) in [
        (PLUG, 0, 0),
        (PLUG, 0, 33),
        (PLUG, u64::MAX, 1),
        (PLUG, u64::MAX / 2, 0xffff),
        (UNPLUG, 0, 1),
        (STATE, 32, 1),
        (4, 0, 1),
        (0xffff, 0, 1),
    ] {
        assert_eq!(
            ask(&mut driver, kind, block, count).0,
            ERROR,
            "{kind} {block} {count}"
        );
    }
    assert_eq!(driver.request(0, &[&[0; 23]], &[10])[..2], ERROR.to_le_bytes());
    assert!(slots.taken().is_empty());
    for bytes in [1, BLOCK + 1, LAYOUT.region + BLOCK] {
        assert!(matches!(handle.request(bytes), Err(MemError::Size { .. })));
    }
    let wrong = Layout { block: 3, ..LAYOUT };
    assert!(matches!(
        Mem::new(wrong, machine.slots(), machine.host()),
        Err(MemError::Layout(_))
    ));
}

#[test]
fn what_was_plugged_is_plugged_in_the_machine_that_comes_after() {
    let machine = Machine::new();
    let (device, handle, _) = mem(&machine);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    handle.request(12 << 20).unwrap();
    assert_eq!(ask(&mut driver, PLUG, 3, 2), (ACK, 0));
    assert_eq!(ask(&mut driver, PLUG, 31, 1), (ACK, 0));
    driver.function.suspend();
    let state = driver.function.state().unwrap();
    let plugged = vec![
        (LAYOUT.address + 3 * BLOCK, 2 * BLOCK),
        (LAYOUT.address + 31 * BLOCK, BLOCK),
    ];
    let expected = DeviceState::Mem {
        requested: 12 << 20,
        plugged,
    };
    assert_eq!(state.device, expected);

    let next = Machine::new();
    let (device, handle, slots) = mem(&next);
    let driver = next.plug(Box::new(device));
    for wrong in [
        vec![(LAYOUT.address, BLOCK + 1)],
        vec![(LAYOUT.address - BLOCK, BLOCK)],
        vec![(LAYOUT.address, LAYOUT.region + BLOCK)],
        vec![(LAYOUT.address, 0)],
        vec![(LAYOUT.address, BLOCK), (LAYOUT.address, BLOCK)],
    ] {
        let mut other = state.clone();
        other.device = DeviceState::Mem {
            requested: 0,
            plugged: wrong,
        };
        assert!(driver.function.restore(&other).is_err(), "{other:?}");
    }
    *slots.refuse.lock().unwrap() = true;
    assert!(driver.function.restore(&state).is_err());
    assert_eq!((handle.plugged(), slots.taken().len()), (0, 0));
    driver.function.restore(&state).unwrap();
    assert_eq!(
        slots.taken(),
        [
            "add 0x100000000 0x800000",
            "add 0x100800000 0x800000",
            "add 0x103800000 0x800000"
        ]
    );
    assert_eq!((handle.plugged(), handle.requested()), (3 * BLOCK, 12 << 20));
}
