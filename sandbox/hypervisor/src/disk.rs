//! Opening the file of a disk, as every driver does it. Must not know what a disk is used for.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileTypeExt,
};

use crate::{Disk, HypervisorError, SERIAL_BYTES};

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

/// Opens the file or block device behind `disk`, for writing only where the disk is writable.
pub fn open(disk: &Disk) -> Result<File, HypervisorError> {
    check_serial(&disk.serial)?;
    let io = |what: &str, source| HypervisorError::Io {
        what: format!("{what} disk {}", disk.path.display()),
        source,
    };
    let file = OpenOptions::new()
        .read(true)
        .write(!disk.read_only)
        .open(&disk.path)
        .map_err(|e| io("open", e))?;
    let kind = file.metadata().map_err(|e| io("inspect", e))?.file_type();
    if kind.is_file() || kind.is_block_device() {
        Ok(file)
    } else {
        Err(HypervisorError::Spec(format!(
            "disk {} is neither a file nor a block device",
            disk.path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn serials_are_words_that_need_no_quoting() {
        for good in ["a", "scratch", "layer-0", "ABCDEFGHIJ0123456789"] {
            check_serial(good).unwrap();
        }
        for bad in ["", "a,b", "a b", "ABCDEFGHIJ01234567890", "ä", "a=b"] {
            assert!(check_serial(bad).is_err(), "{bad}");
        }
    }
}
