//! The stream connections: one connection is one stream of one process, or a way to one port; framed as `caisson_agent_api::stream` says.
//!
//! Must not know how processes are started.

use std::{io, sync::Arc, time::Duration};

use caisson_agent_api::stream::{self, Kind, MAX_FRAME, OPEN_HEAD_BYTES, Open, OpenHead, Outcome, Reply};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::{
    forward,
    guest::Guest,
    input::Input,
    output::{Next, Output},
};

/// How long a connection may take to say what it wants.
const OPEN_BOUND: Duration = Duration::from_secs(10);

/// Serves one connection to its end. Errors are the transport's, and the peer's to notice.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite>(guest: Arc<Guest>, connection: S) -> io::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(connection);
    let opened = tokio::time::timeout(OPEN_BOUND, read_open(&mut reader)).await??;
    let Some(open) = opened else {
        return refuse(&mut writer, Outcome::Malformed, 0).await;
    };
    if open.kind == Kind::Forward {
        return forward::serve(open.offset, reader, writer).await;
    }
    let Some(stdio) = guest.stdio(&open.container_id, &open.exec_id) else {
        return refuse(&mut writer, Outcome::NotFound, 0).await;
    };
    match open.kind {
        Kind::Stdin => match &stdio.stdin {
            Some(input) => receive(input, reader, writer).await,
            None => refuse(&mut writer, Outcome::NotFound, 0).await,
        },
        Kind::Stdout => send(&stdio.stdout, open.offset, reader, writer).await,
        Kind::Stderr => match &stdio.stderr {
            Some(output) => send(output, open.offset, reader, writer).await,
            None => refuse(&mut writer, Outcome::NotFound, 0).await,
        },
        Kind::Forward => refuse(&mut writer, Outcome::Malformed, 0).await,
    }
}

/// `None` when what came is no open message.
async fn read_open(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Open>> {
    let mut head = [0; OPEN_HEAD_BYTES];
    reader.read_exact(&mut head).await?;
    let Ok(head) = OpenHead::decode(head) else {
        return Ok(None);
    };
    let mut ids = vec![0; head.ids_len()];
    reader.read_exact(&mut ids).await?;
    Ok(head.with_ids(&ids).ok())
}

pub(crate) async fn refuse(
    writer: &mut (impl AsyncWrite + Unpin),
    outcome: Outcome,
    offset: u64,
) -> io::Result<()> {
    writer.write_all(&Reply { outcome, offset }.encode()).await?;
    writer.shutdown().await
}

/// Output to the daemon.
async fn send(
    output: &Output,
    offset: u64,
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (id, mut changed) = match output.attach(offset) {
        Ok(attached) => attached,
        Err(lowest) => return refuse(&mut writer, Outcome::OffsetUnavailable, lowest).await,
    };
    let accepted = Reply {
        outcome: Outcome::Accepted,
        offset,
    };
    writer.write_all(&accepted.encode()).await?;
    let frames = async {
        let mut sent = offset;
        loop {
            match output.next(id, sent, MAX_FRAME) {
                Next::Bytes(bytes) => {
                    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
                    // One write: one packet, where two would be one for the length alone.
                    let mut frame = Vec::with_capacity(size_of::<u32>() + bytes.len());
                    frame.extend(length.to_le_bytes());
                    frame.extend(bytes);
                    writer.write_all(&frame).await?;
                    sent = sent.saturating_add(u64::from(length));
                }
                Next::Wait => changed.changed().await.map_err(io::Error::other)?,
                Next::End => {
                    writer.write_all(&[0; 4]).await?;
                    writer.flush().await?;
                    return Ok::<bool, io::Error>(true);
                }
                Next::Superseded => return Ok(false),
            }
        }
    };
    let acknowledgements = acknowledge(output, id, &mut reader);
    tokio::pin!(acknowledgements);
    tokio::select! {
        ended = frames => {
            if !ended? {
                return Ok(());
            }
        }
        over = &mut acknowledgements => return over,
    }
    // The last acknowledgements come after the end; then the daemon closes.
    acknowledgements.await
}

/// Takes acknowledgements until the daemon closes its side.
async fn acknowledge(output: &Output, id: u64, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    loop {
        let mut offset = [0; 8];
        match reader.read_exact(&mut offset).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) => return Err(error),
        }
        if !output.acknowledge(id, u64::from_le_bytes(offset)) {
            return Ok(());
        }
    }
}

/// Input from the daemon.
async fn receive(
    input: &Input,
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let accepted = Reply {
        outcome: Outcome::Accepted,
        offset: 0,
    };
    writer.write_all(&accepted.encode()).await?;
    let ended = copy_input(input, &mut reader).await;
    let finished = matches!(ended, Ok(true));
    if (finished || input.once()) && input.end().await.is_err() {
        // The process had closed it already.
    }
    ended.map(|_| ())
}

/// True when the daemon said that there is no more, false when the connection just ended or nobody reads.
async fn copy_input(input: &Input, reader: &mut (impl AsyncRead + Unpin)) -> io::Result<bool> {
    while let Some(frame) = read_frame(reader).await? {
        match frame {
            Frame::End => return Ok(true),
            Frame::Bytes(bytes) => {
                if input.write(&bytes).await.is_err() {
                    return Ok(false);
                }
            }
        }
    }
    Ok(false)
}

/// What the daemon sends on a connection that carries bytes into the guest.
pub(crate) enum Frame {
    Bytes(Vec<u8>),
    /// There is no more.
    End,
}

/// The next frame; `None` when the connection just ended.
pub(crate) async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut word = [0; 4];
    match reader.read_exact(&mut word).await {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    }
    let Some(length) = stream::frame_len(word).map_err(io::Error::other)? else {
        return Ok(Some(Frame::End));
    };
    let mut bytes = vec![0; length];
    reader.read_exact(&mut bytes).await?;
    Ok(Some(Frame::Bytes(bytes)))
}
