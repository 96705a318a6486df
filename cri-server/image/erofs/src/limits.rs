//! How much a set of layers may cost, and nothing about where that is counted.

/// Caps on one image, enforced while a layer streams in, and again over all layers while they are composed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest image in bytes: metadata and all layers, contents that a later layer replaced included.
    pub max_image_bytes: u64,
    /// Most archive entries over all layers; each layer, and each directory made for an entry without one, counts as one more.
    pub max_entries: u64,
    /// Longest entry name or link target in bytes.
    pub max_path_bytes: usize,
    /// Most bytes of extended attributes on one inode, as stored.
    pub max_xattr_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_image_bytes: 64 << 30,
            max_entries: 4_000_000,
            max_path_bytes: 4096,
            max_xattr_bytes: 64 << 10,
        }
    }
}

/// Names, link targets and attributes held in memory at one time, bookkeeping included: entries are small in an archive, and large here.
pub(crate) const MAX_TREE_BYTES: u64 = 1 << 30;
/// Nested directories: what a path of `PATH_MAX` can name.
pub(crate) const MAX_DEPTH: u32 = 2048;
/// Symbolic links followed for one name, as Linux does.
pub(crate) const MAX_LINK_HOPS: u32 = 40;
/// Path components walked inside symbolic links over the whole image. Links that lead through links cost far more than their bytes;
/// real images need one or two for an entry.
pub(crate) const MAX_LINK_STEPS: u64 = 200_000_000;
/// Bytes after the end of the archive that are read (for the digest) and ignored.
pub(crate) const MAX_TRAILING_BYTES: u64 = 64 << 20;
/// Longest extension header (PAX records, GNU long name).
pub(crate) const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Longest name of one file.
pub(crate) const MAX_NAME_BYTES: usize = 255;
/// Longest symbolic link target that Linux can follow.
pub(crate) const MAX_SYMLINK_BYTES: usize = 4095;
