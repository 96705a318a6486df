//! Names in layers: what they name in the image, and which of them are whiteouts (OCI image layer specification).
//!
//! Only splits names; what their components lead to is the tree's business.

use crate::error::EntryProblem;
use crate::limits::MAX_NAME_BYTES;

const WHITEOUT: &[u8] = b".wh.";
/// What aufs kept for itself; everything under such a name but the opaque marker is left out, as Docker does.
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What an entry's name asks for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Destination<'a> {
    /// The root directory itself.
    Root,
    /// A file of that name in a directory.
    Entry { parent: Vec<&'a [u8]>, name: &'a [u8] },
    /// Hides what lower layers have under that name.
    Whiteout { parent: Vec<&'a [u8]>, name: &'a [u8] },
    /// Hides everything that lower layers have in the directory.
    Opaque { parent: Vec<&'a [u8]> },
    /// Nothing.
    Ignored,
}

/// The components of a name, which is relative to the image's root however it is written.
pub(crate) fn split(path: &[u8]) -> Result<Vec<&[u8]>, EntryProblem> {
    if path.contains(&0) {
        return Err(EntryProblem::Nul);
    }
    let mut components = Vec::new();
    for component in path.split(|b| *b == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(EntryProblem::ParentComponent),
            _ if component.len() > MAX_NAME_BYTES => return Err(EntryProblem::NameTooLong),
            _ => components.push(component),
        }
    }
    Ok(components)
}

/// What the entry of that name asks for.
pub(crate) fn destination(path: &[u8]) -> Result<Destination<'_>, EntryProblem> {
    let mut parent = split(path)?;
    let Some(name) = parent.pop() else {
        return Ok(Destination::Root);
    };
    if parent.iter().any(|component| component.starts_with(AUFS)) {
        return Ok(Destination::Ignored);
    }
    if parent.iter().any(|component| component.starts_with(WHITEOUT)) {
        return Err(EntryProblem::Whiteout);
    }
    if name == OPAQUE {
        return Ok(Destination::Opaque { parent });
    }
    if name.starts_with(AUFS) {
        return Ok(Destination::Ignored);
    }
    match name.strip_prefix(WHITEOUT) {
        None => Ok(Destination::Entry { parent, name }),
        Some(b"" | b"." | b"..") => Err(EntryProblem::Whiteout),
        Some(name) => Ok(Destination::Whiteout { parent, name }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_relative_to_the_root_however_they_are_written() {
        for path in [&b"etc/x"[..], b"/etc/x", b"./etc/x", b"//etc/./x/", b"etc//x"] {
            let expected = Destination::Entry {
                parent: vec![b"etc"],
                name: b"x",
            };
            assert_eq!(destination(path), Ok(expected), "{path:?}");
        }
        for path in [&b""[..], b"/", b".", b"./", b"././/"] {
            assert_eq!(destination(path), Ok(Destination::Root), "{path:?}");
        }
    }

    #[test]
    fn names_that_leave_the_root_are_refused() {
        for path in [&b".."[..], b"../x", b"a/../b", b"/..", b"a/.."] {
            assert_eq!(destination(path), Err(EntryProblem::ParentComponent), "{path:?}");
        }
        assert_eq!(destination(b"a\0b"), Err(EntryProblem::Nul));
        assert_eq!(destination(&[b'a'; 256]), Err(EntryProblem::NameTooLong));
    }

    #[test]
    fn whiteouts_name_a_sibling_and_nothing_else() {
        assert_eq!(
            destination(b"a/.wh.b"),
            Ok(Destination::Whiteout {
                parent: vec![b"a"],
                name: b"b"
            })
        );
        assert_eq!(
            destination(b"a/.wh..wh..opq"),
            Ok(Destination::Opaque { parent: vec![b"a"] })
        );
        assert_eq!(destination(b".wh..wh.plnk/1.2"), Ok(Destination::Ignored));
        assert_eq!(destination(b".wh..wh.aufs"), Ok(Destination::Ignored));
        assert_eq!(
            destination(b".wh...a"),
            Ok(Destination::Whiteout {
                parent: vec![],
                name: b"..a"
            })
        );
        for path in [&b".wh."[..], b".wh..", b".wh...", b"a/.wh.b/c"] {
            assert_eq!(destination(path), Err(EntryProblem::Whiteout), "{path:?}");
        }
    }
}
