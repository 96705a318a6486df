//! Extended attributes: which ones an image may have, and their form on disk.
//!
//! Kept are `user.*`, `trusted.*`, `security.*` and the two POSIX access control lists. Left out is every other namespace, because
//! Linux has no place for it, and `trusted.overlay.*` and `user.overlay.*`: those would let a layer steer the overlay that the guest
//! mounts on top of the image (redirects, opaque directories, whiteouts, data from elsewhere).

use std::collections::BTreeMap;

use crate::error::{EntryProblem, LimitKind, Refusal};
use crate::layout::{MAX_XATTR_ENTRY_BYTES, XATTR_ALIGNMENT};

/// (name prefix, `e_name_index`); the lists' names are prefixes in whole.
const NAMESPACES: [(&[u8], u8); 5] = [
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
];
const MAX_NAME: usize = 255;

/// The attributes as they stand behind an inode, without the header before them; empty if there are none. The last of a name counts.
pub(crate) fn encode(xattrs: &[(Vec<u8>, Vec<u8>)], limit: usize) -> Result<Box<[u8]>, Refusal> {
    let mut sorted = BTreeMap::new();
    for (name, value) in xattrs {
        let Some((index, suffix)) = classify(name) else {
            continue;
        };
        if name.len() > MAX_NAME || value.len() > usize::from(u16::MAX) {
            return Err(EntryProblem::XattrTooLong.into());
        }
        if name.contains(&0) {
            return Err(EntryProblem::Nul.into());
        }
        sorted.insert((index, suffix), value);
    }
    let limit = limit.min(MAX_XATTR_ENTRY_BYTES);
    let mut bytes = Vec::new();
    for ((index, suffix), value) in sorted {
        bytes.extend([suffix.len() as u8, index]);
        bytes.extend((value.len() as u16).to_le_bytes());
        bytes.extend(suffix);
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(XATTR_ALIGNMENT), 0);
        if bytes.len() > limit {
            return Err(Refusal::Limit(LimitKind::XattrBytes, limit as u64));
        }
    }
    Ok(bytes.into_boxed_slice())
}

/// Names and values out of their form on disk. `None` if it is none.
pub(crate) fn decode(mut bytes: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut xattrs = Vec::new();
    while !bytes.is_empty() {
        let (&[suffix, index, low, high], rest) = bytes.split_first_chunk::<4>()?;
        let (suffix, value) = (usize::from(suffix), usize::from(u16::from_le_bytes([low, high])));
        let (name, rest) = rest.split_at_checked(suffix)?;
        let (value, rest) = rest.split_at_checked(value)?;
        let written = bytes.len() - rest.len();
        let padding = written.next_multiple_of(XATTR_ALIGNMENT) - written;
        bytes = rest.get(padding..)?;
        let (prefix, _) = NAMESPACES.iter().find(|(_, known)| *known == index)?;
        let name = [*prefix, name].concat();
        // What was not let in does not come out.
        classify(&name).filter(|_| !name.contains(&0) && !name.contains(&b'='))?;
        xattrs.push((name, value.to_vec()));
    }
    Some(xattrs)
}

fn classify(name: &[u8]) -> Option<(u8, &[u8])> {
    if name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.") {
        return None;
    }
    NAMESPACES.iter().find_map(|(prefix, index)| {
        let suffix = name.strip_prefix(*prefix)?;
        // A namespace needs a name, a list has none.
        (prefix.ends_with(b".") != suffix.is_empty()).then_some((*index, suffix))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_attributes_that_linux_keeps_and_overlayfs_ignores_go_in() {
        assert_eq!(classify(b"user.a"), Some((1, &b"a"[..])));
        assert_eq!(classify(b"security.capability"), Some((6, &b"capability"[..])));
        assert_eq!(classify(b"system.posix_acl_access"), Some((2, &b""[..])));
        for name in [
            &b"trusted.overlay.opaque"[..],
            b"user.overlay.redirect",
            b"system.posix_acl_accessx",
            b"system.nfs4_acl",
            b"com.apple.quarantine",
            b"user.",
            b"",
        ] {
            assert_eq!(classify(name), None, "{name:?}");
        }
    }

    #[test]
    fn attributes_are_sorted_aligned_and_limited() {
        let pair = |n: &[u8], v: &[u8]| (n.to_vec(), v.to_vec());
        let given = [
            pair(b"user.b", b"1"),
            pair(b"user.a", b"old"),
            pair(b"user.a", b"23"),
        ];
        let bytes = encode(&given, 64).unwrap();
        assert_eq!(&*bytes, b"\x01\x01\x02\x00a23\x00\x01\x01\x01\x00b1\x00\x00");
        assert_eq!(
            decode(&bytes),
            Some(vec![pair(b"user.a", b"23"), pair(b"user.b", b"1")])
        );
        assert!(matches!(
            encode(&given, 15),
            Err(Refusal::Limit(LimitKind::XattrBytes, 15))
        ));
        let long = [pair(b"user.b", &[0; 65536])];
        assert!(matches!(
            encode(&long, 1 << 20),
            Err(Refusal::Entry(EntryProblem::XattrTooLong))
        ));
    }

    #[test]
    fn what_is_no_list_of_attributes_is_not_read_as_one() {
        assert_eq!(decode(b""), Some(Vec::new()));
        for bad in [
            &b"\x01"[..],
            b"\x02\x01\x00\x00a",
            b"\x01\x01\x02\x00a2",
            b"\x01\x01\x01\x00a1",
            b"\x01\x05\x01\x00a1\x00\x00",
            b"\x00\x01\x00\x00",
            b"\x01\x01\x00\x00=\x00\x00\x00",
            b"\x08\x01\x00\x00overlay.",
        ] {
            assert_eq!(decode(bad), None, "{bad:?}");
        }
    }
}
