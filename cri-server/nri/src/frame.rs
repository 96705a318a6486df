//! Bytes of a plugin's connection: the multiplexer's frames, and the ttrpc messages in them. Pure.
//!
//! ```text
//! trunk:   | connection u32 | length u32 | payload | ...
//! payload: | length u32 | stream u32 | type u8 | flags u8 | message |     (may go on in the next frame)
//! ```
//!
//! All numbers are big-endian. nri `pkg/net/multiplex`, ttrpc `PROTOCOL.md`.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Largest message that either side takes; ttrpc's own bound.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;

const TRUNK_HEADER: usize = 8;
const MESSAGE_HEADER: usize = 10;

/// Largest frame of the trunk.
const MAX_FRAME_BYTES: usize = MESSAGE_HEADER + MAX_MESSAGE_BYTES;

/// What a peer reads at a time: it takes a frame in one read or fails, so the frame with a message's header must fit its buffer.
const FIRST_FRAME_BYTES: usize = 4096;

/// The two connections on a trunk, named by whom is called on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// The runtime calls the plugin.
    Plugin,
    /// The plugin calls the runtime.
    Runtime,
}

impl Lane {
    const fn number(self) -> u32 {
        match self {
            Self::Plugin => 1,
            Self::Runtime => 2,
        }
    }
}

/// What a ttrpc message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Begins a call.
    Request,
    /// Ends a call.
    Response,
}

/// One ttrpc message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Which call it belongs to.
    pub stream: u32,
    /// Request or response.
    pub kind: Kind,
    /// The envelope, encoded.
    pub body: Bytes,
}

/// Why bytes are not the protocol. The connection is of no use afterwards.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame longer than any message.
    #[error("a frame of {0} bytes, more than the {MAX_FRAME_BYTES} that are allowed")]
    Frame(usize),
    /// A message longer than allowed.
    #[error("a message of {0} bytes, more than the {MAX_MESSAGE_BYTES} that are allowed")]
    Message(usize),
    /// A type that is not used here: NRI has no streams.
    #[error("a message of type {0}, which is neither request nor response")]
    Kind(u8),
}

/// Takes a trunk's bytes apart. Holds at most two messages for each connection, and one frame.
#[derive(Debug, Default)]
pub struct Demux {
    trunk: BytesMut,
    plugin: BytesMut,
    runtime: BytesMut,
}

impl Demux {
    /// Takes what was read. Call [`Demux::next`] until it has nothing before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.trunk.extend_from_slice(bytes);
    }

    /// The next whole message.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would end at the first `None`; this one goes on after more bytes"
    )]
    pub fn next(&mut self) -> Result<Option<(Lane, Message)>, FrameError> {
        loop {
            for lane in [Lane::Plugin, Lane::Runtime] {
                if let Some(message) = message(self.lane(lane))? {
                    return Ok(Some((lane, message)));
                }
            }
            if !self.frame()? {
                return Ok(None);
            }
        }
    }

    fn lane(&mut self, lane: Lane) -> &mut BytesMut {
        match lane {
            Lane::Plugin => &mut self.plugin,
            Lane::Runtime => &mut self.runtime,
        }
    }

    /// Moves one frame of the trunk to its connection.
    fn frame(&mut self) -> Result<bool, FrameError> {
        let mut header = self.trunk.as_ref();
        if header.len() < TRUNK_HEADER {
            return Ok(false);
        }
        let (number, length) = (header.get_u32(), header.get_u32() as usize);
        if length > MAX_FRAME_BYTES {
            return Err(FrameError::Frame(length));
        }
        if header.len() < length {
            return Ok(false);
        }
        self.trunk.advance(TRUNK_HEADER);
        let payload = self.trunk.split_to(length);
        match [Lane::Plugin, Lane::Runtime]
            .into_iter()
            .find(|lane| lane.number() == number)
        {
            Some(lane) => self.lane(lane).extend_from_slice(&payload),
            // As the reference does: nobody has opened it.
            None => tracing::debug!(number, "a frame for a connection that nobody uses"),
        }
        Ok(true)
    }
}

fn message(bytes: &mut BytesMut) -> Result<Option<Message>, FrameError> {
    let mut header = bytes.as_ref();
    if header.len() < MESSAGE_HEADER {
        return Ok(None);
    }
    let (length, stream) = (header.get_u32() as usize, header.get_u32());
    let (kind, _flags) = (header.get_u8(), header.get_u8());
    if length > MAX_MESSAGE_BYTES {
        return Err(FrameError::Message(length));
    }
    let kind = match kind {
        1 => Kind::Request,
        2 => Kind::Response,
        other => return Err(FrameError::Kind(other)),
    };
    if header.len() < length {
        return Ok(None);
    }
    bytes.advance(MESSAGE_HEADER);
    Ok(Some(Message {
        stream,
        kind,
        body: bytes.split_to(length).freeze(),
    }))
}

/// The trunk's bytes of one message.
pub fn encode(lane: Lane, message: &Message) -> Result<Bytes, FrameError> {
    let length = message.body.len();
    let Some(length_field) = u32::try_from(length).ok().filter(|_| length <= MAX_MESSAGE_BYTES) else {
        return Err(FrameError::Message(length));
    };
    let mut whole = BytesMut::with_capacity(MESSAGE_HEADER + length);
    whole.put_u32(length_field);
    whole.put_u32(message.stream);
    whole.put_u8(match message.kind {
        Kind::Request => 1,
        Kind::Response => 2,
    });
    whole.put_u8(0);
    whole.put_slice(&message.body);
    let mut trunk = BytesMut::with_capacity(2 * TRUNK_HEADER + whole.len());
    let first = whole.split_to(whole.len().min(FIRST_FRAME_BYTES));
    for part in [first, whole] {
        if !part.is_empty() {
            trunk.put_u32(lane.number());
            // At most `MAX_FRAME_BYTES`, which fits.
            trunk.put_u32(u32::try_from(part.len()).unwrap_or(u32::MAX));
            trunk.put_slice(&part);
        }
    }
    Ok(trunk.freeze())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(stream: u32, kind: Kind, body: &[u8]) -> Message {
        Message {
            stream,
            kind,
            body: Bytes::copy_from_slice(body),
        }
    }

    fn all(demux: &mut Demux) -> Vec<(Lane, Message)> {
        std::iter::from_fn(|| demux.next().unwrap()).collect()
    }

    #[test]
    fn a_small_message_is_one_frame_as_the_specification_draws_it() {
        let bytes = encode(Lane::Runtime, &message(3, Kind::Request, b"xy")).unwrap();
        assert_eq!(
            bytes.as_ref(),
            [0, 0, 0, 2, 0, 0, 0, 12, 0, 0, 0, 2, 0, 0, 0, 3, 1, 0, b'x', b'y']
        );
    }

    #[test]
    fn a_large_message_is_a_frame_that_fits_a_read_buffer_and_one_with_the_rest() {
        let bytes = encode(Lane::Plugin, &message(1, Kind::Request, &vec![7; 10_000])).unwrap();
        let first = u32::from_be_bytes(bytes[4..8].try_into().unwrap());
        assert_eq!(first, 4096);
        let second = &bytes[8 + 4096..];
        assert_eq!(
            u32::from_be_bytes(second[4..8].try_into().unwrap()),
            10_010 - 4096
        );
        assert_eq!(second.len(), 8 + 10_010 - 4096);
    }

    #[test]
    fn what_is_too_large_or_unknown_is_an_error_before_it_is_waited_for() {
        let mut demux = Demux::default();
        demux.push(&[0, 0, 0, 1, 0xff, 0, 0, 0]);
        assert_eq!(demux.next(), Err(FrameError::Frame(0xff00_0000)));
        let mut demux = Demux::default();
        demux.push(&[0, 0, 0, 1, 0, 0, 0, 10, 0xff, 0, 0, 0, 0, 0, 0, 1, 1, 0]);
        assert_eq!(demux.next(), Err(FrameError::Message(0xff00_0000)));
        let mut demux = Demux::default();
        demux.push(&[0, 0, 0, 2, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 1, 3, 0]);
        assert_eq!(demux.next(), Err(FrameError::Kind(3)));
        let body = Bytes::from(vec![0; MAX_MESSAGE_BYTES + 1]);
        let large = Message {
            stream: 1,
            kind: Kind::Request,
            body,
        };
        assert_eq!(
            encode(Lane::Plugin, &large),
            Err(FrameError::Message(MAX_MESSAGE_BYTES + 1))
        );
    }

    #[test]
    fn frames_of_connections_that_nobody_opened_are_dropped() {
        let mut demux = Demux::default();
        demux.push(&[0, 0, 0, 9, 0, 0, 0, 1, 0xff]);
        demux.push(&encode(Lane::Plugin, &message(1, Kind::Response, b"")).unwrap());
        assert_eq!(all(&mut demux), [(Lane::Plugin, message(1, Kind::Response, b""))]);
    }

    proptest! {
        #[test]
        fn messages_arrive_whole_and_in_order_however_they_are_cut(
            bodies in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..9000)), 1..5),
            cut in 1_usize..5000,
        ) {
            let sent: Vec<_> = bodies.iter().zip(0..).map(|((plugin, body), stream)| {
                let lane = if *plugin { Lane::Plugin } else { Lane::Runtime };
                (lane, message(stream, Kind::Request, body))
            }).collect();
            let bytes: Vec<u8> = sent.iter().flat_map(|(lane, message)| encode(*lane, message).unwrap()).collect();
            let mut demux = Demux::default();
            let mut got = Vec::new();
            for part in bytes.chunks(cut) {
                demux.push(part);
                got.extend(all(&mut demux));
            }
            prop_assert_eq!(got, sent);
        }

        #[test]
        fn no_bytes_whatever_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut demux = Demux::default();
            demux.push(&bytes);
            while let Ok(Some(_)) = demux.next() {}
        }
    }
}
