//! Joins a transport and what was wished for, after the upgrade.

use std::{sync::Arc, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};

use crate::{
    handshake::Spoken,
    hangup::Hangup,
    port::{Process, Stdio, StreamError, Streams},
    port_forward,
    remote_command::{self, Channels},
    spdy::{
        headers::value,
        session::{Session, Stream},
    },
    status::Style,
    tokens::Wish,
    websocket::{channels, tunnel},
};

/// How long a client may take to open all streams of a session.
const STREAM_PATIENCE: Duration = Duration::from_secs(30);

/// Serves one upgraded connection to its end.
pub(crate) async fn serve<C>(
    connection: C,
    wish: Wish,
    spoken: Spoken,
    hangup: Arc<Hangup>,
    streams: Arc<dyn Streams>,
) where
    C: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    match (spoken, &wish) {
        (Spoken::SpdyCommand(style), Wish::Exec(_) | Wish::Attach(_)) => {
            if let Some(session) = start(connection, hangup) {
                spdy_command(session, &wish, style, &*streams).await;
            }
        }
        (Spoken::WebSocketCommand(channelled), Wish::Exec(_) | Wish::Attach(_)) => {
            let (connection, channels) =
                channels::Connection::start(connection, channelled, stdio(&wish), hangup).await;
            let gone = connection.gone();
            if until(gone, command(&*streams, &wish, channels)).await {
                connection.close().await;
            }
        }
        (Spoken::SpdyForward, Wish::PortForward(sandbox)) => {
            if let Some(session) = start(connection, hangup) {
                port_forward::serve(session, sandbox.clone(), streams).await;
            }
        }
        (Spoken::TunnelledForward, Wish::PortForward(sandbox)) => {
            let (inner, _tasks) = tunnel::open(connection).await;
            if let Some(session) = start(inner, hangup) {
                port_forward::serve(session, sandbox.clone(), streams).await;
            }
        }
        // The handshake does not make other pairs.
        _ => tracing::error!(?spoken, "protocol does not fit the session"),
    }
}

fn start<C>(connection: C, hangup: Arc<Hangup>) -> Option<Session>
where
    C: AsyncRead + AsyncWrite + Send + 'static,
{
    match Session::start(connection, hangup) {
        Ok(session) => Some(session),
        Err(error) => {
            tracing::error!(%error, "cannot start a SPDY session");
            None
        }
    }
}

/// True when the work was done, false when the client was gone before.
async fn until(gone: impl Future<Output = ()>, work: impl Future<Output = ()>) -> bool {
    tokio::select! {
        biased;
        () = work => true,
        () = gone => {
            tracing::info!("streaming client went away");
            false
        }
    }
}

fn stdio(wish: &Wish) -> Stdio {
    match wish {
        Wish::Exec(exec) => exec.stdio,
        Wish::Attach(attach) => attach.stdio,
        Wish::PortForward(_) => Stdio {
            stdin: false,
            stdout: false,
            stderr: false,
            tty: false,
        },
    }
}

async fn command(streams: &dyn Streams, wish: &Wish, channels: Channels) {
    let process: Result<Process, StreamError> = match wish {
        Wish::Exec(exec) => streams.exec(exec).await,
        Wish::Attach(attach) => streams.attach(attach).await,
        Wish::PortForward(_) => Err(StreamError("a port-forward has no process".into())),
    };
    remote_command::serve(process, channels).await;
}

async fn spdy_command(mut session: Session, wish: &Wish, style: Style, streams: &dyn Streams) {
    let collected = timeout(STREAM_PATIENCE, collect(&mut session, stdio(wish), style)).await;
    let Ok(Some(channels)) = collected else {
        return tracing::debug!("streaming client did not open all its streams");
    };
    // Late streams are nobody's.
    let gone = session.gone();
    if until(gone, command(streams, wish, channels)).await {
        session.close().await;
    }
}

/// Waits for the streams that belong to the session; others are refused. `None` when the client is gone.
async fn collect(session: &mut Session, stdio: Stdio, style: Style) -> Option<Channels> {
    let mut missing = vec!["error"];
    // The protocols before v4 that are spoken know no sizes.
    let sizes = stdio.tty && style == Style::Json;
    for (name, wanted) in [
        ("stdin", stdio.stdin),
        ("stdout", stdio.stdout),
        ("stderr", stdio.stderr && !stdio.tty),
        ("resize", sizes),
    ] {
        if wanted {
            missing.push(name);
        }
    }
    let (mut stdin, mut stdout, mut stderr, mut error, mut resize) = (None, None, None, None, None);
    while !missing.is_empty() {
        let stream = session.accept().await?;
        let kind = value(&stream.headers, "streamtype")
            .unwrap_or_default()
            .to_owned();
        let Some(place) = missing.iter().position(|name| *name == kind) else {
            tracing::debug!(kind, "stream refused");
            stream.outbound.reset().await;
            continue;
        };
        missing.remove(place);
        let Stream {
            inbound, outbound, ..
        } = stream;
        match kind.as_str() {
            "stdin" => stdin = Some(inbound),
            "stdout" => stdout = Some(outbound),
            "stderr" => stderr = Some(outbound),
            "resize" => resize = Some(inbound),
            _ => error = Some(outbound),
        }
    }
    Some(Channels {
        stdin,
        stdout,
        stderr,
        error: error?,
        resize,
        style,
    })
}
