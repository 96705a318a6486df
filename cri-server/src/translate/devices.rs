//! `config.devices[]`: block devices, which kubelet passes for raw block volumes, become disks of the VM. A character device that stands
//! for something that every kernel has (FUSE, tun) becomes the one of the guest's kernel. Other devices of the host cannot be in a VM.

use std::{
    fs::{self, Metadata},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use caisson_cri_api::v1;
use caisson_sandbox::{guest, spec::HostDisk};

use super::Refusals;

/// Character devices that are doors to the kernel, not to hardware: name below /dev, major and minor where they are fixed (the kernel's
/// devices.txt). Which of them a guest has is up to its kernel.
const OF_EVERY_KERNEL: [(&str, Option<(u32, u32)>); 19] = [
    ("null", Some((1, 3))),
    ("zero", Some((1, 5))),
    ("full", Some((1, 7))),
    ("random", Some((1, 8))),
    ("urandom", Some((1, 9))),
    ("kmsg", Some((1, 11))),
    ("tty", Some((5, 0))),
    ("net/tun", Some((10, 200))),
    ("cuse", Some((10, 203))),
    ("uinput", Some((10, 223))),
    ("fuse", Some((10, 229))),
    ("kvm", Some((10, 232))),
    ("btrfs-control", Some((10, 234))),
    ("autofs", Some((10, 235))),
    ("mapper/control", Some((10, 236))),
    ("loop-control", Some((10, 237))),
    ("vhost-net", Some((10, 238))),
    ("ppp", Some((108, 0))),
    ("userfaultfd", None),
];

/// What a request's devices come to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Devices {
    /// Of the host.
    pub(super) disks: Vec<HostDisk>,
    /// Of the guest's kernel.
    pub(super) character: Vec<guest::CharacterDevice>,
}

/// Sorts the devices that are asked for. Looks at them.
pub(super) fn devices(list: &[v1::Device], refusals: &mut Refusals) -> Devices {
    let mut found = Devices::default();
    for (index, device) in list.iter().enumerate() {
        if let Err(reason) = one(device, &mut found) {
            refusals.add(format!("config.devices[{index}]"), reason);
        }
    }
    found
}

fn one(device: &v1::Device, found: &mut Devices) -> Result<(), String> {
    let (host, inside) = (Path::new(&device.host_path), &device.container_path);
    if !host.is_absolute() {
        return Err(format!(
            "host_path {:?} is not an absolute path",
            device.host_path
        ));
    }
    if !inside.starts_with('/')
        || inside.split('/').any(|part| part == "..")
        || inside.contains('\0')
        || inside.trim_matches('/').is_empty()
    {
        return Err(format!(
            "container_path {inside:?} is not an absolute path without \"..\""
        ));
    }
    if let Some(other) = device.permissions.chars().find(|letter| !"rwm".contains(*letter)) {
        return Err(format!("permissions hold {other:?}, which is none of r, w and m"));
    }
    let metadata =
        fs::metadata(host).map_err(|error| format!("cannot use {:?}: {error}", device.host_path))?;
    let may = |letter| device.permissions.contains(letter);
    if metadata.file_type().is_block_device() {
        found.disks.push(HostDisk {
            host_path: host.to_owned(),
            container_path: inside.clone(),
            readonly: !may('w'),
        });
        return Ok(());
    }
    let name = kernel_name(&metadata).ok_or_else(|| {
        format!(
            "{:?} is a device of the host that a VM cannot have: it is no disk, and none of those that every kernel has",
            device.host_path
        )
    })?;
    found.character.push(guest::CharacterDevice {
        name: name.to_owned(),
        path: inside.clone(),
        read: may('r'),
        write: may('w'),
        mode: metadata.mode() & 0o777,
        uid: metadata.uid(),
        gid: metadata.gid(),
    });
    Ok(())
}

/// How a guest's kernel calls a device, by its numbers on this host: nodes may have any name.
fn kernel_name(metadata: &Metadata) -> Option<&'static str> {
    if !metadata.file_type().is_char_device() {
        return None;
    }
    let device = metadata.rdev();
    let numbers = (rustix::fs::major(device), rustix::fs::minor(device));
    if let Some((name, _)) = OF_EVERY_KERNEL.iter().find(|(_, fixed)| *fixed == Some(numbers)) {
        return Some(name);
    }
    // Those with numbers given as they come are known by what this host's kernel calls them.
    let (major, minor) = numbers;
    let text = fs::read_to_string(format!("/sys/dev/char/{major}:{minor}/uevent")).ok()?;
    let called = text.lines().find_map(|line| line.strip_prefix("DEVNAME="))?;
    let mut dynamic = OF_EVERY_KERNEL.iter().filter(|(_, fixed)| fixed.is_none());
    dynamic.find(|(name, _)| *name == called).map(|(name, _)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(host_path: &str, container_path: &str, permissions: &str) -> (Devices, String) {
        let device = v1::Device {
            host_path: host_path.into(),
            container_path: container_path.into(),
            permissions: permissions.into(),
        };
        let mut refusals = Refusals::default();
        let found = devices(&[device], &mut refusals);
        (found, refusals.to_string())
    }

    #[test]
    fn what_cannot_be_in_a_vm_is_refused_with_its_reason() {
        for (host, inside, permissions, words) in [
            (
                "/dev/ptmx",
                "/dev/x",
                "rwm",
                "a device of the host that a VM cannot have",
            ),
            (
                "/dev",
                "/dev/x",
                "rwm",
                "a device of the host that a VM cannot have",
            ),
            (
                "/nonexistent/disk",
                "/dev/x",
                "rwm",
                "cannot use \"/nonexistent/disk\"",
            ),
            ("", "/dev/x", "rwm", "not an absolute path"),
            ("/dev/null", "dev/x", "rwm", "container_path"),
            ("/dev/null", "/a/../b", "rwm", "container_path"),
            ("/dev/null", "/", "rwm", "container_path"),
            ("/dev/null", "/dev/x", "rwx", "permissions"),
        ] {
            let (found, text) = asked(host, inside, permissions);
            assert_eq!(found, Devices::default());
            assert!(
                text.contains("config.devices[0]") && text.contains(words),
                "{text}"
            );
        }
    }

    #[test]
    fn a_door_to_the_kernel_is_the_guest_s_own_by_its_numbers_and_permissions() {
        let (found, refused) = asked("/dev/null", "/dev/nothing", "rm");
        assert_eq!(refused, "");
        assert_eq!(found.disks, []);
        let [device] = found.character.as_slice() else {
            panic!("{found:?}");
        };
        assert_eq!(
            (device.name.as_str(), device.path.as_str()),
            ("null", "/dev/nothing")
        );
        assert_eq!((device.read, device.write, device.mode), (true, false, 0o666));
    }
}
