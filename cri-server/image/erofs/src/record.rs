//! One entry of a layer as a converted layer holds it: checked, in a form of its own, without its contents.
//!
//! Knows bytes only. What is read here was written by this crate, but it comes from a file, so nothing in it is believed: a record that
//! is not one is an error, never a panic.

use crate::tar::Timestamp;
use crate::tree::Attributes;

/// Longest record: a name, a link target and all attributes that an inode can have, with room to spare.
pub(crate) const MAX_RECORD_BYTES: usize = 1 << 20;

/// An entry.
#[derive(Debug)]
pub(crate) struct Record {
    /// The name as it stands in the archive.
    pub(crate) path: Vec<u8>,
    pub(crate) attributes: Attributes,
    pub(crate) kind: Kind,
}

/// What it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A whiteout or an opaque marker: its name says which.
    Marker,
    /// Contents from that block of the layer.
    Regular {
        size: u64,
        start: u32,
    },
    Directory,
    HardLink(Vec<u8>),
    Symlink(Vec<u8>),
    /// With the number as Linux encodes it.
    Char(u32),
    Block(u32),
    Fifo,
}

impl Kind {
    fn tag(&self) -> u8 {
        match self {
            Self::Marker => 0,
            Self::Regular { .. } => 1,
            Self::Directory => 2,
            Self::HardLink(_) => 3,
            Self::Symlink(_) => 4,
            Self::Char(_) => 5,
            Self::Block(_) => 6,
            Self::Fifo => 7,
        }
    }
}

impl Record {
    /// Appends its bytes. Names and targets are below 64 KiB: the parser's limits see to that.
    pub(crate) fn encode(&self, to: &mut Vec<u8>) {
        let attributes = &self.attributes;
        to.push(self.kind.tag());
        to.extend(attributes.permissions.to_le_bytes());
        to.extend(attributes.uid.to_le_bytes());
        to.extend(attributes.gid.to_le_bytes());
        to.extend(attributes.mtime.seconds.to_le_bytes());
        to.extend(attributes.mtime.nanoseconds.to_le_bytes());
        put_bytes(to, &self.path);
        put_bytes(to, &attributes.xattrs);
        match &self.kind {
            Kind::Marker | Kind::Directory | Kind::Fifo => {}
            Kind::Regular { size, start } => {
                to.extend(size.to_le_bytes());
                to.extend(start.to_le_bytes());
            }
            Kind::HardLink(target) | Kind::Symlink(target) => put_bytes(to, target),
            Kind::Char(number) | Kind::Block(number) => to.extend(number.to_le_bytes()),
        }
    }

    /// Takes a record from the front. `None` if there is none.
    pub(crate) fn decode(from: &mut &[u8]) -> Option<Self> {
        let [tag] = array::<1>(from)?;
        let permissions = u16::from_le_bytes(array(from)?);
        let uid = u32::from_le_bytes(array(from)?);
        let gid = u32::from_le_bytes(array(from)?);
        let mtime = Timestamp {
            seconds: i64::from_le_bytes(array(from)?),
            nanoseconds: u32::from_le_bytes(array(from)?),
        };
        let path = bytes(from)?.to_vec();
        let xattrs = bytes(from)?.into();
        let kind = match tag {
            0 => Kind::Marker,
            1 => Kind::Regular {
                size: u64::from_le_bytes(array(from)?),
                start: u32::from_le_bytes(array(from)?),
            },
            2 => Kind::Directory,
            3 => Kind::HardLink(bytes(from)?.to_vec()),
            4 => Kind::Symlink(bytes(from)?.to_vec()),
            5 => Kind::Char(u32::from_le_bytes(array(from)?)),
            6 => Kind::Block(u32::from_le_bytes(array(from)?)),
            7 => Kind::Fifo,
            _ => return None,
        };
        let attributes = Attributes {
            permissions,
            uid,
            gid,
            mtime,
            xattrs,
        };
        Some(Self {
            path,
            attributes,
            kind,
        })
    }
}

fn put_bytes(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend((bytes.len() as u32).to_le_bytes());
    to.extend(bytes);
}

fn take<'a>(from: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = from.split_at_checked(count)?;
    *from = rest;
    Some(taken)
}

fn array<const N: usize>(from: &mut &[u8]) -> Option<[u8; N]> {
    take(from, N)?.try_into().ok()
}

fn bytes<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let count = u32::from_le_bytes(array(from)?);
    let count = usize::try_from(count)
        .ok()
        .filter(|count| *count <= MAX_RECORD_BYTES)?;
    take(from, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind) -> Record {
        Record {
            path: b"some/name".to_vec(),
            attributes: Attributes {
                permissions: 0o4755,
                uid: 1,
                gid: u32::MAX - 1,
                mtime: Timestamp {
                    seconds: -7,
                    nanoseconds: 999_999_999,
                },
                xattrs: vec![1, 2, 3, 4].into(),
            },
            kind,
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written_and_never_from_a_part_of_it() {
        let kinds = [
            Kind::Marker,
            Kind::Regular {
                size: 1 << 40,
                start: 77,
            },
            Kind::Directory,
            Kind::HardLink(b"target".to_vec()),
            Kind::Symlink(b"../t".to_vec()),
            Kind::Char(0x103),
            Kind::Block(u32::MAX),
            Kind::Fifo,
        ];
        for kind in kinds {
            let mut written = Vec::new();
            record(kind.clone()).encode(&mut written);
            let mut rest = written.as_slice();
            let read = Record::decode(&mut rest).unwrap();
            assert!(rest.is_empty());
            assert_eq!(format!("{read:?}"), format!("{:?}", record(kind)));
            for length in 0..written.len() {
                assert!(Record::decode(&mut &written[..length]).is_none());
            }
        }
        assert!(Record::decode(&mut &[9; 100][..]).is_none());
    }
}
