//! A client of streaming sessions, written by hand from the specifications and used by tests here and end to end: SPDY/3.1, and
//! WebSocket frames. It shares nothing with the server, so that a mistake cannot hide in both.
#![allow(
    dead_code,
    missing_docs,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test binary uses its part; helpers of tests fail as tests do"
)]

use std::{
    collections::{HashMap, HashSet},
    io,
    time::Duration,
};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
};

/// Longest wait for anything.
pub const PATIENCE: Duration = Duration::from_secs(120);

const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow \
authorization cache-control connection content-base content-encoding content-language content-length content-location content-md5 \
content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since \
last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer retry-after server te trailer \
transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie \
keep-alive origin";

const TAIL: &str = "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative \
Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not \
Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMTchunked,\
text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivatemax-age=gzip,\
deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.";

fn dictionary() -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in WORDS.split(' ') {
        let word = word.replace('_', " ");
        bytes.extend((word.len() as u32).to_be_bytes());
        bytes.extend(word.as_bytes());
    }
    bytes.extend(TAIL.as_bytes());
    bytes
}

/// What an HTTP request was answered with, and the connection behind it.
pub struct Upgraded {
    pub status: u16,
    pub head: String,
    pub stream: TcpStream,
}

/// Asks for an upgrade of `http://address/path`.
pub async fn upgrade(url: &str, method: &str, headers: &[(&str, &str)]) -> io::Result<Upgraded> {
    let rest = url.strip_prefix("http://").unwrap();
    let (address, path) = rest.split_once('/').unwrap();
    let mut stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let mut request = format!("{method} /{path} HTTP/1.1\r\nHost: {address}\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok(Upgraded { status, head, stream })
}

/// What the server says.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Reply(u32),
    Data { stream: u32, bytes: Vec<u8>, fin: bool },
    Reset { stream: u32, status: u32 },
    Ping(u32),
    GoAway,
    Window { stream: u32, delta: u32 },
}

/// A SPDY/3.1 session.
pub struct Spdy {
    pub reader: OwnedReadHalf,
    pub writer: OwnedWriteHalf,
    deflate: Compress,
    inflate: Decompress,
    next: u32,
}

impl Spdy {
    /// Connects as kubelet does.
    pub async fn connect(url: &str, protocol: &str) -> io::Result<Self> {
        let upgraded = upgrade(
            url,
            "POST",
            &[
                ("Connection", "Upgrade"),
                ("Upgrade", "SPDY/3.1"),
                ("X-Stream-Protocol-Version", protocol),
                ("Content-Length", "0"),
            ],
        )
        .await?;
        assert_eq!(upgraded.status, 101, "{}", upgraded.head);
        let (reader, writer) = upgraded.stream.into_split();
        let mut deflate = Compress::new(Compression::default(), true);
        deflate.set_dictionary(&dictionary()).unwrap();
        Ok(Self {
            reader,
            writer,
            deflate,
            inflate: Decompress::new(true),
            next: 1,
        })
    }

    /// The id of the stream that is opened next.
    pub fn set_next(&mut self, id: u32) {
        self.next = id;
    }

    pub async fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) {
        let mut frame = vec![0x80, 3];
        frame.extend(kind.to_be_bytes());
        frame.extend((u32::from(flags) << 24 | payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        self.writer.write_all(&frame).await.unwrap();
    }

    /// Opens a stream; its id.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let id = self.next;
        self.next += 2;
        let mut plain = (headers.len() as u32).to_be_bytes().to_vec();
        for (name, value) in headers {
            for part in [name, value] {
                plain.extend((part.len() as u32).to_be_bytes());
                plain.extend(part.as_bytes());
            }
        }
        let mut payload = id.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        let mut block = Vec::with_capacity(plain.len() + 256);
        self.deflate
            .compress_vec(&plain, &mut block, FlushCompress::Sync)
            .unwrap();
        payload.extend(block);
        self.control(1, 0, &payload).await;
        id
    }

    pub async fn data(&mut self, stream: u32, bytes: &[u8], fin: bool) -> io::Result<()> {
        let mut head = stream.to_be_bytes().to_vec();
        head.extend((u32::from(fin) << 24 | bytes.len() as u32).to_be_bytes());
        self.writer.write_all(&head).await?;
        self.writer.write_all(bytes).await
    }

    pub async fn ping(&mut self, id: u32) {
        self.control(6, 0, &id.to_be_bytes()).await;
    }

    pub async fn reset(&mut self, stream: u32) {
        let payload = [stream.to_be_bytes(), 5u32.to_be_bytes()].concat();
        self.control(3, 0, &payload).await;
    }

    /// The next frame; `None` at the connection's end.
    pub async fn next(&mut self) -> Option<Said> {
        tokio::time::timeout(PATIENCE, self.frame())
            .await
            .expect("the server is silent")
    }

    async fn frame(&mut self) -> Option<Said> {
        let mut head = [0; 8];
        self.reader.read_exact(&mut head).await.ok()?;
        let word = |at: usize, from: &[u8]| u32::from_be_bytes(from[at..at + 4].try_into().unwrap());
        let (first, second) = (word(0, &head), word(4, &head));
        let mut payload = vec![0; (second & 0xff_ffff) as usize];
        self.reader.read_exact(&mut payload).await.ok()?;
        let fin = second >> 24 & 1 == 1;
        if first >> 31 == 0 {
            return Some(Said::Data {
                stream: first,
                bytes: payload,
                fin,
            });
        }
        assert_eq!(first >> 16, 0x8003, "not SPDY/3");
        Some(match first & 0xffff {
            2 => {
                self.headers(&payload[4..]);
                Said::Reply(word(0, &payload))
            }
            3 => Said::Reset {
                stream: word(0, &payload),
                status: word(4, &payload),
            },
            6 => Said::Ping(word(0, &payload)),
            7 => Said::GoAway,
            9 => Said::Window {
                stream: word(0, &payload),
                delta: word(4, &payload),
            },
            other => panic!("frame of type {other}"),
        })
    }

    fn headers(&mut self, block: &[u8]) {
        let mut plain = Vec::with_capacity(4096);
        let begin = self.inflate.total_in();
        loop {
            let taken = (self.inflate.total_in() - begin) as usize;
            match self
                .inflate
                .decompress_vec(&block[taken..], &mut plain, FlushDecompress::Sync)
            {
                Ok(_) => break,
                Err(_) => {
                    self.inflate.set_dictionary(&dictionary()).unwrap();
                }
            }
        }
        assert_eq!(plain, [0; 4], "an empty header block");
    }

    /// The first data of any of these streams.
    pub async fn data_of(&mut self, stream: u32) -> Option<(Vec<u8>, bool)> {
        loop {
            match self.next().await? {
                Said::Data {
                    stream: of,
                    bytes,
                    fin,
                } if of == stream => return Some((bytes, fin)),
                Said::Reset { stream: of, .. } if of == stream => return None,
                _ => {}
            }
        }
    }
}

/// What came of a command.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    /// The error stream.
    pub status: String,
    /// The session was ended with GOAWAY.
    pub goodbye: bool,
}

/// Streams of a command over SPDY.
pub struct Command {
    pub spdy: Spdy,
    pub ids: HashMap<&'static str, u32>,
    /// Streams that the server has ended.
    pub ended: HashSet<u32>,
    /// The server may end streams by resetting them.
    pub lenient: bool,
}

impl Command {
    /// Opens these of stdin, stdout, stderr, resize, and the error stream, in the order of the clients in the field.
    pub async fn begin(url: &str, streams: &[&'static str]) -> io::Result<Self> {
        let mut spdy = Spdy::connect(url, "v4.channel.k8s.io").await?;
        let mut ids = HashMap::new();
        for name in ["error"].iter().chain(streams) {
            let id = spdy.open(&[("streamtype", name)]).await;
            ids.insert(*name, id);
        }
        Ok(Self {
            spdy,
            ids,
            ended: HashSet::new(),
            lenient: false,
        })
    }

    pub fn id(&self, name: &str) -> u32 {
        self.ids[name]
    }

    pub async fn send(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.spdy.data(self.ids[name], bytes, false).await
    }

    pub async fn end(&mut self, name: &str) {
        self.spdy.data(self.ids[name], &[], true).await.unwrap();
    }

    /// Reads until `wanted` is in standard output; all of it so far.
    pub async fn read_until(&mut self, wanted: &str) -> String {
        let mut all = Vec::new();
        loop {
            let text = String::from_utf8_lossy(&all);
            if text.contains(wanted) {
                return text.into_owned();
            }
            match self.spdy.next().await {
                Some(Said::Data {
                    stream,
                    bytes,
                    fin: true,
                }) if bytes.is_empty() => {
                    self.ended.insert(stream);
                }
                Some(Said::Data { stream, bytes, .. }) if stream == self.ids["stdout"] => all.extend(bytes),
                Some(Said::Data { stream, bytes, .. }) if !bytes.is_empty() => {
                    panic!("on {stream}: {}", String::from_utf8_lossy(&bytes))
                }
                Some(_) => {}
                None => panic!("the connection ended after {text:?}"),
            }
        }
    }

    /// Reads to the end of everything, checking that each stream ends once.
    pub async fn finish(mut self) -> Outcome {
        let mut outcome = Outcome::default();
        let mut status = Vec::new();
        let mut ended = std::mem::take(&mut self.ended);
        while let Some(said) = self.spdy.next().await {
            match said {
                Said::Data { stream, bytes, fin } => {
                    assert!(!ended.contains(&stream), "data on {stream} after its end");
                    let name = self.ids.iter().find(|(_, id)| **id == stream).expect("ours").0;
                    match *name {
                        "stdout" => outcome.stdout.extend(bytes),
                        "stderr" => outcome.stderr.extend(bytes),
                        "error" => status.extend(bytes),
                        other => assert!(bytes.is_empty(), "data on {other}"),
                    }
                    if fin {
                        ended.insert(stream);
                    }
                }
                Said::GoAway => {
                    outcome.goodbye = true;
                    break;
                }
                Said::Reset { stream, .. } if self.lenient => {
                    ended.insert(stream);
                }
                Said::Reset { stream, status } => panic!("stream {stream} was reset: {status}"),
                Said::Reply(_) | Said::Ping(_) | Said::Window { .. } => {}
            }
        }
        for name in ["stdout", "stderr", "error"] {
            if let Some(id) = self.ids.get(name) {
                assert!(ended.contains(id), "{name} has no end");
            }
        }
        outcome.status = String::from_utf8(status).unwrap();
        outcome
    }
}

/// A WebSocket.
pub struct WebSocket {
    pub stream: TcpStream,
}

/// One message or control frame of a WebSocket.
#[derive(Debug, PartialEq, Eq)]
pub enum Message {
    Text(Vec<u8>),
    Binary(Vec<u8>),
    Pong(Vec<u8>),
    Close(u16),
}

impl WebSocket {
    pub async fn connect(url: &str, protocol: &str) -> io::Result<Self> {
        let upgraded = upgrade(
            url,
            "GET",
            &[
                ("Connection", "Upgrade"),
                ("Upgrade", "websocket"),
                ("Sec-WebSocket-Version", "13"),
                ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
                ("Sec-WebSocket-Protocol", protocol),
            ],
        )
        .await?;
        assert_eq!(upgraded.status, 101, "{}", upgraded.head);
        assert!(upgraded.head.contains(protocol), "{}", upgraded.head);
        Ok(Self {
            stream: upgraded.stream,
        })
    }

    async fn frame(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        let mut frame = vec![0x80 | opcode];
        match payload.len() {
            short @ 0..126 => frame.push(0x80 | short as u8),
            middle @ 126..65536 => {
                frame.push(0x80 | 126);
                frame.extend((middle as u16).to_be_bytes());
            }
            long => {
                frame.push(0x80 | 127);
                frame.extend((long as u64).to_be_bytes());
            }
        }
        let mask = [0x1a, 0x2b, 0x3c, 0x4d];
        frame.extend(mask);
        frame.extend(
            payload
                .iter()
                .zip(mask.iter().cycle())
                .map(|(byte, mask)| byte ^ mask),
        );
        self.stream.write_all(&frame).await
    }

    /// A binary message on a channel.
    pub async fn send(&mut self, channel: u8, bytes: &[u8]) -> io::Result<()> {
        self.frame(2, &[&[channel], bytes].concat()).await
    }

    pub async fn text(&mut self, text: &str) -> io::Result<()> {
        self.frame(1, text.as_bytes()).await
    }

    pub async fn ping(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.frame(9, bytes).await
    }

    /// The next message; `None` at the connection's end.
    pub async fn next(&mut self) -> Option<Message> {
        tokio::time::timeout(PATIENCE, self.message())
            .await
            .expect("the server is silent")
    }

    async fn message(&mut self) -> Option<Message> {
        let mut head = [0; 2];
        self.stream.read_exact(&mut head).await.ok()?;
        assert_eq!(head[0] & 0x80, 0x80, "whole messages only");
        assert_eq!(head[1] & 0x80, 0, "servers do not mask");
        let length = match head[1] {
            126 => u64::from(self.stream.read_u16().await.ok()?),
            127 => self.stream.read_u64().await.ok()?,
            short => u64::from(short),
        };
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload).await.ok()?;
        Some(match head[0] & 0x0f {
            1 => Message::Text(payload),
            2 => Message::Binary(payload),
            8 => Message::Close(u16::from_be_bytes([payload[0], payload[1]])),
            10 => Message::Pong(payload),
            other => panic!("opcode {other}"),
        })
    }

    /// Reads everything of a command to the connection's end.
    pub async fn finish(mut self) -> Outcome {
        let (mut outcome, mut status) = (Outcome::default(), Vec::new());
        while let Some(message) = self.next().await {
            match message {
                Message::Binary(bytes) => match bytes[0] {
                    1 => outcome.stdout.extend(&bytes[1..]),
                    2 => outcome.stderr.extend(&bytes[1..]),
                    3 => status.extend(&bytes[1..]),
                    other => panic!("channel {other}"),
                },
                Message::Close(code) => {
                    assert_eq!(code, 1000, "the close code of a normal end");
                    outcome.goodbye = true;
                    break;
                }
                Message::Pong(_) => {}
                Message::Text(_) => panic!("a text message"),
            }
        }
        outcome.status = String::from_utf8(status).unwrap();
        outcome
    }
}
