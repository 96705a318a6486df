//! One connection to one output of one process, framed as `caisson_agent_api::stream` describes.

use std::io;

use bytes::BufMut;
use caisson_agent_api::stream;
use tokio::{io::Interest, net::UnixStream};

use crate::{GuestError, opening, transport::Route};

/// Bytes of a frame's length word.
const WORD: usize = 4;

/// One output of one process, from an offset to its end.
#[derive(Debug)]
pub struct OutputStream {
    stream: UnixStream,
    /// Bytes of the frame that is being read, with its length word.
    partial: Vec<u8>,
    offset: u64,
    acks: Acks,
    ended: bool,
}

/// Acknowledgements on their way. Only the newest counts, but a begun one must be finished.
#[derive(Debug, Default)]
struct Acks {
    /// What is left of the one being sent.
    begun: Vec<u8>,
    newest: Option<u64>,
}

impl OutputStream {
    pub(crate) async fn open(route: &Route, open: &stream::Open) -> Result<Self, GuestError> {
        let (stream, offset) = opening::open(route, open).await?;
        if offset != open.offset {
            return Err(GuestError::Protocol("OpenStream: accepted at another offset"));
        }
        Ok(Self {
            stream,
            partial: Vec::new(),
            offset,
            acks: Acks::default(),
            ended: false,
        })
    }

    /// The next bytes; `None` when the stream has ended (the agent said so). [`GuestError::StreamBroken`] when the connection ended
    /// without that. Cancel-safe.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, GuestError> {
        if self.ended {
            return Ok(None);
        }
        loop {
            let wanted = match self.partial.first_chunk::<WORD>() {
                None => WORD,
                Some(word) => match stream::frame_len(*word)? {
                    None => {
                        self.ended = true;
                        self.partial = Vec::new();
                        return Ok(None);
                    }
                    Some(len) => WORD + len,
                },
            };
            if self.partial.len() >= wanted && wanted > WORD {
                let frame = std::mem::take(&mut self.partial).split_off(WORD);
                self.offset = self.offset.saturating_add(frame.len() as u64);
                return Ok(Some(frame));
            }
            self.fill(wanted).await?;
        }
    }

    /// Offset of the byte that `next` answers next.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Tells the agent that everything below `offset` is safe. Never waits for the agent: what cannot be sent now is sent while
    /// [`OutputStream::next`] waits, or by a later acknowledgement.
    #[expect(
        clippy::unused_async,
        reason = "callers hold it as the protocol's verb, which may come to wait"
    )]
    pub async fn acknowledge(&mut self, offset: u64) -> Result<(), GuestError> {
        self.acks.newest = Some(offset);
        self.send_acks()
    }

    /// Reads towards `wanted` bytes of the partial frame, sending acknowledgements meanwhile. Cancel-safe: what was read is kept.
    async fn fill(&mut self, wanted: usize) -> Result<(), GuestError> {
        let broken = GuestError::StreamBroken(self.offset);
        let missing = wanted.saturating_sub(self.partial.len());
        self.partial.reserve(missing);
        let interest = if self.acks.is_empty() {
            Interest::READABLE
        } else {
            Interest::READABLE | Interest::WRITABLE
        };
        let Ok(ready) = self.stream.ready(interest).await else {
            return Err(broken);
        };
        if ready.is_writable() {
            self.send_acks()?;
        }
        if !ready.is_readable() && !ready.is_read_closed() {
            return Ok(());
        }
        // The limit leaves the next frame's bytes in the socket.
        match self.stream.try_read_buf(&mut (&mut self.partial).limit(missing)) {
            Ok(0) => Err(broken),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(broken),
        }
    }

    fn send_acks(&mut self) -> Result<(), GuestError> {
        while let Some(bytes) = self.acks.bytes() {
            match self.stream.try_write(bytes) {
                Ok(sent) => self.acks.sent(sent),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                // The reading side may still hold bytes and the end of the stream.
                Err(_) => {
                    self.acks = Acks::default();
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

impl Acks {
    fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.newest.is_none()
    }

    /// What to send next.
    fn bytes(&mut self) -> Option<&[u8]> {
        if self.begun.is_empty() {
            self.begun = self.newest.take()?.to_le_bytes().to_vec();
        }
        Some(&self.begun)
    }

    fn sent(&mut self, count: usize) {
        self.begun.drain(..count.min(self.begun.len()));
    }
}
