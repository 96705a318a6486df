//! The balloon.

use caisson_devices::virtio::{VirtioDevice, balloon::Balloon};
use proptest::prelude::*;

use crate::machine::{DATA, DEVICE_CONFIG, Driver, MEMORY, Machine, readable, writable};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const PAGE: u64 = 4096;

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    Box::new(Balloon::new(machine.host()).0)
}

fn inflate(driver: &mut Driver<'_>, queue: u16, pages: &[u32]) {
    let numbers: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.fill(DATA, &numbers);
    driver.offer(queue, 0, &[readable(DATA, numbers.len())]);
    driver.kick(queue);
    assert_eq!(driver.wait_used(queue), (0, 0));
}

fn works(driver: &mut Driver<'_>) {
    let page = DATA + 0x10_0000;
    driver.fill(page - PAGE, &[7; 3 * PAGE as usize]);
    inflate(driver, INFLATE, &[(page / PAGE) as u32]);
    let now = driver.bytes(page - PAGE, 3 * PAGE as usize);
    assert_eq!(now[..PAGE as usize], [7; PAGE as usize]);
    assert_eq!(now[PAGE as usize..2 * PAGE as usize], [0; PAGE as usize]);
    assert_eq!(now[2 * PAGE as usize..], [7; PAGE as usize]);
}

conforms!(make, INFLATE, works);

#[test]
fn reported_pages_go_back_whichever_queue_the_driver_takes_for_them() {
    let machine = Machine::new();
    let (device, handle) = Balloon::new(machine.host());
    let mut driver = machine.plug(Box::new(device));
    assert_eq!(driver.start(0, 256) & 0xff, 1 << 2 | 1 << 5);
    let page = DATA + 0x10_0000;
    for (round, queue) in (1..).zip([2, 3, 4]) {
        driver.fill(page, &[9; 5 * PAGE as usize]);
        // Two whole pages, and one of which only a part is said to be free.
        driver.offer(
            queue,
            0,
            &[
                writable(page, 2 * PAGE as usize),
                writable(page + 3 * PAGE + 16, PAGE as usize),
            ],
        );
        driver.kick(queue);
        assert_eq!(driver.wait_used(queue), (0, 0));
        let now = driver.bytes(page, 5 * PAGE as usize);
        assert!(now[..2 * PAGE as usize].iter().all(|byte| *byte == 0));
        assert!(now[2 * PAGE as usize..].iter().all(|byte| *byte == 9));
        assert_eq!(handle.given_back(), round * 2 * PAGE);
    }
}

#[test]
fn the_host_asks_and_the_guest_says_how_far_it_got() {
    let machine = Machine::new();
    let (device, handle) = Balloon::new(machine.host());
    let mut driver = machine.plug(Box::new(device));
    driver.start(0, 256);
    handle.set_target(1000);
    assert_eq!((driver.vectors.count(0), driver.u32(DEVICE_CONFIG)), (1, 1000));
    handle.set_target(1000);
    assert_eq!(driver.vectors.count(0), 1);
    driver.write(DEVICE_CONFIG + 4, &700u32.to_le_bytes());
    assert_eq!(handle.actual(), 700);
    driver.write(DEVICE_CONFIG + 4, &[1]);
    driver.write(DEVICE_CONFIG, &[1; 4]);
    assert_eq!((handle.actual(), driver.u32(DEVICE_CONFIG)), (700, 1000));
    inflate(&mut driver, DEFLATE, &[1, 2, 3]);
    driver.reset();
    assert_eq!(handle.actual(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn no_page_number_is_too_odd(pages in prop::collection::vec(any::<u32>(), 0..64), low in prop::collection::vec(0x5000u32..0x6000, 0..8)) {
        let machine = Machine::new();
        let mut driver = machine.plug(make(&machine));
        driver.start(0, 256);
        inflate(&mut driver, INFLATE, &[0x4000, MEMORY as u32 / 4096, u32::MAX]);
        // Not those that the rings are in.
        let pages: Vec<u32> = pages.into_iter().filter(|page| *page > 0x1000).chain(low).collect();
        inflate(&mut driver, INFLATE, &pages);
        works(&mut driver);
    }
}
