//! The archive that an export writes: blobs by digest, each once, and documents that name them.
//!
//! How long a layer becomes is known when it is made, and a header stands before it: the file is written at positions, and so cannot be a pipe.
//! Blocks; called on blocking threads.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
};

use bytes::Bytes;
use caisson_erofs::member_header;
use tokio::sync::mpsc;

use crate::digest::Digest;

/// Headers and contents come in blocks of this many bytes.
const BLOCK: u64 = 512;

/// An archive that is being written.
pub(super) struct Archive {
    file: File,
    /// Where the next member begins.
    end: u64,
    blobs: BTreeSet<Digest>,
}

/// What a blob is, as manifests have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Descriptor {
    pub(super) digest: Digest,
    pub(super) size: u64,
}

impl Archive {
    /// One in this file, which is empty.
    pub(super) fn new(file: File) -> Self {
        Self {
            file,
            end: 0,
            blobs: BTreeSet::new(),
        }
    }

    /// Adds a document under a name of its own.
    pub(super) fn document(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let size = content.len() as u64;
        self.file.write_all_at(content, self.end + BLOCK)?;
        self.seal(name, size)
    }

    /// Adds a blob, unless it is there.
    pub(super) fn blob(&mut self, content: &[u8]) -> io::Result<Descriptor> {
        let (digest, size) = (Digest::of(content), content.len() as u64);
        if !self.blobs.contains(&digest) {
            self.document(&blob_name(&digest), content)?;
            self.blobs.insert(digest.clone());
        }
        Ok(Descriptor { digest, size })
    }

    /// Writes what comes, of at most `cap` bytes, where the next member would be; [`Archive::keep`] makes it one.
    pub(super) fn stream(&mut self, chunks: &mut mpsc::Receiver<Bytes>, cap: u64) -> io::Result<Descriptor> {
        let mut hasher = Digest::of(b"").hasher();
        let mut size = 0_u64;
        while let Some(chunk) = chunks.blocking_recv() {
            let position = self.end + BLOCK + size;
            size = size.saturating_add(chunk.len() as u64);
            if size > cap {
                let reason = format!("it becomes larger than {cap} bytes, which no such layer is");
                return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
            }
            hasher.update(&chunk);
            self.file.write_all_at(&chunk, position)?;
        }
        let digest = hasher.finish();
        Ok(Descriptor { digest, size })
    }

    /// Makes a blob of what was written last, unless it is there. What is not kept is written over.
    pub(super) fn keep(&mut self, blob: &Descriptor) -> io::Result<()> {
        if self.blobs.insert(blob.digest.clone()) {
            self.seal(&blob_name(&blob.digest), blob.size)?;
        }
        Ok(())
    }

    /// Puts the header before the contents that were written, and zeros behind them.
    fn seal(&mut self, name: &str, size: u64) -> io::Result<()> {
        self.file.write_all_at(&member_header(name, size), self.end)?;
        let contents = self.end + BLOCK;
        let next = (contents + size).next_multiple_of(BLOCK);
        let zeros = [0; BLOCK as usize];
        let padding = usize::try_from(next - contents - size).unwrap_or_default();
        self.file
            .write_all_at(zeros.get(..padding).unwrap_or_default(), contents + size)?;
        self.end = next;
        Ok(())
    }

    /// Ends the archive and the file with it.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        self.file.set_len(self.end)?;
        // Grows by zeros, two blocks of which are the end.
        self.file.set_len(self.end + 2 * BLOCK)?;
        self.file.flush()
    }
}

/// Where a blob of the layout is.
pub(super) fn blob_name(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use caisson_erofs::{MemberContent, members};

    use super::*;

    fn sent(chunks: &[&'static [u8]]) -> mpsc::Receiver<Bytes> {
        let (sender, receiver) = mpsc::channel(8);
        for chunk in chunks {
            sender.try_send(Bytes::from_static(chunk)).unwrap();
        }
        receiver
    }

    #[test]
    fn a_blob_is_there_once_and_what_was_written_twice_leaves_no_trace() {
        let mut file = tempfile::tempfile().unwrap();
        let mut archive = Archive::new(file.try_clone().unwrap());
        archive
            .stream(&mut sent(&[b"longer, and not kept"]), 100)
            .unwrap();
        let first = archive.stream(&mut sent(&[b"lay", b"er"]), 100).unwrap();
        archive.keep(&first).unwrap();
        let again = archive.stream(&mut sent(&[b"layer"]), 100).unwrap();
        archive.keep(&again).unwrap();
        assert_eq!((&first, first.size), (&again, 5));
        let other = archive.blob(b"x").unwrap();
        assert_eq!(archive.blob(b"x").unwrap(), other);
        archive.document("oci-layout", b"{}").unwrap();
        archive.finish().unwrap();
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 3 * 1024 + 1024);
        let mut found = Vec::new();
        members(bytes.as_slice(), |member| {
            let MemberContent::Bytes { offset, size } = member.content else {
                panic!("{member:?}")
            };
            let content = bytes[offset as usize..(offset + size) as usize].to_vec();
            found.push((String::from_utf8(member.name).unwrap(), content));
            true
        })
        .unwrap();
        let expected = [
            (blob_name(&first.digest), b"layer".to_vec()),
            (blob_name(&other.digest), b"x".to_vec()),
            ("oci-layout".to_owned(), b"{}".to_vec()),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_layer_without_end_is_not_written_to_its_end() {
        let mut archive = Archive::new(tempfile::tempfile().unwrap());
        let error = archive.stream(&mut sent(&[b"lay", b"er"]), 4).unwrap_err();
        assert!(error.to_string().contains("4 bytes"), "{error}");
    }
}
