//! From a [`VmSpec`] to a running VMM: checks it, opens every file, writes the specification, starts the process and hears of its start.
//! Whatever fails on the way, no process is left.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::OpenOptionsExt, net::UnixListener},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_hypervisor::{
    DetachedCommand, Ended, HypervisorError, KILL_DEADLINE, Nic, Process, ProcessRole, VmSpec, disk, process,
    user::Lease,
};
use caisson_vmm_api::spec::{self, Boot, Confinement, Descriptor, Memory, Started, User, Vcpus, Vsock};
use rustix::{
    fs::{MemfdFlags, SealFlags},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
    pipe::{PipeFlags, pipe_with},
    process::{Resource, getrlimit},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    net::unix::pipe::Receiver,
};

use crate::{
    Builtin,
    cmdline::cmdline,
    machine::{BuiltinVm, describe_end},
};

/// The guest's address on its own vsock. Any will do: each VM has a device of its own.
const GUEST_CID: u32 = 3;
/// sun_path of sockaddr_un less its final NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;
/// Clients of the control socket that wait for their turn.
const CONTROL_BACKLOG: i32 = 16;
/// Longest time from the process's start to the guest's; generous, for machines that emulate and are loaded.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// How long the process of a failed start gets to end by itself.
const END_GRACE: Duration = Duration::from_secs(2);

/// Where the files of a VM are.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) dir: PathBuf,
    pub(crate) control: PathBuf,
    pub(crate) vsock: PathBuf,
    pub(crate) console: PathBuf,
    pub(crate) log: PathBuf,
    pub(crate) exit_record: PathBuf,
}

impl Paths {
    pub(crate) fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            control: dir.join("control.sock"),
            vsock: dir.join("vsock.sock"),
            console: dir.join("console.log"),
            log: dir.join("vmm.log"),
            exit_record: dir.join("exit.json"),
        }
    }
}

pub(crate) fn io_error(what: impl Into<String>, source: impl Into<io::Error>) -> HypervisorError {
    HypervisorError::Io {
        what: what.into(),
        source: source.into(),
    }
}

pub(crate) async fn launch(driver: &Builtin, spec: VmSpec) -> Result<BuiltinVm, HypervisorError> {
    let paths = Paths::in_dir(&spec.dir);
    check(&spec, &paths)?;
    let id = spec.id.clone();
    let slots = spec.attach_slots as usize;

    // Opening files and forking block.
    let (starting, places) = (driver.clone(), paths.clone());
    let starting = tokio::task::spawn_blocking(move || start(&starting, spec, &places));
    let (first, pipe, user) = starting
        .await
        .map_err(|e| io_error("run the launch", io::Error::other(e)))??;
    let mut guard = Unfinished {
        processes: vec![first.clone()],
        armed: true,
    };
    let mut vmm = None;
    let heard = tokio::time::timeout(START_DEADLINE, hear(pipe, &first, &mut guard, &mut vmm)).await;
    let failure = match (heard, vmm) {
        (Ok(Ok(())), Some(vmm)) => {
            guard.armed = false;
            return Ok(BuiltinVm::new(id, paths, vmm, user, vec![None; slots]));
        }
        (Ok(Err(e)), _) => Some(io_error("hear of the VMM's start", e)),
        (Err(_), _) => Some(HypervisorError::Deadline {
            what: "the VMM's start".into(),
            limit: START_DEADLINE,
        }),
        (Ok(Ok(())), None) => None,
    };
    let ended = first_to_end(&guard.processes).await;
    drop(guard);
    // Also finds a process that was made and not told of.
    process::sweep(&id, KILL_DEADLINE).await?;
    Err(failure.unwrap_or_else(|| HypervisorError::Died {
        program: driver.vmm.display().to_string(),
        reason: describe_end(ended, &paths),
    }))
}

/// The processes of a launch that has not succeeded yet: dropping it kills them.
struct Unfinished {
    processes: Vec<Process>,
    armed: bool,
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        for process in self.processes.iter().filter(|_| self.armed) {
            if let Err(error) = process.signal_kill() {
                tracing::error!(pid = process.reference().pid, %error, "cannot kill a process of a failed launch");
            }
        }
    }
}

/// Reads what the process says of its start, until the guest runs (`vmm` is the process then) or the pipe ends before that (it is not).
async fn hear(
    mut pipe: Lines<BufReader<Receiver>>,
    first: &Process,
    guard: &mut Unfinished,
    vmm: &mut Option<Process>,
) -> io::Result<()> {
    let mut told = None;
    while let Some(line) = pipe.next_line().await? {
        match Started::parse(&line) {
            Some(Started::Process(pid)) if pid == first.reference().pid => told = Some(first.clone()),
            Some(Started::Process(pid)) => {
                let process = process::adopt_child(ProcessRole::Vmm, pid)?;
                guard.processes.push(process.clone());
                told = Some(process);
            }
            Some(Started::Running) => {
                *vmm = told;
                return Ok(());
            }
            None => {
                let line: String = line.chars().take(100).collect();
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("it said {line:?}"),
                ));
            }
        }
    }
    Ok(())
}

/// How the last of them ended, if it does so by itself.
async fn first_to_end(processes: &[Process]) -> Ended {
    match processes.last() {
        Some(process) => match tokio::time::timeout(END_GRACE, process.wait()).await {
            Ok(Ok(ended)) => ended,
            _ => Ended::Unknown,
        },
        None => Ended::Unknown,
    }
}

/// What only this driver knows about; the rest is checked as a specification for the VMM.
fn check(spec: &VmSpec, paths: &Paths) -> Result<(), HypervisorError> {
    let longest = paths.control.as_os_str().len().max(paths.vsock.as_os_str().len());
    if longest > SOCKET_PATH_MAX {
        return Err(HypervisorError::Spec(format!(
            "{} is longer than the {SOCKET_PATH_MAX} bytes of a socket's path",
            paths.control.display()
        )));
    }
    let graphic = |word: &&String| word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic());
    match spec.cmdline.iter().find(graphic) {
        Some(word) => Err(HypervisorError::Spec(format!(
            "{word:?} is no word of a kernel command line"
        ))),
        None => Ok(()),
    }
}

/// Descriptors of a VMM: a thousand connections of its vsock, a hundred devices with files and events, and as many again.
const DESCRIPTORS_MAX: u64 = 16 << 10;

/// What the process may have at most; nobody raises it again, as it has no capability to.
fn limits() -> Vec<(u32, u64)> {
    let allowed = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
    vec![
        // A dump would hold the guest's memory.
        (libc::RLIMIT_CORE, 0),
        (libc::RLIMIT_NOFILE, allowed.min(DESCRIPTORS_MAX)),
    ]
}

type Start = (Process, Lines<BufReader<Receiver>>, Option<Lease>);

/// Opens everything and starts the process.
fn start(driver: &Builtin, spec: VmSpec, paths: &Paths) -> Result<Start, HypervisorError> {
    let user = driver.users.claim(&spec.id)?;
    let mut command = DetachedCommand::new(ProcessRole::Vmm, &spec.id, driver.vmm.clone(), paths.log.clone());
    command.cgroup = spec.cgroup.clone();
    command.rlimits = limits();
    let (hears, tells) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| io_error("make a pipe", e))?;
    let mut passed = Passed(Vec::new());
    let told = specification(driver, spec, paths, user.as_ref(), tells, &mut passed)?;
    let problems = told.problems();
    if !problems.is_empty() {
        return Err(HypervisorError::Spec(problems.join("; ")));
    }
    let bytes = told
        .encode()
        .map_err(|e| io_error("write the specification", io::Error::other(e)))?;
    let file = sealed(&bytes).map_err(|e| io_error("write the specification", e))?;
    command.args = vec!["--spec-fd".into(), file.as_raw_fd().to_string().into()];
    passed.0.push(file);
    command.fds = passed.0;
    let process = command.spawn()?;
    let pipe = Receiver::from_owned_fd(hears).map_err(|e| io_error("listen to a pipe", e))?;
    Ok((process, BufReader::new(pipe).lines(), user))
}

/// Descriptors that the process shall inherit.
struct Passed(Vec<OwnedFd>);

impl Passed {
    fn pass(&mut self, file: impl Into<OwnedFd>) -> Descriptor {
        let file = file.into();
        let number = Descriptor(file.as_raw_fd());
        self.0.push(file);
        number
    }
}

fn specification(
    driver: &Builtin,
    spec: VmSpec,
    paths: &Paths,
    user: Option<&Lease>,
    started: OwnedFd,
    passed: &mut Passed,
) -> Result<spec::VmSpec, HypervisorError> {
    let cmdline = cmdline(&spec);
    let mut disks = Vec::new();
    for disk in &spec.disks {
        disks.push(spec::Disk {
            serial: disk.serial.clone(),
            files: disk::open(disk)?
                .into_iter()
                .map(|file| passed.pass(file))
                .collect(),
            read_only: disk.read_only,
        });
    }
    let memory = Memory {
        boot_mib: spec.memory_mib,
        max_mib: spec.max_memory_mib.min(spec::MEMORY_MAX_MIB),
        huge_pages: driver.huge_pages,
    };
    let nics = spec
        .nics
        .into_iter()
        .map(|nic| pass_nic(nic, passed))
        .collect::<Result<_, _>>()?;
    Ok(spec::VmSpec {
        kvm: passed.pass(open(
            &driver.kvm,
            "KVM device",
            OpenOptions::new().read(true).write(true),
        )?),
        boot: Boot {
            kernel: passed.pass(open_file(&spec.kernel, "kernel")?),
            initramfs: passed.pass(open_file(&spec.initramfs, "initramfs")?),
            cmdline,
        },
        vcpus: Vcpus {
            boot: spec.vcpus,
            max: spec.max_vcpus,
        },
        memory,
        console: passed.pass(open_log(&paths.console, "console log")?),
        vsock: Vsock {
            cid: GUEST_CID,
            listener: passed.pass(
                UnixListener::bind(&paths.vsock)
                    .map_err(|e| io_error(format!("listen on {}", paths.vsock.display()), e))?,
            ),
        },
        disks,
        nics,
        attach_slots: spec.attach_slots,
        control: passed.pass(
            listen_on(&paths.control)
                .map_err(|e| io_error(format!("listen on {}", paths.control.display()), e))?,
        ),
        exit_record: passed.pass(open_log(&paths.exit_record, "exit record")?),
        started: passed.pass(started),
        confinement: Confinement {
            user: user.map(|lease| {
                let (uid, gid) = lease.ids();
                User { uid, gid }
            }),
            namespaces: rustix::process::geteuid().is_root(),
        },
        id: spec.id,
    })
}

fn pass_nic(nic: Nic, passed: &mut Passed) -> Result<spec::Nic, HypervisorError> {
    let mtu = u16::try_from(nic.mtu)
        .map_err(|_| HypervisorError::Spec(format!("no virtio NIC has an MTU of {}", nic.mtu)))?;
    let open = || OpenOptions::new().read(true).write(true).open("/dev/vhost-net");
    // Without it packets take the way through the VMM.
    let vhost: Vec<File> = nic
        .queues
        .iter()
        .map(|_| open())
        .collect::<Result<_, _>>()
        .unwrap_or_default();
    Ok(spec::Nic {
        queues: nic.queues.into_iter().map(|queue| passed.pass(queue)).collect(),
        vhost: vhost.into_iter().map(|file| passed.pass(file)).collect(),
        mac: nic.mac,
        mtu,
    })
}

fn open(path: &Path, what: &str, options: &OpenOptions) -> Result<File, HypervisorError> {
    options
        .open(path)
        .map_err(|e| io_error(format!("open the {what} {}", path.display()), e))
}

fn open_file(path: &Path, what: &str) -> Result<File, HypervisorError> {
    let file = open(path, what, OpenOptions::new().read(true))?;
    let metadata = file
        .metadata()
        .map_err(|e| io_error(format!("inspect the {what} {}", path.display()), e))?;
    if metadata.is_file() {
        Ok(file)
    } else {
        Err(HypervisorError::Spec(format!(
            "the {what} {} is not a file",
            path.display()
        )))
    }
}

fn open_log(path: &Path, what: &str) -> Result<File, HypervisorError> {
    open(
        path,
        what,
        OpenOptions::new().append(true).create(true).mode(0o600),
    )
}

fn listen_on(path: &Path) -> Result<OwnedFd, rustix::io::Errno> {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    listen(&socket, CONTROL_BACKLOG)?;
    Ok(socket)
}

/// A file in memory that nobody can change.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut file = File::from(rustix::fs::memfd_create(c"caisson-vm-spec", flags)?);
    file.write_all(bytes)?;
    let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}
