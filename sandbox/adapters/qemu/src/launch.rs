//! From a [`VmSpec`] to two running processes: checks it, opens every file, starts the vsock backend and QEMU, and hears QEMU's
//! first answer. Whatever fails on the way, both processes are killed.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::{
    Credentials, DetachedCommand, Ended, HypervisorError, Nic, Process, ProcessRole, VmSpec, disk,
    user::Lease,
};

use crate::{
    Engine, Qemu,
    arguments::{DiskPlan, MAX_COLD_DEVICES, MAX_SLOTS, NicPlan, Plan, arguments},
    handover::{Purpose, open_for},
    machine::{QemuVm, describe_end, first_answer, kill_all},
    qmp::Qmp,
};

/// The guest's address on its own vsock. Any will do: each VM has a backend of its own.
const GUEST_CID: u32 = 3;
/// sun_path of sockaddr_un less its final NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// A guest of less cannot unpack its kernel.
const MEMORY_MIN_MIB: u64 = 32;
/// What QEMU's q35 machine takes without an interrupt remapper.
const VCPUS_MAX: u32 = 255;

/// Opened by QEMU itself.
const KVM_DEVICE: &str = "/dev/kvm";

/// How long the processes of a failed start get to end by themselves.
const END_GRACE: Duration = Duration::from_secs(1);

/// Where the files of a VM are.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) dir: PathBuf,
    pub(crate) qmp: PathBuf,
    pub(crate) stops: PathBuf,
    pub(crate) vsock: PathBuf,
    pub(crate) console: PathBuf,
    pub(crate) qemu_log: PathBuf,
    pub(crate) backend_log: PathBuf,
}

impl Paths {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            qmp: dir.join("qmp.sock"),
            stops: dir.join("stops.sock"),
            vsock: dir.join("vsock.sock"),
            console: dir.join("console.log"),
            qemu_log: dir.join("qemu.log"),
            backend_log: dir.join("vsock.log"),
        }
    }

    pub(crate) fn logs(&self) -> Vec<PathBuf> {
        vec![
            self.console.clone(),
            self.qemu_log.clone(),
            self.backend_log.clone(),
        ]
    }
}

/// The processes of a launch that has not succeeded yet: dropping it kills them.
struct Unfinished {
    vmm: Process,
    backend: Process,
    /// Absent: they run as the daemon's own user.
    user: Option<Lease>,
    armed: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        for process in [&self.vmm, &self.backend] {
            if let Err(error) = process.signal_kill() {
                tracing::error!(pid = process.reference().pid, %error, "cannot kill a process of a failed launch");
            }
        }
    }
}

pub(crate) async fn launch(qemu: &Qemu, spec: VmSpec) -> Result<QemuVm, HypervisorError> {
    check(&spec)?;
    let paths = Paths::in_dir(&spec.dir);
    check_socket_path(&paths.vsock)?;
    let id = spec.id.clone();
    let slots = spec.attach_slots as usize;

    // Opening files and forking block.
    let (driver, places) = (qemu.clone(), paths.clone());
    let starting = tokio::task::spawn_blocking(move || start(&driver, spec, &places));
    let mut started = starting
        .await
        .map_err(|e| io_error("run the launch", io::Error::other(e)))??;

    let qmp = Qmp::new(paths.qmp.clone());
    let outcome = tokio::select! {
        biased;
        _ = started.vmm.wait() => Err(None),
        _ = started.backend.wait() => Err(None),
        answer = first_answer(&qmp) => answer.map_err(Some),
    };
    match outcome {
        Ok(()) => {
            started.armed = false;
            let (vmm, backend) = (started.vmm.clone(), started.backend.clone());
            let user = started.user.take();
            Ok(QemuVm::new(
                id,
                paths,
                (vmm, Some(backend)),
                user,
                qmp,
                vec![None; slots],
            ))
        }
        Err(heard) => Err(explain(qemu, &started, &paths, heard).await),
    }
}

/// Ends both processes and says which of them failed. Each ends soon after the other, and QEMU's control socket closes before either is
/// seen to end: so they get a moment to end by themselves, and their exit statuses tell who was first.
async fn explain(
    qemu: &Qemu,
    started: &Unfinished,
    paths: &Paths,
    heard: Option<HypervisorError>,
) -> HypervisorError {
    let both = async { (started.vmm.wait().await, started.backend.wait().await) };
    if !matches!(heard, Some(HypervisorError::Deadline { .. })) {
        tokio::time::timeout(END_GRACE, both).await.ok();
    }
    let ended = (started.vmm.has_ended(), started.backend.has_ended());
    if let Err(error) = kill_all([&started.vmm, &started.backend].into_iter()).await {
        return error;
    }
    let (Ok(vmm), Ok(backend)) = (started.vmm.wait().await, started.backend.wait().await) else {
        return HypervisorError::Died {
            program: qemu.binary.display().to_string(),
            reason: "its processes cannot be waited for".into(),
        };
    };
    match (ended, heard) {
        // The backend ends well when QEMU has gone.
        ((_, true), _) if backend != Ended::Exited(0) => HypervisorError::Died {
            program: qemu.vsock_backend.display().to_string(),
            reason: describe_end("caisson-vhost-vsock", backend, &paths.backend_log),
        },
        ((false, false), Some(error)) => error,
        _ => HypervisorError::Died {
            program: qemu.binary.display().to_string(),
            reason: describe_end("qemu", vmm, &paths.qemu_log),
        },
    }
}

pub(crate) fn io_error(what: impl Into<String>, source: io::Error) -> HypervisorError {
    HypervisorError::Io {
        what: what.into(),
        source,
    }
}

fn check(spec: &VmSpec) -> Result<(), HypervisorError> {
    let refuse = |text: String| Err(HypervisorError::Spec(text));
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    if spec.id.is_empty() || spec.id.len() > 128 || !spec.id.bytes().all(plain) {
        return refuse(format!(
            "VM id {:?} is not made of 1 to 128 letters, digits and hyphens",
            spec.id
        ));
    }
    if !(1..=VCPUS_MAX).contains(&spec.vcpus) || !(spec.vcpus..=VCPUS_MAX).contains(&spec.max_vcpus) {
        return refuse(format!(
            "{} vCPUs of at most {} do not fit 1 to {VCPUS_MAX}",
            spec.vcpus, spec.max_vcpus
        ));
    }
    if spec.memory_mib < MEMORY_MIN_MIB {
        return refuse(format!(
            "{} MiB of memory are less than {MEMORY_MIN_MIB}",
            spec.memory_mib
        ));
    }
    if spec.attach_slots as usize > MAX_SLOTS {
        return refuse(format!(
            "{} slots for disks are more than {MAX_SLOTS}",
            spec.attach_slots
        ));
    }
    if spec.nics.len() + spec.disks.len() > MAX_COLD_DEVICES {
        return refuse(format!(
            "{} NICs and {} disks at boot are more than {MAX_COLD_DEVICES} devices",
            spec.nics.len(),
            spec.disks.len()
        ));
    }
    if let Some(nic) = spec.nics.iter().position(|nic| nic.queues.is_empty()) {
        return refuse(format!("NIC {nic} has no open tap"));
    }
    match spec
        .cmdline
        .iter()
        .find(|word| word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        Some(word) => refuse(format!("{word:?} is no word of a kernel command line")),
        None => Ok(()),
    }
}

fn check_socket_path(path: &Path) -> Result<(), HypervisorError> {
    if path.as_os_str().len() <= SOCKET_PATH_MAX {
        return Ok(());
    }
    let text = format!(
        "{} is longer than the {SOCKET_PATH_MAX} bytes of a socket's path",
        path.display()
    );
    Err(HypervisorError::Spec(text))
}

/// Opens everything and starts both processes.
fn start(qemu: &Qemu, spec: VmSpec, paths: &Paths) -> Result<Unfinished, HypervisorError> {
    let user = qemu.users.claim(&spec.id)?;
    let ids = user.as_ref().map(Lease::ids);
    let program = open_for(&qemu.vsock_backend, "vsock backend", ids, Purpose::Execute)?;
    let opened = Opened::open(qemu, spec, ids, paths)?;
    let backend_socket = paths.dir.join("vhost.sock");
    let backend_listener = listen(&backend_socket)?;
    let vsock_listener = listen(&paths.vsock)?;
    // Connected before anyone listens in earnest: the connection waits in the backlog, and QEMU needs no path.
    let device =
        UnixStream::connect(&backend_socket).map_err(|e| io_error("connect to the vsock backend", e))?;
    std::fs::remove_file(&backend_socket).map_err(|e| io_error("remove the vsock backend's socket", e))?;

    let mut command = DetachedCommand::new(
        ProcessRole::Vsock,
        &opened.spec.id,
        qemu.vsock_backend.clone(),
        paths.backend_log.clone(),
    );
    command.program_file = Some(program.into());
    command.args = vec![
        "--socket-fd".into(),
        backend_listener.as_raw_fd().to_string().into(),
        "--uds-fd".into(),
        vsock_listener.as_raw_fd().to_string().into(),
        "--cid".into(),
        GUEST_CID.to_string().into(),
    ];
    command.fds = vec![backend_listener.into(), vsock_listener.into()];
    confine(&mut command, ids, opened.spec.cgroup.as_deref());
    let backend = command.spawn()?;
    match start_qemu(qemu, opened, device, paths) {
        Ok(vmm) => Ok(Unfinished {
            vmm,
            backend,
            user,
            armed: true,
        }),
        Err(error) => {
            backend
                .signal_kill()
                .map_err(|e| io_error("kill the vsock backend", e))?;
            Err(error)
        }
    }
}

fn start_qemu(
    qemu: &Qemu,
    opened: Opened,
    device: UnixStream,
    paths: &Paths,
) -> Result<Process, HypervisorError> {
    let mut command = DetachedCommand::new(
        ProcessRole::Vmm,
        &opened.spec.id,
        qemu.binary.clone(),
        paths.qemu_log.clone(),
    );
    command.args = arguments(&opened.plan(qemu, device.as_raw_fd()))
        .into_iter()
        .map(Into::into)
        .collect();
    confine(&mut command, opened.user, opened.spec.cgroup.as_deref());
    if let (Some(who), Engine::Kvm) = (&mut command.credentials, qemu.engine) {
        who.groups = kvm_groups(Path::new(KVM_DEVICE), (who.uid, who.gid))?;
    }
    command.fds = opened.into_fds();
    command.fds.push(device.into());
    command.spawn()
}

/// What both processes have in common: no network, no System V IPC, no core dumps (they would hold the guest's memory), no way
/// back to privilege, and the user chosen.
fn confine(command: &mut DetachedCommand, user: Option<(u32, u32)>, cgroup: Option<&Path>) {
    command.cgroup = cgroup.map(Path::to_owned);
    command.confined = true;
    command.rlimits = vec![(libc::RLIMIT_CORE, 0)];
    if rustix::process::geteuid().is_root() {
        command.unshare = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    }
    command.credentials = user.map(|(uid, gid)| Credentials {
        uid,
        gid,
        groups: Vec::new(),
    });
}

/// The groups that QEMU needs to open the KVM device by itself; root's is none to be given away.
fn kvm_groups(device: &Path, user: (u32, u32)) -> Result<Vec<u32>, HypervisorError> {
    let metadata =
        std::fs::metadata(device).map_err(|e| io_error(format!("inspect {}", device.display()), e))?;
    let (mode, owner, group) = (metadata.mode(), metadata.uid(), metadata.gid());
    let grants = |shift: u32| mode >> shift & 0o6 == 0o6;
    if owner == user.0 && grants(6) || group == user.1 && grants(3) || grants(0) {
        return Ok(Vec::new());
    }
    if group != 0 && grants(3) {
        return Ok(vec![group]);
    }
    Err(HypervisorError::Start {
        program: device.to_owned(),
        reason: format!(
            "user {} cannot open it: it belongs to {owner}:{group} with mode {:04o}; `chgrp kvm` and `chmod 0660` are what Debian does",
            user.0,
            mode & 0o7777
        ),
    })
}

fn listen(path: &Path) -> Result<UnixListener, HypervisorError> {
    UnixListener::bind(path).map_err(|e| io_error(format!("listen on {}", path.display()), e))
}

/// All that QEMU gets, open.
struct Opened {
    spec: VmSpec,
    /// Who shall have it.
    user: Option<(u32, u32)>,
    kernel: File,
    initramfs: File,
    console: File,
    qmp: UnixListener,
    stops: UnixListener,
    disks: Vec<File>,
    /// For each NIC as many as it has queues, or none.
    vhost: Vec<Vec<File>>,
}

impl Opened {
    fn open(
        qemu: &Qemu,
        spec: VmSpec,
        user: Option<(u32, u32)>,
        paths: &Paths,
    ) -> Result<Self, HypervisorError> {
        // QEMU opens these two once more, through /proc/self/fd.
        let kernel = open_for(&spec.kernel, "kernel", user, Purpose::Read)?;
        let initramfs = open_for(&spec.initramfs, "initramfs", user, Purpose::Read)?;
        let console = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&paths.console)
            .map_err(|e| io_error(format!("open the console log {}", paths.console.display()), e))?;
        let disks = spec
            .disks
            .iter()
            .map(disk::open_single)
            .collect::<Result<_, _>>()?;
        let vhost = spec.nics.iter().map(|nic| open_vhost(qemu.engine, nic)).collect();
        Ok(Self {
            kernel,
            initramfs,
            console,
            qmp: listen(&paths.qmp)?,
            stops: listen(&paths.stops)?,
            disks,
            vhost,
            user,
            spec,
        })
    }

    fn plan(&self, qemu: &Qemu, vsock: RawFd) -> Plan<'_> {
        let raw = |fds: &[OwnedFd]| fds.iter().map(AsRawFd::as_raw_fd).collect();
        let nics = self
            .spec
            .nics
            .iter()
            .zip(&self.vhost)
            .map(|(nic, vhost)| NicPlan {
                queues: raw(&nic.queues),
                vhost: vhost.iter().map(AsRawFd::as_raw_fd).collect(),
                mac: nic.mac,
                mtu: nic.mtu,
            });
        let disks = self
            .spec
            .disks
            .iter()
            .zip(&self.disks)
            .map(|(disk, file)| DiskPlan {
                fd: file.as_raw_fd(),
                serial: &disk.serial,
                read_only: disk.read_only,
            });
        Plan {
            id: &self.spec.id,
            engine: qemu.engine,
            version: qemu.version,
            vcpus: self.spec.vcpus,
            max_vcpus: self.spec.max_vcpus,
            memory_mib: self.spec.memory_mib,
            kernel: self.kernel.as_raw_fd(),
            initramfs: self.initramfs.as_raw_fd(),
            cmdline: &self.spec.cmdline,
            qmp: self.qmp.as_raw_fd(),
            stops: self.stops.as_raw_fd(),
            console: self.console.as_raw_fd(),
            vsock,
            nics: nics.collect(),
            disks: disks.collect(),
            slots: self.spec.attach_slots as usize,
        }
    }

    fn into_fds(self) -> Vec<OwnedFd> {
        let mut fds: Vec<OwnedFd> = vec![
            self.kernel.into(),
            self.initramfs.into(),
            self.console.into(),
            self.qmp.into(),
            self.stops.into(),
        ];
        fds.extend(self.disks.into_iter().map(OwnedFd::from));
        fds.extend(self.vhost.into_iter().flatten().map(OwnedFd::from));
        fds.extend(self.spec.nics.into_iter().flat_map(|nic| nic.queues));
        fds
    }
}

/// The kernel's virtio-net back end saves a copy by QEMU; only worth it where the guest itself runs at speed.
fn open_vhost(engine: Engine, nic: &Nic) -> Vec<File> {
    if engine == Engine::Tcg {
        return Vec::new();
    }
    let open = || OpenOptions::new().read(true).write(true).open("/dev/vhost-net");
    nic.queues
        .iter()
        .map(|_| open())
        .collect::<Result<_, _>>()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            id: "0a".into(),
            dir: "/nonexistent".into(),
            kernel: "/nonexistent/kernel".into(),
            initramfs: "/nonexistent/initramfs".into(),
            cmdline: vec!["a=b".into()],
            vcpus: 1,
            max_vcpus: 1,
            memory_mib: 128,
            max_memory_mib: 128,
            nics: Vec::new(),
            disks: Vec::new(),
            attach_slots: 4,
            cgroup: None,
        }
    }

    fn refusal(change: impl FnOnce(&mut VmSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        check(&spec).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_be_built_is_refused_with_the_reason() {
        check(&spec()).unwrap();
        assert!(refusal(|s| s.id = "a,b".into()).contains("VM id \"a,b\""));
        assert!(refusal(|s| s.vcpus = 0).contains("0 vCPUs"));
        assert!(refusal(|s| s.vcpus = 2).contains("2 vCPUs of at most 1"));
        assert!(refusal(|s| s.memory_mib = 3).contains("3 MiB"));
        assert!(refusal(|s| s.attach_slots = 1000).contains("1000 slots"));
        assert!(refusal(|s| s.cmdline.push("init=/bin/sh x".into())).contains("no word"));
        assert!(
            refusal(|s| s.nics.push(Nic {
                queues: vec![],
                mac: [0; 6],
                mtu: 1500
            }))
            .contains("no open tap")
        );
    }

    #[test]
    fn the_kvm_device_is_reached_by_its_group_but_never_by_that_of_root() {
        let device = tempfile::NamedTempFile::new().unwrap();
        let groups = |mode, user| {
            let permissions = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(device.path(), permissions).unwrap();
            kvm_groups(device.path(), user)
        };
        assert_eq!(groups(0o666, (7, 7)).unwrap(), Vec::<u32>::new());
        let own = device.as_file().metadata().unwrap();
        assert_eq!(groups(0o600, (own.uid(), 7)).unwrap(), Vec::<u32>::new());
        let error = groups(0o600, (7, 7)).unwrap_err().to_string();
        assert!(
            error.contains("user 7 cannot open it") && error.contains("mode 0600"),
            "{error}"
        );
        if own.uid() == 0 {
            assert!(groups(0o660, (7, 7)).is_err(), "the group is root's");
            std::os::unix::fs::chown(device.path(), None, Some(108)).unwrap();
            assert_eq!(groups(0o660, (7, 7)).unwrap(), [108]);
        }
    }
}
