//! RunPodSandbox: from `PodSandboxConfig` to the domain's pod.

use std::{collections::BTreeMap, path::PathBuf};

use caisson_cri_api::v1;
use caisson_sandbox::spec::{PodIdentity, PodSpec};

use super::{Refusals, namespaces, network, resources, security};

/// Annotations by which other runtimes are asked for devices (Container Device Interface).
const CDI_ANNOTATIONS: &str = "cdi.k8s.io/";

/// Longest host name that Linux takes for a pod (a DNS label, as kubelet cuts it).
const MAX_HOSTNAME: usize = 63;

/// The pod that a request asks for.
pub fn pod_spec(request: v1::RunPodSandboxRequest) -> Result<PodSpec, Refusals> {
    let mut refusals = Refusals::default();
    let Some(config) = request.config else {
        return Err(Refusals::one("config", "is missing"));
    };
    super::handler("runtime_handler", &request.runtime_handler, &mut refusals);
    let identity = identity(config.metadata, &mut refusals);
    refusals.add_if(
        config.windows.is_some(),
        "config.windows",
        "a Windows pod cannot run on this node",
    );
    cdi_annotations(config.annotations.keys(), &mut refusals);
    let linux = config.linux.unwrap_or_default();
    let namespaces = sandbox_security(linux.security_context.as_ref(), &mut refusals);
    let limits = resources::pod_limits(linux.resources.as_ref());
    let cgroup_parent = cgroup_parent(linux.cgroup_parent, &mut refusals);
    let spec = PodSpec {
        hostname: hostname(&config.hostname, &identity.name, &mut refusals),
        log_directory: log_directory(&config.log_directory, &mut refusals),
        dns: network::dns(config.dns_config.as_ref(), &mut refusals),
        network: network::network(
            &identity,
            &config.port_mappings,
            &config.annotations,
            cgroup_parent.as_deref(),
            &mut refusals,
        ),
        sysctls: sysctls(linux.sysctls.into_iter().collect(), &mut refusals),
        share_pid_namespace: namespaces.share_pid,
        guest_pid_namespace: namespaces.guest_pid,
        user_namespace: namespaces.users,
        cgroup_parent,
        cpuset: resources::cpuset(linux.resources.as_ref(), "config.linux.resources", &mut refusals),
        limits,
        identity,
        handler: request.runtime_handler,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
    };
    refusals.settle(spec)
}

fn identity(metadata: Option<v1::PodSandboxMetadata>, refusals: &mut Refusals) -> PodIdentity {
    let metadata = metadata.unwrap_or_default();
    for (name, value) in [
        ("name", &metadata.name),
        ("namespace", &metadata.namespace),
        ("uid", &metadata.uid),
    ] {
        let field = format!("config.metadata.{name}");
        refusals.add_if(value.is_empty(), &field, "is missing");
        // These travel to CNI plugins as K=V;K=V.
        refusals.add_if(
            value.contains([';', '=', '\0', '\n']),
            &field,
            "has characters that no Kubernetes name has",
        );
    }
    PodIdentity {
        name: metadata.name,
        namespace: metadata.namespace,
        uid: metadata.uid,
        attempt: metadata.attempt,
    }
}

/// Checks the sandbox's own security context and answers which namespaces its containers share. There is no process of the
/// sandbox itself (no pause container), so users, groups, privileges, seccomp and AppArmor have nobody to hold for here; every
/// container brings its own. kubelet sends seccomp RuntimeDefault for each sandbox.
fn sandbox_security(
    context: Option<&v1::LinuxSandboxSecurityContext>,
    refusals: &mut Refusals,
) -> namespaces::PodNamespaces {
    let field = "config.linux.security_context";
    if let Some(context) = context {
        security::selinux(
            context.selinux_options.as_ref(),
            &format!("{field}.selinux_options"),
            refusals,
        );
    }
    namespaces::pod_namespaces(
        context.and_then(|context| context.namespace_options.as_ref()),
        &format!("{field}.namespace_options"),
        refusals,
    )
}

/// The name as asked for, else made of the pod's name as kubelet does.
fn hostname(wanted: &str, pod: &str, refusals: &mut Refusals) -> String {
    if wanted.is_empty() {
        let cut: String = pod
            .chars()
            .filter(|c| is_host_char(*c))
            .take(MAX_HOSTNAME)
            .collect();
        return cut.trim_end_matches(['-', '.']).to_owned();
    }
    if wanted.len() > 64 || !wanted.chars().all(is_host_char) {
        refusals.add(
            "config.hostname",
            format!("{wanted:?} is not a host name of at most 64 characters"),
        );
    }
    wanted.to_owned()
}

fn is_host_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')
}

fn log_directory(text: &str, refusals: &mut Refusals) -> PathBuf {
    let path = PathBuf::from(text);
    refusals.add_if(
        !text.is_empty() && !path.is_absolute(),
        "config.log_directory",
        "is not an absolute path",
    );
    path
}

fn cgroup_parent(text: String, refusals: &mut Refusals) -> Option<String> {
    refusals.add_if(
        text.split('/').any(|part| part == ".."),
        "config.linux.cgroup_parent",
        "leads out of the cgroup file system",
    );
    (!text.is_empty()).then_some(text)
}

/// Every parameter belongs to the pod's own kernel, so any may be set; the guest says which ones it does not have.
fn sysctls(wanted: BTreeMap<String, String>, refusals: &mut Refusals) -> BTreeMap<String, String> {
    for (name, value) in &wanted {
        let ok = name
            .split(['.', '/'])
            .all(|part| !part.is_empty() && part != ".." && !part.contains(['\0', '\n', ' ']));
        if !ok || value.contains('\0') {
            refusals.add(
                format!("config.linux.sysctls[{name:?}]"),
                "is not a kernel parameter",
            );
        }
    }
    wanted
}

/// Refuses CDI annotations, which name devices of the host.
pub(super) fn cdi_annotations<'a>(names: impl Iterator<Item = &'a String>, refusals: &mut Refusals) {
    for name in names.filter(|name| name.starts_with(CDI_ANNOTATIONS)) {
        refusals.add(
            format!("config.annotations[{name:?}]"),
            "devices of the host are not supported yet",
        );
    }
}

#[cfg(test)]
mod tests {
    use v1::NamespaceMode;

    use super::*;

    fn config() -> v1::PodSandboxConfig {
        v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "web-0".into(),
                uid: "u".into(),
                namespace: "shop".into(),
                attempt: 2,
            }),
            ..Default::default()
        }
    }

    fn asked(config: v1::PodSandboxConfig, handler: &str) -> Result<PodSpec, String> {
        pod_spec(v1::RunPodSandboxRequest {
            config: Some(config),
            runtime_handler: handler.into(),
        })
        .map_err(|refusals| refusals.to_string())
    }

    #[test]
    fn the_least_that_a_pod_needs_is_its_metadata() {
        let spec = asked(config(), "").unwrap();
        assert_eq!(spec.identity.attempt, 2);
        assert_eq!(spec.hostname, "web-0");
        assert_eq!(spec.network.args["K8S_POD_NAMESPACE"], "shop");
        assert_eq!(spec.network.args["IgnoreUnknown"], "1");
        assert_eq!(spec.dns, None);
        assert_eq!(spec.cgroup_parent, None);
        assert!(spec.share_pid_namespace);
        assert_eq!(
            asked(v1::PodSandboxConfig::default(), "").unwrap_err(),
            "config.metadata.name: is missing; config.metadata.namespace: is missing; config.metadata.uid: is missing"
        );
    }

    #[test]
    fn everything_that_kubelet_sends_for_a_plain_pod_is_taken() {
        let mut config = config();
        config.hostname = "web-0".into();
        config.log_directory = "/var/log/pods/shop_web-0_u".into();
        config.dns_config = Some(v1::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            searches: vec!["shop.svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        });
        config.labels = [("io.kubernetes.pod.name".to_owned(), "web-0".to_owned())].into();
        config.annotations = [("kubernetes.io/ingress-bandwidth".to_owned(), "10M".to_owned())].into();
        config.linux = Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/burstable/podu".into(),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    pid: NamespaceMode::Container as i32,
                    ..Default::default()
                }),
                seccomp: Some(v1::SecurityProfile::default()),
                privileged: true,
                ..Default::default()
            }),
            sysctls: [("net.core.somaxconn".to_owned(), "1024".to_owned())].into(),
            overhead: Some(v1::LinuxContainerResources::default()),
            resources: Some(v1::LinuxContainerResources {
                memory_limit_in_bytes: 1 << 28,
                ..Default::default()
            }),
        });
        let spec = asked(config, "caisson").unwrap();
        assert!(!spec.share_pid_namespace);
        assert_eq!(spec.limits.memory_bytes, Some(1 << 28));
        assert_eq!(spec.network.ingress_rate, Some(10_000_000));
        assert_eq!(spec.cgroup_parent.as_deref(), Some("/kubepods/burstable/podu"));
        assert_eq!(spec.sysctls["net.core.somaxconn"], "1024");
        assert_eq!(spec.handler, "caisson");
    }

    #[test]
    fn what_cannot_be_had_is_named_all_at_once() {
        let mut config = config();
        config.hostname = "no good".into();
        config.windows = Some(v1::WindowsPodSandboxConfig::default());
        config.annotations = [("cdi.k8s.io/gpu".to_owned(), "x".to_owned())].into();
        config.linux = Some(v1::LinuxPodSandboxConfig {
            cgroup_parent: "/a/../b".into(),
            security_context: Some(v1::LinuxSandboxSecurityContext {
                namespace_options: Some(v1::NamespaceOption {
                    network: NamespaceMode::Node as i32,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            sysctls: [("net..x".to_owned(), String::new())].into(),
            ..Default::default()
        });
        let text = asked(config, "runc").unwrap_err();
        for field in [
            "runtime_handler:",
            "config.hostname:",
            "config.windows:",
            "config.annotations[\"cdi.k8s.io/gpu\"]:",
            "config.linux.cgroup_parent:",
            "config.linux.security_context.namespace_options.network: NODE is not possible for a pod that is a VM",
            "config.linux.sysctls[\"net..x\"]:",
        ] {
            assert!(text.contains(field), "{field} is not in: {text}");
        }
    }

    #[test]
    fn a_host_name_is_cut_like_kubelets() {
        let long = format!("{}-{}", "a".repeat(62), "b".repeat(30));
        assert_eq!(hostname("", &long, &mut Refusals::default()), "a".repeat(62));
    }
}
