//! Connections that carry FUSE messages of a shared file system between the guest's kernel and a file server on the host.
//!
//! The host connects, sends the number of the session (8 bytes, little endian), and reads one byte: [`TAKEN`], or anything else when
//! the agent has no room. When all connections of a session are made, the RPC `MountShared` mounts it. From then on each carries one
//! message at a time: a request as the guest's kernel wrote it, then its answer, both as linux/fuse.h lays them out, which begin with
//! their length. Requests that have no answer are followed by the next request. The end of any connection is the end of the session:
//! from then on the guest answers EIO by itself.
//!
//! Some connections of a session may carry connections of containers to Unix sockets of the host instead, one after the other: the guest
//! sends the export's name (a length byte, then its digits), the host answers with an errno (4 bytes, little endian; 0: connected). Then both
//! sides send frames, a length (4 bytes, little endian) and so many bytes, at most 64 KiB. A length of 0 ends a direction as shutdown(2) for
//! writing does; [`FORWARD_CLOSED`] ends it and says that nothing more is taken in the other one either. When both have ended, the
//! connection is free for the next. File descriptors and credentials of the sender do not travel.

/// The agent has taken the connection.
pub const TAKEN: u8 = 1;

/// Instead of a frame's length: no more in this direction, and no more is taken in the other.
pub const FORWARD_CLOSED: u32 = u32::MAX;

/// Sockets below one mount at most.
pub const MAX_SOCKETS_BELOW: usize = 64;

/// Connections of one session at most.
pub const MAX_CONNECTIONS: usize = 16;

/// Sessions of one VM at most, broken ones included.
pub const MAX_SESSIONS: usize = 64;

/// Bytes of the largest message in either direction: a transfer of 256 KiB with a page for its headers.
pub const MAX_MESSAGE: usize = (256 << 10) + 4096;
