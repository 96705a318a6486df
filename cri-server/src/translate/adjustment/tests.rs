use std::collections::BTreeMap;

use caisson_nri::v1alpha1::{
    Hook, LinuxCpu, LinuxMemory, LinuxPids, LinuxResources, LinuxSyscall, OptionalInt, OptionalInt64,
    OptionalUInt64, PosixRlimit,
};
use caisson_sandbox::spec::ContainerImage;

use super::*;

fn spec() -> ContainerSpec {
    ContainerSpec {
        name: "c".into(),
        attempt: 0,
        labels: BTreeMap::new(),
        annotations: [("old".to_owned(), "1".to_owned())].into(),
        image: ContainerImage {
            id: "sha256:1".into(),
            user_reference: "i".into(),
            reference: "i".into(),
            disk: vec!["/d".into()],
        },
        guest: guest::ContainerSpec {
            process: Some(guest::Process {
                args: vec![b"sh".to_vec()],
                env: vec![b"PATH=/bin".to_vec(), b"A=1".to_vec(), b"AB=1".to_vec()],
                rlimits: vec![guest::Rlimit {
                    r#type: "RLIMIT_NOFILE".into(),
                    soft: 1,
                    hard: 2,
                }],
                ..Default::default()
            }),
            resources: Some(guest::Resources {
                cpu_shares: 5,
                memory_limit_bytes: 7,
                ..Default::default()
            }),
            ..Default::default()
        },
        files: Vec::new(),
        volumes: Vec::new(),
        disks: Vec::new(),
        termination_file: None,
        log_path: None,
        stop_signal: 15,
        image_volumes: Vec::new(),
        mounts: Vec::new(),
        cpuset: caisson_sandbox::cpuset::Cpuset::default(),
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        r#type: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn mounts_of(list: Vec<Mount>) -> ContainerAdjustment {
    ContainerAdjustment {
        mounts: list,
        ..Default::default()
    }
}

fn linux(linux: LinuxContainerAdjustment) -> ContainerAdjustment {
    ContainerAdjustment {
        linux: Some(linux),
        ..Default::default()
    }
}

#[test]
fn nothing_wanted_changes_nothing() {
    assert_eq!(adjusted(spec(), &ContainerAdjustment::default()), Ok(spec()));
}

#[test]
fn environment_arguments_annotations_and_rlimits_are_as_plugins_want_them() {
    let pair = |key: &str, value: &str| KeyValue {
        key: key.into(),
        value: value.into(),
    };
    let wanted = ContainerAdjustment {
        env: vec![pair("-AB", ""), pair("A", "2"), pair("B", "x=y")],
        args: vec!["true".into()],
        annotations: [("-old", ""), ("new", "2")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        rlimits: vec![PosixRlimit {
            r#type: "RLIMIT_NOFILE".into(),
            soft: 8,
            hard: 9,
        }],
        ..Default::default()
    };
    let spec = adjusted(spec(), &wanted).unwrap();
    let process = spec.guest.process.unwrap();
    let env: Vec<_> = process
        .env
        .iter()
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    assert_eq!(env, ["PATH=/bin", "A=2", "B=x=y"]);
    assert_eq!(process.args, [b"true".to_vec()]);
    assert_eq!(spec.annotations, [("new".to_owned(), "2".to_owned())].into());
    assert_eq!(
        (
            process.rlimits.len(),
            process.rlimits[0].soft,
            process.rlimits[0].hard
        ),
        (1, 8, 9)
    );
}

#[test]
fn mounts_are_added_replaced_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().canonicalize().unwrap();
    let source = source.to_str().unwrap();
    let first = mounts_of(vec![
        mount("/data", "bind", source, &["rbind", "ro", "rslave"]),
        mount("/tmp", "tmpfs", "tmpfs", &["size=64m", "mode=700"]),
    ]);
    let with = adjusted(spec(), &first).unwrap();
    assert!(with.volumes[0].readonly && with.mounts[0].readonly);
    assert_eq!(
        with.volumes[0].propagation,
        caisson_sandbox::spec::Propagation::Slave
    );
    let Some(guest::mount::Source::Tmpfs(tmpfs)) = &with.guest.mounts[0].source else {
        panic!("no tmpfs");
    };
    assert_eq!((tmpfs.size_bytes, tmpfs.mode), (64 << 20, 0o700));
    let second = mounts_of(vec![
        mount("/data/", "bind", source, &["rw"]),
        mount("-/tmp", "", "", &[]),
    ]);
    let with = adjusted(with, &second).unwrap();
    assert_eq!((with.volumes.len(), with.volumes[0].readonly), (1, false));
    assert!(with.guest.mounts.is_empty());
    for (wrong, words) in [
        (mount("/x", "bind", source, &["nodev"]), "\"nodev\""),
        (mount("/x", "proc", "proc", &[]), "type \"proc\""),
        (mount("/x", "bind", "/nowhere/at/all", &[]), "/nowhere/at/all"),
        (mount("x", "tmpfs", "", &[]), "absolute"),
        (
            mount("/x", "tmpfs", "", &["size=99999999999g"]),
            "size=99999999999g",
        ),
    ] {
        let error = adjusted(spec(), &mounts_of(vec![wrong])).unwrap_err().to_string();
        assert!(
            error.contains(words) && error.contains("adjust.mounts"),
            "{error}"
        );
    }
}

#[test]
fn limits_are_set_over_those_that_are_there() {
    let wanted = linux(LinuxContainerAdjustment {
        resources: Some(LinuxResources {
            memory: Some(LinuxMemory {
                limit: Some(OptionalInt64 { value: 64 << 20 }),
                reservation: Some(OptionalInt64 { value: 1 << 20 }),
                ..Default::default()
            }),
            cpu: Some(LinuxCpu {
                quota: Some(OptionalInt64 { value: 50_000 }),
                period: Some(OptionalUInt64 { value: 100_000 }),
                ..Default::default()
            }),
            pids: Some(LinuxPids { limit: 12 }),
            ..Default::default()
        }),
        oom_score_adj: Some(OptionalInt { value: 900 }),
        ..Default::default()
    });
    let spec = adjusted(spec(), &wanted).unwrap();
    let resources = spec.guest.resources.unwrap();
    assert_eq!(
        (
            resources.cpu_shares,
            resources.memory_limit_bytes,
            resources.cpu_quota_micros
        ),
        (5, 64 << 20, 50_000)
    );
    assert_eq!(resources.unified["memory.low"], (1 << 20).to_string());
    assert_eq!(resources.unified["pids.max"], "12");
    assert_eq!(spec.guest.process.unwrap().oom_score_adj, 900);
}

#[test]
fn a_seccomp_policy_becomes_the_containers_filter() {
    let policy = |action: &str| LinuxSeccomp {
        default_action: "SCMP_ACT_ALLOW".into(),
        syscalls: vec![LinuxSyscall {
            names: vec!["mkdir".into()],
            action: action.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let wanted = |action| {
        linux(LinuxContainerAdjustment {
            seccomp_policy: Some(policy(action)),
            ..Default::default()
        })
    };
    let made = adjusted(spec(), &wanted("SCMP_ACT_ERRNO")).unwrap();
    assert!(!made.guest.process.unwrap().seccomp.unwrap().program.is_empty());
    let error = adjusted(spec(), &wanted("SCMP_ACT_X")).unwrap_err().to_string();
    assert!(
        error.contains("adjust.linux.seccomp_policy") && error.contains("SCMP_ACT_X"),
        "{error}"
    );
}

#[test]
fn what_a_vm_cannot_do_is_refused_by_its_name_and_all_at_once() {
    let device = LinuxDevice {
        path: "/dev/absent".into(),
        r#type: "c".into(),
        major: 250,
        minor: 9,
        ..Default::default()
    };
    let mut wanted = linux(LinuxContainerAdjustment {
        cgroups_path: "/x".into(),
        io_priority: Some(Default::default()),
        namespaces: vec![Default::default()],
        sysctl: [("a".to_owned(), "b".to_owned())].into(),
        net_devices: [("eth1".to_owned(), Default::default())].into(),
        scheduler: Some(Default::default()),
        rdt: Some(Default::default()),
        memory_policy: Some(Default::default()),
        oom_score_adj: Some(OptionalInt { value: 5000 }),
        devices: vec![device],
        resources: Some(LinuxResources {
            memory: Some(LinuxMemory {
                kernel: Some(OptionalInt64 { value: 1 }),
                ..Default::default()
            }),
            cpu: Some(LinuxCpu {
                cpus: "0".into(),
                ..Default::default()
            }),
            devices: vec![Default::default()],
            ..Default::default()
        }),
        ..Default::default()
    });
    wanted.hooks = Some(Hooks {
        prestart: vec![Hook::default()],
        ..Default::default()
    });
    wanted.cdi_devices = vec![Default::default()];
    let error = adjusted(spec(), &wanted).unwrap_err().to_string();
    for field in [
        "adjust.hooks",
        "adjust.CDI_devices",
        "adjust.linux.cgroups_path",
        "adjust.linux.io_priority",
        "adjust.linux.namespaces",
        "adjust.linux.sysctl",
        "adjust.linux.net_devices",
        "adjust.linux.scheduler",
        "adjust.linux.rdt",
        "adjust.linux.memory_policy",
        "adjust.linux.oom_score_adj",
        "adjust.linux.devices",
        "adjust.linux.resources.memory.kernel",
        "adjust.linux.resources.cpuset_cpus",
        "adjust.linux.resources.devices",
    ] {
        assert!(error.contains(field), "{field} is not in {error}");
    }
}
