//! Gives out ranges of addresses: BARs, persistent memory, pluggable memory.

use std::{collections::BTreeMap, ops::Range};

/// A range of addresses of which parts are given out, first fit, aligned to a power of two.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    range: Range<u64>,
    taken: BTreeMap<u64, u64>,
}

impl Window {
    /// All of it is free.
    #[must_use]
    pub fn new(range: Range<u64>) -> Self {
        Self {
            range,
            taken: BTreeMap::new(),
        }
    }

    /// The whole of it.
    #[must_use]
    pub fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    /// Does the range lie inside?
    #[must_use]
    pub fn contains(&self, start: u64, size: u64) -> bool {
        start >= self.range.start && start.checked_add(size).is_some_and(|end| end <= self.range.end)
    }

    /// The lowest free `size` bytes whose address is a multiple of `align`, a power of two.
    pub fn allocate(&mut self, size: u64, align: u64) -> Option<u64> {
        if size == 0 || !align.is_power_of_two() {
            return None;
        }
        let mut candidate = self.range.start.checked_next_multiple_of(align)?;
        for (&start, &taken) in &self.taken {
            if candidate.checked_add(size)? <= start {
                break;
            }
            candidate = candidate.max(start.checked_add(taken)?.checked_next_multiple_of(align)?);
        }
        if !self.contains(candidate, size) {
            return None;
        }
        self.taken.insert(candidate, size);
        Some(candidate)
    }

    /// Takes back what starts there; whether there was anything.
    pub fn free(&mut self, start: u64) -> bool {
        self.taken.remove(&start).is_some()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_window_gives_nothing_until_something_is_given_back() {
        let mut window = Window::new(0x1000..0x3000);
        assert_eq!(window.allocate(0x1000, 0x1000), Some(0x1000));
        assert_eq!(window.allocate(0x1000, 0x1000), Some(0x2000));
        assert_eq!(window.allocate(1, 1), None);
        assert!(window.free(0x1000));
        assert_eq!(window.allocate(0x800, 0x800), Some(0x1000));
        assert_eq!(window.allocate(0x800, 0x800), Some(0x1800));
    }

    proptest! {
        #[test]
        fn what_is_given_out_is_aligned_inside_and_never_given_twice(
            start in 0u64..200,
            steps in prop::collection::vec((1u64..40, 0u32..6, any::<bool>()), 1..40),
        ) {
            let mut window = Window::new(start..start + 300);
            let mut held: Vec<(u64, u64)> = Vec::new();
            for (size, order, give_back) in steps {
                if give_back && !held.is_empty() {
                    let (at, _) = held.remove(0);
                    prop_assert!(window.free(at));
                    continue;
                }
                let align = 1u64 << order;
                let Some(at) = window.allocate(size, align) else {
                    // Then no aligned place is free.
                    for at in (start..start + 300).filter(|at| at % align == 0 && at + size <= start + 300) {
                        prop_assert!(held.iter().any(|&(s, n)| at < s + n && s < at + size));
                    }
                    continue;
                };
                prop_assert!(at % align == 0 && window.contains(at, size));
                prop_assert!(held.iter().all(|&(s, n)| at + size <= s || s + n <= at));
                held.push((at, size));
            }
        }

        #[test]
        fn ends_of_the_address_space_do_not_overflow(start in any::<u64>(), end in any::<u64>(), size in any::<u64>(), order in 0u32..64) {
            let mut window = Window::new(start..end);
            for _ in 0..3 {
                if let Some(at) = window.allocate(size, 1 << order) {
                    prop_assert!(at >= start && at.checked_add(size).is_some_and(|last| last <= end));
                }
            }
        }
    }
}
