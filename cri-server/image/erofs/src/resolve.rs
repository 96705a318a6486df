//! From the directory part of a name to a directory of the image, following the image's own symbolic links.
//!
//! Real images have `/lib -> usr/lib` and later layers that write `lib/x`. Everything happens within the tree: absolute targets start at
//! its root, and `..` in a target stops there. The host's file system is never asked.

use crate::error::{EntryProblem, LimitKind, Refusal};
use crate::limits::{MAX_LINK_HOPS, MAX_LINK_STEPS};
use crate::tree::{InodeId, Node, ROOT, Tree};

/// What to do about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Make it, for the entry that is to go in.
    Create,
    /// Answer that there is none.
    Stop,
}

impl Tree {
    /// The directory that these components lead to. `None` if it does not exist and is not to be made; then a file in the way counts
    /// as not existing, too.
    pub(crate) fn resolve(
        &mut self,
        components: &[&[u8]],
        missing: Missing,
    ) -> Result<Option<InodeId>, Refusal> {
        let mut hops = 0;
        let mut directory = ROOT;
        for component in components {
            match self.step(directory, component, missing, &mut hops)? {
                Some(next) => directory = next,
                None => return Ok(None),
            }
        }
        Ok(Some(directory))
    }

    /// One component down. Goes into itself for symbolic links within symbolic links, as deep as there may be hops.
    fn step(
        &mut self,
        directory: InodeId,
        name: &[u8],
        missing: Missing,
        hops: &mut u32,
    ) -> Result<Option<InodeId>, Refusal> {
        let Some(child) = self.child(directory, name) else {
            return match missing {
                Missing::Create => self.make_implicit_directory(directory, name).map(Some),
                Missing::Stop => Ok(None),
            };
        };
        match &self.inode(child).node {
            Node::Directory(_) => Ok(Some(child)),
            Node::Symlink(target) => {
                *hops += 1;
                if *hops > MAX_LINK_HOPS {
                    return Err(EntryProblem::LinkLoop.into());
                }
                let target = target.clone();
                self.follow(directory, &target, missing, hops)
            }
            _ => match missing {
                Missing::Create => Err(EntryProblem::ParentNotDirectory.into()),
                Missing::Stop => Ok(None),
            },
        }
    }

    fn follow(
        &mut self,
        from: InodeId,
        target: &[u8],
        missing: Missing,
        hops: &mut u32,
    ) -> Result<Option<InodeId>, Refusal> {
        let mut directory = if target.starts_with(b"/") { ROOT } else { from };
        for component in target.split(|b| *b == b'/') {
            self.link_steps += 1;
            if self.link_steps > MAX_LINK_STEPS {
                return Err(Refusal::Limit(LimitKind::LinkSteps, MAX_LINK_STEPS));
            }
            directory = match component {
                b"" | b"." => directory,
                b".." => self.directory(directory).map_or(ROOT, |d| d.parent),
                _ if component.len() > crate::limits::MAX_NAME_BYTES => {
                    return Err(EntryProblem::NameTooLong.into());
                }
                _ => match self.step(directory, component, missing, hops)? {
                    Some(next) => next,
                    None => return Ok(None),
                },
            };
        }
        Ok(Some(directory))
    }
}
