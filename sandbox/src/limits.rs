//! Limits that change while a pod runs: what a partial update makes of the limits that are there, and whether the VM can hold the result.
//!
//! Pure. A limit beyond what a VM has or can grow to is refused instead of being set and never reached.

use std::collections::BTreeMap;

use caisson_lifecycle::sizing::VmSize;

use crate::{SandboxError, cpuset::Cpuset, grow::Room, guest, spec::PodLimits};

/// The kernel's own cpu.max period.
const DEFAULT_PERIOD_MICROS: u64 = 100_000;

/// Limits of a container that shall change; what is `None` or not named stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LimitChange {
    /// CFS quota in microseconds per period; 0: no limit.
    pub cpu_quota_micros: Option<i64>,
    /// Microseconds.
    pub cpu_period_micros: Option<u64>,
    /// As cgroup v1 cpu.shares.
    pub cpu_shares: Option<u64>,
    /// 0: no limit.
    pub memory_limit_bytes: Option<u64>,
    /// Memory and swap together, as cgroup v1 counts; 0: no limit.
    pub memory_swap_limit_bytes: Option<u64>,
    /// For the OOM killer.
    pub oom_score_adj: Option<i32>,
    /// Page size such as 2MB -> bytes.
    pub hugepage_limits: BTreeMap<String, u64>,
    /// cgroup v2 file -> value.
    pub unified: BTreeMap<String, String>,
    /// CPUs and memory nodes of the host.
    pub cpuset: Cpuset,
}

impl LimitChange {
    /// The limits after it. Who has a limit of memory and swap together keeps as much swap as before when only memory changes.
    #[must_use]
    pub fn apply(&self, before: &guest::Resources) -> guest::Resources {
        let mut after = before.clone();
        set(&mut after.cpu_quota_micros, self.cpu_quota_micros);
        set(&mut after.cpu_period_micros, self.cpu_period_micros);
        set(&mut after.cpu_shares, self.cpu_shares);
        set(&mut after.memory_limit_bytes, self.memory_limit_bytes);
        if let (Some(memory), true) = (self.memory_limit_bytes, before.memory_swap_limit_bytes > 0) {
            let swap = before
                .memory_swap_limit_bytes
                .saturating_sub(before.memory_limit_bytes);
            after.memory_swap_limit_bytes = if memory == 0 {
                0
            } else {
                memory.saturating_add(swap)
            };
        }
        set(&mut after.memory_swap_limit_bytes, self.memory_swap_limit_bytes);
        after.hugepage_limits.extend(
            self.hugepage_limits
                .iter()
                .map(|(size, limit)| (size.clone(), *limit)),
        );
        after.unified.extend(
            self.unified
                .iter()
                .map(|(file, value)| (file.clone(), value.clone())),
        );
        after
    }
}

fn set<T>(place: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *place = value;
    }
}

/// Limits of a pod that shall change; `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodLimitChange {
    /// Sum of the containers' limits.
    pub limits: PodLimits,
    /// What the runtime class adds for the VM itself; counted in the pod's cgroup on the host, not inside the VM.
    pub overhead: PodLimits,
    /// CPUs and memory nodes of the host, besides those of containers.
    pub cpuset: Cpuset,
}

/// The size that the VM needs for these limits of a container; refuses what it cannot have. What was there before is not looked at again.
pub(crate) fn check_container(
    id: &str,
    before: &guest::Resources,
    after: &guest::Resources,
    room: Room,
) -> Result<VmSize, SandboxError> {
    let limits = |resources: &guest::Resources| PodLimits {
        memory_bytes: Some(resources.memory_limit_bytes).filter(|bytes| *bytes > 0),
        cpu_milli: milli(resources),
    };
    check(
        &format!("update container {id}"),
        limits(before),
        limits(after),
        room,
        0,
    )
}

/// The same for limits of a pod; of the VM's memory, the guest itself needs `guest_overhead_mib`.
pub(crate) fn check_pod(
    id: &str,
    before: PodLimits,
    after: PodLimits,
    room: Room,
    guest_overhead_mib: u64,
) -> Result<VmSize, SandboxError> {
    check(
        &format!("resize pod sandbox {id}"),
        before,
        after,
        room,
        guest_overhead_mib,
    )
}

fn check(
    what: &str,
    before: PodLimits,
    after: PodLimits,
    room: Room,
    overhead_mib: u64,
) -> Result<VmSize, SandboxError> {
    let refuse = |reason: String| SandboxError::Unmet {
        what: what.to_owned(),
        reason,
    };
    let most = room.ceiling.unwrap_or(room.size);
    let bound = |most: String| match room.ceiling {
        None => format!("was booted with {most} and cannot grow"),
        Some(_) => format!("can have {most} at most"),
    };
    let mut needed = room.size;
    if let Some(bytes) = after
        .memory_bytes
        .filter(|now| before.memory_bytes.is_none_or(|was| *now > was))
    {
        let mib = bytes.div_ceil(1 << 20).saturating_add(overhead_mib);
        if mib > most.memory_mib {
            let bound = bound(format!("{} MiB", most.memory_mib));
            return Err(refuse(format!(
                "it needs {mib} MiB of memory, and its VM {bound}"
            )));
        }
        needed.memory_mib = needed.memory_mib.max(mib);
    }
    if let Some(milli) = after
        .cpu_milli
        .filter(|now| before.cpu_milli.is_none_or(|was| *now > was))
    {
        let cpus = milli.div_ceil(1000);
        match u32::try_from(cpus) {
            Ok(cpus) if cpus <= most.vcpus => needed.vcpus = needed.vcpus.max(cpus),
            _ => {
                let bound = bound(most.vcpus.to_string());
                return Err(refuse(format!("it needs {cpus} CPUs, and its VM {bound}")));
            }
        }
    }
    Ok(needed)
}

/// Thousandths of a CPU; `None`: no limit.
fn milli(resources: &guest::Resources) -> Option<u64> {
    let quota = u64::try_from(resources.cpu_quota_micros)
        .ok()
        .filter(|quota| *quota > 0)?;
    let period = match resources.cpu_period_micros {
        0 => DEFAULT_PERIOD_MICROS,
        period => period,
    };
    Some(quota.saturating_mul(1000).div_ceil(period))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const SIZE: VmSize = VmSize {
        memory_mib: 256,
        vcpus: 2,
    };
    const VM: Room = Room {
        size: SIZE,
        ceiling: None,
    };

    fn before() -> guest::Resources {
        guest::Resources {
            cpu_quota_micros: 50_000,
            cpu_period_micros: 100_000,
            cpu_shares: 512,
            memory_limit_bytes: 64 * MIB,
            memory_swap_limit_bytes: 64 * MIB,
            pids_limit: 9,
            unified: [("memory.high".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        }
    }

    #[test]
    fn an_update_touches_only_what_it_names() {
        let change = LimitChange {
            cpu_shares: Some(1024),
            ..LimitChange::default()
        };
        let expected = guest::Resources {
            cpu_shares: 1024,
            ..before()
        };
        assert_eq!(change.apply(&before()), expected);
        assert_eq!(LimitChange::default().apply(&before()), before());
    }

    #[test]
    fn more_memory_is_not_more_swap() {
        let change = |memory| LimitChange {
            memory_limit_bytes: Some(memory),
            ..LimitChange::default()
        };
        assert_eq!(
            change(128 * MIB).apply(&before()).memory_swap_limit_bytes,
            128 * MIB
        );
        assert_eq!(change(0).apply(&before()).memory_swap_limit_bytes, 0);
        let without = guest::Resources {
            memory_swap_limit_bytes: 0,
            ..before()
        };
        assert_eq!(change(128 * MIB).apply(&without).memory_swap_limit_bytes, 0);
    }

    #[test]
    fn what_the_vm_does_not_have_is_refused_with_both_numbers() {
        let more = guest::Resources {
            memory_limit_bytes: 512 * MIB,
            ..before()
        };
        let error = check_container("c", &before(), &more, VM).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot update container c: it needs 512 MiB of memory, and its VM was booted with 256 MiB and cannot grow"
        );
        // As it was created, and less than that, stays possible.
        check_container("c", &more, &more, VM).unwrap();
        let less = guest::Resources {
            memory_limit_bytes: 300 * MIB,
            ..before()
        };
        check_container("c", &more, &less, VM).unwrap();
        let cpus = guest::Resources {
            cpu_quota_micros: 250_000,
            ..before()
        };
        let error = check_container("c", &before(), &cpus, VM).unwrap_err();
        assert!(error.to_string().contains("it needs 3 CPUs"), "{error}");
    }

    #[test]
    fn a_vm_that_can_grow_is_asked_for_what_is_missing() {
        let room = Room {
            ceiling: Some(VmSize {
                memory_mib: 1024,
                vcpus: 4,
            }),
            ..VM
        };
        let limits = |mib: u64, cpu_milli| PodLimits {
            memory_bytes: Some(mib * MIB),
            cpu_milli: Some(cpu_milli),
        };
        let check = |after| check_pod("p", limits(100, 500), after, room, 40);
        assert_eq!(check(limits(200, 1000)).unwrap(), SIZE);
        let grown = VmSize {
            memory_mib: 540,
            vcpus: 3,
        };
        assert_eq!(check(limits(500, 2100)).unwrap(), grown);
        let error = check(limits(985, 500)).unwrap_err().to_string();
        assert!(
            error.ends_with("it needs 1025 MiB of memory, and its VM can have 1024 MiB at most"),
            "{error}"
        );
        let error = check(limits(100, 4001)).unwrap_err().to_string();
        assert!(
            error.ends_with("it needs 5 CPUs, and its VM can have 4 at most"),
            "{error}"
        );
    }

    #[test]
    fn a_pod_needs_what_its_guest_takes_too() {
        let limits = |mib: u64| PodLimits {
            memory_bytes: Some(mib * MIB),
            cpu_milli: Some(2000),
        };
        check_pod("p", PodLimits::default(), limits(200), VM, 40).unwrap();
        assert!(check_pod("p", PodLimits::default(), limits(217), VM, 40).is_err());
    }
}
