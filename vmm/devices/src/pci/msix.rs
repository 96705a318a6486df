//! MSI-X of one function (PCI Local Bus 3.0, section 6.8.2): the table, the pending bits, and what of it the machine must know.
//!
//! The machine hears of a vector only when it matters: when it is unmasked, masked, or changed while unmasked. So a driver that writes
//! a vector's address and data in three accesses costs one change of the machine's routing.

use std::{
    fmt, io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmm_sys_util::eventfd::EventFd;

use crate::{
    complaints::Complaints,
    ports::{MsiMessage, MsiVectors},
    virtio::state::VectorState,
};

/// Vectors that a function may have here: one page of table.
pub const MAX_VECTORS: u16 = 256;

const ENTRY_BYTES: u64 = 16;
const MASKED: u32 = 1;

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// What the machine knows: the message while unmasked.
    told: Option<MsiMessage>,
}

#[derive(Debug)]
struct State {
    enabled: bool,
    all_masked: bool,
    entries: Vec<Entry>,
    complaints: Complaints,
}

/// The vectors of one function; they are all masked until the guest has enabled MSI-X.
pub struct Msix {
    port: Arc<dyn MsiVectors>,
    state: Mutex<State>,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Msix {
    /// `vectors` are at least one and at most [`MAX_VECTORS`]; other numbers are brought there.
    #[must_use]
    pub fn new(port: Arc<dyn MsiVectors>, vectors: u16) -> Self {
        let vectors = vectors.clamp(1, MAX_VECTORS);
        let entry = Entry {
            masked: true,
            ..Entry::default()
        };
        Self {
            port,
            state: Mutex::new(State {
                enabled: false,
                all_masked: false,
                entries: vec![entry; usize::from(vectors)],
                complaints: Complaints::new("msix"),
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Vectors in the table.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.lock().entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// The message control register was written: bit 15 enables, bit 14 masks everything.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.enabled = control & 1 << 15 != 0;
        state.all_masked = control & 1 << 14 != 0;
        for index in 0..state.entries.len() {
            self.settle(&mut state, index);
        }
    }

    /// Every vector, as it is.
    #[must_use]
    pub fn state(&self) -> Vec<VectorState> {
        let state = self.lock();
        let entries = state.entries.iter().map(|entry| VectorState {
            address: entry.message.address,
            data: entry.message.data,
            masked: entry.masked,
            pending: entry.pending,
        });
        entries.collect()
    }

    /// Takes over a table of as many vectors; whether it was one. The control register follows by [`Msix::set_control`].
    pub fn restore(&self, vectors: &[VectorState]) -> bool {
        let mut state = self.lock();
        if vectors.len() != state.entries.len() {
            return false;
        }
        for (entry, vector) in state.entries.iter_mut().zip(vectors) {
            entry.message = MsiMessage {
                address: vector.address & !3,
                data: vector.data,
            };
            entry.masked = vector.masked;
            entry.pending = vector.pending;
        }
        true
    }

    /// The device has something to say. Unknown vectors (0xffff is "none") are silent.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else {
            return;
        };
        if entry.told.is_none() {
            entry.pending = true;
            return;
        }
        if let Err(e) = self.port.trigger(vector) {
            state
                .complaints
                .say(format_args!("vector {vector} cannot be raised: {e}"));
        }
    }

    /// An event that raises the vector, for the host's kernel.
    pub fn eventfd(&self, vector: u16) -> io::Result<EventFd> {
        self.port.eventfd(vector)
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, slot) in (offset..).zip(data) {
            let index = usize::try_from(at / ENTRY_BYTES).unwrap_or(usize::MAX);
            let within = usize::try_from(at % ENTRY_BYTES).unwrap_or_default();
            *slot = state
                .entries
                .get(index)
                .and_then(|entry| entry.bytes().get(within).copied())
                .unwrap_or_default();
        }
    }

    /// Writes the table: whole and aligned 4 or 8 bytes, as the specification demands; everything else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let Ok(index) = usize::try_from(offset / ENTRY_BYTES) else {
            return;
        };
        let mut state = self.lock();
        let Some(entry) = state.entries.get_mut(index) else {
            return;
        };
        for (word, bytes) in (offset % ENTRY_BYTES / 4..).zip(data.chunks_exact(4)) {
            let value = bytes.try_into().map_or(0, u32::from_le_bytes);
            entry.set_word(word, value);
        }
        self.settle(&mut state, index);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (at, slot) in (offset..).zip(data) {
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            *slot = first.map_or(0, |first| {
                let bits = state.entries.iter().skip(first).take(8);
                bits.enumerate()
                    .fold(0, |byte, (bit, entry)| byte | u8::from(entry.pending) << bit)
            });
        }
    }

    /// Tells the machine what it must know of a vector, and delivers what was pending.
    fn settle(&self, state: &mut State, index: usize) {
        let live = state.enabled && !state.all_masked;
        let (Some(entry), Ok(vector)) = (state.entries.get_mut(index), u16::try_from(index)) else {
            return;
        };
        let wanted = (live && !entry.masked).then_some(entry.message);
        let mut outcome = Ok(());
        if entry.told != wanted {
            outcome = self
                .port
                .update(vector, wanted.unwrap_or(entry.message), wanted.is_none());
            entry.told = wanted.filter(|_| outcome.is_ok());
        }
        if entry.told.is_some() && entry.pending {
            entry.pending = false;
            outcome = self.port.trigger(vector);
        }
        if let Err(e) = outcome {
            state
                .complaints
                .say(format_args!("vector {vector} cannot be set up: {e}"));
        }
    }
}

impl Entry {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        let words = self
            .message
            .address
            .to_le_bytes()
            .into_iter()
            .chain(self.message.data.to_le_bytes())
            .chain(u32::from(self.masked).to_le_bytes());
        for (slot, byte) in bytes.iter_mut().zip(words) {
            *slot = byte;
        }
        bytes
    }

    fn set_word(&mut self, word: u64, value: u32) {
        let address = self.message.address;
        match word {
            // The lowest two bits of the address are always zero.
            0 => self.message.address = (address & !0xffff_ffff) | u64::from(value & !3),
            1 => self.message.address = (address & 0xffff_ffff) | u64::from(value) << 32,
            2 => self.message.data = value,
            _ => self.masked = value & MASKED != 0,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Machine(Mutex<Vec<String>>);

    impl MsiVectors for Machine {
        fn update(&self, index: u16, message: MsiMessage, masked: bool) -> io::Result<()> {
            let MsiMessage { address, data } = message;
            let line = if masked {
                format!("mask {index}")
            } else {
                format!("{index} {address:#x} {data}")
            };
            self.0.lock().unwrap().push(line);
            Ok(())
        }
        fn trigger(&self, index: u16) -> io::Result<()> {
            self.0.lock().unwrap().push(format!("raise {index}"));
            Ok(())
        }
        fn eventfd(&self, _index: u16) -> io::Result<EventFd> {
            EventFd::new(0)
        }
    }

    fn table() -> (Arc<Machine>, Msix) {
        let machine = Arc::new(Machine::default());
        (machine.clone(), Msix::new(machine, 3))
    }

    fn said(machine: &Machine) -> Vec<String> {
        std::mem::take(&mut machine.0.lock().unwrap())
    }

    #[test]
    fn a_vector_written_in_pieces_is_told_once() {
        let (machine, msix) = table();
        msix.set_control(1 << 15);
        for (word, value) in [(0, 0xfee0_1003u32), (1, 0), (2, 33), (3, 0)] {
            msix.write_table(16 + 4 * word, &value.to_le_bytes());
        }
        assert_eq!(said(&machine), ["1 0xfee01000 33"]);
        let mut back = [0; 16];
        msix.read_table(16, &mut back);
        assert_eq!(back[..8], 0xfee0_1000u64.to_le_bytes());
        msix.trigger(1);
        assert_eq!(said(&machine), ["raise 1"]);
    }

    #[test]
    fn what_happens_while_masked_is_pending_and_delivered_once() {
        let (machine, msix) = table();
        msix.write_table(12, &0u32.to_le_bytes());
        msix.trigger(0);
        msix.trigger(0);
        msix.trigger(2);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0b101, 0, 0, 0, 0, 0, 0, 0]);
        msix.set_control(3 << 14);
        assert!(said(&machine).is_empty());
        msix.set_control(1 << 15);
        assert_eq!(said(&machine), ["0 0x0 0", "raise 0"]);
        msix.set_control(0);
        assert_eq!(said(&machine), ["mask 0"]);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b100);
    }

    #[test]
    fn vectors_that_do_not_exist_are_silent() {
        let (machine, msix) = table();
        msix.set_control(1 << 15);
        msix.trigger(3);
        msix.trigger(0xffff);
        msix.write_table(48, &[0; 4]);
        assert!(said(&machine).is_empty());
    }

    proptest! {
        #[test]
        fn no_access_is_too_odd(
            writes in prop::collection::vec((any::<u64>(), prop::collection::vec(any::<u8>(), 0..12)), 0..20),
            controls in prop::collection::vec(any::<u16>(), 0..4),
        ) {
            let (_, msix) = table();
            for (offset, bytes) in writes {
                msix.write_table(offset % 64, &bytes);
                msix.write_table(offset, &bytes);
                let mut back = vec![0; bytes.len()];
                msix.read_table(offset, &mut back);
                msix.read_pending(offset, &mut back);
                for control in &controls {
                    msix.set_control(*control);
                    msix.trigger(*control % 4);
                }
            }
        }
    }
}
