//! An output stream that outlives its connections, as long as the VM lives.
//!
//! Opening a stream at an offset acknowledges everything below it. So it is opened again where the acknowledgements stand, not where
//! reading stands, and what had been read before is left out: bytes that are on their way to a file are still the agent's to keep.

use std::time::Duration;

use caisson_agent_api::stream::Kind;
use tokio::time::Instant;

use crate::{
    GuestClient, GuestError, OutputStream, Reached,
    transport::{Backoff, GONE_AFTER},
};

/// Bytes of a stream, and where they stand in it.
#[derive(Debug)]
pub(crate) struct Piece {
    pub(crate) start: u64,
    pub(crate) bytes: Vec<u8>,
}

/// Follows one output to its end.
#[derive(Debug)]
pub(crate) struct Follower {
    client: GuestClient,
    container: String,
    exec: String,
    kind: Kind,
    /// The byte that comes next.
    offset: u64,
    /// Everything below is safe, and need not be kept by the agent.
    safe: u64,
    stream: Option<OutputStream>,
    outage: Outage,
}

/// Since when, and how, the stream could not be had.
#[derive(Debug)]
struct Outage {
    refused_since: Option<Instant>,
    backoff: Backoff,
    pausing: bool,
}

impl Outage {
    fn none() -> Self {
        Self {
            refused_since: None,
            backoff: Backoff::new(Duration::from_millis(5), Duration::from_secs(1)),
            pausing: false,
        }
    }
}

impl Follower {
    pub(crate) fn new(client: GuestClient, container: &str, exec: &str, kind: Kind, offset: u64) -> Self {
        Self {
            client,
            container: container.to_owned(),
            exec: exec.to_owned(),
            kind,
            offset,
            safe: offset,
            stream: None,
            outage: Outage::none(),
        }
    }

    /// The next bytes; `None` at the stream's end. An error means that nothing more will come. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Piece>, GuestError> {
        loop {
            let Some(stream) = self.stream.as_mut() else {
                self.open().await?;
                continue;
            };
            let start = stream.offset();
            match stream.next().await {
                Ok(Some(bytes)) => {
                    let end = stream.offset();
                    self.outage = Outage::none();
                    if let Some(piece) = behind(self.offset, start, bytes) {
                        self.offset = end;
                        return Ok(Some(piece));
                    }
                }
                Ok(None) => return Ok(None),
                Err(GuestError::StreamBroken(offset)) => {
                    tracing::debug!(container.id = self.container, offset, "output connection broke");
                    self.stream = None;
                    self.outage.pausing = true;
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// Offset of the byte that comes next.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Everything below `offset` is safe.
    pub(crate) async fn acknowledge(&mut self, offset: u64) {
        self.safe = self.safe.max(offset);
        if let Some(stream) = self.stream.as_mut()
            && let Err(error) = stream.acknowledge(offset).await
        {
            tracing::debug!(container.id = self.container, %error, "acknowledgement not sent");
        }
    }

    /// One attempt to open the stream; an error is final.
    async fn open(&mut self) -> Result<(), GuestError> {
        if self.outage.pausing {
            self.outage.backoff.pause().await;
            self.outage.pausing = false;
        }
        let opened = self
            .client
            .output(&self.container, &self.exec, self.kind, self.safe)
            .await;
        let error = match opened {
            Ok(stream) => {
                self.stream = Some(stream);
                return Ok(());
            }
            Err(error) => error,
        };
        self.outage.pausing = true;
        match error {
            GuestError::OffsetUnavailable { wanted, lowest } if lowest > wanted => {
                if lowest > self.offset {
                    tracing::error!(
                        container.id = self.container,
                        stream = ?self.kind,
                        wanted = self.offset,
                        lowest,
                        lost_bytes = lowest - self.offset,
                        "output is lost: the agent no longer has it"
                    );
                    self.offset = lowest;
                }
                self.safe = lowest;
                Ok(())
            }
            // Broken, or silent: the VM may be starved or stopped, and is not given up.
            GuestError::StreamBroken(_)
            | GuestError::Deadline { .. }
            | GuestError::Unreachable {
                reached: Reached::PortSilent(_),
                ..
            } => {
                self.outage.refused_since = None;
                Ok(())
            }
            error @ GuestError::Unreachable { .. } => {
                let since = *self.outage.refused_since.get_or_insert_with(Instant::now);
                if since.elapsed() >= GONE_AFTER {
                    return Err(error);
                }
                Ok(())
            }
            error => Err(error),
        }
    }
}

/// What of a piece lies at `wanted` and behind it.
fn behind(wanted: u64, start: u64, mut bytes: Vec<u8>) -> Option<Piece> {
    let known = usize::try_from(wanted.saturating_sub(start)).unwrap_or(usize::MAX);
    if known >= bytes.len() {
        return None;
    }
    bytes.drain(..known);
    Some(Piece {
        start: start.max(wanted),
        bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_before_is_left_out() {
        let piece = |wanted, start| behind(wanted, start, b"abc".to_vec()).map(|p| (p.start, p.bytes));
        assert_eq!(piece(10, 10), Some((10, b"abc".to_vec())));
        assert_eq!(piece(12, 10), Some((12, b"c".to_vec())));
        assert_eq!(piece(13, 10), None);
        assert_eq!(piece(u64::MAX, 10), None);
        assert_eq!(piece(5, 10), Some((10, b"abc".to_vec())));
    }
}
