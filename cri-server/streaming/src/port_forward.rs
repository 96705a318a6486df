//! Port-forward over SPDY (protocol portforward.k8s.io): for each connection the client opens a pair of streams, one for errors and one
//! for data, which name the port and a request id.
//!
//! Must not know how a pod is reached.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::task::JoinSet;

use crate::{
    channel::{Inbound, Outbound},
    port::{Connection, Sink, Source, Streams},
    spdy::{
        headers::{Headers, value},
        session::{Session, Stream},
    },
};

/// How long the first stream of a pair waits for the second.
const PAIR_PATIENCE: Duration = Duration::from_secs(30);

/// How often pairs that are not complete are looked at.
const SWEEP: Duration = Duration::from_secs(10);

/// Pairs that may be incomplete.
const MAX_HALVES: usize = 256;

/// What the headers of a stream say.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Label {
    request: String,
    port: u16,
    is_error: bool,
}

struct Half {
    label: Label,
    stream: Stream,
    since: Instant,
}

/// Serves all connections of a client until it is gone.
pub(crate) async fn serve(mut session: Session, sandbox: String, streams: Arc<dyn Streams>) {
    let sandbox: Arc<str> = sandbox.into();
    let mut halves: HashMap<String, Half> = HashMap::new();
    let mut connections = JoinSet::new();
    let mut sweep = tokio::time::interval(SWEEP);
    let gone = session.gone();
    tokio::pin!(gone);
    loop {
        let stream = tokio::select! {
            stream = session.accept() => match stream {
                Some(stream) => stream,
                None => break,
            },
            () = &mut gone => break,
            Some(_) = connections.join_next() => continue,
            _ = sweep.tick() => {
                for (_, half) in halves.extract_if(|_, half| half.since.elapsed() >= PAIR_PATIENCE) {
                    tracing::debug!(request = half.label.request, "the other stream of a pair did not come");
                    connections.spawn(half.stream.outbound.reset());
                }
                continue;
            }
        };
        let Some(label) = label(&stream) else {
            connections.spawn(stream.outbound.reset());
            continue;
        };
        match halves.remove(&label.request) {
            None if halves.len() < MAX_HALVES => {
                let since = Instant::now();
                halves.insert(label.request.clone(), Half { label, stream, since });
            }
            Some(other) if other.label.port == label.port && other.label.is_error != label.is_error => {
                let (error, data) = if label.is_error {
                    (stream, other.stream)
                } else {
                    (other.stream, stream)
                };
                let (sandbox, streams) = (Arc::clone(&sandbox), Arc::clone(&streams));
                connections.spawn(async move {
                    forward(&*streams, &sandbox, label.port, error.outbound, data).await;
                });
            }
            other => {
                connections.spawn(stream.outbound.reset());
                if let Some(other) = other {
                    connections.spawn(other.stream.outbound.reset());
                }
            }
        }
    }
    connections.shutdown().await;
    session.close().await;
}

/// Clients from before request ids open the error stream first and the data stream right after it.
fn label(stream: &Stream) -> Option<Label> {
    label_of(stream.id, &stream.headers)
}

fn label_of(id: u32, headers: &Headers) -> Option<Label> {
    let is_error = match value(headers, "streamtype")? {
        "error" => true,
        "data" => false,
        _ => return None,
    };
    let port = value(headers, "port")?.parse().ok().filter(|port| *port != 0)?;
    let request = match value(headers, "requestid") {
        Some(request) if !request.is_empty() => request.to_owned(),
        _ if is_error => format!("stream {id}"),
        _ => format!("stream {}", id.checked_sub(2)?),
    };
    Some(Label {
        request,
        port,
        is_error,
    })
}

/// One connection, from dialling to the end of both directions.
async fn forward(streams: &dyn Streams, sandbox: &str, port: u16, error: Outbound, data: Stream) {
    let (inbound, outbound) = (data.inbound, data.outbound);
    match streams.dial(sandbox, port).await {
        Ok(Connection { source, sink }) => {
            let aborted = Arc::new(tokio::sync::Notify::new());
            let from_pod = async {
                let refused = copy_out(source, outbound).await;
                // The client waits for this before it lets go of its own connection.
                error.finish().await;
                refused
            };
            let both = async {
                let (refused, ()) = tokio::join!(
                    async {
                        let refused = from_pod.await;
                        if refused {
                            aborted.notify_one();
                        }
                        refused
                    },
                    async {
                        tokio::select! {
                            () = copy_in(inbound, sink) => {}
                            () = aborted.notified() => {}
                        }
                    }
                );
                refused
            };
            if both.await {
                tracing::debug!(port, "client broke a forwarded connection off");
            }
        }
        Err(reason) => {
            tracing::info!(sandbox.id = sandbox, port, error = %reason, "port could not be forwarded");
            let text = format!("error forwarding port {port} to pod {sandbox}: {reason}");
            if error.send(Bytes::from(text)).await.is_err() {
                tracing::debug!("client did not wait for the reason");
            }
            error.finish().await;
            outbound.finish().await;
        }
    }
}

/// From the pod to its end; true when the client refused the rest.
async fn copy_out(mut source: Box<dyn Source>, outbound: Outbound) -> bool {
    loop {
        let piece = tokio::select! {
            piece = source.next() => piece,
            () = outbound.refused() => return true,
        };
        match piece {
            Ok(Some(bytes)) => {
                if outbound.send(bytes).await.is_err() {
                    return true;
                }
            }
            Ok(None) => {
                outbound.finish().await;
                return false;
            }
            Err(error) => {
                tracing::debug!(%error, "forwarded connection broke");
                outbound.reset().await;
                return false;
            }
        }
    }
}

/// To the pod: the client's end becomes the connection's.
async fn copy_in(mut inbound: Inbound, mut sink: Box<dyn Sink>) {
    while let Some(bytes) = inbound.next().await {
        if sink.write(bytes).await.is_err() {
            return;
        }
    }
    if let Err(error) = sink.close().await {
        tracing::debug!(%error, "end of a forwarded connection not told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_pair_has_one_request_with_or_without_an_id() {
        let error = headers(&[("streamtype", "error"), ("port", "80"), ("requestid", "7")]);
        let data = headers(&[("streamtype", "data"), ("port", "80"), ("requestid", "7")]);
        assert_eq!(
            label_of(1, &error).unwrap().request,
            label_of(9, &data).unwrap().request
        );
        let error = headers(&[("streamtype", "error"), ("port", "80")]);
        let data = headers(&[("streamtype", "data"), ("port", "80")]);
        assert_eq!(
            label_of(5, &error).unwrap().request,
            label_of(7, &data).unwrap().request
        );
    }

    #[test]
    fn streams_that_name_no_port_or_no_known_type_are_none_of_ours() {
        for pairs in [
            &[("streamtype", "data")][..],
            &[("streamtype", "data"), ("port", "0")],
            &[("streamtype", "data"), ("port", "65536")],
            &[("streamtype", "other"), ("port", "80")],
            &[("port", "80")],
        ] {
            assert_eq!(label_of(1, &headers(pairs)), None, "{pairs:?}");
        }
    }
}
