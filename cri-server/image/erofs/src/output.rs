//! The image file: written once from front to back through one buffer, and holes where contents turned out not to be needed.
//!
//! Knows blocks and the size limit, and nothing of what is in them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::error::{ErofsError, LimitKind};
use crate::layout::BLOCK;

const BUFFER_BYTES: usize = 1 << 20;

/// Consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) blocks: u64,
}

/// The file that is being written.
pub(crate) struct Output {
    file: File,
    buffer: Box<[u8]>,
    filled: usize,
    /// Where the buffer goes in the file.
    flushed: u64,
    limit: u64,
}

impl Output {
    /// Starts after block 0, which is written last.
    pub(crate) fn new(file: File, limit: u64) -> Result<Self, ErofsError> {
        let bytes = file.metadata().map_err(|source| failed("examine", source))?.len();
        if bytes != 0 {
            return Err(ErofsError::OutputNotEmpty { bytes });
        }
        // More blocks than that have no address.
        let limit = limit.min(u64::from(u32::MAX - 1) * BLOCK);
        Ok(Self {
            file,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            filled: 0,
            flushed: BLOCK,
            limit,
        })
    }

    /// Where the next byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.flushed + self.filled as u64
    }

    /// The block that the next byte starts; the position must be aligned, which it is between files.
    pub(crate) fn next_block(&self) -> u64 {
        self.position() / BLOCK
    }

    /// Fails if the limit leaves no room for that much more, with the padding after it.
    pub(crate) fn check_room(&self, bytes: u64) -> Result<(), ErofsError> {
        let end = self
            .position()
            .checked_add(bytes)
            .and_then(|end| end.checked_next_multiple_of(BLOCK));
        match end {
            Some(end) if end <= self.limit => Ok(()),
            _ => Err(ErofsError::Limit {
                what: LimitKind::ImageBytes,
                limit: self.limit,
            }),
        }
    }

    pub(crate) fn append(&mut self, mut bytes: &[u8]) -> Result<(), ErofsError> {
        self.check_room(bytes.len() as u64)?;
        while !bytes.is_empty() {
            let room = self.room()?;
            let (now, later) = bytes.split_at(room.len().min(bytes.len()));
            room.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
            self.filled += now.len();
            bytes = later;
        }
        Ok(())
    }

    /// Appends that many bytes, which `read` puts right into the buffer, and fills up the last block.
    pub(crate) fn append_blocks(
        &mut self,
        size: u64,
        mut read: impl FnMut(&mut [u8]) -> Result<(), ErofsError>,
    ) -> Result<(), ErofsError> {
        self.check_room(size)?;
        let mut left = size;
        while left > 0 {
            let room = self.room()?;
            let length = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            let part = room.get_mut(..length).unwrap_or_default();
            read(part)?;
            self.filled += length;
            left -= length as u64;
        }
        self.pad_to(self.position().next_multiple_of(BLOCK))
    }

    /// Appends zeros up to a position.
    pub(crate) fn pad_to(&mut self, position: u64) -> Result<(), ErofsError> {
        let mut left = position.saturating_sub(self.position());
        self.check_room(left)?;
        while left > 0 {
            let room = self.room()?;
            let length = usize::try_from(left).map_or(room.len(), |left| left.min(room.len()));
            room.get_mut(..length).unwrap_or_default().fill(0);
            self.filled += length;
            left -= length as u64;
        }
        Ok(())
    }

    /// Gives the blocks of these extents back to the host and makes them read as zeros.
    pub(crate) fn punch(&mut self, mut extents: Vec<Extent>) -> Result<(), ErofsError> {
        if extents.is_empty() {
            return Ok(());
        }
        self.flush()?;
        extents.sort_unstable();
        for Extent { start, blocks } in merge(extents) {
            self.punch_one(start * BLOCK, blocks * BLOCK)?;
        }
        Ok(())
    }

    /// Writes what is buffered, then block 0; answers the file and its length.
    pub(crate) fn finish(mut self, first_block: &[u8; BLOCK as usize]) -> Result<(File, u64), ErofsError> {
        self.pad_to(self.position().next_multiple_of(BLOCK))?;
        self.flush()?;
        self.file
            .write_all_at(first_block, 0)
            .map_err(|source| failed("write the superblock of", source))?;
        Ok((self.file, self.flushed))
    }

    fn punch_one(&mut self, offset: u64, length: u64) -> Result<(), ErofsError> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            match fallocate(&self.file, flags, offset, length) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                // Same bytes on every file system, only not as sparse.
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => return self.overwrite_with_zeros(offset, length),
                Err(errno) => return Err(failed("punch a hole into", errno.into())),
            }
        }
    }

    fn overwrite_with_zeros(&mut self, mut offset: u64, mut length: u64) -> Result<(), ErofsError> {
        // The buffer is empty here: it was flushed before.
        self.buffer.fill(0);
        while length > 0 {
            let part = self
                .buffer
                .get(..length.min(BUFFER_BYTES as u64) as usize)
                .unwrap_or_default();
            self.file
                .write_all_at(part, offset)
                .map_err(|source| failed("clear blocks of", source))?;
            offset += part.len() as u64;
            length -= part.len() as u64;
        }
        Ok(())
    }

    /// The free part of the buffer, never empty.
    fn room(&mut self) -> Result<&mut [u8], ErofsError> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(self.buffer.get_mut(self.filled..).unwrap_or_default())
    }

    fn flush(&mut self) -> Result<(), ErofsError> {
        let bytes = self.buffer.get(..self.filled).unwrap_or_default();
        self.file
            .write_all_at(bytes, self.flushed)
            .map_err(|source| failed("write", source))?;
        self.flushed += self.filled as u64;
        self.filled = 0;
        Ok(())
    }
}

/// Neighbouring extents, sorted, as one.
fn merge(sorted: Vec<Extent>) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    for extent in sorted {
        match merged.last_mut() {
            Some(last) if last.start + last.blocks == extent.start => last.blocks += extent.blocks,
            _ => merged.push(extent),
        }
    }
    merged
}

fn failed(operation: &'static str, source: io::Error) -> ErofsError {
    ErofsError::Output { operation, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_extents_become_one_hole() {
        let extent = |start, blocks| Extent { start, blocks };
        assert_eq!(
            merge(vec![extent(1, 2), extent(3, 1), extent(5, 1)]),
            [extent(1, 3), extent(5, 1)]
        );
    }

    #[test]
    fn zeros_are_written_where_holes_cannot_be_punched() {
        let mut output = Output::new(tempfile::tempfile().unwrap(), 1 << 30).unwrap();
        output.append(&[7; 3 * BLOCK as usize]).unwrap();
        output.flush().unwrap();
        output.overwrite_with_zeros(2 * BLOCK, BLOCK).unwrap();
        let mut bytes = vec![0; 3 * BLOCK as usize];
        output.file.read_exact_at(&mut bytes, BLOCK).unwrap();
        let blocks: Vec<bool> = bytes
            .chunks(BLOCK as usize)
            .map(|b| b.iter().all(|b| *b == 0))
            .collect();
        assert_eq!(blocks, [false, true, false]);
    }
}
