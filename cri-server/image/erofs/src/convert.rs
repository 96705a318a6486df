//! A layer archive in, a converted layer out, in one pass and in bounded memory, whatever the layer's size.
//!
//! ```text
//! contents of a file, block aligned │ ... │ records │ contents │ ... │ records │ table of records │ footer
//! ```
//!
//! Contents go out as they stream by; the entries they belong to become records, which go out whenever there is [`CHUNK_BYTES`] of them.
//! Nothing in here depends on other layers, so layers are converted side by side, once each, and equal archives give equal bytes.
//! What an entry does to the layers below is [`crate::Composer`]'s business.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use crate::error::{EntryProblem, ErofsError, LimitKind, Refusal};
use crate::layout::{BLOCK, device_number};
use crate::limits::{Limits, MAX_SYMLINK_BYTES};
use crate::output::Output;
use crate::path::{self, Destination};
use crate::record::{Kind, MAX_RECORD_BYTES, Record};
use crate::tar::{Archive, Entry, EntryKind};
use crate::tree::Attributes;
use crate::xattr;

/// Records are written when there is this much of them.
const CHUNK_BYTES: usize = 1 << 20;
/// So no chunk is longer than this.
const MAX_CHUNK_BYTES: usize = CHUNK_BYTES + MAX_RECORD_BYTES;
/// A chunk in the table: its first block and its length.
const CHUNK_ENTRY_BYTES: usize = 8;
/// What the last block of a converted layer begins with. The digit is the form's version.
const MAGIC: &[u8; 16] = b"caisson layer 1\n";
/// Magic, first block of the table, chunks, entries, bytes of contents.
const FOOTER_BYTES: usize = 16 + 4 + 4 + 8 + 8;

/// What a converted layer has in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// Archive entries, whiteouts included, extension headers not.
    pub entries: u64,
    /// Bytes of file contents. A layer without any is no part of an image's disk.
    pub data_bytes: u64,
    /// Length of the converted layer, a multiple of 4096.
    pub bytes: u64,
}

/// Converts one uncompressed layer archive; answers the sink as well.
///
/// Reads until the archive's end, then drains the reader to its end so that digests over it are complete; what follows the archive is
/// ignored, as tar does, up to a cap. After an error what the sink has got is of no use.
pub fn convert_layer<W: Write>(
    tar: impl Read,
    sink: W,
    limits: &Limits,
) -> Result<(W, LayerSummary), ErofsError> {
    let mut archive = Archive::new(tar, limits.max_path_bytes.min(u16::MAX.into()));
    let mut conversion = Conversion {
        limits,
        output: Output::new(sink, limits.max_image_bytes),
        records: Vec::new(),
        chunks: Vec::new(),
        entries: 0,
        data_bytes: 0,
    };
    while let Some(entry) = archive.next_entry()? {
        conversion.entry(entry, &mut archive)?;
    }
    archive.drain()?;
    conversion.finish()
}

struct Conversion<'a, W> {
    limits: &'a Limits,
    output: Output<W>,
    /// Encoded, not written yet.
    records: Vec<u8>,
    chunks: Vec<Chunk>,
    entries: u64,
    data_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    start: u32,
    bytes: u32,
}

impl<W: Write> Conversion<'_, W> {
    fn entry<R: Read>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<(), ErofsError> {
        self.count(entry.size)?;
        let path = entry.path.clone();
        let Some(kind) = self.kind(&entry, archive)? else {
            return Ok(());
        };
        let attributes = match kind {
            // A link has those of its target, a marker has none.
            Kind::Marker | Kind::HardLink(_) => Attributes::implicit(),
            _ => self.attributes(&entry).map_err(|refusal| refusal.of(&path))?,
        };
        let record = Record {
            path,
            attributes,
            kind,
        };
        record.encode(&mut self.records);
        if self.records.len() >= CHUNK_BYTES {
            self.write_records()?;
        }
        Ok(())
    }

    /// Contents that are skipped (of whiteouts, say) cost time as well, so the limit counts them, too.
    fn count(&mut self, size: u64) -> Result<(), ErofsError> {
        let over = |what, limit| Err(ErofsError::Limit { what, limit });
        self.entries += 1;
        if self.entries > self.limits.max_entries {
            return over(LimitKind::Entries, self.limits.max_entries);
        }
        self.data_bytes = self.data_bytes.saturating_add(size);
        if self.data_bytes > self.limits.max_image_bytes {
            return over(LimitKind::ImageBytes, self.limits.max_image_bytes);
        }
        Ok(())
    }

    /// What an entry is, its contents written; `None` if it is nothing.
    fn kind<R: Read>(&mut self, entry: &Entry, archive: &mut Archive<R>) -> Result<Option<Kind>, ErofsError> {
        let refused = |problem: EntryProblem| Err(Refusal::from(problem).of(&entry.path));
        match path::destination(&entry.path) {
            Err(problem) => return refused(problem),
            Ok(Destination::Ignored) => return Ok(None),
            Ok(Destination::Whiteout { .. } | Destination::Opaque { .. }) => return Ok(Some(Kind::Marker)),
            Ok(Destination::Root) if entry.kind != EntryKind::Directory => {
                return refused(EntryProblem::Root);
            }
            Ok(Destination::Root | Destination::Entry { .. }) => {}
        }
        let kind = match &entry.kind {
            EntryKind::Regular => Kind::Regular {
                size: entry.size,
                start: self.contents(entry.size, archive)?,
            },
            EntryKind::Directory => Kind::Directory,
            EntryKind::HardLink(target) => match path::split(target) {
                Ok(_) => Kind::HardLink(target.clone()),
                Err(problem) => return refused(problem),
            },
            EntryKind::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK_BYTES => {
                return refused(EntryProblem::SymlinkTarget);
            }
            EntryKind::Symlink(target) if target.contains(&0) => return refused(EntryProblem::Nul),
            EntryKind::Symlink(target) => Kind::Symlink(target.clone()),
            EntryKind::Char { major: 0, minor: 0 } => return refused(EntryProblem::WhiteoutDevice),
            EntryKind::Char { major, minor } => Kind::Char(device_number(*major, *minor)),
            EntryKind::Block { major, minor } => Kind::Block(device_number(*major, *minor)),
            EntryKind::Fifo => Kind::Fifo,
        };
        Ok(Some(kind))
    }

    /// Appends the contents of the current entry; answers their first block.
    fn contents<R: Read>(&mut self, size: u64, archive: &mut Archive<R>) -> Result<u32, ErofsError> {
        // Block numbers fit: the output's limit sees to that.
        let start = self.output.next_block() as u32;
        self.output
            .append_blocks(size, |part| archive.read_contents(part))?;
        Ok(start)
    }

    fn attributes(&self, entry: &Entry) -> Result<Attributes, Refusal> {
        Ok(Attributes {
            permissions: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs: xattr::encode(&entry.xattrs, self.limits.max_xattr_bytes)?,
        })
    }

    fn write_records(&mut self) -> Result<(), ErofsError> {
        self.chunks.push(Chunk {
            start: self.output.next_block() as u32,
            bytes: self.records.len() as u32,
        });
        self.output.append(&self.records)?;
        self.output.pad()?;
        self.records.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(W, LayerSummary), ErofsError> {
        if !self.records.is_empty() {
            self.write_records()?;
        }
        let table = self.output.next_block() as u32;
        for chunk in &self.chunks {
            self.output.append(&chunk.start.to_le_bytes())?;
            self.output.append(&chunk.bytes.to_le_bytes())?;
        }
        self.output.pad()?;
        self.output.append(MAGIC)?;
        self.output.append(&table.to_le_bytes())?;
        self.output.append(&(self.chunks.len() as u32).to_le_bytes())?;
        self.output.append(&self.entries.to_le_bytes())?;
        self.output.append(&self.data_bytes.to_le_bytes())?;
        let (sink, bytes) = self.output.finish()?;
        let summary = LayerSummary {
            entries: self.entries,
            data_bytes: self.data_bytes,
            bytes,
        };
        Ok((sink, summary))
    }
}

/// A converted layer that is read.
pub(crate) struct ConvertedLayer<'f> {
    file: &'f File,
    pub(crate) summary: LayerSummary,
    chunks: Vec<Chunk>,
}

impl<'f> ConvertedLayer<'f> {
    /// Looks at footer and table.
    pub(crate) fn open(mut file: &'f File) -> Result<Self, ErofsError> {
        // Not by its metadata: a confined process may ask for none.
        let bytes = file.seek(SeekFrom::End(0)).map_err(unreadable)?;
        let blocks = bytes / BLOCK;
        if !bytes.is_multiple_of(BLOCK) || blocks == 0 || blocks > u64::from(u32::MAX) {
            return Err(damaged("its length is that of no converted layer"));
        }
        let mut footer = [0; FOOTER_BYTES];
        read_at(file, &mut footer, bytes - BLOCK)?;
        let mut fields = footer.as_slice();
        let mut field = |count: usize| -> [u8; 8] {
            let mut value = [0; 8];
            if let Some((taken, rest)) = fields.split_at_checked(count) {
                value[..count].copy_from_slice(taken);
                fields = rest;
            }
            value
        };
        if [field(8), field(8)].concat() != MAGIC {
            return Err(damaged("it does not end like a converted layer"));
        }
        let [table, count] = [u64::from_le_bytes(field(4)), u64::from_le_bytes(field(4))];
        let summary = LayerSummary {
            entries: u64::from_le_bytes(field(8)),
            data_bytes: u64::from_le_bytes(field(8)),
            bytes,
        };
        let table_bytes = count * CHUNK_ENTRY_BYTES as u64;
        if table * BLOCK + table_bytes > bytes - BLOCK {
            return Err(damaged("its table lies outside of it"));
        }
        // Every chunk has a block of its own, so the table is no longer than the layer allows.
        if count > blocks {
            return Err(damaged("its table is too long"));
        }
        let mut encoded = vec![0; table_bytes as usize];
        read_at(file, &mut encoded, table * BLOCK)?;
        let chunks = encoded.chunks_exact(CHUNK_ENTRY_BYTES).map(|entry| {
            let (start, bytes) = entry.split_at(4);
            Chunk {
                start: u32::from_le_bytes(start.try_into().unwrap_or_default()),
                bytes: u32::from_le_bytes(bytes.try_into().unwrap_or_default()),
            }
        });
        Ok(Self {
            file,
            summary,
            chunks: chunks.collect(),
        })
    }

    /// Blocks of the whole.
    pub(crate) fn blocks(&self) -> u64 {
        self.summary.bytes / BLOCK
    }

    /// Every record in the archive's order; at most one chunk of them is in memory.
    pub(crate) fn for_each(
        &self,
        mut apply: impl FnMut(Record) -> Result<(), ErofsError>,
    ) -> Result<(), ErofsError> {
        let mut buffer = Vec::new();
        for chunk in &self.chunks {
            let (start, length) = (u64::from(chunk.start) * BLOCK, chunk.bytes as usize);
            if length > MAX_CHUNK_BYTES || start + length as u64 > self.summary.bytes {
                return Err(damaged("records lie outside of it"));
            }
            buffer.resize(length, 0);
            read_at(self.file, &mut buffer, start)?;
            let mut rest = buffer.as_slice();
            while !rest.is_empty() {
                let record = Record::decode(&mut rest).ok_or_else(|| damaged("a record is malformed"))?;
                self.check(&record)?;
                apply(record)?;
            }
        }
        Ok(())
    }

    /// Fills `buffer` from the contents that begin in block `start`, `offset` bytes on.
    pub(crate) fn read_contents(&self, buffer: &mut [u8], start: u32, offset: u64) -> Result<(), ErofsError> {
        read_at(self.file, buffer, u64::from(start) * BLOCK + offset)
    }

    fn check(&self, record: &Record) -> Result<(), ErofsError> {
        let Kind::Regular { size, start } = record.kind else {
            return Ok(());
        };
        let end = size.div_ceil(BLOCK).checked_add(u64::from(start));
        if end.is_none_or(|end| end > self.blocks()) {
            return Err(damaged("contents lie outside of it"));
        }
        Ok(())
    }
}

fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> Result<(), ErofsError> {
    file.read_exact_at(buffer, offset).map_err(unreadable)
}

fn unreadable(source: io::Error) -> ErofsError {
    ErofsError::Converted { source }
}

pub(crate) fn damaged(what: &'static str) -> ErofsError {
    unreadable(io::Error::new(io::ErrorKind::InvalidData, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn converted(names: usize) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for number in 0..names {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            header.set_mode(0o644);
            let name = format!("{}/{number}", "directory".repeat(10));
            builder.append_data(&mut header, name, &b"abc"[..]).unwrap();
        }
        let archive = builder.into_inner().unwrap();
        convert_layer(archive.as_slice(), Vec::new(), &Limits::default())
            .unwrap()
            .0
    }

    fn count(bytes: &[u8]) -> Result<u64, ErofsError> {
        let file = file_of(bytes);
        let layer = ConvertedLayer::open(&file)?;
        let mut found = 0;
        layer.for_each(|_| {
            found += 1;
            Ok(())
        })?;
        Ok(found)
    }

    #[test]
    fn records_of_many_chunks_are_all_read_back() {
        let bytes = converted(12_000);
        let file = file_of(&bytes);
        let layer = ConvertedLayer::open(&file).unwrap();
        assert!(layer.chunks.len() > 1, "more than one chunk");
        assert_eq!(
            (layer.summary.entries, layer.summary.data_bytes),
            (12_000, 36_000)
        );
        assert_eq!(count(&bytes).unwrap(), 12_000);
    }

    #[test]
    fn a_damaged_layer_is_an_error_and_never_a_panic() {
        let bytes = converted(3);
        assert!(count(&[]).is_err());
        assert!(count(&bytes[..bytes.len() - 4096]).is_err());
        assert!(count(&bytes[..bytes.len() - 1]).is_err());
        let footer = bytes.len() - 4096;
        // Every byte of the footer's numbers, the table and the first record's framing.
        for at in (footer..footer + 24).chain(footer - 4096..footer - 4088) {
            let mut changed = bytes.clone();
            changed[at] ^= 0xff;
            assert!(count(&changed).is_err(), "byte {at} of {}", bytes.len());
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x55;
            // Whatever it says, it says it.
            drop(count(&changed));
        }
    }
}
