//! A registry that answers what the test wants, byte by byte if need be.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpListener,
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

use crate::fixture::Handler;

#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: String,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub(crate) fn range_start(&self) -> Option<usize> {
        self.header("range")
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse()
            .ok()
    }
}

/// Bytes for the connection, and what happens to it then.
pub(crate) struct Answer {
    bytes: Vec<u8>,
    then: Then,
}

enum Then {
    Close,
    Hang,
    /// Sends the last bytes again and again until the client goes away.
    Repeat,
}

impl Answer {
    pub(crate) fn new(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut head = format!("HTTP/1.1 {status} Status\r\nConnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        {
            head.push_str(&format!("Content-Length: {}\r\n", body.len()));
        }
        let bytes = [head.as_bytes(), b"\r\n", body].concat();
        Self {
            bytes,
            then: Then::Close,
        }
    }

    pub(crate) fn ok(content_type: &str, body: &[u8]) -> Self {
        Self::new(200, &[("Content-Type", content_type)], body)
    }

    pub(crate) fn status(status: u16) -> Self {
        Self::new(status, &[], b"")
    }

    pub(crate) fn partial(blob: &[u8], start: usize) -> Self {
        let range = format!("bytes {start}-{}/{}", blob.len() - 1, blob.len());
        Self::new(206, &[("Content-Range", &range)], &blob[start..])
    }

    pub(crate) fn raw(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec(),
            then: Then::Close,
        }
    }

    /// The connection ends after so many bytes of the body.
    pub(crate) fn cut_after(mut self, body_bytes: usize) -> Self {
        let head = self.head_len();
        self.bytes.truncate(head + body_bytes);
        self
    }

    /// The connection stays open after so many bytes of the body, and nothing comes.
    pub(crate) fn hang_after(self, body_bytes: usize) -> Self {
        Self {
            then: Then::Hang,
            ..self.cut_after(body_bytes)
        }
    }

    /// The body never ends.
    pub(crate) fn endless(byte: u8) -> Self {
        let chunk = [
            format!("{:x}\r\n", 1 << 16).as_bytes(),
            &vec![byte; 1 << 16],
            b"\r\n",
        ]
        .concat();
        let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        Self {
            bytes: [&head[..], &chunk].concat(),
            then: Then::Repeat,
        }
    }

    fn head_len(&self) -> usize {
        self.bytes
            .windows(4)
            .position(|window| window == b"\r\n\r\n")
            .map_or(0, |at| at + 4)
    }
}

/// A listening registry; ends when dropped.
pub(crate) struct Fake {
    pub(crate) address: String,
    requests: Arc<Mutex<Vec<Request>>>,
    task: JoinHandle<()>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Fake {
    pub(crate) async fn start(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        Self::listen(Arc::new(handler), None).await
    }

    pub(crate) async fn start_tls(
        tls: TlsAcceptor,
        handler: impl Fn(&Request) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::listen(Arc::new(handler), Some(tls)).await
    }

    async fn listen(handler: Handler, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else {
                    return;
                };
                let (handler, log, tls) = (handler.clone(), log.clone(), tls.clone());
                connections.spawn(async move {
                    match tls {
                        None => serve(stream, handler, log).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                serve(stream, handler, log).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            requests,
            task,
        }
    }

    pub(crate) fn reference(&self, rest: &str) -> String {
        format!("{}/{rest}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// How many requests had this in their path.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.requests()
            .iter()
            .filter(|request| request.path.contains(part))
            .count()
    }
}

async fn serve(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    handler: Handler,
    log: Arc<Mutex<Vec<Request>>>,
) {
    let Some(request) = read_request(&mut stream).await else {
        return;
    };
    log.lock().unwrap().push(request.clone());
    let answer = handler(&request);
    let mut sent = stream.write_all(&answer.bytes).await;
    match answer.then {
        Then::Close => {}
        Then::Hang => std::future::pending::<()>().await,
        Then::Repeat => {
            let chunk = answer.bytes[answer.head_len()..].to_vec();
            while sent.is_ok() {
                sent = stream.write_all(&chunk).await;
            }
        }
    }
    let _ = stream.shutdown().await;
}

async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let text = String::from_utf8(head).ok()?;
    let mut lines = text.lines();
    let mut first = lines.next()?.split(' ');
    let (method, target) = (first.next()?.to_owned(), first.next()?);
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let headers: BTreeMap<_, _> = lines
        .filter_map(|line| line.split_once(':'))
        .map(|(name, value)| (name.to_lowercase(), value.trim().to_owned()))
        .collect();
    let length = headers
        .get("content-length")
        .and_then(|length| length.parse().ok())
        .unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.ok()?;
    let body = String::from_utf8(body).ok()?;
    Some(Request {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body,
    })
}
