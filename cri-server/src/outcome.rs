//! One log line for the outcome of each call, with its latency, inside a span that carries the ids.
//!
//! Reads that kubelet repeats every second are told at debug level, changes at info, failures of the node at error.

use std::{future::Future, time::Instant};

use tonic::{Code, Response, Status};
use tracing::{Instrument, Level, Span, field::Empty};

use crate::status::RpcError;

/// Whether a call changes anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Answers what is.
    Read,
    /// Changes pods, containers or images.
    Change,
}

/// Runs a handler in its span and reports how it went, also when the client has gone away meanwhile.
pub async fn observe<T>(
    method: &'static str,
    effect: Effect,
    handler: impl Future<Output = Result<T, RpcError>>,
) -> Result<Response<T>, Status> {
    let span = tracing::info_span!(
        "rpc",
        method,
        sandbox.id = Empty,
        container.id = Empty,
        pod.namespace = Empty,
        pod.name = Empty,
        container.name = Empty,
        image = Empty,
    );
    async move {
        let mut report = Report {
            effect,
            started: Instant::now(),
            told: false,
        };
        let result = handler.await;
        report.tell(result.as_ref().err());
        result.map(Response::new).map_err(|error| Status::from(&error))
    }
    .instrument(span)
    .await
}

/// Work that goes to its end in the span of its call, though the client that asked for it goes away: half of it is none.
///
/// # Errors
///
/// [`RpcError::TaskLost`] with `what` when the work panics.
pub async fn unbroken<T: Send + 'static>(
    what: &'static str,
    work: impl Future<Output = T> + Send + 'static,
) -> Result<T, RpcError> {
    tokio::spawn(work.in_current_span())
        .await
        .map_err(|_| RpcError::TaskLost(what))
}

/// Adds an id or a name to the span of the call that runs.
pub fn note(field: &'static str, value: &str) {
    Span::current().record(field, value);
}

struct Report {
    effect: Effect,
    started: Instant,
    told: bool,
}

impl Report {
    /// Since the call began, to a tenth.
    fn milliseconds(&self) -> f64 {
        (self.started.elapsed().as_secs_f64() * 1e4).round() / 10.0
    }

    fn tell(&mut self, error: Option<&RpcError>) {
        self.told = true;
        let ms = self.milliseconds();
        match (error, self.effect) {
            (None, Effect::Read) => tracing::debug!(ms, code = "OK", "done"),
            (None, Effect::Change) => tracing::info!(ms, code = "OK", "done"),
            (Some(error), effect) => {
                let level = if error.is_expected() {
                    Level::INFO
                } else {
                    level(error.code(), effect)
                };
                let (code, error) = (error.code(), error.chain());
                match level {
                    Level::ERROR => tracing::error!(ms, ?code, error, "failed"),
                    Level::INFO => tracing::info!(ms, ?code, error, "refused"),
                    _ => tracing::debug!(ms, ?code, error, "refused"),
                }
            }
        }
    }
}

/// The node's fault is an error; the caller's is not.
fn level(code: Code, effect: Effect) -> Level {
    match (code, effect) {
        (Code::Internal | Code::DeadlineExceeded | Code::ResourceExhausted | Code::Unavailable, _) => {
            Level::ERROR
        }
        (_, Effect::Change) => Level::INFO,
        (_, Effect::Read) => Level::DEBUG,
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !self.told {
            let ms = self.milliseconds();
            tracing::info!(ms, "the client went away before the answer");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_of_the_node_are_errors() {
        assert_eq!(level(Code::Internal, Effect::Read), Level::ERROR);
        assert_eq!(level(Code::NotFound, Effect::Read), Level::DEBUG);
        assert_eq!(level(Code::InvalidArgument, Effect::Change), Level::INFO);
    }
}
