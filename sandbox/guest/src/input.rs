//! Bytes towards the guest: frames on a stream connection, as `caisson_agent_api::stream` describes.

use std::io;

use bytes::Buf;
use caisson_agent_api::stream::MAX_FRAME;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
};

use crate::GuestError;

/// Writes frames; for stdin and for forwarded connections.
#[derive(Debug)]
pub(crate) struct Frames {
    half: OwnedWriteHalf,
    sent: u64,
}

impl Frames {
    pub(crate) fn new(half: OwnedWriteHalf) -> Self {
        Self { half, sent: 0 }
    }

    /// Waits until all bytes are on their way. Not cancel-safe: a frame that was begun must be finished.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        for frame in bytes.chunks(MAX_FRAME) {
            self.put(frame)
                .await
                .map_err(|_| GuestError::StreamBroken(self.sent))?;
            self.sent = self.sent.saturating_add(frame.len() as u64);
        }
        Ok(())
    }

    /// Says that there is no more.
    pub(crate) async fn end(&mut self) -> Result<(), GuestError> {
        self.put(&[])
            .await
            .map_err(|_| GuestError::StreamBroken(self.sent))
    }

    async fn put(&mut self, frame: &[u8]) -> io::Result<()> {
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        let word = length.to_le_bytes();
        let mut both = Buf::chain(word.as_slice(), frame);
        self.half.write_all_buf(&mut both).await
    }
}

/// The stdin of a process. Dropping it without an end leaves stdin open for others, unless the process was to have it once.
#[derive(Debug)]
pub struct InputStream {
    frames: Frames,
    /// The agent says nothing after its reply; it closes when nobody reads any more.
    closed: OwnedReadHalf,
}

impl InputStream {
    pub(crate) fn new(stream: UnixStream) -> Self {
        let (closed, half) = stream.into_split();
        Self {
            frames: Frames::new(half),
            closed,
        }
    }

    /// Waits until the agent's side has room, which it has when the process reads. An error: nobody reads any more.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<(), GuestError> {
        let mut end = [0];
        let sent = self.frames.sent;
        tokio::select! {
            written = self.frames.write(bytes) => written,
            _ = self.closed.read(&mut end) => Err(GuestError::StreamBroken(sent)),
        }
    }

    /// Closes the process's stdin.
    pub async fn end(&mut self) -> Result<(), GuestError> {
        self.frames.end().await
    }
}
