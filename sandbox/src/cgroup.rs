//! The pod's leaf in the host's cgroup v2 tree: where VMM and helpers are accounted, and what memory the VM may have.
//!
//! On a host with cgroup v1 (or the hybrid layout) nothing is enforced but CPUs and memory nodes, where somebody asks for them (`cpuset.rs`);
//! that is said once. Must not know limits of containers: those live in the guest.

use std::{
    fs,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use crate::{SandboxError, journal::absent_is_fine};

const ROOT: &str = "/sys/fs/cgroup";

/// Of the cpuset hierarchy of cgroup v1.
const LEGACY_CPUSET: &str = "/sys/fs/cgroup/cpuset";

/// How long an emptied cgroup may refuse to go away.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

/// The host's tree, or that there is none.
#[derive(Debug, Clone)]
pub(crate) struct Cgroups {
    root: Option<PathBuf>,
    /// Where there is no `root`.
    legacy_cpuset: Option<PathBuf>,
}

/// Where the CPUs of a pod's VM are set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// In its leaf of the unified hierarchy.
    Unified {
        /// Top of the hierarchy.
        root: PathBuf,
        /// The pod's own group.
        leaf: PathBuf,
    },
    /// In a leaf of the v1 hierarchy that need not be there.
    Legacy(PathBuf),
    /// Nobody has made a group for the pod, or the host has no such hierarchy.
    Nowhere,
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
        let legacy = PathBuf::from(LEGACY_CPUSET);
        let legacy_cpuset = (root.is_none() && legacy.join("cpuset.cpus").exists()).then_some(legacy);
        Self { root, legacy_cpuset }
    }

    /// Where the CPUs of a pod are set. `leaf` is what [`Self::leaf`] has answered when the pod was made.
    pub(crate) fn place(
        &self,
        leaf: Option<&Path>,
        parent: Option<&str>,
        id: &str,
    ) -> Result<Place, SandboxError> {
        Ok(match (leaf, &self.root, &self.legacy_cpuset) {
            (Some(leaf), Some(root), _) => Place::Unified {
                root: root.clone(),
                leaf: leaf.to_owned(),
            },
            (_, None, Some(root)) => {
                let parent = relative(parent.unwrap_or_default())?;
                Place::Legacy(root.join(parent).join(format!("caisson-{id}")))
            }
            _ => Place::Nowhere,
        })
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

/// Makes a controller available in `leaf`, from the top down. Blocking.
pub(crate) fn enable(root: &Path, leaf: &Path, controller: &str) -> Result<(), SandboxError> {
    let above: Vec<_> = leaf
        .ancestors()
        .skip(1)
        .take_while(|dir| dir.starts_with(root))
        .collect();
    for dir in above.into_iter().rev() {
        let file = dir.join("cgroup.subtree_control");
        let what = || format!("enable {controller} below {}", dir.display());
        let enabled = fs::read_to_string(&file).map_err(SandboxError::io(what()))?;
        if !enabled.split_whitespace().any(|name| name == controller) {
            fs::write(&file, format!("+{controller}")).map_err(SandboxError::io(what()))?;
        }
    }
    Ok(())
}

/// Removes a leaf of a v1 hierarchy once its processes are gone; absent is fine.
pub(crate) async fn remove_legacy(leaf: &Path) -> Result<(), SandboxError> {
    remove_empty(leaf, || format!("remove cgroup {}", leaf.display())).await
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
    remove_empty(leaf, what).await
}

async fn remove_empty(leaf: &Path, what: impl Fn() -> String) -> Result<(), SandboxError> {
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
            legacy_cpuset: None,
            root: Some(dir.path().to_owned()),
        };
        let leaf = groups.leaf(Some("/a/b"), "x").unwrap().unwrap();
        assert_eq!(leaf, parent.join("caisson-x"));
        assert_eq!(groups.memory_max(&leaf), Some(1000));
        fs::write(parent.join("memory.max"), "10\n").unwrap();
        assert_eq!(groups.memory_max(&leaf), Some(10));
        let nowhere = Cgroups {
            root: None,
            legacy_cpuset: None,
        };
        assert_eq!(nowhere.leaf(Some("/a"), "x").unwrap(), None);
        assert_eq!(nowhere.place(None, Some("/a"), "x").unwrap(), Place::Nowhere);
    }

    #[test]
    fn cpus_are_set_in_the_leaf_or_in_the_older_hierarchy() {
        let groups = |root: Option<&str>, legacy: Option<&str>| Cgroups {
            root: root.map(PathBuf::from),
            legacy_cpuset: legacy.map(PathBuf::from),
        };
        let leaf = Path::new("/c/a/caisson-x");
        assert_eq!(
            groups(Some("/c"), None)
                .place(Some(leaf), Some("/a"), "x")
                .unwrap(),
            Place::Unified {
                root: "/c".into(),
                leaf: leaf.into()
            }
        );
        assert_eq!(
            groups(Some("/c"), None).place(None, None, "x").unwrap(),
            Place::Nowhere
        );
        assert_eq!(
            groups(None, Some("/s")).place(None, Some("/a"), "x").unwrap(),
            Place::Legacy("/s/a/caisson-x".into())
        );
    }
}
