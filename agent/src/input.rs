//! A process's stdin: where the daemon's bytes go, at the pace at which the process reads.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
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

/// Why input ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// Nobody reads it any more.
    Closed,
    /// Another connection writes now.
    Superseded,
}

/// One stdin.
#[derive(Debug)]
pub(crate) struct Input {
    sink: watch::Sender<Sink>,
    /// Which connection writes; a newer one takes over.
    writer: watch::Sender<u64>,
    /// The end of the first connection is the end of input.
    once: bool,
    /// Serialises frames of an old and a new connection.
    turn: Mutex<()>,
}

impl Input {
    pub(crate) fn new(once: bool) -> Arc<Self> {
        Arc::new(Self {
            sink: watch::Sender::new(Sink::Pending),
            writer: watch::Sender::new(0),
            once,
            turn: Mutex::new(()),
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

    /// Makes the caller the writer.
    pub(crate) fn attach(&self) -> u64 {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let next = self.writer.borrow().saturating_add(1);
        self.writer.send_replace(next);
        next
    }

    /// Waits until another connection has taken over.
    pub(crate) async fn superseded(&self, writer: u64) {
        let mut newest = self.writer.subscribe();
        if newest.wait_for(|newest| *newest != writer).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Whether the end of a connection is the end of input.
    pub(crate) fn once(&self) -> bool {
        self.once
    }

    /// Writes all of `bytes`, waiting while the process does not read.
    pub(crate) async fn write(&self, writer: u64, mut bytes: &[u8]) -> Result<(), Gone> {
        let mut sink = self.sink.subscribe();
        while !bytes.is_empty() {
            let current = sink
                .wait_for(|sink| !matches!(sink, Sink::Pending))
                .await
                .map_err(|_| Gone::Closed)?
                .clone();
            let (Sink::Pipe(fd) | Sink::Terminal(fd)) = current else {
                return Err(Gone::Closed);
            };
            let mut ready = tokio::select! {
                ready = fd.writable() => ready.map_err(|_| Gone::Closed)?,
                _ = sink.changed() => continue,
            };
            if *self.writer.borrow() != writer {
                return Err(Gone::Superseded);
            }
            let written = ready.try_io(|fd| Ok(rustix::io::write(fd.get_ref().as_fd(), bytes)?));
            match written {
                // Not writable after all.
                Err(_) => {}
                Ok(Ok(count)) => bytes = bytes.get(count..).unwrap_or_default(),
                Ok(Err(error)) if Errno::from_io_error(&error) == Some(Errno::INTR) => {}
                Ok(Err(_)) => {
                    self.shut();
                    return Err(Gone::Closed);
                }
            }
        }
        Ok(())
    }

    /// Closes a pipe; types the end-of-file character on a terminal that would understand it.
    pub(crate) async fn end(&self, writer: u64) -> Result<(), Gone> {
        let current = {
            let mut sink = self.sink.subscribe();
            let current = sink.wait_for(|sink| !matches!(sink, Sink::Pending)).await;
            current.map_err(|_| Gone::Closed)?.clone()
        };
        let Sink::Terminal(fd) = current else {
            self.shut();
            return Ok(());
        };
        if let Ok(modes) = tcgetattr(fd.get_ref())
            && modes.local_modes.contains(LocalModes::ICANON)
        {
            return self
                .write(writer, &[modes.special_codes[SpecialCodeIndex::VEOF]])
                .await;
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
        let writer = input.attach();
        let early = tokio::spawn({
            let input = Arc::clone(&input);
            async move { input.write(writer, b"early").await }
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
        let writer = input.attach();
        input.write(writer, b"x").await.unwrap();
        input.end(writer).await.unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 1);
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 0);
        assert_eq!(input.write(writer, b"y").await, Err(Gone::Closed));
    }

    #[tokio::test]
    async fn a_process_that_does_not_read_its_input_closes_it() {
        let input = Input::new(false);
        drop(open_pipe(&input));
        let writer = input.attach();
        assert_eq!(input.write(writer, b"x").await, Err(Gone::Closed));
    }

    #[tokio::test]
    async fn an_older_connection_writes_no_more() {
        let input = Input::new(false);
        let _reader = open_pipe(&input);
        let old = input.attach();
        let new = input.attach();
        input.superseded(old).await;
        assert_eq!(input.write(old, b"x").await, Err(Gone::Superseded));
        input.write(new, b"x").await.unwrap();
    }
}
