//! The driver against a program that behaves as a VMM, or fails as one could. The real one is tested where KVM is.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use caisson_builtin::{Builtin, BuiltinConfig};
use caisson_hypervisor::{
    Disk, Hypervisor, HypervisorError, VmSpec, VmUser,
    kvm::{Kvm, Vendor},
    user::Users,
};

/// Cargo builds examples along with tests, in a directory beside theirs.
fn fake() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    let path = exe.ancestors().nth(2).unwrap().join("examples/fake_vmm");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

async fn driver() -> Builtin {
    driver_with(false).await
}

async fn driver_with(huge_pages: bool) -> Builtin {
    let config = BuiltinConfig {
        vmm: fake(),
        kvm: "/dev/null".into(),
        users: Users::new(VmUser::Daemon).unwrap(),
        huge_pages,
    };
    Builtin::detect_on(config, &Kvm::Usable { vendor: Vendor::Amd })
        .await
        .unwrap()
}

struct Bench {
    dir: tempfile::TempDir,
    id: String,
}

impl Bench {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("vm")).unwrap();
        for file in ["kernel", "initramfs", "a.img"] {
            fs::write(dir.path().join(file), b"x").unwrap();
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("{:x}{:x}", std::process::id(), count + 0xb000);
        Self { dir, id }
    }

    fn spec(&self, mode: &str) -> VmSpec {
        VmSpec {
            id: self.id.clone(),
            dir: self.dir.path().join("vm"),
            kernel: self.dir.path().join("kernel"),
            initramfs: self.dir.path().join("initramfs"),
            cmdline: vec![format!("fake.{mode}")],
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 64,
            max_memory_mib: 64,
            nics: Vec::new(),
            disks: Vec::new(),
            attach_slots: 2,
            cgroup: None,
        }
    }

    fn disk(&self, serial: &str) -> Disk {
        Disk {
            serial: serial.into(),
            files: vec![self.dir.path().join("a.img"), self.dir.path().join("a.img")],
            read_only: true,
        }
    }

    async fn refused(&self, mode: &str) -> String {
        let error = match driver().await.launch(self.spec(mode)).await {
            Ok(_) => panic!("{mode} succeeded"),
            Err(error) => error.to_string(),
        };
        assert_eq!(self.processes(), 0, "{mode} left a process: {error}");
        error
    }

    fn processes(&self) -> usize {
        let marker = format!("CAISSON_VM_ID={}\0", self.id);
        let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        entries
            .filter(|entry| {
                let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
                String::from_utf8_lossy(&environment).contains(&marker)
            })
            .count()
    }
}

#[tokio::test]
async fn a_vm_takes_disks_and_is_gone_after_a_kill() {
    let bench = Bench::new();
    let vm = driver().await.launch(bench.spec("fine")).await.unwrap();
    let record = vm.record();
    assert_eq!((record.driver.as_str(), record.processes.len()), ("builtin", 1));
    assert_eq!(bench.processes(), 1);
    assert!(vm.vsock().exists() && vm.console().exists());
    let limits = fs::read_to_string(format!("/proc/{}/limits", record.processes[0].pid)).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let numbers = line[name.len()..].split_ascii_whitespace().take(2);
        numbers
            .map(|word| word.parse::<u64>().unwrap())
            .collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size"), [0, 0]);
    let files = limit("Max open files");
    assert!(files[0] == files[1] && files[0] <= 16 << 10, "{files:?}");
    vm.attach(bench.disk("one")).await.unwrap();
    vm.attach(bench.disk("two")).await.unwrap();
    assert_eq!(vm.record().slots, [Some("one".into()), Some("two".into())]);
    let error = vm.attach(bench.disk("three")).await.unwrap_err();
    assert!(
        matches!(&error, HypervisorError::NoSlot { slots: 2, .. }),
        "{error}"
    );
    vm.detach("one").await.unwrap();
    vm.detach("never-attached").await.unwrap();
    assert_eq!(vm.record().slots, [None, Some("two".into())]);
    let still_there = tokio::time::timeout(Duration::from_millis(50), vm.wait()).await;
    assert!(still_there.is_err(), "it still runs");
    vm.kill().await.unwrap();
    assert_eq!(vm.wait().await.reason, "caisson-vmm was killed by signal 9");
    assert_eq!(bench.processes(), 0);
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn huge_pages_are_asked_for_where_the_driver_is_told_to() {
    let bench = Bench::new();
    let without = driver().await.launch(bench.spec("huge")).await;
    assert!(without.is_err());
    let bench = Bench::new();
    let vm = driver_with(true).await.launch(bench.spec("huge")).await.unwrap();
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn disks_that_wait_for_space_are_told_of_also_after_an_adoption() {
    let bench = Bench::new();
    let driver = driver().await;
    let vm = driver.launch(bench.spec("space")).await.unwrap();
    let full = |disks: &BTreeSet<String>| disks.iter().eq(["full-1"]);
    vm.attach(bench.disk("fine")).await.unwrap();
    vm.attach(bench.disk("full-1")).await.unwrap();
    let mut told = vm.full_disks();
    told.wait_for(full).await.unwrap();
    let again = driver.adopt(vm.record()).await.unwrap().unwrap();
    again.full_disks().wait_for(full).await.unwrap();
    vm.detach("full-1").await.unwrap();
    told.wait_for(BTreeSet::is_empty).await.unwrap();
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_vmm_that_goes_on_in_another_process_is_held_by_that_one() {
    let bench = Bench::new();
    let driver = driver().await;
    let vm = driver.launch(bench.spec("fork")).await.unwrap();
    vm.attach(bench.disk("late")).await.unwrap();
    let mut record = vm.record();
    drop(vm);
    // The journal may be older than the last attach: the VMM knows better.
    record.slots = vec![None, None];
    let vm = driver.adopt(record.clone()).await.unwrap().expect("it runs");
    assert_eq!(vm.record().slots, [Some("late".into()), None]);
    assert_eq!(vm.record().processes, record.processes);
    vm.kill().await.unwrap();
    assert_eq!(bench.processes(), 0);
    assert!(driver.adopt(record).await.unwrap().is_none(), "it is gone");
}

#[tokio::test]
async fn what_a_vmm_says_before_its_end_is_the_reason_of_a_failed_launch() {
    let reason = Bench::new().refused("die").await;
    assert!(
        reason.contains("exited with status 3: nobody knows why"),
        "{reason}"
    );
    let reason = Bench::new().refused("fail").await;
    assert!(
        reason.contains("exited with status 1: KVM refuses to set MSR 0x10a"),
        "{reason}"
    );
    let reason = Bench::new().refused("babble").await;
    assert!(reason.contains("hear of the VMM's start"), "{reason}");
}

#[tokio::test]
async fn a_refused_disk_leaves_its_slot_free_and_says_why() {
    let bench = Bench::new();
    let vm = driver().await.launch(bench.spec("refuse")).await.unwrap();
    let error = vm.attach(bench.disk("one")).await.unwrap_err().to_string();
    assert_eq!(
        error,
        "add_disk was refused by the hypervisor: cannot attach it: no addresses are left"
    );
    assert_eq!(vm.record().slots, [None, None]);
    let missing = Disk {
        files: vec![bench.dir.path().join("missing.img")],
        ..bench.disk("one")
    };
    let error = vm.attach(missing).await.unwrap_err().to_string();
    assert!(error.contains("missing.img"), "{error}");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn a_vmm_that_answers_nothing_is_adopted_within_a_bound_and_can_be_killed() {
    let bench = Bench::new();
    let driver = driver().await;
    let vm = driver.launch(bench.spec("deaf")).await.unwrap();
    let record = vm.record();
    drop(vm);
    let vm = driver.adopt(record).await.unwrap().expect("it runs");
    vm.kill().await.unwrap();
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn a_cancelled_launch_leaves_no_process() {
    let bench = Bench::new();
    let driver = driver().await;
    let launch = driver.launch(bench.spec("mute"));
    assert!(
        tokio::time::timeout(Duration::from_millis(500), launch)
            .await
            .is_err(),
        "a mute VMM has not started"
    );
    driver.sweep(&bench.id).await.unwrap();
    assert_eq!(bench.processes(), 0);
}

#[tokio::test]
async fn impossible_specifications_are_refused_with_every_problem() {
    let bench = Bench::new();
    let driver = driver().await;
    let mut spec = bench.spec("fine");
    spec.vcpus = 3;
    spec.memory_mib = 1;
    let error = driver.launch(spec).await.err().unwrap().to_string();
    assert!(
        error.contains("3 vCPUs of at most 1") && error.contains("1 MiB of memory"),
        "{error}"
    );
    let mut spec = bench.spec("fine");
    spec.dir = bench.dir.path().join("x".repeat(120));
    let error = driver.launch(spec).await.err().unwrap().to_string();
    assert!(error.contains("107 bytes of a socket's path"), "{error}");
}
