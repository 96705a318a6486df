//! Mounts: the files that kubelet writes for every pod are copied, the termination file comes back, and the rest is a volume of the host's.
//!
//! Looks at host paths so far as it takes to tell these apart. How a volume gets into the guest is decided in `caisson-sandbox`.

use std::{
    fs::FileType,
    path::{Path, PathBuf},
};

use caisson_cri_api::v1;
use caisson_sandbox::spec::{HostVolume, MountRecord, Propagation, PushedFiles};

use super::Refusals;

/// kubelet's annotation with the path that a container may leave a last message in.
pub(super) const TERMINATION_PATH: &str = "io.kubernetes.container.terminationMessagePath";

/// Files that kubelet mounts writable though nobody reads them back.
const WRITABLE_COPIES: [&str; 3] = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"];

/// What a container's mounts come to.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Mounts {
    /// Copied into the guest.
    pub(super) files: Vec<PushedFiles>,
    /// Everything else.
    pub(super) volumes: Vec<HostVolume>,
    /// Host file and path in the container of the termination message.
    pub(super) termination: Option<(PathBuf, String)>,
    /// For the container's status.
    pub(super) records: Vec<MountRecord>,
}

/// Sorts a request's mounts. Looks at the host paths.
pub(super) fn mounts(
    list: &[v1::Mount],
    termination_path: Option<&String>,
    refusals: &mut Refusals,
) -> Mounts {
    let mut mounts = Mounts::default();
    for (index, mount) in list.iter().enumerate() {
        if mount.image.is_some() {
            // Not a path of the host's.
            continue;
        }
        let field = format!("config.mounts[{index}]");
        if !possible(mount, &field, refusals) {
            continue;
        }
        let Some(propagation) = propagation(mount, &field, refusals) else {
            continue;
        };
        mounts.records.push(MountRecord {
            host_path: mount.host_path.clone(),
            container_path: mount.container_path.clone(),
            readonly: mount.readonly,
            recursive_readonly: mount.recursive_read_only,
            propagation,
            image: None,
        });
        let (path, kind) = match look(Path::new(&mount.host_path)) {
            Ok(found) => found,
            Err(error) => {
                refusals.add(
                    format!("{field}.host_path"),
                    format!(
                        "cannot use {:?} for {}: {error}",
                        mount.host_path, mount.container_path
                    ),
                );
                continue;
            }
        };
        if kind.is_file() && termination_path.is_some_and(|path| same(path, &mount.container_path)) {
            mounts.termination = Some((path, mount.container_path.clone()));
        } else if kind.is_file() && is_kept_by_nobody(&mount.container_path) {
            mounts.files.push(PushedFiles {
                host_path: path,
                container_path: mount.container_path.clone(),
                readonly: mount.readonly,
            });
        } else {
            mounts.volumes.push(HostVolume {
                host_path: mount.host_path.clone().into(),
                container_path: mount.container_path.clone(),
                readonly: mount.readonly,
                recursive_readonly: mount.recursive_read_only,
                propagation,
            });
        }
    }
    mounts
}

/// Refuses what no rule below could honour.
fn possible(mount: &v1::Mount, field: &str, refusals: &mut Refusals) -> bool {
    let before = refusals.list().len();
    refusals.add_if(
        mount.host_path.is_empty(),
        &format!("{field}.host_path"),
        "is missing",
    );
    refusals.add_if(
        !mount.host_path.is_empty() && !mount.host_path.starts_with('/'),
        &format!("{field}.host_path"),
        "is not an absolute path",
    );
    let inside = &mount.container_path;
    refusals.add_if(
        !inside.starts_with('/') || inside.split('/').any(|part| part == "..") || inside.contains('\0'),
        &format!("{field}.container_path"),
        "is not an absolute path without \"..\"",
    );
    for (name, mappings) in [
        ("uid_mappings", &mount.uid_mappings),
        ("gid_mappings", &mount.gid_mappings),
    ] {
        refusals.add_if(
            !mappings.is_empty(),
            &format!("{field}.{name}"),
            "id-mapped mounts are not supported yet",
        );
    }
    refusals.add_if(
        mount.recursive_read_only && !mount.readonly,
        &format!("{field}.recursive_read_only"),
        "needs readonly",
    );
    refusals.add_if(
        mount.recursive_read_only && mount.propagation != v1::MountPropagation::PropagationPrivate as i32,
        &format!("{field}.recursive_read_only"),
        "needs private propagation",
    );
    refusals.list().len() == before
}

/// How later mounts travel. For which volumes that can be is known when it is known what they are.
fn propagation(mount: &v1::Mount, field: &str, refusals: &mut Refusals) -> Option<Propagation> {
    match v1::MountPropagation::try_from(mount.propagation) {
        Ok(v1::MountPropagation::PropagationPrivate) => Some(Propagation::Private),
        Ok(v1::MountPropagation::PropagationHostToContainer) => Some(Propagation::Slave),
        Ok(v1::MountPropagation::PropagationBidirectional) => Some(Propagation::Shared),
        Err(_) => {
            let reason = format!("unknown mode {}", mount.propagation);
            refusals.add(format!("{field}.propagation"), reason);
            None
        }
    }
}

/// The path without symbolic links, and what is there.
fn look(path: &Path) -> std::io::Result<(PathBuf, FileType)> {
    let path = path.canonicalize()?;
    let kind = path.symlink_metadata()?.file_type();
    Ok((path, kind))
}

/// A file that kubelet writes for every pod, and mounts writable though nobody reads it back: a copy is as good.
fn is_kept_by_nobody(container_path: &str) -> bool {
    WRITABLE_COPIES.iter().any(|path| same(path, container_path))
}

/// Whether two absolute paths are the same but for doubled or trailing slashes.
fn same(one: &str, other: &str) -> bool {
    Path::new(one).components().eq(Path::new(other).components())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(host: &Path, inside: &str, readonly: bool) -> v1::Mount {
        v1::Mount {
            host_path: host.to_str().unwrap().to_owned(),
            container_path: inside.to_owned(),
            readonly,
            ..Default::default()
        }
    }

    #[test]
    fn what_kubelet_always_passes_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let token = root.join("token");
        std::fs::create_dir(&token).unwrap();
        std::os::unix::fs::symlink("..1", token.join("..data")).unwrap();
        for name in ["hosts", "log"] {
            std::fs::write(root.join(name), "x").unwrap();
        }
        let list = [
            mount(&token, "/var/run/secrets/kubernetes.io/serviceaccount", true),
            mount(&root.join("hosts"), "/etc/hosts", false),
            mount(&root.join("log"), "/dev/termination-log", false),
        ];
        let mut refusals = Refusals::default();
        let got = mounts(&list, Some(&"/dev/termination-log".to_owned()), &mut refusals);
        refusals.settle(()).unwrap();
        assert_eq!((got.files.len(), got.volumes.len()), (1, 1));
        assert!(!got.files[0].readonly);
        assert_eq!(
            got.termination,
            Some((root.join("log"), "/dev/termination-log".into()))
        );
        assert_eq!(got.records.len(), 3);
    }

    #[test]
    fn a_symbolic_link_on_the_host_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        std::fs::write(root.join("real"), "x").unwrap();
        std::os::unix::fs::symlink("real", root.join("link")).unwrap();
        let mut refusals = Refusals::default();
        let got = mounts(&[mount(&root.join("link"), "/f", true)], None, &mut refusals);
        assert_eq!(got.volumes[0].host_path, root.join("link"));
        let got = mounts(
            &[mount(&root.join("link"), "/etc/hosts", false)],
            None,
            &mut refusals,
        );
        assert_eq!(got.files[0].host_path, root.join("real"));
    }

    #[test]
    fn what_nobody_keeps_up_to_date_is_a_volume_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let mut slave = mount(dir.path(), "/slave", true);
        slave.propagation = v1::MountPropagation::PropagationHostToContainer.into();
        let list = [mount(dir.path(), "/data", false), mount(&file, "/f", true), slave];
        let mut refusals = Refusals::default();
        let got = mounts(&list, None, &mut refusals);
        refusals.settle(()).unwrap();
        assert!(got.files.is_empty());
        let modes: Vec<_> = got.volumes.iter().map(|v| (v.readonly, v.propagation)).collect();
        assert_eq!(
            modes,
            [
                (false, Propagation::Private),
                (true, Propagation::Private),
                (true, Propagation::Slave)
            ]
        );
    }

    #[test]
    fn every_other_mount_is_refused_with_its_reason() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let plain = mount(&file, "/f", true);
        let cases = [
            (
                mount(&dir.path().join("gone"), "/g", true),
                "config.mounts[0].host_path: cannot use",
            ),
            (mount(&file, "relative", true), "config.mounts[0].container_path"),
            (mount(&file, "/a/../b", true), "config.mounts[0].container_path"),
            (
                v1::Mount {
                    host_path: String::new(),
                    ..plain.clone()
                },
                "config.mounts[0].host_path: is missing",
            ),
            (
                v1::Mount {
                    propagation: 3,
                    ..plain.clone()
                },
                "config.mounts[0].propagation: unknown mode 3",
            ),
            (
                v1::Mount {
                    uid_mappings: vec![v1::IdMapping::default()],
                    ..plain.clone()
                },
                "config.mounts[0].uid_mappings",
            ),
            (
                v1::Mount {
                    recursive_read_only: true,
                    readonly: false,
                    ..plain
                },
                "config.mounts[0].recursive_read_only: needs readonly",
            ),
        ];
        for (mount, words) in cases {
            let mut refusals = Refusals::default();
            mounts(&[mount], None, &mut refusals);
            assert!(refusals.to_string().contains(words), "{refusals}");
        }
    }
}
