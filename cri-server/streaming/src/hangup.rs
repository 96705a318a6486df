//! Whether the client is still there, while nothing is read from it.
//!
//! Reading stops when a stream's reader does not keep up. A client that goes away then would never be noticed: its end of file lies
//! behind bytes that nobody reads. The kernel knows, and so this asks it, on a descriptor of its own.

use std::{io, os::fd::AsFd, time::Duration};

use rustix::net::sockopt;
use tokio::{
    io::Interest,
    net::TcpStream,
    time::{sleep, timeout},
};

/// Reading that stands still for less than this is not worth asking.
const CALM: Duration = Duration::from_secs(1);

/// Silence after which the kernel asks the client's kernel, and how often it asks without an answer.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
const KEEPALIVE_PROBES: u32 = 4;

/// A view of the connection that outlives its hand-over to the HTTP server.
#[derive(Debug)]
pub(crate) struct Hangup {
    socket: std::net::TcpStream,
}

impl Hangup {
    /// Of this connection, which from now on is also probed when it is silent.
    pub(crate) fn of(connection: &TcpStream) -> io::Result<Self> {
        connection.set_nodelay(true)?;
        sockopt::set_socket_keepalive(connection, true)?;
        sockopt::set_tcp_keepidle(connection, KEEPALIVE_IDLE)?;
        sockopt::set_tcp_keepintvl(connection, KEEPALIVE_INTERVAL)?;
        sockopt::set_tcp_keepcnt(connection, KEEPALIVE_PROBES)?;
        Ok(Self {
            socket: connection.as_fd().try_clone_to_owned()?.into(),
        })
    }

    /// Waits until the client is gone. To be waited for while nothing is read.
    pub(crate) async fn while_nothing_is_read(&self) {
        sleep(CALM).await;
        let watched = self
            .socket
            .try_clone()
            .ok()
            .and_then(|socket| TcpStream::from_std(socket).ok());
        let Some(socket) = watched else {
            return std::future::pending().await;
        };
        while let Ok(ready) = socket.ready(Interest::READABLE).await {
            if ready.is_read_closed() {
                return;
            }
            // Until something else happens: the bytes that are there are known to be.
            let forget = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            drop(socket.try_io(Interest::READABLE, forget));
        }
    }
}

/// Breaks `work` off when nothing has happened on the connection for `limit`.
pub(crate) async fn unless_idle<T>(
    activity: &crate::activity::Activity,
    limit: Duration,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::pin!(work);
    loop {
        let left = limit.saturating_sub(activity.idle());
        if left.is_zero() {
            return None;
        }
        if let Ok(done) = timeout(left, &mut work).await {
            return Some(done);
        }
    }
}
