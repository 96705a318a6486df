//! Volumes of the pod's own, which live in the guest as long as it does: a disk's ext4, or memory. Shared by the pod's containers.
//!
//! A container may do what it likes in one, so a path inside is resolved with the volume as its root.

use std::{
    collections::HashSet,
    ffi::CString,
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use caisson_agent_api::v1::{self, pod_volume_source::Backing};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchmod, fchown},
    io::Errno,
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
};

use crate::{
    console::complain,
    devices,
    error::{AgentError, At},
    names,
    rootfs::{self, Want},
};

const DIRECTORY: &str = "/run/pod-volumes";

/// Most volumes at a time.
const MAX_VOLUMES: usize = 256;

/// How long a disk may be listed and not yet there.
const OPEN_BOUND: Duration = Duration::from_secs(5);

/// The volumes that are mounted.
#[derive(Debug, Default)]
pub(crate) struct PodVolumes {
    mounted: Mutex<HashSet<String>>,
}

/// Where a volume's content is.
pub(crate) fn path(id: &str) -> PathBuf {
    place(id).join("fs/volume")
}

fn place(id: &str) -> PathBuf {
    Path::new(DIRECTORY).join(id)
}

/// What can be known to be wrong before anything is done.
pub(crate) fn check(source: &v1::PodVolumeSource) -> Result<(), AgentError> {
    const FIELD: &str = "spec.mounts.pod_volume";
    names::id(FIELD, &source.id)?;
    let inside = &source.sub_path;
    if inside.contains('\0') || inside.len() > 4095 || inside.split('/').any(|part| part == "..") {
        return Err(AgentError::invalid(
            FIELD,
            format!("{inside:?} leaves the volume"),
        ));
    }
    match &source.backing {
        Some(Backing::DiskSerial(serial)) => names::serial(FIELD, serial),
        Some(Backing::MemoryBytes(_)) => Ok(()),
        None => Err(AgentError::invalid(FIELD, "has no backing")),
    }
}

impl PodVolumes {
    /// Mounts the volume unless it is, and makes the path inside it that the container is to see. Blocking.
    pub(crate) fn provide(&self, source: &v1::PodVolumeSource) -> Result<(), AgentError> {
        check(source)?;
        // Held while a disk appears: the pod's other volumes wait as long, and no two callers mount one.
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        if !mounted.contains(&source.id) {
            if mounted.len() >= MAX_VOLUMES {
                return Err(AgentError::Full {
                    what: "volumes of the pod",
                    limit: MAX_VOLUMES,
                });
            }
            make(source)?;
            mounted.insert(source.id.clone());
        }
        drop(mounted);
        if source.sub_path.is_empty() {
            return Ok(());
        }
        inside(source).at(|| format!("making {:?} in volume {}", source.sub_path, source.id))
    }
}

fn make(source: &v1::PodVolumeSource) -> Result<(), AgentError> {
    let below = place(&source.id).join("fs");
    fs::create_dir_all(&below).at(|| format!("creating {}", below.display()))?;
    let step = || format!("mounting volume {}", source.id);
    match &source.backing {
        Some(Backing::DiskSerial(serial)) => {
            let node = devices::disk(serial)?;
            // Blocks that are free again go back to the host.
            mount_when_there(&node, &below).at(step)?;
        }
        Some(Backing::MemoryBytes(bytes)) => {
            let options = match bytes {
                0 => "mode=0755".to_owned(),
                bytes => format!("mode=0755,size={bytes}"),
            };
            let options = CString::new(options).map_err(io::Error::other).at(step)?;
            mount("tmpfs", &below, "tmpfs", MountFlags::NOATIME, options.as_c_str()).at(step)?;
        }
        None => return Err(AgentError::invalid("pod_volume", "has no backing")),
    }
    // Containers may have it mounted so that their mounts travel to the others.
    let shared = mount_change(&below, MountPropagationFlags::SHARED);
    let done = shared
        .map_err(io::Error::from)
        .and_then(|()| content(source))
        .at(|| format!("making the directory of volume {}", source.id));
    if done.is_err()
        && let Err(error) = unmount(&below, UnmountFlags::DETACH)
    {
        complain(&format!("unmounting {}: {error}", below.display()));
    }
    done
}

/// A disk that has just been plugged in is listed before it can be opened: until then, it is "no such device or address".
fn mount_when_there(node: &Path, place: &Path) -> rustix::io::Result<()> {
    let deadline = Instant::now() + OPEN_BOUND;
    loop {
        match mount(node, place, "ext4", MountFlags::NOATIME, c"discard") {
            Err(Errno::NXIO) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(2)),
            other => return other,
        }
    }
}

/// A directory of its own on the file system, whose own top has things that containers do not expect (lost+found).
fn content(source: &v1::PodVolumeSource) -> io::Result<()> {
    let content = path(&source.id);
    match fs::create_dir(&content) {
        Ok(()) => {}
        // Made earlier, and changed by its users since.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(error),
    }
    own(&open_directory(&content)?, source)
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn own(directory: &OwnedFd, source: &v1::PodVolumeSource) -> io::Result<()> {
    fchown(
        directory,
        Some(Uid::from_raw(source.uid)),
        Some(Gid::from_raw(source.gid)),
    )?;
    Ok(fchmod(directory, Mode::from_raw_mode(source.mode & 0o7777))?)
}

/// What is there is taken as it is, a file as well as a directory.
fn inside(source: &v1::PodVolumeSource) -> io::Result<()> {
    let root = open_directory(&path(&source.id))?;
    if rootfs::is_directory(&root, &source.sub_path)?.is_some() {
        return Ok(());
    }
    rootfs::ensure(&root, &source.sub_path, Want::Directory)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY;
    own(&rootfs::open(&root, &source.sub_path, flags)?, source)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(sub_path: &str) -> v1::PodVolumeSource {
        v1::PodVolumeSource {
            id: "v".into(),
            backing: Some(Backing::MemoryBytes(0)),
            sub_path: sub_path.into(),
            ..v1::PodVolumeSource::default()
        }
    }

    #[test]
    fn a_path_inside_stays_inside() {
        for good in ["", "a", "a/b..c", "/a"] {
            check(&source(good)).unwrap();
        }
        for bad in ["..", "a/..", "../a", "a\0b"] {
            check(&source(bad)).unwrap_err();
        }
        let mut nothing = source("");
        nothing.backing = None;
        check(&nothing).unwrap_err();
    }
}
