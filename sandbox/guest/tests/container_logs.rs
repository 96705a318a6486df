//! Logs against an agent that breaks connections, while the writer crashes, disks fill and files rotate.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod fake_agent;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use caisson_agent_api::stream::Kind;
use caisson_guest::{
    GuestClient,
    logs::{ContainerLog, LogTarget},
};
use fake_agent::{FakeAgent, Output};
use proptest::prelude::*;

const LONG: Duration = Duration::from_secs(60);

struct Rig {
    dir: tempfile::TempDir,
    agent: FakeAgent,
    client: GuestClient,
    stdout: Arc<Output>,
    stderr: Arc<Output>,
}

impl Rig {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let agent = FakeAgent::start(dir.path());
        let (client, _) = GuestClient::connect(&agent.socket, LONG).await.unwrap();
        Self {
            stdout: agent.shared.output("c", "", Kind::Stdout),
            stderr: agent.shared.output("c", "", Kind::Stderr),
            dir,
            agent,
            client,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("pods/c/0.log")
    }

    fn target(&self) -> LogTarget {
        LogTarget {
            container_id: "c".into(),
            terminal: false,
            path: Some(self.path()),
            checkpoint: self.dir.path().join("checkpoint"),
        }
    }

    async fn start(&self) -> ContainerLog {
        ContainerLog::start(self.client.clone(), self.target())
            .await
            .unwrap()
    }
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    tokio::time::timeout(LONG, async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .unwrap_or_else(|_| panic!("never came: {what}"));
}

/// What a stream's records say, put together; panics on anything that is not a record.
fn decoded(log: &[u8], stream: &str) -> Vec<u8> {
    let mut content = Vec::new();
    for record in log.split_inclusive(|&b| b == b'\n') {
        let record = record.strip_suffix(b"\n").expect("a torn record");
        let mut fields = record.splitn(4, |&b| b == b' ');
        let time = std::str::from_utf8(fields.next().unwrap()).unwrap();
        assert!(time.len() == 30 && time.ends_with('Z'), "{time}");
        let (name, tag, text) = (
            fields.next().unwrap(),
            fields.next().unwrap(),
            fields.next().unwrap(),
        );
        assert!(text.len() <= 16384);
        if name == stream.as_bytes() {
            content.extend_from_slice(text);
            if tag == b"F" {
                content.push(b'\n');
            }
        }
    }
    content
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[tokio::test]
async fn lines_of_both_streams_are_written_and_acknowledged() {
    let rig = Rig::new().await;
    let log = rig.start().await;
    rig.stdout.write(b"out\n").await;
    rig.stderr.write(b"err\nlast").await;
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await);
    assert_eq!(decoded(&read(&rig.path()), "stdout"), b"out\n");
    assert_eq!(decoded(&read(&rig.path()), "stderr"), b"err\nlast\n");
    until("acknowledgement", || {
        rig.stdout.unacknowledged() + rig.stderr.unacknowledged() == 0
    })
    .await;
    assert_eq!(log.failure().await, None);
}

#[tokio::test]
async fn an_unfinished_line_is_not_acknowledged_before_it_is_written() {
    let rig = Rig::new().await;
    let log = rig.start().await;
    rig.stdout.write(b"one\ntw").await;
    until("acknowledgement of the line", || rig.stdout.unacknowledged() == 2).await;
    drop(log);
    let log = rig.start().await;
    rig.stdout.write(b"o\n").await;
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await);
    assert_eq!(decoded(&read(&rig.path()), "stdout"), b"one\ntwo\n");
}

#[tokio::test]
async fn after_reopen_lines_go_to_the_new_file() {
    let rig = Rig::new().await;
    let log = rig.start().await;
    rig.stdout.write(b"old\n").await;
    until("the first line", || rig.stdout.unacknowledged() == 0).await;
    let rotated = rig.path().with_extension("log.1");
    std::fs::rename(rig.path(), &rotated).unwrap();
    log.reopen().await.unwrap();
    rig.stdout.write(b"new\n").await;
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await);
    assert_eq!(decoded(&read(&rotated), "stdout"), b"old\n");
    assert_eq!(decoded(&read(&rig.path()), "stdout"), b"new\n");
    log.reopen().await.unwrap();
}

#[tokio::test]
async fn a_full_disk_blocks_the_container_and_loses_nothing() {
    let rig = Rig::new().await;
    std::fs::create_dir_all(rig.path().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", rig.path()).unwrap();
    let log = rig.start().await;
    let input = b"precious line\n".repeat(60_000);
    let writer = tokio::spawn({
        let (stdout, input) = (Arc::clone(&rig.stdout), input.clone());
        async move { stdout.write(&input).await }
    });
    tokio::time::timeout(LONG, async {
        while log.failure().await.is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert!(log.failure().await.unwrap().contains("0.log"));
    assert!(!writer.is_finished());
    std::fs::remove_file(rig.path()).unwrap();
    log.reopen().await.unwrap();
    writer.await.unwrap();
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await, "{:?}", log.failure().await);
    assert_eq!(decoded(&read(&rig.path()), "stdout"), input);
}

#[tokio::test]
async fn a_broken_connection_does_not_acknowledge_what_is_not_in_the_file() {
    let rig = Rig::new().await;
    std::fs::create_dir_all(rig.path().parent().unwrap()).unwrap();
    std::os::unix::fs::symlink("/dev/full", rig.path()).unwrap();
    rig.agent.shared.break_after.store(20_000, Ordering::SeqCst);
    let log = rig.start().await;
    let input = b"precious line\n".repeat(10_000);
    rig.stdout.write(&input).await;
    until("some broken connections", || {
        rig.agent.shared.connections.load(Ordering::SeqCst) > 5
    })
    .await;
    assert_eq!(rig.stdout.unacknowledged(), input.len());
    // Another daemon finds it all.
    drop(log);
    rig.agent.shared.break_after.store(0, Ordering::SeqCst);
    std::fs::remove_file(rig.path()).unwrap();
    let log = rig.start().await;
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await, "{:?}", log.failure().await);
    assert_eq!(decoded(&read(&rig.path()), "stdout"), input);
}

#[tokio::test]
async fn without_a_path_output_is_read_and_dropped() {
    let rig = Rig::new().await;
    let target = LogTarget {
        path: None,
        terminal: true,
        ..rig.target()
    };
    let log = ContainerLog::start(rig.client.clone(), target).await.unwrap();
    rig.stdout.write(&vec![b'x'; 1 << 20]).await;
    rig.stdout.end();
    assert!(log.drained(LONG).await);
    assert!(!rig.path().exists());
}

#[tokio::test]
async fn output_that_the_agent_lost_is_skipped_and_the_rest_is_written() {
    let rig = Rig::new().await;
    rig.stdout.write(b"gone\nkept\n").await;
    rig.stdout.lose(5);
    rig.stdout.end();
    rig.stderr.end();
    let log = rig.start().await;
    assert!(log.drained(LONG).await);
    assert_eq!(decoded(&read(&rig.path()), "stdout"), b"kept\n");
}

#[tokio::test]
async fn a_container_that_the_agent_does_not_know_ends_the_copy_with_a_reason() {
    let rig = Rig::new().await;
    let target = LogTarget {
        container_id: "unknown".into(),
        ..rig.target()
    };
    let log = ContainerLog::start(rig.client.clone(), target).await.unwrap();
    assert!(!log.drained(LONG).await);
    assert!(log.failure().await.unwrap().contains("no such stream"));
}

#[tokio::test]
async fn the_death_of_the_vm_ends_the_copy() {
    let rig = Rig::new().await;
    let log = rig.start().await;
    rig.stdout.write(b"last words").await;
    until("the connections", || {
        rig.agent.shared.connections.load(Ordering::SeqCst) == 2
    })
    .await;
    let path = rig.path();
    drop(rig.agent);
    assert!(!log.drained(LONG).await);
    assert!(log.failure().await.is_some());
    let written = decoded(&read(&path), "stdout");
    assert!(written.is_empty() || written == b"last words\n", "{written:?}");
}

/// One daemon's life: what is written to each stream before it dies.
#[derive(Debug, Clone)]
struct Life {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    /// Wait until everything has been acknowledged before the death, or die at once.
    settled: bool,
    /// Bytes behind the checkpoint that the death leaves in the file.
    torn: usize,
}

fn text(longest: usize) -> impl Strategy<Value = Vec<u8>> {
    (
        0..longest,
        proptest::collection::vec(0usize..20_000, 0..12),
        any::<u8>(),
    )
        .prop_map(|(len, newlines, seed)| {
            let mut bytes: Vec<u8> = (0..len)
                .map(|i| b'a' + ((i + usize::from(seed)) % 26) as u8)
                .collect();
            for at in newlines {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = b'\n';
                }
            }
            bytes
        })
}

fn life() -> impl Strategy<Value = Life> {
    (text(60_000), text(3_000), any::<bool>(), 0usize..40).prop_map(|(stdout, stderr, settled, torn)| Life {
        stdout,
        stderr,
        settled,
        torn,
    })
}

async fn live_and_die(lives: Vec<Life>, frame: usize, break_after: usize) {
    let rig = Rig::new().await;
    rig.agent.shared.frame.store(frame, Ordering::SeqCst);
    rig.agent.shared.break_after.store(break_after, Ordering::SeqCst);
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    for life in lives {
        let log = rig.start().await;
        rig.stdout.write(&life.stdout).await;
        rig.stderr.write(&life.stderr).await;
        stdout.extend(life.stdout);
        stderr.extend(life.stderr);
        if life.settled {
            // At most the beginning of a line is held back.
            until("acknowledgements", || {
                rig.stdout.unacknowledged() <= 16384 && rig.stderr.unacknowledged() <= 16384
            })
            .await;
        }
        drop(log);
        let lock = std::fs::File::open(rig.dir.path().join("checkpoint")).unwrap();
        lock.lock().unwrap();
        use std::io::Write;
        let mut file = std::fs::OpenOptions::new().append(true).open(rig.path()).unwrap();
        file.write_all(&b"2016-10-06T00:17:09.669794202Z stdout F"[..life.torn.min(39)])
            .unwrap();
    }
    let log = rig.start().await;
    rig.stdout.end();
    rig.stderr.end();
    assert!(log.drained(LONG).await, "{:?}", log.failure().await);
    let file = read(&rig.path());
    for (name, mut expected) in [("stdout", stdout), ("stderr", stderr)] {
        // The unterminated last line is a full record.
        if expected.last().is_some_and(|&b| b != b'\n') {
            expected.push(b'\n');
        }
        assert!(
            decoded(&file, name) == expected,
            "{name}: not what was written, exactly once"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_byte_is_in_the_log_once_through_broken_connections_and_crashes(
        lives in proptest::collection::vec(life(), 1..4),
        frame in prop_oneof![Just(0usize), 100usize..5_000],
        break_after in prop_oneof![Just(0usize), 40_000usize..90_000],
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(live_and_die(lives, frame, break_after));
    }
}
