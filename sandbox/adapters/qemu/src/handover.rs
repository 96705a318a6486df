//! Files that the daemon may read and a VM's user may not even reach: opened here, and handed over as descriptors that can be opened once
//! more through `/proc/self/fd`, as QEMU does with kernel and initramfs, and the kernel with a program.
//!
//! Such a second open asks for no search permission on any directory, but for the file's own mode. Where that is too strict, a
//! sealed copy in memory is handed over instead: its owner's choice about the file on disk stays as it is.

use std::{
    fs::{File, Permissions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
};

use caisson_hypervisor::HypervisorError;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::launch::io_error;

/// What is done with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    Read,
    Execute,
}

/// Opens `path` such that this user (and root, if none is given) can open it again through its descriptor.
pub(crate) fn open_for(
    path: &Path,
    what: &str,
    user: Option<(u32, u32)>,
    purpose: Purpose,
) -> Result<File, HypervisorError> {
    let failed = |e| io_error(format!("open the {what} {}", path.display()), e);
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(HypervisorError::Spec(format!(
            "the {what} {} is not a file",
            path.display()
        )));
    }
    match user {
        Some(user) if !permits(metadata.mode(), (metadata.uid(), metadata.gid()), user, purpose) => {
            let copied = sealed_copy(&file);
            copied.map_err(|e| io_error(format!("copy the {what} {} into memory", path.display()), e))
        }
        _ => Ok(file),
    }
}

fn permits(mode: u32, owner: (u32, u32), user: (u32, u32), purpose: Purpose) -> bool {
    let bit = match purpose {
        Purpose::Read => 4,
        Purpose::Execute => 1,
    };
    let shift = if owner.0 == user.0 {
        6
    } else if owner.1 == user.1 {
        3
    } else {
        0
    };
    mode >> shift & bit != 0
}

/// Nobody can change it, its reader included.
fn sealed_copy(source: &File) -> io::Result<File> {
    let mut source = source;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy = File::from(rustix::fs::memfd_create(c"caisson-handover", flags)?);
    io::copy(&mut source, &mut copy)?;
    copy.set_permissions(Permissions::from_mode(0o555))?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    // Read-only: what is open for writing cannot be executed.
    File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Read, io::Write};

    use super::*;

    #[test]
    fn the_files_own_mode_decides_for_its_owner_its_group_and_others() {
        let allowed = |mode, user, purpose| permits(mode, (1, 2), user, purpose);
        assert!(allowed(0o644, (7, 7), Purpose::Read));
        assert!(!allowed(0o640, (7, 7), Purpose::Read));
        assert!(allowed(0o640, (7, 2), Purpose::Read));
        assert!(!allowed(0o604, (7, 2), Purpose::Read));
        assert!(allowed(0o400, (1, 7), Purpose::Read));
        assert!(!allowed(0o644, (7, 7), Purpose::Execute));
        assert!(allowed(0o711, (7, 7), Purpose::Execute));
    }

    #[test]
    fn what_the_user_may_not_read_is_handed_over_as_a_copy_that_nobody_can_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("kernel");
        fs::write(&path, b"boot me").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let user = Some((2_100_000_000, 2_100_000_000));
        let mut copy = open_for(&path, "kernel", user, Purpose::Read).unwrap();
        assert_eq!(copy.metadata().unwrap().mode() & 0o777, 0o555);
        let mut text = String::new();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "boot me");
        let again = File::options()
            .write(true)
            .open(format!("/proc/self/fd/{}", copy.as_raw_fd()));
        assert!(again.is_err() || again.unwrap().write_all(b"x").is_err());

        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let file = open_for(&path, "kernel", user, Purpose::Read).unwrap();
        assert_eq!(
            file.metadata().unwrap().ino(),
            fs::metadata(&path).unwrap().ino(),
            "no copy where none is needed"
        );
    }

    #[test]
    fn only_files_are_handed_over() {
        let error = open_for(Path::new("/dev/null"), "kernel", None, Purpose::Read).unwrap_err();
        assert!(
            error.to_string().contains("the kernel /dev/null is not a file"),
            "{error}"
        );
    }
}
