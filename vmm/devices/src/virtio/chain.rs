//! The buffers of one descriptor chain (virtio 1.2, section 2.7.4): first what the device may read, then what it may write.
//!
//! A chain is taken whole or not at all: one with a descriptor outside of memory, with a loop, with a device-readable buffer after a
//! device-writable one, or with more pieces or bytes than anybody needs, is no chain.

use std::{marker::PhantomData, ops::Deref};

use virtio_queue::DescriptorChain;
use vm_memory::{GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Pieces of memory that one chain may consist of; what one system call takes.
pub const MAX_PIECES: usize = 1024;

/// Bytes that one chain may describe in each direction; a used length must be able to say it.
pub const MAX_BYTES: usize = u32::MAX as usize;

/// Why a chain is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A buffer is not in the guest's memory.
    #[error("a buffer is outside of memory")]
    OutOfMemory,
    /// A buffer to read follows one to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// More than [`MAX_PIECES`] or [`MAX_BYTES`], or without an end.
    #[error("the chain is too long")]
    TooLong,
}

/// Memory of the guest in pieces, consumed from the front.
#[derive(Debug, Clone, Default)]
pub struct Pieces<'m> {
    /// Reversed: the front is the last.
    pieces: Vec<VolatileSlice<'m>>,
    length: usize,
}

impl<'m> Pieces<'m> {
    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.length
    }

    /// Is nothing left?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Takes the first `count` bytes off; `None` (and nothing taken) if there are fewer.
    pub fn take(&mut self, count: usize) -> Option<Pieces<'m>> {
        if count > self.length {
            return None;
        }
        let mut taken = Vec::new();
        let mut left = count;
        while left > 0 {
            let piece = self.pieces.pop()?;
            if piece.len() > left {
                let (front, back) = piece.split_at(left).ok()?;
                self.pieces.push(back);
                taken.push(front);
                left = 0;
            } else {
                left -= piece.len();
                taken.push(piece);
            }
        }
        taken.reverse();
        self.length -= count;
        Some(Pieces {
            pieces: taken,
            length: count,
        })
    }

    /// Takes all but the last `count` bytes off; `None` (and nothing taken) if there are fewer.
    pub fn take_all_but(&mut self, count: usize) -> Option<Pieces<'m>> {
        self.take(self.length.checked_sub(count)?)
    }

    /// Copies the first bytes out and consumes them; whether there were that many.
    pub fn read(&mut self, bytes: &mut [u8]) -> bool {
        let Some(front) = self.take(bytes.len()) else {
            return false;
        };
        let mut rest = bytes;
        for piece in front.iter() {
            let (now, later) = rest.split_at_mut(piece.len().min(rest.len()));
            piece.copy_to(now);
            rest = later;
        }
        true
    }

    /// Copies bytes to the front and consumes it; whether there was room for all.
    pub fn write(&mut self, bytes: &[u8]) -> bool {
        let Some(front) = self.take(bytes.len()) else {
            return false;
        };
        let mut rest = bytes;
        for piece in front.iter() {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        }
        true
    }

    /// The pieces, from the front.
    pub fn iter(&self) -> impl Iterator<Item = &VolatileSlice<'m>> {
        self.pieces.iter().rev()
    }

    /// For `readv` and `writev`: valid as long as the memory is borrowed.
    #[must_use]
    pub fn iovecs(&self) -> IoVecs<'m> {
        let vectors = self
            .iter()
            .map(|piece| libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            })
            .collect();
        IoVecs {
            vectors,
            memory: PhantomData,
        }
    }

    fn push(&mut self, piece: VolatileSlice<'m>) {
        self.length += piece.len();
        self.pieces.push(piece);
    }
}

/// Pieces of the guest's memory as system calls take them.
#[derive(Debug)]
pub struct IoVecs<'m> {
    vectors: Vec<libc::iovec>,
    memory: PhantomData<&'m ()>,
}

impl Deref for IoVecs<'_> {
    type Target = [libc::iovec];

    fn deref(&self) -> &[libc::iovec] {
        &self.vectors
    }
}

/// Both directions of a chain.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    /// What the driver says.
    pub readable: Pieces<'m>,
    /// Where the device answers.
    pub writable: Pieces<'m>,
}

impl<'m> Buffers<'m> {
    /// Takes a chain apart.
    pub fn of<M>(memory: &'m GuestMemoryMmap, mut chain: DescriptorChain<M>) -> Result<Self, ChainError>
    where
        M: Deref<Target = GuestMemoryMmap>,
    {
        let mut buffers = Self::default();
        let mut ended = false;
        for descriptor in chain.by_ref() {
            let writable = descriptor.is_write_only();
            let (pieces, access) = if writable {
                (&mut buffers.writable, Permissions::Write)
            } else if buffers.writable.pieces.is_empty() {
                (&mut buffers.readable, Permissions::Read)
            } else {
                return Err(ChainError::Order);
            };
            let length = usize::try_from(descriptor.len()).map_err(|_| ChainError::TooLong)?;
            if pieces
                .length
                .checked_add(length)
                .is_none_or(|sum| sum > MAX_BYTES)
            {
                return Err(ChainError::TooLong);
            }
            ended = !descriptor.has_next();
            if length == 0 {
                continue;
            }
            let slices = GuestMemory::get_slices(memory, descriptor.addr(), length, access);
            for slice in slices.map_err(|_| ChainError::OutOfMemory)? {
                let slice = slice.map_err(|_| ChainError::OutOfMemory)?;
                if pieces.pieces.len() >= MAX_PIECES {
                    return Err(ChainError::TooLong);
                }
                pieces.push(slice);
            }
        }
        // The iterator also ends at a loop, and at a table that makes no sense.
        if !ended {
            return Err(ChainError::TooLong);
        }
        buffers.readable.pieces.reverse();
        buffers.writable.pieces.reverse();
        Ok(buffers)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{GuestAddress, GuestMemory};

    use super::*;

    /// What is done to pieces.
    #[derive(Debug, Clone)]
    enum Step {
        Take(usize),
        TakeAllBut(usize),
        Read(usize),
        Write(Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0usize..80).prop_map(Step::Take),
            (0usize..80).prop_map(Step::TakeAllBut),
            (0usize..80).prop_map(Step::Read),
            prop::collection::vec(any::<u8>(), 0..80).prop_map(Step::Write),
        ]
    }

    fn bytes_of(pieces: &Pieces<'_>) -> Vec<u8> {
        let mut bytes = vec![0; pieces.len()];
        assert!(pieces.clone().read(&mut bytes));
        assert_eq!(pieces.iter().map(VolatileSlice::len).sum::<usize>(), bytes.len());
        let vectors = pieces.iovecs();
        assert_eq!(
            vectors.iter().map(|vector| vector.iov_len).sum::<usize>(),
            bytes.len()
        );
        bytes
    }

    proptest! {
        #[test]
        fn pieces_are_a_sequence_of_bytes_however_it_is_cut(
            lengths in prop::collection::vec(1usize..40, 0..8),
            steps in prop::collection::vec(step(), 0..12),
        ) {
            let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
            let mut pieces = Pieces::default();
            let mut model = Vec::new();
            // Apart from each other, so that nothing leaks from one into the next.
            for (place, length) in (0u64..).step_by(64).zip(&lengths) {
                for slice in GuestMemory::get_slices(&memory, GuestAddress(place), *length, Permissions::Read).unwrap() {
                    let slice = slice.unwrap();
                    let content: Vec<u8> = (0..slice.len()).map(|at| (place as usize + at * 7) as u8).collect();
                    slice.copy_from(&content);
                    model.extend(content);
                    pieces.push(slice);
                }
            }
            pieces.pieces.reverse();
            for step in steps {
                prop_assert_eq!(bytes_of(&pieces), model.as_slice());
                match step {
                    Step::Take(count) => match pieces.take(count) {
                        Some(taken) => {
                            let rest = model.split_off(count);
                            prop_assert_eq!(bytes_of(&taken), std::mem::replace(&mut model, rest));
                        }
                        None => prop_assert!(count > model.len()),
                    },
                    Step::TakeAllBut(count) => match pieces.take_all_but(count) {
                        Some(taken) => {
                            let rest = model.split_off(model.len() - count);
                            prop_assert_eq!(bytes_of(&taken), std::mem::replace(&mut model, rest));
                        }
                        None => prop_assert!(count > model.len()),
                    },
                    Step::Read(count) => {
                        let mut bytes = vec![0; count];
                        let whole = pieces.read(&mut bytes);
                        prop_assert_eq!(whole, count <= model.len());
                        if whole {
                            let rest = model.split_off(count);
                            prop_assert_eq!(bytes, std::mem::replace(&mut model, rest));
                        }
                    }
                    Step::Write(bytes) => {
                        let target = pieces.clone();
                        let whole = pieces.write(&bytes);
                        prop_assert_eq!(whole, bytes.len() <= model.len());
                        if whole {
                            drop(model.drain(..bytes.len()));
                            prop_assert_eq!(&bytes_of(&target)[..bytes.len()], bytes.as_slice());
                        }
                    }
                }
            }
        }
    }
}
