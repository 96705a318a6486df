//! cgroup v2 of the guest: one cgroup for each container below `/sys/fs/cgroup/pod`, with its limits.

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use caisson_agent_api::v1::Resources;
use rustix::fs::{Mode, OFlags};

use crate::{
    console::complain,
    error::{AgentError, At, chain},
};

const ROOT: &str = "/sys/fs/cgroup";
const POD: &str = "/sys/fs/cgroup/pod";

/// Deepest nesting of cgroups inside a container.
const MAX_DEPTH: &str = "64";

/// Most cgroups inside a container.
const MAX_DESCENDANTS: &str = "16384";

/// How long a killed cgroup may take to become empty.
const EMPTY_BOUND: Duration = Duration::from_secs(20);

/// A container's cgroup.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of a container, whether it exists or not.
    pub(crate) fn of(id: &str) -> Self {
        Self {
            path: Path::new(POD).join(id),
        }
    }

    /// The cgroup above all containers.
    pub(crate) fn pod() -> Self {
        Self {
            path: PathBuf::from(POD),
        }
    }

    /// Content of one of its files; `None` when there is no such file.
    pub(crate) fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.path.join(file)).ok()
    }

    /// Moves the limits from `old` to `new`: only what differs is written, and when something is refused, what was written before it is put
    /// back.
    pub(crate) fn change(&self, old: &Resources, new: &Resources) -> Result<(), AgentError> {
        let mut done: Vec<(String, String)> = Vec::new();
        for (file, value) in changes(old, new)? {
            let before = self.read(&file);
            if let Err(error) = self.write(&file, &value) {
                for (file, before) in done.iter().rev() {
                    if let Err(left) = self.write(file, before) {
                        complain(&format!("taking back a limit: {}", chain(&left)));
                    }
                }
                return Err(error);
            }
            done.extend(before.map(|before| (file, before.trim().to_owned())));
        }
        Ok(())
    }

    /// Makes it, with `limits`.
    pub(crate) fn create(id: &str, limits: &Resources) -> Result<Self, AgentError> {
        let cgroup = Self::of(id);
        fs::create_dir_all(POD).at(|| format!("creating cgroup {POD}"))?;
        delegate(ROOT)?;
        delegate(POD)?;
        fs::create_dir_all(&cgroup.path).at(|| format!("creating cgroup {}", cgroup.path.display()))?;
        // A privileged container makes cgroups of its own; what is walked when they are removed stays small.
        cgroup.write("cgroup.max.depth", MAX_DEPTH)?;
        cgroup.write("cgroup.max.descendants", MAX_DESCENDANTS)?;
        for (file, value) in settings(limits)? {
            cgroup.write(&file, &value)?;
        }
        Ok(cgroup)
    }

    fn write(&self, file: &str, value: &str) -> Result<(), AgentError> {
        let written = fs::write(self.path.join(file), value);
        match written {
            // A kernel without swap has no such file, and "no swap" is what it does.
            Err(error)
                if file == "memory.swap.max" && value == "0" && error.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other.at(|| format!("writing {value} to cgroup file {file}")),
        }
    }

    /// For clone3 and for attaching programs.
    pub(crate) fn open(&self) -> Result<OwnedFd, AgentError> {
        open(&self.path)
    }

    /// Kills every process in it and below.
    pub(crate) fn kill(&self) -> Result<(), AgentError> {
        match fs::write(self.path.join("cgroup.kill"), "1") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other.at(|| format!("killing cgroup {}", self.path.display())),
        }
    }

    /// PIDs in it and below.
    pub(crate) fn processes(&self) -> Result<Vec<u32>, AgentError> {
        let mut all = Vec::new();
        collect(&self.path, &mut all).at(|| format!("listing cgroup {}", self.path.display()))?;
        Ok(all)
    }

    /// How often the kernel has killed here for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        event(&events, "oom_kill")
    }

    /// Kills what is left and removes it with everything below.
    pub(crate) fn remove(&self) -> Result<(), AgentError> {
        if !self.path.exists() {
            return Ok(());
        }
        self.kill()?;
        let deadline = Instant::now() + EMPTY_BOUND;
        loop {
            match remove_tree(&self.path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                    // Killed processes take a moment to go; cgroup v2 has no blocking wait for it.
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error).at(|| format!("removing cgroup {}", self.path.display())),
            }
        }
    }
}

fn open(path: &Path) -> Result<OwnedFd, AgentError> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .at(|| format!("opening cgroup {}", path.display()))
}

/// The cgroup in which a process is now: a privileged container may have moved its processes below its own cgroup.
pub(crate) fn of_process(pid: u32) -> Result<OwnedFd, AgentError> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).at(|| format!("reading {file}"))?;
    let path = unified(&text)
        .ok_or(rustix::io::Errno::NOENT)
        .at(|| format!("finding the unified cgroup in {file}"))?;
    open(&Path::new(ROOT).join(path.trim_start_matches('/')))
}

/// The path in the unified hierarchy.
fn unified(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::"))
}

/// Makes every controller of `path` available below it.
fn delegate(path: &str) -> Result<(), AgentError> {
    let available = fs::read_to_string(format!("{path}/cgroup.controllers"))
        .at(|| format!("reading {path}/cgroup.controllers"))?;
    for controller in available.split_whitespace() {
        // One by one: some cannot be enabled everywhere, and those that matter are missed when a limit is written.
        if fs::write(format!("{path}/cgroup.subtree_control"), format!("+{controller}")).is_err() {
            // See above.
        }
    }
    Ok(())
}

fn collect(path: &Path, all: &mut Vec<u32>) -> io::Result<()> {
    let listed = fs::read_to_string(path.join("cgroup.procs"))?;
    all.extend(listed.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect(&entry.path(), all)?;
        }
    }
    Ok(())
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)?.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

/// A counter of a flat keyed file.
pub(crate) fn event(text: &str, name: &str) -> u64 {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

/// What is to be written to move from `old` limits to `new` ones. Pure.
fn changes(old: &Resources, new: &Resources) -> Result<Vec<(String, String)>, AgentError> {
    let (old, new) = (settings(old)?, settings(new)?);
    let gone = old
        .iter()
        .filter(|(file, _)| !new.iter().any(|(kept, _)| kept == file))
        .filter_map(|(file, _)| Some((file.clone(), unlimited(file)?.to_owned())));
    let set = new.iter().filter(|setting| !old.contains(setting)).cloned();
    Ok(gone.chain(set).collect())
}

/// What a file of ours says without a limit; `None` for those that the request named itself.
fn unlimited(file: &str) -> Option<&'static str> {
    match file {
        "cpu.weight" => Some("100"),
        "cpu.max" | "memory.max" | "memory.swap.max" | "pids.max" => Some("max"),
        file if file.starts_with("hugetlb.") => Some("max"),
        _ => None,
    }
}

/// Which values go into which files. Pure.
pub(crate) fn settings(limits: &Resources) -> Result<Vec<(String, String)>, AgentError> {
    let mut all: Vec<(String, String)> = Vec::new();
    let mut set = |file: &str, value: String| all.push((file.to_owned(), value));
    if limits.cpu_shares > 0 {
        set("cpu.weight", weight(limits.cpu_shares).to_string());
    }
    if limits.cpu_quota_micros > 0 || limits.cpu_period_micros > 0 {
        let period = if limits.cpu_period_micros > 0 {
            limits.cpu_period_micros
        } else {
            100_000
        };
        let quota = if limits.cpu_quota_micros > 0 {
            limits.cpu_quota_micros.to_string()
        } else {
            "max".to_owned()
        };
        set("cpu.max", format!("{quota} {period}"));
    }
    if limits.memory_swap_limit_bytes > 0 {
        let swap = limits
            .memory_swap_limit_bytes
            .checked_sub(limits.memory_limit_bytes);
        let swap = swap.filter(|_| limits.memory_limit_bytes > 0).ok_or_else(|| {
            AgentError::invalid(
                "resources.memory_swap_limit_bytes",
                "is the sum of memory and swap: needs a memory limit no larger",
            )
        })?;
        set("memory.swap.max", swap.to_string());
    }
    if limits.memory_limit_bytes > 0 {
        set("memory.max", limits.memory_limit_bytes.to_string());
    }
    if limits.pids_limit > 0 {
        set("pids.max", limits.pids_limit.to_string());
    }
    let mut sizes: Vec<_> = limits.hugepage_limits.iter().collect();
    sizes.sort();
    for (size, limit) in sizes {
        check_file("resources.hugepage_limits", size)?;
        set(&format!("hugetlb.{size}.max"), limit.to_string());
    }
    let mut unified: Vec<_> = limits.unified.iter().collect();
    unified.sort();
    for (file, value) in unified {
        check_file("resources.unified", file)?;
        if file.starts_with("cgroup.") {
            return Err(AgentError::invalid(
                "resources.unified",
                format!("{file} belongs to the agent"),
            ));
        }
        set(file, value.clone());
    }
    Ok(all)
}

fn check_file(field: &'static str, name: &str) -> Result<(), AgentError> {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    if !name.is_empty() && name != "." && name != ".." && name.len() <= 64 && name.bytes().all(word) {
        return Ok(());
    }
    Err(AgentError::invalid(
        field,
        format!("{name:?} is not the name of a cgroup file"),
    ))
}

/// cpu.weight (1..10000) for cgroup v1 shares (2..262144), as Kubernetes maps them.
fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(limits: &Resources) -> Vec<(String, String)> {
        settings(limits).unwrap()
    }

    fn pair(file: &str, value: &str) -> (String, String) {
        (file.to_owned(), value.to_owned())
    }

    #[test]
    fn nothing_asked_nothing_written() {
        assert!(of(&Resources::default()).is_empty());
    }

    #[test]
    fn shares_become_weights() {
        assert_eq!(
            [0, 2, 1024, 262_144, u64::MAX].map(weight),
            [1, 1, 39, 10_000, 10_000]
        );
    }

    #[test]
    fn limits_become_files() {
        let limits = Resources {
            cpu_quota_micros: 50_000,
            cpu_period_micros: 100_000,
            cpu_shares: 512,
            memory_limit_bytes: 1 << 20,
            memory_swap_limit_bytes: 1 << 20,
            pids_limit: 7,
            hugepage_limits: [("2MB".to_owned(), 0)].into(),
            unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
        };
        assert_eq!(
            of(&limits),
            [
                pair("cpu.weight", "20"),
                pair("cpu.max", "50000 100000"),
                pair("memory.swap.max", "0"),
                pair("memory.max", "1048576"),
                pair("pids.max", "7"),
                pair("hugetlb.2MB.max", "0"),
                pair("memory.high", "1000"),
            ]
        );
    }

    #[test]
    fn only_what_differs_is_written_and_what_is_gone_is_lifted() {
        let old = Resources {
            cpu_quota_micros: 50_000,
            cpu_shares: 512,
            memory_limit_bytes: 1 << 20,
            unified: [("memory.high".to_owned(), "1000".to_owned())].into(),
            ..Resources::default()
        };
        let new = Resources {
            cpu_shares: 1024,
            cpu_quota_micros: 0,
            ..old.clone()
        };
        assert_eq!(
            changes(&old, &new).unwrap(),
            [pair("cpu.max", "max"), pair("cpu.weight", "39")]
        );
        assert!(changes(&old, &old).unwrap().is_empty());
    }

    #[test]
    fn a_period_without_quota_is_no_limit() {
        let limits = Resources {
            cpu_quota_micros: -1,
            cpu_period_micros: 50_000,
            ..Resources::default()
        };
        assert_eq!(of(&limits), [pair("cpu.max", "max 50000")]);
    }

    #[test]
    fn names_that_leave_the_cgroup_or_take_it_over_are_refused() {
        for name in ["../memory.max", "", "..", "a/b", "cgroup.procs"] {
            let limits = Resources {
                unified: [(name.to_owned(), "1".to_owned())].into(),
                ..Resources::default()
            };
            assert!(settings(&limits).is_err(), "{name:?}");
        }
    }

    #[test]
    fn swap_below_memory_is_refused() {
        let limits = Resources {
            memory_limit_bytes: 2,
            memory_swap_limit_bytes: 1,
            ..Resources::default()
        };
        assert!(settings(&limits).is_err());
    }

    #[test]
    fn kernel_files_are_read_by_name() {
        assert_eq!(
            event("low 0\noom 2\noom_kill 3\noom_group_kill 1\n", "oom_kill"),
            3
        );
        assert_eq!(event("", "oom_kill"), 0);
        assert_eq!(unified("4:memory:/x\n0::/pod/a\n"), Some("/pod/a"));
    }
}
