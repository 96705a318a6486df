//! What pods and containers use: asked of the guest, and joined with what is known of them here.
//!
//! The guest's numbers are its own claim about itself and are passed on as such; its clock is not trusted, so its time stamps are kept within
//! the time of the call. Must not know what the numbers mean to Kubernetes.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::task::JoinSet;

use crate::{
    SandboxError, Sandboxes, guest,
    registry::{Handle, Request},
    view::{ContainerView, SandboxView},
};

/// How long a list waits for a guest before it goes on without it.
const LIST_DEADLINE: Duration = Duration::from_secs(5);

/// Shortest time over which a rate is taken.
const RATE_WINDOW: Duration = Duration::from_secs(1);

/// What a pod uses.
#[derive(Debug, Clone)]
pub struct PodUsage {
    /// The pod.
    pub sandbox: SandboxView,
    /// All of it: on a host with cgroup v2 what its group there is charged, VMM and guest kernel included; else its containers together.
    pub total: Usage,
    /// Each container that is there.
    pub containers: Vec<ContainerUsage>,
    /// The pod's network interfaces as the guest counts, its first one first.
    pub interfaces: Vec<guest::InterfaceStats>,
}

/// What a container uses.
#[derive(Debug, Clone)]
pub struct ContainerUsage {
    /// The container.
    pub view: ContainerView,
    /// From its cgroup.
    pub usage: Usage,
    /// Its writable layer; `None` when it has not been measured yet.
    pub layer: Option<guest::LayerStats>,
}

/// The counters of a cgroup.
#[derive(Debug, Clone)]
pub struct Usage {
    /// As the guest's kernel has them, with a time stamp within the call.
    pub cgroup: guest::CgroupStats,
    /// Thousand-millionths of a CPU, over at least [`RATE_WINDOW`] before this reading; `None` before there are two.
    pub nano_cores: Option<u64>,
}

/// What is read for a pod at one time.
pub(crate) struct Readings {
    /// By the guest.
    pub(crate) guest: guest::StatsReply,
    /// Of the pod's group on the host; `None` where it has none.
    pub(crate) host: Option<guest::CgroupStats>,
}

impl Sandboxes {
    /// What one pod uses.
    pub async fn pod_usage(&self, id: &str) -> Result<PodUsage, SandboxError> {
        let handle = self.inner.registry.pod(id)?;
        let limit = self.inner.node.config.agent_deadline;
        self.usage_of(&handle, Vec::new(), limit).await
    }

    /// What one container uses.
    pub async fn container_usage(&self, id: &str) -> Result<ContainerUsage, SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        let limit = self.inner.node.config.agent_deadline;
        let pod = self.usage_of(&handle, vec![view.id.0.clone()], limit).await?;
        pod.containers
            .into_iter()
            .next()
            .ok_or(SandboxError::NoContainer(view.id.0))
    }

    /// What the pods use that `wanted` wants. Those that have no VM, or whose guest does not answer in time, are left out.
    pub async fn list_usage(&self, wanted: impl Fn(&SandboxView) -> bool) -> Vec<PodUsage> {
        let mut asked = JoinSet::new();
        for handle in self.inner.registry.handles() {
            let latest = handle.latest();
            if latest.listed && latest.runs() && wanted(&latest.sandbox) {
                let pods = self.clone();
                asked.spawn(async move { pods.usage_of(&handle, Vec::new(), LIST_DEADLINE).await });
            }
        }
        let mut all = Vec::new();
        while let Some(answer) = asked.join_next().await {
            match answer {
                Ok(Ok(usage)) => all.push(usage),
                Ok(Err(error)) => tracing::debug!(error = %error.chain(), "pod left out of a list of usage"),
                Err(error) => tracing::error!(%error, "task that asks for usage failed"),
            }
        }
        all.sort_by(|one, other| one.sandbox.id.cmp(&other.sandbox.id));
        self.forget_rates();
        all
    }

    async fn usage_of(
        &self,
        handle: &Handle,
        ids: Vec<String>,
        limit: Duration,
    ) -> Result<PodUsage, SandboxError> {
        let began = SystemTime::now();
        let whole = ids.is_empty();
        let Readings {
            guest: mut stats,
            host,
        } = self
            .ask(handle, "question for usage", |reply| Request::Usage {
                ids,
                limit,
                reply,
            })
            .await?;
        let window = nanos(began)..=nanos(SystemTime::now());
        let latest = handle.latest();
        let pod = latest.sandbox.id.0.clone();
        let usage = |id: &str, cgroup: Option<guest::CgroupStats>| {
            let mut cgroup = cgroup.unwrap_or_default();
            cgroup.timestamp_nanos = cgroup.timestamp_nanos.clamp(*window.start(), *window.end());
            let nano_cores =
                self.inner
                    .rates
                    .take(id, cgroup.timestamp_nanos, cgroup.usage_usec.saturating_mul(1000));
            Usage { cgroup, nano_cores }
        };
        let containers = latest
            .containers
            .iter()
            .filter_map(|view| {
                let at = stats
                    .containers
                    .iter()
                    .position(|stats| stats.container_id == view.id.0)?;
                let stats = stats.containers.swap_remove(at);
                let layer = stats.layer.map(|layer| guest::LayerStats {
                    timestamp_nanos: layer.timestamp_nanos.min(*window.end()),
                    ..layer
                });
                Some(ContainerUsage {
                    usage: usage(&view.id.0, stats.cgroup),
                    view: view.clone(),
                    layer,
                })
            })
            .collect();
        let total = if whole {
            usage(&pod, whole_pod(stats.pod, host))
        } else {
            Usage {
                cgroup: stats.pod.unwrap_or_default(),
                nano_cores: None,
            }
        };
        Ok(PodUsage {
            sandbox: latest.sandbox.clone(),
            total,
            containers,
            interfaces: stats.interfaces,
        })
    }

    fn forget_rates(&self) {
        let mut known = HashSet::new();
        for handle in self.inner.registry.handles() {
            let latest = handle.latest();
            known.insert(latest.sandbox.id.0.clone());
            known.extend(latest.containers.iter().map(|view| view.id.0.clone()));
        }
        self.inner.rates.keep(&known);
    }
}

/// What the host charges to the pod, with the guest's count of processes; where the host counts nothing, what the containers use.
fn whole_pod(
    containers: Option<guest::CgroupStats>,
    host: Option<guest::CgroupStats>,
) -> Option<guest::CgroupStats> {
    let Some(host) = host else { return containers };
    let containers = containers.unwrap_or_default();
    Some(guest::CgroupStats {
        processes: containers.processes,
        tasks: containers.tasks,
        tasks_max: containers.tasks_max,
        ..host
    })
}

pub(crate) fn nanos(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The last readings of CPU time, from which rates are made.
#[derive(Default)]
pub(crate) struct Rates {
    last: Mutex<HashMap<String, Reading>>,
}

struct Reading {
    at: u64,
    used: u64,
    rate: Option<u64>,
}

impl Rates {
    /// The rate up to a new reading, times and use in nanoseconds. Readings that come too close together answer the rate before.
    fn take(&self, id: &str, at: u64, used: u64) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(before) = last.get_mut(id) else {
            let first = Reading { at, used, rate: None };
            last.insert(id.to_owned(), first);
            return None;
        };
        let passed = at.saturating_sub(before.at);
        if u128::from(passed) >= RATE_WINDOW.as_nanos() {
            let grown = u128::from(used.saturating_sub(before.used));
            let rate = grown * 1_000_000_000 / u128::from(passed);
            *before = Reading {
                at,
                used,
                rate: u64::try_from(rate).ok(),
            };
        }
        before.rate
    }

    fn keep(&self, known: &HashSet<String>) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|id, _| known.contains(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_readings_a_window_apart() {
        let rates = Rates::default();
        assert_eq!(rates.take("c", 10 * SECOND, 0), None);
        assert_eq!(rates.take("c", 10 * SECOND + 1, SECOND), None);
        assert_eq!(rates.take("c", 12 * SECOND, SECOND), Some(SECOND / 2));
        // Too close: the rate before stands, and the base stays where it is.
        assert_eq!(rates.take("c", 12 * SECOND + 5, 9 * SECOND), Some(SECOND / 2));
        assert_eq!(rates.take("c", 14 * SECOND, SECOND), Some(0));
    }

    #[test]
    fn counters_and_clocks_that_go_back_give_no_absurd_rate() {
        let rates = Rates::default();
        assert_eq!(rates.take("c", 10 * SECOND, 5 * SECOND), None);
        assert_eq!(rates.take("c", 9 * SECOND, 0), None);
        assert_eq!(rates.take("c", 12 * SECOND, 0), Some(0));
    }

    #[test]
    fn rates_of_what_is_gone_are_forgotten() {
        let rates = Rates::default();
        rates.take("a", 0, 0);
        rates.take("b", 0, 0);
        rates.keep(&HashSet::from(["a".to_owned()]));
        assert_eq!(rates.last.lock().unwrap().len(), 1);
    }
}
