//! The entropy device.

use caisson_devices::virtio::{
    VirtioDevice,
    rng::{MAX_REQUEST, Rng},
};

use crate::machine::{Driver, Machine};

fn make(machine: &Machine) -> Box<dyn VirtioDevice> {
    Box::new(Rng::new(machine.host()))
}

fn works(driver: &mut Driver<'_>) {
    let first = driver.request(0, &[], &[16, 48]);
    let second = driver.request(0, &[], &[64]);
    assert_ne!(first, second);
    assert!(!first.ends_with(&[0; 32]));
}

conforms!(make, 0, works);

#[test]
fn a_request_is_filled_up_to_a_cap() {
    let machine = Machine::new();
    let mut driver = machine.plug(make(&machine));
    driver.start(0, 256);
    let bytes = driver.request(0, &[], &[MAX_REQUEST + 100]);
    assert!(bytes.iter().take(MAX_REQUEST).any(|byte| *byte != 0));
    assert!(bytes.iter().skip(MAX_REQUEST).all(|byte| *byte == 0));
    // The driver may also send something along: it is not read.
    assert!(
        driver
            .request(0, &[b"hello"], &[32])
            .iter()
            .any(|byte| *byte != 0)
    );
}
