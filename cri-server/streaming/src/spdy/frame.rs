//! Frames of SPDY/3.1, sections 2.2 (framing) and 2.6 (control frames): bytes to frames and back. Pure: no sockets, no compression.
//!
//! Whatever comes is hostile: the decoder is total. Control frames are capped; data frames may be as long as the format allows, and
//! come out in pieces as they arrive, so that nobody has to hold a whole one.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Version in every control frame.
pub const VERSION: u16 = 3;

/// Longest payload of a control frame that is taken, in bytes. The longest legitimate one is a SYN_STREAM with a few short headers.
pub const MAX_CONTROL: usize = 16 << 10;

/// Longest payload that the format has room for: 24 bits.
pub const MAX_DATA: usize = (1 << 24) - 1;

/// Bytes of the head of every frame.
const HEAD: usize = 8;

const CONTROL_BIT: u32 = 1 << 31;
const STREAM_MASK: u32 = CONTROL_BIT - 1;

const FLAG_FIN: u8 = 0x01;
const FLAG_UNIDIRECTIONAL: u8 = 0x02;

const SYN_STREAM: u16 = 1;
const SYN_REPLY: u16 = 2;
const RST_STREAM: u16 = 3;
const SETTINGS: u16 = 4;
const PING: u16 = 6;
const GOAWAY: u16 = 7;
const HEADERS: u16 = 8;
const WINDOW_UPDATE: u16 = 9;

/// Status codes of RST_STREAM (2.6.3) that are sent here.
pub mod reset {
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 1;
    /// Data for a stream that is not there.
    pub const INVALID_STREAM: u32 = 2;
    /// The stream was not accepted, and nothing was done for it.
    pub const REFUSED_STREAM: u32 = 3;
    /// Whoever used the stream is gone.
    pub const CANCEL: u32 = 5;
    /// The peer used a stream that it had half-closed.
    pub const STREAM_ALREADY_CLOSED: u32 = 9;
}

/// A frame, or a piece of a data frame. Header blocks are still compressed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// 2.2.2. `fin` comes with the last piece only.
    Data {
        /// Whose.
        stream: u32,
        /// Nothing more will come from the sender.
        fin: bool,
        /// At most [`MAX_DATA`] bytes.
        bytes: Bytes,
    },
    /// 2.6.1: opens a stream.
    SynStream {
        /// Odd when a client opens it.
        stream: u32,
        /// 0, or the stream it belongs to.
        associated: u32,
        /// 0 (highest) to 7.
        priority: u8,
        /// Nothing more will come from the sender.
        fin: bool,
        /// Nothing may be sent to the sender.
        unidirectional: bool,
        /// Compressed name/value block.
        block: Bytes,
    },
    /// 2.6.2: accepts a stream.
    SynReply {
        /// Which.
        stream: u32,
        /// Nothing more will come from the sender.
        fin: bool,
        /// Compressed name/value block.
        block: Bytes,
    },
    /// 2.6.3: ends a stream at once.
    RstStream {
        /// Which.
        stream: u32,
        /// Why, as in [`reset`].
        status: u32,
    },
    /// 2.6.4: (id, value) each; flags are left out.
    Settings(Vec<(u32, u32)>),
    /// 2.6.5.
    Ping(u32),
    /// 2.6.6: the sender will accept no more streams.
    GoAway {
        /// Last stream that was accepted.
        last: u32,
        /// 0: in order.
        status: u32,
    },
    /// 2.6.7: more headers.
    Headers {
        /// Of which stream.
        stream: u32,
        /// Nothing more will come from the sender.
        fin: bool,
        /// Compressed name/value block.
        block: Bytes,
    },
    /// 2.6.8: so many bytes may be sent in addition; stream 0 is the session.
    WindowUpdate {
        /// Which.
        stream: u32,
        /// 1 to 2^31 - 1.
        delta: u32,
    },
}

/// Why bytes are no frame. The session cannot go on: the compression of later headers depends on all earlier ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not SPDY/3.
    #[error("control frame of SPDY version {0}")]
    Version(u16),
    /// A control frame that is over the cap.
    #[error("control frame of {0} bytes is over the limit of {MAX_CONTROL}")]
    TooLong(usize),
    /// A control frame whose length does not fit its type.
    #[error("frame of type {0} has the wrong length")]
    Length(u16),
    /// Stream 0 in a frame that is about a stream.
    #[error("frame of type {0} for stream 0")]
    ZeroStream(u16),
}

/// Cuts a byte stream into frames.
#[derive(Debug, Default)]
pub struct Decoder {
    /// The rest of a data frame whose head has been read.
    data: Option<Rest>,
}

#[derive(Debug)]
struct Rest {
    stream: u32,
    fin: bool,
    left: usize,
}

impl Decoder {
    /// Takes the next frame, or piece of a data frame, off the front of `input`; `None`: more bytes are needed. Frames of unknown type
    /// are skipped, as 2.2.1 wants.
    pub fn next(&mut self, input: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(rest) = self.data.take() {
                return Ok(self.piece(rest, input));
            }
            let Some(head) = input.first_chunk::<HEAD>() else {
                return Ok(None);
            };
            let mut head = head.as_slice();
            let (word, flags_and_length) = (head.get_u32(), head.get_u32());
            let [flags, ..] = flags_and_length.to_be_bytes();
            // 24 bits fit any usize.
            let length = (flags_and_length & 0x00ff_ffff) as usize;
            if word & CONTROL_BIT == 0 {
                if word == 0 {
                    return Err(FrameError::ZeroStream(0));
                }
                input.advance(HEAD);
                self.data = Some(Rest {
                    stream: word,
                    fin: flags & FLAG_FIN != 0,
                    left: length,
                });
                continue;
            }
            let [v0, v1, t0, t1] = (word & STREAM_MASK).to_be_bytes();
            let (version, kind) = (u16::from_be_bytes([v0, v1]), u16::from_be_bytes([t0, t1]));
            if version != VERSION {
                return Err(FrameError::Version(version));
            }
            if length > MAX_CONTROL {
                return Err(FrameError::TooLong(length));
            }
            if input.len() < HEAD + length {
                input.reserve(HEAD + length - input.len());
                return Ok(None);
            }
            input.advance(HEAD);
            let payload = input.split_to(length).freeze();
            if let Some(frame) = control(kind, flags, payload)? {
                return Ok(Some(frame));
            }
        }
    }

    /// As much of a data frame as is there. An empty piece is only made to carry the end.
    fn piece(&mut self, mut rest: Rest, input: &mut BytesMut) -> Option<Frame> {
        let bytes = input.split_to(rest.left.min(input.len())).freeze();
        rest.left -= bytes.len();
        if rest.left == 0 {
            return Some(Frame::Data {
                stream: rest.stream,
                fin: rest.fin,
                bytes,
            });
        }
        let stream = rest.stream;
        self.data = Some(rest);
        (!bytes.is_empty()).then_some(Frame::Data {
            stream,
            fin: false,
            bytes,
        })
    }
}

fn control(kind: u16, flags: u8, mut payload: Bytes) -> Result<Option<Frame>, FrameError> {
    let fin = flags & FLAG_FIN != 0;
    let fits = match kind {
        SYN_STREAM => payload.len() >= 10,
        SYN_REPLY | HEADERS | SETTINGS => payload.len() >= 4,
        RST_STREAM | GOAWAY | WINDOW_UPDATE => payload.len() == 8,
        PING => payload.len() == 4,
        _ => return Ok(None),
    };
    if !fits {
        return Err(FrameError::Length(kind));
    }
    let first = payload.get_u32();
    let stream = first & STREAM_MASK;
    if stream == 0 && matches!(kind, SYN_STREAM | SYN_REPLY | HEADERS | RST_STREAM) {
        return Err(FrameError::ZeroStream(kind));
    }
    Ok(Some(match kind {
        SYN_STREAM => {
            let associated = payload.get_u32() & STREAM_MASK;
            let priority = payload.get_u8() >> 5;
            // The credential slot, which nothing uses.
            payload.advance(1);
            Frame::SynStream {
                stream,
                associated,
                priority,
                fin,
                unidirectional: flags & FLAG_UNIDIRECTIONAL != 0,
                block: payload,
            }
        }
        SYN_REPLY => Frame::SynReply {
            stream,
            fin,
            block: payload,
        },
        HEADERS => Frame::Headers {
            stream,
            fin,
            block: payload,
        },
        RST_STREAM => Frame::RstStream {
            stream,
            status: payload.get_u32(),
        },
        GOAWAY => Frame::GoAway {
            last: stream,
            status: payload.get_u32(),
        },
        WINDOW_UPDATE => Frame::WindowUpdate {
            stream,
            delta: payload.get_u32() & STREAM_MASK,
        },
        SETTINGS => settings(first, payload)?,
        _ => Frame::Ping(first),
    }))
}

fn settings(count: u32, mut payload: Bytes) -> Result<Frame, FrameError> {
    // A control frame's cap bounds the number of entries.
    if usize::try_from(count).ok().and_then(|count| count.checked_mul(8)) != Some(payload.len()) {
        return Err(FrameError::Length(SETTINGS));
    }
    let mut entries = Vec::with_capacity(payload.len() / 8);
    while payload.len() >= 8 {
        entries.push((payload.get_u32() & 0x00ff_ffff, payload.get_u32()));
    }
    Ok(Frame::Settings(entries))
}

impl Frame {
    /// Appends the frame's bytes. False, and nothing appended: a part is longer than the format has room for.
    #[must_use]
    pub fn encode(&self, out: &mut BytesMut) -> bool {
        match self {
            Self::Data { stream, fin, bytes } => {
                let Some(length) = length(bytes.len()) else {
                    return false;
                };
                out.reserve(HEAD + bytes.len());
                out.put_u32(stream & STREAM_MASK);
                out.put_u32(u32::from_be_bytes([flag(*fin), 0, 0, 0]) | length);
                out.put_slice(bytes);
                true
            }
            Self::SynStream {
                stream,
                associated,
                priority,
                fin,
                unidirectional,
                block,
            } => {
                let one_way = if *unidirectional { FLAG_UNIDIRECTIONAL } else { 0 };
                head(out, SYN_STREAM, flag(*fin) | one_way, 10 + block.len()) && {
                    out.put_u32(stream & STREAM_MASK);
                    out.put_u32(associated & STREAM_MASK);
                    out.put_u8(priority << 5);
                    out.put_u8(0);
                    out.put_slice(block);
                    true
                }
            }
            Self::SynReply { stream, fin, block } => with_block(out, SYN_REPLY, *stream, flag(*fin), block),
            Self::Headers { stream, fin, block } => with_block(out, HEADERS, *stream, flag(*fin), block),
            Self::RstStream { stream, status } => pair(out, RST_STREAM, *stream, *status),
            Self::GoAway { last, status } => pair(out, GOAWAY, *last, *status),
            Self::WindowUpdate { stream, delta } => pair(out, WINDOW_UPDATE, *stream, *delta),
            Self::Ping(id) => {
                head(out, PING, 0, 4) && {
                    out.put_u32(*id);
                    true
                }
            }
            Self::Settings(entries) => {
                let Ok(count) = u32::try_from(entries.len()) else {
                    return false;
                };
                head(out, SETTINGS, 0, 4 + 8 * entries.len()) && {
                    out.put_u32(count);
                    for (id, value) in entries {
                        out.put_u32(id & 0x00ff_ffff);
                        out.put_u32(*value);
                    }
                    true
                }
            }
        }
    }
}

fn flag(fin: bool) -> u8 {
    if fin { FLAG_FIN } else { 0 }
}

fn length(bytes: usize) -> Option<u32> {
    u32::try_from(bytes).ok().filter(|_| bytes <= MAX_DATA)
}

fn head(out: &mut BytesMut, kind: u16, flags: u8, payload: usize) -> bool {
    let Some(length) = length(payload) else {
        return false;
    };
    out.reserve(HEAD + payload);
    out.put_u32(CONTROL_BIT | u32::from(VERSION) << 16 | u32::from(kind));
    out.put_u32(u32::from_be_bytes([flags, 0, 0, 0]) | length);
    true
}

fn with_block(out: &mut BytesMut, kind: u16, stream: u32, flags: u8, block: &Bytes) -> bool {
    head(out, kind, flags, 4 + block.len()) && {
        out.put_u32(stream & STREAM_MASK);
        out.put_slice(block);
        true
    }
}

fn pair(out: &mut BytesMut, kind: u16, first: u32, second: u32) -> bool {
    head(out, kind, 0, 8) && {
        out.put_u32(first & STREAM_MASK);
        out.put_u32(second);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream() -> impl Strategy<Value = u32> {
        1..=STREAM_MASK
    }

    fn block() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from)
    }

    fn frame() -> impl Strategy<Value = Frame> {
        prop_oneof![
            (stream(), any::<bool>(), block()).prop_map(|(stream, fin, bytes)| Frame::Data {
                stream,
                fin,
                bytes
            }),
            (
                stream(),
                0..=STREAM_MASK,
                0u8..8,
                any::<bool>(),
                any::<bool>(),
                block()
            )
                .prop_map(|(stream, associated, priority, fin, unidirectional, block)| {
                    Frame::SynStream {
                        stream,
                        associated,
                        priority,
                        fin,
                        unidirectional,
                        block,
                    }
                }),
            (stream(), any::<bool>(), block()).prop_map(|(stream, fin, block)| Frame::SynReply {
                stream,
                fin,
                block
            }),
            (stream(), any::<bool>(), block()).prop_map(|(stream, fin, block)| Frame::Headers {
                stream,
                fin,
                block
            }),
            (stream(), any::<u32>()).prop_map(|(stream, status)| Frame::RstStream { stream, status }),
            (0..=STREAM_MASK, any::<u32>()).prop_map(|(last, status)| Frame::GoAway { last, status }),
            (0..=STREAM_MASK, 0..=STREAM_MASK)
                .prop_map(|(stream, delta)| Frame::WindowUpdate { stream, delta }),
            any::<u32>().prop_map(Frame::Ping),
            prop::collection::vec((0u32..1 << 24, any::<u32>()), 0..20).prop_map(Frame::Settings),
        ]
    }

    /// Joins the pieces of data frames.
    fn joined(frames: Vec<Frame>) -> Vec<Frame> {
        let mut out: Vec<Frame> = Vec::new();
        for frame in frames {
            match (out.last_mut(), frame) {
                (
                    Some(Frame::Data {
                        stream: s0,
                        fin: f0,
                        bytes: b0,
                    }),
                    Frame::Data { stream, fin, bytes },
                ) if *s0 == stream && !*f0 => {
                    *b0 = [b0.as_ref(), bytes.as_ref()].concat().into();
                    *f0 = fin;
                }
                (_, frame) => out.push(frame),
            }
        }
        out
    }

    proptest! {
        #[test]
        fn frames_survive_encoding_however_the_bytes_are_cut(
            frames in prop::collection::vec(frame(), 1..12),
            cuts in prop::collection::vec(1usize..200, 1..40),
        ) {
            let mut wire = BytesMut::new();
            for frame in &frames {
                prop_assert!(frame.encode(&mut wire));
            }
            let (mut decoder, mut input, mut got) = (Decoder::default(), BytesMut::new(), Vec::new());
            let mut cuts = cuts.into_iter().cycle();
            while !wire.is_empty() {
                let piece = wire.split_to(cuts.next().unwrap().min(wire.len()));
                input.extend_from_slice(&piece);
                while let Some(frame) = decoder.next(&mut input).unwrap() {
                    got.push(frame);
                }
            }
            prop_assert!(input.is_empty());
            prop_assert_eq!(joined(got), joined(frames));
        }

        #[test]
        fn no_bytes_make_the_decoder_panic_or_hold_more_than_it_was_given(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
        ) {
            let mut input = BytesMut::from(bytes.as_slice());
            let (mut decoder, mut out) = (Decoder::default(), 0);
            while let Ok(Some(frame)) = decoder.next(&mut input) {
                if let Frame::Data { bytes, .. } = frame {
                    out += bytes.len();
                }
            }
            prop_assert!(out + input.len() <= bytes.len());
        }
    }

    #[test]
    fn what_cannot_be_spdy_is_refused_by_name() {
        let decode = |bytes: &[u8]| Decoder::default().next(&mut BytesMut::from(bytes));
        assert_eq!(decode(b"\x80\x02\0\x06\0\0\0\x04"), Err(FrameError::Version(2)));
        assert_eq!(
            decode(b"\x80\x03\0\x01\0\0\xff\xff"),
            Err(FrameError::TooLong(65535))
        );
        assert_eq!(
            decode(b"\x80\x03\0\x06\0\0\0\x05abcde"),
            Err(FrameError::Length(PING))
        );
        assert_eq!(
            decode(b"\x80\x03\0\x03\0\0\0\x08\0\0\0\0\0\0\0\x01"),
            Err(FrameError::ZeroStream(RST_STREAM))
        );
        assert_eq!(
            decode(b"\x80\x03\0\x04\0\0\0\x0c\xff\xff\xff\xff\0\0\0\0\0\0\0\0"),
            Err(FrameError::Length(SETTINGS))
        );
        assert_eq!(decode(b"\0\0\0\0\0\0\0\0"), Err(FrameError::ZeroStream(0)));
    }

    #[test]
    fn unknown_control_frames_are_skipped() {
        let mut input =
            BytesMut::from(b"\x80\x03\0\x0b\0\0\0\x02xy\x80\x03\0\x06\0\0\0\x04\0\0\0\x07".as_slice());
        assert_eq!(Decoder::default().next(&mut input), Ok(Some(Frame::Ping(7))));
        assert!(input.is_empty());
    }
}
