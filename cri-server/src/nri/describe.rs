//! Pods and containers in NRI's words. What plugins are not told: processes, namespaces and cgroups of the host, since a container has none
//! there.

use std::time::{SystemTime, UNIX_EPOCH};

use caisson_nri::v1alpha1::{
    self as nri, Container, LinuxContainer, LinuxCpu, LinuxMemory, LinuxNamespace, LinuxPodSandbox,
    LinuxResources, Mount, OptionalInt, OptionalInt64, OptionalUInt64, PodSandbox, PosixRlimit,
};
use caisson_sandbox::{
    guest,
    spec::{ContainerSpec, MountRecord, PodLimits, Propagation},
    view::{ContainerState, ContainerView, SandboxView},
};

use crate::translate::nri_limits;

/// Microseconds, against which thousandths of a CPU are told.
const PERIOD_MICROS: u64 = 100_000;

/// A pod.
pub(super) fn pod(view: &SandboxView) -> PodSandbox {
    let spec = &view.spec;
    PodSandbox {
        id: view.id.0.clone(),
        name: spec.identity.name.clone(),
        uid: spec.identity.uid.clone(),
        namespace: spec.identity.namespace.clone(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        runtime_handler: spec.handler.clone(),
        linux: Some(LinuxPodSandbox {
            pod_resources: pod_resources(spec.limits),
            cgroup_parent: spec.cgroup_parent.clone().unwrap_or_default(),
            ..Default::default()
        }),
        pid: 0,
        ips: view.ips.iter().map(ToString::to_string).collect(),
    }
}

fn pod_resources(limits: PodLimits) -> Option<LinuxResources> {
    if limits == PodLimits::default() {
        return None;
    }
    let bytes = limits.memory_bytes.and_then(|bytes| i64::try_from(bytes).ok());
    let quota = limits
        .cpu_milli
        .and_then(|milli| i64::try_from(milli.saturating_mul(PERIOD_MICROS) / 1000).ok());
    Some(LinuxResources {
        memory: bytes.map(|value| LinuxMemory {
            limit: Some(OptionalInt64 { value }),
            ..Default::default()
        }),
        cpu: quota.map(|value| LinuxCpu {
            quota: Some(OptionalInt64 { value }),
            period: Some(OptionalUInt64 { value: PERIOD_MICROS }),
            ..Default::default()
        }),
        ..Default::default()
    })
}

/// A container that is about to be made.
pub(super) fn new_container(view: &ContainerView) -> Container {
    Container {
        created_at: 0,
        ..container(view)
    }
}

/// A container.
pub(super) fn container(view: &ContainerView) -> Container {
    let spec = &view.spec;
    let process = spec.guest.process.clone().unwrap_or_default();
    let text = |words: &[Vec<u8>]| -> Vec<String> {
        words
            .iter()
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect()
    };
    let life = Life::of(&view.state);
    Container {
        id: view.id.0.clone(),
        pod_sandbox_id: view.sandbox_id.0.clone(),
        name: spec.name.clone(),
        state: life.state.into(),
        labels: spec.labels.clone(),
        annotations: spec.annotations.clone(),
        args: text(&process.args),
        env: text(&process.env),
        mounts: mounts(spec),
        hooks: None,
        rlimits: process
            .rlimits
            .iter()
            .map(|limit| PosixRlimit {
                r#type: limit.r#type.clone(),
                hard: limit.hard,
                soft: limit.soft,
            })
            .collect(),
        linux: Some(linux(spec, &process)),
        pid: 0,
        created_at: nanos(view.created_at),
        started_at: life.started_at,
        finished_at: life.finished_at,
        exit_code: life.exit_code,
        status_reason: life.reason,
        status_message: life.message,
        cdi_devices: Vec::new(),
        user: view.user.as_ref().map(|user| nri::User {
            uid: user.uid,
            gid: user.gid,
            additional_gids: user.supplemental_gids.clone(),
        }),
        image: Some(nri::Image {
            name: spec.image.user_reference.clone(),
            digest: spec
                .image
                .reference
                .split_once('@')
                .map_or_else(String::new, |(_, digest)| digest.to_owned()),
            config_digest: spec.image.id.clone(),
        }),
    }
}

fn linux(spec: &ContainerSpec, process: &guest::Process) -> LinuxContainer {
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup", "network"];
    LinuxContainer {
        // In the guest; a path would mean the host.
        namespaces: namespaces
            .iter()
            .map(|kind| LinuxNamespace {
                r#type: (*kind).to_owned(),
                path: String::new(),
            })
            .collect(),
        resources: spec
            .guest
            .resources
            .as_ref()
            .map(|resources| nri_limits::from_guest(resources, &spec.cpuset)),
        oom_score_adj: Some(OptionalInt {
            value: process.oom_score_adj.into(),
        }),
        ..Default::default()
    }
}

fn mounts(spec: &ContainerSpec) -> Vec<Mount> {
    let asked = spec
        .mounts
        .iter()
        .filter(|mount| mount.image.is_none())
        .map(mount);
    let tmpfs = spec.guest.mounts.iter().filter_map(|mount| {
        let Some(guest::mount::Source::Tmpfs(tmpfs)) = &mount.source else {
            return None;
        };
        let mut options = vec![
            (if mount.readonly { "ro" } else { "rw" }).to_owned(),
            format!("mode={:o}", tmpfs.mode),
        ];
        if tmpfs.size_bytes > 0 {
            options.push(format!("size={}", tmpfs.size_bytes));
        }
        Some(Mount {
            destination: mount.destination.clone(),
            r#type: "tmpfs".into(),
            source: "tmpfs".into(),
            options,
        })
    });
    asked.chain(tmpfs).collect()
}

fn mount(record: &MountRecord) -> Mount {
    let access = match (record.readonly, record.recursive_readonly) {
        (_, true) => "rro",
        (true, false) => "ro",
        (false, false) => "rw",
    };
    let propagation = match record.propagation {
        Propagation::Private => "rprivate",
        Propagation::Slave => "rslave",
        Propagation::Shared => "rshared",
    };
    Mount {
        destination: record.container_path.clone(),
        r#type: "bind".into(),
        source: record.host_path.clone(),
        options: ["rbind", propagation, access].map(str::to_owned).into(),
    }
}

#[derive(Default)]
struct Life {
    state: nri::ContainerState,
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
    reason: String,
    message: String,
}

impl Life {
    fn of(state: &ContainerState) -> Self {
        match state {
            ContainerState::Created => Self {
                state: nri::ContainerState::ContainerCreated,
                ..Self::default()
            },
            ContainerState::Running { started_at } => Self {
                state: nri::ContainerState::ContainerRunning,
                started_at: nanos(*started_at),
                ..Self::default()
            },
            ContainerState::Exited {
                started_at,
                finished_at,
                exit_code,
                reason,
                message,
            } => Self {
                state: nri::ContainerState::ContainerStopped,
                started_at: started_at.map_or(0, nanos),
                finished_at: nanos(*finished_at),
                exit_code: *exit_code,
                reason: reason.clone(),
                message: message.clone(),
            },
            ContainerState::Unknown => Self::default(),
        }
    }
}

/// Nanoseconds since the epoch.
fn nanos(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
