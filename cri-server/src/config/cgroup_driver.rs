//! Who names the groups that pods live in: kubelet asks (RuntimeConfig), so that both use the same one.
//!
//! With either, kubelet makes the pod's group and the VM goes into a leaf of it; the drivers differ in how the group is named. systemd's names
//! say where it is: `kubepods-pod1.slice` is below `kubepods.slice`.

use std::path::Path;

/// How kubelet shall name and make groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CgroupDriver {
    /// By path, in the cgroup file system.
    Cgroupfs,
    /// By unit, through systemd.
    Systemd,
}

impl CgroupDriver {
    /// The driver that a word asks for; `auto` looks whether this host's init is systemd.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "cgroupfs" => Some(Self::Cgroupfs),
            "systemd" => Some(Self::Systemd),
            "auto" => Some(Self::detect(Path::new("/run/systemd/system"))),
            _ => None,
        }
    }

    /// As sd_booted(3) looks.
    fn detect(booted: &Path) -> Self {
        if booted.is_dir() {
            Self::Systemd
        } else {
            Self::Cgroupfs
        }
    }

    /// As the configuration has it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cgroupfs => "cgroupfs",
            Self::Systemd => "systemd",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_systemd_has_booted_is_known_by_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(CgroupDriver::detect(dir.path()), CgroupDriver::Systemd);
        assert_eq!(
            CgroupDriver::detect(&dir.path().join("none")),
            CgroupDriver::Cgroupfs
        );
    }

    #[test]
    fn drivers_are_known_by_their_words() {
        for driver in [CgroupDriver::Cgroupfs, CgroupDriver::Systemd] {
            assert_eq!(CgroupDriver::parse(driver.as_str()), Some(driver));
        }
        assert!(CgroupDriver::parse("auto").is_some());
        assert_eq!(CgroupDriver::parse("Systemd"), None);
    }
}
