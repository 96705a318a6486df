//! Exec and attach, whatever the transport: copies a process's streams until it has ended, and tells how.
//!
//! Must not know transports or VMs.

use bytes::Bytes;
use tokio::task::coop;

use crate::{
    channel::{Inbound, Outbound},
    port::{Process, Sink, Source, StreamError, Terminal},
    resize::Sizes,
    status::{self, Style},
};

/// A client's side of a process.
pub(crate) struct Channels {
    pub(crate) stdin: Option<Inbound>,
    pub(crate) stdout: Option<Outbound>,
    pub(crate) stderr: Option<Outbound>,
    pub(crate) error: Outbound,
    pub(crate) resize: Option<Inbound>,
    pub(crate) style: Style,
}

/// Serves the client until the process has ended and everything it wrote has been handed to the connection, with the word on how it
/// ended behind it. Dropping this is what a client that goes away does.
pub(crate) async fn serve(process: Result<Process, StreamError>, channels: Channels) {
    let Channels {
        stdin,
        stdout,
        stderr,
        error,
        resize,
        style,
    } = channels;
    let end = match process {
        Ok(process) => {
            let input = feed(stdin, process.stdin);
            let sizes = follow_sizes(resize, process.terminal);
            let outputs = async {
                tokio::join!(drain(process.stdout, stdout), drain(process.stderr, stderr));
                process.exit.await
            };
            tokio::select! {
                end = outputs => end,
                never = input => never,
                never = sizes => never,
            }
        }
        Err(error) => {
            for output in [stdout, stderr].into_iter().flatten() {
                output.finish().await;
            }
            Err(error)
        }
    };
    if let Err(error) = &end {
        tracing::info!(%error, "streaming session failed");
    }
    if let Some(text) = status::encode(style, &end)
        && error.send(Bytes::from(text)).await.is_err()
    {
        tracing::debug!("client did not wait for the end");
    }
    error.finish().await;
}

/// Copies input as long as somebody reads it; what comes after is dropped with the channel. Never ends a session.
async fn feed<T>(from: Option<Inbound>, to: Option<Box<dyn Sink>>) -> T {
    if let (Some(mut from), Some(mut to)) = (from, to) {
        let ended = loop {
            match from.next().await {
                Some(bytes) => {
                    if to.write(bytes).await.is_err() {
                        break false;
                    }
                }
                None => break true,
            }
        };
        if ended && let Err(error) = to.close().await {
            tracing::debug!(%error, "end of input not told");
        }
        // The sink stays until the session ends: letting it go may mean more than its end.
        return hold((from, to)).await;
    }
    std::future::pending().await
}

async fn hold<T, K>(kept: K) -> T {
    let never = std::future::pending().await;
    drop(kept);
    never
}

async fn follow_sizes<T>(from: Option<Inbound>, to: Option<Box<dyn Terminal>>) -> T {
    if let (Some(mut from), Some(mut to)) = (from, to) {
        let mut sizes = Sizes::default();
        while let Some(bytes) = from.next().await {
            match sizes.take(&bytes) {
                Ok(None) => {}
                Ok(Some(size)) => {
                    if let Err(error) = to.resize(size.columns, size.rows).await {
                        tracing::debug!(%error, "terminal not resized");
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "no more sizes are taken");
                    break;
                }
            }
        }
    }
    std::future::pending().await
}

/// Copies output to its end. Output that the client does not want is read all the same, so that the process does not stand still.
async fn drain(from: Option<Box<dyn Source>>, to: Option<Outbound>) {
    let Some(mut from) = from else {
        if let Some(to) = to {
            to.finish().await;
        }
        return;
    };
    let mut wanted = to.is_some();
    loop {
        match from.next().await {
            Ok(Some(bytes)) => {
                if let Some(to) = to.as_ref().filter(|_| wanted) {
                    wanted = to.send(bytes).await.is_ok();
                }
                coop::consume_budget().await;
            }
            Ok(None) => break,
            Err(error) => {
                // How the process ends says the rest.
                tracing::debug!(%error, "output ended early");
                break;
            }
        }
    }
    if let Some(to) = to {
        to.finish().await;
    }
}
