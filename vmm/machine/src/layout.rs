//! The guest's physical address map, and the allocator of what may be plugged into it.
//!
//! ```text
//! 0000_0000  RAM: boot parameters in the first pages, ACPI tables at e_0000, the kernel from 16 MiB on
//! c000_0000  PCI memory window (BARs)
//! e000_0000  PCI configuration space (ECAM), bus 0 only
//! fec0_0000  I/O APIC
//! fee0_0000  local APIC
//! fffb_c000  what Intel's KVM needs for itself
//! 1_0000_0000  RAM beyond 3 GiB, then whatever is plugged: memory (virtio-mem), files (virtio-pmem)
//! ```

use std::ops::Range;

use caisson_devices::pci::Window;

/// RAM ends here at the latest and goes on at [`HIGH_RAM`].
pub const LOW_RAM_END: u64 = 0xc000_0000;
/// Where BARs live. No 64-bit window: virtio functions need a few pages each.
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of PCI bus 0: 256 functions of 4 KiB.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// The I/O APIC's registers (in KVM).
pub const IO_APIC: u64 = 0xfec0_0000;
/// The local APICs' registers (in KVM).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// A page table that Intel's KVM uses when real mode has to be emulated; one page, followed by [`TSS`].
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that Intel's KVM uses when real mode has to be emulated.
pub const TSS: u64 = 0xfffb_d000;
/// RAM beyond what fits below the hole.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// Segment descriptors at start.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` and what it points to, for the PVH entry: one page.
pub const PVH_INFO: u64 = 0x6000;
/// `boot_params`, for the 64-bit entry: one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables at start, for the 64-bit entry: six pages.
pub const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its terminating zero (the kernel's COMMAND_LINE_SIZE on x86).
pub const COMMAND_LINE_BYTES: usize = 2048;
/// From here to [`ACPI`] there is nothing, as on a PC.
pub const LOW_END: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first thing in it, where a kernel without a pointer would look as well.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// The kernel and everything else start here at the earliest.
pub const HIGH_MEMORY: u64 = 0x10_0000;

/// Sleep control register (ACPI, hardware-reduced): one byte.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Sleep status register: one byte.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Reset register: one byte.
pub const RESET_PORT: u16 = 0x602;
/// What a guest writes into the reset register.
pub const RESET_VALUE: u8 = 1;
/// First serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt.
pub const SERIAL_GSI: u32 = 4;

/// RAM comes in pages.
pub const PAGE: u64 = 4096;
/// What can be plugged starts at multiples of this, so that huge pages and memory blocks of the guest line up.
pub const PLUG_ALIGNMENT: u64 = 1 << 30;
/// The least RAM that a machine may have: less than that holds no kernel.
pub const LEAST_RAM: u64 = 32 << 20;

/// Why something has no place in the address map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// RAM must be whole pages and at least [`LEAST_RAM`].
    #[error("{0} bytes of RAM: must be a multiple of 4096 and no less than 32 MiB")]
    RamSize(u64),
    /// The CPU cannot address that much.
    #[error("{bytes} bytes do not fit below this CPU's {limit:#x}")]
    TooLarge {
        /// What was to be placed.
        bytes: u64,
        /// End of the physical address space.
        limit: u64,
    },
}

/// Where the RAM of one machine is, and what space is left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM below the hole, from 0 on, in bytes.
    pub low: u64,
    /// RAM from [`HIGH_RAM`] on, in bytes; may be 0.
    pub high: u64,
    plugged: Window,
    limit: u64,
}

impl Layout {
    /// A map with `ram` bytes of RAM for CPUs with `address_bits` bits of physical addresses.
    pub fn new(ram: u64, address_bits: u8) -> Result<Self, LayoutError> {
        if ram < LEAST_RAM || !ram.is_multiple_of(PAGE) {
            return Err(LayoutError::RamSize(ram));
        }
        // 52 is the architecture's limit, 36 the least that a 64-bit CPU has.
        let limit = 1u64 << address_bits.clamp(36, 52);
        let low = ram.min(LOW_RAM_END);
        let high = ram - low;
        let mut layout = Self {
            low,
            high,
            plugged: Window::new(HIGH_RAM..limit),
            limit,
        };
        if high > 0 {
            layout.plug(high)?;
        }
        Ok(layout)
    }

    /// Guest-physical space for `bytes` of something that is plugged: its start.
    pub fn plug(&mut self, bytes: u64) -> Result<u64, LayoutError> {
        let limit = self.limit;
        let place = self.plugged.allocate(bytes, PLUG_ALIGNMENT);
        place.ok_or(LayoutError::TooLarge { bytes, limit })
    }

    /// What was plugged there is gone, and its space can be used again; whether something was.
    pub fn unplug(&mut self, start: u64) -> bool {
        start >= HIGH_RAM + self.high && self.plugged.free(start)
    }

    /// Ranges of RAM, as (start, bytes), in order.
    #[must_use]
    pub fn ram(&self) -> Vec<(u64, u64)> {
        let mut ranges = vec![(0, self.low)];
        if self.high > 0 {
            ranges.push((HIGH_RAM, self.high));
        }
        ranges
    }

    /// What the kernel is told of the memory, in order.
    #[must_use]
    pub fn memory_map(&self) -> Vec<MapEntry> {
        let mut map = vec![
            MapEntry::new(0, LOW_END, MapKind::Ram),
            MapEntry::new(ACPI.start, ACPI.end - ACPI.start, MapKind::Acpi),
            MapEntry::new(HIGH_MEMORY, self.low - HIGH_MEMORY, MapKind::Ram),
            MapEntry::new(ECAM.start, ECAM.end - ECAM.start, MapKind::Reserved),
        ];
        if self.high > 0 {
            map.push(MapEntry::new(HIGH_RAM, self.high, MapKind::Ram));
        }
        map
    }
}

/// What a range of the memory map is. The values are those of e820 and of PVH alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// For the kernel to use.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables.
    Acpi = 3,
}

/// One range of the memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub bytes: u64,
    /// What it is.
    pub kind: MapKind,
}

impl MapEntry {
    const fn new(start: u64, bytes: u64, kind: MapKind) -> Self {
        Self { start, bytes, kind }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ram_that_fits_below_the_hole_is_one_range() {
        let layout = Layout::new(128 << 20, 40).unwrap();
        assert_eq!(layout.ram(), [(0, 128 << 20)]);
        let layout = Layout::new(4 << 30, 40).unwrap();
        assert_eq!(layout.ram(), [(0, 3 << 30), (HIGH_RAM, 1 << 30)]);
    }

    #[test]
    fn ram_that_holds_no_kernel_or_half_a_page_is_refused() {
        assert_eq!(Layout::new(1 << 20, 40), Err(LayoutError::RamSize(1 << 20)));
        assert!(Layout::new((64 << 20) + 1, 40).is_err());
    }

    #[test]
    fn what_the_cpu_cannot_address_is_refused() {
        assert!(Layout::new(1 << 40, 36).is_err());
        let mut layout = Layout::new(64 << 20, 36).unwrap();
        assert!(layout.plug(128 << 30).is_err());
        assert!(layout.plug(u64::MAX).is_err());
        assert_eq!(layout.plug(1 << 30), Ok(HIGH_RAM));
        // As often as one likes.
        for _ in 0..1000 {
            assert_eq!(layout.plug(1 << 30), Ok(HIGH_RAM + (1 << 30)));
            assert!(layout.unplug(HIGH_RAM + (1 << 30)));
        }
    }

    #[test]
    fn fixed_places_do_not_overlap() {
        let places = [
            (GDT, 64),
            (PVH_INFO, PAGE),
            (ZERO_PAGE, PAGE),
            (PAGE_TABLES, 6 * PAGE),
            (COMMAND_LINE, COMMAND_LINE_BYTES as u64),
        ];
        for pair in places.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
        assert!(places[4].0 + places[4].1 <= LOW_END);
        const { assert!(PCI_WINDOW.end <= ECAM.start && ECAM.end <= IO_APIC) };
        const { assert!(IDENTITY_MAP + PAGE <= TSS && TSS + 3 * PAGE <= HIGH_RAM) };
    }

    proptest! {
        #[test]
        fn whatever_is_plugged_overlaps_nothing(
            pages in (LEAST_RAM / PAGE)..(16 << 30) / PAGE,
            sizes in prop::collection::vec((1u64..(8 << 30), any::<bool>()), 0..12),
        ) {
            let mut layout = Layout::new(pages * PAGE, 39).unwrap();
            let mut taken: Vec<(u64, u64)> = layout.ram();
            prop_assert_eq!(taken.iter().map(|(_, bytes)| bytes).sum::<u64>(), pages * PAGE);
            taken.push((LOW_RAM_END, HIGH_RAM - LOW_RAM_END));
            for (bytes, goes) in sizes {
                let Ok(start) = layout.plug(bytes) else { break };
                prop_assert!(start.is_multiple_of(PLUG_ALIGNMENT));
                prop_assert!(start + bytes <= 1 << 39);
                for (other, size) in &taken {
                    prop_assert!(start >= other + size || start + bytes <= *other);
                }
                if goes {
                    prop_assert!(layout.unplug(start));
                    prop_assert!(!layout.unplug(start));
                } else {
                    taken.push((start, bytes));
                }
            }
            prop_assert!(!layout.unplug(0) && !layout.unplug(HIGH_RAM) || layout.high == 0);
            let map = layout.memory_map();
            for pair in map.windows(2) {
                prop_assert!(pair[0].start + pair[0].bytes <= pair[1].start);
            }
        }
    }
}
