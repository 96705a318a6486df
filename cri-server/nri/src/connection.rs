//! Calls in both directions on one plugin's connection.
//!
//! One task reads and one writes. The reader never waits for anybody: answers go to who waits for them, requests into a queue with a
//! bound, and what does not fit is refused. A protocol error ends the connection.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use prost::Message as _;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};

use crate::{
    envelope,
    error::CallError,
    frame::{self, Demux, Kind, Lane, Message},
    wire::{PLUGIN_SERVICE, code},
};

/// Requests of a plugin that wait to be served; more are refused.
const MAX_WAITING_REQUESTS: usize = 16;

/// Messages on their way to a plugin.
const MAX_WAITING_MESSAGES: usize = 64;

/// Read at a time.
const READ_BYTES: usize = 64 << 10;

/// A plugin's request.
#[derive(Debug)]
pub(crate) struct Incoming {
    stream: u32,
    pub(crate) request: envelope::Request,
}

/// Our end of a plugin's connection. Dropped, it is closed.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    /// Held while a request gets its number and its place in the queue: numbers must grow on the wire.
    next_stream: tokio::sync::Mutex<u32>,
    _tasks: JoinSet<()>,
}

/// What the writer is given.
enum Outgoing {
    Bytes(Bytes),
    /// Answered when everything before it has been written.
    Mark(oneshot::Sender<()>),
}

struct Shared {
    out: mpsc::Sender<Outgoing>,
    waiting: Mutex<HashMap<u32, oneshot::Sender<envelope::Response>>>,
    closed: watch::Sender<bool>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, oneshot::Sender<envelope::Response>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.closed.send_replace(true);
        // Whoever waits hears that there will be no answer.
        self.waiting().clear();
    }

    fn refuse(&self, stream: u32, code: i32, message: &str) {
        let response = envelope::Response {
            status: Some(envelope::Status {
                code,
                message: message.to_owned(),
            }),
            payload: Vec::new(),
        };
        let answer = Message {
            stream,
            kind: Kind::Response,
            body: response.encode_to_vec().into(),
        };
        let sent = frame::encode(Lane::Runtime, &answer)
            .map(|bytes| self.out.try_send(Outgoing::Bytes(bytes)).is_ok());
        if sent != Ok(true) {
            // It asks without end and does not read the answers.
            self.close();
        }
    }
}

impl Connection {
    /// Takes a connection over. Must be called within the runtime.
    pub(crate) fn new(
        stream: impl AsyncRead + AsyncWrite + Send + 'static,
    ) -> (Self, mpsc::Receiver<Incoming>) {
        let (out, messages) = mpsc::channel(MAX_WAITING_MESSAGES);
        let (requests, incoming) = mpsc::channel(MAX_WAITING_REQUESTS);
        let shared = Arc::new(Shared {
            out,
            waiting: Mutex::default(),
            closed: watch::Sender::new(false),
        });
        let (reader, writer) = tokio::io::split(stream);
        let mut tasks = JoinSet::new();
        let ours = shared.clone();
        tasks.spawn(async move {
            let mut closed = ours.closed.subscribe();
            tokio::select! {
                () = read(reader, &ours, requests) => {}
                () = write(writer, messages) => {}
                _ = closed.wait_for(|closed| *closed) => {}
            }
            ours.close();
        });
        let connection = Self {
            shared,
            next_stream: tokio::sync::Mutex::new(1),
            _tasks: tasks,
        };
        (connection, incoming)
    }

    /// Calls the plugin and waits for its answer, at most `limit`.
    pub(crate) async fn call<R: prost::Message + Default>(
        &self,
        method: &str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<R, CallError> {
        let request = envelope::Request {
            service: PLUGIN_SERVICE.into(),
            method: method.into(),
            payload: request.encode_to_vec(),
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
        };
        let answer = tokio::time::timeout(limit, self.exchange(request))
            .await
            .unwrap_or(Err(CallError::Timeout(limit)))?;
        if let Some(status) = answer.status.filter(|status| status.code != 0) {
            return Err(CallError::Status {
                code: status.code,
                message: status.message,
            });
        }
        R::decode(answer.payload.as_slice()).map_err(CallError::Malformed)
    }

    async fn exchange(&self, request: envelope::Request) -> Result<envelope::Response, CallError> {
        let body = request.encode_to_vec().into();
        let (reply, answer) = oneshot::channel();
        let stream = {
            let mut next = self.next_stream.lock().await;
            if self.is_closed() {
                return Err(CallError::Closed);
            }
            let stream = *next;
            let message = Message {
                stream,
                kind: Kind::Request,
                body,
            };
            let bytes = frame::encode(Lane::Plugin, &message).map_err(CallError::TooLarge)?;
            let place = self.shared.out.reserve().await.map_err(|_| CallError::Closed)?;
            // Clients have the odd numbers. 2^31 calls on one connection do not happen.
            *next = stream.wrapping_add(2);
            self.shared.waiting().insert(stream, reply);
            place.send(Outgoing::Bytes(bytes));
            stream
        };
        let _forget = Forget {
            shared: &self.shared,
            stream,
        };
        // Closed between the look and the insertion: nobody would ever answer.
        if self.is_closed() {
            return Err(CallError::Closed);
        }
        answer.await.map_err(|_| CallError::Closed)
    }

    /// Answers a plugin's request.
    pub(crate) async fn answer(
        &self,
        incoming: &Incoming,
        result: Result<Vec<u8>, (i32, String)>,
    ) -> Result<(), CallError> {
        let response = match result {
            Ok(payload) => envelope::Response {
                status: Some(envelope::Status::default()),
                payload,
            },
            Err((code, message)) => envelope::Response {
                status: Some(envelope::Status { code, message }),
                payload: Vec::new(),
            },
        };
        let message = Message {
            stream: incoming.stream,
            kind: Kind::Response,
            body: response.encode_to_vec().into(),
        };
        let bytes = frame::encode(Lane::Runtime, &message).map_err(CallError::TooLarge)?;
        let sent = self.shared.out.send(Outgoing::Bytes(bytes)).await;
        sent.map_err(|_| CallError::Closed)
    }

    /// Waits until what was answered is written, or the connection has ended.
    pub(crate) async fn flush(&self) {
        let (mark, written) = oneshot::channel();
        if self.shared.out.send(Outgoing::Mark(mark)).await.is_ok() && written.await.is_err() {
            tracing::trace!("the connection ended before everything was written");
        }
    }

    /// Ends it.
    pub(crate) fn close(&self) {
        self.shared.close();
    }

    /// Whether it has ended.
    pub(crate) fn is_closed(&self) -> bool {
        *self.shared.closed.borrow()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) {
        let mut closed = self.shared.closed.subscribe();
        if closed.wait_for(|closed| *closed).await.is_err() {
            tracing::trace!("the connection is gone");
        }
    }
}

/// Nobody waits for this answer any more.
struct Forget<'a> {
    shared: &'a Shared,
    stream: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.shared.waiting().remove(&self.stream);
    }
}

async fn read(mut reader: impl AsyncRead + Unpin, shared: &Shared, requests: mpsc::Sender<Incoming>) {
    let mut demux = Demux::default();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        let length = match reader.read(&mut buffer).await {
            Ok(0) => return,
            Ok(length) => length,
            Err(error) => return tracing::debug!(%error, "an NRI plugin's connection broke"),
        };
        demux.push(buffer.get(..length).unwrap_or_default());
        loop {
            match demux.next() {
                Ok(None) => break,
                Ok(Some((lane, message))) => {
                    if let Err(reason) = take(lane, message, shared, &requests) {
                        return tracing::warn!(reason, "an NRI plugin breaks the protocol");
                    }
                }
                Err(error) => return tracing::warn!(%error, "an NRI plugin breaks the protocol"),
            }
        }
    }
}

fn take(
    lane: Lane,
    message: Message,
    shared: &Shared,
    requests: &mpsc::Sender<Incoming>,
) -> Result<(), &'static str> {
    match (lane, message.kind) {
        (Lane::Plugin, Kind::Response) => {
            let response =
                envelope::Response::decode(message.body).map_err(|_| "a response that cannot be read")?;
            match shared.waiting().remove(&message.stream) {
                // The caller may have just given up.
                Some(reply) => drop(reply.send(response)),
                None => tracing::debug!(
                    stream = message.stream,
                    "an answer that nobody waits for (any more)"
                ),
            }
            Ok(())
        }
        (Lane::Runtime, Kind::Request) => {
            let stream = message.stream;
            let Ok(request) = envelope::Request::decode(message.body) else {
                shared.refuse(stream, code::INVALID_ARGUMENT, "the request cannot be read");
                return Ok(());
            };
            if requests.try_send(Incoming { stream, request }).is_err() {
                shared.refuse(
                    stream,
                    code::RESOURCE_EXHAUSTED,
                    "too many requests wait to be served",
                );
            }
            Ok(())
        }
        (Lane::Plugin, Kind::Request) => Err("a request on the connection for answers"),
        (Lane::Runtime, Kind::Response) => Err("an answer on the connection for requests"),
    }
}

async fn write(mut writer: impl AsyncWrite + Unpin, mut messages: mpsc::Receiver<Outgoing>) {
    while let Some(message) = messages.recv().await {
        let bytes = match message {
            Outgoing::Bytes(bytes) => bytes,
            Outgoing::Mark(mark) => {
                if mark.send(()).is_err() {
                    tracing::trace!("who waited for the connection has given up");
                }
                continue;
            }
        };
        if let Err(error) = writer.write_all(&bytes).await {
            return tracing::debug!(%error, "an NRI plugin's connection broke");
        }
    }
}
