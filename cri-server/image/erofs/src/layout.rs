//! What EROFS looks like on disk (Linux `Documentation/filesystems/erofs.rst`, `fs/erofs/erofs_fs.h`): little-endian structures, and
//! nothing about where they are put.

use crate::tar::Timestamp;

/// Bytes in a block.
pub(crate) const BLOCK: u64 = 4096;
/// Inodes are numbered by their place, in units of this many bytes.
pub(crate) const INODE_SLOT: u64 = 32;
/// Bytes of an extended inode.
pub(crate) const INODE_BYTES: u64 = 64;
/// Bytes of the header before an inode's attributes.
pub(crate) const XATTR_HEADER_BYTES: u64 = 12;
/// Each attribute starts at a multiple of this.
pub(crate) const XATTR_ALIGNMENT: usize = 4;
/// Most bytes of attributes that an inode's 16-bit count can express.
pub(crate) const MAX_XATTR_ENTRY_BYTES: usize = (u16::MAX as usize - 1) * XATTR_ALIGNMENT;
/// Bytes of a directory entry without its name.
pub(crate) const DIRENT_BYTES: u64 = 12;
/// Start block of what has no blocks.
pub(crate) const NO_BLOCK: u32 = u32::MAX;

const SUPERBLOCK_OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const COMPAT_CHECKSUM: u32 = 1;
const COMPAT_MTIME: u32 = 2;

/// `S_IFMT` values, and the numbers of the same kinds in directories.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileType {
    Regular,
    Directory,
    Char,
    Block,
    Fifo,
    Symlink,
}

impl FileType {
    fn mode(self) -> u16 {
        match self {
            Self::Regular => 0o100_000,
            Self::Directory => 0o040_000,
            Self::Char => 0o020_000,
            Self::Block => 0o060_000,
            Self::Fifo => 0o010_000,
            Self::Symlink => 0o120_000,
        }
    }

    fn in_directory(self) -> u8 {
        match self {
            Self::Regular => 1,
            Self::Directory => 2,
            Self::Char => 3,
            Self::Block => 4,
            Self::Fifo => 5,
            Self::Symlink => 7,
        }
    }
}

/// An inode of 64 bytes.
#[derive(Debug)]
pub(crate) struct ExtendedInode {
    pub(crate) file_type: FileType,
    /// Its last part (or all of it) stands right behind the inode and its attributes.
    pub(crate) inline_tail: bool,
    /// Bytes of attributes without their header; zero for no attributes at all.
    pub(crate) xattr_bytes: usize,
    pub(crate) permissions: u16,
    pub(crate) size: u64,
    /// First block, or the device number.
    pub(crate) address: u32,
    pub(crate) number: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    pub(crate) links: u32,
}

impl ExtendedInode {
    pub(crate) fn encode(&self) -> [u8; INODE_BYTES as usize] {
        const EXTENDED: u16 = 1;
        const FLAT_INLINE: u16 = 2 << 1;
        let format = EXTENDED | if self.inline_tail { FLAT_INLINE } else { 0 };
        let xattr_count = if self.xattr_bytes == 0 {
            0
        } else {
            (self.xattr_bytes / XATTR_ALIGNMENT + 1) as u16
        };
        let mut fields = Fields::<{ INODE_BYTES as usize }>::new();
        fields.put(0, format.to_le_bytes());
        fields.put(2, xattr_count.to_le_bytes());
        fields.put(4, (self.file_type.mode() | self.permissions).to_le_bytes());
        fields.put(8, self.size.to_le_bytes());
        fields.put(16, self.address.to_le_bytes());
        fields.put(20, self.number.to_le_bytes());
        fields.put(24, self.uid.to_le_bytes());
        fields.put(28, self.gid.to_le_bytes());
        fields.put(32, self.mtime.seconds.to_le_bytes());
        fields.put(40, self.mtime.nanoseconds.to_le_bytes());
        fields.put(44, self.links.to_le_bytes());
        fields.0
    }
}

/// An entry of a directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectoryEntry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) file_type: FileType,
}

/// Whether an entry still goes into a block that has this much in it already.
fn fits(used: u64, name: &[u8]) -> bool {
    used + DIRENT_BYTES + name.len() as u64 <= BLOCK
}

/// Bytes of a directory with these names, in order: whole blocks, and what the last one holds.
pub(crate) fn directory_bytes<'a>(names: impl Iterator<Item = &'a [u8]>) -> u64 {
    let (mut blocks, mut used) = (0, 0);
    for name in names {
        if !fits(used, name) {
            blocks += 1;
            used = 0;
        }
        used += DIRENT_BYTES + name.len() as u64;
    }
    blocks * BLOCK + used
}

/// The first block of a directory with these entries, not padded, and the entries that did not go in.
pub(crate) fn directory_block<'a, 'b>(
    entries: &'b [DirectoryEntry<'a>],
) -> (Vec<u8>, &'b [DirectoryEntry<'a>]) {
    let mut used = 0;
    let count = entries.iter().take_while(|entry| {
        let goes_in = fits(used, entry.name);
        used += DIRENT_BYTES + entry.name.len() as u64;
        goes_in
    });
    let (here, rest) = entries.split_at(count.count());
    let mut block = Vec::with_capacity(BLOCK as usize);
    let mut name_offset = here.len() * DIRENT_BYTES as usize;
    for entry in here {
        block.extend(entry.nid.to_le_bytes());
        block.extend((name_offset as u16).to_le_bytes());
        block.extend([entry.file_type.in_directory(), 0]);
        name_offset += entry.name.len();
    }
    for entry in here {
        block.extend(entry.name);
    }
    (block, rest)
}

/// What the superblock says about the image; everything else in it is fixed, so that equal layers give equal images.
#[derive(Debug)]
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) blocks: u32,
    pub(crate) metadata_block: u32,
}

impl Superblock {
    /// Block 0 of the image.
    pub(crate) fn encode(&self) -> [u8; BLOCK as usize] {
        let mut fields = Fields::<{ BLOCK as usize }>::new();
        let at = |offset| SUPERBLOCK_OFFSET + offset;
        fields.put(at(0), MAGIC.to_le_bytes());
        fields.put(at(8), (COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        fields.put(at(12), [BLOCK.trailing_zeros() as u8]);
        fields.put(at(14), self.root_nid.to_le_bytes());
        fields.put(at(16), self.inodes.to_le_bytes());
        fields.put(at(36), self.blocks.to_le_bytes());
        fields.put(at(40), self.metadata_block.to_le_bytes());
        let checksum = crc32c(fields.0.get(SUPERBLOCK_OFFSET..).unwrap_or_default());
        fields.put(at(4), checksum.to_le_bytes());
        fields.0
    }
}

/// CRC-32C from all ones, without the final inversion, as EROFS has it.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg())
        })
    })
}

/// Linux's 32-bit device number.
pub(crate) fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// Major and minor of such a number.
pub(crate) fn device_parts(number: u32) -> (u32, u32) {
    ((number >> 8) & 0xfff, (number & 0xff) | ((number >> 12) & !0xff))
}

/// A zeroed structure that fields are put into.
struct Fields<const N: usize>([u8; N]);

impl<const N: usize> Fields<N> {
    fn new() -> Self {
        Self([0; N])
    }

    fn put<const M: usize>(&mut self, offset: usize, bytes: [u8; M]) {
        if let Some(field) = self.0.get_mut(offset..offset + M) {
            field.copy_from_slice(&bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_is_castagnolis_without_the_last_inversion() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_directory_is_as_long_as_the_blocks_it_is_written_in() {
        let names: Vec<Vec<u8>> = (0..1000).map(|i| vec![b'n'; 1 + i * 7 % 255]).collect();
        let entry = |name| DirectoryEntry {
            name,
            nid: 1,
            file_type: FileType::Regular,
        };
        let entries: Vec<_> = names.iter().map(|n| entry(n.as_slice())).collect();
        let (mut rest, mut bytes) = (entries.as_slice(), 0);
        while !rest.is_empty() {
            let (block, left) = directory_block(rest);
            assert!(block.len() as u64 <= BLOCK);
            bytes += if left.is_empty() {
                block.len() as u64
            } else {
                BLOCK
            };
            rest = left;
        }
        assert_eq!(bytes, directory_bytes(names.iter().map(Vec::as_slice)));
    }

    #[test]
    fn device_numbers_have_the_kernels_form() {
        assert_eq!(device_number(1, 3), 0x103);
        assert_eq!(device_number(0xfff, 0xfffff), u32::MAX);
        assert_eq!(device_number(259, 0x12345), 0x1231_0345);
        for parts in [(0, 0), (1, 3), (0xfff, 0xfffff), (259, 0x12345)] {
            assert_eq!(device_parts(device_number(parts.0, parts.1)), parts);
        }
    }
}
