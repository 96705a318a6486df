//! The block device.

use std::{
    fs::File,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
    sync::mpsc,
};

use caisson_devices::{
    ports::DeviceEvent,
    virtio::{
        VirtioDevice,
        block::{
            Block, BlockConfig, BlockHandle, DiskError, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS,
            SECTOR,
        },
        state::SaveError,
    },
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use proptest::prelude::*;

use crate::machine::{DATA, DEVICE_CONFIG, Driver, Machine, readable, writable};

const OK: u8 = 0;
const ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZERO: u32 = 13;

fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at / 512 * 7 + at % 251) as u8).collect()
}

fn block(machine: &Machine, files: Vec<File>, read_only: bool) -> (Block, BlockHandle) {
    let config = BlockConfig {
        files,
        read_only,
        serial: "caisson-0".to_owned(),
        block_bytes: 512,
    };
    Block::new(config, machine.host()).unwrap()
}

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    Box::new(block(machine, vec![file(&pattern(1 << 20))], false).0)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// The status, and what was read.
fn ask(driver: &mut Driver<'_>, kind: u32, sector: u64, out: &[u8], room: usize) -> (u8, Vec<u8>) {
    let header = header(kind, sector);
    let mut answer = if out.is_empty() {
        driver.request(0, &[&header], &[room, 1])
    } else {
        driver.request(0, &[&header, out], &[room, 1])
    };
    (answer.pop().unwrap(), answer)
}

fn works(driver: &mut Driver<'_>) {
    assert_eq!(ask(driver, WRITE, 3, &[9; 1024], 0).0, OK);
    let (status, bytes) = ask(driver, READ, 2, &[], 2048);
    assert_eq!(status, OK);
    assert_eq!(bytes[512..1536], [9; 1024]);
    assert_eq!(ask(driver, FLUSH, 0, &[], 0).0, OK);
}

conforms!(make, 0, works);

mod one_by_one {
    use super::{block, file, pattern, works};
    use crate::machine::Machine;
    use caisson_devices::virtio::VirtioDevice;

    fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
        let (device, _) = block(machine, vec![file(&pattern(1 << 20))], false);
        Box::new(device.one_by_one())
    }

    conforms!(make, 0, works);
}

#[test]
fn a_disk_says_what_it_is() {
    let machine = Machine::new();
    let (device, _) = block(&machine, vec![file(&pattern(64 << 10))], false);
    let mut driver = machine.plug(Box::new(device));
    let features = driver.start(0, 256);
    for feature in [2, 6, 9, 13, 14] {
        assert_ne!(features & 1 << feature, 0, "{feature}");
    }
    assert_eq!(features & 1 << 5, 0);
    assert_eq!(driver.u64(DEVICE_CONFIG), 128);
    assert_eq!(driver.u32(DEVICE_CONFIG + 12), 126);
    assert_eq!(driver.u32(DEVICE_CONFIG + 20), 512);
    assert_eq!(driver.u32(DEVICE_CONFIG + 36), MAX_DISCARD_SECTORS);
    let (status, serial) = ask(&mut driver, GET_ID, 0, &[], 20);
    assert_eq!(
        (status, serial.as_slice()),
        (OK, b"caisson-0\0\0\0\0\0\0\0\0\0\0\0".as_slice())
    );
    assert_eq!(ask(&mut driver, GET_ID, 0, &[], 4), (OK, b"cais".to_vec()));
}

#[test]
fn a_read_only_disk_is_not_written() {
    let machine = Machine::new();
    let content = pattern(64 << 10);
    let files = file(&content);
    let copy = files.try_clone().unwrap();
    let (device, _) = block(&machine, vec![files], true);
    let mut driver = machine.plug(Box::new(device));
    let features = driver.start(0, 256);
    assert_eq!(features & (1 << 5 | 1 << 9 | 1 << 13 | 1 << 14), 1 << 5);
    assert_eq!(ask(&mut driver, WRITE, 0, &[1; 512], 0).0, ERROR);
    let range = [&0u64.to_le_bytes()[..], &8u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(ask(&mut driver, DISCARD, 0, &range, 0).0, ERROR);
    assert_eq!(ask(&mut driver, ZERO, 0, &range, 0).0, ERROR);
    assert_eq!(ask(&mut driver, READ, 0, &[], 64 << 10), (OK, content.clone()));
    let mut now = vec![0; content.len()];
    copy.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now, content);
}

#[test]
fn requests_that_do_not_fit_fail_and_touch_nothing() {
    let machine = Machine::new();
    let files = file(&pattern(8 << 10));
    let copy = files.try_clone().unwrap();
    let (device, _) = block(&machine, vec![files], false);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    for (sector, bytes) in [
        (16, 512),
        (15, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 16 << 10),
    ] {
        assert_eq!(
            ask(&mut driver, READ, sector, &[], bytes).0,
            ERROR,
            "{sector} {bytes}"
        );
        assert_eq!(
            ask(&mut driver, WRITE, sector, &vec![1; bytes], 0).0,
            ERROR,
            "{sector} {bytes}"
        );
    }
    assert_eq!(ask(&mut driver, READ, 0, &[], 511).0, ERROR);
    assert_eq!(ask(&mut driver, WRITE, 0, &[1; 513], 0).0, ERROR);
    assert_eq!(ask(&mut driver, 99, 0, &[], 0).0, UNSUPPORTED);
    assert_eq!(ask(&mut driver, READ, 16, &[], 0).0, OK, "nothing, at the end");
    // A header that is too short, and no room for the status.
    assert_eq!(driver.request(0, &[&[0; 15]], &[512, 1]).pop(), Some(ERROR));
    driver.offer(0, 0, &[readable(DATA, 16)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (0, 0));
    let range = |sector: u64, sectors: u32, flags: u32| {
        [
            &sector.to_le_bytes()[..],
            &sectors.to_le_bytes(),
            &flags.to_le_bytes(),
        ]
        .concat()
    };
    for (kind, out, expected) in [
        (DISCARD, range(0, 17, 0), ERROR),
        (DISCARD, range(u64::MAX, 1, 0), ERROR),
        (DISCARD, range(0, MAX_DISCARD_SECTORS + 1, 0), ERROR),
        (DISCARD, range(0, 1, 1), UNSUPPORTED),
        (ZERO, range(0, MAX_ZERO_SECTORS + 1, 0), ERROR),
        (ZERO, range(0, 1, 2), UNSUPPORTED),
        (ZERO, vec![0; 15], ERROR),
        (ZERO, range(0, 0, 0).repeat(MAX_RANGES + 1), ERROR),
    ] {
        assert_eq!(ask(&mut driver, kind, 0, &out, 0).0, expected);
    }
    let mut now = vec![0; 8 << 10];
    copy.read_exact_at(&mut now, 0).unwrap();
    assert_eq!(now, pattern(8 << 10));
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeros() {
    let machine = Machine::new();
    let files = file(&[7; 1 << 20]);
    let copy = files.try_clone().unwrap();
    let (device, _) = block(&machine, vec![files], false);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    let before = copy.metadata().unwrap().blocks();
    for (kind, sector, flags) in [(DISCARD, 0u64, 0u32), (ZERO, 512, 0), (ZERO, 1024, 1)] {
        let ranges: Vec<u8> = [sector, sector + 256]
            .iter()
            .flat_map(|at| [&at.to_le_bytes()[..], &256u32.to_le_bytes(), &flags.to_le_bytes()].concat())
            .collect();
        assert_eq!(ask(&mut driver, kind, 0, &ranges, 0).0, OK);
        let (status, bytes) = ask(&mut driver, READ, sector, &[], 256 << 10);
        assert_eq!(status, OK);
        assert!(bytes.iter().all(|byte| *byte == 0), "{kind}");
    }
    let (_, rest) = ask(&mut driver, READ, 1536, &[], 256 << 10);
    assert!(rest.iter().all(|byte| *byte == 7));
    assert!(copy.metadata().unwrap().blocks() < before);
}

#[test]
fn files_behind_each_other_are_one_disk() {
    let machine = Machine::new();
    let content = pattern(64 << 10);
    let cuts = [0, 512, 4096, 4608, 40 << 10, 64 << 10];
    let files: Vec<File> = cuts
        .windows(2)
        .map(|cut| file(&content[cut[0]..cut[1]]))
        .collect();
    let copies: Vec<File> = files.iter().map(|file| file.try_clone().unwrap()).collect();
    let (device, _) = block(&machine, files, false);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    assert_eq!(driver.u64(DEVICE_CONFIG), 128);
    assert_eq!(ask(&mut driver, READ, 0, &[], 64 << 10), (OK, content.clone()));
    // Odd pieces, across all borders.
    let mut pieces = vec![readable(DATA, 16)];
    driver.fill(DATA, &header(READ, 0));
    let mut at = DATA + 0x1_0000;
    for length in [1, 510, 3, 4000, 70, 61416 - 464, 1] {
        pieces.push(writable(at, length));
        at += length as u64;
    }
    let total = (at - DATA - 0x1_0000) as usize - 1;
    assert_eq!(total % 512, 0);
    driver.offer(0, 0, &pieces);
    driver.kick(0);
    driver.wait_used(0);
    let mut bytes = driver.bytes(DATA + 0x1_0000, total + 1);
    assert_eq!(bytes.pop(), Some(OK));
    assert_eq!(bytes, content[..total]);
    assert_eq!(ask(&mut driver, WRITE, 7, &[5; 2048], 0).0, OK);
    let parts: Vec<u8> = copies
        .iter()
        .flat_map(|file| {
            let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        })
        .collect();
    assert_eq!(parts[7 * 512..7 * 512 + 2048], [5; 2048]);
    assert_eq!(
        (&parts[..7 * 512], &parts[7 * 512 + 2048..]),
        (&content[..7 * 512], &content[7 * 512 + 2048..])
    );
}

#[test]
fn a_disk_that_has_grown_tells_its_driver() {
    let machine = Machine::new();
    let files = file(&pattern(8 << 10));
    let copy = files.try_clone().unwrap();
    let (device, handle) = block(&machine, vec![files], false);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    let generation = driver.u8(0x15);
    assert_eq!(ask(&mut driver, WRITE, 16, &[1; 512], 0).0, ERROR);
    copy.set_len(16 << 10).unwrap();
    assert_eq!(handle.resized().unwrap(), 16 << 10);
    assert_ne!(driver.u8(0x15), generation);
    assert_eq!((driver.vectors.count(0), driver.u64(DEVICE_CONFIG)), (1, 32));
    assert_eq!(ask(&mut driver, WRITE, 16, &[1; 512], 0).0, OK);
    handle.resized().unwrap();
    assert_eq!(driver.vectors.count(0), 1, "nothing has changed");
    // A file that shrinks under the device is an error of the disk, and no more.
    copy.set_len(4 << 10).unwrap();
    assert_eq!(ask(&mut driver, READ, 16, &[], 512).0, ERROR);
}

#[test]
fn files_that_are_no_disk_are_refused() {
    let machine = Machine::new();
    let try_files = |files| {
        Block::new(
            BlockConfig {
                files,
                read_only: false,
                serial: String::new(),
                block_bytes: 4096,
            },
            machine.host(),
        )
        .map(drop)
    };
    assert!(matches!(try_files(vec![]), Err(DiskError::Files { count: 0 })));
    assert!(matches!(
        try_files(vec![file(&[0; 512]), file(&[0; 100])]),
        Err(DiskError::Sectors { index: 1, bytes: 100 })
    ));
}

/// A file system of 256 KiB that only this thread's files see; nothing, said aloud, where mounts are not allowed.
fn small_file_system(at: &Path) -> bool {
    let none: Option<&str> = None;
    let mounted = unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none))
        .and_then(|()| mount(none, at, Some("tmpfs"), MsFlags::empty(), Some("size=256k")));
    if let Err(e) = mounted {
        eprintln!("skipped: cannot mount a small file system: {e}");
        return false;
    }
    true
}

#[test]
fn writes_wait_while_the_host_has_no_space_and_reads_do_not() {
    full_disk(true);
}

#[test]
fn without_io_uring_writes_wait_as_well() {
    full_disk(false);
}

fn full_disk(asynchronous: bool) {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_owned();
    let (files, opened) = mpsc::channel();
    // On a thread of its own, because of the mount; files stay good after it.
    std::thread::spawn(move || {
        if small_file_system(&at) {
            let disk = File::create_new(at.join("disk")).unwrap();
            disk.set_len(1 << 20).unwrap();
            let ballast = File::create_new(at.join("ballast")).unwrap();
            ballast.write_all_at(&vec![1; 192 << 10], 0).unwrap();
            let disk = File::options()
                .read(true)
                .write(true)
                .open(at.join("disk"))
                .unwrap();
            files.send((disk, ballast)).unwrap();
        }
    });
    let Ok((disk, ballast)) = opened.recv() else {
        return;
    };
    let machine = Machine::new();
    let (device, _) = block(&machine, vec![disk], false);
    let device = if asynchronous { device } else { device.one_by_one() };
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    assert_eq!(ask(&mut driver, WRITE, 0, &[3; 4096], 0).0, OK);
    // Two writes of 96 KiB, of which the second does not fit; a small one behind them.
    let events = || machine.board.events.lock().unwrap().clone();
    for (head, sector, bytes) in [(0u16, 8u64, 96 << 10), (10, 256, 4096)] {
        let at = DATA + 0x10_0000 * u64::from(head + 1);
        driver.fill(at, &header(WRITE, sector));
        driver.fill(at + 0x1000, &vec![4; bytes]);
        driver.fill(at + 0x800, &[0xee]);
        driver.offer(
            0,
            head,
            &[
                readable(at, 16),
                readable(at + 0x1000, bytes),
                writable(at + 0x800, 1),
            ],
        );
    }
    driver.kick(0);
    let vectors = driver.vectors.clone();
    let full = [DeviceEvent::DiskFull {
        disk: "caisson-0".to_owned(),
    }];
    vectors.wait_until("the event", || events() == full);
    // Reads go on.
    driver.fill(DATA, &header(READ, 0));
    driver.offer(
        0,
        20,
        &[
            readable(DATA, 16),
            writable(DATA + 0x1000, 4096),
            writable(DATA + 0x3000, 1),
        ],
    );
    driver.kick(0);
    assert_eq!(driver.wait_used(0), (20, 4097));
    assert_eq!(driver.bytes(DATA + 0x1000, 4096), [3; 4096]);
    assert_eq!(driver.used(0), None);
    // What waits goes on waiting after a pause, and cannot be kept meanwhile.
    driver.function.suspend();
    let refused = driver.function.state().unwrap_err();
    assert!(
        matches!(&refused, SaveError::Waiting(disk) if disk == "caisson-0"),
        "{refused}"
    );
    driver.function.resume();
    // There is space again: both finish, in order.
    ballast.set_len(0).unwrap();
    assert_eq!(driver.wait_used(0), (0, 1));
    assert_eq!(driver.wait_used(0), (10, 1));
    assert_eq!(driver.bytes(DATA + 0x10_0800, 1), [OK]);
    vectors.wait_until("the event", || events().len() == 2);
    let (status, bytes) = ask(&mut driver, READ, 8, &[], 96 << 10);
    assert!(status == OK && bytes.iter().all(|byte| *byte == 4));
    // Again, and the driver gives up: nothing of it is left.
    ballast.write_all_at(&[1; 64 << 10], 0).unwrap();
    driver.fill(DATA, &header(WRITE, 512));
    driver.offer(
        0,
        0,
        &[
            readable(DATA, 16),
            readable(DATA, 256 << 10),
            writable(DATA + 0x80_0000, 1),
        ],
    );
    driver.kick(0);
    vectors.wait_until("the event", || events().len() == 3);
    driver.start(0, 256);
    assert_eq!(events().len(), 4, "nothing waits any more");
    assert_eq!(ask(&mut driver, READ, 0, &[], 512).0, OK);
}

#[test]
fn many_requests_at_once_are_all_answered() {
    let machine = Machine::new();
    let content = pattern(1 << 20);
    let (device, _) = block(&machine, vec![file(&content)], false);
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    for round in 0..40u64 {
        for index in 0..40u16 {
            let at = DATA + 0x4000 * u64::from(index);
            let sector = (u64::from(index) * 16 + round * 7) % 2000;
            driver.fill(at, &header(READ, sector));
            driver.offer(
                0,
                index * 3,
                &[
                    readable(at, 16),
                    writable(at + 0x1000, 4096),
                    writable(at + 0x3000, 1),
                ],
            );
        }
        driver.kick(0);
        for _ in 0..40 {
            let (head, length) = driver.wait_used(0);
            let index = u64::from(head / 3);
            let from = ((index * 16 + round * 7) % 2000 * SECTOR) as usize;
            assert_eq!(length, 4097);
            assert_eq!(
                driver.bytes(DATA + 0x4000 * index + 0x1000, 4096),
                content[from..from + 4096]
            );
        }
    }
    // And the driver may leave in the middle of it.
    for index in 0..40u16 {
        let at = DATA + 0x4000 * u64::from(index);
        driver.offer(
            0,
            index * 3,
            &[
                readable(at, 16),
                writable(at + 0x1000, 4096),
                writable(at + 0x3000, 1),
            ],
        );
    }
    driver.kick(0);
    driver.start(0, 256);
    works(&mut driver);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn a_disk_of_any_files_behaves_like_its_bytes(
        asynchronous in any::<bool>(),
        sizes in prop::collection::vec(0usize..9, 1..6),
        steps in prop::collection::vec((any::<bool>(), 0u64..40, 1usize..12, any::<u8>()), 1..20),
    ) {
        let machine = Machine::new();
        let mut model: Vec<u8> = Vec::new();
        let files = sizes.iter().map(|sectors| {
            let bytes = pattern(sectors * 512);
            model.extend(&bytes);
            file(&bytes)
        }).collect();
        let (device, _) = block(&machine, files, false);
        let mut driver = machine.plug(Box::new(if asynchronous { device } else { device.one_by_one() }));
        driver.start(0, 256);
        for (write, sector, sectors, fill) in steps {
            let (from, bytes) = ((sector * SECTOR) as usize, sectors * 512);
            let fits = from + bytes <= model.len();
            let (status, read) = if write {
                ask(&mut driver, WRITE, sector, &vec![fill; bytes], 0)
            } else {
                ask(&mut driver, READ, sector, &[], bytes)
            };
            prop_assert_eq!(status, if fits { OK } else { ERROR });
            if fits && write {
                model[from..from + bytes].fill(fill);
            } else if fits {
                prop_assert_eq!(&read, &model[from..from + bytes]);
            }
        }
    }
}
