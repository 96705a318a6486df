//! What this room needs of the rest of the daemon: processes to talk to, and connections into pods.
//!
//! Bytes travel in pieces and by waiting: a [`Source`] is asked for the next piece when the last one has been taken by the client's
//! connection, a [`Sink`] is given the next one when it has taken the last.

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;

/// A command in a running container, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exec {
    /// The container.
    pub container: String,
    /// argv.
    pub command: Vec<String>,
    /// Which streams, and whether on a terminal.
    pub stdio: Stdio,
}

/// A container's own streams, as they were asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attach {
    /// The container.
    pub container: String,
    /// Which streams, and whether they are a terminal's.
    pub stdio: Stdio,
}

/// Which streams a session has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stdio {
    /// Bytes for the process.
    pub stdin: bool,
    /// Its output, or everything that a terminal shows.
    pub stdout: bool,
    /// Its other output; a terminal has none.
    pub stderr: bool,
    /// A terminal, whose size the client may change.
    pub tty: bool,
}

/// Why something could not be had, or ended; for people, whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StreamError(pub String);

/// Where bytes come from.
#[async_trait]
pub trait Source: Send {
    /// The next bytes; `None` at the end. Asking for more says that the bytes before have been taken.
    async fn next(&mut self) -> Result<Option<Bytes>, StreamError>;
}

/// Where bytes go.
#[async_trait]
pub trait Sink: Send {
    /// Waits until all of them have been taken. An error: nobody takes them any more, which ends nothing but this direction.
    async fn write(&mut self, bytes: Bytes) -> Result<(), StreamError>;

    /// The client will send no more.
    async fn close(&mut self) -> Result<(), StreamError>;
}

/// Something with a size.
#[async_trait]
pub trait Terminal: Send {
    /// Tells it its new size, in characters.
    async fn resize(&mut self, columns: u16, rows: u16) -> Result<(), StreamError>;
}

/// A process that a client talks to. Dropping it is what a client that goes away does.
pub struct Process {
    /// Absent when it was not asked for, like the others.
    pub stdin: Option<Box<dyn Sink>>,
    /// Ends when everything that will ever be written has been read.
    pub stdout: Option<Box<dyn Source>>,
    /// As `stdout`.
    pub stderr: Option<Box<dyn Source>>,
    /// Its terminal.
    pub terminal: Option<Box<dyn Terminal>>,
    /// Its exit code, once it has ended; to be asked after its outputs have ended.
    pub exit: BoxFuture<'static, Result<i32, StreamError>>,
}

/// A connection to a port in a pod.
pub struct Connection {
    /// From the pod.
    pub source: Box<dyn Source>,
    /// To the pod.
    pub sink: Box<dyn Sink>,
}

/// The rest of the daemon.
#[async_trait]
pub trait Streams: Send + Sync {
    /// Runs a command; answers when it runs.
    async fn exec(&self, wish: &Exec) -> Result<Process, StreamError>;

    /// Joins a running container's own streams: what it prints from now on.
    async fn attach(&self, wish: &Attach) -> Result<Process, StreamError>;

    /// Connects to a TCP port on the pod's loopback address.
    async fn dial(&self, sandbox: &str, port: u16) -> Result<Connection, StreamError>;
}
