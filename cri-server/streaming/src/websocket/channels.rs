//! Exec and attach over WebSocket (channel.k8s.io and its later versions): the first byte of each message is its channel.
//!
//! v5 is v4 with an end of single channels: a message on channel 255 names the channel that the client has ended. Before, stdin could
//! not be half-closed.

use std::{collections::HashMap, future::Future, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{
    SinkExt, StreamExt,
    stream::{SplitSink, SplitStream},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    task::JoinSet,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        self, Message,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use super::{Channelled, config};
use crate::{
    channel::{self, Feed, Out, Outbound, QUEUE},
    hangup::Hangup,
    port::Stdio,
    remote_command::Channels,
};

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;

/// Says that another channel has ended.
const CLOSE: u8 = 255;

/// How long a client may take to close its side after ours is closed.
const LINGER: Duration = Duration::from_secs(5);

/// Why reading ended other than by the client's orderly end.
#[derive(Debug, thiserror::Error)]
enum ChannelError {
    #[error("connection broke")]
    Connection(#[from] tungstenite::Error),
    #[error("client hung up while bytes waited for their reader")]
    HungUp,
    #[error("client broke the channel protocol: {0}")]
    Malformed(&'static str),
}

/// A running connection. Dropping it breaks it off.
pub(crate) struct Connection {
    queue: mpsc::Sender<Out>,
    over: watch::Receiver<bool>,
    /// Outputs are never refused one by one here.
    _unrefused: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Connection {
    /// Serves the connection from its first message.
    pub(crate) async fn start<C>(
        connection: C,
        spoken: Channelled,
        stdio: Stdio,
        hangup: Arc<Hangup>,
    ) -> (Self, Channels)
    where
        C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let socket = WebSocketStream::from_raw_socket(connection, Role::Server, Some(config())).await;
        let (sink, messages) = socket.split();
        let (queue, outgoing) = mpsc::channel(QUEUE);
        let (told, over) = watch::channel(false);
        let (unrefused, refused) = watch::channel(false);
        let mut feeds = HashMap::new();
        let mut inbound = |id: u8, wanted: bool| {
            wanted.then(|| {
                let (feed, inbound) = channel::inbound();
                feeds.insert(id, feed);
                inbound
            })
        };
        let outbound = |id: u8| Outbound::new(u32::from(id), queue.clone(), refused.clone());
        let channels = Channels {
            stdin: inbound(STDIN, stdio.stdin),
            resize: inbound(RESIZE, stdio.tty),
            stdout: stdio.stdout.then(|| outbound(STDOUT)),
            stderr: (stdio.stderr && !stdio.tty).then(|| outbound(STDERR)),
            error: outbound(ERROR),
            style: spoken.style,
        };
        // An empty message on the first channel tells the client that all is set up.
        let first = match (stdio.stdout, stdio.stderr && !stdio.tty) {
            (true, _) => STDOUT,
            (false, true) => STDERR,
            (false, false) => ERROR,
        };
        drop(queue.send(Out::Data(u32::from(first), Bytes::new())).await);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            if let Err(error) = write(sink, outgoing, spoken).await {
                tracing::debug!(%error, "writing to a streaming client ended");
            }
        });
        let reader = Reader {
            feeds,
            spoken,
            hangup,
        };
        tasks.spawn(async move {
            if let Err(error) = reader.run(messages).await {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "reading from a streaming client ended"
                );
            }
            told.send_replace(true);
        });
        let connection = Self {
            queue,
            over,
            _unrefused: unrefused,
            tasks,
        };
        (connection, channels)
    }

    /// Waits until the client is gone.
    pub(crate) fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut over = self.over.clone();
        async move {
            drop(over.wait_for(|over| *over).await);
        }
    }

    /// Writes what waits, closes, and leaves the client a while to do the same.
    pub(crate) async fn close(mut self) {
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

async fn write<C: AsyncRead + AsyncWrite + Unpin>(
    mut sink: SplitSink<WebSocketStream<C>, Message>,
    mut queue: mpsc::Receiver<Out>,
    spoken: Channelled,
) -> Result<(), tungstenite::Error> {
    while let Some(out) = queue.recv().await {
        match out {
            Out::Data(channel, bytes) => {
                // Channel ids are made from bytes.
                let channel = u8::try_from(channel).unwrap_or(ERROR);
                sink.feed(message(channel, &bytes, spoken)).await?;
                if queue.is_empty() {
                    sink.flush().await?;
                }
            }
            // Servers have no way to end a single channel.
            Out::End(_) | Out::Reset(_) => {}
            Out::Close => {
                let frame = CloseFrame {
                    code: CloseCode::Normal,
                    reason: "".into(),
                };
                sink.send(Message::Close(Some(frame))).await?;
                return Ok(());
            }
        }
    }
    Ok(())
}

fn message(channel: u8, bytes: &Bytes, spoken: Channelled) -> Message {
    if spoken.base64 {
        let digit = char::from(b'0' + channel);
        return Message::text(format!("{digit}{}", STANDARD.encode(bytes)));
    }
    let mut message = BytesMut::with_capacity(1 + bytes.len());
    message.put_u8(channel);
    message.put_slice(bytes);
    Message::binary(message)
}

/// One message of the client.
#[derive(Debug, PartialEq, Eq)]
enum Incoming {
    Bytes(u8, Bytes),
    Ended(u8),
    /// Nothing for us.
    Nothing,
}

fn parse(message: Message, spoken: Channelled) -> Result<Incoming, ChannelError> {
    let bytes = match message {
        Message::Binary(bytes) => bytes,
        Message::Text(text) => Bytes::from(text),
        // Pings are answered by tungstenite.
        _ => return Ok(Incoming::Nothing),
    };
    let Some((&channel, content)) = bytes.split_first() else {
        return Ok(Incoming::Nothing);
    };
    if spoken.base64 {
        let content = STANDARD
            .decode(content)
            .map_err(|_| ChannelError::Malformed("a message is not base64"))?;
        return Ok(Incoming::Bytes(channel.wrapping_sub(b'0'), content.into()));
    }
    if spoken.closes && channel == CLOSE {
        return match content {
            [ended] => Ok(Incoming::Ended(*ended)),
            _ => Err(ChannelError::Malformed("an end names not one channel")),
        };
    }
    Ok(Incoming::Bytes(channel, bytes.slice(1..)))
}

struct Reader {
    feeds: HashMap<u8, Feed>,
    spoken: Channelled,
    hangup: Arc<Hangup>,
}

impl Reader {
    async fn run<C: AsyncRead + AsyncWrite + Unpin>(
        mut self,
        mut messages: SplitStream<WebSocketStream<C>>,
    ) -> Result<(), ChannelError> {
        while let Some(message) = messages.next().await {
            match parse(message?, self.spoken)? {
                Incoming::Bytes(channel, bytes) if !bytes.is_empty() => {
                    if let Some(feed) = self.feeds.get(&channel) {
                        tokio::select! {
                            // Bytes that nobody wants are dropped, as on a closed pipe.
                            _ = feed.push(bytes) => {}
                            () = self.hangup.while_nothing_is_read() => return Err(ChannelError::HungUp),
                        }
                    }
                }
                Incoming::Ended(channel) => {
                    self.feeds.remove(&channel);
                }
                Incoming::Bytes(..) | Incoming::Nothing => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Style;

    const V5: Channelled = Channelled::new(Style::Json, false, true);
    const V4: Channelled = Channelled::new(Style::Json, false, false);
    const BASE64: Channelled = Channelled::new(Style::Json, true, false);

    #[test]
    fn the_first_byte_is_the_channel() {
        let parsed = parse(Message::binary(b"\0hello".to_vec()), V4).unwrap();
        assert_eq!(parsed, Incoming::Bytes(STDIN, Bytes::from_static(b"hello")));
        assert_eq!(
            message(STDOUT, &Bytes::from_static(b"x"), V5),
            Message::binary(b"\x01x".to_vec())
        );
    }

    #[test]
    fn only_v5_knows_the_end_of_a_channel() {
        let end = || Message::binary(vec![CLOSE, STDIN]);
        assert_eq!(parse(end(), V5).unwrap(), Incoming::Ended(STDIN));
        assert!(matches!(parse(end(), V4).unwrap(), Incoming::Bytes(CLOSE, _)));
        assert!(parse(Message::binary(vec![CLOSE]), V5).is_err());
        assert!(parse(Message::binary(vec![CLOSE, 0, 1]), V5).is_err());
    }

    #[test]
    fn base64_travels_as_text() {
        let parsed = parse(Message::text("0aGVsbG8="), BASE64).unwrap();
        assert_eq!(parsed, Incoming::Bytes(STDIN, Bytes::from_static(b"hello")));
        assert_eq!(
            message(ERROR, &Bytes::from_static(b"hello"), BASE64),
            Message::text("3aGVsbG8=")
        );
        assert!(parse(Message::text("0?"), BASE64).is_err());
    }

    #[test]
    fn empty_messages_mean_nothing() {
        assert_eq!(parse(Message::binary(Vec::new()), V5).unwrap(), Incoming::Nothing);
    }
}
