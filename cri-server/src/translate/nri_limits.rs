//! Limits in NRI's words, and in ours.

use caisson_cri_api::v1;
use caisson_nri::v1alpha1::{
    HugepageLimit, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, OptionalInt64, OptionalUInt64,
};
use caisson_sandbox::{cpuset::Cpuset, guest, limits::LimitChange};

use super::{Refusals, resources};

/// What shall change. Zero leaves what is there.
pub(crate) fn change(wanted: &LinuxResources, field: &str, refusals: &mut Refusals) -> LimitChange {
    resources::limit_change(Some(&to_cri(wanted, field, refusals)), field, refusals)
}

/// In the CRI's words; what these do not have is a file of cgroup v2, or refused.
pub(crate) fn to_cri(
    wanted: &LinuxResources,
    field: &str,
    refusals: &mut Refusals,
) -> v1::LinuxContainerResources {
    impossible(wanted, field, refusals);
    let memory = wanted.memory.unwrap_or_default();
    let cpu = wanted.cpu.clone().unwrap_or_default();
    let mut amount = |name: &str, value: Option<OptionalUInt64>| {
        let value = value.map_or(0, |value| value.value);
        i64::try_from(value).unwrap_or_else(|_| {
            refusals.add(format!("{field}.{name}"), format!("{value} is too large"));
            0
        })
    };
    let signed = |value: Option<OptionalInt64>| value.map_or(0, |value| value.value);
    let mut cri = v1::LinuxContainerResources {
        cpu_period: amount("cpu.period", cpu.period),
        cpu_shares: amount("cpu.shares", cpu.shares),
        cpu_quota: signed(cpu.quota),
        cpuset_cpus: cpu.cpus,
        cpuset_mems: cpu.mems,
        memory_limit_in_bytes: signed(memory.limit),
        memory_swap_limit_in_bytes: signed(memory.swap),
        hugepage_limits: wanted
            .hugepage_limits
            .iter()
            .map(|limit| v1::HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        unified: wanted.unified.clone().into_iter().collect(),
        ..Default::default()
    };
    let word = |limit: i64| match limit {
        limit if limit < 0 => "max".to_owned(),
        limit => limit.to_string(),
    };
    if let Some(reservation) = memory.reservation {
        cri.unified
            .entry("memory.low".into())
            .or_insert_with(|| word(reservation.value));
    }
    if let Some(pids) = wanted.pids.as_ref().filter(|pids| pids.limit != 0) {
        cri.unified
            .entry("pids.max".into())
            .or_insert_with(|| word(pids.limit));
    }
    cri
}

fn impossible(wanted: &LinuxResources, field: &str, refusals: &mut Refusals) {
    let memory = wanted.memory.unwrap_or_default();
    let cpu = wanted.cpu.clone().unwrap_or_default();
    let old = "is of cgroup v1, and the guest has v2";
    let class = "classes are the host's, whose threads are the VM's and not the container's";
    let set = |class: &Option<caisson_nri::v1alpha1::OptionalString>| {
        class.as_ref().is_some_and(|class| !class.value.is_empty())
    };
    for (set, name, reason) in [
        (memory.kernel.is_some(), "memory.kernel", old),
        (memory.kernel_tcp.is_some(), "memory.kernel_tcp", old),
        (memory.swappiness.is_some(), "memory.swappiness", old),
        (
            memory.disable_oom_killer.is_some_and(|disable| disable.value),
            "memory.disable_oom_killer",
            old,
        ),
        (
            memory.use_hierarchy.is_some_and(|hierarchy| !hierarchy.value),
            "memory.use_hierarchy",
            old,
        ),
        (cpu.realtime_runtime.is_some(), "cpu.realtime_runtime", old),
        (cpu.realtime_period.is_some(), "cpu.realtime_period", old),
        (set(&wanted.blockio_class), "blockio_class", class),
        (set(&wanted.rdt_class), "rdt_class", class),
        (
            !wanted.devices.is_empty(),
            "devices",
            "rules of the host's devices mean nothing in the guest",
        ),
    ] {
        refusals.add_if(set, &format!("{field}.{name}"), reason);
    }
}

/// What a client asks, as plugins are told.
pub(crate) fn from_cri(cri: &v1::LinuxContainerResources) -> LinuxResources {
    let signed = |value: i64| (value != 0).then_some(OptionalInt64 { value });
    let amount = |value: i64| {
        let value = u64::try_from(value).ok().filter(|value| *value > 0);
        value.map(|value| OptionalUInt64 { value })
    };
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: signed(cri.memory_limit_in_bytes),
            swap: signed(cri.memory_swap_limit_in_bytes),
            ..Default::default()
        }),
        cpu: Some(LinuxCpu {
            shares: amount(cri.cpu_shares),
            quota: signed(cri.cpu_quota),
            period: amount(cri.cpu_period),
            cpus: cri.cpuset_cpus.clone(),
            mems: cri.cpuset_mems.clone(),
            ..Default::default()
        }),
        hugepage_limits: cri
            .hugepage_limits
            .iter()
            .map(|limit| HugepageLimit {
                page_size: limit.page_size.clone(),
                limit: limit.limit,
            })
            .collect(),
        unified: cri.unified.clone().into_iter().collect(),
        ..Default::default()
    }
}

/// What a container has, as plugins are told.
pub(crate) fn from_guest(resources: &guest::Resources, cpuset: &Cpuset) -> LinuxResources {
    let pids = i64::try_from(resources.pids_limit)
        .ok()
        .filter(|limit| *limit > 0);
    LinuxResources {
        pids: pids.map(|limit| LinuxPids { limit }),
        ..from_cri(&resources::answered(resources, 0, cpuset))
    }
}
