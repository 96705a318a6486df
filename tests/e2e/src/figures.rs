//! What figures are made of: quantiles, CPU time of processes and of whole runtimes, and the machine's name.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};

use crate::host::text;

/// Milliseconds.
#[must_use]
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Nearest-rank quantile.
#[must_use]
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "small counts"
    )]
    let rank = ((sorted.len() as f64 * q).ceil() as usize).clamp(1, sorted.len().max(1));
    sorted.get(rank - 1).copied().unwrap_or_default()
}

/// CPU time of a process so far, all its threads.
#[must_use]
pub fn cpu_of(pid: &str) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let nanos = tasks.into_iter().flatten().flatten().filter_map(|task| {
        fs::read_to_string(task.path().join("schedstat"))
            .ok()?
            .split(' ')
            .next()?
            .parse::<u64>()
            .ok()
    });
    Duration::from_nanos(nanos.sum())
}

/// Processors, kernel and QEMU.
pub fn machine() -> Result<String> {
    let cpus = fs::read_to_string("/proc/cpuinfo")?;
    let model = cpus
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("unknown")
        .trim_matches([' ', '\t', ':']);
    let count = cpus.lines().filter(|line| line.starts_with("processor")).count();
    let kernel = text(Command::new("uname").arg("-r"))?;
    let qemu = text(Command::new("qemu-system-x86_64").arg("--version"))?;
    Ok(format!(
        "{count} x {model}, Linux {}, {}",
        kernel.trim(),
        qemu.lines().next().unwrap_or_default()
    ))
}

/// A cgroup that everything of a runtime is in: what its processes use, those that have ended by then too.
#[derive(Debug)]
pub struct Account {
    name: String,
    group: PathBuf,
}

impl Account {
    /// Makes the group and puts this process into it; what it starts from now on is in it too.
    pub fn of(pid: u32, name: &str) -> Result<Self> {
        let name = format!("caisson-bench-{}-{name}", std::process::id());
        let root = Path::new("/sys/fs/cgroup");
        let unified = root.join("cgroup.controllers").exists();
        let group = if unified {
            root.to_owned()
        } else {
            root.join("cpuacct")
        }
        .join(&name);
        fs::create_dir_all(&group).with_context(|| format!("cannot make {}", group.display()))?;
        let account = Self { name, group };
        fs::write(account.group.join("cgroup.procs"), pid.to_string())?;
        Ok(account)
    }

    /// As the CRI wants a cgroup parent for pods, so that their processes are in it as well.
    #[must_use]
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.name)
    }

    /// CPU time so far.
    pub fn spent(&self) -> Result<Duration> {
        if let Ok(nanos) = fs::read_to_string(self.group.join("cpuacct.usage")) {
            return Ok(Duration::from_nanos(nanos.trim().parse()?));
        }
        let stat = fs::read_to_string(self.group.join("cpu.stat"))?;
        let micros = stat.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(micros.context("no usage_usec")?.parse()?))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        remove_cgroups(&self.name);
    }
}

/// Removes cgroups of this name below the root of each hierarchy, as far as they are empty.
pub fn remove_cgroups(name: &str) {
    let root = Path::new("/sys/fs/cgroup");
    remove_groups(&root.join(name));
    for hierarchy in fs::read_dir(root).into_iter().flatten().flatten() {
        remove_groups(&hierarchy.path().join(name));
    }
}

fn remove_groups(group: &Path) {
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_groups(&entry.path());
        }
    }
    let _in_use = fs::remove_dir(group);
}
