//! The guest protocol, shared by `caisson-agent` and the daemon's guest client.
//!
//! Owns the messages and their framing. Must not know how either side does its work: no sockets, no processes, no CRI.

pub mod capabilities;
pub mod files;
pub mod stream;

/// Messages, client (feature `client`) and server (feature `server`) of `caisson.agent.v1`, generated from `proto/agent.proto`.
#[allow(
    missing_docs,
    clippy::all,
    reason = "generated; the protocol file is the documentation"
)]
pub mod v1 {
    tonic::include_proto!("caisson.agent.v1");
}

/// Version of this protocol, answered by `Hello`.
pub const PROTOCOL: u32 = 1;

/// vsock port that is the guest's power button: a connection of the host's asks it to end, and needs no words.
pub const POWER_PORT: u32 = 1020;

/// vsock port of the gRPC service. Below 1024, so that only the agent, who holds CAP_NET_BIND_SERVICE, can listen there.
pub const RPC_PORT: u32 = 1021;

/// vsock port of the stdio streams.
pub const STREAM_PORT: u32 = 1022;

/// vsock port of the connections that carry FUSE messages.
pub const FILES_PORT: u32 = 1023;

/// Largest gRPC message that either side accepts, in bytes. A volume (`PutVolume`) is the largest message there is.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Largest number of content bytes in one `PutVolume`.
pub const MAX_VOLUME_BYTES: usize = 8 << 20;

/// Largest policy in one `LoadApparmorPolicy`, in bytes.
pub const MAX_APPARMOR_POLICY_BYTES: usize = 4 << 20;

/// Bytes of unacknowledged output that the agent keeps for each stream; then the writer blocks.
pub const OUTPUT_BUFFER_BYTES: usize = 256 << 10;
