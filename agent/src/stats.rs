//! `Stats`: what containers use, from the guest's cgroup v2 files, their writable layers and the network interfaces.
//!
//! Reads only. Values are the kernel's; what they mean to Kubernetes is the daemon's business. A file that is not there (the controller is
//! not compiled in, or the container is just being removed) counts as zero or is left out, never as an error.

use std::{collections::HashSet, fs, path::Path, sync::Arc, time::Duration};

use caisson_agent_api::v1;

use crate::{
    cgroup::{Cgroup, event},
    clock, create,
    error::AgentError,
    guest::{Container, Guest, Sandbox},
    service::blocking,
};

/// How long a call waits for writable layers to be measured; what takes longer is there at a later call.
const LAYER_BOUND: Duration = Duration::from_secs(2);

/// A layer that took this long to measure is not measured again before this many times as long has passed.
const LAYER_REST: u32 = 20;

/// Most directory entries that are looked at: more than the largest writable disk has, and an end for whoever moves directories about.
const MAX_ENTRIES: u64 = 1 << 24;

/// Most files with several names that are told apart; more are counted by each name.
const MAX_SHARED: usize = 1 << 17;

/// Answers the call.
pub(crate) async fn stats(
    guest: Arc<Guest>,
    request: v1::StatsRequest,
) -> Result<v1::StatsReply, AgentError> {
    let mut containers: Vec<_> = guest
        .containers()
        .into_iter()
        .filter(|container| request.container_ids.is_empty() || request.container_ids.contains(&container.id))
        .collect();
    containers.sort_by(|one, other| one.id.cmp(&other.id));
    for container in &containers {
        remeasure(container);
    }
    let names = interface_names(&guest);
    let measured = async {
        for container in &containers {
            container.layer.settled().await;
        }
    };
    // Late ones are answered as they were, if they ever were.
    let _all_in_time = tokio::time::timeout(LAYER_BOUND, measured).await;
    blocking(move || {
        Ok(v1::StatsReply {
            pod: Some(read(&Cgroup::pod())),
            containers: containers.iter().map(|container| of(container)).collect(),
            interfaces: interfaces(&fs::read_to_string("/proc/net/dev").unwrap_or_default(), &names),
        })
    })
    .await
}

fn of(container: &Container) -> v1::ContainerStats {
    v1::ContainerStats {
        container_id: container.id.clone(),
        cgroup: Some(read(&container.cgroup)),
        layer: container.layer.latest(),
        started_at_nanos: container
            .started()
            .map_or(0, |started| started.reply.started_at_nanos),
    }
}

/// Begins to measure a container's layer, unless that is under way or has just cost much.
fn remeasure(container: &Arc<Container>) {
    if !container.layer.begin() {
        return;
    }
    let container = Arc::clone(container);
    tokio::task::spawn_blocking(move || {
        let began = clock::boot_nanos();
        let layer = create::scratch(&container.id);
        let mut sum = v1::LayerStats {
            timestamp_nanos: clock::real_nanos(),
            ..v1::LayerStats::default()
        };
        for part in ["upper", "volumes"] {
            measure(&layer.join(part), &mut sum);
        }
        let took = Duration::from_nanos(clock::boot_nanos().saturating_sub(began));
        container.layer.end(sum, took);
    });
}

/// Blocks and inodes below a directory, itself left out; a file with several names counts once. What vanishes meanwhile counts as
/// nothing, and links are not followed.
fn measure(directory: &Path, sum: &mut v1::LayerStats) {
    use std::os::unix::fs::MetadataExt;
    let mut pending = vec![directory.to_owned()];
    let mut seen = HashSet::new();
    let mut entries = 0;
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            entries += 1;
            if entries > MAX_ENTRIES {
                return;
            }
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() {
                pending.push(entry.path());
            } else if metadata.nlink() > 1 && seen.len() < MAX_SHARED && !seen.insert(metadata.ino()) {
                continue;
            }
            sum.bytes = sum.bytes.saturating_add(metadata.blocks().saturating_mul(512));
            sum.inodes = sum.inodes.saturating_add(1);
        }
    }
}

/// What is known of a container's writable layer.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    state: tokio::sync::watch::Sender<LayerState>,
}

#[derive(Debug, Default)]
struct LayerState {
    latest: Option<v1::LayerStats>,
    measuring: bool,
    /// CLOCK_BOOTTIME before which it is not measured again.
    rests_until: u64,
}

impl Layer {
    /// True when the caller shall measure now.
    fn begin(&self) -> bool {
        self.state.send_if_modified(|state| {
            let now = !state.measuring && clock::boot_nanos() >= state.rests_until;
            state.measuring |= now;
            now
        })
    }

    fn end(&self, measured: v1::LayerStats, took: Duration) {
        let rest = u64::try_from((took * LAYER_REST).as_nanos()).unwrap_or(u64::MAX);
        self.state.send_modify(|state| {
            state.latest = Some(measured);
            state.measuring = false;
            state.rests_until = clock::boot_nanos().saturating_add(rest);
        });
    }

    async fn settled(&self) {
        let mut state = self.state.subscribe();
        // The sender is `self`, so the channel cannot close meanwhile.
        let _settled = state.wait_for(|state| !state.measuring).await.is_ok();
    }

    fn latest(&self) -> Option<v1::LayerStats> {
        self.state.borrow().latest
    }
}

fn read(cgroup: &Cgroup) -> v1::CgroupStats {
    let file = |name: &str| cgroup.read(name).unwrap_or_default();
    let timestamp_nanos = clock::real_nanos();
    let (cpu, memory, events) = (file("cpu.stat"), file("memory.stat"), file("memory.events"));
    let io = io(&file("io.stat"));
    v1::CgroupStats {
        timestamp_nanos,
        usage_usec: event(&cpu, "usage_usec"),
        user_usec: event(&cpu, "user_usec"),
        system_usec: event(&cpu, "system_usec"),
        nr_periods: event(&cpu, "nr_periods"),
        nr_throttled: event(&cpu, "nr_throttled"),
        throttled_usec: event(&cpu, "throttled_usec"),
        memory_current: number(&file("memory.current")).unwrap_or(0),
        memory_max: number(&file("memory.max")),
        memory_peak: number(&file("memory.peak")),
        anon: event(&memory, "anon"),
        file: event(&memory, "file"),
        kernel: event(&memory, "kernel"),
        file_mapped: event(&memory, "file_mapped"),
        inactive_file: event(&memory, "inactive_file"),
        active_file: event(&memory, "active_file"),
        pgfault: event(&memory, "pgfault"),
        pgmajfault: event(&memory, "pgmajfault"),
        memory_limit_hits: event(&events, "max"),
        oom_kills: event(&events, "oom_kill"),
        swap_current: number(&file("memory.swap.current")),
        swap_max: number(&file("memory.swap.max")),
        tasks: number(&file("pids.current")).unwrap_or(0),
        tasks_max: number(&file("pids.max")),
        processes: cgroup.processes().map_or(0, |all| all.len() as u64),
        io_read_bytes: io.read_bytes,
        io_write_bytes: io.write_bytes,
        io_reads: io.reads,
        io_writes: io.writes,
        cpu_pressure: pressure(&file("cpu.pressure")),
        memory_pressure: pressure(&file("memory.pressure")),
        io_pressure: pressure(&file("io.pressure")),
    }
}

/// A file with one number; `max` is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[derive(Debug, Default, PartialEq)]
struct Io {
    read_bytes: u64,
    write_bytes: u64,
    reads: u64,
    writes: u64,
}

/// The sum of io.stat's lines, each `major:minor key=value ...`.
fn io(text: &str) -> Io {
    let mut sum = Io::default();
    for (key, value) in text.split_whitespace().filter_map(|word| word.split_once('=')) {
        let place = match key {
            "rbytes" => &mut sum.read_bytes,
            "wbytes" => &mut sum.write_bytes,
            "rios" => &mut sum.reads,
            "wios" => &mut sum.writes,
            _ => continue,
        };
        *place = place.saturating_add(value.parse().unwrap_or(0));
    }
    sum
}

/// Pressure stall information as Documentation/accounting/psi.rst has it; none on a kernel without.
fn pressure(text: &str) -> Option<v1::Pressure> {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let word = |name: &str| {
            words
                .split_whitespace()
                .find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
        };
        let average = |name: &str| word(name).and_then(|value| value.parse().ok()).unwrap_or(0.0);
        Some(v1::PressureLine {
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
            total: word("total").and_then(|value| value.parse().ok()).unwrap_or(0),
        })
    };
    Some(v1::Pressure {
        some: Some(line("some ")?),
        full: line("full "),
    })
}

/// The pod's interfaces, in the order it was given them. The kernel has others of its own (bond0, tunl0), which carry nothing.
fn interface_names(guest: &Guest) -> Vec<String> {
    match &*guest.sandbox() {
        Sandbox::Configured(configured) => {
            let interfaces = configured.request.interfaces.iter();
            interfaces.map(|interface| interface.name.clone()).collect()
        }
        Sandbox::Blank | Sandbox::Configuring => Vec::new(),
    }
}

/// The counters of these interfaces in /proc/net/dev.
fn interfaces(text: &str, names: &[String]) -> Vec<v1::InterfaceStats> {
    let mut all: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter_map(|(name, counters)| {
            let name = name.trim();
            let counters: Vec<u64> = counters
                .split_whitespace()
                .filter_map(|counter| counter.parse().ok())
                .collect();
            let at = |column: usize| counters.get(column).copied();
            (names.iter().any(|known| known == name) && counters.len() >= 12).then(|| {
                Some(v1::InterfaceStats {
                    name: name.to_owned(),
                    rx_bytes: at(0)?,
                    rx_packets: at(1)?,
                    rx_errors: at(2)?,
                    rx_dropped: at(3)?,
                    tx_bytes: at(8)?,
                    tx_packets: at(9)?,
                    tx_errors: at(10)?,
                    tx_dropped: at(11)?,
                })
            })?
        })
        .collect();
    all.sort_by_key(|interface| names.iter().position(|name| *name == interface.name));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_pods_interfaces_are_read_and_in_its_order() {
        let text = "Inter-|   Receive |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes\n\
            \x20   lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  bond0: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n\
            \x20 net1: 5 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0\n  eth0:1000 10 1 2 0 0 0 0 2000 20 3 4 0 0 0 0\n";
        let all = interfaces(text, &["eth0".to_owned(), "net1".to_owned(), "absent".to_owned()]);
        assert_eq!(all.len(), 2);
        assert_eq!(all[1].rx_bytes, 5);
        let eth0 = &all[0];
        assert_eq!(
            (eth0.name.as_str(), eth0.rx_bytes, eth0.rx_errors),
            ("eth0", 1000, 1)
        );
        assert_eq!((eth0.tx_bytes, eth0.tx_errors, eth0.tx_dropped), (2000, 3, 4));
    }

    #[test]
    fn devices_are_summed() {
        let text = "254:0 rbytes=10 wbytes=1 rios=2 wios=1 dbytes=0 dios=0\n254:16 rbytes=5 wbytes=2 rios=1 wios=1\n";
        let sum = Io {
            read_bytes: 15,
            write_bytes: 3,
            reads: 3,
            writes: 2,
        };
        assert_eq!(io(text), sum);
        assert_eq!(io(""), Io::default());
    }

    #[test]
    fn pressure_is_read_with_and_without_full_and_absent_when_the_kernel_has_none() {
        let text = "some avg10=1.50 avg60=0.25 avg300=0.00 total=42\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";
        let both = pressure(text).unwrap();
        assert_eq!(both.some.unwrap().total, 42);
        assert!((both.some.unwrap().avg10 - 1.5).abs() < f64::EPSILON);
        assert_eq!(both.full.unwrap().total, 7);
        assert_eq!(pressure(text.lines().next().unwrap()).unwrap().full, None);
        assert_eq!(pressure(""), None);
    }

    #[test]
    fn limits_of_max_are_no_numbers() {
        assert_eq!(number("max\n"), None);
        assert_eq!(number("4096\n"), Some(4096));
    }

    #[test]
    fn a_layer_counts_blocks_and_inodes_and_a_file_with_two_names_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/file"), vec![b'x'; 8192]).unwrap();
        let mut one = v1::LayerStats::default();
        measure(dir.path(), &mut one);
        assert_eq!(one.inodes, 2);
        assert!(one.bytes >= 8192);
        fs::hard_link(dir.path().join("d/file"), dir.path().join("other")).unwrap();
        let mut two = v1::LayerStats::default();
        measure(dir.path(), &mut two);
        assert_eq!((two.bytes, two.inodes), (one.bytes, one.inodes));
        measure(&dir.path().join("absent"), &mut two);
    }

    #[test]
    fn a_layer_that_cost_much_rests() {
        let layer = Layer::default();
        assert!(layer.begin());
        assert!(!layer.begin(), "measured twice at a time");
        layer.end(v1::LayerStats::default(), Duration::from_secs(3600));
        assert!(!layer.begin());
        assert!(layer.latest().is_some());
    }
}
