//! A session: one connection, many streams that the client opens. A task reads, a task writes; streams are handed out as they come.
//!
//! Must not know what streams mean. The reader waits when a stream's reader does not keep up (so a client is held back by TCP), the
//! writer when the client does not read.

use std::{
    collections::HashMap,
    future::Future,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf},
    sync::{mpsc, watch},
    task::JoinSet,
};

use super::{
    frame::{Decoder, Frame, FrameError, MAX_DATA, reset},
    headers::{BlockError, Deflater, Headers, Inflater},
};
use crate::{
    channel::{self, Feed, Inbound, Out, Outbound, QUEUE},
    hangup::Hangup,
};

/// Most streams that are open at a time.
const MAX_STREAMS: usize = 1024;

/// Control frames that may wait for the connection.
const CONTROL_QUEUE: usize = 64;

/// Streams that may wait to be taken by whoever serves the session.
const BACKLOG: usize = 64;

/// Bytes read at once.
const READ_BYTES: usize = 64 << 10;

/// Bytes that are collected before they are written.
const WRITE_BYTES: usize = 64 << 10;

/// Consumed bytes after which a client that counts is granted as many again. Half of the initial window.
const GRANT: u32 = 32 << 10;

/// How long a client may take to close its side after ours is closed.
const LINGER: Duration = Duration::from_secs(5);

/// A stream that the client has opened, and that has been accepted.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) inbound: Inbound,
    pub(crate) outbound: Outbound,
}

/// Why a session ended other than by the client's orderly end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    #[error("connection broke")]
    Connection(#[from] io::Error),
    #[error("client broke the protocol")]
    Frame(#[from] FrameError),
    #[error("client broke the protocol")]
    Headers(#[from] BlockError),
    #[error("client hung up while a stream's bytes waited for their reader")]
    HungUp,
    #[error("frame is too long to be sent")]
    TooLong,
    #[error("session is over")]
    Over,
}

/// What the reader, and those who consume bytes, have to say to the client.
#[derive(Debug)]
enum Control {
    Reply(u32),
    Frame(Frame),
}

/// One open stream, as reader and writer keep it. It is forgotten when both sides have ended it.
struct Entry {
    /// Absent when the client has ended its side.
    feed: Option<Feed>,
    refused: watch::Sender<bool>,
    ended_here: bool,
    /// Bytes taken whose window has not been given back.
    owed: u32,
}

#[derive(Default)]
struct Streams(Mutex<HashMap<u32, Entry>>);

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        // No method leaves the table half changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, id: u32) -> Option<Feed> {
        self.lock().get(&id)?.feed.as_ref().map(Feed::share)
    }

    fn ended_there(&self, id: u32) {
        let mut streams = self.lock();
        if let Some(entry) = streams.get_mut(&id) {
            entry.feed = None;
            if entry.ended_here {
                streams.remove(&id);
            }
        }
    }

    fn ended_here(&self, id: u32) {
        let mut streams = self.lock();
        if let Some(entry) = streams.get_mut(&id) {
            entry.ended_here = true;
            if entry.feed.is_none() {
                streams.remove(&id);
            }
        }
    }

    fn reset(&self, id: u32) {
        if let Some(entry) = self.lock().remove(&id) {
            entry.refused.send_replace(true);
        }
    }

    /// What is to be given back now: 0 or at least [`GRANT`].
    fn owe(&self, id: u32, bytes: u32) -> u32 {
        let mut streams = self.lock();
        let Some(entry) = streams.get_mut(&id) else {
            return 0;
        };
        entry.owed = entry.owed.saturating_add(bytes);
        if entry.owed < GRANT {
            return 0;
        }
        std::mem::take(&mut entry.owed)
    }

    fn is_open_here(&self, id: u32) -> bool {
        self.lock().get(&id).is_some_and(|entry| !entry.ended_here)
    }
}

/// A running session. Dropping it breaks the connection off.
pub(crate) struct Session {
    accepted: mpsc::Receiver<Stream>,
    queue: mpsc::Sender<Out>,
    over: watch::Receiver<bool>,
    tasks: JoinSet<()>,
}

impl Session {
    /// Serves the connection from its first byte. `hangup` tells of a client that goes away while nothing is read.
    pub(crate) fn start<C>(connection: C, hangup: Arc<Hangup>) -> Result<Self, BlockError>
    where
        C: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (read_half, write_half) = tokio::io::split(connection);
        let (queue, outgoing) = mpsc::channel(QUEUE);
        let (control, orders) = mpsc::channel(CONTROL_QUEUE);
        let (backlog, accepted) = mpsc::channel(BACKLOG);
        let (told, over) = watch::channel(false);
        let streams = Arc::new(Streams::default());
        let writer = Writer {
            connection: write_half,
            streams: Arc::clone(&streams),
            deflater: Deflater::new()?,
            buffer: BytesMut::with_capacity(WRITE_BYTES),
        };
        let reader = Reader {
            connection: read_half,
            hangup,
            streams,
            inflater: Inflater::default(),
            backlog,
            queue: queue.clone(),
            control,
            last: 0,
            owed: 0,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = writer.run(outgoing, orders).await {
                tracing::debug!(%error, "writing to a streaming client ended");
            }
        });
        tasks.spawn(async move {
            if let Err(error) = reader.run().await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "reading from a streaming client ended"
                );
            }
            told.send_replace(true);
        });
        Ok(Self {
            accepted,
            queue,
            over,
            tasks,
        })
    }

    /// The next stream; `None` when the client is gone.
    pub(crate) async fn accept(&mut self) -> Option<Stream> {
        self.accepted.recv().await
    }

    /// Waits until the client is gone.
    pub(crate) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut over = self.over.clone();
        async move {
            // A lost task is a lost client.
            drop(over.wait_for(|over| *over).await);
        }
    }

    /// Says that nothing more will come, writes what waits, and leaves the client a while to close its side. Streams must have been
    /// finished before.
    pub(crate) async fn close(mut self) {
        self.accepted.close();
        let gone = self.gone();
        let farewell = async {
            if self.queue.send(Out::Close).await.is_ok() {
                gone.await;
            }
        };
        if tokio::time::timeout(LINGER, farewell).await.is_err() {
            tracing::debug!("streaming client did not close in time");
        }
        self.tasks.shutdown().await;
    }
}

struct Reader<C> {
    connection: ReadHalf<C>,
    hangup: Arc<Hangup>,
    streams: Arc<Streams>,
    inflater: Inflater,
    backlog: mpsc::Sender<Stream>,
    queue: mpsc::Sender<Out>,
    control: mpsc::Sender<Control>,
    /// Highest stream id seen.
    last: u32,
    /// As in [`Entry`], of the session.
    owed: u32,
}

impl<C: AsyncRead> Reader<C> {
    async fn run(mut self) -> Result<(), SessionError> {
        let mut decoder = Decoder::default();
        let mut input = BytesMut::new();
        loop {
            while let Some(frame) = decoder.next(&mut input)? {
                self.take(frame).await?;
            }
            input.reserve(READ_BYTES);
            if self.connection.read_buf(&mut input).await? == 0 {
                return Ok(());
            }
        }
    }

    async fn take(&mut self, frame: Frame) -> Result<(), SessionError> {
        match frame {
            Frame::Data { stream, fin, bytes } => self.data(stream, fin, bytes).await,
            Frame::SynStream {
                stream, fin, block, ..
            } => {
                let headers = self.inflater.read(&block)?;
                self.open(stream, fin, headers).await
            }
            Frame::RstStream { stream, .. } => {
                self.streams.reset(stream);
                Ok(())
            }
            // Ours are even, and none are sent: what comes back even is nobody's.
            Frame::Ping(id) if id % 2 == 1 => self.say(Control::Frame(Frame::Ping(id))).await,
            Frame::Headers { stream, fin, block } | Frame::SynReply { stream, fin, block } => {
                self.inflater.read(&block)?;
                if fin {
                    self.streams.ended_there(stream);
                }
                Ok(())
            }
            // Windows are not enforced (see the module above); settings are about windows and limits of streams that servers open.
            Frame::Ping(_) | Frame::Settings(_) | Frame::GoAway { .. } | Frame::WindowUpdate { .. } => Ok(()),
        }
    }

    async fn refuse(&mut self, stream: u32, status: u32) -> Result<(), SessionError> {
        self.say(Control::Frame(Frame::RstStream { stream, status }))
            .await
    }

    /// 2.3.2: ids of a client are odd and grow.
    async fn open(&mut self, id: u32, fin: bool, headers: Headers) -> Result<(), SessionError> {
        if id.is_multiple_of(2) || id <= self.last {
            return self.refuse(id, reset::PROTOCOL_ERROR).await;
        }
        self.last = id;
        let (feed, inbound) = channel::inbound();
        let (refused, refusal) = watch::channel(false);
        let entry = Entry {
            feed: (!fin).then_some(feed),
            refused,
            ended_here: false,
            owed: 0,
        };
        {
            let mut streams = self.streams.lock();
            if streams.len() < MAX_STREAMS {
                streams.insert(id, entry);
            }
        }
        if !self.streams.is_open_here(id) {
            return self.refuse(id, reset::REFUSED_STREAM).await;
        }
        self.say(Control::Reply(id)).await?;
        let stream = Stream {
            id,
            headers,
            inbound,
            outbound: Outbound::new(id, self.queue.clone(), refusal),
        };
        if self.backlog.send(stream).await.is_err() {
            // Closing: nobody takes it.
            self.streams.reset(id);
            return self.refuse(id, reset::REFUSED_STREAM).await;
        }
        Ok(())
    }

    async fn data(&mut self, id: u32, fin: bool, bytes: Bytes) -> Result<(), SessionError> {
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        if !bytes.is_empty() {
            match self.streams.feed(id) {
                Some(feed) => self.deliver(&feed, bytes).await?,
                // The client may not have seen our reset yet; but on a stream of which it knows the end, it is wrong.
                None if self.streams.is_open_here(id) => {
                    self.refuse(id, reset::STREAM_ALREADY_CLOSED).await?;
                }
                None => {}
            }
            self.grant(id, length).await?;
        }
        if fin {
            self.streams.ended_there(id);
        }
        Ok(())
    }

    /// Bytes that nobody wants are dropped, as on a closed pipe.
    async fn deliver(&mut self, feed: &Feed, bytes: Bytes) -> Result<(), SessionError> {
        tokio::select! {
            _ = feed.push(bytes) => Ok(()),
            () = self.hangup.while_nothing_is_read() => Err(SessionError::HungUp),
        }
    }
}

impl<C> Reader<C> {
    async fn say(&mut self, control: Control) -> Result<(), SessionError> {
        self.control.send(control).await.map_err(|_| SessionError::Over)
    }

    /// Gives stream and session (stream 0) their window back, once the bytes have their place here.
    async fn grant(&mut self, stream: u32, bytes: u32) -> Result<(), SessionError> {
        self.owed = self.owed.saturating_add(bytes);
        let session = std::mem::take(&mut self.owed);
        if session < GRANT {
            self.owed = session;
        }
        for (stream, delta) in [(stream, self.streams.owe(stream, bytes)), (0, session)] {
            if delta >= GRANT {
                let frame = Frame::WindowUpdate { stream, delta };
                self.say(Control::Frame(frame)).await?;
            }
        }
        Ok(())
    }
}

struct Writer<C> {
    connection: WriteHalf<C>,
    streams: Arc<Streams>,
    deflater: Deflater,
    buffer: BytesMut,
}

impl<C: AsyncWrite> Writer<C> {
    async fn run(
        mut self,
        mut queue: mpsc::Receiver<Out>,
        mut orders: mpsc::Receiver<Control>,
    ) -> Result<(), SessionError> {
        loop {
            let more = tokio::select! {
                biased;
                Some(order) = orders.recv() => self.obey(order)?,
                Some(out) = queue.recv() => self.put(out)?,
                else => false,
            };
            // What waits already goes in the same write.
            let mut more = more;
            while more && self.buffer.len() < WRITE_BYTES {
                more = match (orders.try_recv(), &mut queue) {
                    (Ok(order), _) => self.obey(order)?,
                    (Err(_), queue) => match queue.try_recv() {
                        Ok(out) => self.put(out)?,
                        Err(_) => break,
                    },
                };
            }
            self.connection.write_all(&self.buffer).await?;
            self.buffer.clear();
            self.connection.flush().await?;
            if !more {
                self.connection.shutdown().await?;
                return Ok(());
            }
        }
    }

    fn obey(&mut self, order: Control) -> Result<bool, SessionError> {
        let frame = match order {
            Control::Frame(frame) => frame,
            Control::Reply(stream) => Frame::SynReply {
                stream,
                fin: false,
                block: self.deflater.write(&Headers::new())?,
            },
        };
        self.encode(&frame)
    }

    /// False: that was all.
    fn put(&mut self, out: Out) -> Result<bool, SessionError> {
        match out {
            Out::Data(stream, mut bytes) => {
                while self.streams.is_open_here(stream) && !bytes.is_empty() {
                    let bytes = bytes.split_to(bytes.len().min(MAX_DATA));
                    self.encode(&Frame::Data {
                        stream,
                        fin: false,
                        bytes,
                    })?;
                }
                Ok(true)
            }
            Out::End(stream) => {
                if self.streams.is_open_here(stream) {
                    self.streams.ended_here(stream);
                    self.encode(&Frame::Data {
                        stream,
                        fin: true,
                        bytes: Bytes::new(),
                    })?;
                }
                Ok(true)
            }
            Out::Reset(stream) => {
                if self.streams.is_open_here(stream) {
                    self.streams.reset(stream);
                    self.encode(&Frame::RstStream {
                        stream,
                        status: reset::CANCEL,
                    })?;
                }
                Ok(true)
            }
            Out::Close => {
                self.encode(&Frame::GoAway { last: 0, status: 0 })?;
                Ok(false)
            }
        }
    }

    fn encode(&mut self, frame: &Frame) -> Result<bool, SessionError> {
        if frame.encode(&mut self.buffer) {
            Ok(true)
        } else {
            Err(SessionError::TooLong)
        }
    }
}
