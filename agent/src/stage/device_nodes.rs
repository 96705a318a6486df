//! What is in a container's /dev.

use std::{fs, os::fd::OwnedFd, os::unix::fs::FileTypeExt, os::unix::fs::MetadataExt};

use rustix::{
    fs::{
        AtFlags, Dev, FileType, Gid, Mode, Uid, chmodat, chownat, makedev, mkdirat, mknodat, statat,
        symlinkat, unlinkat,
    },
    io::Errno,
    process::umask,
};

use super::{At, StageError, users::Users};
use crate::{
    rootfs::{self, Want},
    stage_spec::StageDevice,
};

/// Name, major, minor: what every container has.
const NODES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

const LINKS: [(&str, &str); 5] = [
    ("ptmx", "pts/ptmx"),
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];

/// Directories of the guest's /dev that a container has for itself.
const OWN: [&str; 3] = ["pts", "shm", "mqueue"];

/// Fills `directory`; with every node of the guest when `all`.
pub(super) fn create(directory: &OwnedFd, all: bool) -> Result<(), StageError> {
    // Modes are given in full.
    let old = umask(Mode::empty());
    let made = fill(directory, all);
    umask(old);
    made
}

fn fill(directory: &OwnedFd, all: bool) -> Result<(), StageError> {
    for (name, major, minor) in NODES {
        node(
            directory,
            name,
            FileType::CharacterDevice,
            0o666,
            makedev(major, minor),
        )?;
    }
    for (name, target) in LINKS {
        symlinkat(target, directory, name).at(|| format!("linking /dev/{name}"))?;
    }
    for name in OWN {
        mkdirat(directory, name, Mode::from_raw_mode(0o755)).at(|| format!("creating /dev/{name}"))?;
    }
    if all {
        copy_nodes("/dev", "", directory, 0)?;
    }
    Ok(())
}

/// Makes the node of a device that the container has for itself, at its path inside `root`, in place of a node that is there.
pub(super) fn own(root: &OwnedFd, wanted: &StageDevice, users: Option<&Users<'_>>) -> Result<(), StageError> {
    let path = &wanted.path;
    let step = || format!("creating {path}");
    let (parent, name) = path.trim_end_matches('/').rsplit_once('/').unwrap_or(("", path));
    let parent = rootfs::ensure(root, parent, Want::Directory).at(step)?;
    let kind = if wanted.block {
        FileType::BlockDevice
    } else {
        FileType::CharacterDevice
    };
    // One of the usual nodes, or of an image's: anything else is in the way.
    let there =
        statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map(|stat| FileType::from_raw_mode(stat.st_mode));
    if matches!(there, Ok(FileType::CharacterDevice | FileType::BlockDevice)) {
        unlinkat(&parent, name, AtFlags::empty()).at(step)?;
    }
    let device = makedev(wanted.major, wanted.minor);
    mknodat(&parent, name, kind, Mode::empty(), device).at(step)?;
    // An owner whom the pod's namespace does not have is nobody in it, as for any other file.
    let (user, group) = users.map_or((Some(wanted.uid), Some(wanted.gid)), |users| {
        (users.user(wanted.uid), users.group(wanted.gid))
    });
    let (uid, gid) = (user.map(Uid::from_raw), group.map(Gid::from_raw));
    chownat(&parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW).at(step)?;
    chmodat(
        &parent,
        name,
        Mode::from_raw_mode(wanted.mode & 0o777),
        AtFlags::empty(),
    )
    .at(step)
}

fn node(directory: &OwnedFd, name: &str, kind: FileType, mode: u32, device: Dev) -> Result<(), StageError> {
    match mknodat(directory, name, kind, Mode::from_raw_mode(mode), device) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error).at(|| format!("creating /dev/{name}")),
    }
}

/// Copies the guest's own nodes; a node that goes away meanwhile is not missed.
fn copy_nodes(from: &str, below: &str, directory: &OwnedFd, depth: usize) -> Result<(), StageError> {
    let entries = fs::read_dir(from).at(|| format!("listing {from}"))?;
    for entry in entries.flatten() {
        let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), entry.metadata()) else {
            continue;
        };
        let kind = metadata.file_type();
        let path = if below.is_empty() {
            name.clone()
        } else {
            format!("{below}/{name}")
        };
        if kind.is_dir() && depth < 4 && !(depth == 0 && OWN.contains(&name.as_str())) {
            match mkdirat(directory, path.as_str(), Mode::from_raw_mode(0o755)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).at(|| format!("creating /dev/{path}")),
            }
            copy_nodes(&format!("{from}/{name}"), &path, directory, depth + 1)?;
        } else if kind.is_char_device() && path != "ptmx" && path != "console" {
            node(
                directory,
                &path,
                FileType::CharacterDevice,
                metadata.mode() & 0o7777,
                metadata.rdev(),
            )?;
        } else if kind.is_block_device() {
            node(
                directory,
                &path,
                FileType::BlockDevice,
                metadata.mode() & 0o7777,
                metadata.rdev(),
            )?;
        }
    }
    Ok(())
}
