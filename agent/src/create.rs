//! `CreateContainer`: root file system, writable layer, volumes, cgroup. Nothing runs yet.

use std::{
    collections::HashMap,
    ffi::CString,
    fs,
    os::fd::AsFd,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use caisson_agent_api::v1::{self, mount::Source};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount},
};

use crate::{
    cgroup::{self, Cgroup},
    configure::{POD_FILES, SCRATCH},
    console::complain,
    copy_tree, device_filter,
    error::{AgentError, At, chain},
    guest::{Container, Guest, Sandbox, Users},
    names, own_devices, pod_volumes, remove, rootfs, shared, socket_forwards,
    stage::{capability_set, decode_seccomp, rlimit},
    stage_spec::{RootSpec, StageMount},
    user_namespace::bind_mapped,
    volumes,
};

/// Where the agent keeps what belongs to a container, its writable layer excepted.
pub(crate) fn directory(id: &str) -> PathBuf {
    Path::new("/run/containers").join(id)
}

/// Where a container's writable layer is.
pub(crate) fn scratch(id: &str) -> PathBuf {
    Path::new(SCRATCH).join(id)
}

/// Prepares a container. Blocking.
pub(crate) fn create(guest: &Guest, request: v1::CreateContainerRequest) -> Result<(), AgentError> {
    let id = request.container_id;
    names::id("container_id", &id)?;
    let mut spec = request
        .spec
        .ok_or_else(|| AgentError::invalid("spec", "is absent"))?;
    check(&spec)?;
    if let Some(process) = &mut spec.process {
        process.apparmor = guest.apparmor.resolve(process.apparmor.take())?;
    }
    let sandbox_hostname = check_sandbox(guest, &spec)?;
    for mount in &spec.mounts {
        if let Some(Source::VolumeId(volume)) = &mount.source
            && !guest.volumes.exists(volume)
        {
            return Err(AgentError::Unknown {
                what: "volume",
                id: volume.clone(),
            });
        }
        for shared in shared_sources(mount) {
            if !guest.shared.is_mounted(shared.session) {
                return Err(AgentError::Unknown {
                    what: "session",
                    id: shared.session.to_string(),
                });
            }
        }
    }
    guest.reserve(&id)?;
    if let Err(error) = provide(guest, &spec) {
        guest.give_back(&id);
        return Err(error);
    }
    let serials = image_serials(&spec);
    let images = match acquire(guest, &serials) {
        Ok(images) => images,
        Err(error) => {
            guest.give_back(&id);
            return Err(error);
        }
    };
    match build(&id, spec, &images, guest.users().as_ref(), &sandbox_hostname) {
        Ok(container) => {
            guest.fill(container);
            Ok(())
        }
        Err(error) => {
            if let Err(left) = remove::dismantle(&id) {
                complain(&format!("undoing the creation of {id}: {}", chain(&left)));
            }
            serials.iter().for_each(|serial| guest.images.release(serial));
            guest.give_back(&id);
            Err(error)
        }
    }
}

/// The images that a container holds: its own first, then those that it has mounted, each as often as it is used.
pub(crate) fn image_serials(spec: &v1::ContainerSpec) -> Vec<String> {
    let mounted = spec.mounts.iter().filter_map(|mount| match &mount.source {
        Some(Source::Image(image)) => Some(&image.serial),
        _ => None,
    });
    [&spec.image_serial].into_iter().chain(mounted).cloned().collect()
}

/// Where each image is mounted; all or none.
fn acquire(guest: &Guest, serials: &[String]) -> Result<HashMap<String, PathBuf>, AgentError> {
    let mut places = HashMap::new();
    for (at, serial) in serials.iter().enumerate() {
        match guest.images.acquire(serial) {
            Ok(place) => places.insert(serial.clone(), place),
            Err(error) => {
                serials
                    .iter()
                    .take(at)
                    .for_each(|held| guest.images.release(held));
                return Err(error);
            }
        };
    }
    Ok(places)
}

/// The pod's own volumes that the container has mounted.
fn provide(guest: &Guest, spec: &v1::ContainerSpec) -> Result<(), AgentError> {
    for mount in &spec.mounts {
        if let Some(Source::PodVolume(volume)) = &mount.source {
            guest.pod_volumes.provide(volume)?;
        }
        for socket in shared_sources(mount).filter(|shared| shared.socket) {
            guest.socket_forwards.provide(socket)?;
        }
    }
    Ok(())
}

/// What a mount has of the host: itself, and the sockets below it.
fn shared_sources(mount: &v1::Mount) -> impl Iterator<Item = &v1::SharedSource> {
    let own = match &mount.source {
        Some(Source::Shared(shared)) => Some(shared),
        _ => None,
    };
    let below = mount.sockets.iter().filter_map(|socket| socket.source.as_ref());
    own.into_iter().chain(below)
}

fn check(spec: &v1::ContainerSpec) -> Result<(), AgentError> {
    names::serial("spec.image_serial", &spec.image_serial)?;
    names::hostname(&spec.hostname)?;
    let process = spec
        .process
        .as_ref()
        .ok_or_else(|| AgentError::invalid("spec.process", "is absent"))?;
    check_process(process)?;
    for mount in &spec.mounts {
        names::absolute("spec.mounts.destination", &mount.destination)?;
        let parts: Vec<&str> = mount
            .destination
            .split('/')
            .filter(|part| !part.is_empty() && *part != ".")
            .collect();
        if parts.is_empty() || parts.first() == Some(&"proc") {
            let reason = format!("{} cannot be mounted over", mount.destination);
            return Err(AgentError::invalid("spec.mounts.destination", reason));
        }
        if mount.propagation() != v1::MountPropagation::MountPrivate
            && !matches!(mount.source, Some(Source::PodVolume(_)))
        {
            let reason = format!("{} is no volume of the pod's", mount.destination);
            return Err(AgentError::invalid("spec.mounts.propagation", reason));
        }
        match &mount.source {
            Some(Source::VolumeId(id)) => names::id("spec.mounts.volume_id", id)?,
            Some(Source::Tmpfs(_)) => {}
            Some(Source::Image(image)) => {
                names::serial("spec.mounts.image.serial", &image.serial)?;
                names::absolute("spec.mounts.image.sub_path", &format!("/{}", image.sub_path))?;
            }
            Some(Source::Shared(shared)) => names::id("spec.mounts.shared.export", &shared.export)?,
            Some(Source::PodVolume(volume)) => pod_volumes::check(volume)?,
            None => return Err(AgentError::invalid("spec.mounts.source", "is absent")),
        }
        socket_forwards::check(mount)?;
    }
    own_devices::check(spec)?;
    for (field, paths) in [
        ("spec.masked_paths", &spec.masked_paths),
        ("spec.readonly_paths", &spec.readonly_paths),
        ("spec.image_volumes", &spec.image_volumes),
    ] {
        paths.iter().try_for_each(|path| names::absolute(field, path))?;
    }
    if !spec.termination_log_path.is_empty() {
        names::absolute("spec.termination_log_path", &spec.termination_log_path)?;
    }
    cgroup::settings(&spec.resources.clone().unwrap_or_default()).map(|_| ())
}

/// What can be known to be wrong with a process before it is tried; exec sessions are checked by it too.
pub(crate) fn check_process(process: &v1::Process) -> Result<(), AgentError> {
    if process.args.is_empty() {
        return Err(AgentError::invalid("process.args", "no command given"));
    }
    if process
        .args
        .iter()
        .chain(&process.env)
        .any(|text| text.contains(&0))
    {
        return Err(AgentError::invalid(
            "process",
            "an argument or variable contains a NUL byte",
        ));
    }
    if !process.cwd.is_empty() && !process.cwd.starts_with('/') {
        return Err(AgentError::invalid(
            "process.cwd",
            format!("{:?} is not absolute", process.cwd),
        ));
    }
    if let Some(wanted) = &process.capabilities {
        for set in [
            &wanted.bounding,
            &wanted.effective,
            &wanted.permitted,
            &wanted.inheritable,
            &wanted.ambient,
        ] {
            capability_set(set).map_err(|name| {
                AgentError::invalid("process.capabilities", format!("unknown capability {name}"))
            })?;
        }
    }
    if let Some(filter) = &process.seccomp {
        decode_seccomp(filter).map_err(|reason| AgentError::invalid("process.seccomp", reason))?;
    }
    for limit in &process.rlimits {
        if rlimit(&limit.r#type).is_none() {
            return Err(AgentError::invalid(
                "process.rlimits",
                format!("unknown limit {}", limit.r#type),
            ));
        }
    }
    check_oom_score("process.oom_score_adj", process.oom_score_adj)
}

/// What the kernel takes as a score (proc(5)).
pub(crate) fn check_oom_score(field: &str, score: i32) -> Result<(), AgentError> {
    if (-1000..=1000).contains(&score) {
        return Ok(());
    }
    let reason = format!("{score} is not between -1000 and 1000");
    Err(AgentError::invalid(field, reason))
}

/// The sandbox has to be ready for it; answers the sandbox's host name.
fn check_sandbox(guest: &Guest, spec: &v1::ContainerSpec) -> Result<String, AgentError> {
    if spec.pid_namespace() == v1::PidNamespace::PidTarget {
        guest.container(&spec.target_container_id)?;
    }
    match &*guest.sandbox() {
        Sandbox::Configured(configured) => {
            if spec.pid_namespace() == v1::PidNamespace::PidPod && configured.pod_reaper.is_none() {
                let reason = "the sandbox was configured without a shared PID namespace";
                return Err(AgentError::invalid("spec.pid_namespace", reason));
            }
            Ok(configured.request.hostname.clone())
        }
        Sandbox::Blank | Sandbox::Configuring => Err(AgentError::State {
            what: "sandbox",
            id: String::new(),
            reason: "has not been configured",
        }),
    }
}

fn build(
    id: &str,
    spec: v1::ContainerSpec,
    images: &HashMap<String, PathBuf>,
    users: Option<&Users>,
    sandbox_hostname: &str,
) -> Result<Container, AgentError> {
    let image_at = |serial: &str| {
        let place = images.get(serial).ok_or(rustix::io::Errno::NODEV);
        place.at(|| format!("looking for image {serial}"))
    };
    let image = image_at(&spec.image_serial)?;
    let place = match users {
        Some(users) => mount_overlay(id, &mapped_image(id, image, users)?)?,
        None => mount_overlay(id, image)?,
    };
    let mut mounts = image_volumes(id, &place, &spec.image_volumes)?;
    mounts.extend(pod_files(&spec));
    let termination = termination_file(id, &spec.termination_log_path)?;
    if let Some(file) = &termination {
        mounts.push(of_the_pod(bind(&spec.termination_log_path, file, false)));
    }
    for mount in &spec.mounts {
        mounts.push(match &mount.source {
            Some(Source::Image(image)) => {
                of_the_pod(image_mount(mount, image_at(&image.serial)?, &image.sub_path)?)
            }
            _ => of_the_pod(stage_mount(mount)),
        });
    }
    // What is mounted inside another mount comes after it.
    mounts.sort_by_key(|mount| {
        mount
            .destination
            .split('/')
            .filter(|part| !part.is_empty())
            .count()
    });
    let cgroup = Cgroup::create(id, &spec.resources.clone().unwrap_or_default())?;
    let own_devices = own_devices::find(&spec)?;
    if !spec.privileged {
        let allowed: Vec<_> = own_devices.iter().map(own_devices::allowed).collect();
        device_filter::attach(&cgroup.open()?, &allowed)?;
    }
    let hostname = if spec.hostname == sandbox_hostname {
        String::new()
    } else {
        spec.hostname.clone()
    };
    let root = RootSpec {
        path: place.to_string_lossy().into_owned(),
        readonly: spec.readonly_rootfs,
        privileged: spec.privileged,
        mounts,
        masked: spec.masked_paths.clone(),
        readonly_paths: spec.readonly_paths.clone(),
        hostname,
        new_pid_namespace: spec.pid_namespace() == v1::PidNamespace::PidContainer,
        devices: own_devices,
    };
    Ok(Container::new(id.to_owned(), spec, root, cgroup, termination))
}

/// Where a container with a user namespace has its image: with owners that are those of the pod.
pub(crate) fn lower(id: &str) -> PathBuf {
    directory(id).join("image")
}

fn mapped_image(id: &str, image: &Path, users: &Users) -> Result<PathBuf, AgentError> {
    let place = lower(id);
    fs::create_dir_all(&place).at(|| format!("creating {}", place.display()))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let step = || format!("mounting the image of {id} with the ids of the user namespace");
    let target = rustix::fs::open(&place, flags, Mode::empty()).at(step)?;
    bind_mapped(image, target.as_fd(), users.namespace.as_fd()).at(step)?;
    Ok(place)
}

/// Files that were written with ids of the pod, as all are but those of its own writable layer.
fn of_the_pod(mount: StageMount) -> StageMount {
    StageMount {
        pod_ids: true,
        ..mount
    }
}

fn mount_overlay(id: &str, image: &Path) -> Result<PathBuf, AgentError> {
    let place = directory(id).join("rootfs");
    let layer = scratch(id);
    let (upper, work) = (layer.join("upper"), layer.join("work"));
    for path in [&place, &upper, &work] {
        fs::create_dir_all(path).at(|| format!("creating {}", path.display()))?;
    }
    // The root directory of a container is that of the writable layer: it has to look like the image's.
    let model = fs::metadata(image).at(|| "looking at the image's root")?;
    fs::set_permissions(
        &upper,
        fs::Permissions::from_mode(model.permissions().mode() & 0o7777),
    )
    .at(|| "preparing the writable layer")?;
    std::os::unix::fs::chown(&upper, Some(owner(&model).0), Some(owner(&model).1))
        .at(|| "preparing the writable layer")?;
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        upper.display(),
        work.display()
    );
    let options = CString::new(options)
        .map_err(std::io::Error::other)
        .at(|| "formatting mount options")?;
    mount(
        "overlay",
        &place,
        "overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .at(|| format!("mounting the root file system of {id}"))?;
    Ok(place)
}

fn owner(metadata: &fs::Metadata) -> (u32, u32) {
    use std::os::unix::fs::MetadataExt;
    (metadata.uid(), metadata.gid())
}

/// A directory on the writable disk for each of the image's volumes, with what the image has there: an overlay cannot hold another
/// overlay's writable layer, and these are where one would be (Docker in a pod).
fn image_volumes(id: &str, place: &Path, paths: &[String]) -> Result<Vec<StageMount>, AgentError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(place, flags, Mode::empty()).at(|| "opening the root file system")?;
    let mut mounts = Vec::new();
    for (number, path) in paths.iter().enumerate() {
        let own = scratch(id).join("volumes").join(number.to_string());
        fs::create_dir_all(&own).at(|| format!("creating {}", own.display()))?;
        if rootfs::is_directory(&root, path).at(|| format!("looking at volume {path}"))? == Some(true) {
            let from = rootfs::open(&root, path, OFlags::RDONLY | OFlags::DIRECTORY)
                .at(|| format!("opening {path}"))?;
            let to =
                rustix::fs::open(&own, flags, Mode::empty()).at(|| format!("opening {}", own.display()))?;
            copy_tree::copy(&from, &to).at(|| format!("copying the image's content of volume {path}"))?;
        }
        mounts.push(bind(path, &own, false));
    }
    Ok(mounts)
}

/// The files that every container of a pod has, where no mount of the request is.
fn pod_files(spec: &v1::ContainerSpec) -> Vec<StageMount> {
    let covered = |path: &str| {
        spec.mounts
            .iter()
            .any(|mount| mount.destination.trim_end_matches('/') == path)
    };
    ["resolv.conf", "hostname", "hosts"]
        .into_iter()
        .map(|name| (format!("/etc/{name}"), Path::new(POD_FILES).join(name)))
        .filter(|(destination, source)| !covered(destination) && source.exists())
        .map(|(destination, source)| of_the_pod(bind(&destination, &source, spec.readonly_rootfs)))
        .collect()
}

fn termination_file(id: &str, path: &str) -> Result<Option<PathBuf>, AgentError> {
    if path.is_empty() {
        return Ok(None);
    }
    let file = directory(id).join("termination");
    fs::write(&file, "").at(|| format!("creating {}", file.display()))?;
    // Whoever the container runs as.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666))
        .at(|| format!("opening {} to all", file.display()))?;
    Ok(Some(file))
}

fn bind(destination: &str, source: &Path, readonly: bool) -> StageMount {
    StageMount {
        destination: destination.to_owned(),
        source: source.to_string_lossy().into_owned(),
        readonly,
        ..StageMount::default()
    }
}

/// A mount of an image, or of a part of it. No link of the image's leads out of it.
fn image_mount(mount: &v1::Mount, image: &Path, sub_path: &str) -> Result<StageMount, AgentError> {
    let step = || {
        format!(
            "looking for {sub_path:?} in the image that {} is",
            mount.destination
        )
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(image, flags, Mode::empty()).at(step)?;
    let part = rootfs::open(&root, sub_path, OFlags::PATH).at(step)?;
    let source = fs::read_link(rootfs::name_of(&part)).at(step)?;
    Ok(StageMount {
        inert: true,
        ..bind(&mount.destination, &source, true)
    })
}

fn stage_mount(mount: &v1::Mount) -> StageMount {
    match &mount.source {
        Some(Source::VolumeId(id)) => bind(&mount.destination, &volumes::path(id), mount.readonly),
        Some(Source::Shared(shared)) if shared.socket => {
            bind(&mount.destination, &socket_forwards::path(shared), mount.readonly)
        }
        Some(Source::Shared(shared)) => StageMount {
            sockets: socket_forwards::stage_sockets(mount),
            ..bind(
                &mount.destination,
                &shared::path(shared.session, &shared.export),
                mount.readonly,
            )
        },
        Some(Source::PodVolume(volume)) => StageMount {
            inside: volume.sub_path.clone(),
            propagation: mount.propagation,
            ..bind(&mount.destination, &pod_volumes::path(&volume.id), mount.readonly)
        },
        Some(Source::Tmpfs(tmpfs)) => {
            let mode = if tmpfs.mode == 0 {
                0o1777
            } else {
                tmpfs.mode & 0o7777
            };
            let mut options = format!("mode={mode:o}");
            if tmpfs.size_bytes > 0 {
                options += &format!(",size={}", tmpfs.size_bytes);
            }
            StageMount {
                destination: mount.destination.clone(),
                source: String::new(),
                readonly: mount.readonly,
                options,
                ..StageMount::default()
            }
        }
        // Refused by `check`, or made elsewhere.
        Some(Source::Image(_)) | None => StageMount::default(),
    }
}

/// What an exec session takes from its container, where the request leaves it out. Pure.
pub(crate) fn merge(own: &v1::Process, mut wanted: v1::Process) -> v1::Process {
    if wanted.env.is_empty() {
        wanted.env.clone_from(&own.env);
    }
    if wanted.cwd.is_empty() {
        wanted.cwd.clone_from(&own.cwd);
    }
    if wanted.capabilities.is_none() {
        wanted.capabilities.clone_from(&own.capabilities);
    }
    if wanted.seccomp.is_none() {
        wanted.seccomp.clone_from(&own.seccomp);
    }
    if wanted.apparmor.is_none() {
        wanted.apparmor.clone_from(&own.apparmor);
    }
    if wanted.rlimits.is_empty() {
        wanted.rlimits.clone_from(&own.rlimits);
    }
    if wanted.oom_score_adj == 0 {
        wanted.oom_score_adj = own.oom_score_adj;
    }
    wanted.no_new_privileges |= own.no_new_privileges;
    let names: HashMap<&[u8], ()> = wanted
        .env
        .iter()
        .filter_map(|entry| Some((entry.split(|byte| *byte == b'=').next()?, ())))
        .collect();
    if wanted.terminal && !names.contains_key(b"TERM".as_slice()) {
        wanted.env.push(b"TERM=xterm".to_vec());
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> v1::ContainerSpec {
        v1::ContainerSpec {
            image_serial: "image".into(),
            process: Some(v1::Process {
                args: vec![b"sh".to_vec()],
                ..v1::Process::default()
            }),
            ..v1::ContainerSpec::default()
        }
    }

    fn mounted(destination: &str) -> v1::ContainerSpec {
        v1::ContainerSpec {
            mounts: vec![v1::Mount {
                destination: destination.into(),
                readonly: true,
                source: Some(Source::VolumeId("v".into())),
                ..v1::Mount::default()
            }],
            ..spec()
        }
    }

    #[test]
    fn nothing_is_mounted_over_the_root_or_into_proc() {
        for bad in [
            "/",
            "//",
            "/.",
            "/proc",
            "/proc/sys",
            "//proc",
            "/./proc/x",
            "relative",
            "/a/../proc",
        ] {
            assert!(check(&mounted(bad)).is_err(), "{bad:?}");
        }
        for good in ["/data", "/processes", "/etc/hosts"] {
            assert!(check(&mounted(good)).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn what_is_malformed_is_named() {
        let mut no_command = spec();
        no_command.process.as_mut().unwrap().args.clear();
        assert_eq!(
            check(&no_command).unwrap_err().to_string(),
            "process.args: no command given"
        );
        let mut flying = spec();
        flying.process.as_mut().unwrap().capabilities = Some(v1::Capabilities {
            bounding: vec!["CAP_FLY".into()],
            ..v1::Capabilities::default()
        });
        assert_eq!(
            check(&flying).unwrap_err().to_string(),
            "process.capabilities: unknown capability CAP_FLY"
        );
    }

    #[test]
    fn an_exec_session_takes_what_it_does_not_say() {
        let own = v1::Process {
            env: vec![b"A=1".to_vec()],
            cwd: "/srv".into(),
            no_new_privileges: true,
            apparmor: Some(v1::ApparmorProfile {
                name: "mine".into(),
                optional: false,
            }),
            ..v1::Process::default()
        };
        let merged = merge(
            &own,
            v1::Process {
                terminal: true,
                ..v1::Process::default()
            },
        );
        assert_eq!(merged.env, [b"A=1".to_vec(), b"TERM=xterm".to_vec()]);
        assert_eq!(merged.cwd, "/srv");
        assert_eq!(merged.apparmor, own.apparmor);
        assert!(merged.no_new_privileges);
        let kept = merge(
            &own,
            v1::Process {
                cwd: "/".into(),
                ..v1::Process::default()
            },
        );
        assert_eq!(kept.cwd, "/");
    }
}
