//! Namespace options. A pod is a VM, so a namespace of the host is never to be had.

use caisson_cri_api::v1::{self, NamespaceMode};
use caisson_sandbox::guest;

use super::Refusals;

/// Checks a pod's options and answers whether its containers share one PID namespace. Absent options are the zero values: POD.
pub(super) fn pod_shares_pid(
    options: Option<&v1::NamespaceOption>,
    field: &str,
    refusals: &mut Refusals,
) -> bool {
    let absent = v1::NamespaceOption::default();
    let options = options.unwrap_or(&absent);
    common(options, field, refusals);
    let field = format!("{field}.pid");
    match NamespaceMode::try_from(options.pid) {
        Ok(NamespaceMode::Pod) => true,
        Ok(NamespaceMode::Container) => false,
        Ok(NamespaceMode::Node) => {
            refusals.add(field, "NODE is not possible for a pod that is a VM");
            false
        }
        Ok(NamespaceMode::Target) => {
            refusals.add(field, "TARGET is for containers only");
            false
        }
        Err(_) => unknown(options.pid, field, refusals),
    }
}

/// Checks a container's options and answers whose PID namespace it has. Absent options follow the pod.
pub(super) fn container_pid(
    options: Option<&v1::NamespaceOption>,
    pod_shares_pid: bool,
    field: &str,
    refusals: &mut Refusals,
) -> guest::PidNamespace {
    let Some(options) = options else {
        return if pod_shares_pid {
            guest::PidNamespace::PidPod
        } else {
            guest::PidNamespace::PidContainer
        };
    };
    common(options, field, refusals);
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
                !pod_shares_pid,
                &field,
                "POD needs a pod that was run with pid POD",
            );
            guest::PidNamespace::PidPod
        }
        Ok(NamespaceMode::Container) => guest::PidNamespace::PidContainer,
        Ok(NamespaceMode::Target) => guest::PidNamespace::PidTarget,
        Ok(NamespaceMode::Node) => {
            refusals.add(field, "NODE is not possible for a pod that is a VM");
            guest::PidNamespace::PidContainer
        }
        Err(_) => {
            unknown(options.pid, field, refusals);
            guest::PidNamespace::PidContainer
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
            Err(_) => {
                unknown(value, field, refusals);
            }
        }
    }
    if let Some(userns) = &options.userns_options {
        let field = format!("{field}.userns_options");
        let mapped = !userns.uids.is_empty() || !userns.gids.is_empty();
        if userns.mode != NamespaceMode::Node as i32 || mapped {
            refusals.add(field, "user namespaces are not supported yet");
        }
    }
}

fn unknown(value: i32, field: String, refusals: &mut Refusals) -> bool {
    refusals.add(field, format!("unknown namespace mode {value}"));
    false
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

    #[test]
    fn host_namespaces_of_a_pod_are_refused_by_name() {
        use NamespaceMode::{Container, Node, Pod, Target};
        let cases = [
            (
                options(Node, Pod, Pod),
                "n.network: NODE is not possible for a pod that is a VM",
            ),
            (
                options(Pod, Node, Pod),
                "n.pid: NODE is not possible for a pod that is a VM",
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
            pod_shares_pid(Some(&options), "n", &mut refusals);
            assert_eq!(refusals.to_string(), message);
        }
    }

    #[test]
    fn a_pod_without_options_shares_its_pid_namespace_as_the_zero_values_say() {
        let mut refusals = Refusals::default();
        assert!(pod_shares_pid(None, "n", &mut refusals));
        assert!(!pod_shares_pid(
            Some(&options(
                NamespaceMode::Pod,
                NamespaceMode::Container,
                NamespaceMode::Pod
            )),
            "n",
            &mut refusals
        ));
        refusals.settle(()).unwrap();
    }

    #[test]
    fn a_container_follows_the_pod_or_says_what_it_wants() {
        use NamespaceMode::{Container, Pod, Target};
        let mut refusals = Refusals::default();
        assert_eq!(
            container_pid(None, true, "n", &mut refusals),
            guest::PidNamespace::PidPod
        );
        assert_eq!(
            container_pid(None, false, "n", &mut refusals),
            guest::PidNamespace::PidContainer
        );
        assert_eq!(
            container_pid(Some(&options(Pod, Container, Pod)), true, "n", &mut refusals),
            guest::PidNamespace::PidContainer
        );
        let target = v1::NamespaceOption {
            target_id: "abc".into(),
            ..options(Pod, Target, Pod)
        };
        assert_eq!(
            container_pid(Some(&target), false, "n", &mut refusals),
            guest::PidNamespace::PidTarget
        );
        refusals.settle(()).unwrap();

        let mut refusals = Refusals::default();
        container_pid(Some(&options(Pod, Pod, Pod)), false, "n", &mut refusals);
        container_pid(Some(&options(Pod, Target, Pod)), false, "n", &mut refusals);
        assert_eq!(
            refusals.to_string(),
            "n.pid: POD needs a pod that was run with pid POD; n.target_id: is needed when pid is TARGET"
        );
    }

    #[test]
    fn a_user_namespace_is_refused_and_the_hosts_mode_is_none() {
        let mut with = options(NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod);
        with.userns_options = Some(v1::UserNamespace {
            mode: NamespaceMode::Node as i32,
            ..Default::default()
        });
        let mut refusals = Refusals::default();
        pod_shares_pid(Some(&with), "n", &mut refusals);
        refusals.settle(()).unwrap();
        with.userns_options = Some(v1::UserNamespace::default());
        let mut refusals = Refusals::default();
        pod_shares_pid(Some(&with), "n", &mut refusals);
        assert_eq!(
            refusals.to_string(),
            "n.userns_options: user namespaces are not supported yet"
        );
    }
}
