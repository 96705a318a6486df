//! Image disks: found by serial, mounted read-only once, shared by all containers that use them, unmounted with the last.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::{
    console::complain,
    devices,
    error::{AgentError, At},
};

const DIRECTORY: &str = "/run/images";

/// How long a disk may be listed and not yet there.
const OPEN_BOUND: Duration = Duration::from_secs(5);

/// How long a file system that nobody uses any more may take to say so.
const UNMOUNT_BOUND: Duration = Duration::from_secs(1);

/// The mounted images with their users.
#[derive(Debug, Default)]
pub(crate) struct Images {
    users: Mutex<HashMap<String, usize>>,
}

impl Images {
    /// Where the image of this serial is mounted; it has one user more. Blocking.
    pub(crate) fn acquire(&self, serial: &str) -> Result<PathBuf, AgentError> {
        let place = Path::new(DIRECTORY).join(serial);
        let source = Source::find(serial)?;
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let count = users.entry(serial.to_owned()).or_insert(0);
        if *count == 0
            && let Err(error) = source.mount(serial, &place)
        {
            users.remove(serial);
            return Err(error);
        }
        *count += 1;
        Ok(place)
    }

    /// Whether somebody uses the image of this serial.
    pub(crate) fn has_users(&self, serial: &str) -> bool {
        let users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.contains_key(serial)
    }

    /// One user less. Blocking.
    pub(crate) fn release(&self, serial: &str) {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(count) = users.get_mut(serial) else {
            return;
        };
        *count = count.saturating_sub(1);
        if *count == 0 {
            users.remove(serial);
            let place = Path::new(DIRECTORY).join(serial);
            if let Err(error) = detach(&place) {
                complain(&format!("unmounting image {serial}: {error}"));
            }
        }
    }
}

/// Unmounts for good when it can, so that the disk can be taken away; lazily when something still holds it.
fn detach(place: &Path) -> io::Result<()> {
    let deadline = Instant::now() + UNMOUNT_BOUND;
    loop {
        match unmount(place, UnmountFlags::empty()) {
            // The kernel takes dead namespaces apart behind our back.
            Err(rustix::io::Errno::BUSY) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(5))
            }
            Err(rustix::io::Errno::BUSY) => break unmount(place, UnmountFlags::DETACH)?,
            other => break other?,
        }
    }
    fs::remove_dir(place)
}

/// A disk that has just been plugged in is listed before it can be opened: until then, it is "no such device or address".
fn mount_disk(node: &Path, place: &Path) -> rustix::io::Result<()> {
    let deadline = Instant::now() + OPEN_BOUND;
    loop {
        match mount(node, place, "erofs", MountFlags::RDONLY, None) {
            Err(rustix::io::Errno::NXIO) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Where an image comes from.
enum Source {
    Disk(PathBuf),
    #[cfg(feature = "component-test")]
    Directory(PathBuf),
}

impl Source {
    #[cfg(not(feature = "component-test"))]
    fn find(serial: &str) -> Result<Self, AgentError> {
        devices::disk(serial).map(Self::Disk)
    }

    #[cfg(feature = "component-test")]
    fn find(serial: &str) -> Result<Self, AgentError> {
        match std::env::var_os("CAISSON_COMPONENT_IMAGES") {
            Some(directory) if Path::new(&directory).join(serial).is_dir() => {
                Ok(Self::Directory(Path::new(&directory).join(serial)))
            }
            _ => devices::disk(serial).map(Self::Disk),
        }
    }

    fn mount(&self, serial: &str, place: &Path) -> Result<(), AgentError> {
        fs::create_dir_all(place).at(|| format!("creating {}", place.display()))?;
        match self {
            Self::Disk(node) => {
                mount_disk(node, place).at(|| format!("mounting image {serial} from {}", node.display()))
            }
            #[cfg(feature = "component-test")]
            Self::Directory(directory) => {
                rustix::mount::mount_bind(directory, place).at(|| format!("binding image {serial}"))
            }
        }
    }
}
