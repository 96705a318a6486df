//! What pods may ask for besides processes and volumes: devices of their kernel, mounts that travel between containers, shared memory, CPUs
//! of the host.

use std::{collections::BTreeSet, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{Cri, container, pod, security},
    host::{Host, command},
    node::{Node, node},
    run, skipped,
};
use k8s_cri::v1::{self as cri, MountPropagation};

fn sleeper(name: &str, image: &str) -> cri::ContainerConfig {
    container(name, image, &["sleep", "1000"])
}

/// Runs a script that must succeed; answers what it printed.
async fn sh(cri: &mut Cri, id: &str, script: &str) -> Result<String> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code == 0, "{script}: {code}: {out}{err}");
    Ok(out)
}

/// Runs a script that must fail, with this in its error.
async fn fails(cri: &mut Cri, id: &str, script: &str, words: &str) -> Result<()> {
    let (code, out, err) = cri.exec(id, &["sh", "-c", script]).await?;
    ensure!(code != 0 && err.contains(words), "{script}: {code}: {out}{err}");
    Ok(())
}

/// The refusal of a container.
async fn refused(
    cri: &mut Cri,
    pod_id: &str,
    config: &cri::ContainerConfig,
    pod: &cri::PodSandboxConfig,
) -> Result<String> {
    let answer = cri.create(pod_id, config, pod).await;
    let error = answer.err().context("accepted")?;
    ensure!(error.code() == tonic::Code::InvalidArgument, "{error}");
    Ok(error.message().to_owned())
}

/// A device node of the host's, of any name.
fn host_device(host: &Host, name: &str, minor: u32) -> Result<String> {
    let path = host.dir().join(name);
    let minor = minor.to_string();
    command(
        Command::new("mknod")
            .args(["-m", "640"])
            .arg(&path)
            .args(["c", "10", &minor]),
    )?;
    Ok(path.display().to_string())
}

#[test]
fn doors_to_the_kernel_are_those_of_the_guest_and_open_as_far_as_asked() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "devices");
        let pod_id = cri.run_pod(&config).await?;
        let (fuse, sgi) = (
            host_device(&host, "fuse", 229)?,
            host_device(&host, "timer", 228)?,
        );
        let asked = |name: &str, host_path: &str, container_path: &str, permissions: &str| {
            let mut config = sleeper(name, &image);
            config.devices = vec![cri::Device {
                host_path: host_path.into(),
                container_path: container_path.into(),
                permissions: permissions.into(),
            }];
            config
        };

        let whole = asked("whole", &fuse, "/dev/fuse", "rwm");
        let whole = cri.run(&pod_id, &whole, &config).await?;
        let out = sh(
            &mut cri,
            &whole,
            "exec 3<>/dev/fuse && stat -c '%a %t:%T' /dev/fuse",
        )
        .await?;
        ensure!(out == "640 a:e5\n", "{out}");
        let part = asked("part", &fuse, "/doors/to/fuse", "r");
        let part = cri.run(&pod_id, &part, &config).await?;
        sh(&mut cri, &part, "exec 3</doors/to/fuse").await?;
        fails(&mut cri, &part, "exec 3<>/doors/to/fuse", "not permitted").await?;
        let none = cri.run(&pod_id, &sleeper("none", &image), &config).await?;
        fails(
            &mut cri,
            &none,
            "mknod /tmp/fuse c 10 229 && exec 3</tmp/fuse",
            "not permitted",
        )
        .await?;
        // One that a privileged container has anyway.
        let mut privileged = asked("privileged", &fuse, "/dev/fuse", "rw");
        security(&mut privileged).privileged = true;
        let privileged = cri.run(&pod_id, &privileged, &config).await?;
        sh(&mut cri, &privileged, "exec 3<>/dev/fuse").await?;

        // Hardware of the host, and what this guest's kernel has not.
        let told = refused(&mut cri, &pod_id, &asked("x", &sgi, "/dev/x", "rw"), &config).await?;
        ensure!(
            told.contains("config.devices[0]") && told.contains("a VM cannot have"),
            "{told}"
        );
        let btrfs = host_device(&host, "btrfs", 234)?;
        let told = refused(&mut cri, &pod_id, &asked("x", &btrfs, "/dev/x", "rw"), &config).await?;
        ensure!(
            told.contains("the guest's kernel has no device btrfs-control"),
            "{told}"
        );
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// A volume's directory as kubelet makes it.
fn empty_dir(host: &Host, pod: &str, name: &str) -> Result<String> {
    let path = host.dir().join(format!(
        "kubelet/pods/uid-{pod}/volumes/kubernetes.io~empty-dir/{name}"
    ));
    fs::create_dir_all(&path)?;
    Ok(path.display().to_string())
}

#[test]
fn mounts_travel_between_containers_as_far_as_they_ask() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "travel");
        let pod_id = cri.run_pod(&config).await?;
        let volume = empty_dir(&host, "travel", "data")?;
        let with = |name: &str, path: &str, mode: MountPropagation| {
            let mut config = sleeper(name, &image);
            config.mounts = vec![cri::Mount {
                host_path: path.into(),
                container_path: "/data".into(),
                propagation: mode.into(),
                ..Default::default()
            }];
            security(&mut config).privileged = mode == MountPropagation::PropagationBidirectional;
            config
        };
        let giver = with("giver", &volume, MountPropagation::PropagationBidirectional);
        let giver = cri.run(&pod_id, &giver, &config).await?;
        let taker = with("taker", &volume, MountPropagation::PropagationHostToContainer);
        let taker = cri.run(&pod_id, &taker, &config).await?;
        let hermit = with("hermit", &volume, MountPropagation::PropagationPrivate);
        let hermit = cri.run(&pod_id, &hermit, &config).await?;
        sh(
            &mut cri,
            &giver,
            "mkdir /data/sub && mount -t tmpfs none /data/sub && echo hi > /data/sub/file",
        )
        .await?;
        ensure!(sh(&mut cri, &taker, "cat /data/sub/file").await? == "hi\n");
        sh(&mut cri, &hermit, "test -d /data/sub && ! test -e /data/sub/file").await?;
        // What is there when a container begins, it sees, however private.
        let late = with("late", &volume, MountPropagation::PropagationPrivate);
        let late = cri.run(&pod_id, &late, &config).await?;
        ensure!(sh(&mut cri, &late, "cat /data/sub/file").await? == "hi\n");
        // Both ways between two that give.
        let other = with("other", &volume, MountPropagation::PropagationBidirectional);
        let other = cri.run(&pod_id, &other, &config).await?;
        sh(
            &mut cri,
            &other,
            "mkdir /data/back && mount -t tmpfs none /data/back && echo ho > /data/back/file",
        )
        .await?;
        ensure!(sh(&mut cri, &giver, "cat /data/back/file").await? == "ho\n");
        sh(&mut cri, &giver, "umount /data/sub").await?;
        sh(&mut cri, &taker, "! test -e /data/sub/file").await?;
        let status = cri.status(&other).await?;
        ensure!(
            status.mounts[0].propagation() == MountPropagation::PropagationBidirectional,
            "{status:?}"
        );
        // Who takes cannot give.
        fails(&mut cri, &taker, "mount -t tmpfs none /data/back", "").await?;

        let directory = host.dir().join("directory");
        fs::create_dir(&directory)?;
        let to_host = with(
            "to-host",
            &directory.display().to_string(),
            MountPropagation::PropagationBidirectional,
        );
        let told = refused(&mut cri, &pod_id, &to_host, &config).await?;
        ensure!(
            told.contains("Bidirectional") && told.contains("cannot appear on the host"),
            "{told}"
        );
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)?;
        daemon.terminate().await
    })
}

/// A tmpfs of the host's for an emptyDir; unmounted at the end.
struct Memory(String);

impl Memory {
    fn mount(path: String, size: &str) -> Result<Self> {
        command(Command::new("mount").args(["-t", "tmpfs", "-o", size, "none", &path]))?;
        Ok(Self(path))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let done = Command::new("umount").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.0);
        }
    }
}

#[test]
fn shared_memory_is_as_large_as_the_pod_may_be_or_as_the_volume_that_is_mounted_there() -> Result<()> {
    const SIZE: &str = "df -k /dev/shm | tail -n 1 | awk '{print $2}'";
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let mut config = pod(&host, "shm");
        let resources = config
            .linux
            .get_or_insert_default()
            .resources
            .get_or_insert_default();
        resources.memory_limit_in_bytes = 200 << 20;
        let pod_id = cri.run_pod(&config).await?;
        let plain = cri.run(&pod_id, &sleeper("plain", &image), &config).await?;
        let size = sh(&mut cri, &plain, SIZE).await?;
        ensure!(size.trim() == (200 << 10).to_string(), "{size}");
        let memory = Memory::mount(empty_dir(&host, "shm", "memory")?, "size=12m,mode=1777")?;
        let mut own = sleeper("own", &image);
        own.mounts = vec![cri::Mount {
            host_path: memory.0.clone(),
            container_path: "/dev/shm".into(),
            ..Default::default()
        }];
        let own = cri.run(&pod_id, &own, &config).await?;
        let size = sh(&mut cri, &own, SIZE).await?;
        ensure!(size.trim() == (12 << 10).to_string(), "{size}");
        cri.remove_pod(&pod_id).await?;
        Ok(())
    })
}

/// CPUs that the threads of the pods' processes may run on, each list once.
fn allowed(host: &Host) -> Result<BTreeSet<String>> {
    let mut lists = BTreeSet::new();
    for process in host.leftovers()?.processes {
        let pid = process.split(' ').next().unwrap_or_default();
        for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
            // A thread that ends meanwhile has no list.
            let status = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
            let list = status
                .lines()
                .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
            lists.extend(list.map(|list| list.trim().to_owned()));
        }
    }
    Ok(lists)
}

/// Whether a cpuset can be set here, and why not.
fn cpusets() -> Result<(), &'static str> {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    if online.trim() == "0" {
        return Err("this host has a single CPU");
    }
    let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if unified.split_whitespace().any(|name| name == "cpuset") || Path::new(V1).join("cpuset.cpus").exists() {
        return Ok(());
    }
    Err("this host has no cpuset controller")
}

const V1: &str = "/sys/fs/cgroup/cpuset";

/// A pod's group, as kubelet makes it.
struct Group(std::path::PathBuf);

impl Group {
    fn make(name: &str) -> Result<Self> {
        let top = Path::new(V1);
        let (top, v1) = if top.join("cpuset.cpus").exists() {
            (top, true)
        } else {
            (Path::new("/sys/fs/cgroup"), false)
        };
        let group = top.join(name);
        fs::create_dir(&group)?;
        let made = Self(group);
        if v1 {
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(made.0.join(file), fs::read(top.join(file))?)?;
            }
        }
        Ok(made)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            eprintln!("{} stays: {error}", self.0.display());
        }
    }
}

#[test]
fn cpus_of_the_host_pin_the_vm_there_and_are_not_seen_inside() -> Result<()> {
    if let Err(reason) = cpusets() {
        skipped(reason);
        return Ok(());
    }
    let host = Host::enter()?;
    let group = Group::make(&format!("caisson-e2e-cpus-{}", std::process::id()))?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let mut config = pod(&host, "pinned");
        let name = group.0.file_name().and_then(|name| name.to_str());
        config.linux.get_or_insert_default().cgroup_parent = format!("/{}", name.context("no name")?);
        let pod_id = cri.run_pod(&config).await?;
        let all = allowed(&host)?;
        let pinned = |name: &str, cpus: &str| {
            let mut config = sleeper(name, &image);
            let linux = config.linux.get_or_insert_default();
            linux.resources.get_or_insert_default().cpuset_cpus = cpus.into();
            config
        };
        let lists = |list: &[&str]| list.iter().map(ToString::to_string).collect::<BTreeSet<_>>();

        let one = cri.run(&pod_id, &pinned("one", "0"), &config).await?;
        ensure!(allowed(&host)? == lists(&["0"]), "{:?}", allowed(&host)?);
        let two = cri.run(&pod_id, &pinned("two", "1"), &config).await?;
        ensure!(allowed(&host)? == lists(&["0-1"]), "{:?}", allowed(&host)?);
        // The guest numbers its own CPUs, all of which it has.
        sh(
            &mut cri,
            &two,
            "test $(nproc) = $(grep -c ^processor /proc/cpuinfo)",
        )
        .await?;
        let status = cri.status(&two).await?;
        let told = status.resources.and_then(|resources| resources.linux);
        ensure!(told.context("no resources")?.cpuset_cpus == "1");

        let update = |cpus: &str| cri::UpdateContainerResourcesRequest {
            container_id: one.clone(),
            linux: Some(cri::LinuxContainerResources {
                cpuset_cpus: cpus.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        cri.runtime.update_container_resources(update("1")).await?;
        ensure!(allowed(&host)? == lists(&["1"]), "{:?}", allowed(&host)?);
        let error = cri.runtime.update_container_resources(update("1,8191")).await;
        let error = error.err().context("a CPU that there is not was accepted")?;
        ensure!(error.code() == tonic::Code::FailedPrecondition, "{error}");
        ensure!(allowed(&host)? == lists(&["1"]), "{:?}", allowed(&host)?);
        let told = refused(&mut cri, &pod_id, &pinned("x", "one"), &config).await?;
        ensure!(told.contains("config.linux.resources.cpuset_cpus"), "{told}");

        // What nobody has any more, anybody may use.
        cri.remove(&one).await?;
        cri.remove(&two).await?;
        ensure!(allowed(&host)? == all, "{:?} {all:?}", allowed(&host)?);
        cri.stop_pod(&pod_id).await?;
        let left: Vec<_> = fs::read_dir(&group.0)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        ensure!(left.is_empty(), "groups left behind: {left:?}");
        cri.remove_pod(&pod_id).await?;
        daemon.terminate().await
    })
}
