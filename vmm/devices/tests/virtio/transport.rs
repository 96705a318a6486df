//! The registers of virtio over PCI, under drivers that leave the order of things.

use caisson_devices::virtio::{VirtioDevice, rng::Rng};
use proptest::prelude::*;

use crate::machine::{DATA, DRIVER_OK, FEATURES_OK, Machine, NOTIFY, TABLE, VERSION_1, WINDOW, writable};

fn device(machine: &Machine) -> Box<dyn VirtioDevice> {
    Box::new(Rng::new(machine.host()))
}

#[test]
fn a_function_says_who_it_is() {
    let machine = Machine::new();
    let driver = machine.plug(device(&machine));
    assert_eq!(machine.config_u32(driver.address, 0), 0x1044_1af4);
    assert_eq!(
        machine.config_u32(driver.address, 8) & 0xff,
        1,
        "not transitional"
    );
    assert_eq!(driver.u16(0x12), 1, "one queue");
    assert_eq!(driver.u16(0x10), 0xffff, "no vector");
    assert_eq!(driver.offered() >> 28, 0b10011, "ring features and version 1");
}

#[test]
fn features_are_accepted_only_as_offered_and_with_version_1() {
    let machine = Machine::new();
    let mut driver = machine.plug(device(&machine));
    let offered = driver.offered();
    for wrong in [0, offered & !VERSION_1, offered | 1 << 63, offered | 1] {
        driver.reset();
        driver.set_status(3);
        driver.accept(wrong);
        driver.set_status(3 | FEATURES_OK);
        assert_eq!(driver.status(), 3, "{wrong:#x}");
        driver.set_status(7);
        assert_eq!(driver.status(), 3, "not without features");
        driver.set_status(15);
        assert_eq!(driver.status(), 3, "nor all at once");
    }
    driver.reset();
    driver.set_status(3);
    driver.accept(VERSION_1);
    driver.set_status(3 | FEATURES_OK);
    assert_eq!(driver.status(), 11);
    driver.accept(0);
    driver.write(8, &1u32.to_le_bytes());
    assert_eq!(driver.u32(12), 1, "too late to change one's mind");
}

#[test]
fn registers_keep_their_value_once_the_device_works() {
    let machine = Machine::new();
    let mut driver = machine.plug(device(&machine));
    driver.start(0, 8);
    driver.write(0x16, &0u16.to_le_bytes());
    let before = (
        driver.u16(0x18),
        driver.u64(0x20),
        driver.u64(0x28),
        driver.u64(0x30),
    );
    driver.write(0x18, &4u16.to_le_bytes());
    for register in [0x20, 0x28, 0x30] {
        driver.write(register, &0x1234_0000u64.to_le_bytes());
    }
    driver.write(0x1c, &0u16.to_le_bytes());
    assert_eq!(driver.u16(0x1c), 1);
    let after = (
        driver.u16(0x18),
        driver.u64(0x20),
        driver.u64(0x28),
        driver.u64(0x30),
    );
    assert_eq!(after, before);
    driver.set_status(3);
    assert_eq!(driver.status(), 15, "bits are not taken back");
    driver.write(0x16, &7u16.to_le_bytes());
    assert_eq!(driver.u16(0x18), 0, "a queue that does not exist");
    assert_eq!(driver.request(0, &[], &[32]).len(), 32);
}

#[test]
fn queue_sizes_are_powers_of_two_up_to_the_greatest() {
    let machine = Machine::new();
    let driver = machine.plug(device(&machine));
    driver.set_status(3);
    driver.accept(VERSION_1);
    driver.set_status(11);
    assert_eq!(driver.u16(0x18), 16);
    for wrong in [0u16, 3, 17, 32, 0xffff] {
        driver.write(0x18, &wrong.to_le_bytes());
        assert_eq!(driver.u16(0x18), 16);
    }
    driver.write(0x18, &2u16.to_le_bytes());
    assert_eq!(driver.u16(0x18), 2);
}

#[test]
fn doorbells_follow_the_bar_and_kicks_reach_the_device_in_any_case() {
    let machine = Machine::new();
    let mut driver = machine.plug(device(&machine));
    driver.start(0, 8);
    let bells = || -> Vec<u64> {
        let doorbells = machine.board.doorbells.lock().unwrap();
        doorbells.iter().map(|(at, _)| *at).collect()
    };
    assert_eq!(bells(), [driver.bar + NOTIFY]);
    // As Linux moves a BAR: decoding off, both halves, decoding on.
    machine.set_config(driver.address, 4, &[4]);
    assert!(bells().is_empty());
    let elsewhere = WINDOW + 0x10_0000;
    machine.set_config(driver.address, 0x10, &(elsewhere as u32).to_le_bytes());
    machine.set_config(driver.address, 0x14, &((elsewhere >> 32) as u32).to_le_bytes());
    machine.set_config(driver.address, 4, &[6]);
    driver.bar = elsewhere;
    assert_eq!(bells(), [elsewhere + NOTIFY]);
    assert_eq!(driver.request(0, &[], &[32]).len(), 32);
    // By an exit.
    driver.offer(0, 0, &[writable(DATA, 8)]);
    driver.write(NOTIFY, &0u16.to_le_bytes());
    assert_eq!(driver.wait_used(0), (0, 8));
    driver.write(NOTIFY + 4, &1u16.to_le_bytes());
    driver.write(NOTIFY + 0xffc, &1u16.to_le_bytes());
    driver.reset();
    assert!(bells().is_empty());
}

#[test]
fn an_interrupt_waits_until_its_vector_is_unmasked() {
    let machine = Machine::new();
    let mut driver = machine.plug(device(&machine));
    driver.start(0, 8);
    driver.write(TABLE + 16 + 12, &1u32.to_le_bytes());
    driver.offer(0, 0, &[writable(DATA, 8)]);
    driver.kick(0);
    driver.wait_used(0);
    driver
        .vectors
        .wait_until("the pending bit", || driver.u8(0x5000) == 2);
    assert_eq!(driver.vectors.count(1), 0);
    driver.write(TABLE + 16 + 12, &0u32.to_le_bytes());
    assert_eq!((driver.vectors.count(1), driver.u8(0x5000)), (1, 0));
}

#[test]
fn a_vector_that_does_not_exist_is_none() {
    let machine = Machine::new();
    let driver = machine.plug(device(&machine));
    for (register, vector, taken) in [
        (0x10, 1u16, 1),
        (0x10, 2, 0xffff),
        (0x1a, 1, 1),
        (0x1a, 0x100, 0xffff),
    ] {
        driver.write(register, &vector.to_le_bytes());
        assert_eq!(driver.u16(register), taken);
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_same_registers() {
    let machine = Machine::new();
    let driver = machine.plug(device(&machine));
    // The last capability is the window.
    let mut at = u64::from(machine.config_u32(driver.address, 0x34) & 0xff);
    while machine.config_u32(driver.address, at).to_le_bytes()[3] != 5 {
        at = u64::from(machine.config_u32(driver.address, at).to_le_bytes()[1]);
    }
    machine.set_config(driver.address, at + 4, &[0]);
    machine.set_config(driver.address, at + 8, &0x12u32.to_le_bytes());
    machine.set_config(driver.address, at + 12, &2u32.to_le_bytes());
    let mut queues = [0; 2];
    machine.config(driver.address, at + 16, &mut queues);
    assert_eq!(u16::from_le_bytes(queues), 1);
    machine.set_config(driver.address, at + 8, &0x14u32.to_le_bytes());
    machine.set_config(driver.address, at + 12, &1u32.to_le_bytes());
    machine.set_config(driver.address, at + 16, &[1]);
    assert_eq!(driver.status(), 1);
}

#[test]
fn without_event_indices_interrupts_come_until_the_driver_asks_for_none() {
    let machine = Machine::new();
    let mut driver = machine.plug(device(&machine));
    driver.start(1 << 29, 8);
    driver.request(0, &[], &[8]);
    let vectors = driver.vectors.clone();
    vectors.wait_until("the interrupt", || vectors.count(1) == 1);
    let flags = driver.ring(0).avail;
    driver.fill(flags, &1u16.to_le_bytes());
    driver.request(0, &[], &[8]);
    driver.reset();
    assert_eq!(driver.vectors.count(1), 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_a_driver_writes_a_reset_makes_it_good(
        writes in prop::collection::vec((0u64..0x7ff0, prop::collection::vec(any::<u8>(), 1..9)), 0..60),
        common in prop::collection::vec((0u64..0x40, prop::collection::vec(any::<u8>(), 1..9)), 0..60),
        config in prop::collection::vec((0x40u64..0x100, prop::collection::vec(any::<u8>(), 1..5)), 0..20),
    ) {
        let machine = Machine::new();
        let mut driver = machine.plug(device(&machine));
        driver.start(0, 8);
        for (offset, bytes) in writes.iter().chain(&common) {
            driver.write(*offset, bytes);
            let mut back = vec![0; bytes.len()];
            driver.read(*offset, &mut back);
        }
        for (offset, bytes) in &config {
            machine.set_config(driver.address, *offset, bytes);
        }
        // Vector 0 may have been masked by then.
        driver.start(0, 8);
        prop_assert_eq!(driver.status(), 11 | DRIVER_OK);
        prop_assert_eq!(driver.request(0, &[], &[32]).len(), 32);
    }
}
