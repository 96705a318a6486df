//! Resources: what the guest's cgroups enforce, and the limits by which a VM is sized.

use caisson_cri_api::v1;
use caisson_sandbox::{cpuset::Cpuset, guest, limits::LimitChange, spec::PodLimits};

use super::Refusals;

/// Limits of one container, for the guest's cgroups. The score for the OOM killer is answered beside them.
pub(super) fn container(
    config: Option<&v1::LinuxContainerResources>,
    field: &str,
    refusals: &mut Refusals,
) -> (guest::Resources, i32) {
    let Some(config) = config else {
        return (guest::Resources::default(), 0);
    };
    let mut amount = |name: &str, value: i64| {
        u64::try_from(value).unwrap_or_else(|_| {
            refusals.add(
                format!("{field}.{name}"),
                format!("{value} is not a valid amount"),
            );
            0
        })
    };
    let resources = guest::Resources {
        cpu_quota_micros: config.cpu_quota.max(0),
        cpu_period_micros: amount("cpu_period", config.cpu_period),
        cpu_shares: amount("cpu_shares", config.cpu_shares),
        memory_limit_bytes: amount("memory_limit_in_bytes", config.memory_limit_in_bytes),
        // -1 is "unlimited", which is what an unset swap limit means in the guest, too.
        memory_swap_limit_bytes: match config.memory_swap_limit_in_bytes {
            -1 => 0,
            swap => amount("memory_swap_limit_in_bytes", swap),
        },
        pids_limit: 0,
        unified: config.unified.clone().into_iter().collect(),
        hugepage_limits: config
            .hugepage_limits
            .iter()
            .map(|limit| (limit.page_size.clone(), limit.limit))
            .collect(),
    };
    for file in resources.unified.keys() {
        if file.is_empty() || file.contains('/') || file.starts_with("cgroup.") || !file.contains('.') {
            refusals.add(
                format!("{field}.unified[{file:?}]"),
                "is not the name of a controller's file",
            );
        }
    }
    let score = i32::try_from(config.oom_score_adj)
        .ok()
        .filter(|score| (-1000..=1000).contains(score))
        .unwrap_or_else(|| {
            refusals.add(
                format!("{field}.oom_score_adj"),
                format!("{} is not between -1000 and 1000", config.oom_score_adj),
            );
            0
        });
    (resources, score)
}

/// Limits of a container that shall change: zero and absent leave what is there, -1 takes a limit away.
pub(crate) fn limit_change(
    config: Option<&v1::LinuxContainerResources>,
    field: &str,
    refusals: &mut Refusals,
) -> LimitChange {
    let Some(config) = config else {
        return LimitChange::default();
    };
    // Beside that, an update may ask what a new container may.
    let memory = match config.memory_limit_in_bytes {
        -1 => 0,
        bytes => bytes,
    };
    let asked = v1::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        ..config.clone()
    };
    let (resources, score) = container(Some(&asked), field, refusals);
    let positive = |value: u64| Some(value).filter(|value| *value > 0);
    LimitChange {
        cpu_quota_micros: (config.cpu_quota != 0).then_some(resources.cpu_quota_micros),
        cpu_period_micros: positive(resources.cpu_period_micros),
        cpu_shares: positive(resources.cpu_shares),
        memory_limit_bytes: (config.memory_limit_in_bytes != 0).then_some(resources.memory_limit_bytes),
        memory_swap_limit_bytes: (config.memory_swap_limit_in_bytes != 0)
            .then_some(resources.memory_swap_limit_bytes),
        oom_score_adj: (config.oom_score_adj != 0).then_some(score),
        hugepage_limits: resources.hugepage_limits.into_iter().collect(),
        unified: resources.unified.into_iter().collect(),
        cpuset: cpuset(Some(config), field, refusals),
    }
}

/// Limits of a pod as kubelet has summed them.
pub(crate) fn pod_limits(config: Option<&v1::LinuxContainerResources>) -> PodLimits {
    let Some(config) = config else {
        return PodLimits::default();
    };
    let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
    let cpu_milli = match (positive(config.cpu_quota), positive(config.cpu_period)) {
        (Some(quota), period) => Some(
            quota
                .saturating_mul(1000)
                .div_ceil(period.unwrap_or(DEFAULT_PERIOD_MICROS)),
        ),
        (None, _) => None,
    };
    PodLimits {
        cpu_milli,
        memory_bytes: positive(config.memory_limit_in_bytes),
    }
}

/// The kernel's own cpu.max period.
const DEFAULT_PERIOD_MICROS: u64 = 100_000;

/// CPUs and memory nodes of the host. They pin the VM there, and never reach the guest, which numbers its own.
pub(crate) fn cpuset(
    config: Option<&v1::LinuxContainerResources>,
    field: &str,
    refusals: &mut Refusals,
) -> Cpuset {
    let Some(config) = config else {
        return Cpuset::default();
    };
    for (name, list) in [
        ("cpuset_cpus", &config.cpuset_cpus),
        ("cpuset_mems", &config.cpuset_mems),
    ] {
        if let Err(error) = caisson_sandbox::cpuset::parse(list) {
            refusals.add(format!("{field}.{name}"), error.to_string());
        }
    }
    Cpuset {
        cpus: config.cpuset_cpus.clone(),
        mems: config.cpuset_mems.clone(),
    }
}

/// The CRI's words for a container's resources, to be answered in its status.
#[must_use]
pub(crate) fn answered(
    resources: &guest::Resources,
    oom_score_adj: i32,
    cpuset: &Cpuset,
) -> v1::LinuxContainerResources {
    let amount = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    v1::LinuxContainerResources {
        cpu_period: amount(resources.cpu_period_micros),
        cpu_quota: resources.cpu_quota_micros,
        cpu_shares: amount(resources.cpu_shares),
        memory_limit_in_bytes: amount(resources.memory_limit_bytes),
        memory_swap_limit_in_bytes: amount(resources.memory_swap_limit_bytes),
        oom_score_adj: i64::from(oom_score_adj),
        cpuset_cpus: cpuset.cpus.clone(),
        cpuset_mems: cpuset.mems.clone(),
        hugepage_limits: resources
            .hugepage_limits
            .iter()
            .map(|(page_size, limit)| v1::HugepageLimit {
                page_size: page_size.clone(),
                limit: *limit,
            })
            .collect(),
        unified: resources
            .unified
            .iter()
            .map(|(file, value)| (file.clone(), value.clone()))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_container_is_given_is_what_its_status_says() {
        let config = v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 987,
            memory_swap_limit_in_bytes: 64 << 20,
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            hugepage_limits: vec![v1::HugepageLimit {
                page_size: "2MB".into(),
                limit: 0,
            }],
            cpuset_cpus: "0-1".into(),
            cpuset_mems: "0".into(),
        };
        let mut refusals = Refusals::default();
        let (resources, score) = container(Some(&config), "r", &mut refusals);
        let cpuset = cpuset(Some(&config), "r", &mut refusals);
        refusals.settle(()).unwrap();
        assert_eq!(answered(&resources, score, &cpuset), config);
    }

    #[test]
    fn impossible_amounts_and_lists_are_refused_together() {
        let config = v1::LinuxContainerResources {
            cpu_shares: -2,
            oom_score_adj: 1001,
            cpuset_cpus: "0-".into(),
            unified: [("../x".to_owned(), String::new())].into(),
            ..Default::default()
        };
        let mut refusals = Refusals::default();
        let _ = container(Some(&config), "r", &mut refusals);
        let _ = cpuset(Some(&config), "r", &mut refusals);
        let text = refusals.to_string();
        for field in ["r.cpu_shares", "r.oom_score_adj", "r.cpuset_cpus", "r.unified"] {
            assert!(text.contains(field), "{text}");
        }
    }

    #[test]
    fn an_update_changes_what_is_set_and_lifts_what_is_minus_one() {
        let change = |config: &v1::LinuxContainerResources| {
            let mut refusals = Refusals::default();
            let change = limit_change(Some(config), "linux", &mut refusals);
            refusals.settle(change)
        };
        assert_eq!(
            change(&v1::LinuxContainerResources::default()),
            Ok(LimitChange::default())
        );
        let lifted = change(&v1::LinuxContainerResources {
            cpu_quota: -1,
            memory_limit_in_bytes: -1,
            memory_swap_limit_in_bytes: -1,
            cpu_shares: 2,
            ..Default::default()
        });
        let expected = LimitChange {
            cpu_quota_micros: Some(0),
            memory_limit_bytes: Some(0),
            memory_swap_limit_bytes: Some(0),
            cpu_shares: Some(2),
            ..LimitChange::default()
        };
        assert_eq!(lifted, Ok(expected));
        let refused = change(&v1::LinuxContainerResources {
            memory_limit_in_bytes: -2,
            cpuset_cpus: "all".into(),
            ..Default::default()
        });
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("linux.memory_limit_in_bytes") && text.contains("linux.cpuset_cpus"),
            "{text}"
        );
    }

    #[test]
    fn a_pods_limits_are_those_that_are_set() {
        let cases = [
            ((0, 0, 0), (None, None)),
            ((-1, 100_000, 0), (None, None)),
            ((150_000, 100_000, 5), (Some(1500), Some(5))),
            ((50_000, 0, 0), (Some(500), None)),
        ];
        for ((quota, period, memory), (cpu, bytes)) in cases {
            let config = v1::LinuxContainerResources {
                cpu_quota: quota,
                cpu_period: period,
                memory_limit_in_bytes: memory,
                ..Default::default()
            };
            let limits = pod_limits(Some(&config));
            assert_eq!((limits.cpu_milli, limits.memory_bytes), (cpu, bytes));
        }
    }
}
