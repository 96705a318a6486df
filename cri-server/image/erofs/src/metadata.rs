//! Where the tree goes in the image: blocks of directories and of long link targets first, then one area with all inodes, the root
//! first, in the order of a walk by name.
//!
//! Two passes over the tree: the first gives every inode its place, which directories need for their entries; the second writes.

use crate::error::{ErofsError, LimitKind};
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
struct Plan {
    placed: Vec<Placed>,
    /// By inode: its place in the metadata area.
    offsets: Vec<u64>,
    /// End of the metadata area.
    end: u64,
    /// Blocks before it.
    blocks: u64,
}

const NOT_PLACED: u64 = u64::MAX;

/// Writes all metadata but the superblock, and answers that.
pub(crate) fn write(tree: &Tree, output: &mut Output) -> Result<Superblock, ErofsError> {
    let first_block = output.next_block();
    let plan = Plan::new(tree, first_block);
    let metadata_block = first_block + plan.blocks;
    let end = metadata_block * BLOCK + plan.end;
    output.check_room(end - output.position())?;
    let too_large = ErofsError::Limit {
        what: LimitKind::ImageBytes,
        limit: u64::from(u32::MAX) * BLOCK,
    };
    let (Ok(blocks), Ok(metadata)) = (u32::try_from(end.div_ceil(BLOCK)), u32::try_from(metadata_block))
    else {
        return Err(too_large);
    };
    for placed in &plan.placed {
        write_blocks(tree, &plan, placed, output)?;
    }
    for (number, placed) in (1..).zip(&plan.placed) {
        output.pad_to(metadata_block * BLOCK + placed.offset)?;
        write_inode(tree, &plan, placed, number, output)?;
    }
    Ok(Superblock {
        root_nid: (plan.offset(ROOT) / INODE_SLOT) as u16,
        inodes: plan.placed.len() as u64,
        blocks,
        metadata_block: metadata,
    })
}

impl Plan {
    fn new(tree: &Tree, first_block: u64) -> Self {
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
            plan.place(tree.inode(id), id, first_block);
            if let Some(directory) = tree.directory(id) {
                to_visit.extend(directory.children.values().rev().map(|link| link.inode));
            }
        }
        plan
    }

    fn place(&mut self, inode: &Inode, id: InodeId, first_block: u64) {
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
        let start = first_block + self.blocks;
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

fn write_blocks(tree: &Tree, plan: &Plan, placed: &Placed, output: &mut Output) -> Result<(), ErofsError> {
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
                output.pad_to(output.position().next_multiple_of(BLOCK))?;
                rest = left;
            }
            Ok(())
        }
        Node::Symlink(target) => {
            output.append(target)?;
            output.pad_to(output.position().next_multiple_of(BLOCK))
        }
        _ => Ok(()),
    }
}

fn write_inode(
    tree: &Tree,
    plan: &Plan,
    placed: &Placed,
    number: u32,
    output: &mut Output,
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
        Node::Regular { size, start } => (size, start),
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
