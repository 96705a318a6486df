//! Where a pod's VM is accounted on a host with the unified cgroup hierarchy: below the group that kubelet made, whichever of kubelet's two
//! cgroup drivers named it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    host::Host,
    node::{Node, node},
    run, skipped,
};

const ROOT: &str = "/sys/fs/cgroup";
/// memory.max of the pods' groups.
const LIMIT_MIB: u64 = 400;

/// Groups as kubelet makes them: one for all pods, one for the pod. Removed when dropped, the inner one first.
struct Groups(Vec<PathBuf>);

impl Groups {
    fn make(paths: &[&str]) -> Result<Self> {
        let mut groups = Self(Vec::new());
        for path in paths {
            let group = Path::new(ROOT).join(path);
            let parent = group.parent().context("a group without a parent")?;
            fs::write(parent.join("cgroup.subtree_control"), "+memory +pids +cpu")?;
            fs::create_dir(&group)?;
            groups.0.insert(0, group);
        }
        let pod = groups.0.first().context("no group")?;
        fs::write(pod.join("memory.max"), (LIMIT_MIB << 20).to_string())?;
        Ok(groups)
    }

    /// The pod's own.
    fn pod(&self) -> &Path {
        self.0.first().map_or(Path::new(ROOT), PathBuf::as_path)
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        // A test that fails leaves a VM in there, and the killed are members until they are gone.
        let _killed_or_empty = self
            .0
            .iter()
            .try_for_each(|group| fs::write(group.join("cgroup.kill"), "1"));
        let until = Instant::now() + Duration::from_secs(10);
        for group in &self.0 {
            for leaf in children(group).unwrap_or_default() {
                remove(&leaf, until);
            }
            remove(group, until);
        }
    }
}

/// Removes a group as soon as it has no members.
fn remove(group: &Path, until: Instant) {
    while fs::remove_dir(group).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy)
        && Instant::now() < until
    {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn children(group: &Path) -> Result<Vec<PathBuf>> {
    Ok(fs::read_dir(group)?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect())
}

#[test]
fn a_vm_lives_in_a_leaf_of_the_pods_cgroup_fits_its_limit_and_takes_the_leaf_along() -> Result<()> {
    let controllers = fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).unwrap_or_default();
    if !controllers.split_whitespace().any(|name| name == "memory") {
        skipped("this host has no unified cgroup hierarchy with a memory controller; see `make e2e-node`");
        return Ok(());
    }
    let host = Host::enter()?;
    run(async {
        let mut node = node(&host).await?;
        let all = format!("caisson-e2e-{}", std::process::id());
        check(
            &host,
            &mut node,
            &format!("/{all}/pod1"),
            &[&all, &format!("{all}/pod1")],
        )
        .await?;
        // As systemd nests slices: by the dashes of their names.
        let all = format!("caissone2e{}", std::process::id());
        let pod = format!("{all}-pod1.slice");
        check(
            &host,
            &mut node,
            &pod,
            &[&format!("{all}.slice"), &format!("{all}.slice/{pod}")],
        )
        .await
    })
}

async fn check(host: &Host, node: &mut Node, parent: &str, groups: &[&str]) -> Result<()> {
    let groups = Groups::make(groups)?;
    let before = host.leftovers()?;
    let mut config = pod(host, "accounted");
    config.linux.get_or_insert_default().cgroup_parent = parent.into();
    let pod_id = node.cri.run_pod(&config).await?;

    let leaves = children(groups.pod())?;
    ensure!(
        leaves.len() == 1,
        "{} has the groups {leaves:?}",
        groups.pod().display()
    );
    let leaf = leaves.first().context("no leaf")?;
    let members = fs::read_to_string(leaf.join("cgroup.procs"))?;
    let processes = host.leftovers()?.processes;
    ensure!(!processes.is_empty(), "the pod has no process");
    for process in &processes {
        let pid = process.split(' ').next().unwrap_or_default();
        ensure!(
            members.lines().any(|member| member == pid),
            "{process} is outside of {}: {members}",
            leaf.display()
        );
    }
    // The leaf has no controllers of its own: what counts is what its pod is charged.
    let charged: u64 = fs::read_to_string(groups.pod().join("memory.current"))?
        .trim()
        .parse()?;
    ensure!(
        charged > 8 << 20,
        "for a VM that has booted the pod is charged {charged} bytes"
    );

    let id = node
        .cri
        .run(
            &pod_id,
            &container("main", &node.image, &["sleep", "1000"]),
            &config,
        )
        .await?;
    let (_, meminfo, _) = node.cri.exec(&id, &["cat", "/proc/meminfo"]).await?;
    let total_kib: u64 = meminfo
        .split_whitespace()
        .nth(1)
        .with_context(|| format!("no MemTotal in {meminfo}"))?
        .parse()?;
    ensure!(
        total_kib < LIMIT_MIB << 10,
        "the guest believes in {total_kib} KiB, and the pod may have {LIMIT_MIB} MiB"
    );

    node.cri.stop_pod(&pod_id).await?;
    node.cri.remove_pod(&pod_id).await?;
    ensure!(groups.pod().exists(), "kubelet's group is gone");
    let left = children(groups.pod())?;
    ensure!(left.is_empty(), "groups left behind: {left:?}");
    host.leftovers()?.nothing_new_since(&before)
}
