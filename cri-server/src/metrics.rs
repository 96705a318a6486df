//! Metrics under cAdvisor's names: what kubelet serves at /metrics/cadvisor, one table for descriptors and values.
//!
//! Each metric carries cAdvisor's labels, in this order: container, id, image, name, namespace, pod, and then its own. The CRI carries whole
//! numbers only, so seconds are cut to whole ones. Metrics of a pod itself have an empty container.

use caisson_cri_api::v1::{self, MetricType};
use caisson_sandbox::{
    guest,
    spec::ContainerSpec,
    usage::{ContainerUsage, PodUsage},
    view::ContainerState,
};

use crate::{answer, usage::working_set};

/// Labels that every metric has.
const LABELS: [&str; 6] = ["container", "id", "image", "name", "namespace", "pod"];

const SECOND: u64 = 1_000_000;

/// What a metric is read from.
struct Source<'a> {
    cgroup: &'a guest::CgroupStats,
    /// Absent for a pod.
    container: Option<&'a ContainerUsage>,
    /// Empty for a container: the network is the pod's.
    interfaces: &'a [guest::InterfaceStats],
}

/// Values of a metric, each with those of its own labels.
type Values = Vec<(Vec<String>, u64)>;

/// One metric.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
    read: fn(&Source<'_>) -> Values,
}

const COUNTER: MetricType = MetricType::Counter;
const GAUGE: MetricType = MetricType::Gauge;

/// Shortens the table below.
const fn family(
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    labels: &'static [&'static str],
    read: fn(&Source<'_>) -> Values,
) -> Family {
    Family {
        name,
        help,
        kind,
        labels,
        read,
    }
}

const FAMILIES: &[Family] = &[
    family(
        "container_cpu_usage_seconds_total",
        "Cumulative cpu time consumed in seconds.",
        COUNTER,
        &["cpu"],
        |s| vec![(vec!["total".to_owned()], s.cgroup.usage_usec / SECOND)],
    ),
    family(
        "container_cpu_user_seconds_total",
        "Cumulative user cpu time consumed in seconds.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.user_usec / SECOND),
    ),
    family(
        "container_cpu_system_seconds_total",
        "Cumulative system cpu time consumed in seconds.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.system_usec / SECOND),
    ),
    family(
        "container_cpu_cfs_periods_total",
        "Number of elapsed enforcement period intervals.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.nr_periods),
    ),
    family(
        "container_cpu_cfs_throttled_periods_total",
        "Number of throttled period intervals.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.nr_throttled),
    ),
    family(
        "container_cpu_cfs_throttled_seconds_total",
        "Total time duration the container has been throttled.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.throttled_usec / SECOND),
    ),
    family(
        "container_memory_cache",
        "Number of bytes of page cache memory.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.file),
    ),
    family("container_memory_rss", "Size of RSS in bytes.", GAUGE, &[], |s| {
        plain(s.cgroup.anon)
    }),
    family(
        "container_memory_kernel_usage",
        "Size of kernel memory allocated in bytes.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.kernel),
    ),
    family(
        "container_memory_mapped_file",
        "Size of memory mapped files in bytes.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.file_mapped),
    ),
    family(
        "container_memory_swap",
        "Container swap usage in bytes.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.swap_current.unwrap_or(0)),
    ),
    family(
        "container_memory_usage_bytes",
        "Current memory usage in bytes, including all memory regardless of when it was accessed.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.memory_current),
    ),
    family(
        "container_memory_max_usage_bytes",
        "Maximum memory usage recorded in bytes.",
        GAUGE,
        &[],
        |s| s.cgroup.memory_peak.map(plain).unwrap_or_default(),
    ),
    family(
        "container_memory_working_set_bytes",
        "Current working set in bytes.",
        GAUGE,
        &[],
        |s| plain(working_set(s.cgroup)),
    ),
    family(
        "container_memory_total_active_file_bytes",
        "Current total active file in bytes.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.active_file),
    ),
    family(
        "container_memory_total_inactive_file_bytes",
        "Current total inactive file in bytes.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.inactive_file),
    ),
    family(
        "container_memory_failcnt",
        "Number of memory usage hits limits.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.memory_limit_hits),
    ),
    family(
        "container_memory_failures_total",
        "Cumulative count of memory allocation failures.",
        COUNTER,
        &["failure_type", "scope"],
        |s| {
            [("pgfault", s.cgroup.pgfault), ("pgmajfault", s.cgroup.pgmajfault)]
                .map(|(kind, count)| (vec![kind.to_owned(), "hierarchy".to_owned()], count))
                .to_vec()
        },
    ),
    family(
        "container_oom_events_total",
        "Count of out of memory events observed for the container.",
        COUNTER,
        &[],
        |s| plain(s.cgroup.oom_kills),
    ),
    family(
        "container_processes",
        "Number of processes running inside the container.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.processes),
    ),
    family(
        "container_threads",
        "Number of threads running inside the container.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.tasks),
    ),
    family(
        "container_threads_max",
        "Maximum number of threads allowed inside the container, infinity if value is zero.",
        GAUGE,
        &[],
        |s| plain(s.cgroup.tasks_max.unwrap_or(0)),
    ),
    family(
        "container_fs_usage_bytes",
        "Number of bytes that are consumed by the container on this filesystem.",
        GAUGE,
        &["device"],
        |s| layer(s, |layer| layer.bytes),
    ),
    family(
        "container_fs_inodes_used",
        "Number of inodes that the container's writable layer takes.",
        GAUGE,
        &["device"],
        |s| layer(s, |layer| layer.inodes),
    ),
    family(
        "container_fs_reads_total",
        "Cumulative count of reads completed.",
        COUNTER,
        &["device"],
        |s| all_devices(s.cgroup.io_reads),
    ),
    family(
        "container_fs_writes_total",
        "Cumulative count of writes completed.",
        COUNTER,
        &["device"],
        |s| all_devices(s.cgroup.io_writes),
    ),
    family(
        "container_fs_reads_bytes_total",
        "Cumulative count of bytes read.",
        COUNTER,
        &["device"],
        |s| all_devices(s.cgroup.io_read_bytes),
    ),
    family(
        "container_fs_writes_bytes_total",
        "Cumulative count of bytes written.",
        COUNTER,
        &["device"],
        |s| all_devices(s.cgroup.io_write_bytes),
    ),
    family(
        "container_network_receive_bytes_total",
        "Cumulative count of bytes received.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.rx_bytes),
    ),
    family(
        "container_network_receive_packets_total",
        "Cumulative count of packets received.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.rx_packets),
    ),
    family(
        "container_network_receive_packets_dropped_total",
        "Cumulative count of packets dropped while receiving.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.rx_dropped),
    ),
    family(
        "container_network_receive_errors_total",
        "Cumulative count of errors encountered while receiving.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.rx_errors),
    ),
    family(
        "container_network_transmit_bytes_total",
        "Cumulative count of bytes transmitted.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.tx_bytes),
    ),
    family(
        "container_network_transmit_packets_total",
        "Cumulative count of packets transmitted.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.tx_packets),
    ),
    family(
        "container_network_transmit_packets_dropped_total",
        "Cumulative count of packets dropped while transmitting.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.tx_dropped),
    ),
    family(
        "container_network_transmit_errors_total",
        "Cumulative count of errors encountered while transmitting.",
        COUNTER,
        &["interface"],
        |s| network(s, |i| i.tx_errors),
    ),
    family(
        "container_pressure_cpu_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to CPU congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.cpu_pressure.as_ref(), |p| p.some),
    ),
    family(
        "container_pressure_cpu_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to CPU congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.cpu_pressure.as_ref(), |p| p.full),
    ),
    family(
        "container_pressure_memory_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to memory congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.memory_pressure.as_ref(), |p| p.some),
    ),
    family(
        "container_pressure_memory_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to memory congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.memory_pressure.as_ref(), |p| p.full),
    ),
    family(
        "container_pressure_io_waiting_seconds_total",
        "Total time duration tasks in the container have waited due to IO congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.io_pressure.as_ref(), |p| p.some),
    ),
    family(
        "container_pressure_io_stalled_seconds_total",
        "Total time duration no tasks in the container could make progress due to IO congestion.",
        COUNTER,
        &[],
        |s| stalled(s.cgroup.io_pressure.as_ref(), |p| p.full),
    ),
    family(
        "container_spec_cpu_period",
        "CPU period of the container.",
        GAUGE,
        &[],
        |s| limit(s, |r| Some(r.cpu_period_micros).filter(|period| *period > 0)),
    ),
    family(
        "container_spec_cpu_quota",
        "CPU quota of the container.",
        GAUGE,
        &[],
        |s| {
            limit(s, |r| {
                u64::try_from(r.cpu_quota_micros).ok().filter(|quota| *quota > 0)
            })
        },
    ),
    family(
        "container_spec_cpu_shares",
        "CPU share of the container.",
        GAUGE,
        &[],
        |s| limit(s, |r| Some(r.cpu_shares).filter(|shares| *shares > 0)),
    ),
    family(
        "container_spec_memory_limit_bytes",
        "Memory limit for the container.",
        GAUGE,
        &[],
        |s| limit(s, |r| Some(r.memory_limit_bytes)),
    ),
    family(
        "container_spec_memory_swap_limit_bytes",
        "Memory swap limit for the container.",
        GAUGE,
        &[],
        |s| limit(s, |r| Some(r.memory_swap_limit_bytes)),
    ),
    family(
        "container_start_time_seconds",
        "Start time of the container since unix epoch in seconds.",
        GAUGE,
        &[],
        started,
    ),
    family(
        "container_last_seen",
        "Last time a container was seen by the exporter",
        GAUGE,
        &[],
        |s| plain(s.cgroup.timestamp_nanos / 1_000_000_000),
    ),
];

fn plain(value: u64) -> Values {
    vec![(Vec::new(), value)]
}

/// The guest's disks are not told apart.
fn all_devices(value: u64) -> Values {
    vec![(vec![String::new()], value)]
}

fn layer(source: &Source<'_>, read: fn(&guest::LayerStats) -> u64) -> Values {
    let layer = source.container.and_then(|container| container.layer.as_ref());
    layer.map(|layer| all_devices(read(layer))).unwrap_or_default()
}

fn network(source: &Source<'_>, read: fn(&guest::InterfaceStats) -> u64) -> Values {
    source
        .interfaces
        .iter()
        .map(|interface| (vec![interface.name.clone()], read(interface)))
        .collect()
}

fn stalled(
    pressure: Option<&guest::Pressure>,
    line: fn(&guest::Pressure) -> Option<guest::PressureLine>,
) -> Values {
    pressure
        .and_then(line)
        .map(|line| plain(line.total / SECOND))
        .unwrap_or_default()
}

fn limit(source: &Source<'_>, read: fn(&guest::Resources) -> Option<u64>) -> Values {
    let Some(container) = source.container else {
        return Vec::new();
    };
    let absent = guest::Resources::default();
    let resources = container.view.spec.guest.resources.as_ref().unwrap_or(&absent);
    read(resources).map(plain).unwrap_or_default()
}

fn started(source: &Source<'_>) -> Values {
    match source.container.map(|container| &container.view.state) {
        Some(ContainerState::Running { started_at }) => {
            let nanos = u64::try_from(answer::nanos(*started_at)).unwrap_or(0);
            plain(nanos / 1_000_000_000)
        }
        _ => Vec::new(),
    }
}

/// What there is.
#[must_use]
pub fn descriptors() -> Vec<v1::MetricDescriptor> {
    FAMILIES
        .iter()
        .map(|family| v1::MetricDescriptor {
            name: family.name.to_owned(),
            help: family.help.to_owned(),
            label_keys: LABELS
                .iter()
                .chain(family.labels)
                .map(ToString::to_string)
                .collect(),
        })
        .collect()
}

/// The metrics of a pod and its containers.
#[must_use]
pub fn pod(usage: &PodUsage) -> v1::PodSandboxMetrics {
    let source = Source {
        cgroup: &usage.total.cgroup,
        container: None,
        interfaces: &usage.interfaces,
    };
    let id = usage.sandbox.id.0.as_str();
    v1::PodSandboxMetrics {
        pod_sandbox_id: id.to_owned(),
        metrics: metrics(&source, &labels(usage, id, None)),
        container_metrics: usage
            .containers
            .iter()
            .map(|container| {
                let source = Source {
                    cgroup: &container.usage.cgroup,
                    container: Some(container),
                    interfaces: &[],
                };
                let id = container.view.id.0.as_str();
                v1::ContainerMetrics {
                    container_id: id.to_owned(),
                    metrics: metrics(&source, &labels(usage, id, Some(&container.view.spec))),
                }
            })
            .collect(),
    }
}

/// Values of [`LABELS`]. A runtime has no cgroup path to give for the id, and its own id is what names the container.
fn labels(pod: &PodUsage, id: &str, container: Option<&ContainerSpec>) -> [String; 6] {
    let identity = &pod.sandbox.spec.identity;
    [
        container.map(|spec| spec.name.clone()).unwrap_or_default(),
        id.to_owned(),
        container
            .map(|spec| spec.image.user_reference.clone())
            .unwrap_or_default(),
        id.to_owned(),
        identity.namespace.clone(),
        identity.name.clone(),
    ]
}

fn metrics(source: &Source<'_>, labels: &[String; 6]) -> Vec<v1::Metric> {
    let timestamp = i64::try_from(source.cgroup.timestamp_nanos).unwrap_or(i64::MAX);
    FAMILIES
        .iter()
        .flat_map(|family| {
            (family.read)(source).into_iter().map(|(own, value)| v1::Metric {
                name: family.name.to_owned(),
                timestamp,
                metric_type: family.kind as i32,
                label_values: labels.iter().cloned().chain(own).collect(),
                value: Some(v1::UInt64Value { value }),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;

    fn source(interfaces: &[guest::InterfaceStats]) -> Vec<v1::Metric> {
        let line = Some(guest::PressureLine {
            total: 2_500_000,
            ..Default::default()
        });
        let pressure = Some(guest::Pressure {
            some: line,
            full: line,
        });
        let cgroup = guest::CgroupStats {
            usage_usec: 3_900_000,
            memory_peak: Some(1),
            cpu_pressure: pressure,
            memory_pressure: pressure,
            io_pressure: pressure,
            ..Default::default()
        };
        let source = Source {
            cgroup: &cgroup,
            container: None,
            interfaces,
        };
        metrics(&source, &Default::default())
    }

    #[test]
    fn names_are_unique_and_each_value_has_a_value_for_each_label() {
        let descriptors = descriptors();
        let keys: HashMap<_, _> = descriptors
            .iter()
            .map(|descriptor| (descriptor.name.as_str(), descriptor.label_keys.len()))
            .collect();
        assert_eq!(keys.len(), descriptors.len());
        let all = source(&[guest::InterfaceStats {
            name: "eth0".into(),
            ..Default::default()
        }]);
        for metric in &all {
            assert_eq!(
                keys[metric.name.as_str()],
                metric.label_values.len(),
                "{}",
                metric.name
            );
        }
        let named: HashSet<_> = all.iter().map(|metric| metric.name.as_str()).collect();
        assert!(named.contains("container_network_receive_bytes_total"));
        assert!(named.contains("container_pressure_io_stalled_seconds_total"));
    }

    #[test]
    fn seconds_are_whole_and_a_container_has_no_network() {
        let all = source(&[]);
        let cpu = all
            .iter()
            .find(|metric| metric.name == "container_cpu_usage_seconds_total")
            .unwrap();
        assert_eq!(cpu.value.unwrap().value, 3);
        assert_eq!(cpu.label_values.last().unwrap(), "total");
        assert!(
            !all.iter()
                .any(|metric| metric.name.starts_with("container_network"))
        );
    }
}
