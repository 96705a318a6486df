//! Container logs: from the agent's output streams to a file in the CRI format.
//!
//! Owns the log file, its rotation, and the checkpoint that makes a restart lose nothing and repeat nothing: (inode, file size, source
//! offset of each stream), saved after write(2) and before the agent is told that it may forget. After a crash a torn record behind
//! the checkpoint is cut off, and reading goes on at the checkpoint's offsets.
//!
//! The offsets are those of the bytes that are *in the file*: the beginning of an unfinished line is neither written nor
//! acknowledged, so that it comes again after a restart and no state but the offset is needed to go on within a line.

mod checkpoint;
mod file;
mod format;
mod pump;
mod taps;

use std::{path::PathBuf, time::Duration};

use caisson_agent_api::stream::Kind;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use crate::{GuestClient, GuestError, follow::Follower};
use file::LogFile;
use format::Tag;
use pump::{Progress, Pump};
use taps::Taps;

pub use taps::Tap;

/// Pieces of output that wait for the writer. Each holds up to 64 KiB.
const QUEUE: usize = 4;

/// Which container's output goes where.
#[derive(Debug, Clone)]
pub struct LogTarget {
    /// The container.
    pub container_id: String,
    /// It has a terminal: one stream only, written as stdout.
    pub terminal: bool,
    /// The log file; `None`: output is read, acknowledged and dropped.
    pub path: Option<PathBuf>,
    /// Where the checkpoint is kept.
    pub checkpoint: PathBuf,
}

/// A running copy of one container's output to its log. Dropping it stops the copy where it is; a new one goes on from there.
#[derive(Debug)]
pub struct ContainerLog {
    reopen: mpsc::Sender<oneshot::Sender<Result<(), GuestError>>>,
    progress: watch::Receiver<Progress>,
    taps: Taps,
    /// One source for each stream, and the pump. Dropping it ends them.
    _tasks: JoinSet<()>,
}

impl ContainerLog {
    /// Opens (or goes on with) the log and starts copying in a task of its own, which ends when all streams have ended. The
    /// container must have been started: an agent that does not know its streams ends the copy, see [`ContainerLog::failure`].
    pub async fn start(client: GuestClient, target: LogTarget) -> Result<Self, GuestError> {
        let (path, checkpoint) = (target.path.clone(), target.checkpoint.clone());
        let file = file::on_blocking_thread(move || LogFile::open(path, &checkpoint)).await?;
        let offsets = file.offsets();

        let mut tasks = JoinSet::new();
        let (pieces, queue) = mpsc::channel(QUEUE);
        let mut acks = Vec::new();
        let streams: &[Tag] = if target.terminal {
            &[Tag::Stdout]
        } else {
            &[Tag::Stdout, Tag::Stderr]
        };
        let taps = Taps::new(streams);
        for &tag in streams {
            let kind = match tag {
                Tag::Stdout => Kind::Stdout,
                Tag::Stderr => Kind::Stderr,
            };
            let follower = Follower::new(client.clone(), &target.container_id, "", kind, offsets.of(tag));
            let (told, safe) = watch::channel(offsets.of(tag));
            acks.push((tag, told));
            tasks.spawn(pump::read(follower, tag, pieces.clone(), safe, taps.clone()));
        }
        drop(pieces);

        let (progress_told, progress) = watch::channel(Progress::default());
        let (reopen, reopens) = mpsc::channel(1);
        tasks.spawn(Pump::new(target.container_id, file, acks, progress_told).run(queue, reopens));
        Ok(Self {
            reopen,
            progress,
            taps,
            _tasks: tasks,
        })
    }

    /// Closes the file and opens it anew by its path (after rotation); answers when the next line would go to the new file.
    pub async fn reopen(&self) -> Result<(), GuestError> {
        let (done, answer) = oneshot::channel();
        // Copying has ended: no line will come any more, so nothing is to be opened.
        if self.reopen.send(done).await.is_err() {
            return Ok(());
        }
        answer.await.unwrap_or(Ok(()))
    }

    /// What the container prints from now on: standard output (or all that a terminal shows), and standard error.
    #[must_use]
    pub fn attach(&self) -> (Tap, Tap) {
        (self.taps.attach(Tag::Stdout), self.taps.attach(Tag::Stderr))
    }

    /// Waits until every byte of all streams is in the file, `limit` at most. True when complete.
    pub async fn drained(&self, limit: Duration) -> bool {
        let mut progress = self.progress.clone();
        let ended = progress.wait_for(|p| p.ended);
        match tokio::time::timeout(limit, ended).await {
            Ok(Ok(progress)) => progress.failure.is_none(),
            Ok(Err(_)) | Err(_) => false,
        }
    }

    /// Why copying stopped before the end, e.g. a full disk; `None` while all is well.
    pub async fn failure(&self) -> Option<String> {
        self.progress.borrow().failure.clone()
    }
}
