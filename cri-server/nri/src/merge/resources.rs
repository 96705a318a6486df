//! Resources: which of them are set, and one set over another.

use super::owners::Part;
use crate::v1alpha1::{Field, LinuxCpu, LinuxMemory, LinuxResources};

/// Everything that is set.
pub(super) fn parts(resources: &LinuxResources) -> Vec<Part> {
    let memory = resources.memory.unwrap_or_default();
    let cpu = resources.cpu.clone().unwrap_or_default();
    let simple = [
        (memory.limit.is_some(), Field::MemLimit),
        (memory.reservation.is_some(), Field::MemReservation),
        (memory.swap.is_some(), Field::MemSwapLimit),
        (memory.kernel.is_some(), Field::MemKernelLimit),
        (memory.kernel_tcp.is_some(), Field::MemTcpLimit),
        (memory.swappiness.is_some(), Field::MemSwappiness),
        (memory.disable_oom_killer.is_some(), Field::MemDisableOomKiller),
        (memory.use_hierarchy.is_some(), Field::MemUseHierarchy),
        (cpu.shares.is_some(), Field::CpuShares),
        (cpu.quota.is_some(), Field::CpuQuota),
        (cpu.period.is_some(), Field::CpuPeriod),
        (cpu.realtime_runtime.is_some(), Field::CpuRealtimeRuntime),
        (cpu.realtime_period.is_some(), Field::CpuRealtimePeriod),
        (!cpu.cpus.is_empty(), Field::CpuSetCpus),
        (!cpu.mems.is_empty(), Field::CpuSetMems),
        (resources.pids.is_some(), Field::PidsLimit),
        (resources.blockio_class.is_some(), Field::BlockioClass),
        (resources.rdt_class.is_some(), Field::RdtClass),
    ];
    let simple = simple
        .into_iter()
        .filter_map(|(set, field)| set.then_some((field, None)));
    let pages = resources
        .hugepage_limits
        .iter()
        .map(|limit| (Field::HugepageLimits, Some(limit.page_size.clone())));
    let unified = resources
        .unified
        .keys()
        .map(|file| (Field::CgroupsUnified, Some(file.clone())));
    simple.chain(pages).chain(unified).collect()
}

/// Sets in `below` what `over` has.
pub(super) fn overlay(below: &mut LinuxResources, over: &LinuxResources) {
    if let Some(over) = &over.memory {
        overlay_memory(below.memory.get_or_insert_default(), over);
    }
    if let Some(over) = &over.cpu {
        overlay_cpu(below.cpu.get_or_insert_default(), over);
    }
    for limit in &over.hugepage_limits {
        below
            .hugepage_limits
            .retain(|known| known.page_size != limit.page_size);
        below.hugepage_limits.push(limit.clone());
    }
    below.unified.extend(over.unified.clone());
    below.devices.extend(over.devices.clone());
    set(&mut below.blockio_class, over.blockio_class.as_ref());
    set(&mut below.rdt_class, over.rdt_class.as_ref());
    set(&mut below.pids, over.pids.as_ref());
}

fn overlay_memory(below: &mut LinuxMemory, over: &LinuxMemory) {
    set(&mut below.limit, over.limit.as_ref());
    set(&mut below.reservation, over.reservation.as_ref());
    set(&mut below.swap, over.swap.as_ref());
    set(&mut below.kernel, over.kernel.as_ref());
    set(&mut below.kernel_tcp, over.kernel_tcp.as_ref());
    set(&mut below.swappiness, over.swappiness.as_ref());
    set(&mut below.disable_oom_killer, over.disable_oom_killer.as_ref());
    set(&mut below.use_hierarchy, over.use_hierarchy.as_ref());
}

fn overlay_cpu(below: &mut LinuxCpu, over: &LinuxCpu) {
    set(&mut below.shares, over.shares.as_ref());
    set(&mut below.quota, over.quota.as_ref());
    set(&mut below.period, over.period.as_ref());
    set(&mut below.realtime_runtime, over.realtime_runtime.as_ref());
    set(&mut below.realtime_period, over.realtime_period.as_ref());
    for (below, over) in [(&mut below.cpus, &over.cpus), (&mut below.mems, &over.mems)] {
        if !over.is_empty() {
            below.clone_from(over);
        }
    }
}

fn set<T: Clone>(place: &mut Option<T>, value: Option<&T>) {
    if let Some(value) = value {
        *place = Some(value.clone());
    }
}
