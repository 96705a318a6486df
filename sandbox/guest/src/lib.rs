//! The daemon's side of the guest protocol: the agent's verbs, stdio streams, and container logs made of them.
//!
//! Owns the connection to one VM's agent and the promise that no byte of output is lost or written twice. Must not know how a VM is
//! started (it gets the path of a hybrid vsock socket), what a pod is, or when a container may be seen as exited.

pub mod logs;

mod client;
mod error;
mod exec;
mod follow;
mod forward;
mod input;
mod opening;
mod output;
mod session;
mod transport;

pub use client::GuestClient;
pub use error::{GuestError, GuestErrorKind, Reached};
pub use exec::ExecResult;
pub use forward::{PortReader, PortWriter};
pub use input::InputStream;
pub use output::OutputStream;
pub use session::{ExecOutput, ExecSession, StartedExec};
