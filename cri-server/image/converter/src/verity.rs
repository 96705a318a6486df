//! Digests of files as fs-verity defines them (Linux `Documentation/filesystems/fsverity.rst`, sections "Merkle tree" and "fs-verity
//! descriptor"): SHA-256, blocks of 4096 bytes, no salt. A host whose file system has fs-verity measures the same.
//!
//! The digest is known when the last byte is, in memory that does not grow with the file: one block for each level of the tree.

use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};

const BLOCK: usize = 4096;
const HASH: usize = 32;
const DESCRIPTOR: usize = 256;

/// The digest of a file that is written or read from front to back.
pub struct Verity {
    /// The block that is being filled, and behind it the levels of the tree, lowest first.
    levels: Vec<Level>,
    bytes: u64,
}

struct Level {
    block: Box<[u8]>,
    filled: usize,
    /// Whether a block of this level went up already.
    several: bool,
}

impl Level {
    fn new() -> Self {
        Self {
            block: vec![0; BLOCK].into_boxed_slice(),
            filled: 0,
            several: false,
        }
    }
}

impl Default for Verity {
    fn default() -> Self {
        Self {
            levels: vec![Level::new()],
            bytes: 0,
        }
    }
}

impl Verity {
    /// Takes more bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        while !bytes.is_empty() {
            bytes = self.fill(0, bytes);
        }
    }

    /// The digest, lower case digits.
    #[must_use]
    pub fn finish(mut self) -> String {
        let root = self.root();
        let mut descriptor = [0u8; DESCRIPTOR];
        // version, hash algorithm SHA-256, log2 of the block's size.
        descriptor[..3].copy_from_slice(&[1, 1, 12]);
        descriptor[8..16].copy_from_slice(&self.bytes.to_le_bytes());
        descriptor[16..16 + HASH].copy_from_slice(&root);
        hex(&Sha256::digest(descriptor))
    }

    /// Puts bytes into the block of a level; a full one goes up when more comes. Answers what did not fit.
    fn fill<'a>(&mut self, index: usize, bytes: &'a [u8]) -> &'a [u8] {
        if self.levels.get(index).is_some_and(|level| level.filled == BLOCK) {
            self.lift(index);
        }
        let Some(level) = self.levels.get_mut(index) else {
            return &[];
        };
        let room = level.block.get_mut(level.filled..).unwrap_or_default();
        let (now, later) = bytes.split_at(room.len().min(bytes.len()));
        room.get_mut(..now.len()).unwrap_or_default().copy_from_slice(now);
        level.filled += now.len();
        later
    }

    /// Hashes the block of a level, padded with zeros, into the level above.
    fn lift(&mut self, index: usize) {
        let Some(level) = self.levels.get_mut(index) else {
            return;
        };
        level.block.get_mut(level.filled..).unwrap_or_default().fill(0);
        let hash = Sha256::digest(&level.block);
        (level.filled, level.several) = (0, true);
        if self.levels.len() == index + 1 {
            self.levels.push(Level::new());
        }
        self.fill(index + 1, &hash);
    }

    fn root(&mut self) -> [u8; HASH] {
        let mut root = [0; HASH];
        if self.bytes == 0 {
            return root;
        }
        let mut index = 0;
        loop {
            let Some(level) = self.levels.get_mut(index) else {
                return root;
            };
            if level.several {
                self.lift(index);
                index += 1;
                continue;
            }
            // The one block of the topmost level.
            level.block.get_mut(level.filled..).unwrap_or_default().fill(0);
            root.copy_from_slice(&Sha256::digest(&level.block));
            return root;
        }
    }
}

/// The digest of everything that `reader` has, and how much it was.
pub fn measure(mut reader: impl Read) -> io::Result<(String, u64)> {
    let mut verity = Verity::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => {
                let bytes = verity.bytes;
                return Ok((verity.finish(), bytes));
            }
            Ok(count) => verity.update(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Writes, and takes the digest of what is written.
pub(crate) struct Measured<W> {
    sink: W,
    verity: Verity,
}

impl<W: Write> Measured<W> {
    pub(crate) fn new(sink: W) -> Self {
        Self {
            sink,
            verity: Verity::default(),
        }
    }

    pub(crate) fn digest(self) -> String {
        self.verity.finish()
    }
}

impl<W: Write> Write for Measured<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.sink.write(bytes)?;
        self.verity.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Lower case digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tree in whole, level by level, as the documentation describes it.
    fn naive(content: &[u8]) -> String {
        let mut level = content.to_vec();
        let mut root = vec![0; HASH];
        while !content.is_empty() {
            level.resize(level.len().next_multiple_of(BLOCK), 0);
            let hashes: Vec<u8> = level.chunks(BLOCK).flat_map(Sha256::digest).collect();
            if hashes.len() == HASH {
                root = hashes;
                break;
            }
            level = hashes;
        }
        let mut descriptor = vec![1, 1, 12, 0, 0, 0, 0, 0];
        descriptor.extend((content.len() as u64).to_le_bytes());
        descriptor.extend(root);
        descriptor.resize(DESCRIPTOR, 0);
        hex(&Sha256::digest(descriptor))
    }

    #[test]
    fn the_digest_is_the_one_of_the_tree_in_whole() {
        let content: Vec<u8> = (0..(300 * BLOCK as u32)).map(|i| (i % 251) as u8).collect();
        for length in [
            0,
            1,
            BLOCK - 1,
            BLOCK,
            BLOCK + 1,
            128 * BLOCK,
            128 * BLOCK + 1,
            256 * BLOCK,
            300 * BLOCK,
        ] {
            let (digest, bytes) = measure(&content[..length]).unwrap();
            assert_eq!(bytes, length as u64);
            assert_eq!(digest, naive(&content[..length]), "{length} bytes");
        }
    }

    #[test]
    fn the_digest_does_not_depend_on_the_pieces() {
        let content = vec![7; 3 * BLOCK + 100];
        let mut pieces = Measured::new(Vec::new());
        for piece in content.chunks(777) {
            pieces.write_all(piece).unwrap();
        }
        assert_eq!(pieces.digest(), naive(&content));
    }

    #[test]
    fn the_empty_file_has_the_digest_that_everybody_finds() {
        let empty = "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95";
        assert_eq!(measure(&b""[..]).unwrap().0, empty);
    }
}
