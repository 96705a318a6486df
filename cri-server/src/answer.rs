//! From the domain's snapshots to CRI answers, and the filters of list calls.

use std::{
    collections::{BTreeMap, HashMap},
    time::{SystemTime, UNIX_EPOCH},
};

use caisson_cri_api::v1;
use caisson_image::Image;
use caisson_sandbox::{
    guest,
    spec::{ContainerSpec, PodSpec, Propagation},
    view::{ContainerState, ContainerView, SandboxState, SandboxView},
};

use crate::translate;

/// Nanoseconds since the epoch, as the CRI has all its timestamps.
#[must_use]
pub fn nanos(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A pod in a list.
#[must_use]
pub fn sandbox(view: SandboxView) -> v1::PodSandbox {
    v1::PodSandbox {
        metadata: Some(pod_metadata(&view.spec)),
        state: pod_state(view.state) as i32,
        created_at: nanos(view.created_at),
        id: view.id.0,
        labels: map(view.spec.labels),
        annotations: map(view.spec.annotations),
        runtime_handler: view.spec.handler,
    }
}

/// A pod in its status.
#[must_use]
pub fn sandbox_status(view: SandboxView) -> v1::PodSandboxStatus {
    let mut ips = view.ips.iter().map(ToString::to_string);
    let network = v1::PodSandboxNetworkStatus {
        ip: ips.next().unwrap_or_default(),
        additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
    };
    let pid = if view.spec.guest_pid_namespace {
        v1::NamespaceMode::Node
    } else if view.spec.share_pid_namespace {
        v1::NamespaceMode::Pod
    } else {
        v1::NamespaceMode::Container
    };
    let options = v1::NamespaceOption {
        pid: pid as i32,
        ..Default::default()
    };
    v1::PodSandboxStatus {
        metadata: Some(pod_metadata(&view.spec)),
        state: pod_state(view.state) as i32,
        created_at: nanos(view.created_at),
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace {
                options: Some(options),
            }),
        }),
        id: view.id.0,
        labels: map(view.spec.labels),
        annotations: map(view.spec.annotations),
        runtime_handler: view.spec.handler,
    }
}

pub(crate) fn pod_metadata(spec: &PodSpec) -> v1::PodSandboxMetadata {
    v1::PodSandboxMetadata {
        name: spec.identity.name.clone(),
        uid: spec.identity.uid.clone(),
        namespace: spec.identity.namespace.clone(),
        attempt: spec.identity.attempt,
    }
}

fn pod_state(state: SandboxState) -> v1::PodSandboxState {
    match state {
        SandboxState::Ready => v1::PodSandboxState::SandboxReady,
        SandboxState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

/// Whether a pod is asked for. An id may be a prefix, as crictl sends it.
#[must_use]
pub fn wants_sandbox(filter: &v1::PodSandboxFilter, view: &SandboxView) -> bool {
    view.id.0.starts_with(&filter.id)
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == pod_state(view.state) as i32)
        && selects(&filter.label_selector, &view.spec.labels)
}

/// A container in a list.
#[must_use]
pub fn container(view: ContainerView) -> v1::Container {
    v1::Container {
        pod_sandbox_id: view.sandbox_id.0,
        metadata: Some(container_metadata(&view.spec)),
        image: Some(image_spec(&view.spec)),
        image_ref: view.spec.image.id.clone(),
        state: container_state(&view.state) as i32,
        created_at: nanos(view.created_at),
        image_id: view.spec.image.id,
        id: view.id.0,
        labels: map(view.spec.labels),
        annotations: map(view.spec.annotations),
    }
}

/// A container in its status.
#[must_use]
pub fn container_status(view: ContainerView) -> v1::ContainerStatus {
    let life = Life::of(&view.state);
    let user = view.user.as_ref().map(|user| v1::ContainerUser {
        linux: Some(v1::LinuxContainerUser {
            uid: i64::from(user.uid),
            gid: i64::from(user.gid),
            supplemental_groups: user.supplemental_gids.iter().copied().map(i64::from).collect(),
        }),
    });
    v1::ContainerStatus {
        metadata: Some(container_metadata(&view.spec)),
        state: container_state(&view.state) as i32,
        created_at: nanos(view.created_at),
        started_at: life.started_at,
        finished_at: life.finished_at,
        exit_code: life.exit_code,
        reason: life.reason,
        message: life.message,
        image: Some(image_spec(&view.spec)),
        image_ref: view.spec.image.reference.clone(),
        image_id: view.spec.image.id.clone(),
        mounts: mounts(&view.spec),
        log_path: view
            .log_path
            .map(|path| path.to_string_lossy().into_owned())
            .unwrap_or_default(),
        resources: Some(v1::ContainerResources {
            linux: Some(resources(&view.spec)),
            windows: None,
        }),
        user,
        stop_signal: translate::cri_signal(view.spec.stop_signal) as i32,
        id: view.id.0,
        labels: map(view.spec.labels),
        annotations: map(view.spec.annotations),
    }
}

/// The part of a status that tells a container's life; zero and empty where it has not come to that.
#[derive(Default)]
struct Life {
    started_at: i64,
    finished_at: i64,
    exit_code: i32,
    reason: String,
    message: String,
}

impl Life {
    fn of(state: &ContainerState) -> Self {
        match state {
            ContainerState::Created => Self::default(),
            ContainerState::Running { started_at } => Self {
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
                started_at: started_at.map_or(0, nanos),
                finished_at: nanos(*finished_at),
                exit_code: *exit_code,
                reason: reason.clone(),
                message: message.clone(),
            },
            ContainerState::Unknown => Self {
                reason: "Unknown".into(),
                message: "the pod could not be reached after the daemon's restart".into(),
                ..Self::default()
            },
        }
    }
}

pub(crate) fn container_metadata(spec: &ContainerSpec) -> v1::ContainerMetadata {
    v1::ContainerMetadata {
        name: spec.name.clone(),
        attempt: spec.attempt,
    }
}

fn container_state(state: &ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running { .. } => v1::ContainerState::ContainerRunning,
        ContainerState::Exited { .. } => v1::ContainerState::ContainerExited,
        ContainerState::Unknown => v1::ContainerState::ContainerUnknown,
    }
}

fn image_spec(spec: &ContainerSpec) -> v1::ImageSpec {
    v1::ImageSpec {
        image: spec.image.user_reference.clone(),
        user_specified_image: spec.image.user_reference.clone(),
        ..Default::default()
    }
}

fn mounts(spec: &ContainerSpec) -> Vec<v1::Mount> {
    spec.mounts
        .iter()
        .map(|mount| v1::Mount {
            container_path: mount.container_path.clone(),
            host_path: mount.host_path.clone(),
            readonly: mount.readonly,
            recursive_read_only: mount.recursive_readonly,
            propagation: match mount.propagation {
                Propagation::Private => v1::MountPropagation::PropagationPrivate,
                Propagation::Slave => v1::MountPropagation::PropagationHostToContainer,
                Propagation::Shared => v1::MountPropagation::PropagationBidirectional,
            }
            .into(),
            image: mount.image.as_ref().map(|image| v1::ImageSpec {
                image: image.image.clone(),
                user_specified_image: image.user_specified.clone(),
                ..Default::default()
            }),
            image_sub_path: mount
                .image
                .as_ref()
                .map_or_else(String::new, |image| image.sub_path.clone()),
            ..Default::default()
        })
        .collect()
}

fn resources(spec: &ContainerSpec) -> v1::LinuxContainerResources {
    let (spec, cpuset) = (&spec.guest, &spec.cpuset);
    let score = spec.process.as_ref().map_or(0, |process| process.oom_score_adj);
    let absent = guest::Resources::default();
    translate::answered_resources(spec.resources.as_ref().unwrap_or(&absent), score, cpuset)
}

/// Whether a container is asked for. Ids may be prefixes, as crictl sends them.
#[must_use]
pub fn wants_container(filter: &v1::ContainerFilter, view: &ContainerView) -> bool {
    view.id.0.starts_with(&filter.id)
        && view.sandbox_id.0.starts_with(&filter.pod_sandbox_id)
        && filter
            .state
            .as_ref()
            .is_none_or(|wanted| wanted.state == container_state(&view.state) as i32)
        && selects(&filter.label_selector, &view.spec.labels)
}

/// An image.
#[must_use]
pub fn image(image: Image) -> v1::Image {
    let user = image.config.user.split(':').next().unwrap_or_default();
    let uid = user.parse::<u32>().ok();
    v1::Image {
        uid: uid.map(|uid| v1::Int64Value {
            value: i64::from(uid),
        }),
        username: if uid.is_some() {
            String::new()
        } else {
            user.to_owned()
        },
        id: image.id,
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size: image.size_bytes,
        spec: None,
        pinned: image.pinned,
    }
}

/// Every label of the selector has exactly this value.
pub(crate) fn selects(selector: &HashMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

pub(crate) fn map(map: BTreeMap<String, String>) -> HashMap<String, String> {
    map.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use caisson_image::ImageConfig;
    use caisson_sandbox::{ContainerId, SandboxId, view::LinuxUser};

    use super::*;

    fn pod() -> SandboxView {
        let spec = translate::pod_spec(v1::RunPodSandboxRequest {
            config: Some(v1::PodSandboxConfig {
                metadata: Some(v1::PodSandboxMetadata {
                    name: "p".into(),
                    uid: "u".into(),
                    namespace: "n".into(),
                    attempt: 1,
                }),
                labels: [("app".to_owned(), "web".to_owned())].into(),
                ..Default::default()
            }),
            runtime_handler: "caisson".into(),
        })
        .unwrap();
        SandboxView {
            id: SandboxId("abcdef".into()),
            spec,
            state: SandboxState::Ready,
            created_at: UNIX_EPOCH + Duration::from_nanos(7),
            ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            info: serde_json::Value::Null,
        }
    }

    fn stored() -> Image {
        Image {
            id: "sha256:1".into(),
            repo_tags: vec![],
            repo_digests: vec![],
            size_bytes: 5,
            pinned: false,
            config: ImageConfig {
                cmd: vec!["sh".into()],
                ..Default::default()
            },
            disk: vec!["/d".into()],
            pulled_at: UNIX_EPOCH,
        }
    }

    fn exited() -> ContainerView {
        let pod = pod();
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: "c".into(),
                attempt: 0,
            }),
            labels: [("tier".to_owned(), "front".to_owned())].into(),
            ..Default::default()
        };
        ContainerView {
            id: ContainerId("123456".into()),
            sandbox_id: pod.id.clone(),
            spec: translate::container_spec(config, &pod.spec, &stored(), &translate::MountImages::new())
                .unwrap(),
            state: ContainerState::Exited {
                started_at: Some(UNIX_EPOCH + Duration::from_nanos(8)),
                finished_at: UNIX_EPOCH + Duration::from_nanos(9),
                exit_code: 137,
                reason: "OOMKilled".into(),
                message: "m".into(),
            },
            created_at: UNIX_EPOCH + Duration::from_nanos(7),
            log_path: Some("/log/c/0.log".into()),
            user: Some(LinuxUser {
                uid: 1,
                gid: 2,
                supplemental_gids: vec![2, 3],
            }),
        }
    }

    #[test]
    fn a_pods_status_says_what_it_was_asked_for_and_what_it_got() {
        let status = sandbox_status(pod());
        assert_eq!(status.runtime_handler, "caisson");
        assert_eq!(status.created_at, 7);
        let network = status.network.unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips[0].ip, "fd00::2");
        let options = status.linux.unwrap().namespaces.unwrap().options.unwrap();
        assert_eq!(options.pid, v1::NamespaceMode::Pod as i32);
    }

    #[test]
    fn an_exited_containers_status_is_complete() {
        let status = container_status(exited());
        assert_eq!(
            (status.created_at, status.started_at, status.finished_at),
            (7, 8, 9)
        );
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(status.log_path, "/log/c/0.log");
        assert_eq!(status.image_id, "sha256:1");
        assert_eq!(status.stop_signal, v1::Signal::Sigterm as i32);
        assert_eq!(status.user.unwrap().linux.unwrap().supplemental_groups, [2, 3]);
    }

    #[test]
    fn pods_are_filtered_by_prefix_state_and_labels() {
        let view = pod();
        let filter = |id: &str, state: Option<i32>, label: Option<(&str, &str)>| v1::PodSandboxFilter {
            id: id.into(),
            state: state.map(|state| v1::PodSandboxStateValue { state }),
            label_selector: label
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into_iter()
                .collect(),
        };
        for (filter, wanted) in [
            (filter("", None, None), true),
            (filter("abc", None, None), true),
            (filter("b", None, None), false),
            (filter("", Some(0), None), true),
            (filter("", Some(1), None), false),
            (filter("", None, Some(("app", "web"))), true),
            (filter("", None, Some(("app", "db"))), false),
            (filter("", None, Some(("zone", ""))), false),
        ] {
            assert_eq!(wants_sandbox(&filter, &view), wanted, "{filter:?}");
        }
    }

    #[test]
    fn containers_are_filtered_by_prefix_pod_state_and_labels() {
        let view = exited();
        let filter =
            |id: &str, pod: &str, state: Option<i32>, label: Option<(&str, &str)>| v1::ContainerFilter {
                id: id.into(),
                pod_sandbox_id: pod.into(),
                state: state.map(|state| v1::ContainerStateValue { state }),
                label_selector: label
                    .map(|(key, value)| (key.to_owned(), value.to_owned()))
                    .into_iter()
                    .collect(),
            };
        for (filter, wanted) in [
            (filter("", "", None, None), true),
            (filter("1234", "abcdef", None, None), true),
            (filter("", "ff", None, None), false),
            (filter("", "", Some(2), None), true),
            (filter("", "", Some(1), None), false),
            (filter("", "", None, Some(("tier", "front"))), true),
            (filter("", "", None, Some(("tier", "back"))), false),
        ] {
            assert_eq!(wants_container(&filter, &view), wanted, "{filter:?}");
        }
    }

    #[test]
    fn an_images_user_is_a_number_or_a_name() {
        for (user, uid, name) in [
            ("", None, ""),
            ("0", Some(0), ""),
            ("1003:1004", Some(1003), ""),
            ("www-data:1004", None, "www-data"),
        ] {
            let mut stored = stored();
            stored.config.user = user.into();
            let answer = image(stored);
            assert_eq!(answer.uid.map(|uid| uid.value), uid, "{user}");
            assert_eq!(answer.username, name, "{user}");
        }
    }
}
