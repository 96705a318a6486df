//! Paths inside a root that somebody else has filled: an image, or a volume that a container may write to.
//!
//! Every path is resolved by the kernel as if the given directory were the root (openat2, RESOLVE_IN_ROOT), so that no symbolic link
//! of an image leads out of it, and no `..` above it.

use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::PathBuf,
};

use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, mkdirat, mknodat, openat2, readlinkat, statat},
    io::Errno,
};

/// Longest chain of symbolic links that end nowhere.
const MAX_LINKS: usize = 32;

/// Deepest path that is created.
const MAX_DEPTH: usize = 128;

/// What to create when there is nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// A directory of mode 0755.
    Directory,
    /// An empty file of mode 0644.
    File,
}

/// Opens `path` inside `root`.
pub(crate) fn open(root: impl AsFd, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = match path.trim_start_matches('/') {
        "" => ".",
        relative => relative,
    };
    loop {
        let opened = openat2(
            root.as_fd(),
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        );
        // EAGAIN: a rename elsewhere raced with "..".
        if !matches!(opened, Err(Errno::INTR | Errno::AGAIN)) {
            return opened;
        }
    }
}

/// Opens `path` inside `root` as a location (O_PATH), creating it and its parents where they are missing.
pub(crate) fn ensure(root: impl AsFd, path: &str, want: Want) -> rustix::io::Result<OwnedFd> {
    ensure_bounded(root.as_fd(), path, want, MAX_LINKS)
}

fn ensure_bounded(
    root: std::os::fd::BorrowedFd<'_>,
    path: &str,
    want: Want,
    links: usize,
) -> rustix::io::Result<OwnedFd> {
    match open(root, path, OFlags::PATH) {
        Err(Errno::NOENT) => {}
        other => return other,
    }
    let trimmed = path.trim_end_matches('/');
    if links == 0 || trimmed.split('/').count() > MAX_DEPTH {
        return Err(Errno::LOOP);
    }
    let (parent, name) = trimmed.rsplit_once('/').unwrap_or(("", trimmed));
    if name.is_empty() || name == "." || name == ".." {
        return Err(Errno::NOENT);
    }
    let directory = ensure_bounded(root, parent, Want::Directory, links)?;
    let made = match want {
        Want::Directory => mkdirat(&directory, name, Mode::from_raw_mode(0o755)),
        Want::File => mknodat(
            &directory,
            name,
            FileType::RegularFile,
            Mode::from_raw_mode(0o644),
            0,
        ),
    };
    match made {
        Ok(()) => {}
        // Another creator, or a symbolic link to nothing: what it names is created, still inside the root.
        Err(Errno::EXIST) => {
            if let Ok(target) = readlinkat(&directory, name, Vec::new()) {
                let target = target.into_string().map_err(|_| Errno::ILSEQ)?;
                let next = if target.starts_with('/') {
                    target
                } else {
                    format!("{parent}/{target}")
                };
                return ensure_bounded(root, &next, want, links - 1);
            }
        }
        Err(error) => return Err(error),
    }
    open(root, path, OFlags::PATH)
}

/// Whether `path` inside `root` is a directory; `None` when there is nothing.
pub(crate) fn is_directory(root: impl AsFd, path: &str) -> rustix::io::Result<Option<bool>> {
    match open(root, path, OFlags::PATH) {
        Ok(fd) => {
            let stat = statat(&fd, c"", AtFlags::EMPTY_PATH)?;
            Ok(Some(FileType::from_raw_mode(stat.st_mode) == FileType::Directory))
        }
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A path by which this process names what `fd` is open on, to calls that take paths only.
pub(crate) fn name_of(fd: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink};

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("root")).unwrap();
        let fd = rustix::fs::open(
            dir.path().join("root"),
            OFlags::PATH | OFlags::DIRECTORY,
            Mode::empty(),
        )
        .unwrap();
        (dir, fd)
    }

    #[test]
    fn missing_parents_and_the_file_are_created() {
        let (dir, root) = root();
        ensure(&root, "/a/b/c", Want::File).unwrap();
        assert!(dir.path().join("root/a/b/c").is_file());
        ensure(&root, "/a/b/d/", Want::Directory).unwrap();
        assert!(dir.path().join("root/a/b/d").is_dir());
    }

    #[test]
    fn an_absolute_link_stays_in_the_root() {
        let (dir, root) = root();
        fs::create_dir(dir.path().join("outside")).unwrap();
        symlink(dir.path().join("outside"), dir.path().join("root/etc")).unwrap();
        ensure(&root, "/etc/hosts", Want::File).unwrap();
        assert!(!dir.path().join("outside/hosts").exists());
        assert!(
            dir.path()
                .join("root")
                .join(dir.path().strip_prefix("/").unwrap())
                .join("outside/hosts")
                .is_file()
        );
    }

    #[test]
    fn a_dangling_relative_link_is_created_where_it_points_inside() {
        let (dir, root) = root();
        fs::create_dir(dir.path().join("root/etc")).unwrap();
        symlink(
            "../../../../run/resolv.conf",
            dir.path().join("root/etc/resolv.conf"),
        )
        .unwrap();
        ensure(&root, "/etc/resolv.conf", Want::File).unwrap();
        assert!(dir.path().join("root/run/resolv.conf").is_file());
    }

    #[test]
    fn a_loop_of_links_is_an_error_not_a_hang() {
        let (dir, root) = root();
        symlink("b", dir.path().join("root/a")).unwrap();
        symlink("a", dir.path().join("root/b")).unwrap();
        assert_eq!(ensure(&root, "/a/x", Want::File).unwrap_err(), Errno::LOOP);
    }

    #[test]
    fn a_link_that_grows_when_followed_ends() {
        let (dir, root) = root();
        symlink("a/x", dir.path().join("root/a")).unwrap();
        assert!(ensure(&root, "/a", Want::File).is_err());
    }

    #[test]
    fn kinds_are_told_apart() {
        let (dir, root) = root();
        fs::write(dir.path().join("root/file"), "").unwrap();
        assert_eq!(is_directory(&root, "/file").unwrap(), Some(false));
        assert_eq!(is_directory(&root, "/").unwrap(), Some(true));
        assert_eq!(is_directory(&root, "/none").unwrap(), None);
    }
}
