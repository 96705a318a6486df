//! Clients that are attached to a container: each gets what the container prints from now on, on its way to the log.
//!
//! A client that does not take its bytes holds the container back, as a terminal would; the log has them by then.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::mpsc;

use super::format::Tag;

/// Pieces that may wait for a client. Each holds up to 64 KiB.
const QUEUE: usize = 2;

/// One output of a container, from the moment of attaching on.
#[derive(Debug)]
pub struct Tap {
    pieces: mpsc::Receiver<Bytes>,
}

impl Tap {
    /// The next bytes; `None` when the container has closed this output. Cancel-safe.
    pub async fn next(&mut self) -> Option<Bytes> {
        self.pieces.recv().await
    }
}

/// `None`: the output has ended.
type Clients = Option<Vec<mpsc::Sender<Bytes>>>;

/// All clients of one container.
#[derive(Debug, Clone)]
pub(super) struct Taps {
    outputs: Arc<Mutex<[Clients; 2]>>,
}

impl Taps {
    /// Of a container with these outputs.
    pub(super) fn new(tags: &[Tag]) -> Self {
        let clients = |tag| tags.contains(&tag).then(Vec::new);
        Self {
            outputs: Arc::new(Mutex::new([clients(Tag::Stdout), clients(Tag::Stderr)])),
        }
    }

    fn with<T>(&self, tag: Tag, work: impl FnOnce(&mut Clients) -> T) -> T {
        let mut outputs = self.outputs.lock().unwrap_or_else(PoisonError::into_inner);
        let [stdout, stderr] = &mut *outputs;
        work(match tag {
            Tag::Stdout => stdout,
            Tag::Stderr => stderr,
        })
    }

    /// One more client. An output that has ended, or never was, ends at once.
    pub(super) fn attach(&self, tag: Tag) -> Tap {
        let (sender, pieces) = mpsc::channel(QUEUE);
        self.with(tag, |clients| {
            if let Some(clients) = clients {
                clients.push(sender);
            }
        });
        Tap { pieces }
    }

    /// Whether anybody listens; clients that are gone are forgotten.
    pub(super) fn wanted(&self, tag: Tag) -> bool {
        self.with(tag, |clients| {
            clients.as_mut().is_some_and(|clients| {
                clients.retain(|client| !client.is_closed());
                !clients.is_empty()
            })
        })
    }

    /// Hands bytes to every client, waiting for those that are behind.
    pub(super) async fn send(&self, tag: Tag, bytes: Bytes) {
        let clients = self.with(tag, |clients| clients.clone().unwrap_or_default());
        for client in clients {
            if client.send(bytes.clone()).await.is_err() {
                // Gone meanwhile: forgotten the next time.
            }
        }
    }

    /// The output has ended; bytes that wait still arrive.
    pub(super) fn end(&self, tag: Tag) {
        self.with(tag, |clients| *clients = None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_client_gets_what_comes_after_it_attached_and_the_end() {
        let taps = Taps::new(&[Tag::Stdout]);
        taps.send(Tag::Stdout, Bytes::from_static(b"before ")).await;
        let mut first = taps.attach(Tag::Stdout);
        taps.send(Tag::Stdout, Bytes::from_static(b"one ")).await;
        let mut second = taps.attach(Tag::Stdout);
        taps.send(Tag::Stdout, Bytes::from_static(b"two")).await;
        taps.end(Tag::Stdout);
        assert_eq!(first.next().await.unwrap(), "one ");
        assert_eq!(first.next().await.unwrap(), "two");
        assert_eq!(first.next().await, None);
        assert_eq!(second.next().await.unwrap(), "two");
        assert_eq!(second.next().await, None);
        assert_eq!(taps.attach(Tag::Stdout).next().await, None);
        assert_eq!(taps.attach(Tag::Stderr).next().await, None);
    }

    #[tokio::test]
    async fn a_client_that_is_gone_holds_nobody_back() {
        let taps = Taps::new(&[Tag::Stdout]);
        let stuck = taps.attach(Tag::Stdout);
        for _ in 0..QUEUE {
            taps.send(Tag::Stdout, Bytes::from_static(b"x")).await;
        }
        let sending = tokio::spawn({
            let taps = taps.clone();
            async move { taps.send(Tag::Stdout, Bytes::from_static(b"y")).await }
        });
        tokio::task::yield_now().await;
        assert!(!sending.is_finished());
        drop(stuck);
        sending.await.unwrap();
    }
}
