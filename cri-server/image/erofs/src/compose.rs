//! Converted layers in, the metadata of one image out.
//!
//! The disk of an image is its metadata, then those of its layers that have contents, one behind the other, bottom first: an ordinary EROFS
//! file system whose blocks happen to lie in several files. Layers are shared by images as they are; whiteouts, replaced files and hard
//! links are settled here, by replaying every layer's entries on one tree.

use std::fs::File;
use std::io::Write;

use crate::convert::{ConvertedLayer, LayerSummary};
use crate::error::{EntryProblem, ErofsError, LimitKind, Refusal};
use crate::layout::BLOCK;
use crate::limits::Limits;
use crate::metadata::Plan;
use crate::output::Output;
use crate::path::{self, Destination};
use crate::record::{Kind, Record};
use crate::resolve::Missing;
use crate::tree::{Attributes, InodeId, Node, ROOT, Tree};

/// A composed image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSummary {
    /// Length of the metadata, a multiple of 4096.
    pub metadata_bytes: u64,
    /// Length of the disk: metadata and all layers that have contents.
    pub bytes: u64,
    /// Files in the image.
    pub inodes: u64,
}

/// Stacks converted layers.
///
/// Memory is bounded by the limits and a fixed cap on names and metadata. After an error every further call fails.
pub struct Composer {
    limits: Limits,
    tree: Tree,
    /// Blocks of the layers so far.
    blocks: u64,
    contents: u64,
    failed: bool,
}

impl Composer {
    /// No layers yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            tree: Tree::new(&limits),
            limits,
            blocks: 0,
            contents: 0,
            failed: false,
        }
    }

    /// Applies one converted layer on top of those before (bottom first).
    pub fn layer(&mut self, file: &File) -> Result<LayerSummary, ErofsError> {
        if std::mem::replace(&mut self.failed, true) {
            return Err(ErofsError::AlreadyFailed);
        }
        let layer = ConvertedLayer::open(file)?;
        self.begin(&layer)?;
        layer.for_each(|record| self.entry(record))?;
        if layer.summary.data_bytes > 0 {
            self.blocks += layer.blocks();
        }
        self.failed = false;
        Ok(layer.summary)
    }

    /// Writes the metadata; answers the sink as well.
    pub fn finish<W: Write>(self, sink: W) -> Result<(W, ImageSummary), ErofsError> {
        if self.failed {
            return Err(ErofsError::AlreadyFailed);
        }
        let plan = Plan::new(&self.tree);
        let metadata_bytes = plan.blocks() * BLOCK;
        let mut output = Output::new(sink, self.limits.max_image_bytes);
        output.check_room(metadata_bytes + self.blocks * BLOCK)?;
        plan.write(&self.tree, self.blocks, &mut output)?;
        let (sink, written) = output.finish()?;
        let summary = ImageSummary {
            metadata_bytes: written,
            bytes: written + self.blocks * BLOCK,
            inodes: plan.inodes(),
        };
        Ok((sink, summary))
    }

    /// The entries that follow are of this layer, on top of those before.
    pub(crate) fn begin(&mut self, layer: &ConvertedLayer<'_>) -> Result<(), ErofsError> {
        self.count(layer)?;
        self.tree.begin_layer().map_err(|refusal| refusal.of(b""))
    }

    /// Applies one entry.
    pub(crate) fn entry(&mut self, mut record: Record) -> Result<(), ErofsError> {
        let path = std::mem::take(&mut record.path);
        self.apply(&path, record, self.blocks)
            .map_err(|refusal| refusal.of(&path))
    }

    /// What the file has that a hard link names, as composed so far.
    pub(crate) fn link_attributes(
        &mut self,
        link: &Record,
        target: &[u8],
    ) -> Result<&Attributes, ErofsError> {
        let target = self.link_target(target);
        let target = target.map_err(|refusal| refusal.of(&link.path))?;
        Ok(&self.tree.inode(target).attributes)
    }

    fn count(&mut self, layer: &ConvertedLayer<'_>) -> Result<(), ErofsError> {
        let limit = self.limits.max_image_bytes;
        self.contents = self.contents.saturating_add(layer.summary.data_bytes);
        let blocks = self.blocks + layer.blocks();
        if self.contents > limit || blocks > limit.min(u64::from(u32::MAX - 1) * BLOCK) / BLOCK {
            return Err(ErofsError::Limit {
                what: LimitKind::ImageBytes,
                limit,
            });
        }
        Ok(())
    }

    fn apply(&mut self, path: &[u8], record: Record, base: u64) -> Result<(), Refusal> {
        self.tree.count_entry()?;
        match path::destination(path)? {
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
            Destination::Root if record.kind == Kind::Directory => {
                self.tree.set_root_attributes(record.attributes)
            }
            Destination::Root => Err(EntryProblem::Root.into()),
            Destination::Entry { parent, name } => {
                let directory = self.tree.resolve(&parent, Missing::Create)?.unwrap_or(ROOT);
                self.put(directory, name, record, base)
            }
        }
    }

    fn put(&mut self, parent: InodeId, name: &[u8], record: Record, base: u64) -> Result<(), Refusal> {
        let node = match record.kind {
            Kind::HardLink(target) => {
                let target = self.link_target(&target)?;
                return self.tree.link(parent, name, target);
            }
            Kind::Directory => return self.tree.put_directory(parent, name, record.attributes),
            // Fits: the sum of all layers' blocks does.
            Kind::Regular { size, start } => Node::Regular {
                size,
                start: (base + u64::from(start)) as u32,
            },
            Kind::Symlink(target) => Node::Symlink(target.into()),
            Kind::Char(0) | Kind::Marker => return Err(EntryProblem::WhiteoutDevice.into()),
            Kind::Char(number) => Node::Char(number),
            Kind::Block(number) => Node::Block(number),
            Kind::Fifo => Node::Fifo,
        };
        self.tree.put(parent, name, node, record.attributes)
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
}
