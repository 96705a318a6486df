//! What an archive holds and where, without taking anything out of it: for archives that hold whole images.

use std::io::Read;

use crate::{
    ErofsError,
    tar::{Archive, EntryKind},
};

/// Longest name of a member.
const MAX_NAME_BYTES: usize = 1024;

/// A file or a symbolic link in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name as the archive has it.
    pub name: Vec<u8>,
    /// What is behind the name.
    pub content: MemberContent,
}

/// What is behind a member's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MemberContent {
    /// Bytes of the archive.
    Bytes {
        /// Where they begin.
        offset: u64,
        /// How many.
        size: u64,
    },
    /// Another member, relative to this one's directory.
    Link(Vec<u8>),
}

/// Calls `visit` for each file and link of an archive, in order. Ends early, without an error, when `visit` answers false.
pub fn members(input: impl Read, mut visit: impl FnMut(Member) -> bool) -> Result<(), ErofsError> {
    let mut archive = Archive::new(input, MAX_NAME_BYTES);
    while let Some(entry) = archive.next_entry()? {
        let content = match entry.kind {
            EntryKind::Regular => MemberContent::Bytes {
                offset: archive.position(),
                size: entry.size,
            },
            EntryKind::Symlink(target) => MemberContent::Link(target),
            _ => continue,
        };
        let member = Member {
            name: entry.path,
            content,
        };
        if !visit(member) {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_offset_is_where_the_bytes_are() {
        let mut builder = ::tar::Builder::new(Vec::new());
        let long = "d/".repeat(80) + "file";
        for (name, content) in [("a", &b"first"[..]), (long.as_str(), &b"second"[..])] {
            let mut header = ::tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, content).unwrap();
        }
        let archive = builder.into_inner().unwrap();
        let mut found = Vec::new();
        members(archive.as_slice(), |member| {
            let MemberContent::Bytes { offset, size } = member.content else {
                panic!("{member:?}")
            };
            let bytes = &archive[offset as usize..(offset + size) as usize];
            found.push((member.name.len(), bytes.to_vec()));
            true
        })
        .unwrap();
        assert_eq!(found, [(1, b"first".to_vec()), (long.len(), b"second".to_vec())]);
    }
}
