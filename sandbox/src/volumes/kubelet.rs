//! What kubelet's paths say about a volume: `pods/<uid>/volumes/<plugin>/<name>`, and `pods/<uid>/volume-subpaths/<name>/...` for a
//! subPath, which is a bind mount whose origin the table of mounts tells.
//!
//! Only paths of the pod's own uid count: a hostPath that leads into another pod's directory is a path like any other.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use crate::{
    SandboxError,
    volumes::mount_table::{MountTable, Mounted},
};

/// A volume by its source, as far as that matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// kubelet writes it, and replaces it as a whole through a `..data` link.
    Projected,
    EmptyDir(Medium),
    /// Another plugin's.
    Other,
}

/// What an emptyDir is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    Disk,
    /// Bytes; 0: no limit of its own.
    Memory(u64),
}

/// A volume that a path belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KubeletVolume {
    pub(crate) source: Source,
    /// The volume's own directory.
    pub(crate) directory: PathBuf,
    /// Path inside it; empty for all of it.
    pub(crate) sub_path: PathBuf,
}

/// What `path`, which has no links, is of the pod with this uid. `None`: nothing of kubelet's. Blocking.
pub(crate) fn recognize(path: &Path, uid: &str) -> Result<Option<KubeletVolume>, SandboxError> {
    let Some((pod, rest)) = below_pod(path, uid) else {
        return Ok(None);
    };
    let mut parts = rest.components().map(Component::as_os_str);
    let (Some(kind), Some(first), Some(second)) = (parts.next(), parts.next(), parts.next()) else {
        return Ok(None);
    };
    if kind == "volumes" {
        let directory = pod.join(kind).join(first).join(second);
        let sub_path = parts.collect();
        let mounts = MountTable::read()?;
        let source = source(&first.to_string_lossy(), &directory, &mounts)?;
        return Ok(Some(KubeletVolume {
            source,
            directory,
            sub_path,
        }));
    }
    if kind == "volume-subpaths" {
        return sub_path_mount(path, &pod.join("volumes"), Path::new(first));
    }
    Ok(None)
}

/// The pod's directory and the path below it. Pure.
fn below_pod(path: &Path, uid: &str) -> Option<(PathBuf, PathBuf)> {
    if uid.is_empty() || uid.contains('/') {
        return None;
    }
    let parts: Vec<_> = path.components().collect();
    let at = parts.windows(2).position(
        |pair| matches!(pair, [pods, own] if pods.as_os_str() == "pods" && own.as_os_str() == uid),
    )?;
    let (pod, rest) = parts.split_at_checked(at + 2)?;
    Some((pod.iter().collect(), rest.iter().collect()))
}

fn source(plugin: &str, directory: &Path, mounts: &MountTable) -> Result<Source, SandboxError> {
    match plugin {
        "kubernetes.io~configmap"
        | "kubernetes.io~secret"
        | "kubernetes.io~projected"
        | "kubernetes.io~downward-api" => Ok(Source::Projected),
        "kubernetes.io~empty-dir" => match mounts.at(directory) {
            None => Ok(Source::EmptyDir(Medium::Disk)),
            Some(mount) if mount.file_system == "tmpfs" => {
                Ok(Source::EmptyDir(Medium::Memory(tmpfs_bytes(&mount.options))))
            }
            Some(mount) => Err(SandboxError::Invalid {
                what: "medium of the emptyDir".into(),
                reason: format!("{} is not supported", mount.file_system),
            }),
        },
        _ => Ok(Source::Other),
    }
}

/// A subPath is a bind mount of something inside the volume, whose path on its file system is known, as is that of the volume. What
/// cannot be traced back is served as it is.
fn sub_path_mount(path: &Path, volumes: &Path, name: &Path) -> Result<Option<KubeletVolume>, SandboxError> {
    let plugins = fs::read_dir(volumes).map_err(SandboxError::io(format!("list {}", volumes.display())))?;
    let Some(directory) = plugins
        .flatten()
        .map(|plugin| plugin.path().join(name))
        .find(|directory| directory.is_dir())
    else {
        return Ok(None);
    };
    let mounts = MountTable::read()?;
    let plugin = directory
        .parent()
        .and_then(Path::file_name)
        .map(|plugin| plugin.to_string_lossy().into_owned())
        .unwrap_or_default();
    let source = source(&plugin, &directory, &mounts)?;
    Ok(
        inside(mounts.at(path), &directory, &mounts).map(|sub_path| KubeletVolume {
            source,
            directory,
            sub_path,
        }),
    )
}

/// Which part of `directory` is mounted by `mount`. Pure.
fn inside(mount: Option<&Mounted>, directory: &Path, mounts: &MountTable) -> Option<PathBuf> {
    let (part, whole) = (mount?, mounts.of(directory)?);
    let below = directory.strip_prefix(&whole.point).ok()?;
    let origin = whole.root.join(below);
    let sub_path = part.root.strip_prefix(origin).ok()?;
    (part.device == whole.device && !sub_path.as_os_str().is_empty()).then(|| sub_path.to_owned())
}

/// `size=` of a tmpfs as the kernel prints it. Pure.
fn tmpfs_bytes(options: &str) -> u64 {
    let Some(size) = options.split(',').find_map(|option| option.strip_prefix("size=")) else {
        return 0;
    };
    let digits = size.trim_end_matches(|unit: char| !unit.is_ascii_digit());
    let shift = match size.get(digits.len()..) {
        Some("k") => 10,
        Some("m") => 20,
        Some("g") => 30,
        _ => 0,
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KUBELET: &str = "/var/lib/kubelet/pods/u1";

    #[test]
    fn only_the_pod_s_own_directory_counts() {
        let path = Path::new("/var/lib/kubelet/pods/u1/volumes/kubernetes.io~empty-dir/cache/a/b");
        let (pod, rest) = below_pod(path, "u1").unwrap();
        assert_eq!(pod, Path::new(KUBELET));
        assert_eq!(rest, Path::new("volumes/kubernetes.io~empty-dir/cache/a/b"));
        for other in ["u2", "", "u1/volumes"] {
            assert!(below_pod(path, other).is_none());
        }
        assert_eq!(recognize(Path::new("/srv/data"), "u1").unwrap(), None);
    }

    #[test]
    fn volumes_are_told_apart_by_plugin() {
        let name = |plugin: &str| format!("{KUBELET}/volumes/{plugin}/v/x");
        let known = |plugin: &str| recognize(Path::new(&name(plugin)), "u1").unwrap().unwrap();
        for plugin in ["configmap", "secret", "projected", "downward-api"] {
            assert_eq!(
                known(&format!("kubernetes.io~{plugin}")).source,
                Source::Projected
            );
        }
        let empty = known("kubernetes.io~empty-dir");
        assert_eq!(empty.source, Source::EmptyDir(Medium::Disk));
        assert_eq!(empty.sub_path, Path::new("x"));
        assert_eq!(known("kubernetes.io~csi").source, Source::Other);
    }

    #[test]
    fn memory_and_subpaths_are_read_from_the_table_of_mounts() {
        let table = MountTable::parse(
            format!(
                "1 0 8:1 / / rw - ext4 /dev/sda rw\n\
                 2 1 0:9 / {KUBELET}/volumes/kubernetes.io~empty-dir/mem rw - tmpfs tmpfs rw,size=65536k\n\
                 3 1 0:9 /in/side {KUBELET}/volume-subpaths/mem/c/0 rw - tmpfs tmpfs rw\n\
                 4 1 8:1 {KUBELET}/volumes/kubernetes.io~empty-dir/disk/s {KUBELET}/volume-subpaths/disk/c/0 rw - ext4 /dev/sda rw\n\
                 5 1 8:1 /elsewhere {KUBELET}/volume-subpaths/disk/c/1 rw - ext4 /dev/sda rw\n"
            )
            .as_bytes(),
        );
        let volume = |name: &str| PathBuf::from(format!("{KUBELET}/volumes/kubernetes.io~empty-dir/{name}"));
        let medium = |name: &str| source("kubernetes.io~empty-dir", &volume(name), &table).unwrap();
        assert_eq!(medium("mem"), Source::EmptyDir(Medium::Memory(64 << 20)));
        assert_eq!(medium("disk"), Source::EmptyDir(Medium::Disk));
        let found = |name: &str, place: &str| {
            let path = PathBuf::from(format!("{KUBELET}/volume-subpaths/{place}"));
            inside(table.at(&path), &volume(name), &table)
        };
        assert_eq!(found("mem", "mem/c/0"), Some("in/side".into()));
        assert_eq!(found("disk", "disk/c/0"), Some("s".into()));
        assert_eq!(found("disk", "disk/c/1"), None);
        assert_eq!(found("disk", "absent"), None);
    }

    #[test]
    fn sizes_come_with_units() {
        assert_eq!(tmpfs_bytes("rw,size=65536k,mode=755"), 64 << 20);
        assert_eq!(tmpfs_bytes("size=2m"), 2 << 20);
        assert_eq!(tmpfs_bytes("rw"), 0);
        assert_eq!(tmpfs_bytes("size=99999999999999999999g"), 0);
    }
}
