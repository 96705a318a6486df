//! A converted layer in, a layer archive out: the entries as they were read, in their order, with their contents.
//!
//! The archive is not the one that was converted: owners' names, times of access, attributes that images cannot have and the form of headers were not kept.
//! It is written as Go writes (see `tar/written.rs`), so that what containerd and BuildKit made comes out as it was. Converted
//! again it gives the same converted layer. Equal converted layers give equal archives, and memory is bounded as it is for [`Composer`].
//!
//! A converted layer comes from a file, so nothing in it is believed: contents that several entries claim are an error, or a small file could
//! become an archive without end.

use std::fs::File;
use std::io::{self, Write};

use crate::compose::Composer;
use crate::convert::{ConvertedLayer, damaged};
use crate::error::{ErofsError, LimitKind};
use crate::layout::{BLOCK, device_parts};
use crate::limits::Limits;
use crate::record::{Kind, Record};
use crate::tar::{END, Timestamp, Written, padding};
use crate::tree::Attributes;
use crate::xattr;

const BUFFER_BYTES: usize = 256 << 10;

/// What stands in the mode of an entry. All readers take either; two writers of layers differ in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModeBits {
    /// Permissions only: containerd and BuildKit.
    Permissions,
    /// The type of the file as well, as Go had it before 1.9: Docker's own store.
    FileType,
}

/// An archive that was made again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoredLayer {
    /// Entries, extension headers not counted.
    pub entries: u64,
    /// Its length.
    pub bytes: u64,
}

/// Writes the archive of the last of these converted layers; answers the sink as well.
///
/// Those before it are what it lies on in an image, bottom first: a hard link may lead there, and who unpacks the archive gives the file what
/// the link's entry says.
pub fn restore_layer<W: Write>(
    layers: &[File],
    sink: W,
    modes: ModeBits,
    limits: &Limits,
) -> Result<(W, RestoredLayer), ErofsError> {
    let (file, lower) = layers
        .split_last()
        .ok_or_else(|| damaged("there is no layer to make an archive of"))?;
    let layer = ConvertedLayer::open(file)?;
    let mut below = match has_hard_links(&layer)? {
        true => Some(replay(lower, &layer, limits)?),
        false => None,
    };
    let mut restoration = Restoration {
        layer: &layer,
        sink,
        buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
        modes,
        unclaimed: layer.blocks(),
        max_entries: limits.max_entries,
        done: RestoredLayer { entries: 0, bytes: 0 },
    };
    layer.for_each(|record| match (&mut below, &record.kind) {
        (Some(composer), Kind::HardLink(target)) => {
            let attributes = composer.link_attributes(&record, target)?;
            restoration.entry(&record, attributes)?;
            composer.entry(record)
        }
        (Some(composer), _) => {
            restoration.entry(&record, &record.attributes)?;
            composer.entry(record)
        }
        (None, _) => restoration.entry(&record, &record.attributes),
    })?;
    restoration.finish()
}

fn has_hard_links(layer: &ConvertedLayer<'_>) -> Result<bool, ErofsError> {
    let mut found = false;
    layer.for_each(|record| {
        found |= matches!(record.kind, Kind::HardLink(_));
        Ok(())
    })?;
    Ok(found)
}

/// What is there before the first entry of `layer`.
fn replay(lower: &[File], layer: &ConvertedLayer<'_>, limits: &Limits) -> Result<Composer, ErofsError> {
    let mut composer = Composer::new(*limits);
    for file in lower {
        composer.layer(file)?;
    }
    composer.begin(layer)?;
    Ok(composer)
}

struct Restoration<'a, W> {
    layer: &'a ConvertedLayer<'a>,
    sink: W,
    buffer: Box<[u8]>,
    modes: ModeBits,
    /// Blocks that contents may still have: no two files share any.
    unclaimed: u64,
    max_entries: u64,
    done: RestoredLayer,
}

impl<W: Write> Restoration<'_, W> {
    /// Writes an entry with these attributes.
    fn entry(&mut self, record: &Record, attributes: &Attributes) -> Result<(), ErofsError> {
        self.done.entries += 1;
        if self.done.entries > self.max_entries {
            return Err(ErofsError::Limit {
                what: LimitKind::Entries,
                limit: self.max_entries,
            });
        }
        let mut header = header(record, attributes)?;
        if self.modes == ModeBits::FileType {
            header.mode |= file_type(&record.kind);
        }
        self.write(&header.encode())?;
        match record.kind {
            Kind::Regular { size, start } => self.contents(size, start),
            _ => Ok(()),
        }
    }

    fn contents(&mut self, size: u64, start: u32) -> Result<(), ErofsError> {
        self.unclaimed = self
            .unclaimed
            .checked_sub(size.div_ceil(BLOCK))
            .ok_or_else(|| damaged("several files have the same contents"))?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut offset = 0;
        while offset < size {
            let length = usize::try_from(size - offset).map_or(buffer.len(), |left| left.min(buffer.len()));
            let part = buffer.get_mut(..length).unwrap_or_default();
            self.layer.read_contents(part, start, offset)?;
            self.write(part)?;
            offset += length as u64;
        }
        self.buffer = buffer;
        self.write(padding(size))
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        self.sink.write_all(bytes).map_err(failed)?;
        self.done.bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(mut self) -> Result<(W, RestoredLayer), ErofsError> {
        self.write(&END)?;
        self.sink.flush().map_err(failed)?;
        Ok((self.sink, self.done))
    }
}

fn header<'a>(record: &'a Record, attributes: &Attributes) -> Result<Written<'a>, ErofsError> {
    let xattrs = xattr::decode(&attributes.xattrs).ok_or_else(|| damaged("attributes are malformed"))?;
    if attributes.mtime.nanoseconds > 999_999_999 {
        return Err(damaged("a time is malformed"));
    }
    let mut header = Written {
        path: &record.path,
        mode: u32::from(attributes.permissions & 0o7777),
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
        xattrs,
        ..Written::default()
    };
    header.type_flag = match &record.kind {
        Kind::Marker => {
            // It is its name, and nothing else of it was kept.
            header.mode = 0;
            header.mtime = Timestamp::default();
            b'0'
        }
        Kind::Regular { size, .. } => {
            header.size = *size;
            b'0'
        }
        Kind::HardLink(target) => {
            header.link = target;
            b'1'
        }
        Kind::Symlink(target) => {
            header.link = target;
            b'2'
        }
        Kind::Char(number) => {
            header.device = device_parts(*number);
            b'3'
        }
        Kind::Block(number) => {
            header.device = device_parts(*number);
            b'4'
        }
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    if record.path.contains(&0) || header.link.contains(&0) {
        return Err(damaged("a name is malformed"));
    }
    Ok(header)
}

/// `S_IFMT` bits; a hard link is nearly always one to a plain file, and a marker is no file at all.
fn file_type(kind: &Kind) -> u32 {
    match kind {
        Kind::Marker => 0,
        Kind::Regular { .. } | Kind::HardLink(_) => 0o100_000,
        Kind::Directory => 0o040_000,
        Kind::Symlink(_) => 0o120_000,
        Kind::Char(_) => 0o020_000,
        Kind::Block(_) => 0o060_000,
        Kind::Fifo => 0o010_000,
    }
}

fn failed(source: io::Error) -> ErofsError {
    ErofsError::Output { source }
}
