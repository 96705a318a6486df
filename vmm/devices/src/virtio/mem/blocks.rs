//! Which blocks of a memory device are plugged, and which pieces of the machine's memory they need.
//!
//! Memory is added to the machine in *chunks* of many blocks: a chunk is there while any of its blocks is plugged. So a small guest of a
//! large maximum costs little, and memory that was never plugged cannot be touched.

use std::ops::Range;

/// Sizes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Where the region lies in the guest's memory.
    pub address: u64,
    /// The most that can ever be plugged; a multiple of `chunk`.
    pub region: u64,
    /// What is plugged at once; a power of two.
    pub block: u64,
    /// What is added to the machine at once; a power of two, at least `block`.
    pub chunk: u64,
}

impl Layout {
    /// Is everything a multiple of what it must be?
    #[must_use]
    pub fn is_valid(&self) -> bool {
        let Self {
            address,
            region,
            block,
            chunk,
        } = *self;
        block.is_power_of_two()
            && chunk.is_power_of_two()
            && block >= 4096
            && chunk >= block
            && region > 0
            && region.is_multiple_of(chunk)
            && address.is_multiple_of(chunk)
            && address.checked_add(region).is_some()
            && usize::try_from(region / block).is_ok()
    }
}

/// Whether blocks are plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plugged {
    /// All of them.
    All,
    /// None of them.
    None,
    /// Some.
    Some,
}

/// The blocks of one device.
#[derive(Debug, Clone)]
pub struct Blocks {
    layout: Layout,
    plugged: Vec<bool>,
    count: u64,
}

impl Blocks {
    /// Nothing is plugged. `layout` must be valid.
    #[must_use]
    pub fn new(layout: Layout) -> Self {
        let blocks = usize::try_from(layout.region / layout.block).unwrap_or(0);
        Self {
            layout,
            plugged: vec![false; blocks],
            count: 0,
        }
    }

    /// Bytes that are plugged.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.count * self.layout.block
    }

    /// The blocks of a request, by number; `None` unless they are all in the region.
    #[must_use]
    pub fn range(&self, address: u64, blocks: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.layout.address)?;
        if blocks == 0 || !offset.is_multiple_of(self.layout.block) {
            return None;
        }
        let first = usize::try_from(offset / self.layout.block).ok()?;
        let end = first.checked_add(usize::from(blocks))?;
        (end <= self.plugged.len()).then_some(first..end)
    }

    /// Are they plugged?
    #[must_use]
    pub fn state(&self, range: Range<usize>) -> Plugged {
        let blocks = self.plugged.get(range).unwrap_or_default();
        match (blocks.contains(&true), blocks.contains(&false)) {
            (true, false) => Plugged::All,
            (false, _) => Plugged::None,
            (true, true) => Plugged::Some,
        }
    }

    /// Marks blocks that were all in the other state.
    pub fn mark(&mut self, range: Range<usize>, plugged: bool) {
        for block in self.plugged.get_mut(range).unwrap_or_default() {
            if *block != plugged {
                *block = plugged;
                self.count = if plugged { self.count + 1 } else { self.count - 1 };
            }
        }
    }

    /// What is plugged: first address and bytes of each piece, in order.
    #[must_use]
    pub fn pieces(&self) -> Vec<(u64, u64)> {
        let mut pieces: Vec<(u64, u64)> = Vec::new();
        for (index, _) in self.plugged.iter().enumerate().filter(|(_, plugged)| **plugged) {
            let (start, bytes) = self.place(&(index..index + 1));
            match pieces.last_mut().filter(|(at, length)| at + *length == start) {
                Some((_, length)) => *length += bytes,
                None => pieces.push((start, bytes)),
            }
        }
        pieces
    }

    /// Marks one of [`Blocks::pieces`] as plugged; `None` if it is no such piece, or is plugged already.
    pub fn restore(&mut self, start: u64, bytes: u64) -> Option<()> {
        let offset = start.checked_sub(self.layout.address)?;
        let end = offset.checked_add(bytes)?;
        let whole = offset.is_multiple_of(self.layout.block) && bytes.is_multiple_of(self.layout.block);
        if !whole || bytes == 0 || end > self.layout.region {
            return None;
        }
        let [first, end] = [offset, end].map(|at| usize::try_from(at / self.layout.block).ok());
        let range = first?..end?;
        if self.state(range.clone()) != Plugged::None {
            return None;
        }
        self.mark(range, true);
        Some(())
    }

    /// Chunks that these blocks lie in and of which nothing is plugged, by address.
    #[must_use]
    pub fn empty_chunks(&self, range: Range<usize>) -> Vec<u64> {
        let Some(last) = range.end.checked_sub(1).filter(|last| *last >= range.start) else {
            return Vec::new();
        };
        let each = self.blocks_in_chunk();
        (range.start / each..=last / each)
            .filter(|chunk| self.state(chunk * each..(chunk + 1) * each) == Plugged::None)
            .map(|chunk| self.layout.address + chunk as u64 * self.layout.chunk)
            .collect()
    }

    /// Address and size of blocks.
    #[must_use]
    pub fn place(&self, range: &Range<usize>) -> (u64, u64) {
        let block = self.layout.block;
        (
            self.layout.address + range.start as u64 * block,
            range.len() as u64 * block,
        )
    }

    /// All blocks.
    #[must_use]
    pub fn all(&self) -> Range<usize> {
        0..self.plugged.len()
    }

    /// Chunks of which something is plugged, by address.
    #[must_use]
    pub fn used_chunks(&self) -> Vec<u64> {
        let each = self.blocks_in_chunk();
        (0..self.plugged.len() / each)
            .filter(|chunk| self.state(chunk * each..(chunk + 1) * each) != Plugged::None)
            .map(|chunk| self.layout.address + chunk as u64 * self.layout.chunk)
            .collect()
    }

    fn blocks_in_chunk(&self) -> usize {
        // At least one in a valid layout.
        usize::try_from(self.layout.chunk / self.layout.block)
            .unwrap_or(usize::MAX)
            .max(1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LAYOUT: Layout = Layout {
        address: 0x1_0000_0000,
        region: 64 << 20,
        block: 2 << 20,
        chunk: 8 << 20,
    };

    #[test]
    fn layouts_that_are_none_are_invalid() {
        assert!(LAYOUT.is_valid());
        for wrong in [
            Layout {
                block: 3 << 20,
                ..LAYOUT
            },
            Layout {
                block: 16 << 20,
                ..LAYOUT
            },
            Layout {
                region: 12 << 20,
                ..LAYOUT
            },
            Layout { region: 0, ..LAYOUT },
            Layout {
                address: 4 << 20,
                ..LAYOUT
            },
            Layout {
                address: u64::MAX - (8 << 20) + 1,
                ..LAYOUT
            },
            Layout { block: 512, ..LAYOUT },
        ] {
            assert!(!wrong.is_valid(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn chunks_are_used_exactly_while_a_block_in_them_is_plugged(
            steps in prop::collection::vec((0u64..40, 1u16..12, any::<bool>()), 1..40)
        ) {
            let mut blocks = Blocks::new(LAYOUT);
            let mut model = [false; 32];
            for (first, count, plug) in steps {
                let range = blocks.range(LAYOUT.address + first * LAYOUT.block, count);
                prop_assert_eq!(range.is_some(), first + u64::from(count) <= 32);
                let Some(range) = range else { continue };
                let before = blocks.used_chunks();
                let wanted = if plug { Plugged::None } else { Plugged::All };
                if blocks.state(range.clone()) != wanted {
                    continue;
                }
                let fresh = blocks.empty_chunks(range.clone());
                blocks.mark(range.clone(), plug);
                model[range.clone()].fill(plug);
                let after = blocks.used_chunks();
                if plug {
                    let mut sum = [before, fresh].concat();
                    sum.sort_unstable();
                    prop_assert_eq!(sum, after);
                } else {
                    let gone = blocks.empty_chunks(range);
                    let mut sum = [after, gone].concat();
                    sum.sort_unstable();
                    prop_assert_eq!(sum, before);
                }
                prop_assert_eq!(blocks.bytes(), model.iter().filter(|b| **b).count() as u64 * LAYOUT.block);
            }
        }

        #[test]
        fn no_request_is_too_odd(address in any::<u64>(), count in any::<u16>()) {
            let blocks = Blocks::new(LAYOUT);
            if let Some(range) = blocks.range(address, count) {
                prop_assert!(range.end <= 32 && address >= LAYOUT.address);
            }
        }
    }
}
