//! The HTTP server: takes connections, redeems tokens, upgrades, and starts the session that was asked for.
//!
//! Every session is a task of the server's; when the server is dropped they all end, and their clients see a closed connection.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use http::{Method, Request, Response, StatusCode};
use hyper::{body::Incoming, server::conn::http1, service::service_fn, upgrade::OnUpgrade};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::TlsAcceptor;

use crate::{
    activity::{Activity, Observed},
    handshake::{Refusal, Spoken, negotiate},
    hangup::{Hangup, unless_idle},
    port::Streams,
    sessions,
    tls::{self, TlsError, TlsFiles},
    tokens::{Tokens, TooManyTokens, Wish},
};

/// Most connections at a time.
pub const MAX_CONNECTIONS: usize = 2048;

/// How long a client may take for TLS and for its request's head.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);

/// How the server is to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen; port 0: any.
    pub listen: SocketAddr,
    /// Absent: plain HTTP.
    pub tls: Option<TlsFiles>,
    /// A session on which no byte moves for so long is ended.
    pub idle_timeout: Duration,
}

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen on {address} for streaming clients")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The reason.
        #[source]
        source: io::Error,
    },
    /// TLS cannot be served.
    #[error("cannot serve streaming clients by TLS")]
    Tls(#[from] TlsError),
}

/// Makes the URLs that clients are given. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Endpoint {
    base: Arc<str>,
    tokens: Tokens,
}

impl Endpoint {
    /// A URL that is good once, for [`TOKEN_LIFETIME`](crate::TOKEN_LIFETIME).
    pub fn url(&self, wish: Wish) -> Result<String, TooManyTokens> {
        let method = wish.method();
        let token = self.tokens.issue(wish, Instant::now())?;
        Ok(format!("{}/{method}/{token}", self.base))
    }

    /// Scheme, address and port.
    #[must_use]
    pub fn base(&self) -> &str {
        &self.base
    }
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    tokens: Tokens,
    idle_timeout: Duration,
}

impl Server {
    /// Listens; clients wait until [`Server::run`].
    pub async fn bind(config: &Config) -> Result<(Self, Endpoint), ServerError> {
        let failed = |source| ServerError::Listen {
            address: config.listen,
            source,
        };
        let tls = config.tls.as_ref().map(tls::acceptor).transpose()?;
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = reachable(listener.local_addr().map_err(failed)?);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let tokens = Tokens::default();
        let endpoint = Endpoint {
            base: format!("{scheme}://{address}").into(),
            tokens: tokens.clone(),
        };
        let server = Self {
            listener,
            tls,
            tokens,
            idle_timeout: config.idle_timeout,
        };
        Ok((server, endpoint))
    }

    /// Serves until dropped.
    pub async fn run(self, streams: Arc<dyn Streams>) {
        let (sessions, mut begun) = mpsc::unbounded_channel();
        let context = Context {
            streams,
            tokens: self.tokens,
            idle_timeout: self.idle_timeout,
            sessions,
        };
        let mut tasks = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if tasks.len() < MAX_CONNECTIONS => match accepted {
                    Ok((connection, _)) => {
                        tasks.spawn(head(connection, self.tls.clone(), context.clone()));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept a streaming client");
                        // Out of descriptors, say: others need the time to give some back.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(session) = begun.recv() => {
                    tasks.spawn(session);
                }
                Some(ended) = tasks.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        tracing::error!(%error, "streaming session ended badly");
                    }
                }
            }
        }
    }
}

/// Where clients on this host reach a listener on any address.
fn reachable(bound: SocketAddr) -> SocketAddr {
    let ip = match bound.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, bound.port())
}

type Session = futures::future::BoxFuture<'static, ()>;

/// What every connection needs.
#[derive(Clone)]
struct Context {
    streams: Arc<dyn Streams>,
    tokens: Tokens,
    idle_timeout: Duration,
    /// Where sessions go to be run. Bounded by the number of connections.
    sessions: mpsc::UnboundedSender<Session>,
}

/// One connection, up to its upgrade.
async fn head(connection: TcpStream, tls: Option<TlsAcceptor>, context: Context) {
    let hangup = match Hangup::of(&connection) {
        Ok(hangup) => Arc::new(hangup),
        Err(error) => return tracing::debug!(%error, "streaming client is gone already"),
    };
    match tls {
        None => serve(connection, hangup, context).await,
        Some(tls) => match timeout(HEAD_PATIENCE, tls.accept(connection)).await {
            Ok(Ok(connection)) => serve(connection, hangup, context).await,
            Ok(Err(error)) => tracing::debug!(%error, "TLS with a streaming client failed"),
            Err(_) => tracing::debug!("streaming client was silent instead of TLS"),
        },
    }
}

async fn serve<C>(connection: C, hangup: Arc<Hangup>, context: Context)
where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let (hangup, context) = (Arc::clone(&hangup), context.clone());
        async move { Ok::<_, Infallible>(answer(request, hangup, &context)) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_PATIENCE)
        .serve_connection(TokioIo::new(connection), service)
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "streaming client's request failed");
    }
}

fn answer(mut request: Request<Incoming>, hangup: Arc<Hangup>, context: &Context) -> Response<String> {
    match begin(&mut request, hangup, context) {
        Ok(response) => response,
        Err(refusal) => {
            tracing::debug!(
                status = refusal.status.as_u16(),
                reason = refusal.reason,
                "streaming request refused"
            );
            refusal.response()
        }
    }
}

fn begin(
    request: &mut Request<Incoming>,
    hangup: Arc<Hangup>,
    context: &Context,
) -> Result<Response<String>, Refusal> {
    if request.method() != Method::GET && request.method() != Method::POST {
        return Err(Refusal::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "a session begins with GET or POST",
        ));
    }
    let (method, token) = request
        .uri()
        .path()
        .strip_prefix('/')
        .and_then(|path| path.split_once('/'))
        .unwrap_or_default();
    let wish = context
        .tokens
        .redeem(method, token, Instant::now())
        .ok_or_else(|| Refusal::new(StatusCode::NOT_FOUND, "no such session, or it has begun already"))?;
    let (spoken, response) = negotiate(request, &wish)?;
    let session = session(hyper::upgrade::on(request), wish, spoken, hangup, context.clone());
    context
        .sessions
        .send(Box::pin(session))
        .map_err(|_| Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping"))?;
    Ok(response)
}

async fn session(upgrade: OnUpgrade, wish: Wish, spoken: Spoken, hangup: Arc<Hangup>, context: Context) {
    let upgraded = match timeout(HEAD_PATIENCE, upgrade).await {
        Ok(Ok(upgraded)) => upgraded,
        Ok(Err(error)) => return tracing::debug!(%error, "streaming client did not upgrade"),
        Err(_) => return tracing::debug!("streaming client did not upgrade in time"),
    };
    let activity = Activity::new();
    let connection = Observed::new(TokioIo::new(upgraded), Arc::clone(&activity));
    let work = sessions::serve(connection, wish, spoken, hangup, context.streams);
    if unless_idle(&activity, context.idle_timeout, work).await.is_none() {
        tracing::info!(limit = ?context.idle_timeout, "idle streaming session ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_sent_to_an_address_that_they_can_reach() {
        for (bound, reached) in [
            ("0.0.0.0:7", "127.0.0.1:7"),
            ("[::]:7", "[::1]:7"),
            ("192.0.2.1:7", "192.0.2.1:7"),
        ] {
            assert_eq!(reachable(bound.parse().unwrap()).to_string(), reached);
        }
    }
}
