//! A running process: its streams, its end, and signals to it. The same for a container's first process and for an exec session's.
//!
//! Must not know containers: what has to happen at the end besides is the caller's.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{WaitId, WaitIdOptions, WaitIdStatus, waitid},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{
    io::unix::{AsyncFd, AsyncFdReadyGuard},
    sync::watch,
};

use crate::{
    clock,
    console::complain,
    error::{AgentError, At},
    input::Input,
    launch::Launched,
    output::{Drained, Output},
    signal,
    stage_spec::FdKind,
    watch_fd::watched,
};

/// Longest wait for outputs that nobody takes, before the end is told nevertheless. They go on.
const DRAIN_BOUND: Duration = Duration::from_secs(12);

/// The streams of a process, there before it runs and after it ended.
#[derive(Debug)]
pub(crate) struct Stdio {
    pub(crate) stdin: Option<Arc<Input>>,
    pub(crate) stdout: Arc<Output>,
    /// A terminal has none.
    pub(crate) stderr: Option<Arc<Output>>,
}

impl Stdio {
    pub(crate) fn new(terminal: bool, stdin: bool, stdin_once: bool) -> Arc<Self> {
        Arc::new(Self {
            stdin: stdin.then(|| Input::new(stdin_once)),
            stdout: Output::new(),
            stderr: (!terminal).then(Output::new),
        })
    }

    /// Nothing will ever come or be read.
    pub(crate) fn abandon(&self) {
        self.stdout.finish();
        if let Some(stderr) = &self.stderr {
            stderr.finish();
        }
        if let Some(stdin) = &self.stdin {
            stdin.shut();
        }
    }

    pub(crate) fn stderr_written(&self) -> u64 {
        self.stderr.as_ref().map_or(0, |stderr| stderr.written())
    }
}

/// Both ends of the pipes of a process without a terminal.
#[derive(Debug, Default)]
pub(crate) struct Pipes {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    theirs: Vec<(FdKind, OwnedFd)>,
}

impl Pipes {
    /// The pipes that `stdio` needs; none with a terminal.
    pub(crate) fn new(stdio: &Stdio) -> Result<Self, AgentError> {
        let mut pipes = Self::default();
        if stdio.stderr.is_none() {
            return Ok(pipes);
        }
        if stdio.stdin.is_some() {
            let (reader, writer) = pipe()?;
            pipes.stdin = Some(nonblocking(writer)?);
            pipes.theirs.push((FdKind::Stdin, reader));
        }
        for (kind, ours) in [
            (FdKind::Stdout, &mut pipes.stdout),
            (FdKind::Stderr, &mut pipes.stderr),
        ] {
            let (reader, writer) = pipe()?;
            *ours = Some(nonblocking(reader)?);
            pipes.theirs.push((kind, writer));
        }
        Ok(pipes)
    }

    /// The process's ends.
    pub(crate) fn theirs(&self) -> impl Iterator<Item = (FdKind, BorrowedFd<'_>)> {
        self.theirs.iter().map(|(kind, fd)| (*kind, fd.as_fd()))
    }
}

fn pipe() -> Result<(OwnedFd, OwnedFd), AgentError> {
    pipe_with(PipeFlags::CLOEXEC).at(|| "making a pipe")
}

fn nonblocking(fd: OwnedFd) -> Result<OwnedFd, AgentError> {
    rustix::io::ioctl_fionbio(&fd, true).at(|| "making a pipe non-blocking")?;
    Ok(fd)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// 0-255; 128 + signal when killed by one.
    pub(crate) code: i32,
    /// 0 when it exited by itself.
    pub(crate) signal: u32,
    /// CLOCK_REALTIME.
    pub(crate) finished_at_nanos: u64,
    /// See the protocol.
    pub(crate) output_cut: bool,
}

/// A process and its streams.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pidfd: OwnedFd,
    pub(crate) stdio: Arc<Stdio>,
    terminal: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    end: watch::Receiver<Option<End>>,
}

impl Process {
    /// Takes charge of a process: copies its outputs, waits for it, calls `at_exit` as soon as it has ended.
    pub(crate) fn supervise(
        launched: Launched,
        stdio: Arc<Stdio>,
        pipes: Pipes,
        at_exit: impl FnOnce() + Send + 'static,
    ) -> Result<Arc<Self>, AgentError> {
        let (exited, exit_seen) = watch::channel(false);
        let (end_sender, end) = watch::channel(None);
        let mut sources = Vec::new();
        let mut terminal = None;
        let registering = || "watching the process's streams";
        if let Some(master) = launched.terminal {
            let master = Arc::new(watched(master).at(registering)?);
            if let Some(stdin) = &stdio.stdin {
                stdin.open_terminal(Arc::clone(&master));
            }
            sources.push((Arc::clone(&stdio.stdout), Arc::clone(&master)));
            terminal = Some(master);
        }
        if let (Some(stdin), Some(pipe)) = (&stdio.stdin, pipes.stdin) {
            stdin.open_pipe(pipe).at(registering)?;
        }
        if let Some(fd) = pipes.stdout {
            sources.push((Arc::clone(&stdio.stdout), Arc::new(watched(fd).at(registering)?)));
        }
        if let (Some(output), Some(fd)) = (&stdio.stderr, pipes.stderr) {
            sources.push((Arc::clone(output), Arc::new(watched(fd).at(registering)?)));
        }
        let ended = launched
            .pidfd
            .try_clone()
            .and_then(watched)
            .at(|| "watching the process")?;
        let pumps = sources
            .into_iter()
            .map(|(output, source)| {
                let exit_seen = exit_seen.clone();
                tokio::spawn(async move { output.pump(source, exit_seen).await })
            })
            .collect::<Vec<_>>();
        let process = Arc::new(Self {
            pid: launched.pid,
            pidfd: launched.pidfd,
            stdio,
            terminal: Mutex::new(terminal),
            end,
        });
        let owner = Arc::clone(&process);
        tokio::spawn(async move {
            let (code, signal) = wait(&ended).await;
            let finished_at_nanos = clock::real_nanos();
            at_exit();
            exited.send_replace(true);
            let output_cut = drain(pumps).await;
            if let Some(stdin) = &owner.stdio.stdin {
                stdin.shut();
            }
            // A terminal's controlling side would keep 12 KiB of kernel memory.
            owner
                .terminal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
            end_sender.send_replace(Some(End {
                code,
                signal,
                finished_at_nanos,
                output_cut,
            }));
        });
        Ok(process)
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<End> {
        *self.end.borrow()
    }

    /// Waits for the end.
    pub(crate) async fn end(&self) -> Option<End> {
        let mut end = self.end.clone();
        end.wait_for(Option::is_some).await.ok().and_then(|end| *end)
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends a signal. A process that has ended takes none, which is no error.
    pub(crate) fn signal(&self, number: u32) -> Result<(), AgentError> {
        signal::send(&self.pidfd, number)
    }

    /// Kills it with what it has started and that has not left its group.
    pub(crate) fn kill_group(&self) -> Result<(), AgentError> {
        signal::kill_group(&self.pidfd)
    }

    /// Sets the size of its terminal; false when it has none.
    pub(crate) fn resize(&self, columns: u16, rows: u16) -> io::Result<bool> {
        let terminal = self
            .terminal
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(terminal) = terminal else {
            return Ok(false);
        };
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal.get_ref(), size)?;
        Ok(true)
    }
}

/// Waits for all outputs; true when one was cut. Outputs that the daemon does not take are not waited for without bound.
async fn drain(pumps: Vec<tokio::task::JoinHandle<Drained>>) -> bool {
    let all = async {
        let mut cut = false;
        for pump in pumps {
            cut |= matches!(pump.await, Ok(Drained::Cut));
        }
        cut
    };
    tokio::time::timeout(DRAIN_BOUND, all).await.unwrap_or(false)
}

/// Waits for the process behind a pidfd, which is a child of the agent, and reaps it.
async fn wait(pidfd: &AsyncFd<OwnedFd>) -> (i32, u32) {
    loop {
        let ready: io::Result<AsyncFdReadyGuard<'_, OwnedFd>> = pidfd.readable().await;
        match waitid(
            WaitId::PidFd(pidfd.get_ref().as_fd()),
            WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
        ) {
            Ok(Some(status)) => return exit_code(&status),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                complain(&format!("waiting for a process: {error}"));
                return (255, 0);
            }
        }
        match ready {
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => {
                complain(&format!("watching a process: {error}"));
                return (255, 0);
            }
        }
    }
}

fn exit_code(status: &WaitIdStatus) -> (i32, u32) {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => (code, 0),
        (None, Some(signal)) => (128 + signal, signal.unsigned_abs()),
        (None, None) => (255, 0),
    }
}
