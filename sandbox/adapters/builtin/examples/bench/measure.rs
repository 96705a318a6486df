//! What processes cost, from the files of /proc and KVM's counters.

use std::{
    collections::BTreeMap,
    fs,
    ops::{Add, Sub},
    time::Duration,
};

/// CPU time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cost {
    pub(crate) cpu: Duration,
    /// Without the threads of vCPUs.
    pub(crate) own: Duration,
}

impl Add for Cost {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            cpu: self.cpu + other.cpu,
            own: self.own + other.own,
        }
    }
}

impl Sub for Cost {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(other.cpu),
            own: self.own.saturating_sub(other.own),
        }
    }
}

/// What all threads of a process have used.
pub(crate) fn cost(pid: u32) -> Cost {
    let mut cost = Cost::default();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
        let on_cpu = text
            .split_ascii_whitespace()
            .next()
            .and_then(|word| word.parse::<u64>().ok());
        let spent = Duration::from_nanos(on_cpu.unwrap_or(0));
        cost.cpu += spent;
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        // Ours, and QEMU's with debug-threads=on.
        if !name.starts_with("vcpu") && !name.contains("/KVM") {
            cost.own += spent;
        }
    }
    cost
}

/// Whether the process is there, and more than a zombie.
pub(crate) fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// What children that have ended and been waited for have used.
pub(crate) fn ended_children() -> Cost {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_ascii_whitespace()
        .collect();
    // cutime and cstime, fields 16 and 17 of proc(5), in ticks of 10 ms.
    let ticks: u64 = fields[13].parse::<u64>().unwrap() + fields[14].parse::<u64>().unwrap();
    let spent = Duration::from_millis(ticks * 10);
    Cost {
        cpu: spent,
        own: spent,
    }
}

/// KVM's counters of the VM of this process. Needs debugfs.
pub(crate) fn kvm_counters(pid: u32) -> BTreeMap<String, u64> {
    let mut counters = BTreeMap::new();
    let wanted = format!("{pid}-");
    for entry in fs::read_dir("/sys/kernel/debug/kvm")
        .into_iter()
        .flatten()
        .flatten()
    {
        if !entry.file_name().to_string_lossy().starts_with(&wanted) {
            continue;
        }
        for file in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            let value = fs::read_to_string(file.path())
                .ok()
                .and_then(|text| text.trim().parse().ok());
            if let Some(value) = value {
                counters.insert(file.file_name().to_string_lossy().into_owned(), value);
            }
        }
    }
    counters
}

/// KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Without the guest's.
    pub(crate) pss: u64,
    pub(crate) private_dirty: u64,
    pub(crate) guest_rss: u64,
    pub(crate) all_pss: u64,
    pub(crate) threads: u64,
}

#[derive(Default)]
struct Mapping {
    start: u64,
    end: u64,
    values: BTreeMap<String, u64>,
}

/// Of a process, parted by what is the guest's memory: neighbouring mappings that are as large as it together. Nothing if
/// there are none.
pub(crate) fn memory(pid: u32, guest_mib: u64) -> Option<Memory> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/smaps"))
        .unwrap_or_default()
        .lines()
    {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            [range, rights, ..] if rights.len() == 4 && range.contains('-') => {
                let (start, end) = range.split_once('-').unwrap();
                mappings.push(Mapping {
                    start: u64::from_str_radix(start, 16).unwrap(),
                    end: u64::from_str_radix(end, 16).unwrap(),
                    values: BTreeMap::new(),
                });
            }
            [what, kib, "kB"] => {
                let mapping = mappings.last_mut().unwrap();
                mapping.values.insert((*what).to_owned(), kib.parse().unwrap());
            }
            _ => {}
        }
    }
    let guest = guest_of(&mappings, guest_mib << 20)?;
    let sum = |inside: Option<bool>, what: &str| -> u64 {
        let chosen = mappings
            .iter()
            .enumerate()
            .filter(|(at, _)| inside.is_none_or(|inside| guest.contains(at) == inside));
        chosen.filter_map(|(_, mapping)| mapping.values.get(what)).sum()
    };
    Some(Memory {
        pss: sum(Some(false), "Pss:"),
        private_dirty: sum(Some(false), "Private_Dirty:"),
        guest_rss: sum(Some(true), "Rss:"),
        all_pss: sum(None, "Pss:"),
        threads: fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |tasks| tasks.count() as u64),
    })
}

/// Of all neighbours that are as large together, those that hold the most: reserved space of a C library's allocator may be as large as a guest.
fn guest_of(mappings: &[Mapping], bytes: u64) -> Option<std::ops::Range<usize>> {
    let resident = |range: &std::ops::Range<usize>| -> u64 {
        let inside = mappings.get(range.clone()).unwrap_or_default();
        inside
            .iter()
            .filter_map(|mapping| mapping.values.get("Rss:"))
            .sum()
    };
    let from = |first: usize| {
        let mut end = mappings[first].start;
        for (offset, mapping) in mappings[first..].iter().enumerate() {
            if mapping.start != end || mapping.end - mappings[first].start > bytes {
                return None;
            }
            end = mapping.end;
            if end - mappings[first].start == bytes {
                return Some(first..first + offset + 1);
            }
        }
        None
    };
    (0..mappings.len()).filter_map(from).max_by_key(resident)
}

/// What the host could give away, KiB.
pub(crate) fn available() -> u64 {
    settle();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Nothing of what was before is on its way any more.
pub(crate) fn settle() {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/compact_memory", "1").ok();
}
