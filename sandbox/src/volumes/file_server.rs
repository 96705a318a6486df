//! The process that serves a pod's shared volumes: started when the first appears, told of each by a mount in its namespace.
//!
//! It gets connections to the guest and nothing else, outlives the daemon as the VM does, and ends with the VM. When it has ended before,
//! what it served answers I/O errors for good, and the next volume starts another. Must not know what a volume is for.

use std::{
    fs::{self, File},
    io,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    sync::{Mutex as Snapshot, PoisonError},
    time::Duration,
};

use caisson_guest::GuestClient;
use caisson_hypervisor::{DetachedCommand, Process, ProcessRef, ProcessRole};
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, sync::Mutex, time::timeout};

use crate::{
    SandboxError, guest,
    journal::{blocking, private_dir},
    spec::Propagation,
    volumes::{
        host_path::HostPath,
        mount_tree::{MountTree, ReadOnly},
    },
};

/// Messages in flight at most.
const CONNECTIONS: u32 = 4;

/// Messages in flight of a server for Unix sockets, which says no more of them than what they are.
const SOCKET_CONNECTIONS: u32 = 1;

/// Connections to Unix sockets of the host that a pod can have at a time; more wait.
const FORWARDS: u32 = 15;

/// How long the process may take to be ready.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// Most volumes that one process serves.
const MAX_EXPORTS: usize = 1024;

/// Most of a pod's volumes and found sockets together when another socket is found: each is a descriptor of the agent's, and those that
/// were asked for by name come first.
const MAX_WITH_FOUND: usize = 256;

/// Where it expects mounts, in its own namespace.
const PLACE: &str = "/volumes";

/// A running file server as it is journaled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileServerRecord {
    process: ProcessRef,
    /// Of the guest's mount.
    session: u64,
    exports: Vec<Export>,
}

/// A volume that it serves: what it was made from, under its number as a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Export {
    path: PathBuf,
    device: (u32, u32),
    inode: u64,
    mount: u64,
    readonly: ReadOnly,
    propagation: Propagation,
}

impl Export {
    /// One that a daemon did not live to remember. Nothing that is asked for is the same.
    fn forgotten() -> Self {
        Self {
            path: PathBuf::new(),
            device: (0, 0),
            inode: 0,
            mount: 0,
            readonly: ReadOnly::No,
            propagation: Propagation::Private,
        }
    }
}

/// What one is started with.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) program: PathBuf,
    /// The VM's id.
    pub(crate) owner: String,
    /// The VM's run directory.
    pub(crate) dir: PathBuf,
    pub(crate) cgroup: Option<PathBuf>,
    /// For each step.
    pub(crate) deadline: Duration,
    /// Whether it is the one for Unix sockets: apart from the other, since only this one may connect to anything.
    pub(crate) sockets: bool,
}

impl Settings {
    /// Connections for messages, and for Unix sockets.
    fn connections(&self) -> (u32, u32) {
        if self.sockets {
            (SOCKET_CONNECTIONS, FORWARDS)
        } else {
            (CONNECTIONS, 0)
        }
    }

    /// What its files in the run directory are called.
    fn name(&self) -> &'static str {
        if self.sockets { "sockets" } else { "files" }
    }
}

/// The file server of one pod, running or not.
pub(crate) struct FileServer {
    settings: Settings,
    running: Mutex<Option<Running>>,
    /// What to journal; read without waiting for who is starting it.
    record: Snapshot<Option<FileServerRecord>>,
}

struct Running {
    process: Process,
    record: FileServerRecord,
}

impl FileServer {
    /// With what an earlier daemon has left. Needs a tokio runtime.
    pub(crate) fn new(settings: Settings, record: Option<FileServerRecord>) -> Self {
        let running = record.clone().and_then(|record| match record.process.open() {
            Ok(process) => process.map(|process| Running { process, record }),
            Err(error) => {
                tracing::warn!(pid = record.process.pid, %error, "file server not taken over");
                None
            }
        });
        Self {
            settings,
            running: Mutex::new(running),
            record: Snapshot::new(record),
        }
    }

    /// What to journal now.
    pub(crate) fn record(&self) -> Option<FileServerRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Serves what is at `path`. The same thing asked for in the same way is served once, so that containers share its inodes.
    pub(crate) async fn export(
        &self,
        guest: &GuestClient,
        path: HostPath,
        readonly: ReadOnly,
        propagation: Propagation,
    ) -> Result<guest::SharedSource, SandboxError> {
        let export = self.export_within(MAX_EXPORTS, guest, path, readonly, propagation);
        export.await?.ok_or_else(|| SandboxError::Invalid {
            what: "number of volumes".into(),
            reason: format!("the pod has {MAX_EXPORTS} shared volumes already"),
        })
    }

    /// The same for a socket that nobody has asked for by name; `None` when there are enough.
    pub(crate) async fn export_found(
        &self,
        guest: &GuestClient,
        socket: HostPath,
    ) -> Result<Option<guest::SharedSource>, SandboxError> {
        // A read-only mount does not keep anybody from connecting.
        self.export_within(MAX_WITH_FOUND, guest, socket, ReadOnly::No, Propagation::Private)
            .await
    }

    async fn export_within(
        &self,
        limit: usize,
        guest: &GuestClient,
        path: HostPath,
        readonly: ReadOnly,
        propagation: Propagation,
    ) -> Result<Option<guest::SharedSource>, SandboxError> {
        let mut running = self.running.lock().await;
        if running
            .as_ref()
            .is_some_and(|running| running.process.has_ended())
        {
            tracing::warn!("the file server has ended; starting another for new volumes");
            *running = None;
        }
        let server = match &mut *running {
            Some(server) => server,
            empty => empty.insert(self.start(guest).await?),
        };
        let wanted = Export {
            path: path.path.clone(),
            device: path.device,
            inode: path.inode,
            mount: path.mount,
            readonly,
            propagation,
        };
        let exports = &mut server.record.exports;
        let number = match exports.iter().position(|export| *export == wanted) {
            Some(number) => number,
            None if exports.len() >= limit => return Ok(None),
            None => {
                let (process, next) = (server.process.reference().clone(), exports.len());
                let attached = blocking(move || attach(&process, &path, next, readonly, propagation));
                let number = attached.await?;
                exports.resize_with(number, Export::forgotten);
                exports.push(wanted);
                number
            }
        };
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = Some(server.record.clone());
        Ok(Some(guest::SharedSource {
            session: server.record.session,
            export: number.to_string(),
            socket: self.settings.sockets,
        }))
    }

    async fn start(&self, guest: &GuestClient) -> Result<Running, SandboxError> {
        let limit = self.settings.deadline.min(START_DEADLINE);
        // Never used before in this VM, also not by a daemon that crashed before it could remember it.
        let (session, _) = uuid::Uuid::new_v4().as_u64_pair();
        let mut connections = Vec::new();
        let (messages, forwards) = self.settings.connections();
        for _ in 0..messages + forwards {
            let connection = guest
                .connect_files(session, limit)
                .await
                .map_err(SandboxError::guest("connect shared volumes with the guest"))?;
            connections.push(connection);
        }
        let process = self.spawn(connections).await?;
        let mounted = guest
            .mount_shared(session, messages + forwards, forwards, self.settings.deadline)
            .await
            .map_err(SandboxError::guest("mount shared volumes in the guest"));
        if let Err(error) = mounted {
            self.give_up(&process).await;
            return Err(error);
        }
        let record = FileServerRecord {
            process: process.reference().clone(),
            session,
            exports: Vec::new(),
        };
        tracing::info!(pid = record.process.pid, "file server started");
        Ok(Running { process, record })
    }

    async fn spawn(&self, connections: Vec<OwnedFd>) -> Result<Process, SandboxError> {
        let (ready, process) = blocking({
            let settings = self.settings.clone();
            move || spawn(&settings, connections)
        })
        .await?;
        let outcome = match ready {
            Ok(mut ready) => {
                let mut word = [0];
                timeout(START_DEADLINE, ready.read_exact(&mut word)).await
            }
            Err(error) => Ok(Err(error)),
        };
        match outcome {
            Ok(Ok(_)) => Ok(process),
            Ok(Err(_)) => {
                self.give_up(&process).await;
                Err(SandboxError::Program {
                    program: "caisson-file-server",
                    reason: last_words(&self.log()),
                })
            }
            Err(_) => {
                self.give_up(&process).await;
                Err(SandboxError::Deadline {
                    what: "the start of caisson-file-server".into(),
                    limit: START_DEADLINE,
                })
            }
        }
    }

    async fn give_up(&self, process: &Process) {
        if let Err(error) = process.kill(caisson_hypervisor::KILL_DEADLINE).await {
            tracing::warn!(%error, "file server of a failed start is not gone");
        }
    }

    fn log(&self) -> PathBuf {
        log(&self.settings)
    }
}

fn log(settings: &Settings) -> PathBuf {
    settings.dir.join(format!("{}.log", settings.name()))
}

type Ready = io::Result<tokio::net::unix::pipe::Receiver>;

fn spawn(settings: &Settings, connections: Vec<OwnedFd>) -> Result<(Ready, Process), SandboxError> {
    use std::os::fd::AsRawFd;
    let root = settings.dir.join(settings.name());
    private_dir(&root)?;
    let (ready, told) = io::pipe().map_err(SandboxError::io("make a pipe"))?;
    let mut command = DetachedCommand::new(
        ProcessRole::FileServer,
        &settings.owner,
        settings.program.clone(),
        log(settings),
    );
    let (messages, _) = settings.connections();
    for (number, connection) in (0..).zip(&connections) {
        let word = if number < messages {
            "--connection-fd"
        } else {
            "--forward-fd"
        };
        command.args.push(word.into());
        command.args.push(connection.as_raw_fd().to_string().into());
    }
    command.args.extend([
        "--ready-fd".into(),
        told.as_raw_fd().to_string().into(),
        "--root".into(),
        root.into(),
    ]);
    command.fds = connections;
    command.fds.push(told.into());
    command.cgroup.clone_from(&settings.cgroup);
    // It gives up its capabilities itself, once its root is made.
    command.unshare = libc::CLONE_NEWNS | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let process = command.spawn().map_err(SandboxError::hypervisor(
        "start the file server of the pod's volumes",
    ))?;
    Ok((
        tokio::net::unix::pipe::Receiver::from_owned_fd(ready.into()),
        process,
    ))
}

/// The end of a log, for an error.
fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    match text.lines().last() {
        Some(line) if !line.is_empty() => line.chars().take(500).collect(),
        _ => "it ended without a word".into(),
    }
}

/// Copies the mounts at the path and moves the copy into the process's namespace; answers its number, `next` or a later one. Blocking.
fn attach(
    process: &ProcessRef,
    path: &HostPath,
    next: usize,
    readonly: ReadOnly,
    propagation: Propagation,
) -> Result<usize, SandboxError> {
    first_free(next, |number| {
        let place = Path::new(PLACE).join(number.to_string());
        MountTree::copy(&path.location, readonly, propagation)?.attach(
            namespace(process)?,
            &place,
            path.kind == FileType::Directory,
        )
    })
    .map_err(SandboxError::io(format!("share {}", path.path.display())))
}

/// The first number that is free. One whose place is there already was given by a daemon that died before it could journal that; the
/// guest may know it, so it is not given again.
fn first_free(next: usize, mut take: impl FnMut(usize) -> io::Result<()>) -> io::Result<usize> {
    for number in next..MAX_EXPORTS {
        match take(number) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => return other.map(|()| number),
        }
    }
    Err(io::Error::other("the file server has no place left"))
}

/// The mount namespace of exactly this process, and not the daemon's own.
fn namespace(process: &ProcessRef) -> io::Result<File> {
    let namespace = File::open(format!("/proc/{}/ns/mnt", process.pid))?;
    // Only now that it is open can the start time prove that it is the one meant.
    if !process.is_alive() {
        return Err(io::Error::other("the file server has ended"));
    }
    let (theirs, ours) = (namespace.metadata()?, fs::metadata("/proc/self/ns/mnt")?);
    if (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()) {
        return Err(io::Error::other("the file server has no namespace of its own"));
    }
    Ok(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_that_a_dead_daemon_has_given_is_not_given_again() {
        let given = [2, 3];
        let take = |number: usize| match given.contains(&number) {
            true => Err(io::ErrorKind::AlreadyExists.into()),
            false => Ok(()),
        };
        assert_eq!(first_free(1, take).unwrap(), 1);
        assert_eq!(first_free(2, take).unwrap(), 4);
        let other = first_free(2, |_| Err(io::ErrorKind::StorageFull.into())).unwrap_err();
        assert_eq!(other.kind(), io::ErrorKind::StorageFull);
        first_free(MAX_EXPORTS - 1, |_| Err(io::ErrorKind::AlreadyExists.into())).unwrap_err();
    }
}
