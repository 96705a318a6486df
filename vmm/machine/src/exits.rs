//! Counts why vCPUs come back to user space. Each such exit costs microseconds, so each kind of them should be known.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Why a vCPU has come back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ExitReason {
    /// The guest has read from a port.
    PortRead,
    /// The guest has written to a port.
    PortWrite,
    /// The guest has read from a device's memory.
    MemoryRead,
    /// The guest has written to a device's memory.
    MemoryWrite,
    /// Somebody wants the vCPU's attention.
    Interrupted,
    /// Everything else.
    Other,
}

impl ExitReason {
    const ALL: [Self; 6] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MemoryRead,
        Self::MemoryWrite,
        Self::Interrupted,
        Self::Other,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PortRead => "port-read",
            Self::PortWrite => "port-write",
            Self::MemoryRead => "memory-read",
            Self::MemoryWrite => "memory-write",
            Self::Interrupted => "interrupted",
            Self::Other => "other",
        }
    }
}

/// How often each kind of exit has happened, over all vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitCounts([u64; ExitReason::ALL.len()]);

impl ExitCounts {
    /// How many there were of one kind.
    #[must_use]
    pub fn of(&self, reason: ExitReason) -> u64 {
        self.0[reason as usize]
    }

    /// How many there were.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Each kind with its count.
    pub fn iter(&self) -> impl Iterator<Item = (ExitReason, u64)> + '_ {
        ExitReason::ALL.into_iter().zip(self.0)
    }
}

impl fmt::Display for ExitCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} exits", self.total())?;
        for (reason, count) in self.iter().filter(|(_, count)| *count > 0) {
            write!(f, ", {} {count}", reason.name())?;
        }
        Ok(())
    }
}

/// More kinds of places than this are not told apart: the guest chooses the addresses.
const MAX_PLACES: usize = 4096;

/// The counters themselves, and, if asked for, where each access went.
#[derive(Debug)]
pub(crate) struct Exits {
    counts: [AtomicU64; ExitReason::ALL.len()],
    places: Option<Mutex<BTreeMap<(ExitReason, u64), u64>>>,
}

impl Exits {
    pub(crate) fn new(places: bool) -> Self {
        Self {
            counts: Default::default(),
            places: places.then(Mutex::default),
        }
    }

    pub(crate) fn count(&self, reason: ExitReason, place: u64) {
        // They are only ever added up, so no order is needed.
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
        if let Some(places) = &self.places {
            let mut places = places.lock().unwrap_or_else(PoisonError::into_inner);
            if places.len() < MAX_PLACES || places.contains_key(&(reason, place)) {
                *places.entry((reason, place)).or_default() += 1;
            }
        }
    }

    pub(crate) fn counts(&self) -> ExitCounts {
        ExitCounts(std::array::from_fn(|i| self.counts[i].load(Ordering::Relaxed)))
    }

    pub(crate) fn places(&self) -> Vec<(ExitReason, u64, u64)> {
        let Some(places) = &self.places else {
            return Vec::new();
        };
        let places = places.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places: Vec<_> = places.iter().map(|(&(reason, at), &n)| (reason, at, n)).collect();
        places.sort_by_key(|&(_, _, n)| std::cmp::Reverse(n));
        places
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_counted_by_reason_and_place() {
        let exits = Exits::new(true);
        exits.count(ExitReason::PortWrite, 0x3f8);
        exits.count(ExitReason::PortWrite, 0x3f8);
        exits.count(ExitReason::MemoryRead, 0xe000_0000);
        assert_eq!(exits.counts().total(), 3);
        assert_eq!(exits.counts().of(ExitReason::PortWrite), 2);
        assert_eq!(exits.places()[0], (ExitReason::PortWrite, 0x3f8, 2));
        assert_eq!(exits.counts().to_string(), "3 exits, port-write 2, memory-read 1");
    }

    #[test]
    fn a_guest_cannot_make_the_table_of_places_grow_without_end() {
        let exits = Exits::new(true);
        for place in 0..2 * MAX_PLACES as u64 {
            exits.count(ExitReason::MemoryRead, place);
        }
        assert_eq!(exits.places().len(), MAX_PLACES);
        assert_eq!(exits.counts().total(), 2 * MAX_PLACES as u64);
    }
}
