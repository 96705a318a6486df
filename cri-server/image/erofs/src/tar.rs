//! The one tar parser: a stream of bytes in, entries with all their extensions applied out. And headers the other way, in `written.rs`.
//!
//! Reads V7, ustar, star, GNU and PAX headers the way Go's archive/tar does, because that is how the rest of the container world sees
//! the same bytes; wherever parsers are known to disagree (two extension headers, a lone zero block, sparse files) it refuses instead
//! of choosing. Must not know images: names are passed on as they are in the archive.

mod header;
mod pax;
mod written;

use std::io::{BufRead, BufReader, Read};

use crate::error::{ArchiveProblem, ErofsError, LimitKind};
use crate::limits::{MAX_EXTENSION_BYTES, MAX_TRAILING_BYTES};
use header::{BLOCK, Block};
use pax::PaxRecords;

pub use written::member_header;
pub(crate) use written::{END, Written, padding};

/// An entry of the archive. Its contents, if it is a regular file, are read from the [`Archive`] next.
#[derive(Debug)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: EntryKind,
    /// The twelve permission bits.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// Bytes of contents, zero for everything but regular files.
    pub(crate) size: u64,
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum EntryKind {
    Regular,
    Directory,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    Char { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
}

/// Seconds since the epoch, rounded down, and nanoseconds on top of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Timestamp {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

/// A tar archive as it streams by.
pub(crate) struct Archive<R> {
    input: BufReader<R>,
    /// Bytes taken from the input.
    offset: u64,
    /// Contents of the current entry that were not read yet, and the zeros that fill up its last block.
    unread: u64,
    padding: u64,
    max_path_bytes: usize,
}

/// Global extension headers before one entry; they have no effect, so nobody needs many.
const MAX_GLOBAL_HEADERS: u32 = 16;

/// Extension headers that apply to the next entry.
#[derive(Default)]
struct Extensions {
    pax: Option<PaxRecords>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl Extensions {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

impl<R: Read> Archive<R> {
    pub(crate) fn new(input: R, max_path_bytes: usize) -> Self {
        Self {
            input: BufReader::with_capacity(64 << 10, input),
            offset: 0,
            unread: 0,
            padding: 0,
            max_path_bytes,
        }
    }

    /// The next entry, or `None` at the end of the archive. What is left of the entry before is skipped.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, ErofsError> {
        let mut extensions = Extensions::default();
        let mut global_headers = 0;
        loop {
            self.skip_contents()?;
            let Some(block) = self.next_header()? else {
                if extensions.is_empty() {
                    return Ok(None);
                }
                return Err(self.problem(ArchiveProblem::DanglingExtension));
            };
            match block.type_flag() {
                b'x' => {
                    let records = self.extension(&block)?;
                    let records = PaxRecords::parse(&records).map_err(|problem| self.problem(problem))?;
                    self.set_once(&mut extensions.pax, records)?;
                }
                b'g' => {
                    let records = self.extension(&block)?;
                    let records = PaxRecords::parse(&records).map_err(|problem| self.problem(problem))?;
                    // Like Go we do not apply them; what would change what an entry *is* cannot be passed over.
                    global_headers += 1;
                    if records.changes_framing() || global_headers > MAX_GLOBAL_HEADERS {
                        return Err(self.problem(ArchiveProblem::Ambiguous));
                    }
                }
                b'L' => {
                    let name = c_string(self.extension(&block)?);
                    self.set_once(&mut extensions.long_name, name)?;
                }
                b'K' => {
                    let name = c_string(self.extension(&block)?);
                    self.set_once(&mut extensions.long_link, name)?;
                }
                _ => return self.entry(&block, extensions).map(Some),
            }
        }
    }

    /// Fills `buf` from the contents of the current entry; at most what [`Entry::size`] promised may be asked for.
    pub(crate) fn read_contents(&mut self, buf: &mut [u8]) -> Result<(), ErofsError> {
        let wanted = buf.len() as u64;
        debug_assert!(wanted <= self.unread);
        self.read_exact(buf)?;
        self.unread = self.unread.saturating_sub(wanted);
        Ok(())
    }

    /// Bytes taken from the input: after [`Archive::next_entry`], where the entry's contents begin.
    pub(crate) fn position(&self) -> u64 {
        self.offset
    }

    /// Reads what follows the archive until the input ends, so that digests over it are complete.
    pub(crate) fn drain(mut self) -> Result<(), ErofsError> {
        let end = self.offset;
        loop {
            let n = self.fill()?;
            if n == 0 {
                return Ok(());
            }
            self.consume(n);
            if self.offset - end > MAX_TRAILING_BYTES {
                return Err(ErofsError::Limit {
                    what: LimitKind::TrailingBytes,
                    limit: MAX_TRAILING_BYTES,
                });
            }
        }
    }

    /// The next header block, or `None` at the end: two zero blocks, or the input's end where a header could start.
    fn next_header(&mut self) -> Result<Option<Block>, ErofsError> {
        let Some(block) = self.read_block()? else {
            return Ok(None);
        };
        if block.is_zero() {
            return match self.read_block()? {
                Some(second) if !second.is_zero() => Err(self.problem(ArchiveProblem::LoneZeroBlock)),
                _ => Ok(None),
            };
        }
        if !block.checksum_matches() {
            return Err(self.problem(ArchiveProblem::Checksum));
        }
        Ok(Some(block))
    }

    fn read_block(&mut self) -> Result<Option<Block>, ErofsError> {
        if self.fill()? == 0 {
            return Ok(None);
        }
        let mut block = [0; BLOCK];
        self.read_exact(&mut block)?;
        Ok(Some(Block(block)))
    }

    /// The contents of an extension header.
    fn extension(&mut self, block: &Block) -> Result<Vec<u8>, ErofsError> {
        let size = block.size().map_err(|problem| self.problem(problem))?;
        let length = usize::try_from(size).ok().filter(|_| size <= MAX_EXTENSION_BYTES);
        let length = length.ok_or_else(|| self.problem(ArchiveProblem::ExtensionTooLong(size)))?;
        self.expect_contents(size);
        let mut contents = vec![0; length];
        self.read_contents(&mut contents)?;
        Ok(contents)
    }

    fn set_once<T>(&self, slot: &mut Option<T>, value: T) -> Result<(), ErofsError> {
        if slot.replace(value).is_some() {
            return Err(self.problem(ArchiveProblem::Ambiguous));
        }
        Ok(())
    }

    fn entry(&mut self, block: &Block, extensions: Extensions) -> Result<Entry, ErofsError> {
        let entry = assemble(block, extensions).map_err(|problem| self.problem(problem))?;
        let link = match &entry.kind {
            EntryKind::HardLink(target) | EntryKind::Symlink(target) => target.len(),
            _ => 0,
        };
        if entry.path.len().max(link) > self.max_path_bytes {
            return Err(ErofsError::Limit {
                what: LimitKind::PathBytes,
                limit: self.max_path_bytes as u64,
            });
        }
        self.expect_contents(entry.size);
        Ok(entry)
    }

    fn expect_contents(&mut self, size: u64) {
        self.unread = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    fn skip_contents(&mut self) -> Result<(), ErofsError> {
        // Both are bounded by sizes that were checked to be below 2^63.
        let mut left = self.unread + self.padding;
        while left > 0 {
            let available = self.fill()? as u64;
            if available == 0 {
                return Err(self.problem(ArchiveProblem::CutShort));
            }
            let taken = available.min(left);
            self.consume(taken as usize);
            left -= taken;
        }
        (self.unread, self.padding) = (0, 0);
        Ok(())
    }

    fn fill(&mut self) -> Result<usize, ErofsError> {
        loop {
            match self.input.fill_buf() {
                Ok(bytes) => return Ok(bytes.len()),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ErofsError::Input {
                        offset: self.offset,
                        source,
                    });
                }
            }
        }
    }

    fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.offset += n as u64;
    }

    fn read_exact(&mut self, mut buf: &mut [u8]) -> Result<(), ErofsError> {
        while !buf.is_empty() {
            match self.input.read(buf) {
                Ok(0) => return Err(self.problem(ArchiveProblem::CutShort)),
                Ok(n) => {
                    self.offset += n as u64;
                    buf = buf.get_mut(n..).unwrap_or_default();
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(ErofsError::Input {
                        offset: self.offset,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    fn problem(&self, problem: ArchiveProblem) -> ErofsError {
        ErofsError::Archive {
            offset: self.offset,
            problem,
        }
    }
}

/// One entry out of its header and what came before it.
fn assemble(block: &Block, extensions: Extensions) -> Result<Entry, ArchiveProblem> {
    let pax = extensions.pax.unwrap_or_default();
    if pax.sparse || block.type_flag() == b'S' {
        return Err(ArchiveProblem::Sparse);
    }
    let path = one_name(pax.path, extensions.long_name)?.unwrap_or_else(|| block.path());
    let link = one_name(pax.link, extensions.long_link)?.unwrap_or_else(|| block.link());
    let kind = match block.type_flag() {
        0 if path.ends_with(b"/") => EntryKind::Directory,
        0 | b'0' | b'7' => EntryKind::Regular,
        b'1' => EntryKind::HardLink(link),
        b'2' => EntryKind::Symlink(link),
        b'3' => block
            .device()
            .map(|(major, minor)| EntryKind::Char { major, minor })?,
        b'4' => block
            .device()
            .map(|(major, minor)| EntryKind::Block { major, minor })?,
        b'5' => EntryKind::Directory,
        b'6' => EntryKind::Fifo,
        other => return Err(ArchiveProblem::EntryType(other)),
    };
    // Only regular files have contents, whatever the size field of the others says: Go reads it so.
    let header_size = block.size();
    let size = match kind {
        EntryKind::Regular => match pax.size {
            Some(size) => size,
            None => header_size?,
        },
        _ => 0,
    };
    Ok(Entry {
        path,
        kind,
        mode: block.mode()?,
        uid: owner(pax.uid, block.uid(), "uid")?,
        gid: owner(pax.gid, block.gid(), "gid")?,
        mtime: match pax.mtime {
            Some(mtime) => mtime,
            None => Timestamp {
                seconds: block.mtime()?,
                nanoseconds: 0,
            },
        },
        size,
        xattrs: pax.xattrs,
    })
}

/// A name that may be given in two ways, which then have to agree.
fn one_name(pax: Option<Vec<u8>>, gnu: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, ArchiveProblem> {
    match (pax, gnu) {
        (Some(a), Some(b)) if a != b => Err(ArchiveProblem::Ambiguous),
        (a, b) => Ok(a.or(b)),
    }
}

/// A user or group: `u32::MAX` means "none" to Linux and cannot own files.
fn owner(
    pax: Option<i64>,
    header: Result<i64, ArchiveProblem>,
    field: &'static str,
) -> Result<u32, ArchiveProblem> {
    let value = match pax {
        Some(value) => value,
        None => header?,
    };
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(ArchiveProblem::OutOfRange(field))
}

/// A name up to its first NUL.
fn c_string(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|b| *b == 0) {
        bytes.truncate(end);
    }
    bytes
}
