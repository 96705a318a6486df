//! Hybrid vsock: a Unix socket of the VM on which one writes `CONNECT <port>` to reach a vsock port in the guest.
//!
//! Knows nothing of what travels on the connection.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use caisson_agent_api::RPC_PORT;
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep, timeout},
};
use tonic::transport::{Channel, Endpoint};

use crate::{GuestError, Reached};

/// How long one CONNECT may go unanswered. A guest that is booting answers when its driver is up; asking again is cheap.
pub(crate) const HANDSHAKE: Duration = Duration::from_secs(2);

/// A VM whose socket is gone, or that refuses, for this long is dead.
pub(crate) const GONE_AFTER: Duration = Duration::from_secs(5);

/// Longest answer to CONNECT: `OK 4294967295\n`.
const MAX_ANSWER: usize = 16;

/// Growing pauses between attempts.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    pub(crate) async fn pause(&mut self) {
        sleep(self.next).await;
        self.next = (self.next * 3 / 2).min(self.longest);
    }
}

/// Connects to a vsock port of the guest.
pub(crate) async fn dial(socket: &Path, port: u32, limit: Duration) -> Result<UnixStream, Reached> {
    let mut stream = UnixStream::connect(socket).await.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Reached::SocketAbsent,
        _ => Reached::SocketDead,
    })?;
    match timeout(limit, handshake(&mut stream, port)).await {
        Ok(Ok(true)) => Ok(stream),
        Ok(Ok(false) | Err(_)) => Err(Reached::PortRefused(port)),
        Err(_) => Err(Reached::PortSilent(port)),
    }
}

/// True when the answer is `OK <number>`. Reads byte by byte: what follows the line belongs to the connection's user.
async fn handshake(stream: &mut UnixStream, port: u32) -> io::Result<bool> {
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::with_capacity(MAX_ANSWER);
    while answer.len() < MAX_ANSWER {
        match stream.read_u8().await? {
            b'\n' => break,
            byte => answer.push(byte),
        }
    }
    let number = answer.strip_prefix(b"OK ");
    Ok(number.is_some_and(|digits| !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)))
}

/// The way to one VM.
#[derive(Debug, Clone)]
pub(crate) struct Route {
    socket: Arc<PathBuf>,
    /// A connection to the RPC port that has been made already; the channel takes it before it dials.
    spare: Arc<Mutex<Option<UnixStream>>>,
}

impl Route {
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: Arc::new(socket.to_owned()),
            spare: Arc::default(),
        }
    }

    pub(crate) async fn dial(&self, port: u32, limit: Duration) -> Result<UnixStream, Reached> {
        dial(&self.socket, port, limit).await
    }

    pub(crate) fn unreachable(&self, reached: Reached, since: Instant) -> GuestError {
        GuestError::Unreachable {
            socket: self.socket.as_ref().clone(),
            reached,
            tried: since.elapsed(),
        }
    }

    /// Leaves a connection for the channel to use next.
    pub(crate) fn keep_spare(&self, stream: UnixStream) {
        *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
    }

    fn take_spare(&self) -> Option<UnixStream> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// A gRPC channel that connects when it is first used, and again whenever it broke.
    pub(crate) fn channel(&self) -> Channel {
        let route = self.clone();
        let connector = tower::service_fn(move |_: http::Uri| {
            let route = route.clone();
            async move {
                if let Some(stream) = route.take_spare() {
                    return Ok(TokioIo::new(stream));
                }
                match route.dial(RPC_PORT, HANDSHAKE).await {
                    Ok(stream) => Ok(TokioIo::new(stream)),
                    Err(reached) => Err(io::Error::other(reached.to_string())),
                }
            }
        });
        // The name is never resolved: the connector knows the way.
        Endpoint::from_static("http://agent.invalid").connect_with_connector_lazy(connector)
    }

    /// Waits until the guest takes connections to `port` again. An error when it is gone or refuses for [`GONE_AFTER`]; a guest
    /// that is merely silent (stopped, or starved) is waited for.
    pub(crate) async fn mend(&self, port: u32) -> Result<UnixStream, GuestError> {
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(500));
        let mut refused_since = Instant::now();
        loop {
            match self.dial(port, HANDSHAKE).await {
                Ok(stream) => return Ok(stream),
                Err(Reached::PortSilent(_)) => refused_since = Instant::now(),
                Err(reached) if refused_since.elapsed() >= GONE_AFTER => {
                    return Err(self.unreachable(reached, refused_since));
                }
                Err(_) => {}
            }
            backoff.pause().await;
        }
    }
}
