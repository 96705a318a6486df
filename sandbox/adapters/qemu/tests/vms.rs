//! Real QEMU processes, under TCG, with guests of a few instructions; one test boots the distribution's kernel.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail like tests")]

mod machine;
mod taps;

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use caisson_hypervisor::{
    Disk, Hypervisor, HypervisorError, Nic, ProcessRef, ProcessRole, UID_BASE, UID_COUNT, Vm, VmUser,
};
use caisson_qemu::{Accelerator, Qemu, QemuConfig};
use machine::{Bench, LIMIT, backend, cached_kernel, driver, driver_as, processes_of, sleeping_initramfs};

fn disk(serial: &str, path: PathBuf) -> Disk {
    Disk {
        serial: serial.into(),
        files: vec![path],
        read_only: true,
    }
}

fn vmm_pid(vm: &dyn Vm) -> i32 {
    vm.record()
        .processes
        .iter()
        .find(|p| p.role == ProcessRole::Vmm)
        .unwrap()
        .pid
}

#[tokio::test]
async fn a_launched_vm_answers_takes_disks_and_is_gone_after_a_kill() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let mut spec = bench.spec();
    spec.disks = vec![Disk {
        read_only: false,
        ..disk("scratch", bench.image("scratch.img", 1 << 20))
    }];
    let vm = driver.launch(spec).await.unwrap();
    let record = vm.record();
    assert_eq!(record.driver, "qemu");
    assert_eq!(record.processes.len(), 2);
    assert_eq!(record.processes[0].role, ProcessRole::Vmm);
    assert_eq!(processes_of(&bench.id).len(), 2);
    assert!(vm.vsock().exists() && vm.console().exists());

    vm.attach(disk("one", bench.image("one.img", 1 << 20)))
        .await
        .unwrap();
    vm.attach(disk("two", bench.image("two.img", 1 << 20)))
        .await
        .unwrap();
    vm.attach(disk("three", bench.image("three.img", 1 << 20)))
        .await
        .unwrap();
    assert_eq!(
        vm.record().slots,
        [Some("one".into()), Some("two".into()), Some("three".into())]
    );
    let error = vm.attach(disk("four", bench.path("one.img"))).await.unwrap_err();
    assert!(
        matches!(&error, HypervisorError::NoSlot { slots: 3, .. }),
        "{error}"
    );
    vm.detach("never-attached").await.unwrap();

    assert!(
        tokio::time::timeout(Duration::from_millis(50), vm.wait())
            .await
            .is_err(),
        "it still runs"
    );
    vm.kill().await.unwrap();
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
    assert_eq!(vm.wait().await.reason, "qemu was killed by signal 9");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_cannot_be_attached_leaves_its_slot_free() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    let missing = vm.attach(disk("a", bench.path("missing.img"))).await.unwrap_err();
    assert!(missing.to_string().contains("missing.img"), "{missing}");
    assert!(vm.attach(disk("a,b", bench.image("x.img", 512))).await.is_err());
    assert!(vm.attach(disk("dir", bench.path("vm"))).await.is_err());
    assert_eq!(vm.record().slots, [None, None, None]);
    vm.attach(disk("a", bench.path("x.img"))).await.unwrap();
    assert!(
        vm.attach(disk("a", bench.path("x.img"))).await.is_err(),
        "one serial, one disk"
    );
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn several_files_are_one_disk_if_they_are_only_read() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    let several = |serial: &str, read_only| Disk {
        files: vec![
            bench.image("metadata.img", 4096),
            bench.image("layer.img", 1 << 20),
            bench.image("other.img", 8192),
        ],
        read_only,
        ..disk(serial, PathBuf::new())
    };
    let error = vm.attach(several("w", false)).await.unwrap_err().to_string();
    assert!(error.contains("several files and writable"), "{error}");
    vm.attach(several("a", true)).await.unwrap();
    vm.attach(several("b", true)).await.unwrap();
    assert_eq!(vm.record().slots, [Some("a".into()), Some("b".into()), None]);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_disk_that_the_guest_does_not_release_is_a_deadline_and_keeps_its_slot() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    vm.attach(disk("held", bench.image("x.img", 1 << 20)))
        .await
        .unwrap();
    let error = vm.detach("held").await.unwrap_err();
    assert!(
        error.to_string().contains("the guest's release of disk held"),
        "{error}"
    );
    assert_eq!(vm.record().slots[0].as_deref(), Some("held"));
    vm.attach(disk("next", bench.path("x.img"))).await.unwrap();
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_vm_survives_its_daemon_and_is_adopted_with_its_disks() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    let before = vm.record();
    vm.attach(disk("late", bench.image("late.img", 1 << 20)))
        .await
        .unwrap();
    drop(vm);

    // The journal may be older than the last attach: QEMU knows better.
    let vm = driver.adopt(before.clone()).await.unwrap().expect("it runs");
    assert_eq!(vm.record().slots, [Some("late".into()), None, None]);
    assert_eq!(vm.record().processes, before.processes);
    vm.attach(disk("later", bench.path("late.img"))).await.unwrap();
    vm.kill().await.unwrap();
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
    assert!(
        driver.adopt(before).await.unwrap().is_none(),
        "a dead VM is not adopted"
    );
}

#[tokio::test]
async fn adopting_a_vm_without_its_vmm_kills_what_is_left() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    let record = vm.record();
    let backend = record.processes[1].open().unwrap().unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(backend.reference().pid).unwrap(),
        rustix::process::Signal::STOP,
    )
    .unwrap();
    record.processes[0]
        .open()
        .unwrap()
        .unwrap()
        .kill(LIMIT)
        .await
        .unwrap();
    assert!(record.processes[1].is_alive());
    assert!(driver.adopt(record.clone()).await.unwrap().is_none());
    assert!(!record.processes[1].is_alive());
}

#[tokio::test]
async fn a_vm_that_loses_its_vsock_backend_ends_and_says_so() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    vm.record().processes[1]
        .open()
        .unwrap()
        .unwrap()
        .kill(LIMIT)
        .await
        .unwrap();
    let exit = tokio::time::timeout(LIMIT, vm.wait()).await.unwrap();
    assert!(exit.reason.contains("vsock backend was lost"), "{}", exit.reason);
    assert_eq!(vm.wait().await, exit);
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
}

#[tokio::test]
async fn sweeping_finds_the_processes_of_a_vm_without_a_record() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    drop(driver.launch(bench.spec()).await.unwrap());
    assert_eq!(driver.sweep(&bench.id).await.unwrap(), 2);
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
    assert_eq!(driver.sweep(&bench.id).await.unwrap(), 0);
}

#[tokio::test]
async fn a_wedged_qemu_is_adopted_and_killed_all_the_same() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    let pid = rustix::process::Pid::from_raw(vmm_pid(&*vm)).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let attaching = {
        let image = bench.image("x.img", 1 << 20);
        async { vm.attach(disk("x", image)).await }
    };
    assert!(
        tokio::time::timeout(Duration::from_millis(200), attaching)
            .await
            .is_err()
    );
    let asked = Instant::now();
    vm.kill().await.unwrap();
    assert!(
        asked.elapsed() < Duration::from_secs(10),
        "killing waited for QMP"
    );
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
}

#[tokio::test]
async fn an_abandoned_launch_leaves_no_process() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let launching = driver.launch(bench.spec());
    assert!(
        tokio::time::timeout(Duration::from_millis(30), launching)
            .await
            .is_err()
    );
    let until = Instant::now() + LIMIT;
    while !processes_of(&bench.id).is_empty() {
        assert!(Instant::now() < until, "{:?} are left", processes_of(&bench.id));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_qemu_that_dies_at_start_is_quoted_and_leaves_no_process() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    fs::write(bench.path("kernel"), b"this is no kernel").unwrap();
    let error = driver.launch(bench.spec()).await.err().unwrap();
    assert!(matches!(error, HypervisorError::Died { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("qemu exited with status 1: ") && text.contains("kernel"),
        "{text}"
    );
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
}

#[tokio::test]
async fn a_backend_that_fails_is_the_one_that_is_blamed() {
    let Some(_) = driver().await else { return };
    let bench = Bench::new();
    let failing = bench.path("failing");
    fs::copy(backend(), &failing).unwrap();
    let config = QemuConfig {
        vsock_backend: failing,
        accelerator: Accelerator::Tcg,
        ..QemuConfig::default()
    };
    let driver = Qemu::detect(config).await.unwrap();
    let error = driver.launch(bench.spec()).await.err().unwrap().to_string();
    assert!(error.contains("exited with status 7: no vsock today"), "{error}");
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
}

#[tokio::test]
async fn missing_files_are_named() {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    let mut spec = bench.spec();
    spec.kernel = "/nonexistent/vmlinuz".into();
    let error = driver.launch(spec).await.err().unwrap().to_string();
    assert_eq!(error, "cannot open the kernel /nonexistent/vmlinuz");
    assert_eq!(processes_of(&bench.id), Vec::<i32>::new());
}

#[tokio::test]
async fn missing_programs_are_named_with_a_way_out() {
    let binary = Some(PathBuf::from("/nonexistent/qemu"));
    let config = QemuConfig {
        binary,
        vsock_backend: backend(),
        ..QemuConfig::default()
    };
    let error = Qemu::detect(config).await.unwrap_err().to_string();
    assert!(
        error.starts_with("cannot start /nonexistent/qemu: No such file"),
        "{error}"
    );
    let config = QemuConfig {
        vsock_backend: "/nonexistent/backend".into(),
        ..QemuConfig::default()
    };
    let Err(error) = Qemu::detect(config).await else {
        panic!("found a backend that is not there")
    };
    assert!(
        error.to_string().contains("serves the vsock device")
            || error.to_string().contains("not found in PATH")
    );
}

#[tokio::test]
async fn the_choice_is_described_with_its_reason() {
    let Some(driver) = driver().await else { return };
    let text = driver.describe();
    assert!(
        text.starts_with("QEMU ") && text.contains("TCG") && text.contains("configuration asks"),
        "{text}"
    );
    assert!(driver.is_emulated());
}

/// The user of a process that has no privilege and no network, checked.
fn confined_user(process: &ProcessRef) -> u32 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    for line in [
        "CapEff:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Groups:\t \n",
    ] {
        assert!(status.contains(line), "{line:?} is not in {status}");
    }
    if process.role == ProcessRole::Vmm {
        assert!(status.contains("Seccomp:\t2"), "{status}");
    }
    let network = fs::read_link(format!("/proc/{}/ns/net", process.pid)).unwrap();
    assert_ne!(network, fs::read_link("/proc/self/ns/net").unwrap());
    let ids = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let ids: Vec<u32> = line
            .split_ascii_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{status}");
        ids[0]
    };
    assert_eq!(ids("Uid:"), ids("Gid:"));
    ids("Uid:")
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: changing the user needs root");
    }
    root
}

#[tokio::test]
async fn both_processes_run_without_privilege_and_without_a_network() {
    if !is_root() {
        return;
    }
    let user = VmUser::Fixed {
        uid: 65534,
        gid: 65534,
    };
    let Some(driver) = driver_as(user).await else {
        return;
    };
    let bench = Bench::new();
    let vm = driver.launch(bench.spec()).await.unwrap();
    for process in vm.record().processes {
        assert_eq!(confined_user(&process), 65534);
    }
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn each_vm_is_a_user_of_its_own_that_can_reach_none_of_its_files() {
    if !is_root() {
        return;
    }
    let Some(_) = driver().await else { return };
    let mut seen = Vec::new();
    let mut running = Vec::new();
    let bench = Bench::new();
    let other = Bench::new();
    let private = fs::Permissions::from_mode(0o700);
    let backend_file = bench.path("backend");
    fs::copy(backend(), &backend_file).unwrap();
    let config = QemuConfig {
        vsock_backend: backend_file.clone(),
        accelerator: Accelerator::Tcg,
        ..QemuConfig::default()
    };
    let driver = Qemu::detect(config).await.unwrap();
    for (bench, mode) in [(&bench, 0o600), (&other, 0o644)] {
        let image = bench.image("secret.img", 1 << 20);
        for file in ["secret.img", "kernel", "initramfs"] {
            fs::set_permissions(bench.path(file), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(bench.dir.path(), private.clone()).unwrap();
        fs::set_permissions(bench.path("vm"), private.clone()).unwrap();
        let backend_mode = if mode == 0o600 { 0o700 } else { 0o755 };
        fs::set_permissions(&backend_file, fs::Permissions::from_mode(backend_mode)).unwrap();
        let mut spec = bench.spec();
        spec.disks = vec![disk("cold", image.clone())];
        let vm = driver.launch(spec).await.unwrap();
        vm.attach(disk("hot", image)).await.unwrap();
        let users: Vec<u32> = vm.record().processes.iter().map(confined_user).collect();
        assert_eq!(users[0], users[1], "QEMU and its vsock backend are one user");
        assert!((UID_BASE..UID_BASE + UID_COUNT).contains(&users[0]), "{users:?}");
        seen.push(users[0]);
        running.push(vm);
    }
    assert_ne!(seen[0], seen[1]);

    // A later daemon knows whose user is whose.
    let records: Vec<_> = running.drain(..).map(|vm| vm.record()).collect();
    for (record, user) in records.into_iter().zip(seen) {
        let vm = driver.adopt(record).await.unwrap().expect("it runs");
        assert_eq!(confined_user(&vm.record().processes[0]), user);
        assert_eq!(vm.record().slots[0].as_deref(), Some("hot"));
        vm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn network_devices_are_made_of_open_taps_with_one_or_several_queues() {
    let Some(driver) = driver().await else { return };
    let Some((single, several)) = taps::in_own_namespace() else {
        return;
    };
    let bench = Bench::new();
    let mut spec = bench.spec();
    spec.nics = vec![
        Nic {
            queues: vec![single],
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1450,
        },
        Nic {
            queues: several,
            mac: [2, 0, 0, 0, 0, 2],
            mtu: 9000,
        },
    ];
    let vm = driver.launch(spec).await.unwrap();
    let log = fs::read_to_string(bench.path("vm/qemu.log")).unwrap();
    assert_eq!(log, "", "QEMU complains");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn the_distribution_kernel_boots_takes_a_disk_and_gives_it_back() {
    let Some(kernel) = cached_kernel("distribution-", "vmlinuz") else {
        return;
    };
    plug_and_unplug(kernel, &[]).await;
}

#[tokio::test]
async fn the_tuned_kernel_boots_uses_a_disk_and_gives_it_back() {
    let Some(kernel) = cached_kernel("kernel-", "vmlinux") else {
        return;
    };
    // This one has the driver built in, which reads the partition table of each disk.
    plug_and_unplug(
        kernel,
        &[
            "[vda] 4096 512-byte logical blocks",
            "[vda] 8192 512-byte logical blocks",
        ],
    )
    .await;
}

async fn plug_and_unplug(kernel: PathBuf, seen: &[&str]) {
    let Some(driver) = driver().await else { return };
    let bench = Bench::new();
    fs::write(bench.path("initramfs"), sleeping_initramfs()).unwrap();
    let mut spec = bench.spec();
    spec.kernel = kernel;
    spec.memory_mib = 192;
    spec.attach_slots = 40;
    spec.cmdline = vec!["ignore_loglevel".into()];
    let vm = driver.launch(spec).await.unwrap();
    bench.console_shows(&*vm, "UP").await;
    for round in 0..2 {
        vm.attach(disk("data", bench.image("data.img", (round as u64 + 1) << 21)))
            .await
            .unwrap();
        assert_eq!(vm.record().slots[0].as_deref(), Some("data"));
        if let Some(text) = seen.get(round) {
            bench.console_shows(&*vm, text).await;
        }
        vm.detach("data").await.unwrap();
        assert!(vm.record().slots.iter().all(Option::is_none));
    }
    // The budget goes over more than one bridge.
    for slot in 0..40 {
        vm.attach(disk(&format!("disk-{slot}"), bench.path("data.img")))
            .await
            .unwrap();
    }
    assert!(matches!(
        vm.attach(disk("x", bench.path("data.img"))).await,
        Err(HypervisorError::NoSlot { .. })
    ));
    if !seen.is_empty() {
        // 26 letters end with vdz; the fortieth disk is vdan.
        bench.console_shows(&*vm, "[vdan] ").await;
    }
    vm.detach("disk-39").await.unwrap();
    vm.detach("disk-0").await.unwrap();
    vm.kill().await.unwrap();
    assert!(!Path::new(&format!("/proc/{}", vmm_pid(&*vm))).exists());
}
