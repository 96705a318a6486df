//! `config.devices[]`: block devices, which kubelet passes for raw block volumes, become disks of the VM. Other devices of the host
//! cannot be in a VM.

use std::{fs, os::unix::fs::FileTypeExt, path::Path};

use caisson_cri_api::v1;
use caisson_sandbox::spec::HostDisk;

use super::Refusals;

/// The disks that are asked for.
pub(super) fn disks(devices: &[v1::Device], refusals: &mut Refusals) -> Vec<HostDisk> {
    let mut disks = Vec::new();
    for (index, device) in devices.iter().enumerate() {
        let field = format!("config.devices[{index}]");
        match disk(device) {
            Ok(disk) => disks.push(disk),
            Err(reason) => refusals.add(field, reason),
        }
    }
    disks
}

fn disk(device: &v1::Device) -> Result<HostDisk, String> {
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
    let kind = fs::metadata(host)
        .map_err(|error| format!("cannot use {:?}: {error}", device.host_path))?
        .file_type();
    if !kind.is_block_device() {
        return Err(format!(
            "devices of the host cannot be in a VM, but for disks: {:?} is no block device",
            device.host_path
        ));
    }
    Ok(HostDisk {
        host_path: host.to_owned(),
        container_path: inside.clone(),
        readonly: !device.permissions.contains('w'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(host_path: &str, container_path: &str, permissions: &str) -> String {
        let device = v1::Device {
            host_path: host_path.into(),
            container_path: container_path.into(),
            permissions: permissions.into(),
        };
        let mut refusals = Refusals::default();
        assert!(disks(&[device], &mut refusals).is_empty());
        refusals.to_string()
    }

    #[test]
    fn what_is_no_disk_is_refused_with_its_reason() {
        for (host, inside, permissions, words) in [
            ("/dev/null", "/dev/x", "rwm", "no block device"),
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
            let text = refused(host, inside, permissions);
            assert!(
                text.contains("config.devices[0]") && text.contains(words),
                "{text}"
            );
        }
    }
}
