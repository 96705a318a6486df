//! The pod's leaf in the host's cgroup v2 tree: where VMM and helpers are accounted, and what memory the VM may have.
//!
//! On a host with cgroup v1 (or the hybrid layout) nothing is enforced; that is said once. Must not know limits of containers: those
//! live in the guest.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use crate::{SandboxError, journal::absent_is_fine};

const ROOT: &str = "/sys/fs/cgroup";

/// How long an emptied cgroup may refuse to go away.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

/// The host's tree, or that there is none.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    root: Option<PathBuf>,
}

impl Cgroups {
    /// Looks for cgroup v2 with controllers, and warns when there is none.
    pub(crate) fn detect() -> Self {
        let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
        let root = controllers
            .split_whitespace()
            .any(|name| name == "memory")
            .then(|| PathBuf::from(ROOT));
        if root.is_none() {
            tracing::warn!(
                "no cgroup v2 with a memory controller at {ROOT}: limits of pods are not enforced on their VMs"
            );
        }
        Self { root }
    }

    /// The leaf of a pod below the group that kubelet made; `None` when nothing is enforced here.
    pub(crate) fn leaf(&self, parent: Option<&str>, id: &str) -> Result<Option<PathBuf>, SandboxError> {
        let (Some(root), Some(parent)) = (&self.root, parent.filter(|parent| !parent.is_empty())) else {
            return Ok(None);
        };
        Ok(Some(root.join(relative(parent)?).join(format!("caisson-{id}"))))
    }

    /// Lowest `memory.max` from the leaf's parent to the root, bytes. Blocking.
    pub(crate) fn memory_max(&self, leaf: &Path) -> Option<u64> {
        let root = self.root.as_deref()?;
        leaf.ancestors()
            .skip(1)
            .take_while(|dir| *dir != root)
            .filter_map(|dir| {
                fs::read_to_string(dir.join("memory.max"))
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            })
            .min()
    }
}

/// A cgroup path as the CRI has it: `/kubepods/pod1` (cgroupfs) or `kubepods-pod1.slice` (systemd), as a path below the root.
fn relative(parent: &str) -> Result<PathBuf, SandboxError> {
    let invalid = |reason: &str| SandboxError::Invalid {
        what: format!("cgroup_parent {parent:?}"),
        reason: reason.into(),
    };
    if let Some(stem) = parent.strip_suffix(".slice").filter(|stem| !stem.contains('/')) {
        if stem.split('-').any(str::is_empty) {
            return Err(invalid("not the name of a slice"));
        }
        let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
        return Ok(ends
            .filter_map(|end| stem.get(..end))
            .map(|part| format!("{part}.slice"))
            .collect());
    }
    let path = Path::new(parent.trim_start_matches('/'));
    if path.components().all(|part| matches!(part, Component::Normal(_))) {
        Ok(path.to_owned())
    } else {
        Err(invalid("not a plain path"))
    }
}

/// Makes the leaf. Blocking.
pub(crate) fn make(leaf: &Path) -> Result<(), SandboxError> {
    fs::create_dir_all(leaf).map_err(SandboxError::io(format!("make cgroup {}", leaf.display())))
}

/// Kills what is left in the leaf and removes it; absent is fine.
pub(crate) async fn remove(leaf: &Path) -> Result<(), SandboxError> {
    let what = || format!("remove cgroup {}", leaf.display());
    absent_is_fine(tokio::fs::write(leaf.join("cgroup.kill"), "1").await)
        .map_err(SandboxError::io(what()))?;
    let gone = async {
        loop {
            match absent_is_fine(tokio::fs::remove_dir(leaf).await) {
                // Dying processes still count as members; the kernel offers inotify for it, which a few milliseconds don't pay for.
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                other => return other.map_err(SandboxError::io(what())),
            }
        }
    };
    tokio::time::timeout(REMOVE_DEADLINE, gone)
        .await
        .unwrap_or_else(|_| {
            Err(SandboxError::Deadline {
                what: what(),
                limit: REMOVE_DEADLINE,
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_of_both_cgroup_drivers_are_understood() {
        assert_eq!(
            relative("/kubepods/burstable/pod1").unwrap(),
            Path::new("kubepods/burstable/pod1")
        );
        assert_eq!(
            relative("kubepods-burstable-pod1.slice").unwrap(),
            Path::new("kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice")
        );
        assert!(relative("/kubepods/../../etc").is_err());
        assert!(relative("-.slice").is_err());
    }

    #[test]
    fn the_lowest_memory_max_on_the_way_up_counts() {
        let dir = tempfile::tempdir().unwrap();
        let parent = dir.path().join("a/b");
        fs::create_dir_all(&parent).unwrap();
        fs::write(dir.path().join("a/memory.max"), "1000\n").unwrap();
        fs::write(parent.join("memory.max"), "max\n").unwrap();
        let groups = Cgroups {
            root: Some(dir.path().to_owned()),
        };
        let leaf = groups.leaf(Some("/a/b"), "x").unwrap().unwrap();
        assert_eq!(leaf, parent.join("caisson-x"));
        assert_eq!(groups.memory_max(&leaf), Some(1000));
        fs::write(parent.join("memory.max"), "10\n").unwrap();
        assert_eq!(groups.memory_max(&leaf), Some(10));
        assert_eq!(Cgroups { root: None }.leaf(Some("/a"), "x").unwrap(), None);
    }
}
