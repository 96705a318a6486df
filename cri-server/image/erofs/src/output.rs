//! What is written: once, from front to back, through one buffer.
//!
//! Knows blocks and the size limit, and nothing of what is in them.

use std::io::{self, Write};

use crate::error::{ErofsError, LimitKind};
use crate::layout::BLOCK;

const BUFFER_BYTES: usize = 1 << 20;

/// The file that is being written.
pub(crate) struct Output<W> {
    sink: W,
    buffer: Box<[u8]>,
    filled: usize,
    /// Bytes that the sink has.
    flushed: u64,
    limit: u64,
}

impl<W: Write> Output<W> {
    pub(crate) fn new(sink: W, limit: u64) -> Self {
        Self {
            sink,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            filled: 0,
            flushed: 0,
            // More blocks than that have no address.
            limit: limit.min(u64::from(u32::MAX - 1) * BLOCK),
        }
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
        self.pad()
    }

    /// Fills up the last block with zeros.
    pub(crate) fn pad(&mut self) -> Result<(), ErofsError> {
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

    /// Writes what is buffered; answers the sink and how much it has got, whole blocks.
    pub(crate) fn finish(mut self) -> Result<(W, u64), ErofsError> {
        self.pad()?;
        self.flush()?;
        self.sink.flush().map_err(failed)?;
        Ok((self.sink, self.flushed))
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
        self.sink.write_all(bytes).map_err(failed)?;
        self.flushed += self.filled as u64;
        self.filled = 0;
        Ok(())
    }
}

fn failed(source: io::Error) -> ErofsError {
    ErofsError::Output { source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_appended_comes_out_in_whole_blocks() {
        let mut output = Output::new(Vec::new(), 1 << 30);
        output.append(b"head").unwrap();
        output.pad().unwrap();
        assert_eq!(output.next_block(), 1);
        let mut next = 0u8;
        let fill = |part: &mut [u8]| {
            part.iter_mut().for_each(|byte| {
                *byte = next;
                next = next.wrapping_add(1);
            });
            Ok(())
        };
        output.append_blocks(BUFFER_BYTES as u64 + 1, fill).unwrap();
        let (bytes, length) = output.finish().unwrap();
        assert_eq!(length, bytes.len() as u64);
        assert_eq!(length, BUFFER_BYTES as u64 + 2 * BLOCK);
        let (head, contents) = bytes.split_at(BLOCK as usize);
        assert!(head.starts_with(b"head\0\0"));
        assert!(
            contents
                .iter()
                .take(1000)
                .enumerate()
                .all(|(i, byte)| *byte == i as u8)
        );
    }

    #[test]
    fn the_limit_counts_the_padding() {
        let mut output = Output::new(Vec::new(), 2 * BLOCK);
        output.append(b"x").unwrap();
        output.pad().unwrap();
        assert!(output.check_room(BLOCK).is_ok());
        assert!(output.append(&[0; BLOCK as usize + 1]).is_err());
    }
}
