//! Devices that a container has besides the usual ones: its disks, and what the guest's kernel offers in /dev (FUSE, tun).
//!
//! Which of them there may be is the daemon's to say; here they are found, and looked at for what they are.

use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use caisson_agent_api::v1;

use crate::{
    device_filter::Allowed,
    devices,
    error::{AgentError, At},
    names,
    stage_spec::StageDevice,
};

/// What can be known to be wrong before anything is looked for.
pub(crate) fn check(spec: &v1::ContainerSpec) -> Result<(), AgentError> {
    for device in &spec.block_devices {
        names::serial("spec.block_devices.serial", &device.serial)?;
        names::absolute("spec.block_devices.path", &device.path)?;
    }
    for device in &spec.character_devices {
        let name = format!("/{}", device.name);
        names::absolute("spec.character_devices.name", &name)?;
        if name.ends_with('/') || name.split('/').any(|part| part == "..") {
            let reason = format!("{:?} names no device", device.name);
            return Err(AgentError::invalid("spec.character_devices.name", reason));
        }
        names::absolute("spec.character_devices.path", &device.path)?;
    }
    Ok(())
}

/// The container's own devices, as nodes to be made. Waits for disks. Blocking.
pub(crate) fn find(spec: &v1::ContainerSpec) -> Result<Vec<StageDevice>, AgentError> {
    let disks = spec.block_devices.iter().map(disk);
    disks
        .chain(spec.character_devices.iter().map(character))
        .collect()
}

/// What the container's device filter has to know.
pub(crate) fn allowed(device: &StageDevice) -> Allowed {
    Allowed {
        block: device.block,
        major: device.major,
        minor: device.minor,
        read: device.read,
        write: device.write,
    }
}

fn disk(wanted: &v1::BlockDevice) -> Result<StageDevice, AgentError> {
    let node = devices::disk(&wanted.serial)?;
    let (major, minor) = numbers(&fs::metadata(&node).at(|| format!("looking at {}", node.display()))?);
    Ok(StageDevice {
        path: wanted.path.clone(),
        block: true,
        major,
        minor,
        mode: wanted.mode,
        uid: wanted.uid,
        gid: wanted.gid,
        read: true,
        write: !wanted.readonly,
    })
}

fn character(wanted: &v1::CharacterDevice) -> Result<StageDevice, AgentError> {
    let missing = || {
        let reason = format!("the guest's kernel has no device {}", wanted.name);
        AgentError::invalid("spec.character_devices", reason)
    };
    let node = Path::new("/dev").join(&wanted.name);
    let metadata = match fs::metadata(&node) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing()),
        found => found.at(|| format!("looking at {}", node.display()))?,
    };
    if !metadata.file_type().is_char_device() {
        return Err(missing());
    }
    let (major, minor) = numbers(&metadata);
    Ok(StageDevice {
        path: wanted.path.clone(),
        block: false,
        major,
        minor,
        mode: wanted.mode,
        uid: wanted.uid,
        gid: wanted.gid,
        read: wanted.read,
        write: wanted.write,
    })
}

fn numbers(metadata: &Metadata) -> (u32, u32) {
    let device = metadata.rdev();
    (rustix::fs::major(device), rustix::fs::minor(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str, path: &str) -> v1::ContainerSpec {
        v1::ContainerSpec {
            character_devices: vec![v1::CharacterDevice {
                name: name.into(),
                path: path.into(),
                ..v1::CharacterDevice::default()
            }],
            ..v1::ContainerSpec::default()
        }
    }

    #[test]
    fn names_that_leave_dev_are_refused() {
        for (name, path, fine) in [
            ("fuse", "/dev/fuse", true),
            ("net/tun", "/dev/net/tun", true),
            ("../etc", "/dev/x", false),
            ("net/../../etc", "/dev/x", false),
            ("", "/dev/x", false),
            ("fuse", "dev/fuse", false),
        ] {
            assert_eq!(check(&device(name, path)).is_ok(), fine, "{name:?} {path:?}");
        }
    }

    #[test]
    fn what_the_kernel_does_not_have_is_said_by_its_name() {
        let error = find(&device("no-such-device", "/dev/x")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "spec.character_devices: the guest's kernel has no device no-such-device"
        );
        let found = find(&device("null", "/dev/nothing")).unwrap();
        assert_eq!((found[0].major, found[0].minor, found[0].block), (1, 3, false));
    }
}
