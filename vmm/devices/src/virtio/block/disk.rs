//! The bytes of a disk: one file, or several behind each other.
#![expect(
    unsafe_code,
    reason = "files are read into and written from the guest's memory"
)]

use std::{
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
    sync::atomic::{AtomicU64, Ordering},
};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};

use super::request::{Extent, SECTOR};

/// Files that one disk may consist of.
pub const MAX_FILES: usize = 256;

/// Zeros that are written where a file system knows no better way.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Why files are no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// None, or more than [`MAX_FILES`].
    #[error("a disk of {count} files: 1 to {MAX_FILES} are possible")]
    Files {
        /// How many were given.
        count: usize,
    },
    /// A file cannot be asked for its size.
    #[error("cannot get the size of file {0} of a disk")]
    Size(usize, #[source] io::Error),
    /// Files in the middle of a disk must end where a sector ends, and so must the last.
    #[error("file {index} of a disk has {bytes} bytes, which is not a whole number of sectors")]
    Sectors {
        /// Which file, from zero.
        index: usize,
        /// Its size.
        bytes: u64,
    },
}

#[derive(Debug)]
struct Part {
    file: File,
    start: u64,
}

/// A file's part of a transfer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span<'d> {
    /// Which file.
    pub(super) index: usize,
    pub(super) file: BorrowedFd<'d>,
    pub(super) offset: u64,
    pub(super) bytes: u64,
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    FromDisk,
    ToDisk,
}

/// The files, in order.
#[derive(Debug)]
pub(super) struct Disk {
    parts: Vec<Part>,
    capacity: AtomicU64,
}

fn size_of(file: &File) -> io::Result<u64> {
    // Also right for block devices, whose metadata knows no size.
    Ok(seek(file, SeekFrom::End(0))?)
}

impl Disk {
    pub(super) fn new(files: Vec<File>) -> Result<Self, DiskError> {
        if files.is_empty() || files.len() > MAX_FILES {
            return Err(DiskError::Files { count: files.len() });
        }
        let mut parts = Vec::with_capacity(files.len());
        let mut start = 0u64;
        for (index, file) in files.into_iter().enumerate() {
            let bytes = size_of(&file).map_err(|e| DiskError::Size(index, e))?;
            if !bytes.is_multiple_of(SECTOR) {
                return Err(DiskError::Sectors { index, bytes });
            }
            parts.push(Part { file, start });
            start = start
                .checked_add(bytes)
                .ok_or(DiskError::Sectors { index, bytes })?;
        }
        Ok(Self {
            parts,
            capacity: AtomicU64::new(start),
        })
    }

    /// Bytes of all files.
    pub(super) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Acquire)
    }

    /// Looks at the size of the last file again; whether it has changed.
    pub(super) fn measure(&self) -> Result<bool, DiskError> {
        let index = self.parts.len().saturating_sub(1);
        let Some(last) = self.parts.last() else {
            return Ok(false);
        };
        let bytes = size_of(&last.file).map_err(|e| DiskError::Size(index, e))?;
        // A last sector that is not whole yet is not there yet.
        let capacity = last.start.saturating_add(bytes - bytes % SECTOR);
        Ok(self.capacity.swap(capacity, Ordering::AcqRel) != capacity)
    }

    /// Which parts of which files these bytes are.
    pub(super) fn spans(&self, offset: u64, bytes: u64) -> impl Iterator<Item = Span<'_>> {
        let end = offset.saturating_add(bytes);
        let ends = self.parts.iter().skip(1).map(|next| next.start).chain([u64::MAX]);
        let parts = self.parts.iter().zip(ends).enumerate();
        parts.filter_map(move |(index, (part, part_end))| {
            let (from, to) = (offset.max(part.start), end.min(part_end));
            (from < to).then(|| Span {
                index,
                file: part.file.as_fd(),
                offset: from - part.start,
                bytes: to - from,
            })
        })
    }

    /// All files, in order.
    pub(super) fn descriptors(&self) -> Vec<RawFd> {
        self.parts.iter().map(|part| part.file.as_raw_fd()).collect()
    }

    /// Moves all bytes. A file that ends early is an error.
    pub(super) fn transfer(
        &self,
        direction: Direction,
        offset: u64,
        vectors: &mut Vectors,
    ) -> io::Result<()> {
        for mut span in self.spans(offset, vectors.len() as u64) {
            while span.bytes > 0 {
                let count = move_once(direction, &span, vectors)?;
                span.offset += count;
                span.bytes -= count;
            }
        }
        Ok(())
    }

    /// Everything that was written is on the host's disks.
    pub(super) fn flush(&self) -> io::Result<()> {
        for part in &self.parts {
            fdatasync(&part.file)?;
        }
        Ok(())
    }

    /// Gives space back; contents are undefined afterwards. Where the host cannot, nothing happens.
    pub(super) fn discard(&self, extent: &Extent) -> io::Result<()> {
        for span in self.spans(extent.offset, extent.bytes) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match fallocate(span.file, flags, span.offset, span.bytes) {
                Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Makes bytes zero, and gives their space back if it may.
    pub(super) fn zero(&self, extent: &Extent) -> io::Result<()> {
        let flags = if extent.unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        for span in self.spans(extent.offset, extent.bytes) {
            match fallocate(span.file, flags, span.offset, span.bytes) {
                Ok(()) => {}
                Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(&span)?,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

fn write_zeros(span: &Span<'_>) -> io::Result<()> {
    let mut done = 0;
    while done < span.bytes {
        let count = usize::try_from(span.bytes - done)
            .unwrap_or(usize::MAX)
            .min(ZEROS.len());
        let zeros = ZEROS.get(..count).unwrap_or_default();
        match rustix::io::pwrite(span.file, zeros, span.offset + done) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => done += written as u64,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// One system call; the bytes moved, at least one.
fn move_once(direction: Direction, span: &Span<'_>, vectors: &mut Vectors) -> io::Result<u64> {
    let offset = libc::off_t::try_from(span.offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let most = usize::try_from(span.bytes).unwrap_or(usize::MAX);
    let count = vectors.with_front(most, |front| {
        let length = libc::c_int::try_from(front.len()).unwrap_or(libc::c_int::MAX);
        let fd = span.file.as_raw_fd();
        loop {
            // SAFETY: `Vectors` vouches that each element points to that many bytes of mapped memory, for longer than this call; the
            // length is that of the slice.
            let count = unsafe {
                match direction {
                    Direction::FromDisk => libc::preadv(fd, front.as_ptr(), length, offset),
                    Direction::ToDisk => libc::pwritev(fd, front.as_ptr(), length, offset),
                }
            };
            match usize::try_from(count) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => return Ok(count),
                Err(_) => {
                    let e = io::Error::last_os_error();
                    if e.kind() != io::ErrorKind::Interrupted {
                        return Err(e);
                    }
                }
            }
        }
    })?;
    vectors.advance(count);
    Ok(count as u64)
}

/// Memory for a transfer, consumed from the front.
#[derive(Debug)]
pub(super) struct Vectors {
    all: Vec<libc::iovec>,
    first: usize,
    length: usize,
}

impl Vectors {
    /// # Safety
    ///
    /// Each element must point to that many bytes of memory that stay mapped as long as the result lives, and that may change at any
    /// time (the guest's).
    pub(super) unsafe fn new(all: Vec<libc::iovec>) -> Self {
        let length = all.iter().map(|vector| vector.iov_len).sum();
        Self {
            all,
            first: 0,
            length,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// What is left.
    pub(super) fn rest(&self) -> &[libc::iovec] {
        self.all.get(self.first..).unwrap_or_default()
    }

    /// Lends at most the first `most` bytes.
    fn with_front<T>(&self, most: usize, work: impl FnOnce(&[libc::iovec]) -> T) -> T {
        if most >= self.length {
            return work(self.rest());
        }
        let mut left = most;
        let front: Vec<_> = self
            .rest()
            .iter()
            .map_while(|vector| {
                let iov_len = vector.iov_len.min(left);
                left -= iov_len;
                (iov_len > 0).then_some(libc::iovec { iov_len, ..*vector })
            })
            .collect();
        work(&front)
    }

    /// The first `count` bytes have been moved.
    pub(super) fn advance(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length -= left;
        while let Some(vector) = self.all.get_mut(self.first) {
            if vector.iov_len > left {
                vector.iov_base = vector.iov_base.wrapping_byte_add(left);
                vector.iov_len -= left;
                return;
            }
            left -= vector.iov_len;
            self.first += 1;
        }
    }
}
