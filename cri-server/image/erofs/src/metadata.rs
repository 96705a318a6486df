//! Where the tree goes in the image: the superblock, blocks of directories and of long link targets, then one area with all inodes, the
//! root first, in the order of a walk by name. Contents lie behind all that.
//!
//! Two passes over the tree: the first gives every inode its place, which directories need for their entries; the second writes.

use std::io::Write;

use crate::error::ErofsError;
use crate::layout::{
    BLOCK, DirectoryEntry, ExtendedInode, FileType, INODE_BYTES, INODE_SLOT, NO_BLOCK, Superblock,
    XATTR_HEADER_BYTES, directory_block, directory_bytes,
};
use crate::output::Output;
use crate::tree::{Directory, Inode, InodeId, Node, ROOT, Tree};

/// An inode with its place.
struct Placed {
    inode: InodeId,
    /// From the start of the metadata area.
    offset: u64,
    /// Bytes of a directory or link target.
    size: u64,
    /// Blocks outside of the metadata area that it needs, and the first of them.
    blocks: u64,
    start: u64,
    /// What is not in those blocks stands behind the inode.
    inline_tail: bool,
}

/// The image's metadata, planned.
pub(crate) struct Plan {
    placed: Vec<Placed>,
    /// By inode: its place in the metadata area.
    offsets: Vec<u64>,
    /// End of the metadata area.
    end: u64,
    /// Blocks between the superblock and it.
    blocks: u64,
}

/// The superblock's.
const FIRST_BLOCK: u64 = 1;

const NOT_PLACED: u64 = u64::MAX;

impl Plan {
    pub(crate) fn new(tree: &Tree) -> Self {
        // Number 0 means "none" to readers, so the first slot stays empty.
        let offsets = vec![NOT_PLACED; tree.capacity()];
        let mut plan = Self {
            placed: Vec::new(),
            offsets,
            end: INODE_SLOT,
            blocks: 0,
        };
        let mut to_visit = vec![ROOT];
        while let Some(id) = to_visit.pop() {
            // A hard link's inode is placed where its first name is.
            if plan.offset(id) != NOT_PLACED {
                continue;
            }
            plan.place(tree.inode(id), id);
            if let Some(directory) = tree.directory(id) {
                to_visit.extend(directory.children.values().rev().map(|link| link.inode));
            }
        }
        plan
    }

    /// Files in the image.
    pub(crate) fn inodes(&self) -> u64 {
        self.placed.len() as u64
    }

    /// Blocks of all metadata: where contents begin.
    pub(crate) fn blocks(&self) -> u64 {
        self.metadata_block() + self.end.div_ceil(BLOCK)
    }

    fn metadata_block(&self) -> u64 {
        FIRST_BLOCK + self.blocks
    }

    /// Writes all metadata; so many blocks of contents follow it. The caller has checked that the output has room for both, so that every
    /// block's number fits.
    pub(crate) fn write<W: Write>(
        &self,
        tree: &Tree,
        contents: u64,
        output: &mut Output<W>,
    ) -> Result<(), ErofsError> {
        let superblock = Superblock {
            root_nid: (self.offset(ROOT) / INODE_SLOT) as u16,
            inodes: self.inodes(),
            blocks: (self.blocks() + contents) as u32,
            metadata_block: self.metadata_block() as u32,
        };
        output.append(&superblock.encode())?;
        for placed in &self.placed {
            write_blocks(tree, self, placed, output)?;
        }
        for (number, placed) in (1..).zip(&self.placed) {
            output.pad_to(self.metadata_block() * BLOCK + placed.offset)?;
            write_inode(tree, self, placed, number, output)?;
        }
        output.pad()
    }

    fn place(&mut self, inode: &Inode, id: InodeId) {
        let size = match &inode.node {
            Node::Directory(directory) => directory_bytes(names(directory).into_iter()),
            Node::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        let fixed = INODE_BYTES + xattr_bytes(inode);
        let tail = size % BLOCK;
        // A tail lies in one block, together with its inode.
        let inline_tail = tail > 0 && fixed + tail <= BLOCK;
        let blocks = if inline_tail {
            size / BLOCK
        } else {
            size.div_ceil(BLOCK)
        };
        let whole = if inline_tail { fixed + tail } else { INODE_BYTES };
        let mut offset = self.end.next_multiple_of(INODE_SLOT);
        if offset % BLOCK + whole > BLOCK {
            offset = offset.next_multiple_of(BLOCK);
        }
        self.end = offset + fixed + if inline_tail { tail } else { 0 };
        let start = FIRST_BLOCK + self.blocks;
        self.blocks += blocks;
        if let Some(slot) = self.offsets.get_mut(id as usize) {
            *slot = offset;
        }
        self.placed.push(Placed {
            inode: id,
            offset,
            size,
            blocks,
            start,
            inline_tail,
        });
    }

    fn offset(&self, id: InodeId) -> u64 {
        self.offsets.get(id as usize).copied().unwrap_or(NOT_PLACED)
    }

    /// A directory's entries in order.
    fn entries<'a>(&self, tree: &'a Tree, id: InodeId, directory: &'a Directory) -> Vec<DirectoryEntry<'a>> {
        let target = |name: &[u8]| match name {
            b"." => id,
            b".." => directory.parent,
            _ => directory.children.get(name).map_or(id, |link| link.inode),
        };
        let entry = |name| {
            let target = target(name);
            let nid = self.offset(target) / INODE_SLOT;
            DirectoryEntry {
                name,
                nid,
                file_type: file_type(&tree.inode(target).node),
            }
        };
        names(directory).into_iter().map(entry).collect()
    }
}

/// A directory's names with the two that every directory has, sorted by bytes as readers expect.
fn names(directory: &Directory) -> Vec<&[u8]> {
    let mut names = Vec::with_capacity(directory.children.len() + 2);
    names.extend(directory.children.keys().map(|name| &**name));
    names.extend([&b"."[..], b".."]);
    // Two sorted runs: the stable sort merges them in linear time.
    names.sort();
    names
}

fn write_blocks<W: Write>(
    tree: &Tree,
    plan: &Plan,
    placed: &Placed,
    output: &mut Output<W>,
) -> Result<(), ErofsError> {
    if placed.blocks == 0 {
        return Ok(());
    }
    match &tree.inode(placed.inode).node {
        Node::Directory(directory) => {
            let entries = plan.entries(tree, placed.inode, directory);
            let mut rest = entries.as_slice();
            for _ in 0..placed.blocks {
                let (block, left) = directory_block(rest);
                output.append(&block)?;
                output.pad()?;
                rest = left;
            }
            Ok(())
        }
        Node::Symlink(target) => {
            output.append(target)?;
            output.pad()
        }
        _ => Ok(()),
    }
}

fn write_inode<W: Write>(
    tree: &Tree,
    plan: &Plan,
    placed: &Placed,
    number: u32,
    output: &mut Output<W>,
) -> Result<(), ErofsError> {
    let inode = tree.inode(placed.inode);
    let attributes = &inode.attributes;
    let start = if placed.blocks == 0 {
        NO_BLOCK
    } else {
        placed.start as u32
    };
    let (size, address) = match inode.node {
        Node::Regular { size: 0, .. } => (0, NO_BLOCK),
        // Fits: see [`Plan::write`].
        Node::Regular { size, start } => (size, (plan.blocks() + u64::from(start)) as u32),
        Node::Char(device) | Node::Block(device) => (0, device),
        Node::Fifo => (0, 0),
        _ => (placed.size, start),
    };
    let head = ExtendedInode {
        file_type: file_type(&inode.node),
        inline_tail: placed.inline_tail,
        xattr_bytes: attributes.xattrs.len(),
        permissions: attributes.permissions,
        size,
        address,
        number,
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
        links: links(tree, inode),
    };
    output.append(&head.encode())?;
    if !attributes.xattrs.is_empty() {
        output.append(&[0; XATTR_HEADER_BYTES as usize])?;
        output.append(&attributes.xattrs)?;
    }
    if !placed.inline_tail {
        return Ok(());
    }
    match &inode.node {
        Node::Symlink(target) => output.append(target),
        Node::Directory(directory) => {
            let entries = plan.entries(tree, placed.inode, directory);
            let mut rest = entries.as_slice();
            let mut tail = Vec::new();
            while !rest.is_empty() {
                (tail, rest) = directory_block(rest);
            }
            output.append(&tail)
        }
        _ => Ok(()),
    }
}

/// Directories count themselves, their name and their subdirectories' way back.
fn links(tree: &Tree, inode: &Inode) -> u32 {
    let Node::Directory(directory) = &inode.node else {
        return inode.links;
    };
    let subdirectories = directory
        .children
        .values()
        .filter(|link| tree.directory(link.inode).is_some());
    2 + subdirectories.count() as u32
}

fn xattr_bytes(inode: &Inode) -> u64 {
    match inode.attributes.xattrs.len() as u64 {
        0 => 0,
        bytes => XATTR_HEADER_BYTES + bytes,
    }
}

fn file_type(node: &Node) -> FileType {
    match node {
        Node::Directory(_) => FileType::Directory,
        Node::Symlink(_) => FileType::Symlink,
        Node::Char(_) => FileType::Char,
        Node::Block(_) => FileType::Block,
        Node::Fifo => FileType::Fifo,
        // Freed inodes have no name, so none is ever written.
        Node::Regular { .. } | Node::Free => FileType::Regular,
    }
}
