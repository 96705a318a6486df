//! An output stream that outlives its connections: reopened at the offset where it broke, as long as the VM lives.

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
    offset: u64,
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
                    self.offset = stream.offset();
                    self.outage = Outage::none();
                    return Ok(Some(Piece { start, bytes }));
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

    pub(crate) async fn acknowledge(&mut self, offset: u64) {
        if let Some(stream) = self.stream.as_mut()
            && let Err(error) = stream.acknowledge(offset).await
        {
            tracing::debug!(container.id = self.container, %error, "acknowledgement not sent");
        }
    }

    /// One attempt to open the stream at the offset; an error is final.
    async fn open(&mut self) -> Result<(), GuestError> {
        if self.outage.pausing {
            self.outage.backoff.pause().await;
            self.outage.pausing = false;
        }
        let opened = self
            .client
            .output(&self.container, &self.exec, self.kind, self.offset)
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
                tracing::error!(
                    container.id = self.container,
                    stream = ?self.kind,
                    wanted,
                    lowest,
                    lost_bytes = lowest - wanted,
                    "output is lost: the agent no longer has it"
                );
                self.offset = lowest;
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
