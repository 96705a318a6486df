//! `make bench-streaming`: what exec sessions cost: throughput, round trips, many at once, many after each other; ours and
//! containerd's with runc in the same run, by the same client.
//!
//! ```text
//! bench_streaming [MIB [SESSIONS]]
//! ```
//! Prints Markdown for docs/performance.md. CPU time is that of the runtime and of everything it has started, the container included,
//! from a cgroup's counter; the client's is left out.

#[path = "../../../../cri-server/streaming/tests/client/mod.rs"]
mod client;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    containerd::Containerd,
    cri::{Cri, container, pod},
    critest_images,
    daemon::{Daemon, Product},
    figures::{Account, cpu_of, machine, ms, quantile},
    host::Host,
    image,
    registry::Registry,
    run,
};
use client::{Command, WebSocket};
use k8s_cri::v1 as cri;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};

/// Bytes that clients in the field send at once.
const CHUNK: usize = 32 << 10;
/// Period of the bytes that are sent: no power of two, so that a lost or doubled piece shows.
const PERIOD: usize = 65_521;
const ROUND_TRIPS: usize = 1000;
const CONCURRENT: usize = 100;
/// The one port that the mirrors name.
const REGISTRY_PORT: u16 = 5000;

/// What is measured: a runtime with a running container.
struct Subject {
    title: String,
    daemon: u32,
    account: Account,
    cri: Cri,
    container: String,
    /// Not the peer: it also speaks WebSocket, and nothing of it may fail.
    ours: bool,
}

/// One line of the table.
struct Line {
    what: String,
    figure: String,
    cpu: Duration,
    daemon: Duration,
    count: usize,
}

/// How much is done.
#[derive(Clone, Copy)]
struct Amount {
    /// Sent through, in and out.
    mib: usize,
    /// After each other.
    sessions: usize,
}

fn main() -> Result<()> {
    let number = |at: usize, default: usize| {
        std::env::args()
            .nth(at)
            .map_or(Ok(default), |word| word.parse())
            .with_context(|| format!("argument {at} is no number"))
    };
    let amount = Amount {
        mib: number(1, 1024)?,
        sessions: number(2, 1000)?,
    };
    Containerd::fetch()?;
    println!("Machine: {}\n{}", machine()?, Containerd::versions()?);
    println!("{} MiB each way, {} sessions", amount.mib, amount.sessions);
    // A host for each, since namespaces are the thread's.
    for measure in [ours, theirs] {
        std::thread::scope(|scope| scope.spawn(|| measure(amount)).join())
            .map_err(|_| anyhow::anyhow!("a run panicked"))??;
    }
    Ok(())
}

fn ours(amount: Amount) -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start(&host.dir().join("registry")).await?;
        let image = registry.push("bench/busybox", "1", &image::busybox()?)?;
        let daemon = Daemon::start(&host, &Product::find()?, &[]).await?;
        let account = Account::of(daemon.pid(), "caisson")?;
        let mut subject = Subject {
            title: "caisson".into(),
            daemon: daemon.pid(),
            account,
            cri: daemon.cri().await?,
            container: String::new(),
            ours: true,
        };
        subject.measure(&host, &image, amount).await
    })
}

fn theirs(amount: Amount) -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let registry = Registry::start_at(&host.dir().join("registry"), REGISTRY_PORT).await?;
        critest_images::push_all(&registry)?;
        let image = registry.push("bench/busybox", "1", &image::busybox()?)?;
        let containerd = Containerd::start(&host, &critest_images::REGISTRIES, REGISTRY_PORT).await?;
        let account = Account::of(containerd.pid(), "containerd")?;
        let mut subject = Subject {
            title: "containerd".into(),
            daemon: containerd.pid(),
            account,
            cri: containerd.cri().await?,
            container: String::new(),
            ours: false,
        };
        subject.measure(&host, &image, amount).await
    })
}

impl Subject {
    async fn measure(&mut self, host: &Host, image: &str, amount: Amount) -> Result<()> {
        self.cri.pull(image).await?;
        let mut config = pod(host, "bench");
        config.linux.get_or_insert_default().cgroup_parent = self.account.cgroup_parent();
        let id = self.cri.run_pod(&config).await?;
        self.container = self
            .cri
            .run(&id, &container("sleeper", image, &["sleep", "1000000"]), &config)
            .await?;
        println!(
            "\n| {} | figure | CPU s | of it the daemon | CPU each, ms |\n|---|---:|---:|---:|---:|",
            self.title
        );
        let outcome = self.lines(amount).await;
        self.cri.stop_pod(&id).await?;
        self.cri.remove_pod(&id).await?;
        outcome
    }

    async fn lines(&mut self, amount: Amount) -> Result<()> {
        let mib = amount.mib;
        let bytes = mib << 20;
        self.line("through cat, SPDY", mib, async |subject| {
            let url = subject.exec_url(&["cat"]).await?;
            let began = Instant::now();
            through_spdy(&url, bytes).await?;
            Ok(rate(bytes, began))
        })
        .await?;
        if self.ours {
            self.line("through cat, WebSocket", mib, async |subject| {
                let url = subject.exec_url(&["cat"]).await?;
                let began = Instant::now();
                through_websocket(&url, bytes).await?;
                Ok(rate(bytes, began))
            })
            .await?;
        }
        self.line("into the pod", mib, async |subject| {
            let url = subject.exec_url(&["sh", "-c", "cat >/dev/null"]).await?;
            let began = Instant::now();
            one_way(&url, bytes, 0).await?;
            Ok(rate(bytes, began))
        })
        .await?;
        self.line("out of the pod", mib, async |subject| {
            // Debian's busybox reads and writes byte by byte in its head.
            let words = format!("dd if=/dev/zero bs=64k count={} 2>/dev/null", bytes >> 16);
            let url = subject.exec_url(&["sh", "-c", &words]).await?;
            let began = Instant::now();
            one_way(&url, 0, bytes).await?;
            Ok(rate(bytes, began))
        })
        .await?;
        self.line("round trip of a byte", ROUND_TRIPS, async |subject| {
            let url = subject.exec_url(&["cat"]).await?;
            round_trips(&url).await
        })
        .await?;
        self.line("sessions after each other", amount.sessions, async |subject| {
            let mut times = Vec::new();
            for _ in 0..amount.sessions {
                let began = Instant::now();
                let url = subject.exec_url(&["cat"]).await?;
                session(&url, b"hello").await?;
                times.push(ms(began.elapsed()));
            }
            Ok(spread(&times))
        })
        .await?;
        self.line("sessions at once, 64 KiB each", CONCURRENT, async |subject| {
            let began = Instant::now();
            let mut urls = Vec::new();
            for _ in 0..CONCURRENT {
                urls.push(subject.exec_url(&["cat"]).await?);
            }
            let text = pattern(64 << 10);
            let sessions = urls.iter().map(|url| session(url, &text));
            for outcome in futures::future::join_all(sessions).await {
                outcome?;
            }
            Ok(format!("{:.2} s", began.elapsed().as_secs_f64()))
        })
        .await
    }

    async fn line(
        &mut self,
        what: &str,
        count: usize,
        work: impl AsyncFnOnce(&mut Self) -> Result<String>,
    ) -> Result<()> {
        let (before, daemon_before) = (self.account.spent()?, cpu_of(&self.daemon.to_string()));
        let figure = match work(self).await {
            // A peer may break a connection whose command has ended before its status is read.
            Err(error) if !self.ours => format!("failed: {error:#}"),
            outcome => outcome.with_context(|| what.to_owned())?,
        };
        let line = Line {
            what: what.into(),
            figure,
            cpu: self.account.spent()?.saturating_sub(before),
            daemon: cpu_of(&self.daemon.to_string()).saturating_sub(daemon_before),
            count,
        };
        line.print();
        Ok(())
    }

    async fn exec_url(&mut self, command: &[&str]) -> Result<String> {
        let request = cri::ExecRequest {
            container_id: self.container.clone(),
            cmd: command.iter().map(ToString::to_string).collect(),
            tty: false,
            stdin: true,
            stdout: true,
            stderr: false,
        };
        Ok(self.cri.runtime.exec(request).await?.into_inner().url)
    }
}

impl Line {
    fn print(&self) {
        #[expect(clippy::cast_precision_loss, reason = "small counts")]
        let each = ms(self.cpu) / self.count as f64;
        println!(
            "| {} | {} | {:.2} | {:.2} | {each:.2} |",
            self.what,
            self.figure,
            self.cpu.as_secs_f64(),
            self.daemon.as_secs_f64(),
        );
    }
}

fn rate(bytes: usize, began: Instant) -> String {
    #[expect(clippy::cast_precision_loss, reason = "printed without decimals")]
    let mib = (bytes >> 20) as f64;
    format!("{:.0} MiB/s", mib / began.elapsed().as_secs_f64())
}

fn spread(times: &[f64]) -> String {
    format!(
        "{:.2} ms median, {:.2} p95",
        quantile(times, 0.5),
        quantile(times, 0.95)
    )
}

fn pattern(length: usize) -> Vec<u8> {
    (0..PERIOD)
        .map(|n| u8::try_from(n * 7 % 251).unwrap_or_default())
        .cycle()
        .take(length)
        .collect()
}

/// Bytes as they must come: from a position on, as many as these.
struct Expected {
    pattern: Vec<u8>,
    at: usize,
}

impl Expected {
    fn new() -> Self {
        Self {
            pattern: pattern(PERIOD + (1 << 20)),
            at: 0,
        }
    }

    fn take(&mut self, bytes: &[u8]) -> Result<()> {
        let from = self.at % PERIOD;
        let wanted = self
            .pattern
            .get(from..from + bytes.len())
            .context("a piece of more than a MiB")?;
        ensure!(wanted == bytes, "other bytes than were sent, after {}", self.at);
        self.at += bytes.len();
        Ok(())
    }
}

/// A frame of SPDY: the stream (`None`: a control frame), whether it is its last, and the payload.
async fn frame(
    reader: &mut (impl AsyncRead + Unpin),
    payload: &mut Vec<u8>,
) -> Result<Option<(Option<u32>, bool)>> {
    let mut head = [0; 8];
    if reader.read_exact(&mut head).await.is_err() {
        return Ok(None);
    }
    let [a, b, c, d, flags, length @ ..] = head;
    let stream = u32::from_be_bytes([a, b, c, d]);
    let [x, y, z] = length;
    payload.resize(usize::try_from(u32::from_be_bytes([0, x, y, z]))?, 0);
    reader.read_exact(payload).await?;
    Ok(Some(((stream >> 31 == 0).then_some(stream), flags & 1 == 1)))
}

async fn send(writer: &mut (impl AsyncWrite + Unpin), stream: u32, bytes: usize) -> Result<()> {
    let pattern = pattern(PERIOD + CHUNK);
    let mut sent = 0;
    while sent < bytes {
        let length = CHUNK.min(bytes - sent);
        let from = sent % PERIOD;
        let mut head = [0; 8];
        head[..4].copy_from_slice(&stream.to_be_bytes());
        head[4..].copy_from_slice(&u32::try_from(length)?.to_be_bytes());
        writer.write_all(&head).await?;
        writer
            .write_all(pattern.get(from..from + length).context("a chunk too long")?)
            .await?;
        sent += length;
    }
    let [a, b, c, d] = stream.to_be_bytes();
    writer.write_all(&[a, b, c, d, 1, 0, 0, 0]).await?;
    Ok(())
}

/// Sends so many bytes through a command over SPDY, and checks each that comes back.
async fn through_spdy(url: &str, bytes: usize) -> Result<()> {
    let mut expected = Expected::new();
    over_spdy(url, bytes, |piece| expected.take(piece)).await?;
    ensure!(expected.at == bytes, "{} of {bytes} bytes came back", expected.at);
    Ok(())
}

/// Sends so many bytes, or takes so many.
async fn one_way(url: &str, there: usize, back: usize) -> Result<()> {
    let mut count = 0;
    over_spdy(url, there, |piece| {
        count += piece.len();
        Ok(())
    })
    .await?;
    ensure!(count == back, "{count} of {back} bytes came");
    Ok(())
}

async fn over_spdy(url: &str, bytes: usize, mut take: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let command = Command::begin(url, &["stdin", "stdout"]).await?;
    let (input, output, error) = (command.id("stdin"), command.id("stdout"), command.id("error"));
    let (reader, mut writer) = (command.spdy.reader, command.spdy.writer);
    let sending = send(&mut writer, input, bytes);
    let receiving = async {
        let mut reader = BufReader::with_capacity(256 << 10, reader);
        let (mut payload, mut status) = (Vec::new(), Vec::new());
        let mut open = 2;
        while open > 0 {
            let Some((stream, fin)) = frame(&mut reader, &mut payload).await? else {
                break;
            };
            if stream == Some(output) {
                take(&payload)?;
            } else if stream == Some(error) {
                status.extend_from_slice(&payload);
            }
            open -= usize::from(fin && (stream == Some(output) || stream == Some(error)));
        }
        let status = String::from_utf8_lossy(&status).into_owned();
        ensure!(status.contains("Success"), "the command ended with {status:?}");
        Ok(())
    };
    let (sent, received) = tokio::join!(sending, receiving);
    sent?;
    received
}

/// The same over WebSocket.
async fn through_websocket(url: &str, bytes: usize) -> Result<()> {
    let stream = WebSocket::connect(url, "v5.channel.k8s.io").await?.stream;
    let (reader, mut writer) = stream.into_split();
    let sending = async {
        let pattern = pattern(PERIOD + CHUNK);
        let mut sent = 0;
        while sent < bytes {
            let length = (CHUNK - 1).min(bytes - sent);
            let from = sent % PERIOD;
            // Masked with zeroes, which change nothing.
            let [high, low] = u16::try_from(length + 1)?.to_be_bytes();
            writer.write_all(&[0x82, 0xfe, high, low, 0, 0, 0, 0, 0]).await?;
            writer
                .write_all(pattern.get(from..from + length).context("a chunk too long")?)
                .await?;
            sent += length;
        }
        writer.write_all(&[0x82, 0x82, 0, 0, 0, 0, 255, 0]).await?;
        anyhow::Ok(())
    };
    let receiving = async {
        let mut reader = BufReader::with_capacity(256 << 10, reader);
        let mut expected = Expected::new();
        let mut payload = Vec::new();
        loop {
            let (opcode, short) = (reader.read_u8().await?, reader.read_u8().await?);
            let length = match short {
                126 => u64::from(reader.read_u16().await?),
                127 => reader.read_u64().await?,
                short => u64::from(short),
            };
            payload.resize(usize::try_from(length)?, 0);
            reader.read_exact(&mut payload).await?;
            match (opcode & 0x0f, payload.split_first()) {
                (2, Some((1, piece))) => expected.take(piece)?,
                (8, _) => break,
                _ => {}
            }
        }
        ensure!(expected.at == bytes, "{} of {bytes} bytes came back", expected.at);
        Ok(())
    };
    let (sent, received) = tokio::join!(sending, receiving);
    sent?;
    received
}

/// Times of a byte to an exec'd cat and back.
async fn round_trips(url: &str) -> Result<String> {
    let mut command = Command::begin(url, &["stdin", "stdout"]).await?;
    // containerd does what ours does not.
    command.lenient = true;
    command.send("stdin", b"x").await?;
    command.read_until("x").await;
    let mut times = Vec::new();
    for _ in 0..ROUND_TRIPS {
        let began = Instant::now();
        command.send("stdin", b"y").await?;
        command.read_until("y").await;
        times.push(ms(began.elapsed()));
    }
    command.end("stdin").await;
    let outcome = command.finish().await;
    ensure!(outcome.status.contains("Success"), "{}", outcome.status);
    Ok(spread(&times))
}

/// A whole session: bytes there and back, and its end.
async fn session(url: &str, bytes: &[u8]) -> Result<()> {
    let mut command = Command::begin(url, &["stdin", "stdout"]).await?;
    command.lenient = true;
    command.send("stdin", bytes).await?;
    command.end("stdin").await;
    let outcome = command.finish().await;
    ensure!(
        outcome.stdout == bytes && outcome.status.contains("Success"),
        "{} bytes came back, {}",
        outcome.stdout.len(),
        outcome.status
    );
    Ok(())
}
