//! `Hello`: who answers, and how the boot went.

use std::fs;

use caisson_agent_api::{PROTOCOL, v1};

use crate::{
    apparmor,
    guest::{Guest, Sandbox},
};

/// The answer.
pub(crate) fn hello(guest: &Guest) -> v1::HelloReply {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    v1::HelloReply {
        protocol: PROTOCOL,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
        kernel_nanos: guest.kernel_nanos,
        listening_nanos: guest.listening_nanos,
        memory_bytes: kib(&read("/proc/meminfo"), "MemTotal:"),
        online_cpus: online_cpus(),
        agent_rss_bytes: kib(&read("/proc/self/status"), "VmRSS:"),
        configured: matches!(&*guest.sandbox(), Sandbox::Configured(_)),
        apparmor: apparmor::enabled(),
    }
}

/// CPUs that are online.
pub(crate) fn online_cpus() -> u32 {
    ranges(&fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default())
}

/// Bytes behind a label of /proc files that count in kB.
fn kib(text: &str, label: &str) -> u64 {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(label)?.trim().strip_suffix(" kB"));
    value
        .and_then(|value| value.trim().parse::<u64>().ok())
        .unwrap_or(0)
        .saturating_mul(1024)
}

/// How many numbers a list such as `0-3,7` has.
fn ranges(text: &str) -> u32 {
    let count = |part: &str| -> Option<u32> {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        Some(last.checked_sub(first)?.saturating_add(1))
    };
    text.trim()
        .split(',')
        .filter_map(count)
        .fold(0, u32::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_lists_are_counted() {
        assert_eq!(ranges("0-3,7\n"), 5);
        assert_eq!(ranges("0\n"), 1);
        assert_eq!(ranges(""), 0);
        assert_eq!(kib("MemFree: 1 kB\nMemTotal:   2048 kB\n", "MemTotal:"), 2 << 20);
    }
}
