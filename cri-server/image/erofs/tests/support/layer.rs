//! Layers, entry by entry.

use tar::{Builder, EntryType, Header};

/// A layer archive that is being written.
pub(crate) struct Layer(Builder<Vec<u8>>);

/// Metadata of an entry.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u64,
    pub(crate) gid: u64,
    pub(crate) mtime: u64,
    /// PAX records before the entry.
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

pub(crate) fn mode(mode: u32) -> Meta {
    Meta {
        mode,
        ..Meta::default()
    }
}

impl Layer {
    pub(crate) fn new() -> Self {
        Self(Builder::new(Vec::new()))
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }

    pub(crate) fn file(self, path: &str, data: impl AsRef<[u8]>) -> Self {
        self.entry(path, EntryType::Regular, &mode(0o644), data.as_ref(), "")
    }

    pub(crate) fn dir(self, path: &str, permissions: u32) -> Self {
        self.entry(path, EntryType::Directory, &mode(permissions), b"", "")
    }

    pub(crate) fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(path, EntryType::Symlink, &mode(0o777), b"", target)
    }

    pub(crate) fn hardlink(self, path: &str, target: &str) -> Self {
        self.entry(path, EntryType::Link, &mode(0o644), b"", target)
    }

    pub(crate) fn device(self, path: &str, kind: EntryType, major: u32, minor: u32) -> Self {
        self.raw(path, kind, &mode(0o600), b"", "", |header| {
            header.set_device_major(major).unwrap();
            header.set_device_minor(minor).unwrap();
        })
    }

    pub(crate) fn entry(self, path: &str, kind: EntryType, meta: &Meta, data: &[u8], link: &str) -> Self {
        self.raw(path, kind, meta, data, link, |_| {})
    }

    /// An entry with whatever name, and a last change to its header before the checksum.
    pub(crate) fn raw(
        mut self,
        path: &str,
        kind: EntryType,
        meta: &Meta,
        data: &[u8],
        link: &str,
        change: impl FnOnce(&mut Header),
    ) -> Self {
        let mut pax = meta.pax.clone();
        // The tar crate refuses bad names; PAX records and header bytes do not.
        if path.len() > 100 {
            pax.push(("path".into(), path.into()));
        }
        if link.len() > 100 {
            pax.push(("linkpath".into(), link.into()));
        }
        if !pax.is_empty() {
            self.0
                .append_pax_extensions(pax.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
                .unwrap();
        }
        let mut header = Header::new_ustar();
        let old = header.as_old_mut();
        let (name, target) = (path.as_bytes(), link.as_bytes());
        old.name[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        old.linkname[..target.len().min(100)].copy_from_slice(&target[..target.len().min(100)]);
        header.set_entry_type(kind);
        header.set_mode(meta.mode);
        header.set_uid(meta.uid);
        header.set_gid(meta.gid);
        header.set_mtime(meta.mtime);
        header.set_size(data.len() as u64);
        change(&mut header);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }
}

/// PAX records as bytes, for archives that no writer makes.
pub(crate) fn pax_records(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        bytes.extend(format!("{length} {key}=").into_bytes());
        bytes.extend(*value);
        bytes.push(b'\n');
    }
    bytes
}
