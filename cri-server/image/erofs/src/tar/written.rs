//! Headers as they are written: PAX as Go's archive/tar does it, because Docker, containerd and BuildKit write layers with that, and an archive that
//! is made again has its old digest only when it is the same to the byte.
//!
//! Implements POSIX.1-2001 pax headers over ustar ones, and the `SCHILY.xattr.` records. Whatever it is given, [`super::Archive`] reads it back.

use std::collections::BTreeMap;

use super::Timestamp;
use super::header::BLOCK;

/// What ends an archive.
pub(crate) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// One entry, its contents left out.
#[derive(Debug, Clone)]
pub(crate) struct Written<'a> {
    pub(crate) path: &'a [u8],
    pub(crate) type_flag: u8,
    /// Target of a symbolic or hard link.
    pub(crate) link: &'a [u8],
    /// Permissions, and the type of the file for whoever writes it there.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) size: u64,
    pub(crate) mtime: Timestamp,
    /// Major and minor.
    pub(crate) device: (u32, u32),
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Default for Written<'_> {
    fn default() -> Self {
        Self {
            path: b"",
            type_flag: b'0',
            link: b"",
            mode: 0,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Timestamp::default(),
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }
}

/// Zeros that fill up the last block of contents.
pub(crate) fn padding(size: u64) -> &'static [u8] {
    let length = (size.wrapping_neg() % BLOCK as u64) as usize;
    END.get(..length).unwrap_or_default()
}

impl Written<'_> {
    /// The entry's blocks up to its contents.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut blocks = Vec::with_capacity(BLOCK);
        let records = self.records();
        // Only when nothing else asks for records.
        let split = match records.keys().map(Vec::as_slice).collect::<Vec<_>>().as_slice() {
            [b"path"] => split(self.path),
            _ => None,
        };
        if split.is_none() && !records.is_empty() {
            let records: Vec<u8> = records
                .iter()
                .flat_map(|(key, value)| record(key, value))
                .collect();
            let mut header = Header::new();
            header.text(0, 100, extension_name(self.path).as_slice());
            for (at, length) in [(100, 8), (108, 8), (116, 8), (136, 12)] {
                header.octal(at, length, 0);
            }
            header.octal(124, 12, records.len() as u64);
            blocks.extend(header.finish(b'x'));
            blocks.extend(&records);
            blocks.extend(padding(records.len() as u64));
        }
        let mut header = Header::new();
        let (prefix, name) = split.unwrap_or((b"", self.path));
        header.text(0, 100, name);
        header.text(345, 155, prefix);
        header.octal(100, 8, self.mode.into());
        header.octal(108, 8, self.uid.into());
        header.octal(116, 8, self.gid.into());
        header.octal(124, 12, self.size);
        // What does not fit is in a record, and zero here.
        header.octal(136, 12, u64::try_from(self.mtime.seconds).unwrap_or(0));
        header.text(157, 100, self.link);
        header.octal(329, 8, self.device.0.into());
        header.octal(337, 8, self.device.1.into());
        blocks.extend(header.finish(self.type_flag));
        blocks
    }

    /// What a ustar header has no room for, by key.
    fn records(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let mut records = BTreeMap::new();
        let names: [(&[u8], &[u8]); 2] = [(b"path", self.path), (b"linkpath", self.link)];
        for (key, name) in names {
            if name.len() > 100 || !name.is_ascii() {
                records.insert(key.to_vec(), name.to_vec());
            }
        }
        let numbers: [(&[u8], u64, usize); 3] = [
            (b"uid", self.uid.into(), 8),
            (b"gid", self.gid.into(), 8),
            (b"size", self.size, 12),
        ];
        for (key, number, length) in numbers {
            if !fits(number, length) {
                records.insert(key.to_vec(), number.to_string().into_bytes());
            }
        }
        let whole = u64::try_from(self.mtime.seconds).is_ok_and(|seconds| fits(seconds, 12));
        if !whole || self.mtime.nanoseconds != 0 {
            records.insert(b"mtime".to_vec(), time(self.mtime).into_bytes());
        }
        for (name, value) in &self.xattrs {
            records.insert([b"SCHILY.xattr.", name.as_slice()].concat(), value.clone());
        }
        records
    }
}

/// A long name in the two parts that a ustar header has room for.
fn split(path: &[u8]) -> Option<(&[u8], &[u8])> {
    const PREFIX: usize = 155;
    if path.len() <= 100 || !path.is_ascii() {
        return None;
    }
    let end = match path {
        _ if path.len() > PREFIX + 1 => PREFIX + 1,
        [.., b'/'] => path.len() - 1,
        _ => path.len(),
    };
    let slash = path.get(..end)?.iter().rposition(|byte| *byte == b'/')?;
    let (prefix, name) = (path.get(..slash)?, path.get(slash + 1..)?);
    (!prefix.is_empty() && (1..=100).contains(&name.len())).then_some((prefix, name))
}

/// Whether a number fits into an octal field with a NUL at its end.
fn fits(number: u64, length: usize) -> bool {
    number >> (3 * (length - 1)) == 0
}

/// `length key=value\n`, where the length counts itself.
fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + rest.to_string().len();
    if length.to_string().len() != rest.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

/// Seconds with what there is of a fraction; those before the epoch are counted from it, fraction included.
fn time(at: Timestamp) -> String {
    if at.nanoseconds == 0 {
        return at.seconds.to_string();
    }
    let (sign, seconds, nanoseconds) = if at.seconds < 0 {
        // Not below the least: the fraction goes up.
        let seconds = at.seconds.saturating_add(1).unsigned_abs();
        ("-", seconds, 1_000_000_000_u32.saturating_sub(at.nanoseconds))
    } else {
        ("", at.seconds.unsigned_abs(), at.nanoseconds)
    };
    let text = format!("{sign}{seconds}.{nanoseconds:09}");
    text.trim_end_matches('0').to_owned()
}

/// The name of the header before an entry, which nobody reads: beside it, in a directory of its own.
fn extension_name(path: &[u8]) -> Vec<u8> {
    let parts = |path: &[u8]| -> Vec<Vec<u8>> {
        let parts = path.split(|byte| *byte == b'/');
        parts
            .filter(|part| !part.is_empty() && *part != b".")
            .map(<[u8]>::to_vec)
            .collect()
    };
    let directory = path.iter().rposition(|byte| *byte == b'/').map_or(0, |at| at + 1);
    let (directory, file) = path.split_at(directory);
    let mut all = parts(directory);
    all.push(b"PaxHeaders.0".to_vec());
    all.extend(parts(file));
    let mut name = all.join(&b'/');
    if path.starts_with(b"/") {
        name.insert(0, b'/');
    }
    name.retain(u8::is_ascii);
    name.truncate(100);
    while name.ends_with(b"/") {
        name.pop();
    }
    name
}

/// A ustar header that is being filled.
struct Header([u8; BLOCK]);

impl Header {
    fn new() -> Self {
        let mut header = Self([0; BLOCK]);
        header.put(257, b"ustar\x0000");
        header
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(field) = self.0.get_mut(at..at + bytes.len()) {
            field.copy_from_slice(bytes);
        }
    }

    /// Text as far as there is room and it is ASCII; the whole of it is in a record then.
    fn text(&mut self, at: usize, length: usize, text: &[u8]) {
        let text: Vec<u8> = text.iter().copied().filter(u8::is_ascii).collect();
        let mut short = text.get(..length).unwrap_or(&text).to_vec();
        // A file must not look like a directory because its name was cut behind a slash.
        if text.len() > length && short.ends_with(b"/") {
            let kept = short
                .iter()
                .rposition(|byte| *byte != b'/')
                .map_or(0, |at| at + 1);
            if let Some(end) = short.get_mut(kept) {
                *end = 0;
            }
        }
        self.put(at, &short);
    }

    fn octal(&mut self, at: usize, length: usize, number: u64) {
        let number = if fits(number, length) { number } else { 0 };
        let digits = length - 1;
        self.put(at, format!("{number:0digits$o}").as_bytes());
    }

    fn finish(mut self, type_flag: u8) -> [u8; BLOCK] {
        self.put(156, &[type_flag]);
        self.put(148, b"        ");
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        self.put(148, format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

/// The header of a plain file in an archive of archives; sizes of 8 GiB and more are in base 256, so that it is one block whatever the size.
#[must_use]
pub fn member_header(name: &str, size: u64) -> [u8; BLOCK] {
    let mut header = Header::new();
    header.text(0, 100, name.as_bytes());
    header.octal(100, 8, 0o644);
    for (at, length) in [(108, 8), (116, 8), (136, 12), (329, 8), (337, 8)] {
        header.octal(at, length, 0);
    }
    if fits(size, 12) {
        header.octal(124, 12, size);
    } else {
        header.put(124, &[0x80, 0, 0, 0]);
        header.put(128, &size.to_be_bytes());
    }
    header.finish(b'0')
}

#[cfg(test)]
mod tests {
    use super::super::{Archive, EntryKind};
    use super::*;

    fn read(blocks: &[u8]) -> super::super::Entry {
        let mut archive = Archive::new(blocks, 1 << 16);
        archive.next_entry().unwrap().unwrap()
    }

    #[test]
    fn what_does_not_fit_a_header_is_in_records_and_read_back() {
        let long = b"d/".repeat(120);
        let times = [
            (0, 0),
            (-1, 500_000_000),
            (-7, 0),
            (i64::MIN, 1),
            (i64::MAX, 999_999_999),
            (1 << 33, 0),
            (5, 120_000_000),
        ];
        for (seconds, nanoseconds) in times {
            let written = Written {
                path: &long,
                type_flag: b'2',
                link: "ä".as_bytes(),
                mode: 0o7777,
                uid: u32::MAX - 1,
                gid: 1 << 21,
                mtime: Timestamp { seconds, nanoseconds },
                xattrs: vec![(b"user.a".to_vec(), b"\0=\n".to_vec())],
                ..Written::default()
            };
            let entry = read(&written.encode());
            assert_eq!(entry.path, long);
            assert_eq!(entry.kind, EntryKind::Symlink("ä".into()));
            assert_eq!(
                (entry.mode, entry.uid, entry.gid),
                (0o7777, u32::MAX - 1, 1 << 21)
            );
            assert_eq!(entry.mtime, written.mtime);
            assert_eq!(entry.xattrs, written.xattrs);
        }
    }

    #[test]
    fn plain_entries_are_one_header() {
        let written = Written {
            path: b"dev/null",
            type_flag: b'3',
            mode: 0o666,
            device: (1, 3),
            ..Written::default()
        };
        let blocks = written.encode();
        assert_eq!(blocks.len(), BLOCK);
        assert_eq!(read(&blocks).kind, EntryKind::Char { major: 1, minor: 3 });
        assert_eq!(&blocks[100..108], b"0000666\0");
        assert_eq!(&blocks[257..265], b"ustar\x0000");
    }

    #[test]
    fn a_long_name_is_split_where_that_is_all_that_is_long() {
        let directory = b"d/".repeat(60);
        let name = [directory.as_slice(), b"file"].concat();
        for path in [&directory, &name] {
            let mut written = Written {
                path,
                ..Written::default()
            };
            assert_eq!(written.encode().len(), BLOCK);
            assert_eq!(&read(&written.encode()).path, path);
            written.uid = 1 << 30;
            assert_eq!(written.encode().len(), 3 * BLOCK);
            assert_eq!(&read(&written.encode()).path, path);
        }
        let alone = b"n".repeat(120);
        assert_eq!(split(&alone), None);
        assert_eq!(split(&[b"/", alone.as_slice()].concat()), None);
    }

    #[test]
    fn a_record_counts_its_own_length() {
        assert_eq!(record(b"path", b"a"), b"9 path=a\n");
        assert_eq!(record(b"path", b"ab"), b"11 path=ab\n");
        assert_eq!(record(b"path", &[b'a'; 90]).len(), 99);
        assert!(record(b"path", &[b'a'; 91]).starts_with(b"101 path="));
    }

    #[test]
    fn headers_of_extensions_stand_beside_what_they_are_of() {
        assert_eq!(extension_name(b"a/b"), b"a/PaxHeaders.0/b");
        assert_eq!(extension_name(b"./a//b/"), b"a/b/PaxHeaders.0");
        assert_eq!(extension_name(b"/b"), b"/PaxHeaders.0/b");
        assert_eq!(extension_name(b"b"), b"PaxHeaders.0/b");
        assert_eq!(extension_name(&b"n".repeat(200)).len(), 100);
    }

    #[test]
    fn a_member_may_be_of_any_size() {
        for size in [0, 1, (1 << 33) - 1, 1 << 33, 1 << 50] {
            let entry = read(&member_header("blobs/sha256/0", size));
            assert_eq!((entry.size, entry.mode), (size, 0o644));
            assert_eq!(entry.path, b"blobs/sha256/0");
        }
    }
}
