//! The thread of a device: it waits for its queues' kicks and its backend's descriptors, and serves whatever is ready.
//!
//! A worker owns its server while it runs, and gives it back when it is stopped; so a device's files survive a reset of its driver.

use std::{
    fmt, io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, mpsc},
    thread::{Builder, JoinHandle},
};

use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use crate::ports::{DeviceEvent, Events, ThreadKind, Threads};

/// Bytes of a worker's stack. Nothing in here recurses or keeps buffers on it.
const STACK_BYTES: usize = 256 << 10;

/// Token of the descriptor that ends the loop.
const STOP: u64 = u64::MAX;

/// Events that are taken at once.
const BATCH: usize = 16;

/// What the process lends to devices.
#[derive(Clone)]
pub struct Host {
    /// Confines their threads.
    pub threads: Arc<dyn Threads>,
    /// Hears from them.
    pub events: Arc<dyn Events>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

/// A descriptor to wait for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Source {
    fd: RawFd,
    token: u64,
    events: EventSet,
}

impl Source {
    /// Ready once for each time that something comes.
    pub(crate) fn edge(fd: &impl AsRawFd, token: u64) -> Self {
        Self {
            fd: fd.as_raw_fd(),
            token,
            events: EventSet::IN | EventSet::EDGE_TRIGGERED,
        }
    }

    /// Ready as long as something can be read.
    pub(crate) fn level(fd: &impl AsRawFd, token: u64) -> Self {
        Self {
            fd: fd.as_raw_fd(),
            token,
            events: EventSet::IN,
        }
    }

    /// Ready once for each time that something comes, or that there is room again to write.
    pub(crate) fn edge_both(fd: &impl AsRawFd, token: u64) -> Self {
        Self {
            fd: fd.as_raw_fd(),
            token,
            events: EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED,
        }
    }
}

/// What a worker does.
pub(crate) trait Serve: Send + 'static {
    /// What to wait for, as long as it runs.
    fn sources(&self) -> Vec<Source>;

    /// The source of this token is ready. An error ends the device: only the host's failures are errors.
    fn serve(&mut self, token: u64) -> io::Result<()>;

    /// It will be given back: end what is under way.
    fn quiesce(&mut self) {}
}

/// A running thread, and what it serves.
/// Dropping it ends it, too.
pub(crate) struct Worker<S> {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
    given_back: mpsc::Receiver<S>,
}

impl<S> fmt::Debug for Worker<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl<S: Serve> Worker<S> {
    /// Starts a thread that makes its server and serves until it is stopped. Whoever starts a device is mostly a vCPU's thread, which may
    /// do little; so everything that the server needs is made on the new thread, before it is confined.
    pub(crate) fn start(
        kind: ThreadKind,
        host: &Host,
        make: impl FnOnce() -> io::Result<S> + Send + 'static,
    ) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let (began, outcome) = mpsc::sync_channel(1);
        let (give_back, given_back) = mpsc::sync_channel(1);
        let own = host.clone();
        let work = move || {
            let server =
                match prepare(&stopped, make).and_then(|ready| own.threads.enter(kind).map(|()| ready)) {
                    Ok((epoll, server)) => {
                        // Fails only if nobody waits any more, as does the one below.
                        drop(began.send(Ok(())));
                        run(kind, &own, &epoll, server)
                    }
                    Err(e) => return drop(began.send(Err(e))),
                };
            drop(give_back.send(server));
        };
        let builder = Builder::new()
            .name(kind.name().to_owned())
            .stack_size(STACK_BYTES);
        let thread = host.threads.spawn(builder, Box::new(work))?;
        outcome
            .recv()
            .map_err(|_| io::Error::other("the thread ended before it began"))??;
        Ok(Self {
            stop,
            thread: Some(thread),
            given_back,
        })
    }

    /// Ends the thread; what it served, unless it has panicked.
    pub(crate) fn stop(mut self) -> Option<S> {
        self.end()?;
        self.given_back.try_recv().ok()
    }
}

impl<S> Worker<S> {
    /// Whether the thread ended as it should; nothing if it has ended before.
    fn end(&mut self) -> Option<()> {
        let thread = self.thread.take()?;
        // Fails only when the counter is full, and then the thread has heard.
        drop(self.stop.write(1));
        thread.join().ok()
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.end();
    }
}

/// The server, and what waits for its sources.
fn prepare<S: Serve>(stop: &EventFd, make: impl FnOnce() -> io::Result<S>) -> io::Result<(Epoll, S)> {
    let server = make()?;
    let epoll = Epoll::new()?;
    let own = Source::level(stop, STOP);
    for source in server.sources().into_iter().chain([own]) {
        let event = EpollEvent::new(source.events, source.token);
        epoll.ctl(ControlOperation::Add, source.fd, event)?;
    }
    Ok((epoll, server))
}

fn run<S: Serve>(kind: ThreadKind, host: &Host, epoll: &Epoll, mut server: S) -> S {
    let mut events = [EpollEvent::default(); BATCH];
    let failure = 'running: loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => break Some(e),
        };
        let ready = events.iter().take(count).map(EpollEvent::data);
        for token in ready {
            if token == STOP {
                break 'running None;
            }
            if let Err(e) = server.serve(token) {
                break 'running Some(e);
            }
        }
    };
    if let Some(e) = failure {
        host.events.happened(DeviceEvent::Failed {
            device: kind.name().to_owned(),
            reason: e.to_string(),
        });
    }
    server.quiesce();
    server
}
