//! CreateContainer: from `ContainerConfig` and an image to the domain's container.

use std::path::{Component, Path, PathBuf};

use caisson_cri_api::v1;
use caisson_image::{Image, ImageConfig};
use caisson_sandbox::{
    guest,
    spec::{ContainerImage, ContainerSpec, PodSpec},
};

use super::{
    MountImages, Refusals, devices, image_mounts, mounts, namespaces, pod, process, resources, security,
    signals,
};

/// The container that a request asks for, in `pod`, from `image`, with `mounted` for its image volumes. Looks at the host paths of mounts, so it may block.
pub fn container_spec(
    mut config: v1::ContainerConfig,
    pod: &PodSpec,
    image: &Image,
    mounted: &MountImages,
) -> Result<ContainerSpec, Refusals> {
    let mut refusals = Refusals::default();
    not_supported(&config, &mut refusals);
    let name = config.metadata.as_ref().map_or("", |metadata| &metadata.name);
    refusals.add_if(name.is_empty(), "config.metadata.name", "is missing");
    let linux = config.linux.clone().unwrap_or_default();
    let context = linux.security_context.unwrap_or_default();
    security::selinux(
        context.selinux_options.as_ref(),
        "config.linux.security_context.selinux_options",
        &mut refusals,
    );
    let (resources, oom_score_adj) =
        resources::container(linux.resources.as_ref(), "config.linux.resources", &mut refusals);
    namespaces::settle_mappings(&mut config.mounts, &pod.into());
    let mounts = mounts::mounts(
        &config.mounts,
        config.annotations.get(mounts::TERMINATION_PATH),
        &mut refusals,
    );
    for (index, mount) in config.mounts.iter().enumerate() {
        let shared = v1::MountPropagation::PropagationBidirectional as i32;
        refusals.add_if(
            pod.user_namespace.is_some() && mount.propagation == shared,
            &format!("config.mounts[{index}].propagation"),
            "PROPAGATION_BIDIRECTIONAL is not possible in a pod with a user namespace: what is mounted there stays there",
        );
    }
    let (image_volumes, image_records): (Vec<_>, Vec<_>) =
        image_mounts::image_volumes(&config.mounts, mounted, &mut refusals)
            .into_iter()
            .unzip();
    let devices = devices::devices(&config.devices, &mut refusals);
    let process = process::process(
        &config,
        &context,
        &image.config,
        &pod.hostname,
        oom_score_adj,
        &mut refusals,
    );
    let mut guest = guest_spec(
        &config,
        &context,
        process,
        resources,
        &mounts,
        pod,
        image,
        &mut refusals,
    );
    guest.character_devices = devices.character;
    let spec = ContainerSpec {
        name: name.to_owned(),
        attempt: config.metadata.as_ref().map_or(0, |metadata| metadata.attempt),
        image: container_image(config.image.as_ref(), image),
        guest,
        files: mounts.files,
        volumes: mounts.volumes,
        disks: devices.disks,
        cpuset: resources::cpuset(linux.resources.as_ref(), "config.linux.resources", &mut refusals),
        termination_file: mounts.termination.map(|(host, _)| host),
        log_path: log_path(&config.log_path, &mut refusals),
        stop_signal: stop_signal(config.stop_signal, &image.config, &mut refusals),
        mounts: [mounts.records, image_records].concat(),
        image_volumes,
        labels: config.labels.into_iter().collect(),
        annotations: config.annotations.into_iter().collect(),
    };
    refusals.settle(spec)
}

/// Refuses whole fields that nothing here can honour yet.
fn not_supported(config: &v1::ContainerConfig, refusals: &mut Refusals) {
    for index in 0..config.cdi_devices.len() {
        refusals.add(
            format!("config.CDI_devices[{index}]"),
            "devices of the host are not supported yet",
        );
    }
    refusals.add_if(
        config.windows.is_some(),
        "config.windows",
        "a Windows container cannot run on this node",
    );
    refusals.add_if(
        config.stdin_once && !config.stdin,
        "config.stdin_once",
        "needs stdin",
    );
    pod::cdi_annotations(config.annotations.keys(), refusals);
    if let Some(image) = &config.image {
        super::handler("config.image.runtime_handler", &image.runtime_handler, refusals);
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "the parts of one message, each made by its own module"
)]
fn guest_spec(
    config: &v1::ContainerConfig,
    context: &v1::LinuxContainerSecurityContext,
    process: guest::Process,
    resources: guest::Resources,
    mounts: &mounts::Mounts,
    pod: &PodSpec,
    image: &Image,
    refusals: &mut Refusals,
) -> guest::ContainerSpec {
    let options = context.namespace_options.as_ref();
    let pid_namespace = namespaces::container_pid(
        options,
        &pod.into(),
        "config.linux.security_context.namespace_options",
        refusals,
    );
    let paths = |name: &str, list: &[String], refusals: &mut Refusals| {
        for (index, path) in list.iter().enumerate() {
            refusals.add_if(
                !path.starts_with('/'),
                &format!("config.linux.security_context.{name}[{index}]"),
                "is not an absolute path",
            );
        }
        if context.privileged {
            Vec::new()
        } else {
            list.to_vec()
        }
    };
    guest::ContainerSpec {
        image_serial: String::new(),
        readonly_rootfs: context.readonly_rootfs,
        process: Some(process),
        mounts: Vec::new(),
        masked_paths: paths("masked_paths", &context.masked_paths, refusals),
        readonly_paths: paths("readonly_paths", &context.readonly_paths, refusals),
        resources: Some(resources),
        pid_namespace: pid_namespace as i32,
        target_container_id: namespaces::target_container(config)
            .unwrap_or_default()
            .to_owned(),
        image_volumes: image_volumes(&image.config, &config.mounts),
        termination_log_path: mounts
            .termination
            .as_ref()
            .map_or_else(String::new, |(_, path)| path.clone()),
        privileged: context.privileged,
        stdin: config.stdin,
        stdin_once: config.stdin_once,
        hostname: String::new(),
        block_devices: Vec::new(),
        character_devices: Vec::new(),
    }
}

/// The image's volumes that no mount of the request covers.
fn image_volumes(image: &ImageConfig, mounts: &[v1::Mount]) -> Vec<String> {
    image
        .volumes
        .iter()
        .filter(|volume| {
            !mounts.iter().any(|mount| {
                Path::new(&mount.container_path)
                    .components()
                    .eq(Path::new(volume.as_str()).components())
            })
        })
        .cloned()
        .collect()
}

fn container_image(spec: Option<&v1::ImageSpec>, image: &Image) -> ContainerImage {
    let user_reference = match spec {
        Some(spec) if !spec.user_specified_image.is_empty() => spec.user_specified_image.clone(),
        Some(spec) => spec.image.clone(),
        None => image.id.clone(),
    };
    ContainerImage {
        id: image.id.clone(),
        user_reference,
        reference: image.repo_digests.first().unwrap_or(&image.id).clone(),
        disk: image.disk.clone(),
    }
}

/// Relative to the pod's log directory, and never out of it.
fn log_path(text: &str, refusals: &mut Refusals) -> Option<PathBuf> {
    if text.is_empty() {
        return None;
    }
    let path = Path::new(text);
    let inside = path
        .components()
        .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    refusals.add_if(
        !inside || text.ends_with('/'),
        "config.log_path",
        "is not a file below the pod's log directory",
    );
    Some(path.to_owned())
}

fn stop_signal(wanted: i32, image: &ImageConfig, refusals: &mut Refusals) -> u32 {
    match v1::Signal::try_from(wanted) {
        Ok(v1::Signal::RuntimeDefault) => {}
        Ok(signal) => return signals::signal_number(signal.as_str_name()).unwrap_or(signals::SIGTERM),
        Err(_) => refusals.add("config.stop_signal", format!("unknown signal {wanted}")),
    }
    // An image with a signal that Linux does not have is stopped as one without.
    signals::signal_number(&image.stop_signal).unwrap_or(signals::SIGTERM)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn pod() -> PodSpec {
        crate::translate::pod_spec(v1::RunPodSandboxRequest {
            config: Some(v1::PodSandboxConfig {
                metadata: Some(v1::PodSandboxMetadata {
                    name: "p".into(),
                    uid: "u".into(),
                    namespace: "n".into(),
                    attempt: 0,
                }),
                ..Default::default()
            }),
            runtime_handler: String::new(),
        })
        .unwrap()
    }

    fn image() -> Image {
        Image {
            id: "sha256:1".into(),
            repo_tags: vec!["r/a:1".into()],
            repo_digests: vec!["r/a@sha256:2".into()],
            size_bytes: 1,
            pinned: false,
            config: ImageConfig {
                cmd: vec!["sh".into()],
                volumes: vec!["/data".into(), "/cache".into()],
                stop_signal: "SIGQUIT".into(),
                ..Default::default()
            },
            disk: vec!["/images/1".into()],
            pulled_at: SystemTime::UNIX_EPOCH,
        }
    }

    fn config() -> v1::ContainerConfig {
        v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata {
                name: "c".into(),
                attempt: 3,
            }),
            image: Some(v1::ImageSpec {
                image: "sha256:1".into(),
                user_specified_image: "r/a:1".into(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn with(context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
        v1::ContainerConfig {
            linux: Some(v1::LinuxContainerConfig {
                resources: None,
                security_context: Some(context),
            }),
            ..config()
        }
    }

    fn refused(config: v1::ContainerConfig) -> String {
        container_spec(config, &pod(), &image(), &MountImages::new())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn the_least_that_a_container_needs_is_a_name_and_an_image() {
        let spec = container_spec(config(), &pod(), &image(), &MountImages::new()).unwrap();
        assert_eq!((spec.name.as_str(), spec.attempt), ("c", 3));
        assert_eq!(spec.image.user_reference, "r/a:1");
        assert_eq!(spec.image.reference, "r/a@sha256:2");
        assert_eq!(spec.stop_signal, 3);
        assert_eq!(spec.log_path, None);
        assert_eq!(spec.guest.image_volumes, ["/data", "/cache"]);
        assert_eq!(
            spec.guest.pid_namespace,
            guest::PidNamespace::PidPod as i32,
            "the pod's default is to share"
        );
        assert!(!spec.guest.privileged && spec.guest.image_serial.is_empty());
    }

    #[test]
    fn a_mount_covers_an_image_volume_of_the_same_path() {
        let dir = tempfile::tempdir().unwrap();
        let config = v1::ContainerConfig {
            mounts: vec![v1::Mount {
                container_path: "/data/".into(),
                host_path: dir.path().to_str().unwrap().into(),
                readonly: true,
                ..Default::default()
            }],
            ..config()
        };
        let spec = container_spec(config, &pod(), &image(), &MountImages::new()).unwrap();
        assert_eq!(spec.guest.image_volumes, ["/cache"]);
        assert!(
            spec.files.is_empty(),
            "a directory of the host is shared, not copied"
        );
        assert_eq!(spec.volumes.len(), 1);
    }

    #[test]
    fn a_privileged_container_has_nothing_masked_and_needs_no_profile() {
        let spec = container_spec(
            with(v1::LinuxContainerSecurityContext {
                privileged: true,
                masked_paths: vec!["/proc/kcore".into()],
                readonly_paths: vec!["/proc/sys".into()],
                seccomp: Some(v1::SecurityProfile::default()),
                ..Default::default()
            }),
            &pod(),
            &image(),
            &MountImages::new(),
        )
        .unwrap();
        assert!(spec.guest.privileged);
        assert!(spec.guest.masked_paths.is_empty() && spec.guest.readonly_paths.is_empty());
        let caps = spec.guest.process.unwrap().capabilities.unwrap();
        assert_eq!(caps.bounding.len(), 41);
    }

    #[test]
    fn what_cannot_be_had_is_named_all_at_once() {
        let text = refused(v1::ContainerConfig {
            metadata: None,
            devices: vec![v1::Device::default()],
            cdi_devices: vec![v1::CdiDevice::default()],
            windows: Some(v1::WindowsContainerConfig::default()),
            stdin_once: true,
            log_path: "../../etc/passwd".into(),
            stop_signal: 99,
            ..with(v1::LinuxContainerSecurityContext {
                seccomp: Some(v1::SecurityProfile {
                    profile_type: 2,
                    localhost_ref: "nowhere".into(),
                }),
                masked_paths: vec!["proc".into()],
                namespace_options: Some(v1::NamespaceOption {
                    pid: v1::NamespaceMode::Node as i32,
                    ..Default::default()
                }),
                ..Default::default()
            })
        });
        for field in [
            "config.metadata.name:",
            "config.devices[0]:",
            "config.CDI_devices[0]:",
            "config.windows:",
            "config.stdin_once:",
            "config.log_path:",
            "config.stop_signal:",
            "config.linux.security_context.seccomp: localhost_ref \"nowhere\"",
            "config.linux.security_context.masked_paths[0]:",
            "config.linux.security_context.namespace_options.pid: NODE",
        ] {
            assert!(text.contains(field), "{field} is not in: {text}");
        }
    }

    #[test]
    fn the_stop_signal_is_the_requests_else_the_images_else_sigterm() {
        let none = ImageConfig::default();
        let mut refusals = Refusals::default();
        assert_eq!(
            stop_signal(v1::Signal::Sighup as i32, &image().config, &mut refusals),
            1
        );
        assert_eq!(stop_signal(0, &image().config, &mut refusals), 3);
        assert_eq!(stop_signal(0, &none, &mut refusals), 15);
        refusals.settle(()).unwrap();
    }

    #[test]
    fn log_paths_stay_below_the_log_directory() {
        for (text, ok) in [
            ("c/0.log", true),
            ("/abs.log", false),
            ("../x", false),
            ("a/", false),
        ] {
            let mut refusals = Refusals::default();
            log_path(text, &mut refusals);
            assert_eq!(refusals.settle(()).is_ok(), ok, "{text}");
        }
    }
}
