//! Streams that callers hold: commands that are talked to, containers' own streams, connections to ports.
//!
//! The actor only says whether a container runs and how it is reached; bytes never pass through it. Must not know clients or their
//! protocols.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use caisson_guest::{
    ExecOutput, ExecSession, GuestClient, InputStream, PortReader, PortWriter, StartedExec,
    logs::{ContainerLog, Tap},
};
use tokio::{sync::watch, time::sleep};

use crate::{ContainerId, SandboxError, Sandboxes, guest, registry::Request, spec::StreamSpec};

/// How long output that is still on its way may keep silent after the container has ended.
const LAST_WORDS: Duration = Duration::from_secs(3);

/// How a running container is reached.
pub(crate) struct Reach {
    pub(crate) id: ContainerId,
    pub(crate) guest: GuestClient,
    pub(crate) log: Option<Arc<ContainerLog>>,
    /// True when the container has ended, or its pod.
    pub(crate) ended: watch::Receiver<bool>,
    pub(crate) stdin: bool,
    pub(crate) stdin_once: bool,
    pub(crate) terminal: bool,
    /// For each call to the agent.
    pub(crate) deadline: Duration,
}

/// A process that is talked to. Dropping all of it is what a client that goes away does.
pub struct ProcessStreams {
    /// Absent when the process takes none.
    pub stdin: Option<ProcessInput>,
    /// Absent when it was not asked for.
    pub stdout: Option<ProcessOutput>,
    /// Absent when it was not asked for, or the process has a terminal.
    pub stderr: Option<ProcessOutput>,
    /// Absent without a terminal.
    pub terminal: Option<ProcessTerminal>,
    /// How it ends.
    pub exit: ProcessExit,
}

/// Bytes for a process.
pub struct ProcessInput {
    stream: InputStream,
    /// Of an attached client whose end is not the container's: set when it has sent everything.
    detach: Option<watch::Sender<bool>>,
}

impl ProcessInput {
    /// Waits until the process has room. An error: it takes no more.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), SandboxError> {
        self.stream
            .write(bytes)
            .await
            .map_err(SandboxError::guest("write to the standard input"))
    }

    /// There will be no more: ends the input of a command, and of a container that was to have it once; from any other container the
    /// client is detached.
    pub async fn end(&mut self) -> Result<(), SandboxError> {
        if let Some(detach) = &self.detach {
            detach.send_replace(true);
            return Ok(());
        }
        self.stream
            .end()
            .await
            .map_err(SandboxError::guest("end the standard input"))
    }
}

enum From {
    Command(Box<ExecOutput>),
    Container(Tap),
}

/// Bytes of a process.
pub struct ProcessOutput {
    from: From,
    ended: watch::Receiver<bool>,
    detached: Option<watch::Receiver<bool>>,
}

impl ProcessOutput {
    /// The next bytes; `None` at the end. Asking for more says that the bytes before have been taken. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SandboxError> {
        let next = async {
            match &mut self.from {
                From::Command(output) => output
                    .next()
                    .await
                    .map_err(SandboxError::guest("read what the command prints")),
                From::Container(tap) => Ok(tap.next().await),
            }
        };
        tokio::select! {
            piece = next => piece,
            () = silence(&mut self.ended) => Ok(None),
            () = set(self.detached.as_mut()) => Ok(None),
        }
    }
}

/// Waits until the container has ended and its last words should have come.
async fn silence(ended: &mut watch::Receiver<bool>) {
    set(Some(ended)).await;
    sleep(LAST_WORDS).await;
}

/// Waits until a flag is true; one whose owner is gone counts as true.
async fn set(flag: Option<&mut watch::Receiver<bool>>) {
    match flag {
        Some(flag) => drop(flag.wait_for(|set| *set).await),
        None => std::future::pending().await,
    }
}

/// The size of a process's terminal.
pub struct ProcessTerminal {
    guest: GuestClient,
    container: String,
    exec: String,
    deadline: Duration,
}

impl ProcessTerminal {
    /// In characters.
    pub async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), SandboxError> {
        self.guest
            .resize_terminal(&self.container, &self.exec, (columns, rows), self.deadline)
            .await
            .map_err(SandboxError::guest(format!(
                "resize a terminal of container {}",
                self.container
            )))
    }
}

enum End {
    Command(Box<ExecSession>),
    /// A container's own end is not the client's business.
    Container,
}

/// How a process ends.
pub struct ProcessExit {
    container: String,
    end: End,
    ended: watch::Receiver<bool>,
}

impl ProcessExit {
    /// The exit code, once the outputs have ended; 0 for a container's own streams.
    pub async fn wait(mut self) -> Result<i32, SandboxError> {
        match self.end {
            End::Container => Ok(0),
            End::Command(session) => {
                let what = format!("wait for a command in container {}", self.container);
                tokio::select! {
                    exit = session.wait() => Ok(exit.map_err(SandboxError::guest(what))?.exit_code),
                    () = silence(&mut self.ended) => Err(SandboxError::Cancelled {
                        what: format!("command in container {}", self.container),
                        why: "the container ended",
                    }),
                }
            }
        }
    }
}

/// A connection to a port of a pod.
pub struct PortStream {
    reader: PortReader,
    writer: PortWriter,
}

impl PortStream {
    /// Both directions, which end on their own.
    #[must_use]
    pub fn split(self) -> (PortOutput, PortInput) {
        (PortOutput(self.reader), PortInput(self.writer))
    }
}

/// From a port.
pub struct PortOutput(PortReader);

impl PortOutput {
    /// The next bytes; `None` when the server has closed its side. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, SandboxError> {
        self.0
            .next()
            .await
            .map_err(SandboxError::guest("read from a port"))
    }
}

/// To a port.
pub struct PortInput(PortWriter);

impl PortInput {
    /// Waits until the server's side has room.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), SandboxError> {
        self.0
            .write(bytes)
            .await
            .map_err(SandboxError::guest("write to a port"))
    }

    /// Closes our side.
    pub async fn end(&mut self) -> Result<(), SandboxError> {
        self.0.end().await.map_err(SandboxError::guest("close a port"))
    }
}

impl Sandboxes {
    /// Runs a command in a running container and answers with its streams, when it runs.
    pub async fn exec(
        &self,
        id: &str,
        spec: StreamSpec,
        args: Vec<Vec<u8>>,
    ) -> Result<ProcessStreams, SandboxError> {
        let reach = self.reach(id).await?;
        let container = reach.id.0.clone();
        let exec = uuid::Uuid::new_v4().simple().to_string();
        let request = guest::StartExecRequest {
            container_id: container.clone(),
            exec_id: exec.clone(),
            process: Some(guest::Process {
                args,
                terminal: spec.terminal,
                ..guest::Process::default()
            }),
            stdin: spec.stdin,
        };
        let StartedExec {
            session,
            stdin,
            stdout,
            stderr,
        } = Box::pin(reach.guest.exec_session(request))
            .await
            .map_err(SandboxError::guest(format!(
                "run a command in container {container}"
            )))?;
        let output = |from| ProcessOutput {
            from: From::Command(Box::new(from)),
            ended: reach.ended.clone(),
            detached: None,
        };
        Ok(ProcessStreams {
            stdin: stdin.map(|stream| ProcessInput { stream, detach: None }),
            // Read even when nobody wants it, so that the command does not block.
            stdout: Some(output(stdout)),
            stderr: stderr.map(output),
            terminal: spec.terminal.then(|| reach.terminal(exec)),
            exit: ProcessExit {
                container,
                end: End::Command(Box::new(session)),
                ended: reach.ended.clone(),
            },
        })
    }

    /// Joins a running container's own streams: input that it takes, and what it prints from now on.
    pub async fn attach(&self, id: &str, spec: StreamSpec) -> Result<ProcessStreams, SandboxError> {
        let reach = self.reach(id).await?;
        let container = reach.id.0.clone();
        let mut detached = None;
        let stdin = if spec.stdin && reach.stdin {
            let stream = reach
                .guest
                .input(&container, "")
                .await
                .map_err(SandboxError::guest(format!("attach to container {container}")))?;
            // A terminal is not closed by one who leaves it.
            let detach = (!reach.stdin_once || reach.terminal).then(|| {
                let (detach, seen) = watch::channel(false);
                detached = Some(seen);
                detach
            });
            Some(ProcessInput { stream, detach })
        } else {
            None
        };
        let log = reach.log.as_ref().ok_or_else(|| SandboxError::WrongState {
            what: format!("attach to container {container}"),
            state: "without outputs".into(),
        })?;
        let (stdout, stderr) = log.attach();
        let output = |tap| ProcessOutput {
            from: From::Container(tap),
            ended: reach.ended.clone(),
            detached: detached.clone(),
        };
        let outputs = (
            spec.stdout.then(|| output(stdout)),
            (spec.stderr && !reach.terminal).then(|| output(stderr)),
        );
        Ok(ProcessStreams {
            stdin,
            stdout: outputs.0,
            stderr: outputs.1,
            terminal: reach.terminal.then(|| reach.terminal(String::new())),
            exit: ProcessExit {
                container,
                end: End::Container,
                ended: reach.ended.clone(),
            },
        })
    }

    /// Connects to a TCP port on a pod's loopback address.
    pub async fn dial(&self, sandbox: &str, port: u16) -> Result<PortStream, SandboxError> {
        let handle = self.inner.registry.pod(sandbox)?;
        let guest = self
            .ask(&handle, "connection", |reply| Request::Guest { reply })
            .await?;
        let (reader, writer) = guest.forward(port).await.map_err(SandboxError::guest(format!(
            "connect to port {port} of pod sandbox {}",
            handle.latest().sandbox.id.0
        )))?;
        Ok(PortStream { reader, writer })
    }

    async fn reach(&self, id: &str) -> Result<Reach, SandboxError> {
        let (handle, view) = self.inner.registry.container(id)?;
        self.ask(&handle, "session", |reply| Request::Reach { id: view.id, reply })
            .await
    }
}

impl Reach {
    fn terminal(&self, exec: String) -> ProcessTerminal {
        ProcessTerminal {
            guest: self.guest.clone(),
            container: self.id.0.clone(),
            exec,
            deadline: self.deadline,
        }
    }
}
