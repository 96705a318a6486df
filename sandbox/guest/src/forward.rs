//! A connection to a port of the pod, dialled by the agent; both directions end on their own.

use bytes::{Bytes, BytesMut};
use caisson_agent_api::stream;
use tokio::{
    io::AsyncReadExt,
    net::{UnixStream, unix::OwnedReadHalf},
};

use crate::{GuestError, input::Frames};

/// Bytes of a frame's length word.
const WORD: usize = 4;

/// From the pod.
#[derive(Debug)]
pub struct PortReader {
    half: OwnedReadHalf,
    buffer: BytesMut,
    received: u64,
    ended: bool,
}

/// To the pod.
#[derive(Debug)]
pub struct PortWriter {
    frames: Frames,
}

/// Both directions of an accepted connection.
pub(crate) fn split(stream: UnixStream) -> (PortReader, PortWriter) {
    let (read, write) = stream.into_split();
    let reader = PortReader {
        half: read,
        buffer: BytesMut::new(),
        received: 0,
        ended: false,
    };
    let frames = Frames::new(write);
    (reader, PortWriter { frames })
}

impl PortReader {
    /// The next bytes; `None` when the server in the pod has closed its side. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Bytes>, GuestError> {
        while !self.ended {
            let wanted = match self.buffer.first_chunk::<WORD>() {
                None => WORD,
                Some(word) => match stream::frame_len(*word)? {
                    None => {
                        self.ended = true;
                        break;
                    }
                    Some(length) => WORD + length,
                },
            };
            if wanted > WORD && self.buffer.len() >= wanted {
                let frame = self.buffer.split_to(wanted).freeze().slice(WORD..);
                self.received = self.received.saturating_add(frame.len() as u64);
                return Ok(Some(frame));
            }
            self.buffer.reserve(wanted.saturating_sub(self.buffer.len()));
            match self.half.read_buf(&mut self.buffer).await {
                Ok(count) if count > 0 => {}
                Ok(_) | Err(_) => return Err(GuestError::StreamBroken(self.received)),
            }
        }
        Ok(None)
    }
}

impl PortWriter {
    /// Waits until all bytes are on their way.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        self.frames.write(bytes).await
    }

    /// Closes our side.
    pub async fn end(&mut self) -> Result<(), GuestError> {
        self.frames.end().await
    }
}
