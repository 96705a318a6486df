//! From the streams to the file: a reader for each stream, and one writer that owns the file.
//!
//! A piece of output goes reader -> queue -> writer -> file -> checkpoint -> reader -> acknowledgement. The queue is short: while the
//! writer cannot write (a full disk), nothing is acknowledged, the agent's buffer fills and the container blocks; nothing is lost.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use crate::{
    GuestError,
    follow::{Follower, Piece},
};

use super::{
    checkpoint::Offsets,
    file::{LogFile, on_blocking_thread},
    format::{Cutter, Tag},
    taps::Taps,
};

/// Records that are collected before they are written, in bytes.
const BATCH_BYTES: usize = 256 << 10;

const FIRST_RETRY: Duration = Duration::from_millis(20);
const LONGEST_RETRY: Duration = Duration::from_secs(2);

/// What the readers send.
#[derive(Debug)]
pub(crate) enum Event {
    Bytes(Tag, Piece, SystemTime),
    /// The stream has ended; the error says that it broke off.
    End(Tag, Option<GuestError>),
}

/// How the copy stands.
#[derive(Debug, Default, Clone)]
pub(crate) struct Progress {
    pub(crate) ended: bool,
    pub(crate) failure: Option<String>,
}

/// Where the writer tells a reader what is safe.
type Acks = Vec<(Tag, watch::Sender<u64>)>;

type Reopens = mpsc::Receiver<oneshot::Sender<Result<(), GuestError>>>;

/// Reads one stream to its end, and passes acknowledgements on.
pub(crate) async fn read(
    mut follower: Follower,
    tag: Tag,
    pieces: mpsc::Sender<Event>,
    mut safe: watch::Receiver<u64>,
    taps: Taps,
) {
    let outcome = loop {
        let next = async {
            let room = pieces.reserve().await.ok()?;
            Some((room, follower.next().await))
        };
        tokio::select! {
            next = next => match next {
                None => return,
                Some((room, Ok(Some(piece)))) => {
                    // The log does not wait for attached clients; what comes next does.
                    let copy = taps.wanted(tag).then(|| Bytes::copy_from_slice(&piece.bytes));
                    room.send(Event::Bytes(tag, piece, SystemTime::now()));
                    if let Some(copy) = copy {
                        taps.send(tag, copy).await;
                    }
                }
                Some((_, Ok(None))) => break None,
                Some((_, Err(error))) => break Some(error),
            },
            Ok(()) = safe.changed() => {
                let offset = *safe.borrow_and_update();
                follower.acknowledge(offset).await;
            }
        }
    };
    taps.end(tag);
    if pieces.send(Event::End(tag, outcome)).await.is_err() {
        return;
    }
    // The last bytes are acknowledged too, so that the agent can forget them.
    while safe.changed().await.is_ok() {
        let offset = *safe.borrow_and_update();
        follower.acknowledge(offset).await;
    }
}

/// The writer.
#[derive(Debug)]
pub(crate) struct Pump {
    container: String,
    /// Absent while a blocking thread has it.
    file: Option<LogFile>,
    cutters: [Cutter; 2],
    /// Records that are not in the file yet.
    records: Vec<u8>,
    acks: Acks,
    open_streams: usize,
    broke_off: Option<String>,
    progress: watch::Sender<Progress>,
    retry: Option<(Instant, Duration)>,
}

impl Pump {
    pub(crate) fn new(
        container: String,
        file: LogFile,
        acks: Acks,
        progress: watch::Sender<Progress>,
    ) -> Self {
        let offsets = file.offsets();
        Self {
            container,
            file: Some(file),
            cutters: [
                Cutter::new(Tag::Stdout, offsets.stdout),
                Cutter::new(Tag::Stderr, offsets.stderr),
            ],
            records: Vec::new(),
            open_streams: acks.len(),
            acks,
            broke_off: None,
            progress,
            retry: None,
        }
    }

    pub(crate) async fn run(mut self, mut queue: mpsc::Receiver<Event>, mut reopens: Reopens) {
        while self.open_streams > 0 || self.retry.is_some() {
            let retry_at = self.retry.map(|(at, _)| at);
            tokio::select! {
                Some(done) = reopens.recv() => {
                    let outcome = self.reopen().await;
                    // The caller may have gone; the file is open all the same.
                    drop(done.send(outcome));
                }
                event = queue.recv(), if retry_at.is_none() => match event {
                    Some(event) => self.take(event, &mut queue),
                    None => {
                        self.broke_off = Some("the readers of the streams have gone".to_owned());
                        break;
                    }
                },
                () = until(retry_at) => {}
            }
            if self.retry.is_none_or(|(at, _)| Instant::now() >= at) {
                self.write().await;
            }
        }
        let failure = self.broke_off.take();
        self.progress.send_modify(|p| {
            p.ended = true;
            p.failure = failure.or(p.failure.take());
        });
    }

    /// Turns an event, and those that wait behind it, into records.
    fn take(&mut self, first: Event, queue: &mut mpsc::Receiver<Event>) {
        let mut next = Some(first);
        while let Some(event) = next {
            match event {
                Event::Bytes(tag, piece, time) => {
                    let [stdout, stderr] = &mut self.cutters;
                    let cutter = if tag == Tag::Stdout { stdout } else { stderr };
                    cutter.push(piece.start, &piece.bytes, time, &mut self.records);
                }
                Event::End(tag, outcome) => self.end(tag, outcome),
            }
            next = if self.records.len() < BATCH_BYTES {
                queue.try_recv().ok()
            } else {
                None
            };
        }
    }

    fn end(&mut self, tag: Tag, outcome: Option<GuestError>) {
        self.open_streams = self.open_streams.saturating_sub(1);
        // Also when it broke off: the agent may be gone for good. If it is not, a later copy goes on within the line.
        let [stdout, stderr] = &mut self.cutters;
        let cutter = if tag == Tag::Stdout { stdout } else { stderr };
        cutter.finish(SystemTime::now(), &mut self.records);
        if let Some(error) = outcome {
            tracing::warn!(container.id = self.container, stream = ?tag, %error, "log broke off");
            self.broke_off = Some(error.to_string());
        }
    }

    /// Writes the records, then the checkpoint, then tells the readers.
    async fn write(&mut self) {
        let [stdout, stderr] = &self.cutters;
        let offsets = Offsets {
            stdout: stdout.written(),
            stderr: stderr.written(),
        };
        let Some(mut file) = self.file.take() else { return };
        if file.offsets() == offsets && self.retry.is_none() {
            self.file = Some(file);
            return;
        }
        let records = std::mem::take(&mut self.records);
        let work = on_blocking_thread(move || {
            let outcome = if file.offsets() == offsets {
                file.save()
            } else {
                file.append(&records, offsets)
            };
            Ok((file, records, outcome))
        });
        match work.await {
            Ok((file, records, outcome)) => {
                let appended = file.offsets() == offsets;
                self.file = Some(file);
                if !appended {
                    self.records = records;
                }
                match outcome {
                    Ok(()) => self.written(offsets),
                    Err(error) => self.failed(&error),
                }
            }
            Err(error) => {
                // The file went down with its thread: nothing more can be written.
                self.broke_off = Some(error.to_string());
                self.open_streams = 0;
                self.retry = None;
            }
        }
    }

    fn written(&mut self, offsets: Offsets) {
        if self.retry.take().is_some() {
            tracing::info!(container.id = self.container, "log is written again");
            self.progress.send_modify(|p| p.failure = None);
        }
        for (tag, told) in &self.acks {
            told.send_replace(offsets.of(*tag));
        }
    }

    fn failed(&mut self, error: &GuestError) {
        let text = std::error::Error::source(error)
            .map_or_else(|| error.to_string(), |source| format!("{error}: {source}"));
        let pause = match self.retry {
            None => {
                tracing::error!(
                    container.id = self.container,
                    error = text,
                    "log cannot be written; retrying"
                );
                FIRST_RETRY
            }
            Some((_, pause)) => (pause * 2).min(LONGEST_RETRY),
        };
        self.retry = Some((Instant::now() + pause, pause));
        self.progress.send_modify(|p| p.failure = Some(text));
    }

    async fn reopen(&mut self) -> Result<(), GuestError> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let (file, outcome) = on_blocking_thread(move || {
            let outcome = file.reopen();
            Ok((file, outcome))
        })
        .await?;
        self.file = Some(file);
        if outcome.is_ok()
            && let Some((at, _)) = self.retry.as_mut()
        {
            // The new file may be on a disk with room.
            *at = Instant::now();
        }
        outcome
    }
}

async fn until(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
