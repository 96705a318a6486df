//! Configuration space and BARs of a bus with two functions, read and written anywhere with any width.
#![no_main]

#[path = "../../vmm/devices/tests/machine/mod.rs"]
#[allow(dead_code, reason = "each target uses its part")]
mod machine;

use caisson_devices::{
    pci::PciAddress,
    virtio::{balloon::Balloon, rng::Rng},
};
use libfuzzer_sys::fuzz_target;
use machine::Machine;

/// Bytes of one step.
const STEP: usize = 8;

fuzz_target!(|data: &[u8]| {
    let machine = Machine::new();
    machine.plug(Box::new(Rng::new(machine.host())));
    machine.plug(Box::new(Balloon::new(machine.host()).0));
    for step in data.chunks_exact(STEP) {
        let (kind, device, offset) = (step[0], step[1], u16::from_le_bytes([step[2], step[3]]));
        let width = 1 + usize::from(kind >> 4 & 3);
        let address = PciAddress {
            device: device & 3,
            function: device >> 5,
        };
        let mut bytes = [0; 8];
        match kind & 7 {
            0 | 1 => machine.set_config(address, u64::from(offset & 0xfff), &step[4..4 + width]),
            2 => machine.config(address, u64::from(offset & 0xfff), &mut bytes[..width]),
            kind => {
                // Behind BAR 0, wherever the guest has put it.
                let low = u64::from(machine.config_u32(address, 0x10) & !0xf);
                let bar = low | u64::from(machine.config_u32(address, 0x14)) << 32;
                let at = bar.wrapping_add(u64::from(offset));
                if kind & 1 == 0 {
                    machine.mmio.read(at, &mut bytes[..width]);
                } else {
                    machine.mmio.write(at, &step[4..4 + width]);
                }
            }
        }
    }
    machine.root.shut_down();
});
