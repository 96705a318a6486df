//! Opening the file of a disk, as every driver does it. Must not know what a disk is used for.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
};

use crate::{Disk, FILES_PER_DISK, HypervisorError, SERIAL_BYTES};

/// Serials end up in a hypervisor's configuration and in the guest: 1 to [`SERIAL_BYTES`] letters, digits and hyphens.
pub fn check_serial(serial: &str) -> Result<(), HypervisorError> {
    let well_formed = !serial.is_empty()
        && serial.len() <= SERIAL_BYTES
        && serial
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if well_formed {
        Ok(())
    } else {
        Err(HypervisorError::Spec(format!(
            "disk serial {serial:?} is not made of 1 to {SERIAL_BYTES} letters, digits and hyphens"
        )))
    }
}

/// Opens what is behind `disk`, in order, for writing only where the disk is writable. A link at the end of a path is an error:
/// whoever named it has resolved links, so one has been put there meanwhile.
pub fn open(disk: &Disk) -> Result<Vec<File>, HypervisorError> {
    check_serial(&disk.serial)?;
    if !(1..=FILES_PER_DISK).contains(&disk.files.len()) {
        return Err(HypervisorError::Spec(format!(
            "disk {} of {} files: 1 to {FILES_PER_DISK} are possible",
            disk.serial,
            disk.files.len()
        )));
    }
    disk.files
        .iter()
        .map(|path| open_one(path, disk.read_only))
        .collect()
}

/// Opens a disk that has to be one file.
pub fn open_single(disk: &Disk) -> Result<File, HypervisorError> {
    let mut files = open(disk)?;
    match (files.pop(), files.is_empty()) {
        (Some(file), true) => Ok(file),
        _ => Err(HypervisorError::Spec(format!(
            "disk {} is made of several files, which is possible only for one that is attached to a running VM",
            disk.serial
        ))),
    }
}

fn open_one(path: &Path, read_only: bool) -> Result<File, HypervisorError> {
    let io = |what: &str, source| HypervisorError::Io {
        what: format!("{what} disk {}", path.display()),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| io("open", e))?;
    let kind = file.metadata().map_err(|e| io("inspect", e))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(HypervisorError::Spec(format!(
            "disk {} is neither a file nor a block device",
            path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_has_as_many_files_as_a_hypervisor_takes() {
        let disk = |count| Disk {
            serial: "d".into(),
            files: vec!["/dev/null".into(); count],
            read_only: true,
        };
        for wrong in [0, FILES_PER_DISK + 1] {
            let said = open(&disk(wrong)).unwrap_err().to_string();
            assert!(said.contains("1 to 128"), "{said}");
        }
        let said = open(&disk(2)).unwrap_err().to_string();
        assert!(said.contains("neither a file nor"), "{said}");
    }

    #[test]
    fn serials_are_words_that_need_no_quoting() {
        for good in ["a", "scratch", "layer-0", "ABCDEFGHIJ0123456789"] {
            check_serial(good).unwrap();
        }
        for bad in ["", "a,b", "a b", "ABCDEFGHIJ01234567890", "ä", "a=b"] {
            assert!(check_serial(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_link_in_place_of_a_disk_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| Disk {
            serial: "one".into(),
            files: vec![dir.path().join(name)],
            read_only: false,
        };
        std::fs::write(dir.path().join("file"), "x").unwrap();
        std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
        open(&disk("file")).unwrap();
        assert!(open(&disk("link")).unwrap_err().to_string().contains("open disk"));
        assert!(open(&disk(".")).is_err());
    }
}
