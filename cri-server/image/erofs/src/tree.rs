//! The files of an image as composed so far, and how a layer changes them.
//!
//! Knows names, metadata and where contents are; must not know tar, nor the on-disk format. Inodes live in one array and refer to each
//! other by index, so that hostile nesting can overflow no stack. Every directory entry remembers which layer put it there: that makes
//! whiteouts independent of their place in the archive, and lets each of them cost only what it removes.

use std::collections::BTreeMap;

use crate::error::{EntryProblem, LimitKind, Refusal};
use crate::limits::{Limits, MAX_DEPTH, MAX_TREE_BYTES};
use crate::tar::Timestamp;

/// Index of an inode.
pub(crate) type InodeId = u32;
/// The root directory, which is always there.
pub(crate) const ROOT: InodeId = 0;

/// What bookkeeping costs in memory, roughly, on top of names, targets and attributes.
const INODE_COST: u64 = 144;
const DIRECTORY_COST: u64 = 400;

/// Metadata that all kinds of files have.
#[derive(Debug)]
pub(crate) struct Attributes {
    /// The twelve permission bits.
    pub(crate) permissions: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Timestamp,
    /// As on disk; see [`crate::xattr::encode`].
    pub(crate) xattrs: Box<[u8]>,
}

impl Attributes {
    /// Those of directories that no layer has an entry for.
    pub(crate) fn implicit() -> Self {
        let mtime = Timestamp::default();
        Self {
            permissions: 0o755,
            uid: 0,
            gid: 0,
            mtime,
            xattrs: Box::default(),
        }
    }
}

/// What a file is.
#[derive(Debug)]
pub(crate) enum Node {
    /// Contents in consecutive blocks from `start`, counted from the first block of all layers; the start of an empty file means nothing.
    Regular {
        size: u64,
        start: u32,
    },
    Directory(Box<Directory>),
    Symlink(Box<[u8]>),
    /// Character or block device, with the number as Linux encodes it.
    Char(u32),
    Block(u32),
    Fifo,
    /// Removed; its index is used again.
    Free,
}

/// A directory's entries, sorted.
#[derive(Debug)]
pub(crate) struct Directory {
    pub(crate) parent: InodeId,
    pub(crate) children: BTreeMap<Box<[u8]>, Link>,
    depth: u32,
    /// The layer in which nothing of lower layers is left below it.
    cleared_in: u32,
}

/// A directory entry.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) inode: InodeId,
    /// The layer that has an entry for it, or that made it for an entry below.
    layer: u32,
}

/// A file.
#[derive(Debug)]
pub(crate) struct Inode {
    pub(crate) attributes: Attributes,
    pub(crate) node: Node,
    /// Directory entries that lead to it.
    pub(crate) links: u32,
}

/// All files.
pub(crate) struct Tree {
    inodes: Vec<Inode>,
    free: Vec<InodeId>,
    layer: u32,
    /// Entries and directories made for them, ever.
    entries: u64,
    max_entries: u64,
    /// Memory in use, by the costs above.
    bytes: u64,
    max_bytes: u64,
    pub(crate) link_steps: u64,
}

impl Tree {
    pub(crate) fn new(limits: &Limits) -> Self {
        let root = Directory {
            parent: ROOT,
            children: BTreeMap::new(),
            depth: 0,
            cleared_in: 0,
        };
        let node = Node::Directory(Box::new(root));
        Self {
            inodes: vec![Inode {
                attributes: Attributes::implicit(),
                node,
                links: 1,
            }],
            free: Vec::new(),
            layer: 0,
            entries: 0,
            max_entries: limits.max_entries,
            bytes: 0,
            max_bytes: MAX_TREE_BYTES,
            link_steps: 0,
        }
    }

    /// What follows belongs to a new layer above the others.
    pub(crate) fn begin_layer(&mut self) -> Result<(), Refusal> {
        // A layer costs at least as much as an entry.
        self.count_entry()?;
        self.layer += 1;
        Ok(())
    }

    /// Counts an entry of an archive, whatever it does.
    pub(crate) fn count_entry(&mut self) -> Result<(), Refusal> {
        self.entries += 1;
        if self.entries > self.max_entries.min(u64::from(u32::MAX - 1)) {
            return Err(Refusal::Limit(LimitKind::Entries, self.max_entries));
        }
        Ok(())
    }

    pub(crate) fn inode(&self, id: InodeId) -> &Inode {
        &self.inodes[id as usize]
    }

    /// The directory with that index, if it is one.
    pub(crate) fn directory(&self, id: InodeId) -> Option<&Directory> {
        match &self.inode(id).node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    pub(crate) fn child(&self, directory: InodeId, name: &[u8]) -> Option<InodeId> {
        Some(self.directory(directory)?.children.get(name)?.inode)
    }

    /// Inodes in use or ever used: every [`InodeId`] is below that.
    pub(crate) fn capacity(&self) -> usize {
        self.inodes.len()
    }

    pub(crate) fn set_root_attributes(&mut self, attributes: Attributes) -> Result<(), Refusal> {
        self.set_attributes(ROOT, attributes)
    }

    /// Puts a file there that is not a directory, in place of whatever there was.
    pub(crate) fn put(
        &mut self,
        parent: InodeId,
        name: &[u8],
        node: Node,
        attributes: Attributes,
    ) -> Result<(), Refusal> {
        let inode = self.allocate(node, attributes)?;
        self.attach(parent, name, inode)
    }

    /// Puts a directory there; one that is there already keeps its children.
    pub(crate) fn put_directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
        attributes: Attributes,
    ) -> Result<(), Refusal> {
        match self
            .child(parent, name)
            .filter(|id| self.directory(*id).is_some())
        {
            Some(existing) => {
                self.mark(parent, name);
                self.set_attributes(existing, attributes)
            }
            None => self.make_directory(parent, name, attributes).map(drop),
        }
    }

    /// Makes a directory that an entry needs and no layer has.
    pub(crate) fn make_implicit_directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
    ) -> Result<InodeId, Refusal> {
        self.count_entry()?;
        self.make_directory(parent, name, Attributes::implicit())
    }

    /// One more name for a file that is not a directory, in place of whatever there was.
    pub(crate) fn link(&mut self, parent: InodeId, name: &[u8], target: InodeId) -> Result<(), Refusal> {
        if self.directory(target).is_some() {
            return Err(EntryProblem::LinkTargetDirectory.into());
        }
        if self.child(parent, name) == Some(target) {
            self.mark(parent, name);
            return Ok(());
        }
        self.attach(parent, name, target)
    }

    /// Removes what lower layers have under that name; what this layer put there stays.
    pub(crate) fn whiteout(&mut self, parent: InodeId, name: &[u8]) {
        let Some(child) = self.child(parent, name) else {
            return;
        };
        self.clear_lower(child);
        self.drop_if_lower(parent, name);
    }

    /// Removes everything of lower layers below a directory; what this layer put there stays, whenever it came.
    pub(crate) fn clear_lower(&mut self, directory: InodeId) {
        let layer = self.layer;
        let mut to_visit = vec![directory];
        let mut visited = Vec::new();
        while let Some(id) = to_visit.pop() {
            let Some(directory) = self.directory_mut(id) else {
                continue;
            };
            if directory.cleared_in == layer {
                continue;
            }
            directory.cleared_in = layer;
            to_visit.extend(directory.children.values().map(|link| link.inode));
            visited.push(id);
        }
        // Children were visited after their parents, so this goes from the leaves up.
        for id in visited.into_iter().rev() {
            let children = self.directory(id).map(|d| &d.children).into_iter().flatten();
            let lower = children
                .filter(|(_, link)| link.layer != layer)
                .map(|(name, _)| name.clone());
            for name in lower.collect::<Vec<_>>() {
                self.drop_if_lower(id, &name);
            }
        }
    }

    /// Removes an entry of lower layers, below which nothing of them is left. A directory in which this layer has something stays,
    /// as if it had been made for that.
    fn drop_if_lower(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        let Some(&link) = self.directory(parent).and_then(|d| d.children.get(name)) else {
            return;
        };
        if link.layer == layer {
            return;
        }
        if self.directory(link.inode).is_some_and(|d| !d.children.is_empty()) {
            self.mark(parent, name);
            self.bytes -= self.inode(link.inode).attributes.xattrs.len() as u64;
            self.inodes[link.inode as usize].attributes = Attributes::implicit();
            return;
        }
        if let Some(directory) = self.directory_mut(parent) {
            directory.children.remove(name);
        }
        self.bytes -= name.len() as u64;
        self.release(link.inode);
    }

    fn make_directory(
        &mut self,
        parent: InodeId,
        name: &[u8],
        attributes: Attributes,
    ) -> Result<InodeId, Refusal> {
        let depth = self.directory(parent).map_or(0, |d| d.depth) + 1;
        if depth > MAX_DEPTH {
            return Err(EntryProblem::TooDeep.into());
        }
        // It is new, so nothing of lower layers is in it.
        let directory = Directory {
            parent,
            children: BTreeMap::new(),
            depth,
            cleared_in: self.layer,
        };
        let inode = self.allocate(Node::Directory(Box::new(directory)), attributes)?;
        self.attach(parent, name, inode)?;
        Ok(inode)
    }

    fn set_attributes(&mut self, id: InodeId, attributes: Attributes) -> Result<(), Refusal> {
        self.bytes -= self.inode(id).attributes.xattrs.len() as u64;
        self.charge(attributes.xattrs.len() as u64)?;
        self.inodes[id as usize].attributes = attributes;
        Ok(())
    }

    /// Says that this layer has an entry for it.
    fn mark(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        if let Some(link) = self.directory_mut(parent).and_then(|d| d.children.get_mut(name)) {
            link.layer = layer;
        }
    }

    fn allocate(&mut self, node: Node, attributes: Attributes) -> Result<InodeId, Refusal> {
        let inode = Inode {
            attributes,
            node,
            links: 0,
        };
        self.charge(inode.cost())?;
        if let Some(id) = self.free.pop() {
            self.inodes[id as usize] = inode;
            return Ok(id);
        }
        // Below the entry limit, which is below 2^32.
        let id = self.inodes.len() as InodeId;
        self.inodes.push(inode);
        Ok(id)
    }

    fn attach(&mut self, parent: InodeId, name: &[u8], inode: InodeId) -> Result<(), Refusal> {
        let link = Link {
            inode,
            layer: self.layer,
        };
        self.charge(name.len() as u64)?;
        // First the new name, then the old file: the target of a hard link may lie within what the link replaces.
        self.inodes[inode as usize].links += 1;
        let Some(directory) = self.directory_mut(parent) else {
            return Err(EntryProblem::ParentNotDirectory.into());
        };
        if let Some(replaced) = directory.children.insert(name.into(), link) {
            self.bytes -= name.len() as u64;
            self.release(replaced.inode);
        }
        Ok(())
    }

    /// Takes one name from a file, and frees what no name leads to any more.
    fn release(&mut self, id: InodeId) {
        let mut released = vec![id];
        while let Some(id) = released.pop() {
            let inode = &mut self.inodes[id as usize];
            inode.links -= 1;
            if inode.links > 0 {
                continue;
            }
            self.bytes -= inode.cost();
            inode.attributes.xattrs = Box::default();
            if let Node::Directory(directory) = std::mem::replace(&mut inode.node, Node::Free) {
                self.bytes -= directory
                    .children
                    .keys()
                    .map(|name| name.len() as u64)
                    .sum::<u64>();
                released.extend(directory.children.values().map(|link| link.inode));
            }
            self.free.push(id);
        }
    }

    fn charge(&mut self, bytes: u64) -> Result<(), Refusal> {
        self.bytes += bytes;
        if self.bytes > self.max_bytes {
            return Err(Refusal::Limit(LimitKind::TreeBytes, self.max_bytes));
        }
        Ok(())
    }

    fn directory_mut(&mut self, id: InodeId) -> Option<&mut Directory> {
        match &mut self.inodes[id as usize].node {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }
}

impl Inode {
    fn cost(&self) -> u64 {
        let node = match &self.node {
            Node::Directory(_) => DIRECTORY_COST,
            Node::Symlink(target) => target.len() as u64,
            _ => 0,
        };
        INODE_COST + node + self.attributes.xattrs.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attributes(xattr_bytes: usize) -> Attributes {
        Attributes {
            xattrs: vec![0; xattr_bytes].into(),
            ..Attributes::implicit()
        }
    }

    #[test]
    fn memory_is_counted_while_files_live_and_no_longer() {
        let mut tree = Tree::new(&Limits::default());
        let directory = tree.make_implicit_directory(ROOT, b"directory").unwrap();
        for _ in 0..3 {
            tree.put(directory, b"file", Node::Fifo, attributes(100)).unwrap();
            tree.put(
                directory,
                b"link",
                Node::Symlink(vec![b't'; 50].into()),
                attributes(0),
            )
            .unwrap();
        }
        let file = tree.child(directory, b"file").unwrap();
        tree.link(ROOT, b"hard", file).unwrap();
        tree.put_directory(ROOT, b"directory", attributes(10)).unwrap();
        let names = "directoryfilelinkhard".len() as u64;
        assert_eq!(
            tree.bytes,
            3 * INODE_COST + DIRECTORY_COST + 100 + 50 + 10 + names
        );
        tree.begin_layer().unwrap();
        tree.clear_lower(ROOT);
        assert_eq!(tree.bytes, 0);
        assert_eq!(tree.free.len() + 1, tree.inodes.len());
    }

    #[test]
    fn metadata_that_eats_memory_runs_into_a_limit_of_its_own() {
        let mut tree = Tree::new(&Limits::default());
        tree.max_bytes = 10_000;
        let mut put = |name: &[u8]| tree.put(ROOT, name, Node::Fifo, attributes(4000));
        put(b"a").unwrap();
        put(b"b").unwrap();
        assert!(matches!(
            put(b"c"),
            Err(Refusal::Limit(LimitKind::TreeBytes, 10_000))
        ));
    }
}
