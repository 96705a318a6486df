//! The port between a sandbox and the hypervisor that runs its VM.
//!
//! Owns the words both sides share: what a VM is made of ([`VmSpec`]), what is left of it on the host ([`VmRecord`]), and the few
//! verbs that a driver offers ([`Hypervisor`], [`Vm`]). Must not know any driver, any Pod, or the agent. Also owns the check of
//! what this host's KVM can do ([`kvm`]), since every driver's choice hangs on it, and what drivers share on the host's side: users
//! ([`user`]), bounded logs ([`logs`]), opening disks ([`disk`]).
//!
//! Contracts that every driver keeps:
//! - The processes of a VM outlive the daemon: own session, own log files, nothing inherited but what was passed.
//! - Each carries [`OWNER_ENV`]`=<vm id>` in its environment from its first instruction, so that a daemon which crashed between
//!   spawn and journal finds it again ([`Hypervisor::find`]).
//! - [`Vm::kill`] never waits on the guest.
//! - A write that finds no space on the host waits until there is some: virtio-blk has no word for it, and a guest's file system takes
//!   an error for a broken disk.
//! - The transport is hybrid vsock: a Unix socket on which one writes `CONNECT <port>\n` and reads `OK <n>\n`; the guest cannot
//!   initiate connections.

pub mod console;
pub mod disk;
pub mod kvm;
pub mod logs;
pub mod process;
pub mod spawn;
pub mod user;

use std::{
    collections::BTreeSet,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::Duration,
};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

pub use console::console_tail;
pub use process::{Ended, Process, ProcessRef, ProcessRole};
pub use spawn::{Credentials, DetachedCommand};
pub use user::{UID_BASE, UID_COUNT, VmUser};

/// Environment variable of every process that belongs to a VM; its value is the VM's id.
pub const OWNER_ENV: &str = "CAISSON_VM_ID";

/// Longest virtio-blk serial in bytes (VIRTIO_BLK_ID_BYTES, virtio 1.2, 5.2.6).
pub const SERIAL_BYTES: usize = 20;
/// Most files that one disk is made of.
pub const FILES_PER_DISK: usize = 128;

/// What a driver needs to start a VM. Everything is decided by the caller; a driver adds nothing of its own policy.
#[derive(Debug)]
pub struct VmSpec {
    /// Names the VM: lower-case hexadecimal sandbox id.
    pub id: String,
    /// Private directory of this VM, existing, empty, mode 0700. The driver puts its sockets and logs there; the caller removes it.
    pub dir: PathBuf,
    /// vmlinux or bzImage.
    pub kernel: PathBuf,
    /// cpio archive whose /init is the agent.
    pub initramfs: PathBuf,
    /// Words appended to the driver's own command line.
    pub cmdline: Vec<String>,
    /// vCPUs online at boot.
    pub vcpus: u32,
    /// vCPUs that may ever be onlined; at least `vcpus`.
    pub max_vcpus: u32,
    /// Guest memory at boot, MiB.
    pub memory_mib: u64,
    /// Guest memory that [`Vm::grow`] may ever ask for, MiB; at least `memory_mib`.
    pub max_memory_mib: u64,
    /// Network devices, in order.
    pub nics: Vec<Nic>,
    /// Disks present at boot.
    pub disks: Vec<Disk>,
    /// How many disks must be attachable later.
    pub attach_slots: u32,
    /// cgroup v2 directory that every process joins before it allocates guest memory; absent on hosts without one.
    pub cgroup: Option<PathBuf>,
}

/// What a VM shall have from now on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VmGrowth {
    /// Memory in all, MiB.
    pub memory_mib: u64,
    /// vCPUs in all.
    pub vcpus: u32,
    /// How long the guest may take.
    pub deadline: Duration,
}

/// A network device: an open tap and the address that the guest shall use.
#[derive(Debug)]
pub struct Nic {
    /// Opened with IFF_TAP | IFF_NO_PI | IFF_VNET_HDR; one descriptor for each queue pair.
    pub queues: Vec<OwnedFd>,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Bytes.
    pub mtu: u32,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// How the agent finds it; at most [`SERIAL_BYTES`] bytes of `[A-Za-z0-9-]`.
    pub serial: String,
    /// One raw image file or block device, or several files that make one disk one behind the other; at most [`FILES_PER_DISK`], and
    /// several only for disks that are attached to a running VM.
    pub files: Vec<PathBuf>,
    /// The device refuses writes, and the files are opened read-only.
    pub read_only: bool,
}

/// What a VM is on the host, journaled so that a later daemon can adopt it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// [`Hypervisor::name`] of the driver.
    pub driver: String,
    /// [`VmSpec::id`].
    pub id: String,
    /// [`VmSpec::dir`].
    pub dir: PathBuf,
    /// Every process of the VM; the first is the VMM.
    pub processes: Vec<ProcessRef>,
    /// Serials of the disks that are attached, in slot order; `None` is a free slot.
    pub slots: Vec<Option<String>>,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmExit {
    /// What the host saw, e.g. `qemu exited with status 1` or `qemu was killed by signal 9`; for an adopted VM only that it ended.
    pub reason: String,
}

/// A hypervisor driver.
#[async_trait]
pub trait Hypervisor: Send + Sync + 'static {
    /// `qemu`, `builtin`, ...
    fn name(&self) -> &'static str;

    /// One sentence for people: which accelerator, which binary and version, and why it was chosen.
    fn describe(&self) -> String;

    /// Whether [`Vm::grow`] works on VMs that this driver launches.
    fn can_grow(&self) -> bool {
        false
    }

    /// Starts the VM's processes and answers as soon as the VMM runs and its control socket works; the guest may still be booting.
    /// On error nothing is left: no process, no file outside `spec.dir`.
    async fn launch(&self, spec: VmSpec) -> Result<Box<dyn Vm>, HypervisorError>;

    /// Takes over a VM that an earlier daemon launched. `None` when its VMM process is gone (remaining helpers are killed).
    async fn adopt(&self, record: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError>;

    /// Finds and kills processes that carry this VM's id, whether or not a record of them exists. Answers how many there were.
    /// Bounded: returns an error that names the survivors after [`KILL_DEADLINE`].
    async fn sweep(&self, id: &str) -> Result<usize, HypervisorError> {
        process::sweep(id, KILL_DEADLINE).await
    }
}

/// How long a killed process may take to disappear before that is an error.
pub const KILL_DEADLINE: Duration = Duration::from_secs(10);

/// A running VM.
#[async_trait]
pub trait Vm: Send + Sync {
    /// What to journal now; changes with attach and detach.
    fn record(&self) -> VmRecord;

    /// The hybrid vsock socket.
    fn vsock(&self) -> &Path;

    /// The console's log file (kept in [`VmSpec::dir`]).
    fn console(&self) -> &Path;

    /// Adds a disk to the running VM. [`HypervisorError::NoSlot`] when the budget is used up.
    async fn attach(&self, disk: Disk) -> Result<(), HypervisorError>;

    /// Takes a disk away; the guest must have unmounted it. Unknown serials are Ok.
    async fn detach(&self, serial: &str) -> Result<(), HypervisorError>;

    /// Makes more memory and vCPUs available to the running VM, and waits until the guest has taken the memory; CPUs are for the agent to
    /// bring online. Never less than before. Repeating it is harmless.
    async fn grow(&self, growth: VmGrowth) -> Result<(), HypervisorError> {
        Err(HypervisorError::Spec(format!(
            "a VM of driver {} cannot grow to {} MiB and {} CPUs",
            self.record().driver,
            growth.memory_mib,
            growth.vcpus
        )))
    }

    /// Serials of the disks whose writes wait because the host has no space for them, now and whenever that changes. From a driver that
    /// cannot tell, or once the VM is gone, nothing more comes.
    fn full_disks(&self) -> watch::Receiver<BTreeSet<String>> {
        watch::channel(BTreeSet::new()).1
    }

    /// Waits for the VMM's end. Cancel-safe; every call after the end answers at once.
    async fn wait(&self) -> VmExit;

    /// Kills every process of the VM by pidfd and waits until they are gone, [`KILL_DEADLINE`] at most. Idempotent.
    async fn kill(&self) -> Result<(), HypervisorError>;
}

/// What went wrong with a VM.
#[derive(Debug, thiserror::Error)]
pub enum HypervisorError {
    /// A program is missing or cannot run.
    #[error("cannot start {program}: {reason}")]
    Start {
        /// Path as tried.
        program: PathBuf,
        /// What the system or the program said.
        reason: String,
    },
    /// The VMM ended before it could be used.
    #[error("{program} ended while starting: {reason}")]
    Died {
        /// Which process.
        program: String,
        /// Exit status and the end of its log.
        reason: String,
    },
    /// A control command was refused.
    #[error("{command} was refused by the hypervisor: {reason}")]
    Refused {
        /// The command, e.g. `device_add`.
        command: String,
        /// The hypervisor's words.
        reason: String,
    },
    /// Nothing was heard in time.
    #[error("{what} did not finish within {limit:?}")]
    Deadline {
        /// What was waited for.
        what: String,
        /// The bound.
        limit: Duration,
    },
    /// Every slot for attaching disks is in use.
    #[error("cannot attach disk {serial}: all {slots} slots of the VM are in use")]
    NoSlot {
        /// The disk.
        serial: String,
        /// Number of slots.
        slots: usize,
    },
    /// The specification cannot be met by this driver.
    #[error("invalid VM specification: {0}")]
    Spec(String),
    /// A system call on a file or process failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried on what.
        what: String,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}
