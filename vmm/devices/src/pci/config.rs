//! The configuration space of one function (PCI Local Bus 3.0, chapter 6): bytes, and which of their bits a guest can change.
//!
//! BARs size themselves: the low bits of their addresses cannot be changed, which is all that a driver's sizing looks at. There is no
//! expansion ROM, no interrupt pin, no extended space: those read as zero.

/// Bytes of the space.
pub const CONFIG_BYTES: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const HEADER_TYPE: usize = 0x0e;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// First byte that capabilities may use.
const FIRST_CAPABILITY: usize = 0x40;
/// BARs of a function.
const BARS: u8 = 6;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u8 = 1 << 2;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const MULTI_FUNCTION: u8 = 0x80;

/// Who a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface.
    pub class: [u8; 3],
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// What kind of memory a BAR asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit addresses.
    Memory32,
    /// 64-bit addresses; takes two of the six registers.
    Memory64,
}

/// Where one BAR is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Register number, 0 to 5.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// Address, if the guest lets the function answer to memory accesses.
    pub address: Option<u64>,
}

/// An element of the list of capabilities: its id, and what follows the pointer to the next.
#[derive(Debug, Clone, Copy)]
pub struct Capability<'a> {
    /// Capability ID.
    pub id: u8,
    /// From the third byte on.
    pub body: &'a [u8],
    /// Which bits of `body` the guest can change; missing bytes: none.
    pub writable: &'a [u8],
}

/// The bytes, and their write masks.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: Vec<(u8, u64, BarKind)>,
    last_capability: usize,
    free: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: Vec::new(),
            last_capability: 0,
            free: FIRST_CAPABILITY,
        };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        let [class, subclass, interface] = identity.class;
        space.put(8, &[identity.revision, interface, subclass, class]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &[COMMAND_MEMORY | COMMAND_MASTER, COMMAND_INTX_DISABLE]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *slot = *byte;
        }
    }

    fn allow(&mut self, at: usize, masks: &[u8]) {
        for (slot, mask) in self.writable.iter_mut().skip(at).zip(masks) {
            *slot = *mask;
        }
    }

    /// Other functions of the same device are to be looked for.
    pub fn set_multi_function(&mut self) {
        if let Some(header) = self.bytes.get_mut(HEADER_TYPE) {
            *header |= MULTI_FUNCTION;
        }
    }

    /// Adds a BAR of `size` bytes, a power of two of at least 16; whether there was room for it.
    pub fn add_bar(&mut self, index: u8, size: u64, kind: BarKind) -> bool {
        let registers = match kind {
            BarKind::Memory32 => 1,
            BarKind::Memory64 => 2,
        };
        let fits = kind == BarKind::Memory64 || u32::try_from(size).is_ok();
        if !size.is_power_of_two() || size < 16 || index.saturating_add(registers) > BARS || !fits {
            return false;
        }
        let at = BAR0 + 4 * usize::from(index);
        let mask = !(size - 1);
        match kind {
            BarKind::Memory32 => {
                let [a, b, c, d, ..] = mask.to_le_bytes();
                self.allow(at, &[a, b, c, d]);
            }
            BarKind::Memory64 => {
                self.allow(at, &mask.to_le_bytes());
                self.put(at, &[0b100]);
            }
        }
        self.bars.push((index, size, kind));
        true
    }

    /// Adds a capability; its offset, if there was room for it.
    pub fn add_capability(&mut self, capability: &Capability<'_>) -> Option<u8> {
        let at = self.free;
        let end = at.checked_add(2)?.checked_add(capability.body.len())?;
        if end > CONFIG_BYTES {
            return None;
        }
        self.put(at, &[capability.id, 0]);
        self.put(at + 2, capability.body);
        self.allow(at + 2, capability.writable);
        let offset = u8::try_from(at).ok()?;
        let link = if self.last_capability == 0 {
            CAPABILITIES
        } else {
            self.last_capability + 1
        };
        self.put(link, &[offset]);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.last_capability = at;
        self.free = end.next_multiple_of(4);
        Some(offset)
    }

    /// Reads; beyond the space there are zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (slot, byte) in data.iter_mut().zip(self.bytes.iter().skip(usize::from(offset))) {
            *slot = *byte;
        }
    }

    /// Writes what a guest may write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        let cells = self.bytes.iter_mut().zip(self.writable);
        for ((slot, mask), byte) in cells.skip(usize::from(offset)).zip(data) {
            *slot = (*slot & !mask) | (byte & mask);
        }
    }

    /// All of it.
    #[must_use]
    pub fn bytes(&self) -> &[u8; CONFIG_BYTES] {
        &self.bytes
    }

    /// Takes over what a guest has written into a space that is otherwise the same; whether it was one.
    pub fn restore(&mut self, bytes: &[u8]) -> bool {
        let fixed = |(at, byte): (usize, &u8)| {
            let (own, mask) = (self.bytes.get(at)?, self.writable.get(at)?);
            Some((own ^ byte) & !mask == 0)
        };
        let same =
            bytes.len() == CONFIG_BYTES && bytes.iter().enumerate().all(|cell| fixed(cell) == Some(true));
        if same {
            self.write(0, bytes);
        }
        same
    }

    /// As [`ConfigSpace::write`], past the write masks: for the device itself.
    pub fn set(&mut self, offset: u8, data: &[u8]) {
        self.put(usize::from(offset), data);
    }

    /// Four bytes as a number.
    #[must_use]
    pub fn u32_at(&self, offset: u16) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Two bytes as a number.
    #[must_use]
    pub fn u16_at(&self, offset: u16) -> u16 {
        let mut bytes = [0; 2];
        self.read(offset, &mut bytes);
        u16::from_le_bytes(bytes)
    }

    /// All BARs, as the guest has placed them.
    #[must_use]
    pub fn bars(&self) -> Vec<Bar> {
        let decodes = self.u16_at(COMMAND as u16) & u16::from(COMMAND_MEMORY) != 0;
        self.bars
            .iter()
            .map(|&(index, size, kind)| {
                let at = BAR0 as u16 + 4 * u16::from(index);
                let low = u64::from(self.u32_at(at) & !0xf);
                let high = match kind {
                    BarKind::Memory32 => 0,
                    BarKind::Memory64 => u64::from(self.u32_at(at + 4)) << 32,
                };
                Bar {
                    index,
                    size,
                    address: decodes.then_some(low | high),
                }
            })
            .collect()
    }

    /// Places a BAR, as firmware would.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let Some(&(_, _, kind)) = self.bars.iter().find(|(number, ..)| *number == index) else {
            return;
        };
        let at = BAR0 as u16 + 4 * u16::from(index);
        let bytes = address.to_le_bytes();
        match kind {
            BarKind::Memory32 => self.write(at, bytes.get(..4).unwrap_or_default()),
            BarKind::Memory64 => self.write(at, &bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn function() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1041,
            ..Identity::default()
        });
        assert!(space.add_bar(0, 0x8000, BarKind::Memory64));
        assert!(space.add_bar(2, 0x1000, BarKind::Memory32));
        space
    }

    #[test]
    fn bars_are_sized_by_writing_ones() {
        let mut space = function();
        space.write(0x10, &[0xff; 8]);
        assert_eq!(
            (space.u32_at(0x10), space.u32_at(0x14)),
            (0xffff_8004, 0xffff_ffff)
        );
        space.write(0x18, &[0xff; 4]);
        assert_eq!(space.u32_at(0x18), 0xffff_f000);
        space.write(0x1c, &[0xff; 12]);
        assert_eq!((space.u32_at(0x1c), space.u32_at(0x24)), (0, 0));
    }

    #[test]
    fn a_function_answers_only_while_its_memory_is_enabled() {
        let mut space = function();
        space.place_bar(0, 0x12_3456_8000);
        space.place_bar(2, 0xc000_0000);
        assert!(space.bars().iter().all(|bar| bar.address.is_none()));
        space.write(4, &[2, 0]);
        let addresses: Vec<_> = space.bars().iter().map(|bar| bar.address).collect();
        assert_eq!(addresses, [Some(0x12_3456_8000), Some(0xc000_0000)]);
    }

    #[test]
    fn capabilities_are_linked_until_the_space_is_full() {
        let mut space = function();
        let mut offsets = Vec::new();
        while let Some(at) = space.add_capability(&Capability {
            id: 9,
            body: &[1; 14],
            writable: &[],
        }) {
            offsets.push(at);
        }
        assert_eq!(offsets.len(), 12);
        let mut seen = Vec::new();
        let mut byte = [0];
        space.read(0x34, &mut byte);
        while byte != [0] {
            seen.push(byte[0]);
            space.read(u16::from(byte[0]) + 1, &mut byte);
        }
        assert_eq!(seen, offsets);
        assert_eq!(space.u16_at(6), 0x10);
    }

    #[test]
    fn bars_that_cannot_be_are_refused() {
        let mut space = function();
        assert!(!space.add_bar(5, 0x1000, BarKind::Memory64));
        assert!(!space.add_bar(5, 1 << 32, BarKind::Memory32));
        assert!(!space.add_bar(5, 24, BarKind::Memory32));
        assert!(!space.add_bar(5, 8, BarKind::Memory32));
        assert!(space.add_bar(5, 16, BarKind::Memory32));
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_identity_and_capabilities_stay(
            writes in prop::collection::vec((any::<u16>(), prop::collection::vec(any::<u8>(), 0..16)), 0..30)
        ) {
            let mut space = function();
            let fixed = [0x00u16, 0x08, 0x0c, 0x2c, 0x30, 0x34];
            let before = fixed.map(|at| space.u32_at(at));
            for (offset, bytes) in writes {
                space.write(offset, &bytes);
                let mut back = vec![0; bytes.len()];
                space.read(offset, &mut back);
            }
            prop_assert_eq!(fixed.map(|at| space.u32_at(at)), before);
            for bar in space.bars() {
                prop_assert!(bar.address.is_none_or(|at| at % bar.size == 0));
            }
        }
    }
}
