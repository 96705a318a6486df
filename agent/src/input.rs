//! A process's stdin: where the daemon's bytes go, at the pace at which the process reads.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    io::Errno,
    termios::{LocalModes, SpecialCodeIndex, tcgetattr},
};
use tokio::{io::unix::AsyncFd, sync::watch};

use crate::watch_fd;

#[derive(Debug, Clone)]
enum Sink {
    /// The process has not been started.
    Pending,
    Pipe(Arc<AsyncFd<OwnedFd>>),
    Terminal(Arc<AsyncFd<OwnedFd>>),
    Closed,
}

/// Nobody reads it any more.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closed;

/// One stdin.
#[derive(Debug)]
pub(crate) struct Input {
    sink: watch::Sender<Sink>,
    /// The end of the first connection is the end of input.
    once: bool,
    /// Any number of connections may write: frames are written whole, one after the other.
    turn: tokio::sync::Mutex<()>,
}

impl Input {
    pub(crate) fn new(once: bool) -> Arc<Self> {
        Arc::new(Self {
            sink: watch::Sender::new(Sink::Pending),
            once,
            turn: tokio::sync::Mutex::new(()),
        })
    }

    /// The process runs, and this pipe is its stdin.
    pub(crate) fn open_pipe(&self, pipe: OwnedFd) -> io::Result<()> {
        self.sink
            .send_replace(Sink::Pipe(Arc::new(watch_fd::watched(pipe)?)));
        Ok(())
    }

    /// The process runs on this terminal.
    pub(crate) fn open_terminal(&self, terminal: Arc<AsyncFd<OwnedFd>>) {
        self.sink.send_replace(Sink::Terminal(terminal));
    }

    /// Whether the end of a connection is the end of input.
    pub(crate) fn once(&self) -> bool {
        self.once
    }

    /// Writes all of `bytes`, waiting while the process does not read.
    pub(crate) async fn write(&self, mut bytes: &[u8]) -> Result<(), Closed> {
        let _turn = self.turn.lock().await;
        let mut sink = self.sink.subscribe();
        while !bytes.is_empty() {
            let current = sink
                .wait_for(|sink| !matches!(sink, Sink::Pending))
                .await
                .map_err(|_| Closed)?
                .clone();
            let (Sink::Pipe(fd) | Sink::Terminal(fd)) = current else {
                return Err(Closed);
            };
            let mut ready = tokio::select! {
                ready = fd.writable() => ready.map_err(|_| Closed)?,
                _ = sink.changed() => continue,
            };
            let written = ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref().as_fd(), bytes)?));
            match written {
                // Not writable after all.
                Err(_) => {}
                Ok(Ok(count)) => bytes = bytes.get(count..).unwrap_or_default(),
                Ok(Err(error)) if Errno::from_io_error(&error) == Some(Errno::INTR) => {}
                Ok(Err(_)) => {
                    self.shut();
                    return Err(Closed);
                }
            }
        }
        Ok(())
    }

    /// Closes a pipe; types the end-of-file character on a terminal that would understand it.
    pub(crate) async fn end(&self) -> Result<(), Closed> {
        let current = {
            let mut sink = self.sink.subscribe();
            let current = sink.wait_for(|sink| !matches!(sink, Sink::Pending)).await;
            current.map_err(|_| Closed)?.clone()
        };
        let Sink::Terminal(fd) = current else {
            self.shut();
            return Ok(());
        };
        if let Ok(modes) = tcgetattr(fd.get_ref())
            && modes.local_modes.contains(LocalModes::ICANON)
        {
            return self.write(&[modes.special_codes[SpecialCodeIndex::VEOF]]).await;
        }
        Ok(())
    }

    /// Nothing can be written any more.
    pub(crate) fn shut(&self) {
        self.sink.send_replace(Sink::Closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open_pipe(input: &Input) -> OwnedFd {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        input.open_pipe(writer).unwrap();
        reader
    }

    #[tokio::test]
    async fn input_from_before_the_start_is_written_after_it() {
        let input = Input::new(false);
        let early = tokio::spawn({
            let input = Arc::clone(&input);
            async move { input.write(b"early").await }
        });
        tokio::task::yield_now().await;
        let reader = open_pipe(&input);
        early.await.unwrap().unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 5);
    }

    #[tokio::test]
    async fn the_end_closes_the_pipe() {
        let input = Input::new(false);
        let reader = open_pipe(&input);
        input.write(b"x").await.unwrap();
        input.end().await.unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 1);
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 0);
        assert_eq!(input.write(b"y").await, Err(Closed));
    }

    #[tokio::test]
    async fn a_process_that_does_not_read_its_input_closes_it() {
        let input = Input::new(false);
        drop(open_pipe(&input));
        assert_eq!(input.write(b"x").await, Err(Closed));
    }

    #[tokio::test]
    async fn frames_of_several_writers_are_not_mixed() {
        const FRAME: usize = 40_000;
        let input = Input::new(false);
        let reader = open_pipe(&input);
        let writers = [b'a', b'b', b'c'].map(|byte| {
            let input = Arc::clone(&input);
            tokio::spawn(async move { input.write(&[byte; FRAME]).await })
        });
        let mut got = Vec::new();
        let read = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 4096];
            while got.len() < 3 * FRAME {
                let count = rustix::io::read(&reader, &mut buffer).unwrap();
                got.extend_from_slice(&buffer[..count]);
            }
            got
        });
        for writer in writers {
            writer.await.unwrap().unwrap();
        }
        let got = read.await.unwrap();
        for frame in got.chunks(FRAME) {
            assert!(frame.iter().all(|byte| *byte == frame[0]));
        }
    }
}
