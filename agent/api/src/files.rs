//! Connections that carry FUSE messages of a shared file system between the guest's kernel and a file server on the host.
//!
//! The host connects, sends the number of the session (8 bytes, little endian), and reads one byte: [`TAKEN`], or anything else when
//! the agent has no room. When all connections of a session are made, the RPC `MountShared` mounts it. From then on each carries one
//! message at a time: a request as the guest's kernel wrote it, then its answer, both as linux/fuse.h lays them out, which begin with
//! their length. Requests that have no answer are followed by the next request. The end of any connection is the end of the session:
//! from then on the guest answers EIO by itself.

/// The agent has taken the connection.
pub const TAKEN: u8 = 1;

/// Connections of one session at most.
pub const MAX_CONNECTIONS: usize = 16;

/// Sessions of one VM at most, broken ones included.
pub const MAX_SESSIONS: usize = 64;

/// Bytes of the largest message in either direction: a transfer of 256 KiB with a page for its headers.
pub const MAX_MESSAGE: usize = (256 << 10) + 4096;
