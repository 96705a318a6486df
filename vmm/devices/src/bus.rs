//! Which device answers to an address: one [`Bus`] for PIO, one for MMIO.
//!
//! Ranges come and go while vCPUs run (hotplug, and BARs that the guest moves): the lock is held for the look-up, not for the access,
//! so a device that was removed may still see the accesses that had found it before.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

use crate::ports::BusDevice;

/// Why a range was not inserted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Another range is there already.
    #[error("range {start:#x}+{size:#x} overlaps another")]
    Overlap {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
    /// Empty, or beyond the last address.
    #[error("range {start:#x}+{size:#x} is no range")]
    Invalid {
        /// First address.
        start: u64,
        /// Bytes.
        size: u64,
    },
}

#[derive(Clone)]
struct Entry {
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// Ranges of addresses, in order, without overlaps.
#[derive(Clone, Default)]
pub struct Bus {
    ranges: Arc<RwLock<BTreeMap<u64, Entry>>>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_map()
            .entries(
                ranges
                    .iter()
                    .map(|(start, entry)| (format!("{start:#x}"), format!("{:#x}", entry.size))),
            )
            .finish()
    }
}

impl Bus {
    /// A bus with nothing on it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// From now on `device` answers to `size` bytes from `start` on.
    pub fn insert(&self, start: u64, size: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = size
            .checked_sub(1)
            .and_then(|most| start.checked_add(most))
            .ok_or(BusError::Invalid { start, size })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        // The closest one that starts at or before our end is the only one that can reach into ours.
        let reaches_in = ranges
            .range(..=last)
            .next_back()
            .is_some_and(|(&other, entry)| other.saturating_add(entry.size - 1) >= start);
        if reaches_in {
            return Err(BusError::Overlap { start, size });
        }
        ranges.insert(start, Entry { size, device });
        Ok(())
    }

    /// Nothing answers to the range that starts there any more; whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(&start).is_some()
    }

    /// Reads for a vCPU. Where there is no device, everything reads as ones; an access across the end of a range is none.
    /// Whether a device answered.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes for a vCPU. Where there is no device, nothing happens. Whether a device answered.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, entry) = ranges.range(..=address).next_back()?;
        let offset = address.checked_sub(start)?;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        (end <= entry.size).then(|| (Arc::clone(&entry.device), offset))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_goes_to_the_range_it_lies_in_and_to_no_other() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x100c, &mut data));
        assert_eq!(data, [0xc; 4]);
        assert!(!bus.read(0x100d, &mut data), "across the end");
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0xfff, &[1, 2]));
        assert!(bus.write(0x1001, &[1, 2]));
        assert_eq!(*device.0.lock().unwrap(), [(1, vec![1, 2])]);
        assert!(bus.remove(0x1000));
        assert!(!bus.write(0x1001, &[1]));
    }

    #[test]
    fn ranges_at_the_end_of_the_address_space_do_not_overflow() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        assert!(bus.insert(u64::MAX - 7, 9, device.clone()).is_err());
        assert!(bus.insert(5, 0, device.clone()).is_err());
        bus.insert(u64::MAX - 7, 8, device).unwrap();
        let mut data = [0; 8];
        assert!(bus.read(u64::MAX - 7, &mut data));
        assert!(!bus.read(u64::MAX, &mut data));
    }

    proptest! {
        #[test]
        fn no_two_ranges_ever_overlap(ranges in prop::collection::vec((0u64..64, 0u64..16), 0..20)) {
            let bus = Bus::new();
            let mut taken = [false; 128];
            for (start, size) in ranges {
                let cells = start as usize..(start + size) as usize;
                let free = size > 0 && !taken[cells.clone()].contains(&true);
                prop_assert_eq!(bus.insert(start, size, Arc::new(Recorder::default())).is_ok(), free);
                if free {
                    taken[cells].fill(true);
                }
            }
            for (address, &is_taken) in taken.iter().enumerate() {
                prop_assert_eq!(bus.write(address as u64, &[0]), is_taken);
            }
        }
    }
}
