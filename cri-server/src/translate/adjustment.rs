//! What NRI plugins want of a container that is being created, put into its specification. Each wish is granted, or refused by its name:
//! what belongs to the host's kernel is not there for a process in a VM.
//!
//! Looks at the host paths of mounts and devices, so it may block.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use caisson_cri_api::v1;
use caisson_nri::{
    removal,
    v1alpha1::{
        ContainerAdjustment, Hooks, KeyValue, LinuxContainerAdjustment, LinuxDevice, LinuxSeccomp, Mount,
    },
};
use caisson_sandbox::{guest, spec::ContainerSpec};
use serde_json::json;

use super::{Refusals, devices, mounts, nri_limits};
use crate::status::chain;

/// `spec` as plugins want it.
pub fn adjusted(mut spec: ContainerSpec, wanted: &ContainerAdjustment) -> Result<ContainerSpec, Refusals> {
    let mut refusals = Refusals::default();
    impossible(wanted, &mut refusals);
    annotations(&mut spec, wanted);
    adjust_mounts(&mut spec, &wanted.mounts, &mut refusals);
    let mut process = spec.guest.process.take().unwrap_or_default();
    env(&mut process, &wanted.env, &mut refusals);
    args(&mut process, &wanted.args, &mut refusals);
    rlimits(&mut process, wanted, &mut refusals);
    if let Some(linux) = &wanted.linux {
        impossible_linux(linux, &mut refusals);
        if let Some(score) = &linux.oom_score_adj {
            match i32::try_from(score.value) {
                Ok(score) if (-1000..=1000).contains(&score) => process.oom_score_adj = score,
                _ => refusals.add(
                    "adjust.linux.oom_score_adj",
                    format!("{} is not between -1000 and 1000", score.value),
                ),
            }
        }
        if let Some(policy) = &linux.seccomp_policy {
            process.seccomp = seccomp(policy, process.capabilities.as_ref(), &mut refusals);
        }
        if let Some(resources) = &linux.resources {
            let change = nri_limits::change(resources, "adjust.linux.resources", &mut refusals);
            // VMs are pinned before a container is made; afterwards an update can change it.
            for (list, name) in [
                (&change.cpuset.cpus, "cpuset_cpus"),
                (&change.cpuset.mems, "cpuset_mems"),
            ] {
                refusals.add_if(
                    !list.is_empty(),
                    &format!("adjust.linux.resources.{name}"),
                    "can be asked for by an update only",
                );
            }
            let before = spec.guest.resources.take().unwrap_or_default();
            spec.guest.resources = Some(change.apply(&before));
        }
        adjust_devices(&mut spec, &linux.devices, &mut refusals);
    }
    spec.guest.process = Some(process);
    refusals.settle(spec)
}

/// What nothing here can honour.
fn impossible(wanted: &ContainerAdjustment, refusals: &mut Refusals) {
    refusals.add_if(
        wanted
            .hooks
            .as_ref()
            .is_some_and(|hooks| *hooks != Hooks::default()),
        "adjust.hooks",
        "an OCI hook runs on the host, where the container is not",
    );
    refusals.add_if(
        !wanted.cdi_devices.is_empty(),
        "adjust.CDI_devices",
        "devices of the host are not supported yet",
    );
}

fn impossible_linux(linux: &LinuxContainerAdjustment, refusals: &mut Refusals) {
    let in_guest = "the container's is in the guest, and not for the host to choose";
    for (set, field, reason) in [
        (!linux.cgroups_path.is_empty(), "cgroups_path", in_guest),
        (
            linux.io_priority.is_some(),
            "io_priority",
            "is not supported in the guest",
        ),
        (!linux.namespaces.is_empty(), "namespaces", in_guest),
        (
            !linux.sysctl.is_empty(),
            "sysctl",
            "kernel parameters are the pod's, which exists already",
        ),
        (
            !linux.net_devices.is_empty(),
            "net_devices",
            "a network device of the host cannot move into a VM",
        ),
        (
            linux.scheduler.is_some(),
            "scheduler",
            "is not supported in the guest",
        ),
        (
            linux.rdt.is_some(),
            "rdt",
            "cache and bandwidth are the host's, whose threads are the VM's and not the container's",
        ),
        (
            linux.memory_policy.is_some(),
            "memory_policy",
            "memory nodes are the host's, and the guest has one",
        ),
    ] {
        refusals.add_if(set, &format!("adjust.linux.{field}"), reason);
    }
}

fn annotations(spec: &mut ContainerSpec, wanted: &ContainerAdjustment) {
    for gone in wanted.annotations.keys().filter_map(|key| removal(key)) {
        spec.annotations.remove(gone);
    }
    for (key, value) in &wanted.annotations {
        if removal(key).is_none() {
            spec.annotations.insert(key.clone(), value.clone());
        }
    }
}

fn env(process: &mut guest::Process, wanted: &[KeyValue], refusals: &mut Refusals) {
    let is = |word: &[u8], name: &str| {
        word.strip_prefix(name.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&b'='))
    };
    for (index, KeyValue { key, value }) in wanted.iter().enumerate() {
        let name = removal(key).unwrap_or(key);
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            refusals.add(
                format!("adjust.env[{index}]"),
                format!("{name:?} is not a name, or its value has a NUL byte"),
            );
            continue;
        }
        if removal(key).is_some() {
            process.env.retain(|word| !is(word, name));
            continue;
        }
        let word = format!("{name}={value}").into_bytes();
        match process.env.iter_mut().find(|word| is(word, name)) {
            Some(place) => *place = word,
            None => process.env.push(word),
        }
    }
}

fn args(process: &mut guest::Process, wanted: &[String], refusals: &mut Refusals) {
    if wanted.is_empty() {
        return;
    }
    refusals.add_if(
        wanted.iter().any(|word| word.contains('\0')),
        "adjust.args",
        "has a NUL byte in an argument",
    );
    process.args = wanted.iter().map(|word| word.clone().into_bytes()).collect();
}

fn rlimits(process: &mut guest::Process, wanted: &ContainerAdjustment, refusals: &mut Refusals) {
    for limit in &wanted.rlimits {
        refusals.add_if(
            limit.soft > limit.hard,
            &format!("adjust.rlimits[{:?}]", limit.r#type),
            "has a soft limit above the hard one",
        );
        process.rlimits.retain(|known| known.r#type != limit.r#type);
        process.rlimits.push(guest::Rlimit {
            r#type: limit.r#type.clone(),
            soft: limit.soft,
            hard: limit.hard,
        });
    }
}

fn seccomp(
    policy: &LinuxSeccomp,
    capabilities: Option<&guest::Capabilities>,
    refusals: &mut Refusals,
) -> Option<guest::SeccompFilter> {
    // The compiler reads profiles as the OCI specification writes them, which is what the message carries.
    let rules: Vec<_> = policy
        .syscalls
        .iter()
        .map(|rule| {
            let args: Vec<_> = rule
                .args
                .iter()
                .map(|arg| json!({"index": arg.index, "value": arg.value, "valueTwo": arg.value_two, "op": arg.op}))
                .collect();
            json!({
                "names": rule.names,
                "action": rule.action,
                "errnoRet": rule.errno_ret.as_ref().map(|errno| errno.value),
                "args": args,
            })
        })
        .collect();
    let profile = json!({
        "defaultAction": policy.default_action,
        "defaultErrnoRet": policy.default_errno.as_ref().map(|errno| errno.value),
        "architectures": policy.architectures,
        "flags": policy.flags,
        "listenerPath": policy.listener_path,
        "syscalls": rules,
    });
    let bounding = capabilities.map_or(&[][..], |sets| sets.bounding.as_slice());
    match caisson_seccomp::compile(&profile.to_string(), bounding) {
        Ok(program) => Some(guest::SeccompFilter {
            program: program.to_bytes(),
            flags: program.flags,
        }),
        Err(error) => {
            refusals.add("adjust.linux.seccomp_policy", chain(&error));
            None
        }
    }
}

fn same(one: &str, other: &str) -> bool {
    Path::new(one).components().eq(Path::new(other).components())
}

/// Removals first; a mount that is set takes the place of what was at its path.
fn adjust_mounts(spec: &mut ContainerSpec, wanted: &[Mount], refusals: &mut Refusals) {
    for mount in wanted {
        let path = removal(&mount.destination).unwrap_or(&mount.destination);
        take_away(spec, path);
    }
    let mut host = Vec::new();
    for mount in wanted
        .iter()
        .filter(|mount| removal(&mount.destination).is_none())
    {
        let field = format!("adjust.mounts[{:?}]", mount.destination);
        match mount.r#type.as_str() {
            "tmpfs" => match tmpfs(mount) {
                Ok(mount) => spec.guest.mounts.push(mount),
                Err(reason) => refusals.add(field, reason),
            },
            "" | "bind" | "none" => match bind(mount) {
                Ok(mount) => host.push(mount),
                Err(reason) => refusals.add(field, reason),
            },
            other => refusals.add(field, format!("type {other:?} cannot be mounted in the guest")),
        }
    }
    let mut found = Refusals::default();
    let made = mounts::mounts(&host, None, &mut found);
    for refusal in found.list() {
        let field = refusal.field.replacen("config.mounts", "adjust.mounts", 1);
        refusals.add(field, refusal.reason.clone());
    }
    spec.files.extend(made.files);
    spec.volumes.extend(made.volumes);
    spec.mounts.extend(made.records);
}

fn take_away(spec: &mut ContainerSpec, path: &str) {
    spec.files.retain(|file| !same(&file.container_path, path));
    spec.volumes.retain(|volume| !same(&volume.container_path, path));
    spec.image_volumes
        .retain(|volume| !same(&volume.container_path, path));
    spec.mounts.retain(|mount| !same(&mount.container_path, path));
    spec.guest.mounts.retain(|mount| !same(&mount.destination, path));
    spec.guest.image_volumes.retain(|volume| !same(volume, path));
    if !spec.guest.termination_log_path.is_empty() && same(&spec.guest.termination_log_path, path) {
        spec.guest.termination_log_path.clear();
        spec.termination_file = None;
    }
}

/// A path of the host's.
fn bind(mount: &Mount) -> Result<v1::Mount, String> {
    let mut wanted = v1::Mount {
        container_path: mount.destination.clone(),
        host_path: mount.source.clone(),
        ..Default::default()
    };
    for option in &mount.options {
        match option.as_str() {
            "bind" | "rbind" | "rw" => {}
            "ro" => wanted.readonly = true,
            "rro" => {
                wanted.readonly = true;
                wanted.recursive_read_only = true;
            }
            "private" | "rprivate" => {
                wanted.propagation = v1::MountPropagation::PropagationPrivate.into();
            }
            "slave" | "rslave" => {
                wanted.propagation = v1::MountPropagation::PropagationHostToContainer.into();
            }
            "shared" | "rshared" => {
                wanted.propagation = v1::MountPropagation::PropagationBidirectional.into();
            }
            other => return Err(format!("option {other:?} is not supported")),
        }
    }
    Ok(wanted)
}

fn tmpfs(mount: &Mount) -> Result<guest::Mount, String> {
    let inside = &mount.destination;
    if !inside.starts_with('/') || inside.split('/').any(|part| part == "..") || inside.contains('\0') {
        return Err("is not an absolute path without \"..\"".into());
    }
    let mut source = guest::TmpfsSource {
        size_bytes: 0,
        mode: 0o1777,
    };
    let mut readonly = false;
    for option in &mount.options {
        match option.split_once('=') {
            None if option == "ro" => readonly = true,
            None if option == "rw" => {}
            Some(("size", size)) => source.size_bytes = size_bytes(size)?,
            Some(("mode", mode)) => {
                source.mode = u32::from_str_radix(mode, 8)
                    .ok()
                    .filter(|mode| *mode <= 0o7777)
                    .ok_or_else(|| format!("option mode={mode} is not a mode"))?;
            }
            _ => return Err(format!("option {option:?} is not supported")),
        }
    }
    Ok(guest::Mount {
        destination: inside.clone(),
        readonly,
        source: Some(guest::mount::Source::Tmpfs(source)),
        ..Default::default()
    })
}

/// As mount(8) reads sizes of tmpfs, but for percentages.
fn size_bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'k' | b'K') => (text.get(..text.len() - 1), 10),
        Some(b'm' | b'M') => (text.get(..text.len() - 1), 20),
        Some(b'g' | b'G') => (text.get(..text.len() - 1), 30),
        _ => (Some(text), 0),
    };
    digits
        .and_then(|digits| digits.parse::<u64>().ok())
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("option size={text} is not a size"))
}

fn adjust_devices(spec: &mut ContainerSpec, wanted: &[LinuxDevice], refusals: &mut Refusals) {
    for device in wanted {
        let path = removal(&device.path).unwrap_or(&device.path);
        spec.disks.retain(|disk| !same(&disk.container_path, path));
        spec.guest
            .character_devices
            .retain(|device| !same(&device.path, path));
        if removal(&device.path).is_some() {
            continue;
        }
        let field = format!("adjust.linux.devices[{:?}]", device.path);
        for (set, name) in [
            (device.file_mode.is_some(), "file_mode"),
            (device.uid.is_some(), "uid"),
            (device.gid.is_some(), "gid"),
        ] {
            refusals.add_if(
                set,
                &format!("{field}.{name}"),
                "a device has the host's mode and owner",
            );
        }
        let asked = v1::Device {
            container_path: device.path.clone(),
            host_path: on_host(device),
            permissions: "rwm".into(),
        };
        let mut found = Refusals::default();
        let made = devices::devices(&[asked], &mut found);
        spec.disks.extend(made.disks);
        spec.guest.character_devices.extend(made.character);
        for refusal in found.list() {
            refusals.add(field.clone(), refusal.reason.clone());
        }
    }
}

/// Its node on the host: at the same path, else where udev lists it by its numbers.
fn on_host(device: &LinuxDevice) -> String {
    let numbers = |rdev: u64| (i64::from(libc::major(rdev)), i64::from(libc::minor(rdev)));
    let same_node = device.path.starts_with('/')
        && fs::metadata(&device.path).is_ok_and(|node| numbers(node.rdev()) == (device.major, device.minor));
    if same_node {
        return device.path.clone();
    }
    let kind = if device.r#type == "b" { "block" } else { "char" };
    format!("/dev/{kind}/{}:{}", device.major, device.minor)
}

#[cfg(test)]
mod tests;
