//! A path of the host, resolved once: from then on the descriptor counts, whatever happens to the names.

use std::{
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

use crate::{SandboxError, volumes::mount_table::MountTable};

/// What a path leads to.
#[derive(Debug)]
pub(crate) struct HostPath {
    /// Without symbolic links.
    pub(crate) path: PathBuf,
    /// A location (O_PATH): it can be mounted, not read.
    pub(crate) location: OwnedFd,
    pub(crate) kind: FileType,
    /// Permission bits (07777), owner and group.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Of a device node: its numbers.
    pub(crate) numbers: (u32, u32),
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    pub(crate) mount: u64,
}

impl HostPath {
    /// Follows symbolic links, as every runtime does with what kubelet names; what changes while it looks is an error. Blocking.
    pub(crate) fn resolve(wanted: &Path) -> Result<Self, SandboxError> {
        let failed = || SandboxError::io(format!("find {}", wanted.display()));
        let path = wanted.canonicalize().map_err(failed())?;
        let root = rustix::fs::open(
            "/",
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|error| failed()(error.into()))?;
        let below = path.strip_prefix("/").unwrap_or(&path);
        let below = if below.as_os_str().is_empty() {
            Path::new(".")
        } else {
            below
        };
        let location = openat2(
            &root,
            below,
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
        .map_err(|error| failed()(error.into()))?;
        Self::at(path, location).map_err(|error| failed()(error.into()))
    }

    /// What is at a location that is known by this path.
    pub(crate) fn at(path: PathBuf, location: OwnedFd) -> rustix::io::Result<Self> {
        let what = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        let found = statx(&location, c"", AtFlags::EMPTY_PATH, what)?;
        Ok(Self {
            kind: FileType::from_raw_mode(found.stx_mode.into()),
            mode: u32::from(found.stx_mode) & 0o7777,
            uid: found.stx_uid,
            gid: found.stx_gid,
            numbers: (found.stx_rdev_major, found.stx_rdev_minor),
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            mount: found.stx_mnt_id,
            path,
            location,
        })
    }

    /// Whether something is mounted below it now.
    pub(crate) fn has_mounts_below(&self) -> Result<bool, SandboxError> {
        if self.kind != FileType::Directory {
            return Ok(false);
        }
        Ok(MountTable::read()?.has_below(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    #[test]
    fn links_are_followed_to_what_they_mean() {
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        fs::create_dir(top.join("real")).unwrap();
        symlink("real", top.join("link")).unwrap();
        let found = HostPath::resolve(&top.join("link")).unwrap();
        assert_eq!(found.path, top.join("real"));
        assert_eq!(found.kind, FileType::Directory);
        let again = HostPath::resolve(&top.join("real")).unwrap();
        assert_eq!(
            (found.device, found.inode, found.mount),
            (again.device, again.inode, again.mount)
        );
        assert_eq!(HostPath::resolve(Path::new("/")).unwrap().path, Path::new("/"));
    }

    #[test]
    fn a_path_that_is_swapped_meanwhile_is_what_its_name_says_or_an_error() {
        use std::{
            os::unix::fs::MetadataExt,
            sync::atomic::{AtomicBool, Ordering},
        };
        let dir = tempfile::tempdir().unwrap();
        let top = dir.path().canonicalize().unwrap();
        let (volume, aside, target) = (top.join("volume"), top.join("aside"), top.join("target"));
        fs::create_dir(&volume).unwrap();
        fs::create_dir(&target).unwrap();
        symlink("target", &aside).unwrap();
        let inode = |path: &Path| fs::metadata(path).unwrap().ino();
        let (own, others) = (inode(&volume), inode(&target));
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // A directory one moment, a link the next.
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let flags = rustix::fs::RenameFlags::EXCHANGE;
                    rustix::fs::renameat_with(rustix::fs::CWD, &volume, rustix::fs::CWD, &aside, flags)
                        .unwrap();
                }
            });
            let found: Vec<_> = (0..2000).map(|_| HostPath::resolve(&volume)).collect();
            done.store(true, Ordering::Relaxed);
            for found in found {
                match found {
                    Ok(found) if found.path == volume => assert_eq!(found.inode, own),
                    Ok(found) => assert_eq!((&found.path, found.inode), (&target, others)),
                    Err(error) => assert!(error.chain().contains("volume"), "{}", error.chain()),
                }
            }
        });
    }

    #[test]
    fn what_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        symlink("loop", dir.path().join("loop")).unwrap();
        for name in ["absent", "dangling", "loop"] {
            let error = HostPath::resolve(&dir.path().join(name)).unwrap_err().chain();
            assert!(error.contains(name) && error.contains("os error"), "{error}");
        }
    }
}
