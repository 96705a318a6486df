//! The daemon's side of the guest protocol: the agent's verbs, stdio streams, and container logs made of them.
//!
//! Owns the connection to one VM's agent and the promise that no byte of output is lost or written twice. Must not know how a VM is
//! started (it gets the path of a hybrid vsock socket), what a pod is, or when a container may be seen as exited.

pub mod logs;

use std::{path::Path, time::Duration};

use caisson_agent_api::{stream, v1};

/// A connection to the agent of one VM. Cheap to clone; connects again by itself when the transport broke.
#[derive(Debug, Clone)]
pub struct GuestClient {}

#[allow(
    clippy::todo,
    clippy::unused_async,
    unused_variables,
    missing_docs,
    reason = "laid out for the rooms that build on it; replaced by the implementation"
)]
impl GuestClient {
    /// Waits until the agent behind this hybrid vsock socket answers Hello, `deadline` at most. The error says how far it got.
    pub async fn connect(vsock: &Path, deadline: Duration) -> Result<(Self, v1::HelloReply), GuestError> {
        todo!()
    }
    /// Each verb below takes the deadline of the whole call.
    pub async fn hello(&self, deadline: Duration) -> Result<v1::HelloReply, GuestError> {
        todo!()
    }
    pub async fn configure_sandbox(
        &self,
        request: v1::ConfigureSandboxRequest,
        deadline: Duration,
    ) -> Result<v1::ConfigureSandboxReply, GuestError> {
        todo!()
    }
    pub async fn put_volume(
        &self,
        request: v1::PutVolumeRequest,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn remove_volume(&self, volume_id: &str, deadline: Duration) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn create_container(
        &self,
        id: &str,
        spec: v1::ContainerSpec,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn start_container(
        &self,
        id: &str,
        deadline: Duration,
    ) -> Result<v1::StartContainerReply, GuestError> {
        todo!()
    }
    pub async fn signal_container(
        &self,
        id: &str,
        signal: u32,
        all: bool,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn remove_container(&self, id: &str, deadline: Duration) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn list_containers(&self, deadline: Duration) -> Result<Vec<v1::ContainerInfo>, GuestError> {
        todo!()
    }
    /// Waits as long as the container runs. An error means that the VM or its agent is gone, or the container is unknown; a broken
    /// transport to a live VM is mended inside.
    pub async fn wait_container(&self, id: &str) -> Result<v1::ContainerExit, GuestError> {
        todo!()
    }
    pub async fn start_exec(
        &self,
        request: v1::StartExecRequest,
        deadline: Duration,
    ) -> Result<v1::StartExecReply, GuestError> {
        todo!()
    }
    /// As [`GuestClient::wait_container`].
    pub async fn wait_exec(&self, container: &str, exec: &str) -> Result<v1::ExecExit, GuestError> {
        todo!()
    }
    pub async fn signal_exec(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        todo!()
    }
    pub async fn remove_exec(
        &self,
        container: &str,
        exec: &str,
        deadline: Duration,
    ) -> Result<(), GuestError> {
        todo!()
    }
    /// Opens an output stream at `offset`; everything below is acknowledged. `exec` is empty for the container's own process.
    pub async fn output(
        &self,
        container: &str,
        exec: &str,
        kind: stream::Kind,
        offset: u64,
    ) -> Result<OutputStream, GuestError> {
        todo!()
    }
    /// Runs one more process and collects what it prints, `limit` bytes of each output at most (the rest is read and dropped).
    /// When `timeout` passes, the process is killed and [`GuestError::ExecTimeout`] answered. The exec session is always removed.
    pub async fn exec_sync(
        &self,
        request: v1::StartExecRequest,
        timeout: Option<Duration>,
        limit: usize,
    ) -> Result<ExecResult, GuestError> {
        todo!()
    }
}

/// What [`GuestClient::exec_sync`] collected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecResult {
    /// 0-255; 128 + signal when killed by one.
    pub exit_code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// One output of one process, from an offset to its end.
#[derive(Debug)]
pub struct OutputStream {}

#[allow(
    clippy::todo,
    clippy::unused_async,
    unused_variables,
    reason = "laid out for the rooms that build on it; replaced by the implementation"
)]
impl OutputStream {
    /// The next bytes; `None` when the stream has ended (the agent said so). [`GuestError::StreamBroken`] when the connection ended
    /// without that. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, GuestError> {
        todo!()
    }
    /// Offset of the byte that `next` answers next.
    #[must_use]
    pub fn offset(&self) -> u64 {
        todo!()
    }
    /// Tells the agent that everything below `offset` is safe.
    pub async fn acknowledge(&mut self, offset: u64) -> Result<(), GuestError> {
        todo!()
    }
}

/// Why the guest could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The agent refused or failed; its own words.
    #[error("{verb} failed in the guest: {message}")]
    Agent {
        /// The verb, e.g. `StartContainer`.
        verb: &'static str,
        /// gRPC status code of the guest protocol.
        code: tonic::Code,
        /// The agent's message.
        message: String,
    },
    /// Nothing was heard in time.
    #[error("the agent did not answer {verb} within {limit:?}")]
    Deadline {
        /// The verb.
        verb: &'static str,
        /// The bound.
        limit: Duration,
    },
    /// A command ran longer than it may; it has been killed.
    #[error("command timed out after {0:?}")]
    ExecTimeout(Duration),
    /// An output connection ended before the stream did.
    #[error("stream connection broke at offset {0}")]
    StreamBroken(u64),
}
