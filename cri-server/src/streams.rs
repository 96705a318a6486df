//! The streaming room's port, served by pods: processes and ports as byte streams.

use async_trait::async_trait;
use bytes::Bytes;
use caisson_sandbox::{
    SandboxError, Sandboxes,
    spec::StreamSpec,
    streams::{PortInput, PortOutput, ProcessInput, ProcessOutput, ProcessStreams, ProcessTerminal},
};
use caisson_streaming::port::{
    Attach, Connection, Exec, Process, Sink, Source, Stdio, StreamError, Streams, Terminal,
};

use crate::status::chain;

/// Pods, as the streaming server sees them.
pub struct PodStreams {
    sandboxes: Sandboxes,
}

impl PodStreams {
    /// Of these pods.
    #[must_use]
    pub fn new(sandboxes: Sandboxes) -> Self {
        Self { sandboxes }
    }
}

fn told(error: SandboxError) -> StreamError {
    StreamError(chain(&error))
}

fn spec(stdio: Stdio) -> StreamSpec {
    StreamSpec {
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        terminal: stdio.tty,
    }
}

#[async_trait]
impl Streams for PodStreams {
    async fn exec(&self, wish: &Exec) -> Result<Process, StreamError> {
        let args = wish
            .command
            .iter()
            .map(|word| word.clone().into_bytes())
            .collect();
        let streams = self
            .sandboxes
            .exec(&wish.container, spec(wish.stdio), args)
            .await
            .map_err(told)?;
        Ok(process(streams))
    }

    async fn attach(&self, wish: &Attach) -> Result<Process, StreamError> {
        let streams = self
            .sandboxes
            .attach(&wish.container, spec(wish.stdio))
            .await
            .map_err(told)?;
        Ok(process(streams))
    }

    async fn dial(&self, sandbox: &str, port: u16) -> Result<Connection, StreamError> {
        let (output, input) = self.sandboxes.dial(sandbox, port).await.map_err(told)?.split();
        Ok(Connection {
            source: Box::new(FromPort(output)),
            sink: Box::new(ToPort(input)),
        })
    }
}

fn process(streams: ProcessStreams) -> Process {
    let output = |output: ProcessOutput| Box::new(Output(output)) as Box<dyn Source>;
    let exit = streams.exit;
    Process {
        stdin: streams.stdin.map(|input| Box::new(Input(input)) as Box<dyn Sink>),
        stdout: streams.stdout.map(output),
        stderr: streams.stderr.map(output),
        terminal: streams
            .terminal
            .map(|terminal| Box::new(Size(terminal)) as Box<dyn Terminal>),
        exit: Box::pin(async move { exit.wait().await.map_err(told) }),
    }
}

struct Input(ProcessInput);

#[async_trait]
impl Sink for Input {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.0.write(&bytes).await.map_err(told)
    }

    async fn close(&mut self) -> Result<(), StreamError> {
        self.0.end().await.map_err(told)
    }
}

struct Output(ProcessOutput);

#[async_trait]
impl Source for Output {
    async fn next(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.0.next().await.map_err(told)
    }
}

struct Size(ProcessTerminal);

#[async_trait]
impl Terminal for Size {
    async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), StreamError> {
        self.0.resize(columns, rows).await.map_err(told)
    }
}

struct FromPort(PortOutput);

#[async_trait]
impl Source for FromPort {
    async fn next(&mut self) -> Result<Option<Bytes>, StreamError> {
        self.0.next().await.map_err(told)
    }
}

struct ToPort(PortInput);

#[async_trait]
impl Sink for ToPort {
    async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError> {
        self.0.write(&bytes).await.map_err(told)
    }

    async fn close(&mut self) -> Result<(), StreamError> {
        self.0.end().await.map_err(told)
    }
}
