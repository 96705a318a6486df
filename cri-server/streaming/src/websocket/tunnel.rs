//! A byte stream in binary WebSocket messages, whose borders mean nothing: how SPDY gets through WebSocket.

use futures::{SinkExt, StreamExt};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream},
    task::JoinSet,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use super::config;

/// Bytes that may wait in each direction.
const BUFFER: usize = 64 << 10;

/// The inner stream, and the tasks that keep it going as long as they are kept.
pub(crate) async fn open<C>(connection: C) -> (DuplexStream, JoinSet<()>)
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let socket = WebSocketStream::from_raw_socket(connection, Role::Server, Some(config())).await;
    let (mut sink, mut messages) = socket.split();
    let (inner, outer) = tokio::io::duplex(BUFFER);
    let (mut outgoing, mut incoming) = tokio::io::split(outer);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        // An error is a client that is gone: the end of the inner stream says so.
        while let Some(Ok(message)) = messages.next().await {
            if let Message::Binary(bytes) = message
                && incoming.write_all(&bytes).await.is_err()
            {
                break;
            }
        }
        drop(incoming.shutdown().await);
    });
    tasks.spawn(async move {
        let mut buffer = bytes::BytesMut::new();
        loop {
            buffer.reserve(BUFFER);
            match outgoing.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {
                    if sink.send(Message::binary(buffer.split())).await.is_err() {
                        return;
                    }
                }
            }
        }
        let frame = CloseFrame {
            code: CloseCode::Normal,
            reason: "".into(),
        };
        drop(sink.send(Message::Close(Some(frame))).await);
    });
    (inner, tasks)
}
