//! Host files that are copied into the guest: read here as they are, symbolic links as links, so that kubelet's `..data` swap keeps
//! its shape. Caps on size and number; anything that is not a file, directory or link is refused by its path.

use std::{
    fs,
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt, PermissionsExt},
    },
    path::Path,
};

use caisson_agent_api::{
    MAX_VOLUME_BYTES,
    v1::{VolumeEntry, volume_entry::Kind},
};

use crate::SandboxError;

/// Most entries in one volume.
pub(crate) const MAX_ENTRIES: usize = 16 << 10;

/// Deepest directory that is looked into.
const MAX_DEPTH: usize = 32;

/// Reads a file or directory as the entries of a volume, parents before children. Blocking.
pub(crate) fn read(path: &Path) -> Result<Vec<VolumeEntry>, SandboxError> {
    let mut tree = Tree {
        entries: Vec::new(),
        bytes: 0,
        top: path,
    };
    // The path itself may be a link (a subPath, a path below `..data`); what it leads to is meant.
    let meta = fs::metadata(path).map_err(SandboxError::io(format!("read {}", path.display())))?;
    tree.add(path, Path::new(""), &meta, 0)?;
    Ok(tree.entries)
}

struct Tree<'a> {
    entries: Vec<VolumeEntry>,
    bytes: usize,
    top: &'a Path,
}

impl Tree<'_> {
    fn add(
        &mut self,
        path: &Path,
        name: &Path,
        meta: &fs::Metadata,
        depth: usize,
    ) -> Result<(), SandboxError> {
        let failed = || SandboxError::io(format!("read {}", path.display()));
        if self.entries.len() >= MAX_ENTRIES {
            return Err(self.refused(format!("it holds more than {MAX_ENTRIES} files")));
        }
        if depth > MAX_DEPTH {
            return Err(self.refused(format!("it is more than {MAX_DEPTH} directories deep")));
        }
        let kind = if meta.is_dir() {
            Kind::Directory(true)
        } else if meta.is_symlink() {
            let target = fs::read_link(path).map_err(failed())?;
            Kind::Symlink(target.into_os_string().into_encoded_bytes())
        } else if meta.is_file() {
            Kind::File(self.content(path, depth)?)
        } else {
            return Err(self.refused(format!(
                "{} is neither file, directory nor symbolic link",
                path.display()
            )));
        };
        self.entries.push(VolumeEntry {
            path: name.as_os_str().as_bytes().to_vec(),
            mode: meta.permissions().mode() & 0o7777,
            uid: meta.uid(),
            gid: meta.gid(),
            kind: Some(kind),
        });
        if meta.is_dir() {
            let mut children = fs::read_dir(path)
                .map_err(failed())?
                .collect::<Result<Vec<_>, _>>()
                .map_err(failed())?;
            children.sort_by_key(fs::DirEntry::file_name);
            for child in children {
                let meta = child.metadata().map_err(failed())?;
                self.add(&child.path(), &name.join(child.file_name()), &meta, depth + 1)?;
            }
        }
        Ok(())
    }

    fn content(&mut self, path: &Path, depth: usize) -> Result<Vec<u8>, SandboxError> {
        let failed = || SandboxError::io(format!("read {}", path.display()));
        let mut options = fs::OpenOptions::new();
        // What was a file a moment ago must not have become a pipe that nobody writes into, or a link out of the directory.
        let mut flags = rustix::fs::OFlags::NONBLOCK;
        if depth > 0 {
            flags |= rustix::fs::OFlags::NOFOLLOW;
        }
        options.read(true).custom_flags(flags.bits().cast_signed());
        let file = options.open(path).map_err(failed())?;
        if !file.metadata().map_err(failed())?.is_file() {
            return Err(self.refused(format!("{} is no file any more", path.display())));
        }
        let room = MAX_VOLUME_BYTES - self.bytes;
        let mut content = Vec::new();
        let limit = u64::try_from(room).unwrap_or(u64::MAX).saturating_add(1);
        file.take(limit).read_to_end(&mut content).map_err(failed())?;
        if content.len() > room {
            return Err(self.refused(format!("it holds more than {} MiB", MAX_VOLUME_BYTES >> 20)));
        }
        self.bytes += content.len();
        Ok(content)
    }

    fn refused(&self, reason: String) -> SandboxError {
        SandboxError::Invalid {
            what: format!("mount of {}", self.top.display()),
            reason: format!("{reason}, so it cannot be copied into the guest"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kubelet_volume_keeps_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("..2026_01_01");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("token"), "secret").unwrap();
        std::os::unix::fs::symlink("..2026_01_01", dir.path().join("..data")).unwrap();
        std::os::unix::fs::symlink("..data/token", dir.path().join("token")).unwrap();
        let entries = read(dir.path()).unwrap();
        let seen: Vec<_> = entries
            .iter()
            .map(|e| {
                (
                    String::from_utf8_lossy(&e.path).into_owned(),
                    e.kind.clone().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                (String::new(), Kind::Directory(true)),
                ("..2026_01_01".into(), Kind::Directory(true)),
                ("..2026_01_01/token".into(), Kind::File(b"secret".to_vec())),
                ("..data".into(), Kind::Symlink(b"..2026_01_01".to_vec())),
                ("token".into(), Kind::Symlink(b"..data/token".to_vec())),
            ]
        );
    }

    #[test]
    fn a_single_file_is_a_volume_with_one_entry_even_behind_a_link() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("real"), "x").unwrap();
        std::os::unix::fs::symlink("real", dir.path().join("link")).unwrap();
        let entries = read(&dir.path().join("link")).unwrap();
        assert_eq!(entries.len(), 1);
        assert_eq!(
            (entries[0].path.len(), entries[0].kind.clone()),
            (0, Some(Kind::File(b"x".to_vec())))
        );
    }

    #[test]
    fn what_is_too_large_or_no_file_is_refused_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let big = fs::File::create(dir.path().join("big")).unwrap();
        big.set_len(MAX_VOLUME_BYTES as u64 + 1).unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains(&dir.path().display().to_string()) && error.contains("8 MiB"),
            "{error}"
        );
        big.set_len(MAX_VOLUME_BYTES as u64).unwrap();
        read(dir.path()).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("socket is neither"), "{error}");
        assert!(
            read(&dir.path().join("absent"))
                .unwrap_err()
                .to_string()
                .contains("absent")
        );
    }
}
