//! Persistent memory.

use std::{fs::File, os::unix::fs::FileExt};

use caisson_devices::virtio::{
    VirtioDevice,
    pmem::{ALIGNMENT, Pmem, PmemConfig, PmemError},
};

use crate::machine::{DEVICE_CONFIG, Driver, Machine};

const AT: u64 = 4 << 30;

fn file(bytes: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file.write_all_at(b"contents", 0).unwrap();
    file
}

fn config(file: File, read_only: bool) -> PmemConfig {
    PmemConfig {
        file,
        address: AT,
        read_only,
    }
}

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    let config = config(file(ALIGNMENT), false);
    Box::new(Pmem::new(config, machine.slots(), machine.host()).unwrap())
}

fn works(driver: &mut Driver<'_>) {
    assert_eq!(driver.bytes(AT, 8), b"contents");
    assert_eq!(driver.request(0, &[&0u32.to_le_bytes()], &[4]), [0; 4]);
}

conforms!(make, 0, works);

#[test]
fn a_file_is_in_memory_and_writes_reach_it() {
    let machine = Machine::new();
    let (slots, disk) = (machine.slots(), file(2 * ALIGNMENT));
    let copy = disk.try_clone().unwrap();
    let device = Pmem::new(config(disk, false), slots.clone(), machine.host()).unwrap();
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    assert_eq!(
        (driver.u64(DEVICE_CONFIG), driver.u64(DEVICE_CONFIG + 8)),
        (AT, 2 * ALIGNMENT)
    );
    driver.fill(AT, b"written ");
    works_after(&mut driver, 0, 0);
    let mut now = [0; 8];
    copy.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(&now, b"written ");
    works_after(&mut driver, 1, 1);
    assert_eq!(slots.taken(), ["map 0x100000000 false"]);
    machine.root.remove(driver.address).unwrap();
    drop(driver);
    assert_eq!(slots.taken(), ["unmap 0x100000000 0x400000"]);
}

fn works_after(driver: &mut Driver<'_>, kind: u32, answer: u32) {
    assert_eq!(
        driver.request(0, &[&kind.to_le_bytes()], &[4]),
        answer.to_le_bytes()
    );
}

#[test]
fn a_read_only_file_stays_as_it_is_whatever_devices_write() {
    let machine = Machine::new();
    let (slots, disk) = (machine.slots(), file(ALIGNMENT));
    let copy = disk.try_clone().unwrap();
    let device = Pmem::new(config(disk, true), slots.clone(), machine.host()).unwrap();
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    assert_eq!(slots.taken(), ["map 0x100000000 true"]);
    driver.fill(AT, b"hostile!");
    works_after(&mut driver, 0, 0);
    let mut now = [0; 8];
    copy.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(&now, b"contents");
}

#[test]
fn files_that_do_not_fit_are_refused() {
    let machine = Machine::new();
    let make = |bytes, address| {
        let config = PmemConfig {
            address,
            ..config(file(bytes), true)
        };
        Pmem::new(config, machine.slots(), machine.host()).map(drop)
    };
    for (bytes, address) in [(ALIGNMENT + 4096, AT), (ALIGNMENT, AT + 4096)] {
        assert!(matches!(make(bytes, address), Err(PmemError::Alignment { .. })));
    }
    let slots = machine.slots();
    *slots.refuse.lock().unwrap() = true;
    let refused = Pmem::new(config(file(ALIGNMENT), true), slots.clone(), machine.host());
    assert!(matches!(refused, Err(PmemError::Place { address: AT, .. })));
    assert!(slots.taken().is_empty());
}
