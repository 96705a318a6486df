//! A command in a container, run to its end or its deadline, with what it printed.

use std::{future::Future, time::Duration};

use caisson_agent_api::{stream::Kind, v1};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use crate::{GuestClient, GuestError, GuestErrorKind, follow::Follower};

/// Bound of StartExec when the command has no time-out of its own.
pub(crate) const START_LIMIT: Duration = Duration::from_secs(60);

/// Bound of SignalExec and RemoveExec.
const CLEANUP_LIMIT: Duration = Duration::from_secs(10);

/// How long output may still be on its way after the exit was told.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// SIGKILL.
const KILL: u32 = 9;

/// What [`GuestClient::exec_sync`] collected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// 0-255; 128 + signal when killed by one.
    pub exit_code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// Removes the exec session however its user ends, also when its future is dropped.
pub(crate) struct Session {
    pub(crate) client: GuestClient,
    pub(crate) container: String,
    pub(crate) exec: String,
    armed: bool,
}

impl Session {
    pub(crate) fn new(client: &GuestClient, container: &str, exec: &str) -> Self {
        Self {
            client: client.clone(),
            container: container.to_owned(),
            exec: exec.to_owned(),
            armed: true,
        }
    }

    /// There is nothing to remove.
    pub(crate) fn disarm(mut self) {
        self.armed = false;
    }

    pub(crate) async fn remove(mut self, kill: bool) {
        cleanup(&self.client, &self.container, &self.exec, kill).await;
        self.armed = false;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let (client, container, exec) = (
            self.client.clone(),
            std::mem::take(&mut self.container),
            std::mem::take(&mut self.exec),
        );
        // Without a runtime the whole process ends; the agent's side goes with the container.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            drop(runtime.spawn(async move { cleanup(&client, &container, &exec, true).await }));
        }
    }
}

async fn cleanup(client: &GuestClient, container: &str, exec: &str, kill: bool) {
    if kill
        && let Err(error) = client.signal_exec(container, exec, KILL, CLEANUP_LIMIT).await
        && !matches!(
            error.kind(),
            GuestErrorKind::NotFound | GuestErrorKind::WrongState
        )
    {
        tracing::warn!(container.id = container, exec.id = exec, %error, "command could not be killed");
    }
    if let Err(error) = client.remove_exec(container, exec, CLEANUP_LIMIT).await
        && error.kind() != GuestErrorKind::NotFound
    {
        tracing::warn!(container.id = container, exec.id = exec, %error, "exec session could not be removed");
    }
}

pub(crate) async fn run(
    client: &GuestClient,
    request: v1::StartExecRequest,
    limit: Option<Duration>,
    keep: usize,
) -> Result<ExecResult, GuestError> {
    let session = Session::new(client, &request.container_id, &request.exec_id);
    let start = Instant::now();
    let outcome = match client
        .start_exec(request.clone(), limit.unwrap_or(START_LIMIT))
        .await
    {
        // Not ours: another session has this id.
        Err(e) if e.kind() == GuestErrorKind::AlreadyExists => {
            session.disarm();
            return Err(e);
        }
        Err(e) => Err(e),
        Ok(_) => {
            let left = limit.map(|limit| limit.saturating_sub(start.elapsed()));
            optionally_bounded(left, finish(client, &request, keep)).await
        }
    };
    match (outcome, limit) {
        (Ok(result), _) => {
            session.remove(false).await;
            Ok(result)
        }
        (Err(GuestError::Deadline { .. }), Some(limit)) => {
            session.remove(true).await;
            Err(GuestError::ExecTimeout(limit))
        }
        (Err(e), _) => {
            // The VM may be gone; the caller shall not wait for a clean-up that fails.
            drop(session);
            Err(e)
        }
    }
}

async fn optionally_bounded<T>(
    limit: Option<Duration>,
    work: impl Future<Output = Result<T, GuestError>>,
) -> Result<T, GuestError> {
    let Some(limit) = limit else { return work.await };
    timeout(limit, work).await.unwrap_or(Err(GuestError::Deadline {
        verb: "ExecSync",
        limit,
    }))
}

/// Reads both outputs while the command runs, and on until everything it wrote has come.
async fn finish(
    client: &GuestClient,
    request: &v1::StartExecRequest,
    keep: usize,
) -> Result<ExecResult, GuestError> {
    let terminal = request.process.as_ref().is_some_and(|p| p.terminal);
    let (container, exec) = (request.container_id.as_str(), request.exec_id.as_str());
    let (told, exited) = watch::channel(None);
    let follower = |kind| Follower::new(client.clone(), container, exec, kind, 0);
    let wait = async {
        let exit = client.wait_exec(container, exec).await?;
        told.send_replace(Some(exit));
        Ok::<_, GuestError>(exit)
    };
    let stdout = collect(follower(Kind::Stdout), keep, exited.clone(), |exit| {
        exit.stdout_bytes
    });
    let stderr = async {
        if terminal {
            return Ok(Vec::new());
        }
        collect(follower(Kind::Stderr), keep, exited.clone(), |exit| {
            exit.stderr_bytes
        })
        .await
    };
    let (exit, stdout, stderr) = tokio::try_join!(wait, stdout, stderr)?;
    Ok(ExecResult {
        exit_code: exit.exit_code,
        stdout,
        stderr,
    })
}

/// Reads one output to its end; after the exit, up to the count of bytes that were written (another process may hold it open).
async fn collect(
    mut follower: Follower,
    keep: usize,
    mut exited: watch::Receiver<Option<v1::ExecExit>>,
    written: impl Fn(&v1::ExecExit) -> u64,
) -> Result<Vec<u8>, GuestError> {
    let mut kept = Vec::new();
    let mut last: Option<(u64, Instant)> = None;
    loop {
        let until = last.map(|(total, since)| (total, since + DRAIN_LIMIT));
        if let Some((total, until)) = until
            && (follower.offset() >= total || Instant::now() >= until)
        {
            return Ok(kept);
        }
        let piece = tokio::select! {
            piece = follower.next() => piece?,
            Ok(()) = exited.changed(), if last.is_none() => {
                last = exited.borrow().as_ref().map(|exit| (written(exit), Instant::now()));
                continue;
            }
            () = pause_until(until.map(|(_, until)| until)) => continue,
        };
        let Some(piece) = piece else { return Ok(kept) };
        let room = keep.saturating_sub(kept.len()).min(piece.bytes.len());
        kept.extend_from_slice(piece.bytes.get(..room).unwrap_or_default());
        follower.acknowledge(follower.offset()).await;
    }
}

async fn pause_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
