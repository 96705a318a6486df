//! Exits of guests by reason: a histogram that the kernel's tracer makes of the event `kvm_exit` (Documentation/trace/histogram.rst).

use std::{fs, path::Path};

use crate::Outcome;

const TRACERS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
const KEYS: &str = "hist:keys=common_pid,exit_reason.hex";

/// AMD's exit codes that a guest of ours meets (APM volume 2, appendix C); Intel's are printed as numbers.
const AMD: &[(u64, &str)] = &[
    (0x60, "interrupt"),
    (0x64, "interrupt window"),
    (0x6e, "rdtsc"),
    (0x72, "cpuid"),
    (0x77, "pause"),
    (0x78, "hlt"),
    (0x7b, "port"),
    (0x7c, "MSR"),
    (0x7f, "shutdown"),
    (0x400, "nested page fault"),
];

/// A histogram in the making; it ends with its scope.
pub(crate) struct Histogram {
    trigger: String,
    histogram: String,
}

impl Histogram {
    pub(crate) fn begin() -> Outcome<Self> {
        let event = TRACERS
            .iter()
            .map(|tracer| format!("{tracer}/events/kvm/kvm_exit"))
            .find(|event| Path::new(event).join("trigger").exists())
            .ok_or("no tracefs with kvm_exit is mounted")?;
        let trigger = format!("{event}/trigger");
        fs::write(&trigger, KEYS).map_err(|e| format!("{trigger}: {e}"))?;
        Ok(Self {
            trigger,
            histogram: format!("{event}/hist"),
        })
    }

    /// Reasons and counts of one process's threads, most frequent first.
    pub(crate) fn end(self, pid: u32) -> Vec<(String, u64)> {
        let threads: Vec<u32> = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
            .collect();
        let text = fs::read_to_string(&self.histogram).unwrap_or_default();
        let lines = text.lines().filter_map(parse);
        let mut table: Vec<(String, u64)> = lines
            .filter(|(thread, ..)| threads.contains(thread))
            .map(|(_, reason, count)| (name(reason), count))
            .collect();
        table.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        table
    }
}

impl Drop for Histogram {
    fn drop(&mut self) {
        if let Err(e) = fs::write(&self.trigger, format!("!{KEYS}")) {
            eprintln!("a histogram stays: {}: {e}", self.trigger);
        }
    }
}

/// `{ common_pid:        417, exit_reason:        78 } hitcount:         12`
fn parse(line: &str) -> Option<(u32, u64, u64)> {
    let after = |word: &str| {
        let rest = line.split_once(word)?.1;
        rest.split_ascii_whitespace()
            .next()
            .map(|word| word.trim_end_matches(','))
    };
    let thread = after("common_pid:")?.parse().ok()?;
    let reason = u64::from_str_radix(after("exit_reason:")?.trim_start_matches("0x"), 16).ok()?;
    Some((thread, reason, after("hitcount:")?.parse().ok()?))
}

fn name(reason: u64) -> String {
    let known = AMD.iter().find(|(code, _)| *code == reason);
    let amd = fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("AuthenticAMD"));
    match known.filter(|_| amd) {
        Some((_, name)) => (*name).to_owned(),
        None => format!("reason {reason:#x}"),
    }
}
