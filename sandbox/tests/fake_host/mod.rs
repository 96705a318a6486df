//! A host without a hypervisor or CNI: what is taken of it is counted, every verb fails or hangs when told to, and VMs outlive the
//! daemon as real ones do.

#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test support; each test binary uses its part"
)]

pub mod agent;

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use caisson_hypervisor::{Disk, Hypervisor, HypervisorError, Vm, VmExit, VmGrowth, VmRecord, VmSpec};
use caisson_net::{GuestInterface, NetError, PodNetwork, PodNetworkSpec};
use caisson_sandbox::{
    PodNetworks, SandboxError, SandboxId, Sandboxes, SandboxesConfig, guest,
    hooks::{NoHooks, PodHooks},
    spec,
};
use tokio::{sync::watch, task::JoinSet};

use agent::Guest;

/// What shall go wrong, and what was called.
#[derive(Default)]
pub struct Faults {
    armed: Mutex<HashSet<String>>,
    calls: Mutex<Vec<String>>,
}

impl Faults {
    pub fn arm(&self, fault: &str) {
        self.armed.lock().unwrap().insert(fault.to_owned());
    }
    pub fn disarm(&self, fault: &str) {
        self.armed.lock().unwrap().remove(fault);
    }
    pub fn is(&self, fault: &str) -> bool {
        self.armed.lock().unwrap().contains(fault)
    }
    pub fn note(&self, call: &str) {
        self.calls.lock().unwrap().push(call.to_owned());
    }
    pub fn called(&self, call: &str) -> usize {
        self.calls
            .lock()
            .unwrap()
            .iter()
            .filter(|known| *known == call)
            .count()
    }
}

/// A VM's processes: they live in the host, not in the daemon's handle.
pub struct Machine {
    pub record: Mutex<VmRecord>,
    pub guest: Arc<Guest>,
    pub spec_memory_mib: u64,
    vsock: PathBuf,
    console: PathBuf,
    exit: watch::Sender<Option<VmExit>>,
    tasks: Mutex<JoinSet<()>>,
}

impl Machine {
    pub fn die(&self, reason: &str) {
        self.tasks.lock().unwrap().abort_all();
        self.exit.send_if_modified(|exit| {
            let first = exit.is_none();
            exit.get_or_insert_with(|| VmExit {
                reason: reason.to_owned(),
            });
            first
        });
    }
    fn alive(&self) -> bool {
        self.exit.borrow().is_none()
    }
}

/// The host.
#[derive(Clone, Default)]
pub struct Host {
    pub faults: Arc<Faults>,
    pub machines: Arc<Mutex<BTreeMap<String, Arc<Machine>>>>,
    pub networks: Arc<Mutex<BTreeSet<String>>>,
}

struct Handle {
    machine: Arc<Machine>,
    host: Host,
}

fn told_to_fail(what: &str) -> HypervisorError {
    HypervisorError::Refused {
        command: what.to_owned(),
        reason: "told to fail".into(),
    }
}

impl Host {
    async fn enter(&self, verb: &str) -> Result<(), HypervisorError> {
        self.faults.note(verb);
        if self.faults.is(&format!("{verb} hangs")) {
            return std::future::pending().await;
        }
        if self.faults.is(verb) {
            return Err(told_to_fail(verb));
        }
        Ok(())
    }
    pub fn machine(&self, id: &SandboxId) -> Arc<Machine> {
        self.machines.lock().unwrap()[&id.0].clone()
    }
    pub fn alive(&self) -> usize {
        self.machines
            .lock()
            .unwrap()
            .values()
            .filter(|machine| machine.alive())
            .count()
    }
}

#[async_trait]
impl Hypervisor for Host {
    fn name(&self) -> &'static str {
        "fake"
    }
    fn describe(&self) -> String {
        "a fake, because this is a test".into()
    }
    fn can_grow(&self) -> bool {
        self.faults.is("VMs can grow")
    }
    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
        self.enter("launch").await?;
        assert!(
            spec.disks
                .iter()
                .flat_map(|disk| &disk.files)
                .all(|file| file.exists()),
            "a disk is missing"
        );
        assert!(spec.dir.is_dir());
        let record = VmRecord {
            driver: "fake".into(),
            id: spec.id.clone(),
            dir: spec.dir.clone(),
            processes: Vec::new(),
            slots: vec![None; spec.attach_slots as usize],
        };
        let guest = Arc::new(Guest::default());
        let (vsock, console) = (spec.dir.join("vsock"), spec.dir.join("console"));
        std::fs::write(&console, "\x1b[31mfirst line\r\nlast words of the guest\r\n").unwrap();
        let tasks = if self.faults.is("no agent") {
            JoinSet::new()
        } else {
            agent::serve(&vsock, guest.clone(), self.faults.clone())
        };
        let machine = Arc::new(Machine {
            record: Mutex::new(record),
            guest,
            spec_memory_mib: spec.memory_mib,
            vsock,
            console,
            exit: watch::Sender::new(None),
            tasks: Mutex::new(tasks),
        });
        self.machines.lock().unwrap().insert(spec.id, machine.clone());
        if self.faults.is("launch fails late") {
            return Err(told_to_fail("launch"));
        }
        if self.faults.is("vm dies at once") {
            machine.die("fake was killed by signal 11");
        }
        Ok(Box::new(Handle {
            machine,
            host: self.clone(),
        }))
    }
    async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
        self.enter("adopt").await?;
        let machine = self.machines.lock().unwrap().get(&record.id).cloned();
        Ok(machine.filter(|machine| machine.alive()).map(|machine| {
            Box::new(Handle {
                machine,
                host: self.clone(),
            }) as Box<dyn Vm>
        }))
    }
    async fn sweep(&self, id: &str) -> Result<usize, HypervisorError> {
        self.enter("sweep").await?;
        let machine = self.machines.lock().unwrap().get(id).cloned();
        machine.iter().for_each(|machine| machine.die("swept"));
        Ok(usize::from(machine.is_some()))
    }
}

#[async_trait]
impl Vm for Handle {
    fn record(&self) -> VmRecord {
        self.machine.record.lock().unwrap().clone()
    }
    fn vsock(&self) -> &Path {
        &self.machine.vsock
    }
    fn console(&self) -> &Path {
        &self.machine.console
    }
    async fn attach(&self, disk: Disk) -> Result<(), HypervisorError> {
        self.host.enter("attach").await?;
        let mut record = self.machine.record.lock().unwrap();
        let slots = record.slots.len();
        match record.slots.iter_mut().find(|slot| slot.is_none()) {
            Some(slot) => *slot = Some(disk.serial),
            None => {
                return Err(HypervisorError::NoSlot {
                    serial: disk.serial,
                    slots,
                });
            }
        }
        Ok(())
    }
    async fn detach(&self, serial: &str) -> Result<(), HypervisorError> {
        self.host.enter("detach").await?;
        for slot in &mut self.machine.record.lock().unwrap().slots {
            slot.take_if(|held| held == serial);
        }
        Ok(())
    }
    async fn grow(&self, _: VmGrowth) -> Result<(), HypervisorError> {
        self.host.enter("grow").await
    }
    async fn wait(&self) -> VmExit {
        let mut exit = self.machine.exit.subscribe();
        let exit = exit.wait_for(Option::is_some).await.unwrap().clone();
        exit.unwrap()
    }
    async fn kill(&self) -> Result<(), HypervisorError> {
        self.host.enter("kill").await?;
        self.machine.die("killed");
        Ok(())
    }
}

#[async_trait]
impl PodNetworks for Host {
    async fn setup(&self, id: &str, _spec: &PodNetworkSpec) -> Result<PodNetwork, NetError> {
        self.faults.note("setup");
        // CNI may allocate even when it fails.
        self.networks.lock().unwrap().insert(id.to_owned());
        if self.faults.is("setup hangs") {
            return std::future::pending().await;
        }
        if self.faults.is("setup") {
            return Err(NetError::NoConfiguration("/told/to/fail".into()));
        }
        Ok(PodNetwork {
            netns: "/run/fake".into(),
            interfaces: vec![GuestInterface {
                name: "eth0".into(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1400,
                addresses: vec!["10.88.0.5/16".parse().unwrap()],
                tap: Vec::new(),
            }],
            routes: Vec::new(),
            neighbours: Vec::new(),
            dns: caisson_net::Dns {
                servers: vec!["10.0.0.10".into()],
                ..Default::default()
            },
            ips: vec!["10.88.0.5".parse().unwrap()],
        })
    }
    async fn teardown(&self, id: &str, _spec: &PodNetworkSpec) -> Result<(), NetError> {
        self.faults.note("teardown");
        if self.faults.is("teardown") {
            return Err(NetError::NoConfiguration("/told/to/fail".into()));
        }
        self.networks.lock().unwrap().remove(id);
        Ok(())
    }
}

/// A node: a host with directories, on which daemons come and go.
pub struct Node {
    pub host: Host,
    pub dir: tempfile::TempDir,
    pub boot_deadline: Duration,
    pub agent_deadline: Duration,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            host: Host::default(),
            dir: tempfile::tempdir().unwrap(),
            boot_deadline: Duration::from_secs(30),
            agent_deadline: Duration::from_secs(10),
        }
    }
}

impl Node {
    /// A kernel of its own without any profile, and a directory for files.
    pub fn apparmor(&self) -> caisson_sandbox::AppArmorSettings {
        let files = self.dir.path().join("apparmor.d");
        std::fs::create_dir_all(&files).unwrap();
        caisson_sandbox::AppArmorSettings {
            kernel: self.dir.path().join("apparmor"),
            ..caisson_sandbox::AppArmorSettings::new(files, None)
        }
    }
    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }
    pub fn logs(&self) -> PathBuf {
        let logs = self.dir.path().join("logs");
        std::fs::create_dir_all(&logs).unwrap();
        logs
    }
    pub async fn open(&self) -> Sandboxes {
        self.open_with_hooks(Arc::new(NoHooks)).await
    }
    pub async fn open_with_hooks(&self, hooks: Arc<dyn PodHooks>) -> Sandboxes {
        let config = SandboxesConfig {
            root: self.root(),
            run: self.dir.path().join("run"),
            kernel: "/kernel".into(),
            initramfs: "/initramfs".into(),
            cmdline: Vec::new(),
            default_memory_mib: 256,
            default_vcpus: 1,
            max_memory_mib: 2048,
            max_vcpus: 4,
            guest_overhead_mib: 40,
            host_reserve_mib: 64,
            scratch_bytes: 64 << 20,
            attach_slots: 2,
            apparmor: self.apparmor(),
            empty_dir_bytes: 16 << 20,
            file_server: PathBuf::from("/nonexistent/caisson-file-server"),
            boot_deadline: self.boot_deadline,
            agent_deadline: self.agent_deadline,
        };
        let (hypervisor, network) = (Arc::new(self.host.clone()), Arc::new(self.host.clone()));
        Sandboxes::open_with_hooks(config, hypervisor, network, hooks)
            .await
            .unwrap()
    }
    pub fn pod(&self, name: &str) -> spec::PodSpec {
        spec::PodSpec {
            identity: spec::PodIdentity {
                name: name.into(),
                namespace: "default".into(),
                uid: format!("uid-{name}"),
                attempt: 0,
            },
            handler: String::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            hostname: name.into(),
            log_directory: self.logs(),
            dns: None,
            network: PodNetworkSpec::default(),
            sysctls: BTreeMap::new(),
            share_pid_namespace: false,
            guest_pid_namespace: false,
            user_namespace: None,
            cgroup_parent: None,
            limits: spec::PodLimits::default(),
            cpuset: caisson_sandbox::cpuset::Cpuset::default(),
        }
    }
    /// Nothing of any pod is left on the host: no VM, network, record, disk or directory.
    pub fn assert_nothing_left(&self) {
        assert_eq!(self.host.alive(), 0, "a VM runs");
        assert!(self.host.networks.lock().unwrap().is_empty(), "a network is left");
        for dir in [self.root().join("pods"), self.dir.path().join("run/vm")] {
            let left: Vec<_> = std::fs::read_dir(&dir)
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .collect();
            assert!(left.is_empty(), "left: {left:?}");
        }
    }
}

pub fn container(name: &str) -> spec::ContainerSpec {
    container_of(name, &format!("sha256:{}", "ab".repeat(32)))
}

pub fn container_of(name: &str, image: &str) -> spec::ContainerSpec {
    spec::ContainerSpec {
        name: name.into(),
        attempt: 0,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
        image: spec::ContainerImage {
            id: image.into(),
            user_reference: "busybox".into(),
            reference: "busybox".into(),
            disk: vec!["/images/busybox.erofs".into()],
        },
        guest: guest::ContainerSpec {
            process: Some(guest::Process {
                args: vec![b"sh".to_vec()],
                ..Default::default()
            }),
            ..Default::default()
        },
        files: Vec::new(),
        volumes: Vec::new(),
        disks: Vec::new(),
        termination_file: None,
        log_path: Some(format!("{name}.log").into()),
        stop_signal: 15,
        cpuset: caisson_sandbox::cpuset::Cpuset::default(),
        image_volumes: Vec::new(),
        mounts: Vec::new(),
    }
}

/// Waits for a condition; the bound is for a test that hangs.
pub async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let wait = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

/// The error with all its causes.
pub fn chain(error: &SandboxError) -> String {
    error.chain()
}
