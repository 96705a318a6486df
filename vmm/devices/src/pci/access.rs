//! How a vCPU reaches configuration space: memory mapped (ECAM, PCI Express Base 7.2.2), one mebibyte for the one bus; and by the ports
//! 0xcf8 to 0xcff (configuration mechanism #1), which a kernel uses before it has read any table.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use super::root::{PciAddress, PciRoot};
use crate::ports::BusDevice;

/// Bytes of ECAM for one bus.
pub const ECAM_BYTES: u64 = 1 << 20;

/// Configuration space in memory.
#[derive(Debug)]
pub struct Ecam(Arc<PciRoot>);

impl Ecam {
    /// For the MMIO bus, [`ECAM_BYTES`] long.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self(root)
    }
}

fn decode(offset: u64) -> Option<(PciAddress, u16)> {
    let function = u8::try_from(offset >> 12).ok()?;
    let address = PciAddress {
        device: function >> 3,
        function: function & 7,
    };
    Some((address, (offset & 0xfff) as u16))
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match decode(offset) {
            Some((address, register)) => self.0.read_config(address, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((address, register)) = decode(offset) {
            self.0.write_config(address, register, data);
        }
    }
}

/// Configuration space behind an address port and a data port.
#[derive(Debug)]
pub struct ConfigMechanism1 {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigMechanism1 {
    /// First of its ports.
    pub const PORT: u64 = 0xcf8;
    /// Number of its ports.
    pub const PORTS: u64 = 8;

    /// For the PIO bus.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
        }
    }

    /// What the data port at `offset` is, if configuration accesses are enabled and the first bus is meant.
    fn target(&self, offset: u64) -> Option<(PciAddress, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        if address & 0x80ff_0000 != 0x8000_0000 {
            return None;
        }
        let function = (address >> 8) as u8;
        let place = PciAddress {
            device: function >> 3,
            function: function & 7,
        };
        Some((place, (address & 0xfc) as u16 + (offset & 3) as u16))
    }
}

impl BusDevice for ConfigMechanism1 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset < 4 {
            // Only whole words are the address register; bytes there belong to other devices.
            if let (0, Ok(whole)) = (offset, <&mut [u8; 4]>::try_from(data)) {
                *whole = self.address.load(Ordering::Relaxed).to_le_bytes();
            }
        } else if let Some((address, register)) = self.target(offset) {
            self.root.read_config(address, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset < 4 {
            if let (0, Ok(whole)) = (offset, <[u8; 4]>::try_from(data)) {
                self.address.store(u32::from_le_bytes(whole), Ordering::Relaxed);
            }
        } else if let Some((address, register)) = self.target(offset) {
            self.root.write_config(address, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{bus::Bus, pci::Window};

    fn root() -> Arc<PciRoot> {
        Arc::new(PciRoot::new(Window::new(0..0x1000), Bus::new()))
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let root = root();
        let (ecam, ports) = (Ecam::new(root.clone()), ConfigMechanism1::new(root));
        let (mut by_memory, mut by_port) = ([0; 2], [0; 2]);
        ecam.read(2, &mut by_memory);
        ports.write(0, &0x8000_0000u32.to_le_bytes());
        ports.read(6, &mut by_port);
        assert_eq!((by_memory, by_port), ([0x57, 0x0d], [0x57, 0x0d]));
        ports.write(0, &0x8001_0000u32.to_le_bytes());
        ports.read(6, &mut by_port);
        assert_eq!(by_port, [0xff; 2], "there is no second bus");
        ports.write(0, &0u32.to_le_bytes());
        ports.read(4, &mut by_port);
        assert_eq!(by_port, [0xff; 2], "not enabled");
    }

    proptest! {
        #[test]
        fn no_access_is_too_odd(accesses in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..16)), 0..20)) {
            let root = root();
            let (ecam, ports) = (Ecam::new(root.clone()), ConfigMechanism1::new(root));
            for (offset, mut bytes) in accesses {
                ecam.write(offset % ECAM_BYTES, &bytes);
                ecam.read(offset % ECAM_BYTES, &mut bytes);
                ecam.read(offset, &mut bytes);
                ports.write(offset % 8, &bytes);
                ports.write(0, &(offset as u32 | 1 << 31).to_le_bytes());
                ports.read(offset % 8, &mut bytes);
            }
        }
    }
}
