//! Framing of the stdio connections on [`STREAM_PORT`](crate::STREAM_PORT).
//!
//! The daemon opens one connection for each stream of a process. It sends an [`Open`], the agent answers with a [`Reply`], then:
//!
//! - **Output** (stdout, stderr, or the terminal as stdout): the agent sends data frames, each a little-endian `u32` length and
//!   that many bytes (at most [`MAX_FRAME`]); a frame of length 0 is the end of the stream: every byte there will ever be has
//!   been sent. A connection that ends without it broke, and the reader comes back with the offset it has. The daemon sends
//!   acknowledgements, each a little-endian `u64`: the offset up to which bytes are safe with it. The agent keeps every byte
//!   above the last acknowledgement (at most [`OUTPUT_BUFFER_BYTES`](crate::OUTPUT_BUFFER_BYTES); then it stops reading and the
//!   process blocks). At most one connection reads a stream: a newer one ends the older.
//! - **Input** (stdin): the daemon sends data frames as above; a frame of length 0 closes the process's stdin. A connection that
//!   ends without it leaves stdin open for the next one. The agent sends nothing after the reply; it stops reading the
//!   connection while the process does not read. Any number of connections may write; a frame is written whole.
//! - **Forward** (a TCP connection to a port on the pod's loopback address): no ids, and the port is where the offset would be. Both
//!   send data frames as above; a frame of length 0 ends that direction, and nothing else does: a connection that ends without it
//!   broke, and breaks the other side. A port that refuses is answered with `Refused` and the errno in place of the offset.
//!
//! Offsets count bytes of the stream since the process started. All integers are little-endian. Whatever comes from the guest
//! is hostile: parsers here are total, and sizes are capped.

/// First bytes of an [`Open`].
pub const MAGIC: [u8; 4] = *b"CSN1";

/// Longest frame payload in bytes.
pub const MAX_FRAME: usize = 64 << 10;

/// Longest container or exec id in bytes.
pub const MAX_ID: usize = 128;

/// Bytes of an encoded [`Reply`].
pub const REPLY_BYTES: usize = 16;

/// Bytes of the fixed part of an encoded [`Open`]: magic, kind, two id lengths, one reserved byte, offset.
pub const OPEN_HEAD_BYTES: usize = 16;

/// Which stream of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Towards the process.
    Stdin,
    /// Standard output, or everything that a terminal shows.
    Stdout,
    /// Standard error; a process with a terminal has none.
    Stderr,
    /// Both directions of a connection to a port of the pod.
    Forward,
}

/// The daemon's first message on a stream connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    /// Which stream.
    pub kind: Kind,
    /// The container.
    pub container_id: String,
    /// The exec session within it; empty for the container's own process.
    pub exec_id: String,
    /// Output: first byte wanted. Also acknowledges everything below it. Forward: the port.
    pub offset: u64,
}

/// Whether the stream can be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Data follows.
    Accepted,
    /// No such container, exec session or stream (a terminal has no stderr, a process without stdin no stdin).
    NotFound,
    /// The bytes at the wanted offset have been acknowledged and dropped, or do not exist yet.
    OffsetUnavailable,
    /// The open message could not be parsed.
    Malformed,
    /// The port could not be connected to.
    Refused,
}

/// The agent's answer to an [`Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// Whether data follows.
    pub outcome: Outcome,
    /// Offset of the first byte that follows (accepted), or the lowest one still there (offset unavailable); the errno
    /// (refused).
    pub offset: u64,
}

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol.
    #[error("stream message does not begin with the magic bytes")]
    Magic,
    /// Unknown stream kind or outcome.
    #[error("unknown code {0} in a stream message")]
    Code(u8),
    /// An id is longer than [`MAX_ID`] or not UTF-8.
    #[error("malformed id in a stream message")]
    Id,
    /// A frame is longer than [`MAX_FRAME`].
    #[error("stream frame of {0} bytes is over the limit of {MAX_FRAME}")]
    FrameTooLong(u32),
}

/// The parsed fixed part of an [`Open`]; the ids follow on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenHead {
    kind: Kind,
    offset: u64,
    container_id_len: u8,
    exec_id_len: u8,
}

impl OpenHead {
    /// Parses the first [`OPEN_HEAD_BYTES`] bytes of a connection.
    pub fn decode(bytes: [u8; OPEN_HEAD_BYTES]) -> Result<Self, FrameError> {
        let [
            m0,
            m1,
            m2,
            m3,
            kind,
            container_id_len,
            exec_id_len,
            _reserved,
            offset @ ..,
        ] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic);
        }
        let kind = match kind {
            0 => Kind::Stdin,
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            3 => Kind::Forward,
            other => return Err(FrameError::Code(other)),
        };
        if usize::from(container_id_len) > MAX_ID || usize::from(exec_id_len) > MAX_ID {
            return Err(FrameError::Id);
        }
        Ok(Self {
            kind,
            offset: u64::from_le_bytes(offset),
            container_id_len,
            exec_id_len,
        })
    }

    /// Number of id bytes that follow on the wire.
    #[must_use]
    pub fn ids_len(&self) -> usize {
        usize::from(self.container_id_len) + usize::from(self.exec_id_len)
    }

    /// Joins the head with the id bytes that followed it.
    pub fn with_ids(self, ids: &[u8]) -> Result<Open, FrameError> {
        let (container, exec) = ids
            .split_at_checked(usize::from(self.container_id_len))
            .ok_or(FrameError::Id)?;
        if exec.len() != usize::from(self.exec_id_len) {
            return Err(FrameError::Id);
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| FrameError::Id);
        Ok(Open {
            kind: self.kind,
            container_id: text(container)?,
            exec_id: text(exec)?,
            offset: self.offset,
        })
    }
}

impl Open {
    /// The bytes to send.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let length = |id: &str| match u8::try_from(id.len()) {
            Ok(n) if usize::from(n) <= MAX_ID => Ok(n),
            _ => Err(FrameError::Id),
        };
        let kind = match self.kind {
            Kind::Stdin => 0,
            Kind::Stdout => 1,
            Kind::Stderr => 2,
            Kind::Forward => 3,
        };
        let mut out = MAGIC.to_vec();
        out.extend([kind, length(&self.container_id)?, length(&self.exec_id)?, 0]);
        out.extend(self.offset.to_le_bytes());
        out.extend(self.container_id.as_bytes());
        out.extend(self.exec_id.as_bytes());
        Ok(out)
    }
}

impl Reply {
    /// The bytes to send.
    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let code = match self.outcome {
            Outcome::Accepted => 0,
            Outcome::NotFound => 1,
            Outcome::OffsetUnavailable => 2,
            Outcome::Malformed => 3,
            Outcome::Refused => 4,
        };
        let mut out = [0; REPLY_BYTES];
        let (head, offset) = out.split_at_mut(8);
        head[..4].copy_from_slice(&MAGIC);
        head[4] = code;
        offset.copy_from_slice(&self.offset.to_le_bytes());
        out
    }

    /// Parses a reply.
    pub fn decode(bytes: [u8; REPLY_BYTES]) -> Result<Self, FrameError> {
        let [m0, m1, m2, m3, code, _, _, _, offset @ ..] = bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err(FrameError::Magic);
        }
        let outcome = match code {
            0 => Outcome::Accepted,
            1 => Outcome::NotFound,
            2 => Outcome::OffsetUnavailable,
            3 => Outcome::Malformed,
            4 => Outcome::Refused,
            other => return Err(FrameError::Code(other)),
        };
        Ok(Self {
            outcome,
            offset: u64::from_le_bytes(offset),
        })
    }
}

/// Checks a frame's length word; `None` is the end of the stream.
pub fn frame_len(word: [u8; 4]) -> Result<Option<usize>, FrameError> {
    let len = u32::from_le_bytes(word);
    match usize::try_from(len) {
        Ok(0) => Ok(None),
        Ok(n) if n <= MAX_FRAME => Ok(Some(n)),
        _ => Err(FrameError::FrameTooLong(len)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(bytes: &[u8]) -> Result<Open, FrameError> {
        let (head, ids) = bytes.split_at(OPEN_HEAD_BYTES);
        let head = OpenHead::decode(head.try_into().unwrap())?;
        assert_eq!(head.ids_len(), ids.len());
        head.with_ids(ids)
    }

    #[test]
    fn an_open_survives_its_encoding() {
        for kind in [Kind::Stdin, Kind::Stdout, Kind::Stderr, Kind::Forward] {
            let open = Open {
                kind,
                container_id: "c".repeat(MAX_ID),
                exec_id: "exec".into(),
                offset: u64::MAX - 7,
            };
            assert_eq!(decode(&open.encode().unwrap()).unwrap(), open);
        }
    }

    #[test]
    fn a_reply_survives_its_encoding() {
        for outcome in [
            Outcome::Accepted,
            Outcome::NotFound,
            Outcome::OffsetUnavailable,
            Outcome::Malformed,
            Outcome::Refused,
        ] {
            let reply = Reply {
                outcome,
                offset: 0x0102_0304_0506_0708,
            };
            assert_eq!(Reply::decode(reply.encode()).unwrap(), reply);
        }
    }

    #[test]
    fn hostile_messages_are_refused_by_name() {
        assert_eq!(OpenHead::decode([0; OPEN_HEAD_BYTES]), Err(FrameError::Magic));
        let mut bytes = [0; OPEN_HEAD_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = 9;
        assert_eq!(OpenHead::decode(bytes), Err(FrameError::Code(9)));
        bytes[4] = 1;
        bytes[5] = 129;
        assert_eq!(OpenHead::decode(bytes), Err(FrameError::Id));
        bytes[5] = 2;
        assert_eq!(
            OpenHead::decode(bytes).unwrap().with_ids(&[0xff, 0xfe]),
            Err(FrameError::Id)
        );
        assert_eq!(frame_len([1, 0, 1, 0]), Err(FrameError::FrameTooLong(65537)));
        assert_eq!(frame_len([0; 4]), Ok(None));
    }

    #[test]
    fn an_id_over_the_limit_is_not_sent() {
        let open = Open {
            kind: Kind::Stdin,
            container_id: "c".repeat(MAX_ID + 1),
            exec_id: String::new(),
            offset: 0,
        };
        assert_eq!(open.encode(), Err(FrameError::Id));
    }
}
