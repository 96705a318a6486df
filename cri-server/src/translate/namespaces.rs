//! Namespace options. A pod is a VM, so a namespace of the host is never to be had; the guest stands in for it where that is of use.

use caisson_cri_api::v1::{self, NamespaceMode};
use caisson_sandbox::{guest, spec::PodSpec};

use super::Refusals;

/// What the containers of a pod share.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct PodNamespaces {
    /// One PID namespace of the pod's.
    pub(super) share_pid: bool,
    /// The guest's own PID namespace.
    pub(super) guest_pid: bool,
    /// A user namespace of the pod's.
    pub(super) users: Option<guest::UserNamespace>,
}

impl From<&PodSpec> for PodNamespaces {
    fn from(spec: &PodSpec) -> Self {
        Self {
            share_pid: spec.share_pid_namespace,
            guest_pid: spec.guest_pid_namespace,
            users: spec.user_namespace.clone(),
        }
    }
}

/// Checks a pod's options. Absent options are the zero values: POD.
pub(super) fn pod_namespaces(
    options: Option<&v1::NamespaceOption>,
    field: &str,
    refusals: &mut Refusals,
) -> PodNamespaces {
    let absent = v1::NamespaceOption::default();
    let options = options.unwrap_or(&absent);
    common(options, field, refusals);
    let mut namespaces = PodNamespaces {
        users: users(
            options.userns_options.as_ref(),
            &format!("{field}.userns_options"),
            refusals,
        ),
        ..PodNamespaces::default()
    };
    let field = format!("{field}.pid");
    match NamespaceMode::try_from(options.pid) {
        Ok(NamespaceMode::Pod) => namespaces.share_pid = true,
        Ok(NamespaceMode::Container) => {}
        Ok(NamespaceMode::Node) => namespaces.guest_pid = true,
        Ok(NamespaceMode::Target) => refusals.add(field, "TARGET is for containers only"),
        Err(_) => unknown(options.pid, field, refusals),
    }
    namespaces
}

/// Checks a container's options and answers whose PID namespace it has. Absent options follow the pod.
pub(super) fn container_pid(
    options: Option<&v1::NamespaceOption>,
    pod: &PodNamespaces,
    field: &str,
    refusals: &mut Refusals,
) -> guest::PidNamespace {
    let Some(options) = options else {
        return match (pod.guest_pid, pod.share_pid) {
            (true, _) => guest::PidNamespace::PidNode,
            (false, true) => guest::PidNamespace::PidPod,
            (false, false) => guest::PidNamespace::PidContainer,
        };
    };
    common(options, field, refusals);
    if options.userns_options.is_some() {
        let field = format!("{field}.userns_options");
        let wanted = users(options.userns_options.as_ref(), &field, refusals);
        refusals.add_if(wanted != pod.users, &field, "must be those of the pod");
    }
    let is_target = options.pid == NamespaceMode::Target as i32;
    refusals.add_if(
        is_target && options.target_id.is_empty(),
        &format!("{field}.target_id"),
        "is needed when pid is TARGET",
    );
    refusals.add_if(
        !is_target && !options.target_id.is_empty(),
        &format!("{field}.target_id"),
        "is only possible when pid is TARGET",
    );
    let field = format!("{field}.pid");
    match NamespaceMode::try_from(options.pid) {
        Ok(NamespaceMode::Pod) => {
            refusals.add_if(
                !pod.share_pid,
                &field,
                "POD needs a pod that was run with pid POD",
            );
            guest::PidNamespace::PidPod
        }
        Ok(NamespaceMode::Container) => guest::PidNamespace::PidContainer,
        Ok(NamespaceMode::Target) => guest::PidNamespace::PidTarget,
        Ok(NamespaceMode::Node) => {
            refusals.add_if(
                !pod.guest_pid,
                &field,
                "NODE needs a pod that was run with pid NODE",
            );
            guest::PidNamespace::PidNode
        }
        Err(_) => {
            unknown(options.pid, field, refusals);
            guest::PidNamespace::PidContainer
        }
    }
}

/// Takes the mappings out of mounts that have the pod's: they hold for every mount of a pod with a user namespace. Others stay, and are
/// refused with the mount.
pub(super) fn settle_mappings(list: &mut [v1::Mount], pod: &PodNamespaces) {
    let Some(users) = &pod.users else { return };
    let same = |lines: &[v1::IdMapping], pod: &[guest::IdMapping]| {
        lines.len() == pod.len()
            && lines.iter().zip(pod).all(|(line, pod)| {
                (line.container_id, line.host_id, line.length) == (pod.container_id, pod.host_id, pod.length)
            })
    };
    for mount in list {
        if same(&mount.uid_mappings, &users.uids) && same(&mount.gid_mappings, &users.gids) {
            mount.uid_mappings.clear();
            mount.gid_mappings.clear();
        }
    }
}

/// The container whose PID namespace the request names, when it names one.
#[must_use]
pub fn target_container(config: &v1::ContainerConfig) -> Option<&str> {
    let options = config
        .linux
        .as_ref()?
        .security_context
        .as_ref()?
        .namespace_options
        .as_ref()?;
    (options.pid == NamespaceMode::Target as i32 && !options.target_id.is_empty())
        .then_some(options.target_id.as_str())
}

fn common(options: &v1::NamespaceOption, field: &str, refusals: &mut Refusals) {
    for (name, value) in [("network", options.network), ("ipc", options.ipc)] {
        let field = format!("{field}.{name}");
        match NamespaceMode::try_from(value) {
            Ok(NamespaceMode::Pod) => {}
            Ok(NamespaceMode::Node) => refusals.add(field, "NODE is not possible for a pod that is a VM"),
            Ok(mode) => refusals.add(
                field,
                format!(
                    "{} is not possible: containers of a pod share it",
                    mode.as_str_name()
                ),
            ),
            Err(_) => unknown(value, field, refusals),
        }
    }
}

/// The mapping of a pod's user namespace: one range each, in which the pod's root is.
fn users(
    options: Option<&v1::UserNamespace>,
    field: &str,
    refusals: &mut Refusals,
) -> Option<guest::UserNamespace> {
    let options = options?;
    match NamespaceMode::try_from(options.mode) {
        Ok(NamespaceMode::Pod) => Some(guest::UserNamespace {
            uids: range(&options.uids, &format!("{field}.uids"), refusals),
            gids: range(&options.gids, &format!("{field}.gids"), refusals),
        }),
        Ok(NamespaceMode::Node) => {
            refusals.add_if(
                !options.uids.is_empty() || !options.gids.is_empty(),
                field,
                "NODE has no mappings",
            );
            None
        }
        Ok(mode) => {
            refusals.add(
                format!("{field}.mode"),
                format!(
                    "{} is not possible: the containers of a pod share it",
                    mode.as_str_name()
                ),
            );
            None
        }
        Err(_) => {
            unknown(options.mode, format!("{field}.mode"), refusals);
            None
        }
    }
}

fn range(list: &[v1::IdMapping], field: &str, refusals: &mut Refusals) -> Vec<guest::IdMapping> {
    let [line] = list else {
        refusals.add(field, format!("must be one mapping, not {}", list.len()));
        return Vec::new();
    };
    let ends = line.host_id.checked_add(line.length).is_some();
    refusals.add_if(line.container_id != 0, field, "must map the pod's 0");
    refusals.add_if(
        line.length == 0 || !ends,
        field,
        "is not a range of ids below 2^32",
    );
    vec![guest::IdMapping {
        container_id: line.container_id,
        host_id: line.host_id,
        length: line.length,
    }]
}

fn unknown(value: i32, field: String, refusals: &mut Refusals) {
    refusals.add(field, format!("unknown namespace mode {value}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> v1::NamespaceOption {
        v1::NamespaceOption {
            network: network as i32,
            pid: pid as i32,
            ipc: ipc as i32,
            ..Default::default()
        }
    }

    const SHARED: PodNamespaces = PodNamespaces {
        share_pid: true,
        guest_pid: false,
        users: None,
    };
    const APART: PodNamespaces = PodNamespaces {
        share_pid: false,
        guest_pid: false,
        users: None,
    };
    const GUEST: PodNamespaces = PodNamespaces {
        share_pid: false,
        guest_pid: true,
        users: None,
    };

    #[test]
    fn host_namespaces_of_a_pod_are_refused_by_name() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let cases = [
            (
                options(Node, Pod, Pod),
                "n.network: NODE is not possible for a pod that is a VM",
            ),
            (
                options(Pod, Pod, Node),
                "n.ipc: NODE is not possible for a pod that is a VM",
            ),
            (options(Pod, Target, Pod), "n.pid: TARGET is for containers only"),
            (
                options(Container, Pod, Pod),
                "n.network: CONTAINER is not possible: containers of a pod share it",
            ),
        ];
        for (options, message) in cases {
            let mut refusals = Refusals::default();
            pod_namespaces(Some(&options), "n", &mut refusals);
            assert_eq!(refusals.to_string(), message);
        }
    }

    #[test]
    fn a_pod_without_options_shares_its_pid_namespace_as_the_zero_values_say() {
        use NamespaceMode::{Container, Node, Pod};
        let mut refusals = Refusals::default();
        assert_eq!(pod_namespaces(None, "n", &mut refusals), SHARED);
        for (mode, namespaces) in [(Pod, SHARED), (Container, APART), (Node, GUEST)] {
            let options = options(Pod, mode, Pod);
            assert_eq!(pod_namespaces(Some(&options), "n", &mut refusals), namespaces);
        }
        refusals.settle(()).unwrap();
    }

    #[test]
    fn a_container_follows_the_pod_or_says_what_it_wants() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let mut refusals = Refusals::default();
        assert_eq!(
            container_pid(None, &SHARED, "n", &mut refusals),
            guest::PidNamespace::PidPod
        );
        assert_eq!(
            container_pid(None, &APART, "n", &mut refusals),
            guest::PidNamespace::PidContainer
        );
        assert_eq!(
            container_pid(Some(&options(Pod, Container, Pod)), &SHARED, "n", &mut refusals),
            guest::PidNamespace::PidContainer
        );
        assert_eq!(
            container_pid(None, &GUEST, "n", &mut refusals),
            guest::PidNamespace::PidNode
        );
        assert_eq!(
            container_pid(Some(&options(Pod, Node, Pod)), &GUEST, "n", &mut refusals),
            guest::PidNamespace::PidNode
        );
        let target = v1::NamespaceOption {
            target_id: "abc".into(),
            ..options(Pod, Target, Pod)
        };
        assert_eq!(
            container_pid(Some(&target), &APART, "n", &mut refusals),
            guest::PidNamespace::PidTarget
        );
        refusals.settle(()).unwrap();

        let mut refusals = Refusals::default();
        container_pid(Some(&options(Pod, Pod, Pod)), &APART, "n", &mut refusals);
        container_pid(Some(&options(Pod, Node, Pod)), &SHARED, "n", &mut refusals);
        container_pid(Some(&options(Pod, Target, Pod)), &APART, "n", &mut refusals);
        assert_eq!(
            refusals.to_string(),
            "n.pid: POD needs a pod that was run with pid POD; n.pid: NODE needs a pod that was run with pid NODE; n.target_id: is needed when pid is TARGET"
        );
    }

    fn userns(mode: NamespaceMode, ranges: &[(u32, u32, u32)]) -> v1::NamespaceOption {
        let lines: Vec<_> = ranges
            .iter()
            .map(|(container_id, host_id, length)| v1::IdMapping {
                container_id: *container_id,
                host_id: *host_id,
                length: *length,
            })
            .collect();
        v1::NamespaceOption {
            userns_options: Some(v1::UserNamespace {
                mode: mode as i32,
                uids: lines.clone(),
                gids: lines,
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_user_namespace_is_one_range_with_root_in_it_and_the_containers_share_it() {
        let mut refusals = Refusals::default();
        let wanted = userns(NamespaceMode::Pod, &[(0, 1000, 100_000)]);
        let pod = pod_namespaces(Some(&wanted), "n", &mut refusals);
        let line = pod.users.as_ref().map(|users| users.uids[0]);
        assert_eq!(
            line.map(|line| (line.host_id, line.length)),
            Some((1000, 100_000))
        );
        container_pid(Some(&wanted), &pod, "n", &mut refusals);
        container_pid(None, &pod, "n", &mut refusals);
        let node = userns(NamespaceMode::Node, &[]);
        assert_eq!(pod_namespaces(Some(&node), "n", &mut refusals).users, None);
        refusals.settle(()).unwrap();
        let mut refusals = Refusals::default();
        container_pid(Some(&node), &pod, "n", &mut refusals);
        assert_eq!(refusals.to_string(), "n.userns_options: must be those of the pod");
    }

    #[test]
    fn other_user_namespaces_are_refused() {
        for (options, words) in [
            (
                userns(NamespaceMode::Pod, &[]),
                "uids: must be one mapping, not 0",
            ),
            (
                userns(NamespaceMode::Pod, &[(0, 1000, 10), (0, 2000, 10)]),
                "uids: must be one mapping, not 2",
            ),
            (
                userns(NamespaceMode::Pod, &[(1, 1000, 10)]),
                "uids: must map the pod's 0",
            ),
            (
                userns(NamespaceMode::Pod, &[(0, 1000, 0)]),
                "gids: is not a range",
            ),
            (
                userns(NamespaceMode::Pod, &[(0, u32::MAX, 2)]),
                "uids: is not a range",
            ),
            (
                userns(NamespaceMode::Node, &[(0, 1000, 10)]),
                "NODE has no mappings",
            ),
            (
                userns(NamespaceMode::Container, &[]),
                "mode: CONTAINER is not possible",
            ),
            (userns(NamespaceMode::Target, &[]), "mode: TARGET is not possible"),
        ] {
            let mut refusals = Refusals::default();
            pod_namespaces(Some(&options), "n", &mut refusals);
            assert!(refusals.to_string().contains(words), "{refusals}");
        }
    }
}
