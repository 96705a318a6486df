//! What a pod is charged on the host: the counters of the group that kubelet made for it, in which its VM lives. They hold everything: the
//! containers, the guest's kernel and agent, VMM and helpers. What the guest says of its containers is a part of it.

use std::{fs, path::Path};

use crate::guest::{CgroupStats, Pressure, PressureLine};

/// The counters of the group around a pod's `leaf`, which has no controllers itself; `None` when they cannot be read. Processes are left
/// out: those of the host are not the pod's. Blocking.
pub(crate) fn read(leaf: &Path, timestamp_nanos: u64) -> Option<CgroupStats> {
    let group = leaf.parent()?;
    let file = |name: &str| fs::read_to_string(group.join(name)).unwrap_or_default();
    let cpu = fs::read_to_string(group.join("cpu.stat")).ok()?;
    let memory = file("memory.stat");
    Some(CgroupStats {
        timestamp_nanos,
        usage_usec: of(&cpu, "usage_usec"),
        user_usec: of(&cpu, "user_usec"),
        system_usec: of(&cpu, "system_usec"),
        memory_current: number(&file("memory.current"))?,
        memory_max: number(&file("memory.max")),
        memory_peak: number(&file("memory.peak")),
        // The memory of the VM is shared with its helpers.
        anon: of(&memory, "anon").saturating_add(of(&memory, "shmem")),
        file: of(&memory, "file"),
        kernel: of(&memory, "kernel"),
        file_mapped: of(&memory, "file_mapped"),
        inactive_file: of(&memory, "inactive_file"),
        active_file: of(&memory, "active_file"),
        pgfault: of(&memory, "pgfault"),
        pgmajfault: of(&memory, "pgmajfault"),
        swap_current: number(&file("memory.swap.current")),
        swap_max: number(&file("memory.swap.max")),
        cpu_pressure: pressure(&file("cpu.pressure")),
        memory_pressure: pressure(&file("memory.pressure")),
        io_pressure: pressure(&file("io.pressure")),
        ..CgroupStats::default()
    })
}

/// `text` with one number; `max` is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// The number behind a name, one pair a line.
fn of(text: &str, name: &str) -> u64 {
    text.lines()
        .find_map(|line| number(line.strip_prefix(name)?.strip_prefix(' ')?))
        .unwrap_or(0)
}

/// As Documentation/accounting/psi.rst has it; none on a kernel without.
fn pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut line = PressureLine::default();
        for (name, value) in words.split_whitespace().filter_map(|word| word.split_once('=')) {
            match name {
                "avg10" => line.avg10 = value.parse().unwrap_or(0.0),
                "avg60" => line.avg60 = value.parse().unwrap_or(0.0),
                "avg300" => line.avg300 = value.parse().unwrap_or(0.0),
                "total" => line.total = value.parse().unwrap_or(0),
                _ => {}
            }
        }
        Some(line)
    };
    Some(Pressure {
        some: Some(line("some ")?),
        full: line("full "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_around_the_leaf_is_what_counts() {
        let dir = tempfile::tempdir().unwrap();
        let leaf = dir.path().join("caisson-x");
        assert_eq!(read(&leaf, 1), None, "a host without such files");
        for (file, text) in [
            ("cpu.stat", "usage_usec 70\nuser_usec 40\nsystem_usec 30\n"),
            ("memory.current", "9000\n"),
            ("memory.max", "max\n"),
            (
                "memory.stat",
                "anon 100\nfile 5\nshmem 4000\nshmem_x 9\ninactive_file 3\npgfault 8\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.00 avg300=0.00 total=12\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=3\n",
            ),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let stats = read(&leaf, 1).unwrap();
        assert_eq!(
            (stats.usage_usec, stats.memory_current, stats.memory_max),
            (70, 9000, None)
        );
        assert_eq!((stats.anon, stats.inactive_file, stats.pgfault), (4100, 3, 8));
        let some = stats.cpu_pressure.unwrap().some.unwrap();
        assert_eq!((some.total, some.avg10), (12, 1.5));
        assert_eq!(stats.memory_pressure, None);
    }
}
