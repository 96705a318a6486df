//! What is done to one container in the guest: make, start, watch, stop, remove. Each runs as a task of the pod's actor, so that a
//! guest that does not answer holds up nothing but the call itself.
//!
//! Must not decide what a state allows (the lifecycle does) or keep state of its own (the actor does).

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use caisson_apparmor::Profiles;
use caisson_guest::{
    GuestClient, GuestError, GuestErrorKind,
    logs::{ContainerLog, LogTarget},
};
use caisson_hypervisor::{Disk, SERIAL_BYTES, Vm};
use caisson_lifecycle::{
    exit::{self, Exit},
    sizing::VmSize,
};
use tokio::sync::watch;

use crate::{
    ContainerId, EXEC_OUTPUT_LIMIT, SandboxError, apparmor,
    disks::{Holder, PodDisks},
    files, guest,
    journal::{PodRecord, blocking},
    registry::Node,
    spec::{ContainerSpec, ExecOutput, ExecSpec},
    view::LinuxUser,
    volumes::Volumes,
};

/// How long the end of a container waits for its output to reach the log.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Most bytes that go into the termination file.
const TERMINATION_BYTES: usize = 64 << 10;

/// SIGTERM, for callers who say nothing.
const SIGTERM: u32 = 15;
const SIGKILL: u32 = 9;

/// A pod's VM and agent, as a task needs them.
#[derive(Clone)]
pub(crate) struct Live {
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) guest: GuestClient,
    pub(crate) disks: Arc<PodDisks>,
    /// What the VM has. Locked while it grows.
    pub(crate) size: Arc<tokio::sync::Mutex<VmSize>>,
    pub(crate) volumes: Arc<Volumes>,
    pub(crate) profiles: Arc<Profiles>,
    /// For each call to the agent.
    pub(crate) deadline: Duration,
}

impl Live {
    pub(crate) fn new(node: &Node, record: &PodRecord, vm: Arc<dyn Vm>, guest: GuestClient) -> Self {
        Self {
            vm,
            guest,
            disks: Arc::default(),
            // Of a VM that an older version has booted, the size is not known, and its limits are not changed.
            size: Arc::new(tokio::sync::Mutex::new(record.size.unwrap_or(VmSize {
                memory_mib: 0,
                vcpus: 0,
            }))),
            volumes: Arc::new(Volumes::new(node, record)),
            profiles: Arc::clone(&node.profiles),
            deadline: node.config.agent_deadline,
        }
    }
}

/// virtio serial of an image's disk: as much of its digest as fits.
pub(crate) fn image_serial(image_id: &str) -> String {
    let digest = image_id.rsplit(':').next().unwrap_or_default();
    let mut serial = String::from("img-");
    serial.extend(
        digest
            .chars()
            .filter(char::is_ascii_alphanumeric)
            .take(SERIAL_BYTES - 4),
    );
    serial
}

/// Ids of the volumes that a container's pushed files become.
pub(crate) fn volume_ids(id: &ContainerId, spec: &ContainerSpec) -> Vec<String> {
    (0..spec.files.len()).map(|n| format!("{}-{n}", id.0)).collect()
}

/// Attaches the image, pushes files, and has the guest make the container. What a failure leaves is for the caller to discard.
pub(crate) async fn make(live: Live, id: ContainerId, spec: ContainerSpec) -> Result<(), SandboxError> {
    let (live, id) = (&live, &id);
    let serial = image_serial(&spec.image.id);
    let image = Disk {
        serial: serial.clone(),
        files: spec.image.disk.clone(),
        read_only: true,
    };
    live.disks.attach(live, image, Holder::Container(id)).await?;
    let mut wanted = spec.guest.clone();
    wanted.image_serial = serial;
    for (volume_id, pushed) in volume_ids(id, &spec).into_iter().zip(&spec.files) {
        let host_path = pushed.host_path.clone();
        let entries = blocking(move || files::read(&host_path)).await?;
        let request = guest::PutVolumeRequest {
            volume_id: volume_id.clone(),
            entries,
        };
        let what = format!("copy {} into container {}", pushed.host_path.display(), id.0);
        live.guest
            .put_volume(request, live.deadline)
            .await
            .map_err(SandboxError::guest(what))?;
        wanted.mounts.push(guest::Mount {
            destination: pushed.container_path.clone(),
            readonly: pushed.readonly,
            source: Some(guest::mount::Source::VolumeId(volume_id)),
            ..guest::Mount::default()
        });
    }
    for volume in &spec.image_volumes {
        let serial = image_serial(&volume.image_id);
        let image = Disk {
            serial: serial.clone(),
            files: volume.disk.clone(),
            read_only: true,
        };
        live.disks.attach(live, image, Holder::Container(id)).await?;
        wanted.mounts.push(guest::Mount {
            destination: volume.container_path.clone(),
            readonly: true,
            source: Some(guest::mount::Source::Image(guest::ImageSource {
                serial,
                sub_path: volume.sub_path.clone(),
            })),
            ..guest::Mount::default()
        });
    }
    wanted
        .mounts
        .extend(live.volumes.provide(live, &spec.volumes).await?);
    wanted.block_devices = live.volumes.disks(live, id, &spec.disks).await?;
    apparmor::provide(live, &wanted).await?;
    // Parents before children, whatever the order of the request.
    wanted
        .mounts
        .sort_by_key(|mount| Path::new(&mount.destination).components().count());
    live.guest
        .create_container(&id.0, wanted, live.deadline)
        .await
        .map_err(SandboxError::guest(format!(
            "create container {} ({})",
            id.0, spec.name
        )))
}

/// Takes a container and its volumes out of the guest, as well as can be.
pub(crate) async fn discard(live: &Live, id: &ContainerId, volumes: &[String]) {
    if let Err(error) = take_away(live, id, volumes).await {
        tracing::warn!(container.id = %id.0, error = %error.chain(), "container not taken out of the guest");
    }
}

async fn take_away(live: &Live, id: &ContainerId, volumes: &[String]) -> Result<(), SandboxError> {
    let what = || format!("remove container {} from the guest", id.0);
    unknown_is_fine(live.guest.remove_container(&id.0, live.deadline).await)
        .map_err(SandboxError::guest(what()))?;
    for volume in volumes {
        unknown_is_fine(live.guest.remove_volume(volume, live.deadline).await)
            .map_err(SandboxError::guest(what()))?;
    }
    live.disks.let_go(live, id).await;
    Ok(())
}

/// Removes a container from the guest, unless the guest is gone.
pub(crate) async fn remove(
    live: Option<Live>,
    id: ContainerId,
    volumes: Vec<String>,
) -> Result<(), SandboxError> {
    match live {
        Some(live) => take_away(&live, &id, &volumes).await,
        None => Ok(()),
    }
}

fn unknown_is_fine(result: Result<(), GuestError>) -> Result<(), GuestError> {
    match result {
        Err(error) if error.kind() == GuestErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Where a container's output goes and what is known of it there.
#[derive(Clone)]
pub(crate) struct Output {
    pub(crate) log: Option<PathBuf>,
    pub(crate) checkpoint: PathBuf,
    pub(crate) terminal: bool,
}

impl Output {
    /// Starts to copy, or goes on at the checkpoint.
    pub(crate) async fn copy(
        &self,
        live: &Live,
        id: &ContainerId,
    ) -> Result<Arc<ContainerLog>, SandboxError> {
        let target = LogTarget {
            container_id: id.0.clone(),
            terminal: self.terminal,
            path: self.log.clone(),
            checkpoint: self.checkpoint.clone(),
        };
        let log = ContainerLog::start(live.guest.clone(), target)
            .await
            .map_err(SandboxError::guest(format!(
                "copy the output of container {}",
                id.0
            )))?;
        Ok(Arc::new(log))
    }
}

/// What a started container has.
pub(crate) struct Started {
    pub(crate) reply: guest::StartContainerReply,
    pub(crate) log: Arc<ContainerLog>,
}

/// Starts a container and the copy of its output. When either fails, nothing of it runs.
pub(crate) async fn start(live: Live, id: ContainerId, output: Output) -> Result<Started, SandboxError> {
    // Before the process runs: a log that cannot be written must not become a container that blocks on its output.
    if let Some(path) = output.log.clone() {
        blocking(move || {
            fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(&path)
                .map(drop)
                .map_err(SandboxError::io(format!("open log file {}", path.display())))
        })
        .await?;
    }
    let started = live
        .guest
        .start_container(&id.0, live.deadline)
        .await
        .map_err(SandboxError::guest(format!("start container {}", id.0)));
    let result = match started {
        Ok(reply) => output.copy(&live, &id).await.map(|log| Started { reply, log }),
        Err(error) => Err(error),
    };
    if result.is_err()
        && let Err(error) = live
            .guest
            .signal_container(&id.0, SIGKILL, true, live.deadline)
            .await
    {
        tracing::debug!(container.id = %id.0, %error, "nothing to kill after the failed start");
    }
    result
}

/// What of a container's end goes to the host.
pub(crate) struct Ending {
    pub(crate) log: Option<Arc<ContainerLog>>,
    pub(crate) termination_file: Option<PathBuf>,
    pub(crate) started_at: Option<SystemTime>,
}

/// Waits for the end of a container. When it answers, its output is in the log and its message in the termination file, within bounds.
pub(crate) async fn watch_end(live: Live, id: ContainerId, ending: Ending) -> Exit {
    let seen = match live.guest.wait_container(&id.0).await {
        Ok(seen) => seen,
        Err(error) => {
            let error = SandboxError::guest(format!("wait for container {}", id.0))(error);
            return exit::vm_gone(ending.started_at, SystemTime::now(), &error.chain());
        }
    };
    if let Some(log) = &ending.log
        && !log.drained(DRAIN_DEADLINE).await
    {
        let reason = log
            .failure()
            .await
            .unwrap_or_else(|| "the output did not end in time".into());
        tracing::warn!(container.id = %id.0, reason, "log is not complete");
    }
    if let (Some(path), Some(message)) = (ending.termination_file, seen.termination_message.clone())
        && let Err(error) = blocking(move || write_termination(&path, &message)).await
    {
        tracing::warn!(container.id = %id.0, error = %error.chain(), "termination message lost");
    }
    exit::observed(
        ending.started_at,
        time(seen.finished_at_nanos),
        seen.exit_code,
        seen.oom_killed,
    )
}

/// In place: kubelet made the file and knows it by its inode.
fn write_termination(path: &Path, message: &[u8]) -> Result<(), SandboxError> {
    let message = message
        .get(..message.len().min(TERMINATION_BYTES))
        .unwrap_or(message);
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.write_all(message)
    })();
    written.map_err(SandboxError::io(format!(
        "write termination message to {}",
        path.display()
    )))
}

/// The user as a container was started.
pub(crate) fn user(started: &guest::StartContainerReply) -> LinuxUser {
    LinuxUser {
        uid: started.uid,
        gid: started.gid,
        supplemental_gids: started.supplemental_gids.clone(),
    }
}

/// When it was started.
pub(crate) fn start_time(started: &guest::StartContainerReply) -> SystemTime {
    match started.started_at_nanos {
        0 => SystemTime::now(),
        nanos => time(nanos),
    }
}

/// A time as the guest says it.
pub(crate) fn time(nanos: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_nanos(nanos)
}

/// How a container is to be stopped.
pub(crate) struct Stop {
    /// 0 for SIGTERM; `None` when another call has sent it already.
    pub(crate) signal: Option<u32>,
    pub(crate) grace: Duration,
    pub(crate) ended: watch::Receiver<bool>,
}

/// Sends the stop signal, waits, kills. Bounded by the grace period and three deadlines of the agent, whatever the guest does.
pub(crate) async fn stop(live: Live, id: ContainerId, mut stop: Stop) -> Result<(), SandboxError> {
    if !stop.grace.is_zero() {
        if let Some(signal) = stop.signal {
            let signal = if signal == 0 { SIGTERM } else { signal };
            // A guest that does not take it gets the kill after the grace period all the same.
            if let Err(error) = live
                .guest
                .signal_container(&id.0, signal, false, live.deadline.min(stop.grace))
                .await
            {
                tracing::debug!(container.id = %id.0, signal, %error, "stop signal not delivered");
            }
        }
        if ended_within(&mut stop.ended, stop.grace).await {
            return Ok(());
        }
    }
    let killed = live
        .guest
        .signal_container(&id.0, SIGKILL, true, live.deadline)
        .await;
    if ended_within(
        &mut stop.ended,
        live.deadline.max(DRAIN_DEADLINE + Duration::from_secs(1)),
    )
    .await
    {
        return Ok(());
    }
    let what = format!("kill container {}", id.0);
    Err(match killed {
        Err(error) => SandboxError::guest(what)(error),
        Ok(()) => SandboxError::Deadline {
            what,
            limit: live.deadline,
        },
    })
}

async fn ended_within(ended: &mut watch::Receiver<bool>, limit: Duration) -> bool {
    // A closed channel is a container that is gone.
    tokio::time::timeout(limit, ended.wait_for(|ended| *ended))
        .await
        .is_ok()
}

/// Runs a command and collects its output.
pub(crate) async fn exec(live: Live, id: ContainerId, exec: ExecSpec) -> Result<ExecOutput, SandboxError> {
    let request = guest::StartExecRequest {
        container_id: id.0.clone(),
        exec_id: uuid::Uuid::new_v4().simple().to_string(),
        process: Some(guest::Process {
            args: exec.args,
            ..guest::Process::default()
        }),
        stdin: false,
    };
    match live
        .guest
        .exec_sync(request, exec.timeout, EXEC_OUTPUT_LIMIT)
        .await
    {
        Ok(done) => Ok(ExecOutput {
            exit_code: done.exit_code,
            stdout: done.stdout,
            stderr: done.stderr,
        }),
        Err(GuestError::ExecTimeout(limit)) => Err(SandboxError::ExecTimeout { id: id.0, limit }),
        Err(error) => Err(SandboxError::guest(format!(
            "run a command in container {}",
            id.0
        ))(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_of_an_image_fits_the_device() {
        let serial = image_serial(&format!("sha256:{}", "0123456789abcdef".repeat(4)));
        assert_eq!(serial, "img-0123456789abcdef");
        assert_eq!(serial.len(), SERIAL_BYTES);
        assert_eq!(image_serial("sha256:../x"), "img-x");
    }

    #[test]
    fn the_termination_file_keeps_its_inode_and_loses_what_was_there() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("termination");
        fs::write(&path, "longer than the message").unwrap();
        let before = fs::metadata(&path).unwrap().ino();
        write_termination(&path, b"why").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"why");
        assert_eq!(fs::metadata(&path).unwrap().ino(), before);
        write_termination(&path, &vec![b'x'; TERMINATION_BYTES + 1]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), TERMINATION_BYTES as u64);
    }
}
