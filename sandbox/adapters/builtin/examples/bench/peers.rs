//! Who is compared: how each is started, and how its guest's agent is reached.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use caisson_builtin::{Builtin, BuiltinConfig};
use caisson_hypervisor::{Hypervisor, Vm, VmSpec, VmUser, console_tail, user::Users};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

use crate::{MEMORY_MIB, Outcome, PORT};

/// Context ids of QEMU's VMs begin here.
const CIDS: u32 = 100;

/// A way to run VMs.
#[async_trait]
pub(crate) trait Peer: Sync {
    fn name(&self) -> &'static str;
    /// What and which version it is.
    fn describe(&self) -> String;
    /// Its last boot has failed: whether there is another way to try, which is taken from now on.
    fn fall_back(&self) -> bool {
        false
    }
    /// `number` is one that no other running VM has.
    async fn start(&self, number: u32) -> Outcome<Box<dyn Vmm>>;
}

/// A VM.
#[async_trait]
pub(crate) trait Vmm: Send + Sync {
    fn pid(&self) -> u32;
    fn says_when_it_runs(&self) -> bool;
    async fn listens(&self) -> bool;
    fn console(&self) -> String;
    async fn kill(&self);
}

/// Our own.
pub(crate) struct Caisson {
    driver: Builtin,
    kernel: PathBuf,
    initramfs: PathBuf,
}

struct CaissonVm {
    vm: Box<dyn Vm>,
    _dir: tempfile::TempDir,
}

impl Caisson {
    pub(crate) async fn new(vmm: PathBuf, kernel: &Path, initramfs: &Path) -> Outcome<Self> {
        let config = BuiltinConfig {
            vmm,
            kvm: "/dev/kvm".into(),
            users: Users::new(VmUser::default()).unwrap(),
            huge_pages: false,
        };
        Ok(Self {
            driver: Builtin::detect(config).await.map_err(|e| chain(&e))?,
            kernel: kernel.to_owned(),
            initramfs: initramfs.to_owned(),
        })
    }
}

#[async_trait]
impl Peer for Caisson {
    fn name(&self) -> &'static str {
        "caisson-vmm"
    }

    fn describe(&self) -> String {
        self.driver.describe()
    }

    async fn start(&self, number: u32) -> Outcome<Box<dyn Vmm>> {
        let dir = tempfile::tempdir().unwrap();
        let spec = VmSpec {
            id: format!("{:x}{number:04x}", std::process::id()),
            dir: dir.path().to_owned(),
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline: Vec::new(),
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: MEMORY_MIB,
            max_memory_mib: MEMORY_MIB,
            nics: Vec::new(),
            disks: Vec::new(),
            attach_slots: 16,
            cgroup: None,
        };
        Ok(Box::new(CaissonVm {
            vm: self.driver.launch(spec).await.map_err(|e| chain(&e))?,
            _dir: dir,
        }))
    }
}

#[async_trait]
impl Vmm for CaissonVm {
    fn pid(&self) -> u32 {
        self.vm.record().processes[0].pid.cast_unsigned()
    }

    fn says_when_it_runs(&self) -> bool {
        true
    }

    async fn listens(&self) -> bool {
        let Ok(stream) = UnixStream::connect(self.vm.vsock()).await else {
            return false;
        };
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        let asked = stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await;
        asked.is_ok() && stream.read_line(&mut line).await.is_ok() && line.starts_with("OK ")
    }

    fn console(&self) -> String {
        console_tail(self.vm.console(), 4096).unwrap_or_default()
    }

    async fn kill(&self) {
        if let Err(e) = self.vm.kill().await {
            eprintln!("a VM stays: {}", chain(&e));
        }
    }
}

/// The least of a machine first; then with the timers and the interrupt controller of a PC.
const MACHINES: [&str; 2] = [
    "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,isa-serial=on",
    "microvm,x-option-roms=off,rtc=off,isa-serial=on",
];

/// QEMU with as little machine as it has.
pub(crate) struct Microvm {
    machine: AtomicUsize,
    kernel: PathBuf,
    initramfs: PathBuf,
    version: String,
}

struct MicrovmVm {
    child: Mutex<Child>,
    cid: u32,
    dir: tempfile::TempDir,
}

impl Microvm {
    fn machine(&self) -> &'static str {
        MACHINES[self.machine.load(Ordering::Relaxed) % MACHINES.len()]
    }

    pub(crate) fn new(kernel: &Path, initramfs: &Path) -> Outcome<Self> {
        let output = Command::new("qemu-system-x86_64")
            .arg("--version")
            .output()
            .map_err(|e| format!("qemu-system-x86_64: {e}"))?;
        if !Path::new("/dev/vhost-vsock").exists() {
            return Err("/dev/vhost-vsock is missing: modprobe vhost_vsock".into());
        }
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        Ok(Self {
            machine: AtomicUsize::new(0),
            kernel: kernel.to_owned(),
            initramfs: initramfs.to_owned(),
            version: text.lines().next().unwrap_or_default().to_owned(),
        })
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[async_trait]
impl Peer for Microvm {
    fn name(&self) -> &'static str {
        "QEMU microvm"
    }

    fn describe(&self) -> String {
        format!(
            "{}, -M {}, virtio-mmio, vhost-vsock",
            self.version,
            self.machine()
        )
    }

    fn fall_back(&self) -> bool {
        let tried = self.machine.fetch_add(1, Ordering::Relaxed);
        tried + 1 < MACHINES.len()
    }

    async fn start(&self, number: u32) -> Outcome<Box<dyn Vmm>> {
        let (dir, cid) = (tempfile::tempdir().unwrap(), CIDS + number);
        let console = dir.path().join("console");
        let log = File::create(dir.path().join("log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            // So that the vCPU's thread can be told from the others.
            .args(["-name", "peer,debug-threads=on"])
            .args(["-M", self.machine()])
            .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
            .args(["-m", &format!("{MEMORY_MIB}M")])
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            // As the built-in driver says it, but for PCI.
            .args(["-append", "console=ttyS0 quiet loglevel=2 panic=-1 no_timer_check random.trust_cpu=on i8042.noaux i8042.nokbd 8250.nr_uarts=1 cryptomgr.notests"])
            .args(["-serial", &format!("file:{}", console.display())])
            .args(["-device", &format!("vhost-vsock-device,guest-cid={cid}")])
            .args(["-device", "virtio-rng-device"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .map_err(|e| format!("qemu-system-x86_64: {e}"))?;
        Ok(Box::new(MicrovmVm {
            child: Mutex::new(child),
            cid,
            dir,
        }))
    }
}

#[async_trait]
impl Vmm for MicrovmVm {
    fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    fn says_when_it_runs(&self) -> bool {
        false
    }

    async fn listens(&self) -> bool {
        let cid = self.cid;
        tokio::task::spawn_blocking(move || vsock::connects(cid, PORT, Duration::from_millis(500)))
            .await
            .unwrap()
    }

    fn console(&self) -> String {
        let read = |name: &str| std::fs::read_to_string(self.dir.path().join(name)).unwrap_or_default();
        format!("{}{}", read("log"), read("console"))
    }

    async fn kill(&self) {
        let mut child = self.child.lock().unwrap();
        // It may have ended by itself.
        child.kill().ok();
        child.wait().ok();
    }
}

/// A connection by the host's kernel.
mod vsock {
    #![expect(
        unsafe_code,
        reason = "addresses of AF_VSOCK are no type of the standard library's"
    )]

    use std::{
        mem::size_of,
        os::fd::{AsRawFd, FromRawFd, OwnedFd},
        time::Duration,
    };

    /// Whether somebody accepts within `limit`.
    pub(super) fn connects(cid: u32, port: u32, limit: Duration) -> bool {
        // SAFETY: no pointers; what it answers is checked and owned.
        let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        assert!(socket >= 0, "no AF_VSOCK here: modprobe vhost_vsock");
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let timeout = libc::timeval {
            tv_sec: 0,
            tv_usec: i64::from(limit.subsec_micros()),
        };
        // SAFETY: plain integers, for which zero is a value.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap();
        (address.svm_cid, address.svm_port) = (cid, port);
        // SAFETY: both pointers are to live values of the sizes given; SO_VM_SOCKETS_CONNECT_TIMEOUT takes a timeval.
        unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::AF_VSOCK,
                6,
                (&raw const timeout).cast(),
                size_of::<libc::timeval>() as u32,
            );
            libc::connect(
                socket.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_vm>() as u32,
            ) == 0
        }
    }
}
