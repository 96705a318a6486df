//! The two directions of one multiplexed stream, the same for every transport.
//!
//! Towards us: pieces with a byte budget; the transport waits when it is used up, which ends in the client's TCP window. Towards the
//! client: one short queue for the whole connection. Nothing is dropped on either way unless its reader is gone.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

/// Bytes of one stream that may wait for their reader.
pub(crate) const BUDGET: usize = 256 << 10;

/// What a piece costs at least, so that many small ones do not cost more memory than one large one.
const LEAST_COST: usize = 64;

/// Pieces that may wait for the connection. Each holds up to 64 KiB.
pub(crate) const QUEUE: usize = 8;

/// Nobody is there any more to take or to send bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gone;

struct Piece {
    bytes: Bytes,
    /// Gives the room back when the piece has been taken.
    _room: OwnedSemaphorePermit,
}

/// The transport's end of the direction towards us. Dropping it is the end of the stream.
pub(crate) struct Feed {
    pieces: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
}

/// Our end.
pub(crate) struct Inbound {
    pieces: mpsc::UnboundedReceiver<Piece>,
    room: Arc<Semaphore>,
}

/// A direction towards us.
pub(crate) fn inbound() -> (Feed, Inbound) {
    let room = Arc::new(Semaphore::new(BUDGET));
    let (sender, pieces) = mpsc::unbounded_channel();
    let feed = Feed {
        pieces: sender,
        room: Arc::clone(&room),
    };
    (feed, Inbound { pieces, room })
}

impl Feed {
    /// Waits until there is room.
    pub(crate) async fn push(&self, bytes: Bytes) -> Result<(), Gone> {
        let cost = u32::try_from(bytes.len().clamp(LEAST_COST, BUDGET)).map_err(|_| Gone)?;
        let room = Arc::clone(&self.room)
            .acquire_many_owned(cost)
            .await
            .map_err(|_| Gone)?;
        self.pieces.send(Piece { bytes, _room: room }).map_err(|_| Gone)
    }

    /// Another handle to the same stream.
    pub(crate) fn share(&self) -> Self {
        Self {
            pieces: self.pieces.clone(),
            room: Arc::clone(&self.room),
        }
    }
}

impl Inbound {
    /// The next bytes; `None` at the end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.pieces.recv().await.map(|piece| piece.bytes)
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        // Whoever waits for room learns that nobody will make any.
        self.room.close();
    }
}

/// What travels to the connection's writer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Out {
    /// Bytes of a stream.
    Data(u32, Bytes),
    /// The stream's end.
    End(u32),
    /// The stream is broken off.
    Reset(u32),
    /// Nothing more of any stream.
    Close,
}

/// Our end of the direction towards the client.
pub(crate) struct Outbound {
    id: u32,
    queue: mpsc::Sender<Out>,
    /// True when the client wants no more of this stream.
    refused: watch::Receiver<bool>,
}

impl Outbound {
    pub(crate) fn new(id: u32, queue: mpsc::Sender<Out>, refused: watch::Receiver<bool>) -> Self {
        Self { id, queue, refused }
    }

    /// Waits until the connection takes the bytes.
    pub(crate) async fn send(&self, bytes: Bytes) -> Result<(), Gone> {
        if *self.refused.borrow() {
            return Err(Gone);
        }
        self.queue.send(Out::Data(self.id, bytes)).await.map_err(|_| Gone)
    }

    /// Waits until the client wants no more of this stream.
    pub(crate) async fn refused(&self) {
        let mut refused = self.refused.clone();
        if refused.wait_for(|refused| *refused).await.is_err() {
            // The connection has ended; its owner is told in another way.
            std::future::pending::<()>().await;
        }
    }

    /// Ends the stream in order. A connection that is gone needs no end.
    pub(crate) async fn finish(self) {
        drop(self.queue.send(Out::End(self.id)).await);
    }

    /// Breaks the stream off.
    pub(crate) async fn reset(self) {
        drop(self.queue.send(Out::Reset(self.id)).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_stream_makes_its_feeder_wait_and_loses_nothing() {
        let (feed, mut stream) = inbound();
        let piece = Bytes::from(vec![7; 64 << 10]);
        for _ in 0..BUDGET / piece.len() {
            feed.push(piece.clone()).await.unwrap();
        }
        let waiting = tokio::spawn(async move { feed.push(Bytes::from_static(b"last")).await });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert_eq!(stream.next().await.unwrap(), piece);
        waiting.await.unwrap().unwrap();
        let mut left = 0;
        while let Some(piece) = stream.next().await {
            left += piece.len();
        }
        assert_eq!(left, BUDGET - piece.len() + 4);
    }

    #[tokio::test]
    async fn a_feeder_whose_reader_is_gone_does_not_wait() {
        let (feed, stream) = inbound();
        feed.push(Bytes::from(vec![0; BUDGET])).await.unwrap();
        let waiting = tokio::spawn(async move { feed.push(Bytes::from_static(b"x")).await });
        tokio::task::yield_now().await;
        drop(stream);
        assert_eq!(waiting.await.unwrap(), Err(Gone));
    }
}
