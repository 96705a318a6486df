//! Reads an uncompressed EROFS image from front to back and checks what a kernel relies on while it goes.

use std::collections::BTreeMap;

/// Files by path; the root is the empty path.
pub(crate) type Files = BTreeMap<String, Found>;

/// A file of the image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    pub(crate) nid: u64,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) nlink: u32,
    pub(crate) rdev: u32,
    pub(crate) start_block: u32,
    /// Contents or link target.
    pub(crate) data: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
}

const BLOCK: usize = 4096;

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(b[at..at + 2].try_into().unwrap())
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(b[at..at + 4].try_into().unwrap())
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().unwrap())
}

struct Image<'a> {
    bytes: &'a [u8],
    metadata: usize,
}

/// All files of an image.
pub(crate) fn read(bytes: &[u8]) -> Files {
    let sb = &bytes[1024..1152];
    assert_eq!(u32_at(sb, 0), 0xE0F5_E1E2, "magic");
    assert_eq!(sb[12], 12, "block bits");
    assert_eq!(u32_at(sb, 80), 0, "incompatible features");
    assert_eq!(u32_at(sb, 36) as usize * BLOCK, bytes.len(), "blocks");
    let image = Image {
        bytes,
        metadata: u32_at(sb, 40) as usize * BLOCK,
    };
    let root = u64::from(u16_at(sb, 14));
    let mut files = Files::new();
    let mut directories = vec![(String::new(), root, root)];
    while let Some((path, nid, parent)) = directories.pop() {
        let found = image.inode(nid);
        let mut subdirectories = 0;
        for (name, child, kind) in entries(&found.data) {
            match name.as_str() {
                "." => assert_eq!(child, nid),
                ".." => assert_eq!(child, parent),
                _ => {
                    let file = image.inode(child);
                    assert_eq!(kind, kind_of(file.mode), "file type of {path}/{name}");
                    let path = if path.is_empty() {
                        name
                    } else {
                        format!("{path}/{name}")
                    };
                    if kind == 2 {
                        subdirectories += 1;
                        directories.push((path, child, nid));
                    } else {
                        assert!(files.insert(path, file).is_none());
                    }
                }
            }
        }
        assert_eq!(found.nlink, 2 + subdirectories, "links of {path:?}");
        files.insert(path, found);
    }
    let mut inodes: Vec<(u64, u16, u32)> = files.values().map(|f| (f.nid, f.mode, f.nlink)).collect();
    inodes.sort_unstable();
    for chunk in inodes.chunk_by(|a, b| a.0 == b.0) {
        let (nid, mode, nlink) = chunk[0];
        assert!(
            mode & 0o170_000 == 0o040_000 || nlink as usize == chunk.len(),
            "links of inode {nid}"
        );
    }
    inodes.dedup();
    assert_eq!(u64_at(sb, 16) as usize, inodes.len(), "inode count");
    files
}

impl Image<'_> {
    fn inode(&self, nid: u64) -> Found {
        let at = self.metadata + nid as usize * 32;
        let inode = &self.bytes[at..at + 64];
        let format = u16_at(inode, 0);
        assert_eq!(format & 1, 1, "extended inode");
        assert!(at % BLOCK + 64 <= BLOCK, "inode in one block");
        let xattr_count = usize::from(u16_at(inode, 2));
        let xattr_bytes = if xattr_count == 0 {
            0
        } else {
            12 + (xattr_count - 1) * 4
        };
        let mode = u16_at(inode, 4);
        let size = u64_at(inode, 8) as usize;
        let address = u32_at(inode, 16);
        let has_data = matches!(mode & 0o170_000, 0o100_000 | 0o040_000 | 0o120_000);
        let tail = at + 64 + xattr_bytes;
        let data = match format >> 1 & 7 {
            _ if !has_data || size == 0 => Vec::new(),
            0 => {
                let start = address as usize * BLOCK;
                let regular = mode & 0o170_000 == 0o100_000;
                assert_eq!(
                    start > self.metadata,
                    regular,
                    "only contents lie behind the metadata"
                );
                self.bytes[start..start + size].to_vec()
            }
            2 => {
                let whole = size / BLOCK * BLOCK;
                let start = if whole == 0 { 0 } else { address as usize * BLOCK };
                assert!(mode & 0o170_000 != 0o100_000, "contents of files can be mapped");
                assert!(tail % BLOCK + size % BLOCK <= BLOCK, "tail in one block");
                assert_eq!(tail / BLOCK, at / BLOCK, "tail with its inode");
                let mut data = self.bytes[start..start + whole].to_vec();
                data.extend(&self.bytes[tail..tail + size % BLOCK]);
                data
            }
            other => panic!("data layout {other}"),
        };
        Found {
            nid,
            mode,
            uid: u32_at(inode, 24),
            gid: u32_at(inode, 28),
            mtime: (u64_at(inode, 32) as i64, u32_at(inode, 40)),
            nlink: u32_at(inode, 44),
            rdev: if has_data { 0 } else { address },
            start_block: if has_data { address } else { 0 },
            data,
            xattrs: xattrs(&self.bytes[at + 64..tail]),
        }
    }
}

fn xattrs(mut area: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    if area.is_empty() {
        return found;
    }
    assert_eq!(area[4], 0, "shared attributes");
    area = &area[12..];
    while !area.is_empty() {
        let (name, value) = (usize::from(area[0]), usize::from(u16_at(area, 2)));
        let prefix = match area[1] {
            1 => "user.",
            2 => "system.posix_acl_access",
            3 => "system.posix_acl_default",
            4 => "trusted.",
            6 => "security.",
            other => panic!("attribute namespace {other}"),
        };
        let suffix = text(&area[4..4 + name]);
        found.insert(
            format!("{prefix}{suffix}"),
            area[4 + name..4 + name + value].to_vec(),
        );
        area = &area[(4 + name + value).next_multiple_of(4)..];
    }
    found
}

/// (name, nid, file type), checked to be sorted over all blocks.
fn entries(directory: &[u8]) -> Vec<(String, u64, u8)> {
    let mut all = Vec::new();
    let mut last: Vec<u8> = Vec::new();
    for block in directory.chunks(BLOCK) {
        let count = usize::from(u16_at(block, 8)) / 12;
        for i in 0..count {
            let entry = &block[i * 12..i * 12 + 12];
            let start = usize::from(u16_at(entry, 8));
            let end = if i + 1 < count {
                usize::from(u16_at(block, i * 12 + 20))
            } else {
                block.len()
            };
            let name: Vec<u8> = block[start..end]
                .iter()
                .copied()
                .take_while(|b| *b != 0)
                .collect();
            assert!(last < name, "entries are sorted");
            all.push((text(&name), u64_at(entry, 0), entry[10]));
            last = name;
        }
    }
    all
}

/// Names that are no text are shown so that different ones stay different.
fn text(name: &[u8]) -> String {
    String::from_utf8(name.to_vec()).unwrap_or_else(|_| name.escape_ascii().to_string())
}

fn kind_of(mode: u16) -> u8 {
    match mode & 0o170_000 {
        0o100_000 => 1,
        0o040_000 => 2,
        0o020_000 => 3,
        0o060_000 => 4,
        0o010_000 => 5,
        0o120_000 => 7,
        other => panic!("file type {other:o}"),
    }
}
