//! Small trees of files in guest memory, put there by the daemon and bind-mounted into containers.
//!
//! An update changes the tree in place: what containers have mounted shows it. Files and links are replaced by rename, links last, so
//! that kubelet's swap of `..data` is as atomic here as it was there; a file volume is rewritten, since its inode is what is mounted.
//! A container may write into a volume, so paths are resolved below it without following any link.

use std::{
    collections::{HashMap, HashSet},
    ffi::OsStr,
    fs, io,
    io::Write,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use caisson_agent_api::{MAX_VOLUME_BYTES, v1, v1::volume_entry::Kind};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, mkdirat, openat,
        openat2, renameat, statat, symlinkat, unlinkat,
    },
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::{
    delete_tree,
    error::{AgentError, At},
    guest::Guest,
    names,
};

const DIRECTORY: &str = "/run/volumes";

/// Most volumes at a time.
const MAX_VOLUMES: usize = 1024;

/// Most entries of a volume.
const MAX_ENTRIES: usize = 16 << 10;

/// Name of a file until it is complete; no entry can have it.
const UNFINISHED: &str = ".caisson-unfinished";

/// The volumes there are; each is changed by one caller at a time.
#[derive(Debug, Default)]
pub(crate) struct Volumes {
    known: Mutex<HashMap<String, Arc<Mutex<()>>>>,
}

/// Where a volume is.
pub(crate) fn path(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(id).join("content")
}

impl Volumes {
    /// Whether there is one of this id.
    pub(crate) fn exists(&self, id: &str) -> bool {
        self.known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(id)
    }

    fn turn(&self, id: &str) -> Result<Arc<Mutex<()>>, AgentError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_empty() && fs::metadata(DIRECTORY).is_err() {
            fs::create_dir_all(DIRECTORY).at(|| format!("creating {DIRECTORY}"))?;
            let flags = MountFlags::NOSUID | MountFlags::NODEV;
            mount("tmpfs", DIRECTORY, "tmpfs", flags, c"mode=0700")
                .at(|| format!("mounting tmpfs on {DIRECTORY}"))?;
        }
        if !known.contains_key(id) && known.len() >= MAX_VOLUMES {
            return Err(AgentError::Full {
                what: "volumes",
                limit: MAX_VOLUMES,
            });
        }
        Ok(Arc::clone(known.entry(id.to_owned()).or_default()))
    }
}

/// `PutVolume`. Blocking.
pub(crate) fn put(guest: &Guest, request: &v1::PutVolumeRequest) -> Result<(), AgentError> {
    names::id("volume_id", &request.volume_id)?;
    check(&request.entries)?;
    let turn = guest.volumes.turn(&request.volume_id)?;
    let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
    let place = path(&request.volume_id);
    write(&place, &request.entries).at(|| format!("writing volume {}", request.volume_id))
}

/// `RemoveVolume`. Containers that have it mounted keep what they have. Blocking.
pub(crate) fn remove(guest: &Guest, request: &v1::RemoveVolumeRequest) -> Result<(), AgentError> {
    names::id("volume_id", &request.volume_id)?;
    let known = guest
        .volumes
        .known
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .remove(&request.volume_id);
    if known.is_none() {
        return Err(AgentError::Unknown {
            what: "volume",
            id: request.volume_id.clone(),
        });
    }
    let place = Path::new(DIRECTORY).join(&request.volume_id);
    delete_tree::delete(&place).at(|| format!("removing volume {}", request.volume_id))
}

/// What the kernel will not check for us. Pure.
fn check(entries: &[v1::VolumeEntry]) -> Result<(), AgentError> {
    let bad = |reason: String| AgentError::invalid("entries", reason);
    if entries.is_empty() || entries.len() > MAX_ENTRIES {
        return Err(bad(format!("there must be 1 to {MAX_ENTRIES}")));
    }
    let mut total = 0usize;
    let mut seen = HashSet::new();
    for entry in entries {
        let shown = String::from_utf8_lossy(&entry.path);
        if !seen.insert(&entry.path) {
            return Err(bad(format!("{shown:?} comes twice")));
        }
        let ours = |part: &[u8]| part == UNFINISHED.as_bytes();
        if !is_below(&entry.path) || entry.path.split(|byte| *byte == b'/').any(ours) {
            return Err(bad(format!("{shown:?} is not a relative path without \"..\"")));
        }
        match &entry.kind {
            None => return Err(bad(format!("{shown:?} is neither file, directory nor link"))),
            Some(Kind::Symlink(target))
                if target.is_empty() || target.contains(&0) || entry.path.is_empty() =>
            {
                return Err(bad(format!("{shown:?} cannot be a link")));
            }
            Some(Kind::File(_)) if entry.path.is_empty() && entries.len() > 1 => {
                return Err(bad("a file volume has one entry".to_owned()));
            }
            Some(Kind::File(content)) => total = total.saturating_add(content.len()),
            Some(Kind::Symlink(_) | Kind::Directory(_)) => {}
        }
    }
    if total > MAX_VOLUME_BYTES {
        return Err(bad(format!(
            "{total} bytes of content are over the limit of {MAX_VOLUME_BYTES}"
        )));
    }
    Ok(())
}

/// A path that stays below where it starts, component by component; empty is the start itself.
pub(crate) fn is_below(path: &[u8]) -> bool {
    let fine = |part: &[u8]| !part.is_empty() && part != b"." && part != b".." && part.len() <= 255;
    path.is_empty() || (path.len() < 4096 && !path.contains(&0) && path.split(|byte| *byte == b'/').all(fine))
}

fn write(place: &Path, entries: &[v1::VolumeEntry]) -> io::Result<()> {
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    if let [
        v1::VolumeEntry {
            path,
            kind: Some(Kind::File(content)),
            mode,
            uid,
            gid,
        },
    ] = entries
        && path.is_empty()
    {
        return write_file_volume(place, content, *mode, *uid, *gid);
    }
    match fs::create_dir(place) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    let root = rustix::fs::open(
        place,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let is_link = |entry: &&v1::VolumeEntry| matches!(entry.kind, Some(Kind::Symlink(_)));
    for entry in entries.iter().filter(|entry| !is_link(entry)) {
        write_entry(&root, entry)?;
    }
    for entry in entries.iter().filter(is_link) {
        write_entry(&root, entry)?;
    }
    let wanted: HashSet<&[u8]> = entries.iter().map(|entry| entry.path.as_slice()).collect();
    remove_others(&root, b"", &wanted)
}

fn write_file_volume(place: &Path, content: &[u8], mode: u32, uid: u32, gid: u32) -> io::Result<()> {
    let mut file = fs::File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(place)?;
    file.write_all(content)?;
    fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    fchmod(&file, Mode::from_raw_mode(mode & 0o7777))?;
    Ok(())
}

/// Opens a directory of the volume; links on the way are refused.
fn open_directory(root: &OwnedFd, path: &[u8]) -> io::Result<OwnedFd> {
    let path = if path.is_empty() {
        OsStr::new(".")
    } else {
        OsStr::from_bytes(path)
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(
        root,
        path,
        flags,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )?)
}

fn split(path: &[u8]) -> (&[u8], &OsStr) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (
            path.get(..at).unwrap_or_default(),
            OsStr::from_bytes(path.get(at + 1..).unwrap_or_default()),
        ),
        None => (&[], OsStr::from_bytes(path)),
    }
}

fn write_entry(root: &OwnedFd, entry: &v1::VolumeEntry) -> io::Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
    let mode = Mode::from_raw_mode(entry.mode & 0o7777);
    if entry.path.is_empty() {
        fchown(root, uid, gid)?;
        return Ok(fchmod(root, mode)?);
    }
    let (parent, name) = split(&entry.path);
    let parent = open_directory(root, parent)?;
    match &entry.kind {
        Some(Kind::Directory(_)) => {
            make_way(&parent, name, true)?;
            match mkdirat(&parent, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error.into()),
            }
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let directory = openat(&parent, name, flags, Mode::empty())?;
            fchown(&directory, uid, gid)?;
            fchmod(&directory, mode)?;
        }
        Some(Kind::File(content)) => {
            forget_unfinished(&parent)?;
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut file = fs::File::from(openat(&parent, UNFINISHED, flags, Mode::RUSR | Mode::WUSR)?);
            file.write_all(content)?;
            fchown(&file, uid, gid)?;
            fchmod(&file, mode)?;
            make_way(&parent, name, false)?;
            renameat(&parent, UNFINISHED, &parent, name)?;
        }
        Some(Kind::Symlink(target)) => {
            forget_unfinished(&parent)?;
            symlinkat(OsStr::from_bytes(target), &parent, UNFINISHED)?;
            chownat(&parent, UNFINISHED, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
            make_way(&parent, name, false)?;
            renameat(&parent, UNFINISHED, &parent, name)?;
        }
        None => return Err(Errno::INVAL.into()),
    }
    Ok(())
}

fn forget_unfinished(parent: &OwnedFd) -> io::Result<()> {
    match unlinkat(parent, UNFINISHED, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes what is of the other kind at this name: rename replaces neither a directory by a file nor the reverse.
fn make_way(parent: &OwnedFd, name: &OsStr, for_directory: bool) -> io::Result<()> {
    let is_directory = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => FileType::from_raw_mode(stat.st_mode) == FileType::Directory,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if is_directory == for_directory {
        return Ok(());
    }
    if is_directory {
        return delete_tree::delete(&crate::rootfs::name_of(parent.as_fd()).join(name));
    }
    Ok(unlinkat(parent, name, AtFlags::empty())?)
}

/// Removes what is in the volume and not wanted.
fn remove_others(root: &OwnedFd, below: &[u8], wanted: &HashSet<&[u8]>) -> io::Result<()> {
    let directory = open_directory(root, below)?;
    let here = crate::rootfs::name_of(directory.as_fd());
    for entry in fs::read_dir(&here)? {
        let entry = entry?;
        let name = entry.file_name();
        let path = if below.is_empty() {
            name.as_bytes().to_vec()
        } else {
            [below, b"/", name.as_bytes()].concat()
        };
        let is_directory = entry.file_type()?.is_dir();
        match (wanted.contains(path.as_slice()), is_directory) {
            (true, true) => remove_others(root, &path, wanted)?,
            (true, false) => {}
            (false, _) => delete_tree::delete(&entry.path())?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, symlink};

    fn entry(path: &str, kind: Kind) -> v1::VolumeEntry {
        let mode = if matches!(kind, Kind::Directory(_)) {
            0o755
        } else {
            0o640
        };
        v1::VolumeEntry {
            path: path.as_bytes().to_vec(),
            mode,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            kind: Some(kind),
        }
    }

    fn file(path: &str, content: &str) -> v1::VolumeEntry {
        entry(path, Kind::File(content.as_bytes().to_vec()))
    }

    fn directory(path: &str) -> v1::VolumeEntry {
        entry(path, Kind::Directory(true))
    }

    fn link(path: &str, target: &str) -> v1::VolumeEntry {
        entry(path, Kind::Symlink(target.as_bytes().to_vec()))
    }

    #[test]
    fn paths_that_leave_the_volume_are_refused() {
        for bad in ["/a", "..", "a/../b", "a//b", "./a", "a/", ".caisson-unfinished"] {
            assert!(check(&[directory(""), file(bad, "")]).is_err(), "{bad:?}");
        }
        assert!(check(&[file("a", ""), file("a", "")]).is_err());
        assert!(check(&[]).is_err());
        assert!(check(&[file("", ""), file("a", "")]).is_err());
        assert!(check(&[directory(""), directory("a"), link("a/b", "..data/x")]).is_ok());
    }

    #[test]
    fn too_much_content_is_refused() {
        let half = "x".repeat(MAX_VOLUME_BYTES / 2 + 1);
        assert!(check(&[file("a", &half)]).is_ok());
        assert!(check(&[file("a", &half), file("b", &half)]).is_err());
    }

    #[test]
    fn an_update_swaps_links_and_drops_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v/content");
        let tree = |version: &str, content: &str| {
            vec![
                directory(""),
                directory(version),
                file(&format!("{version}/key"), content),
                link("..data", version),
                link("key", "..data/key"),
            ]
        };
        write(&place, &tree("..1", "one")).unwrap();
        assert_eq!(fs::read(place.join("key")).unwrap(), b"one");
        let inode = fs::metadata(&place).unwrap().ino();
        write(&place, &tree("..2", "two")).unwrap();
        assert_eq!(fs::read(place.join("key")).unwrap(), b"two");
        assert!(!place.join("..1").exists());
        assert_eq!(fs::metadata(&place).unwrap().ino(), inode);
        assert_eq!(fs::metadata(place.join("key")).unwrap().mode() & 0o7777, 0o640);
    }

    #[test]
    fn a_file_volume_keeps_its_inode() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v/content");
        write(&place, &[file("", "one, and longer")]).unwrap();
        let inode = fs::metadata(&place).unwrap().ino();
        write(&place, &[file("", "two")]).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"two");
        assert_eq!(fs::metadata(&place).unwrap().ino(), inode);
    }

    #[test]
    fn a_link_that_a_container_left_leads_nowhere() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("v/content");
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("keep"), "").unwrap();
        write(&place, &[directory(""), directory("d")]).unwrap();
        fs::remove_dir(place.join("d")).unwrap();
        symlink(&outside, place.join("d")).unwrap();
        // The link is in the way of a directory and is replaced by one.
        write(&place, &[directory(""), directory("d"), file("d/f", "x")]).unwrap();
        assert!(place.join("d").is_dir() && !place.join("d").is_symlink());
        assert!(outside.join("keep").exists() && !outside.join("f").exists());
    }
}
