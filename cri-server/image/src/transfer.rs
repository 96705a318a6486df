//! Layers on their way from a registry to the converter, never whole in memory or on disk.
//!
//! Downloads, resumes what broke and counts; the conversion takes the bytes from a short channel, so a slow disk slows the download down.

use bytes::Bytes;
use tokio::sync::mpsc;

use crate::{
    ErrorKind, RegistryError,
    manifest::Blob,
    registry::{ATTEMPTS, BlobStream, Endpoint, Sources, pause, summarize},
};

/// Chunks between download and conversion; each is as large as one read from the connection.
pub(crate) const CHANNEL_CHUNKS: usize = 32;
/// How often one blob's transfer may break in all, even when each connection brings some bytes.
const MAX_BREAKS: u32 = 64;

/// What the converter receives.
#[derive(Debug)]
pub(crate) enum Feed {
    /// More of the layer.
    Chunk(Bytes),
    /// The layer is complete.
    End,
}

/// How a download ended when it did not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The registry's fault.
    Registry(RegistryError),
    /// The converter takes no more; its own error says why.
    ConverterGone,
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self::Registry(error)
    }
}

/// Downloads a layer into `sink`.
pub(crate) async fn download(
    sources: &Sources,
    layer: &Blob,
    sink: mpsc::Sender<Feed>,
) -> Result<(), Failure> {
    let download = Download {
        sources,
        layer,
        received: 0,
        breaks: 0,
    };
    download.run(&sink).await?;
    sink.send(Feed::End).await.map_err(|_| Failure::ConverterGone)
}

struct Download<'a> {
    sources: &'a Sources,
    layer: &'a Blob,
    received: u64,
    breaks: u32,
}

impl Download<'_> {
    /// Every place in turn; what one has delivered is not asked of the next.
    async fn run(mut self, sink: &mpsc::Sender<Feed>) -> Result<(), Failure> {
        let sources = self.sources;
        let mut failures = Vec::new();
        for endpoint in sources.endpoints() {
            match self.from(endpoint, None, sink).await {
                Err(Failure::Registry(error)) => failures.push(error),
                done => return done,
            }
        }
        if let Some(endpoint) = sources.endpoints().next() {
            let layer = self.layer;
            for address in &layer.urls {
                match self.from(endpoint, Some(address), sink).await {
                    Err(Failure::Registry(error)) => failures.push(error),
                    done => return done,
                }
            }
        }
        Err(Failure::Registry(summarize(failures)))
    }

    /// One place until the layer is complete or the place has nothing more to give.
    async fn from(
        &mut self,
        endpoint: &Endpoint,
        foreign: Option<&str>,
        sink: &mpsc::Sender<Feed>,
    ) -> Result<(), Failure> {
        let mut fruitless = 0;
        loop {
            let before = self.received;
            let opened = match foreign {
                None => {
                    endpoint
                        .blob(self.sources.repository(), &self.layer.digest, self.received)
                        .await
                }
                Some(address) => endpoint.foreign(address, self.received).await,
            };
            let ended = match opened {
                Ok(stream) => self.drain(stream, sink).await,
                Err(error) => Err(error.into()),
            };
            let error = match ended {
                Err(Failure::Registry(error)) => error,
                done => return done,
            };
            fruitless = if self.received > before { 1 } else { fruitless + 1 };
            self.breaks += 1;
            if !error.transient || fruitless >= ATTEMPTS || self.breaks >= MAX_BREAKS {
                return Err(error.into());
            }
            tracing::debug!(error = %crate::error::describe(&error), received = self.received, "registry.resume");
            pause(fruitless).await;
        }
    }

    async fn drain(&mut self, mut stream: BlobStream, sink: &mpsc::Sender<Feed>) -> Result<(), Failure> {
        let size = self.layer.size;
        if let Some(announced) = stream.announced() {
            let total = stream.start.saturating_add(announced);
            if total != size {
                let reason = format!("the layer has {total} bytes, its manifest says {size}");
                return Err(RegistryError::new(ErrorKind::Refused, stream.tried(), reason).into());
            }
        }
        let mut skip = self.received - stream.start;
        while let Some(mut chunk) = stream.next().await? {
            let skipped = skip.min(chunk.len() as u64);
            skip -= skipped;
            // At most a chunk's length, so it fits.
            drop(chunk.split_to(skipped as usize));
            if chunk.is_empty() {
                continue;
            }
            if self.received + chunk.len() as u64 > size {
                let reason = format!("the layer has more than the {size} bytes its manifest says");
                return Err(RegistryError::new(ErrorKind::Refused, stream.tried(), reason).into());
            }
            self.received += chunk.len() as u64;
            sink.send(Feed::Chunk(chunk))
                .await
                .map_err(|_| Failure::ConverterGone)?;
        }
        if self.received < size {
            let reason = format!("the answer ended after {} of {size} bytes", self.received);
            return Err(RegistryError::new(ErrorKind::Unavailable, stream.tried(), reason)
                .transient()
                .into());
        }
        Ok(())
    }
}
