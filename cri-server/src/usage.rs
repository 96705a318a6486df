//! From what the guest's cgroups count to the CRI's words for it, and the filters of the lists.
//!
//! Working set is what kubelet evicts by: usage without the page cache that has not been touched lately. CPU, memory and processes of a pod
//! are those of its containers; what VMM and guest kernel take besides is in the pod's cgroup on the host, where kubelet looks for it.

use std::path::Path;

use caisson_cri_api::v1;
use caisson_sandbox::{
    guest,
    usage::{ContainerUsage, PodUsage, Usage},
    view::{ContainerView, SandboxView},
};

use crate::answer;

/// Nanoseconds in the microseconds of the kernel's files.
const MICROS: u64 = 1000;

/// A container's statistics. `disks` is the directory of the pods' writable disks on the host.
#[must_use]
pub fn container(usage: &ContainerUsage, disks: &Path) -> v1::ContainerStats {
    let cgroup = &usage.usage.cgroup;
    let at = timestamp(cgroup);
    let spec = &usage.view.spec;
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: usage.view.id.0.clone(),
            metadata: Some(answer::container_metadata(spec)),
            labels: answer::map(spec.labels.clone()),
            annotations: answer::map(spec.annotations.clone()),
        }),
        cpu: Some(cpu(&usage.usage)),
        memory: Some(memory(cgroup)),
        writable_layer: usage.layer.as_ref().map(|layer| v1::FilesystemUsage {
            timestamp: signed(layer.timestamp_nanos),
            fs_id: Some(v1::FilesystemIdentifier {
                mountpoint: disks.to_string_lossy().into_owned(),
            }),
            used_bytes: value(layer.bytes),
            inodes_used: value(layer.inodes),
        }),
        swap: cgroup.swap_current.map(|used| v1::SwapUsage {
            timestamp: at,
            swap_available_bytes: cgroup.swap_max.and_then(|most| value(most.saturating_sub(used))),
            swap_usage_bytes: value(used),
        }),
        io: Some(v1::IoUsage {
            timestamp: at,
            psi: psi(cgroup.io_pressure.as_ref()),
        }),
    }
}

/// A pod's statistics, its containers' included.
#[must_use]
pub fn pod(usage: &PodUsage, disks: &Path) -> v1::PodSandboxStats {
    let cgroup = &usage.total.cgroup;
    let at = timestamp(cgroup);
    let mut interfaces = usage.interfaces.iter().map(interface);
    let spec = &usage.sandbox.spec;
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: usage.sandbox.id.0.clone(),
            metadata: Some(answer::pod_metadata(spec)),
            labels: answer::map(spec.labels.clone()),
            annotations: answer::map(spec.annotations.clone()),
        }),
        linux: Some(v1::LinuxPodSandboxStats {
            cpu: Some(cpu(&usage.total)),
            memory: Some(memory(cgroup)),
            network: Some(v1::NetworkUsage {
                timestamp: at,
                default_interface: interfaces.next(),
                interfaces: interfaces.collect(),
            }),
            process: Some(v1::ProcessUsage {
                timestamp: at,
                process_count: value(cgroup.processes),
            }),
            containers: usage
                .containers
                .iter()
                .map(|usage| container(usage, disks))
                .collect(),
            io: Some(v1::IoUsage {
                timestamp: at,
                psi: psi(cgroup.io_pressure.as_ref()),
            }),
        }),
        windows: None,
    }
}

/// Memory in use without the page cache that nobody has touched lately.
#[must_use]
pub fn working_set(cgroup: &guest::CgroupStats) -> u64 {
    cgroup.memory_current.saturating_sub(cgroup.inactive_file)
}

/// Whether a container's statistics are asked for. Ids may be prefixes, as crictl sends them.
#[must_use]
pub fn wants_container(filter: &v1::ContainerStatsFilter, view: &ContainerView) -> bool {
    view.id.0.starts_with(&filter.id)
        && view.sandbox_id.0.starts_with(&filter.pod_sandbox_id)
        && answer::selects(&filter.label_selector, &view.spec.labels)
}

/// Whether a pod's statistics are asked for.
#[must_use]
pub fn wants_pod(filter: &v1::PodSandboxStatsFilter, view: &SandboxView) -> bool {
    view.id.0.starts_with(&filter.id) && answer::selects(&filter.label_selector, &view.spec.labels)
}

fn cpu(usage: &Usage) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp: timestamp(&usage.cgroup),
        usage_core_nano_seconds: value(usage.cgroup.usage_usec.saturating_mul(MICROS)),
        usage_nano_cores: usage.nano_cores.and_then(value),
        psi: psi(usage.cgroup.cpu_pressure.as_ref()),
    }
}

fn memory(cgroup: &guest::CgroupStats) -> v1::MemoryUsage {
    let working_set = working_set(cgroup);
    v1::MemoryUsage {
        timestamp: timestamp(cgroup),
        working_set_bytes: value(working_set),
        available_bytes: cgroup
            .memory_max
            .and_then(|most| value(most.saturating_sub(working_set))),
        usage_bytes: value(cgroup.memory_current),
        rss_bytes: value(cgroup.anon),
        page_faults: value(cgroup.pgfault),
        major_page_faults: value(cgroup.pgmajfault),
        psi: psi(cgroup.memory_pressure.as_ref()),
    }
}

fn interface(counters: &guest::InterfaceStats) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: counters.name.clone(),
        rx_bytes: value(counters.rx_bytes),
        rx_errors: value(counters.rx_errors),
        tx_bytes: value(counters.tx_bytes),
        tx_errors: value(counters.tx_errors),
    }
}

/// The CRI counts stalls in nanoseconds.
fn psi(pressure: Option<&guest::Pressure>) -> Option<v1::PsiStats> {
    let line = |line: &guest::PressureLine| v1::PsiData {
        total: line.total.saturating_mul(MICROS),
        avg10: line.avg10,
        avg60: line.avg60,
        avg300: line.avg300,
    };
    pressure.map(|pressure| v1::PsiStats {
        full: pressure.full.as_ref().map(line),
        some: pressure.some.as_ref().map(line),
    })
}

fn timestamp(cgroup: &guest::CgroupStats) -> i64 {
    signed(cgroup.timestamp_nanos)
}

fn signed(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX)
}

#[expect(clippy::unnecessary_wraps, reason = "the CRI's numbers may be absent")]
fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroup() -> guest::CgroupStats {
        guest::CgroupStats {
            timestamp_nanos: 5,
            usage_usec: 7,
            memory_current: 100,
            inactive_file: 30,
            anon: 40,
            memory_max: Some(1000),
            ..Default::default()
        }
    }

    #[test]
    fn the_working_set_leaves_out_cache_that_nobody_touches() {
        let memory = memory(&cgroup());
        assert_eq!(memory.working_set_bytes.unwrap().value, 70);
        assert_eq!(memory.available_bytes.unwrap().value, 930);
        assert_eq!(memory.rss_bytes.unwrap().value, 40);
        // A guest that claims more cache than memory makes no huge number.
        let odd = guest::CgroupStats {
            inactive_file: 500,
            ..cgroup()
        };
        assert_eq!(working_set(&odd), 0);
    }

    #[test]
    fn cpu_time_and_stalls_are_in_nanoseconds_and_an_unlimited_container_has_no_rest() {
        let usage = Usage {
            cgroup: guest::CgroupStats {
                memory_max: None,
                cpu_pressure: Some(guest::Pressure {
                    some: Some(guest::PressureLine {
                        total: 3,
                        avg10: 1.5,
                        ..Default::default()
                    }),
                    full: None,
                }),
                ..cgroup()
            },
            nano_cores: None,
        };
        let cpu = cpu(&usage);
        assert_eq!(cpu.usage_core_nano_seconds.unwrap().value, 7000);
        assert_eq!(cpu.usage_nano_cores, None);
        assert_eq!(cpu.psi.unwrap().some.unwrap().total, 3000);
        assert_eq!(memory(&usage.cgroup).available_bytes, None);
    }
}
