//! Connections to ports of the pod: dialled here, in the network namespace that all its containers share.
//!
//! Must not know who asked, or for which container.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use caisson_agent_api::stream::{MAX_FRAME, Outcome, Reply};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};

use crate::streams::{Frame, read_frame, refuse};

/// How long a port may take to accept.
const DIAL_BOUND: Duration = Duration::from_secs(10);

/// Bytes read at once, with the length word before them.
const READ_BYTES: usize = 32 << 10;

const _: () = assert!(READ_BYTES <= MAX_FRAME, "a read fits a frame");

/// Connects to `port`, and copies both directions until both have ended, or one has broken.
pub(crate) async fn serve(
    port: u64,
    mut reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let Some(port) = u16::try_from(port).ok().filter(|port| *port != 0) else {
        return refuse(&mut writer, Outcome::Malformed, 0).await;
    };
    let connection = match dial(port).await {
        Ok(connection) => connection,
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::EIO);
            return refuse(&mut writer, Outcome::Refused, u64::from(errno.unsigned_abs())).await;
        }
    };
    connection.set_nodelay(true)?;
    let accepted = Reply {
        outcome: Outcome::Accepted,
        offset: 0,
    };
    writer.write_all(&accepted.encode()).await?;
    let (mut from_port, mut to_port) = connection.into_split();
    let out = copy_out(&mut from_port, &mut writer);
    let into = copy_in(&mut reader, &mut to_port);
    // Whichever fails takes the other along: half a broken connection is of no use.
    tokio::try_join!(out, into)?;
    Ok(())
}

/// IPv4 first, as "localhost" means in most pods; IPv6 for servers that listen there alone.
async fn dial(port: u16) -> io::Result<TcpStream> {
    let connect = |address: SocketAddr| async move {
        match timeout(DIAL_BOUND, TcpStream::connect(address)).await {
            Ok(connected) => connected,
            Err(_) => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
        }
    };
    match connect((Ipv4Addr::LOCALHOST, port).into()).await {
        Ok(connection) => Ok(connection),
        // The first answer is the one that people look for.
        Err(error) => connect((Ipv6Addr::LOCALHOST, port).into())
            .await
            .map_err(|_| error),
    }
}

async fn copy_out(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut frame = vec![0; size_of::<u32>() + READ_BYTES];
    loop {
        let (word, bytes) = frame.split_at_mut(size_of::<u32>());
        let count = from.read(bytes).await?;
        let length = u32::try_from(count).map_err(io::Error::other)?;
        word.copy_from_slice(&length.to_le_bytes());
        to.write_all(frame.get(..size_of::<u32>() + count).unwrap_or_default())
            .await?;
        if count == 0 {
            return to.flush().await;
        }
    }
}

/// An error when the daemon's connection ended without its end.
async fn copy_in(from: &mut (impl AsyncRead + Unpin), to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    while let Some(frame) = read_frame(from).await? {
        match frame {
            Frame::Bytes(bytes) => to.write_all(&bytes).await?,
            Frame::End => {
                to.shutdown().await?;
                return Ok(());
            }
        }
    }
    Err(io::ErrorKind::ConnectionAborted.into())
}
