//! One output of one process: what has been read and not yet acknowledged, with offsets since the process started.
//!
//! A byte is kept until the daemon has said that it is safe. When [`OUTPUT_BUFFER_BYTES`] are kept, reading stops, and the process
//! blocks as it would on any full pipe. An idle output holds no buffer.

use std::{
    collections::VecDeque,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use caisson_agent_api::OUTPUT_BUFFER_BYTES;
use rustix::io::Errno;
use tokio::{io::unix::AsyncFd, sync::watch, time::Instant};

/// After the process has ended, how long an output may be silent while somebody else holds it open.
const IDLE_BOUND: Duration = Duration::from_secs(2);

/// After the process has ended, how long somebody else may go on writing to it. Waiting for the daemon does not count.
const TOTAL_BOUND: Duration = Duration::from_secs(10);

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// The bytes between the last acknowledgement and the newest byte.
#[derive(Debug, Default)]
struct Ring {
    base: u64,
    bytes: VecDeque<u8>,
    ended: bool,
    /// Which connection reads; a newer one takes over.
    reader: u64,
}

impl Ring {
    fn end(&self) -> u64 {
        self.base.saturating_add(self.bytes.len() as u64)
    }

    fn space(&self) -> usize {
        OUTPUT_BUFFER_BYTES.saturating_sub(self.bytes.len())
    }

    /// Forgets everything below `offset`; false when there is no such offset yet.
    fn acknowledge(&mut self, offset: u64) -> bool {
        if offset > self.end() {
            return false;
        }
        if let Ok(count) = usize::try_from(offset.saturating_sub(self.base)) {
            self.bytes.drain(..count);
            self.base = self.base.max(offset);
        }
        if self.bytes.is_empty() {
            self.bytes = VecDeque::new();
        }
        true
    }

    fn copy(&self, offset: u64, limit: usize) -> Vec<u8> {
        let start = usize::try_from(offset.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let end = self.bytes.len().min(start.saturating_add(limit));
        if start >= end {
            return Vec::new();
        }
        // Slice by slice: byte by byte, as an iterator goes in a build for size, costs more than all the rest of the way.
        let (front, back) = self.bytes.as_slices();
        let mut copied = Vec::with_capacity(end - start);
        for (slice, before) in [(front, 0), (back, front.len())] {
            let from = start.saturating_sub(before).min(slice.len());
            let to = end.saturating_sub(before).min(slice.len());
            copied.extend_from_slice(slice.get(from..to).unwrap_or_default());
        }
        copied
    }
}

/// What a reader gets.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Bytes at the offset asked for.
    Bytes(Vec<u8>),
    /// There will never be more.
    End,
    /// Nothing yet.
    Wait,
    /// Another connection reads now.
    Superseded,
}

/// A buffer that is filled from a descriptor and emptied by a connection.
#[derive(Debug)]
pub(crate) struct Output {
    ring: Mutex<Ring>,
    changed: watch::Sender<()>,
}

/// How reading an output came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Drained {
    /// Every byte has been read.
    Complete,
    /// Somebody still held it open when the bound passed.
    Cut,
}

impl Output {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            ring: Mutex::default(),
            changed: watch::Sender::new(()),
        })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        // A panic elsewhere leaves the ring consistent: no method panics half-way.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes written by the process so far.
    pub(crate) fn written(&self) -> u64 {
        self.ring().end()
    }

    /// Makes the caller the reader, at `offset`. The error is the lowest offset that is still there.
    pub(crate) fn attach(&self, offset: u64) -> Result<(u64, watch::Receiver<()>), u64> {
        let mut ring = self.ring();
        if offset < ring.base || !ring.acknowledge(offset) {
            return Err(ring.base);
        }
        ring.reader += 1;
        let reader = ring.reader;
        drop(ring);
        let receiver = self.changed.subscribe();
        self.changed.send_replace(());
        Ok((reader, receiver))
    }

    /// What is there at `offset` for this reader.
    pub(crate) fn next(&self, reader: u64, offset: u64, limit: usize) -> Next {
        let ring = self.ring();
        if ring.reader != reader {
            return Next::Superseded;
        }
        let bytes = ring.copy(offset, limit);
        if !bytes.is_empty() {
            return Next::Bytes(bytes);
        }
        if ring.ended { Next::End } else { Next::Wait }
    }

    /// Everything below `offset` is safe with the daemon. False: it is not this reader's to say, or nonsense.
    pub(crate) fn acknowledge(&self, reader: u64, offset: u64) -> bool {
        let mut ring = self.ring();
        if ring.reader != reader || !ring.acknowledge(offset) {
            return false;
        }
        drop(ring);
        self.changed.send_replace(());
        true
    }

    /// No byte will come any more.
    pub(crate) fn finish(&self) {
        self.ring().ended = true;
        self.changed.send_replace(());
    }

    /// Reads `source` to its end, or until the bounds after `exited` has become true have passed.
    pub(crate) async fn pump(
        &self,
        source: Arc<AsyncFd<OwnedFd>>,
        mut exited: watch::Receiver<bool>,
    ) -> Drained {
        let mut idle = IDLE_BOUND;
        let mut total = TOTAL_BOUND;
        let mut changed = self.changed.subscribe();
        let drained = loop {
            while !self.ring().ended && self.ring().space() == 0 {
                // The sender lives in self.
                if changed.changed().await.is_err() {
                    break;
                }
            }
            if self.ring().ended {
                // Nobody will ever read it: its container is being removed.
                break Drained::Cut;
            }
            let over = *exited.borrow_and_update();
            let since = Instant::now();
            let ready = if over {
                tokio::time::timeout(idle.min(total), source.readable())
                    .await
                    .ok()
            } else {
                tokio::select! {
                    ready = source.readable() => Some(ready),
                    _ = exited.changed() => continue,
                }
            };
            if over {
                idle = idle.saturating_sub(since.elapsed());
                total = total.saturating_sub(since.elapsed());
            }
            let Some(Ok(mut ready)) = ready else {
                break Drained::Cut;
            };
            match ready.try_io(|fd| self.read_once(fd.get_ref())) {
                // Nothing there after all.
                Err(_) | Ok(Ok(Some(_))) => {}
                Ok(Ok(None)) => break Drained::Complete,
                Ok(Err(error)) => {
                    crate::console::complain(&format!("reading a container's output: {error}"));
                    break Drained::Complete;
                }
            }
            if over && total.is_zero() {
                break Drained::Cut;
            }
        };
        self.finish();
        drained
    }

    /// `None` at the end.
    fn read_once(&self, source: &OwnedFd) -> io::Result<Option<usize>> {
        let mut buffer = [0; READ_BYTES];
        let mut ring = self.ring();
        let limit = ring.space().min(READ_BYTES);
        match rustix::io::read(source.as_fd(), &mut buffer[..limit]) {
            // A terminal whose other side nobody has open.
            Ok(0) | Err(Errno::IO) => Ok(None),
            Ok(count) => {
                ring.bytes.extend(&buffer[..count]);
                drop(ring);
                self.changed.send_replace(());
                Ok(Some(count))
            }
            Err(Errno::INTR) => Ok(Some(0)),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch_fd::watched;
    use proptest::prelude::*;

    fn filled(bytes: &[u8]) -> Arc<Output> {
        let output = Output::new();
        output.ring().bytes.extend(bytes);
        output
    }

    #[test]
    fn bytes_stay_until_they_are_acknowledged() {
        let output = filled(b"hello");
        let (reader, _) = output.attach(0).unwrap();
        assert_eq!(output.next(reader, 0, 3), Next::Bytes(b"hel".to_vec()));
        assert_eq!(output.next(reader, 0, 9), Next::Bytes(b"hello".to_vec()));
        assert!(output.acknowledge(reader, 3));
        let (again, _) = output.attach(3).unwrap();
        assert_eq!(output.next(again, 3, 9), Next::Bytes(b"lo".to_vec()));
        assert_eq!(output.next(again, 5, 9), Next::Wait);
    }

    #[test]
    fn an_offset_that_is_gone_or_not_yet_there_is_refused_with_the_lowest() {
        let output = filled(b"hello");
        let (reader, _) = output.attach(2).unwrap();
        assert_eq!(output.attach(1).unwrap_err(), 2);
        assert_eq!(output.attach(6).unwrap_err(), 2);
        assert!(!output.acknowledge(reader, 6));
        assert_eq!(output.next(reader, 2, 9), Next::Bytes(b"llo".to_vec()));
    }

    #[test]
    fn a_newer_reader_ends_the_older() {
        let output = filled(b"x");
        let (old, _) = output.attach(0).unwrap();
        let (new, _) = output.attach(0).unwrap();
        assert_eq!(output.next(old, 0, 1), Next::Superseded);
        assert!(!output.acknowledge(old, 1));
        assert_eq!(output.next(new, 0, 1), Next::Bytes(b"x".to_vec()));
    }

    proptest! {
        #[test]
        fn whatever_is_written_read_and_acknowledged_the_bytes_are_those_written(
            steps in prop::collection::vec((0u8..3, 0usize..400), 1..200),
        ) {
            let mut ring = Ring::default();
            let mut model: Vec<u8> = Vec::new();
            for (kind, amount) in steps {
                match kind {
                    0 => for _ in 0..amount {
                        let byte = u8::try_from(model.len() % 251).unwrap();
                        model.push(byte);
                        ring.bytes.push_back(byte);
                    },
                    1 => {
                        let to = ring.base + amount as u64;
                        prop_assert_eq!(ring.acknowledge(to), to <= model.len() as u64);
                    }
                    _ => {
                        let from = ring.base + amount as u64;
                        let start = usize::try_from(from).unwrap().min(model.len());
                        let end = (start + 100).min(model.len());
                        prop_assert_eq!(ring.copy(from, 100), &model[start..end]);
                    }
                }
                prop_assert_eq!(ring.end(), model.len() as u64);
            }
        }
    }

    #[tokio::test]
    async fn a_full_buffer_stops_the_writer_and_loses_nothing() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        let total = OUTPUT_BUFFER_BYTES * 3;
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while sent < total {
                let chunk = vec![u8::try_from(sent % 256).unwrap(); 4096.min(total - sent)];
                sent += rustix::io::write(&writer, &chunk).unwrap();
            }
        });
        let output = Output::new();
        let source = Arc::new(watched(reader).unwrap());
        let pump = tokio::spawn({
            let output = Arc::clone(&output);
            let (_keep, exited) = watch::channel(false);
            async move { output.pump(source, exited).await }
        });
        let (id, mut changed) = output.attach(0).unwrap();
        let mut offset = 0;
        loop {
            match output.next(id, offset, 64 << 10) {
                Next::Bytes(bytes) => {
                    assert!(output.written() - offset <= OUTPUT_BUFFER_BYTES as u64);
                    offset += bytes.len() as u64;
                    assert!(output.acknowledge(id, offset));
                }
                Next::Wait => changed.changed().await.unwrap(),
                Next::End => break,
                Next::Superseded => panic!("nobody else reads"),
            }
        }
        assert_eq!(offset, total as u64);
        assert_eq!(pump.await.unwrap(), Drained::Complete);
        thread.join().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_output_that_somebody_else_holds_open_is_cut_after_the_bound() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&reader, true).unwrap();
        rustix::io::write(&writer, b"last words").unwrap();
        let output = Output::new();
        let (_keep, exited) = watch::channel(true);
        let drained = output.pump(Arc::new(watched(reader).unwrap()), exited).await;
        assert_eq!(drained, Drained::Cut);
        assert_eq!(output.written(), 10);
        drop(writer);
    }
}
