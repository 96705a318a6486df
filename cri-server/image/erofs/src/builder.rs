//! The crate's front: layers are taken apart entry by entry, contents go to the output and the rest to the tree.

use std::fs::File;
use std::io::Read;

use crate::error::{EntryProblem, ErofsError, LimitKind, Refusal};
use crate::layout::{BLOCK, device_number};
use crate::limits::{Limits, MAX_SYMLINK_BYTES};
use crate::metadata;
use crate::output::{Extent, Output};
use crate::path::{self, Destination};
use crate::resolve::Missing;
use crate::tar::{Archive, Entry, EntryKind};
use crate::tree::{Attributes, InodeId, Node, ROOT, Tree};
use crate::xattr;

/// What one layer had in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// Archive entries, whiteouts included, extension headers not.
    pub entries: u64,
    /// Bytes of file contents.
    pub data_bytes: u64,
}

/// A finished image.
#[derive(Debug)]
pub struct ImageSummary {
    /// Length of the file, a multiple of 4096. It may occupy less on disk.
    pub bytes: u64,
    /// Files in the image.
    pub inodes: u64,
    /// The output, not synced yet.
    pub file: File,
}

/// Makes one flattened image out of layers.
///
/// Memory use is bounded by the limits and a fixed cap on names and metadata; contents are never held. After an error the output is of
/// no use and every further call fails.
pub struct ImageBuilder {
    limits: Limits,
    tree: Tree,
    output: Output,
    /// Contents of all entries so far, those that did not go into the image included.
    contents: u64,
    failed: bool,
}

impl ImageBuilder {
    /// `output` is an empty read-write file; data is written to it while layers stream in.
    pub fn new(output: File, limits: Limits) -> Result<Self, ErofsError> {
        let output = Output::new(output, limits.max_image_bytes)?;
        Ok(Self {
            limits,
            tree: Tree::new(&limits),
            output,
            contents: 0,
            failed: false,
        })
    }

    /// Applies one uncompressed layer archive on top of those before (bottom first).
    ///
    /// Reads until the archive's end, then drains the reader to its end so that digests over it are complete; what follows the
    /// archive is ignored, as tar does, up to a cap. Equal layers give equal bytes in the image.
    pub fn layer(&mut self, tar: impl Read) -> Result<LayerSummary, ErofsError> {
        if std::mem::replace(&mut self.failed, true) {
            return Err(ErofsError::AlreadyFailed);
        }
        let summary = self.apply(Archive::new(tar, self.limits.max_path_bytes))?;
        self.failed = false;
        Ok(summary)
    }

    /// Writes metadata and superblock. The caller syncs and renames.
    pub fn finish(self) -> Result<ImageSummary, ErofsError> {
        if self.failed {
            return Err(ErofsError::AlreadyFailed);
        }
        let mut output = self.output;
        let superblock = metadata::write(&self.tree, &mut output)?;
        let (file, bytes) = output.finish(&superblock.encode())?;
        Ok(ImageSummary {
            bytes,
            inodes: superblock.inodes,
            file,
        })
    }

    fn apply<R: Read>(&mut self, mut archive: Archive<R>) -> Result<LayerSummary, ErofsError> {
        let mut summary = LayerSummary {
            entries: 0,
            data_bytes: 0,
        };
        self.tree.begin_layer().map_err(|refusal| refusal.of(b""))?;
        while let Some(entry) = archive.next_entry()? {
            summary.entries += 1;
            self.count_contents(entry.size)?;
            summary.data_bytes += entry.size;
            self.apply_entry(entry, &mut archive)?;
        }
        archive.drain()?;
        self.punch_orphans()?;
        Ok(summary)
    }

    /// Contents that are skipped (of whiteouts, say) cost time as well, so the limit counts them, too.
    fn count_contents(&mut self, size: u64) -> Result<(), ErofsError> {
        let limit = self.limits.max_image_bytes;
        self.contents = self.contents.saturating_add(size);
        if self.contents > limit {
            return Err(ErofsError::Limit {
                what: LimitKind::ImageBytes,
                limit,
            });
        }
        Ok(())
    }

    fn apply_entry<R: Read>(&mut self, entry: Entry, archive: &mut Archive<R>) -> Result<(), ErofsError> {
        let contents = match path::destination(&entry.path) {
            // Contents are written before anything can hold on to them.
            Ok(Destination::Entry { .. }) if entry.kind == EntryKind::Regular => {
                self.write_contents(entry.size, archive)?
            }
            _ => 0,
        };
        let path = entry.path.clone();
        self.change_tree(entry, contents)
            .map_err(|refusal| refusal.of(&path))
    }

    /// Appends the contents of the current entry; answers their first block.
    fn write_contents<R: Read>(&mut self, size: u64, archive: &mut Archive<R>) -> Result<u32, ErofsError> {
        // Block numbers fit: the output's limit sees to that.
        let start = self.output.next_block() as u32;
        self.output
            .append_blocks(size, |part| archive.read_contents(part))?;
        Ok(start)
    }

    fn change_tree(&mut self, entry: Entry, contents: u32) -> Result<(), Refusal> {
        self.tree.count_entry()?;
        match path::destination(&entry.path)? {
            Destination::Ignored => Ok(()),
            Destination::Whiteout { parent, name } => {
                if let Some(parent) = self.tree.resolve(&parent, Missing::Stop)? {
                    self.tree.whiteout(parent, name);
                }
                Ok(())
            }
            Destination::Opaque { parent } => {
                if let Some(directory) = self.tree.resolve(&parent, Missing::Stop)? {
                    self.tree.clear_lower(directory);
                }
                Ok(())
            }
            Destination::Root if entry.kind == EntryKind::Directory => {
                let attributes = self.attributes(&entry)?;
                self.tree.set_root_attributes(attributes)
            }
            Destination::Root => Err(EntryProblem::Root.into()),
            Destination::Entry { parent, name } => {
                let directory = self.tree.resolve(&parent, Missing::Create)?.unwrap_or(ROOT);
                self.put(directory, name, &entry, contents)
            }
        }
    }

    fn put(&mut self, parent: InodeId, name: &[u8], entry: &Entry, contents: u32) -> Result<(), Refusal> {
        let node = match &entry.kind {
            EntryKind::HardLink(target) => {
                let target = self.link_target(target)?;
                return self.tree.link(parent, name, target);
            }
            EntryKind::Directory => {
                let attributes = self.attributes(entry)?;
                return self.tree.put_directory(parent, name, attributes);
            }
            EntryKind::Regular => Node::Regular {
                size: entry.size,
                start: contents,
            },
            EntryKind::Symlink(target) if target.is_empty() || target.len() > MAX_SYMLINK_BYTES => {
                return Err(EntryProblem::SymlinkTarget.into());
            }
            EntryKind::Symlink(target) if target.contains(&0) => return Err(EntryProblem::Nul.into()),
            EntryKind::Symlink(target) => Node::Symlink(target.as_slice().into()),
            EntryKind::Char { major: 0, minor: 0 } => return Err(EntryProblem::WhiteoutDevice.into()),
            EntryKind::Char { major, minor } => Node::Char(device_number(*major, *minor)),
            EntryKind::Block { major, minor } => Node::Block(device_number(*major, *minor)),
            EntryKind::Fifo => Node::Fifo,
        };
        let attributes = self.attributes(entry)?;
        self.tree.put(parent, name, node, attributes)
    }

    /// The file that a hard link names, as composed so far. Links above it are followed, it itself is not.
    fn link_target(&mut self, target: &[u8]) -> Result<InodeId, Refusal> {
        let mut parent = path::split(target)?;
        let Some(name) = parent.pop() else {
            return Err(EntryProblem::LinkTargetDirectory.into());
        };
        let directory = self.tree.resolve(&parent, Missing::Stop)?;
        let target = directory.and_then(|directory| self.tree.child(directory, name));
        target.ok_or_else(|| EntryProblem::LinkTargetMissing.into())
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

    fn punch_orphans(&mut self) -> Result<(), ErofsError> {
        let extents = self.tree.take_orphans().into_iter().map(|orphan| Extent {
            start: u64::from(orphan.start),
            blocks: orphan.size.div_ceil(BLOCK),
        });
        self.output.punch(extents.collect())
    }
}
