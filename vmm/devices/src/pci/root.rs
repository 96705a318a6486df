//! The root bus: which functions there are, and where the guest has put their BARs.
//!
//! There is no firmware, so a function's BARs are placed when it is added; the guest may move them inside the window. A BAR that it
//! puts elsewhere, or onto another, answers nowhere. A function that is added while the guest runs is found when the guest rescans the
//! bus: 32 devices, and those from [`FIRST_MULTI_FUNCTION`] on can have eight functions each.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::{
    config::{Bar, CONFIG_BYTES, ConfigSpace, Identity},
    window::Window,
};
use crate::{bus::Bus, complaints::Complaints, ports::BusDevice};

const DEVICES: u8 = 32;
const FUNCTIONS: u8 = 8;

/// Devices below have one function: eight times fewer questions by a guest that scans the bus.
const FIRST_MULTI_FUNCTION: u8 = 16;

/// Functions that fit beside the host bridge.
pub const HOT_PLUGGABLE: usize = 15 + 16 * 8;

/// Place of a function on the root bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// 0 to 31.
    pub device: u8,
    /// 0 to 7.
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.{}", self.device, self.function)
    }
}

/// A function on the bus. Called on vCPU threads.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space.
    fn read_config(&self, offset: u16, data: &mut [u8]);
    /// Writes configuration space.
    fn write_config(&self, offset: u16, data: &[u8]);
    /// Where its BARs are now.
    fn bars(&self) -> Vec<Bar>;
    /// Puts a BAR somewhere.
    fn place_bar(&self, index: u8, address: u64);
    /// Says in its header that its device has more functions.
    fn set_multi_function(&self);
    /// Reads what is behind a BAR.
    fn read_bar(&self, index: u8, offset: u64, data: &mut [u8]);
    /// Writes what is behind a BAR.
    fn write_bar(&self, index: u8, offset: u64, data: &[u8]);
    /// The BAR answers at that address from now on, or nowhere.
    fn moved(&self, index: u8, address: Option<u64>);
    /// It has left the bus: its work ends.
    fn removed(&self);
}

/// Why a function was not added or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// Every place is taken.
    #[error("all {HOT_PLUGGABLE} places of the PCI bus are taken")]
    Full,
    /// No addresses are left for a BAR.
    #[error("no {size:#x} bytes of addresses are left for a BAR")]
    NoAddresses {
        /// Bytes that it needs.
        size: u64,
    },
    /// Nothing is there.
    #[error("there is no function at {0}")]
    Absent(PciAddress),
}

struct Slot {
    function: Arc<dyn PciFunction>,
    /// What [`Window`] gave it, and what is on the bus for it.
    reserved: Vec<u64>,
    mapped: Vec<(u8, u64)>,
}

struct State {
    /// By `device * 8 + function`.
    slots: Vec<Option<Slot>>,
    window: Window,
    complaints: Complaints,
}

/// The root bus.
pub struct PciRoot {
    bridge: ConfigSpace,
    mmio: Bus,
    state: Mutex<State>,
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRoot")
            .field("functions", &self.addresses())
            .finish_non_exhaustive()
    }
}

/// One BAR on the MMIO bus.
struct BarRange {
    function: Arc<dyn PciFunction>,
    index: u8,
}

impl BusDevice for BarRange {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.read_bar(self.index, offset, data);
    }
    fn write(&self, offset: u64, data: &[u8]) {
        self.function.write_bar(self.index, offset, data);
    }
}

impl PciRoot {
    /// A bus with a host bridge. BARs lie in `window`, which the machine has told the guest of, and answer on `mmio`.
    #[must_use]
    pub fn new(window: Window, mmio: Bus) -> Self {
        let bridge = ConfigSpace::new(&Identity {
            // An Intel host bridge that no driver knows.
            vendor: 0x8086,
            device: 0x0d57,
            class: [6, 0, 0],
            ..Identity::default()
        });
        let slots = usize::from(DEVICES) * usize::from(FUNCTIONS);
        Self {
            bridge,
            mmio,
            state: Mutex::new(State {
                slots: (0..slots).map(|_| None).collect(),
                window,
                complaints: Complaints::new("pci"),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a function where there is room.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<PciAddress, RootError> {
        let mut state = self.lock();
        let address = state.free_place().ok_or(RootError::Full)?;
        if address.device >= FIRST_MULTI_FUNCTION {
            function.set_multi_function();
        }
        let mut reserved = Vec::new();
        for bar in function.bars() {
            let Some(at) = state.window.allocate(bar.size, bar.size) else {
                for at in reserved {
                    state.window.free(at);
                }
                return Err(RootError::NoAddresses { size: bar.size });
            };
            reserved.push(at);
            function.place_bar(bar.index, at);
        }
        if let Some(slot) = state.slots.get_mut(index(address)) {
            *slot = Some(Slot {
                function,
                reserved,
                mapped: Vec::new(),
            });
        }
        Ok(address)
    }

    /// Takes a function away. The guest should have been told before.
    pub fn remove(&self, address: PciAddress) -> Result<(), RootError> {
        let mut state = self.lock();
        let slot = state
            .slots
            .get_mut(index(address))
            .and_then(Option::take)
            .ok_or(RootError::Absent(address))?;
        for (_, at) in slot.mapped {
            self.mmio.remove(at);
        }
        for at in slot.reserved {
            state.window.free(at);
        }
        // Its end may take a while; vCPUs may go on meanwhile.
        drop(state);
        slot.function.removed();
        Ok(())
    }

    /// A function's configuration space has become another by itself: its BARs answer where that says.
    pub fn restored(&self, address: PciAddress) {
        self.follow_bars(address);
    }

    /// Where functions are.
    #[must_use]
    pub fn addresses(&self) -> Vec<PciAddress> {
        let state = self.lock();
        let used = state.slots.iter().enumerate().filter(|(_, slot)| slot.is_some());
        used.filter_map(|(index, _)| u8::try_from(index).ok())
            .map(|index| PciAddress {
                device: index / FUNCTIONS,
                function: index % FUNCTIONS,
            })
            .collect()
    }

    /// Ends the work of all functions; they stay on the bus.
    pub fn shut_down(&self) {
        let functions: Vec<_> = self
            .lock()
            .slots
            .iter()
            .flatten()
            .map(|slot| Arc::clone(&slot.function))
            .collect();
        for function in functions {
            function.removed();
        }
    }

    fn function(&self, address: PciAddress) -> Option<Arc<dyn PciFunction>> {
        let state = self.lock();
        let slot = state.slots.get(index(address))?.as_ref()?;
        Some(Arc::clone(&slot.function))
    }

    /// Reads configuration space. What is not there reads as ones; so does extended space, which no function has.
    pub fn read_config(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        if !inside(offset, data.len()) {
            data.fill(0xff);
        } else if index(address) == 0 {
            self.bridge.read(offset, data);
        } else if let Some(function) = self.function(address) {
            function.read_config(offset, data);
        } else {
            data.fill(0xff);
        }
    }

    /// Writes configuration space, and moves BARs if that is what it meant.
    pub fn write_config(&self, address: PciAddress, offset: u16, data: &[u8]) {
        if !inside(offset, data.len()) {
            return;
        }
        let Some(function) = self.function(address) else {
            return;
        };
        function.write_config(offset, data);
        // The command register and the BARs.
        if offset < 0x28 && usize::from(offset) + data.len() > 4 {
            self.follow_bars(address);
        }
    }

    /// Brings the MMIO bus to where the guest has put a function's BARs.
    fn follow_bars(&self, address: PciAddress) {
        let mut state = self.lock();
        let State {
            slots,
            window,
            complaints,
        } = &mut *state;
        let Some(slot) = slots.get_mut(index(address)).and_then(Option::as_mut) else {
            return;
        };
        for bar in slot.function.bars() {
            let wanted = bar.address.filter(|&at| window.contains(at, bar.size));
            let current = slot.mapped.iter().position(|(number, _)| *number == bar.index);
            let current_at = current
                .and_then(|position| slot.mapped.get(position))
                .map(|(_, at)| *at);
            if current_at == wanted {
                continue;
            }
            if let Some(position) = current {
                let (_, at) = slot.mapped.swap_remove(position);
                self.mmio.remove(at);
            }
            let range = BarRange {
                function: Arc::clone(&slot.function),
                index: bar.index,
            };
            let placed = wanted.filter(|&at| match self.mmio.insert(at, bar.size, Arc::new(range)) {
                Ok(()) => true,
                Err(e) => {
                    complaints.say(format_args!(
                        "BAR {} of {address} answers nowhere: {e}",
                        bar.index
                    ));
                    false
                }
            });
            slot.mapped.extend(placed.map(|at| (bar.index, at)));
            slot.function.moved(bar.index, placed);
        }
    }
}

impl State {
    /// Device by device; only then second functions of devices whose first function is there.
    fn free_place(&self) -> Option<PciAddress> {
        let is_free = |address: &PciAddress| self.slots.get(index(*address)).is_some_and(Option::is_none);
        let firsts = (1..DEVICES).map(|device| PciAddress { device, function: 0 });
        let others = (FIRST_MULTI_FUNCTION..DEVICES)
            .flat_map(|device| (1..FUNCTIONS).map(move |function| PciAddress { device, function }));
        firsts.chain(others).find(is_free)
    }
}

fn index(address: PciAddress) -> usize {
    usize::from(address.device % DEVICES) * usize::from(FUNCTIONS) + usize::from(address.function % FUNCTIONS)
}

fn inside(offset: u16, length: usize) -> bool {
    usize::from(offset)
        .checked_add(length)
        .is_some_and(|end| end <= CONFIG_BYTES)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::pci::config::BarKind;

    struct Function {
        space: Mutex<ConfigSpace>,
        moves: Mutex<Vec<Option<u64>>>,
    }

    impl Function {
        fn new() -> Arc<Self> {
            let mut space = ConfigSpace::new(&Identity {
                vendor: 0x1234,
                ..Identity::default()
            });
            assert!(space.add_bar(0, 0x1000, BarKind::Memory64));
            Arc::new(Self {
                space: Mutex::new(space),
                moves: Mutex::default(),
            })
        }
    }

    impl PciFunction for Function {
        fn read_config(&self, offset: u16, data: &mut [u8]) {
            self.space.lock().unwrap().read(offset, data);
        }
        fn write_config(&self, offset: u16, data: &[u8]) {
            self.space.lock().unwrap().write(offset, data);
        }
        fn bars(&self) -> Vec<Bar> {
            self.space.lock().unwrap().bars()
        }
        fn place_bar(&self, index: u8, address: u64) {
            self.space.lock().unwrap().place_bar(index, address);
        }
        fn set_multi_function(&self) {
            self.space.lock().unwrap().set_multi_function();
        }
        fn read_bar(&self, _index: u8, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write_bar(&self, _index: u8, _offset: u64, _data: &[u8]) {}
        fn moved(&self, _index: u8, address: Option<u64>) {
            self.moves.lock().unwrap().push(address);
        }
        fn removed(&self) {
            self.moves.lock().unwrap().push(None);
        }
    }

    const WINDOW: u64 = 0xc000_0000;

    fn root() -> (PciRoot, Bus) {
        let mmio = Bus::new();
        (
            PciRoot::new(Window::new(WINDOW..WINDOW + 0x10_0000), mmio.clone()),
            mmio,
        )
    }

    fn answers(mmio: &Bus, at: u64) -> bool {
        mmio.read(at, &mut [0; 4])
    }

    #[test]
    fn a_function_answers_where_it_was_placed_and_where_the_guest_moves_it() {
        let (root, mmio) = root();
        let function = Function::new();
        let at = root.add(function.clone()).unwrap();
        assert_eq!(at.to_string(), "0000:00:01.0");
        assert!(!answers(&mmio, WINDOW));
        root.write_config(at, 4, &[2]);
        assert!(answers(&mmio, WINDOW));
        root.write_config(at, 4, &[0]);
        root.write_config(at, 0x10, &(WINDOW + 0x3000).to_le_bytes());
        root.write_config(at, 4, &[2]);
        assert!(answers(&mmio, WINDOW + 0x3000) && !answers(&mmio, WINDOW));
        root.remove(at).unwrap();
        assert!(!answers(&mmio, WINDOW + 0x3000));
        assert_eq!(
            *function.moves.lock().unwrap(),
            [Some(WINDOW), None, Some(WINDOW + 0x3000), None]
        );
        assert_eq!(root.remove(at), Err(RootError::Absent(at)));
    }

    #[test]
    fn a_bar_outside_of_the_window_or_on_another_answers_nowhere() {
        let (root, mmio) = root();
        let (first, second) = (
            root.add(Function::new()).unwrap(),
            root.add(Function::new()).unwrap(),
        );
        root.write_config(first, 4, &[2]);
        root.write_config(second, 0x10, &0x1000u64.to_le_bytes());
        root.write_config(second, 4, &[2]);
        assert!(!answers(&mmio, 0x1000));
        root.write_config(second, 0x10, &WINDOW.to_le_bytes());
        assert!(answers(&mmio, WINDOW), "still the first one's");
        root.remove(first).unwrap();
        assert!(!answers(&mmio, WINDOW));
        root.write_config(second, 0x10, &u64::MAX.to_le_bytes());
        assert!(!answers(&mmio, u64::MAX - 0xfff));
    }

    #[test]
    fn all_places_can_be_taken_and_are_free_again() {
        let mmio = Bus::new();
        let root = PciRoot::new(Window::new(WINDOW..WINDOW + 0x1000_0000), mmio);
        let mut places: Vec<_> = (0..HOT_PLUGGABLE)
            .map(|_| root.add(Function::new()).unwrap())
            .collect();
        assert_eq!(root.add(Function::new()), Err(RootError::Full));
        assert!(places.iter().all(|at| at.device > 0));
        let mut header = [0];
        root.read_config(places[14], 0xe, &mut header);
        assert_eq!((places[14].device, header), (15, [0]));
        root.read_config(places[15], 0xe, &mut header);
        assert_eq!((places[15].device, header), (16, [0x80]));
        let gone = places.swap_remove(20);
        root.remove(gone).unwrap();
        assert_eq!(root.add(Function::new()).unwrap(), gone);
    }

    #[test]
    fn a_function_that_finds_no_addresses_takes_no_place() {
        let root = PciRoot::new(Window::new(WINDOW..WINDOW + 0x1000), Bus::new());
        root.add(Function::new()).unwrap();
        assert_eq!(
            root.add(Function::new()),
            Err(RootError::NoAddresses { size: 0x1000 })
        );
        assert_eq!(root.addresses().len(), 1);
    }

    #[test]
    fn absent_functions_and_extended_space_read_as_ones() {
        let (root, _) = root();
        let mut data = [0; 4];
        root.read_config(
            PciAddress {
                device: 5,
                function: 0,
            },
            0,
            &mut data,
        );
        assert_eq!(data, [0xff; 4]);
        let bridge = PciAddress {
            device: 0,
            function: 0,
        };
        root.read_config(bridge, 0x100, &mut data);
        assert_eq!(data, [0xff; 4]);
        root.read_config(bridge, 0, &mut data);
        assert_eq!(data, [0x86, 0x80, 0x57, 0x0d]);
        root.write_config(bridge, 0xffff, &[0; 16]);
    }
}
