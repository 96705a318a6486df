//! The client against an agent that answers, refuses, breaks connections, and dies.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

mod fake_agent;

use std::{sync::Arc, time::Duration};

use caisson_agent_api::{stream::Kind, v1};
use caisson_guest::{GuestClient, GuestError, GuestErrorKind, Reached};
use fake_agent::{FakeAgent, Shared};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};

const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(200);

async fn connected() -> (tempfile::TempDir, FakeAgent, GuestClient) {
    let dir = tempfile::tempdir().unwrap();
    let agent = FakeAgent::start(dir.path());
    let (client, hello) = GuestClient::connect(&agent.socket, LONG).await.unwrap();
    assert_eq!(hello.agent_version, "fake");
    (dir, agent, client)
}

async fn how_far(dir: &tempfile::TempDir) -> Reached {
    match GuestClient::connect(&dir.path().join("vsock.sock"), SHORT).await {
        Err(GuestError::Unreachable { reached, .. }) => reached,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_failed_connect_says_how_far_it_got() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(how_far(&dir).await, Reached::SocketAbsent);
    let listener = UnixListener::bind(dir.path().join("vsock.sock")).unwrap();
    assert_eq!(how_far(&dir).await, Reached::PortSilent(1021));
    drop(listener);
    assert_eq!(how_far(&dir).await, Reached::SocketDead);
    std::fs::remove_file(dir.path().join("vsock.sock")).unwrap();
    let agent = FakeAgent::start(dir.path());
    agent
        .shared
        .refuse
        .store(true, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(how_far(&dir).await, Reached::PortRefused(1021));
}

#[tokio::test]
async fn connect_waits_for_an_agent_that_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock.sock");
    let (early, _agent) = tokio::join!(GuestClient::connect(&socket, LONG), async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        FakeAgent::start(dir.path())
    });
    early.unwrap();
}

#[tokio::test]
async fn the_agents_refusal_arrives_with_its_code_and_words() {
    let (_dir, _agent, client) = connected().await;
    let error = client
        .create_container("c", v1::ContainerSpec::default(), LONG)
        .await
        .unwrap_err();
    assert_eq!(error.kind(), GuestErrorKind::Invalid);
    assert_eq!(
        error.to_string(),
        "CreateContainer failed in the guest: no such disk"
    );
}

#[tokio::test]
async fn a_volume_of_the_largest_size_is_taken() {
    let (_dir, agent, client) = connected().await;
    let entry = v1::VolumeEntry {
        kind: Some(v1::volume_entry::Kind::File(vec![
            7;
            caisson_agent_api::MAX_VOLUME_BYTES
        ])),
        ..Default::default()
    };
    let request = v1::PutVolumeRequest {
        volume_id: "v".into(),
        entries: vec![entry],
    };
    client.put_volume(request, LONG).await.unwrap();
    assert_eq!(agent.shared.called("PutVolume 1"), 1);
}

#[tokio::test]
async fn a_verb_ends_at_its_deadline() {
    let (_dir, _agent, client) = connected().await;
    let error = client.start_container("c", SHORT).await.unwrap_err();
    assert!(
        matches!(
            error,
            GuestError::Deadline {
                verb: "StartContainer",
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_wait_outlives_broken_connections() {
    let (_dir, agent, client) = connected().await;
    assert_eq!(client.wait_container("c").await.unwrap().exit_code, 7);
    assert_eq!(agent.shared.called("WaitContainer"), 3);
}

#[tokio::test]
async fn a_wait_ends_when_the_vm_is_gone() {
    let (_dir, agent, client) = connected().await;
    let (_told, exit) = watch::channel(None);
    agent
        .shared
        .exits
        .lock()
        .unwrap()
        .insert(("c".into(), "e".into()), exit);
    let wait = tokio::spawn(async move { client.wait_exec("c", "e").await });
    drop(agent);
    let error = wait.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), GuestErrorKind::Unreachable);
}

/// Prepares one exec session whose process prints and exits as `process` does.
fn on_exec<F>(shared: &Arc<Shared>, process: impl FnOnce(Arc<Shared>) -> F + Send + 'static)
where
    F: Future<Output = v1::ExecExit> + Send,
{
    let (told, mut started) = mpsc::unbounded_channel();
    *shared.on_exec.lock().unwrap() = Some(told);
    let (exit_told, exit) = watch::channel(None);
    shared
        .exits
        .lock()
        .unwrap()
        .insert(("c".into(), "e".into()), exit);
    for kind in [Kind::Stdout, Kind::Stderr] {
        shared.output("c", "e", kind);
    }
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        started.recv().await.unwrap();
        let exit = process(shared).await;
        exit_told.send_replace(Some(exit));
    });
}

fn request() -> v1::StartExecRequest {
    v1::StartExecRequest {
        container_id: "c".into(),
        exec_id: "e".into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn exec_sync_collects_both_outputs_up_to_the_limit_and_removes_the_session() {
    let (_dir, agent, client) = connected().await;
    agent
        .shared
        .break_after
        .store(100_000, std::sync::atomic::Ordering::SeqCst);
    on_exec(&agent.shared, |shared| async move {
        let (out, err) = (
            shared.output("c", "e", Kind::Stdout),
            shared.output("c", "e", Kind::Stderr),
        );
        out.write(&vec![b'o'; 1 << 20]).await;
        err.write(b"oops").await;
        out.end();
        err.end();
        v1::ExecExit {
            exit_code: 3,
            stdout_bytes: 1 << 20,
            stderr_bytes: 4,
            ..Default::default()
        }
    });
    let result = client.exec_sync(request(), Some(LONG), 1000).await.unwrap();
    assert_eq!(result.exit_code, 3);
    assert_eq!(result.stdout, vec![b'o'; 1000]);
    assert_eq!(result.stderr, b"oops");
    assert_eq!(agent.shared.called("RemoveExec"), 1);
    assert_eq!(agent.shared.called("SignalExec 9"), 0);
}

#[tokio::test]
async fn exec_sync_does_not_wait_for_a_grandchild_that_holds_the_output() {
    let (_dir, agent, client) = connected().await;
    on_exec(&agent.shared, |shared| async move {
        shared.output("c", "e", Kind::Stdout).write(b"hello").await;
        v1::ExecExit {
            stdout_bytes: 5,
            output_cut: true,
            ..Default::default()
        }
    });
    let result = client.exec_sync(request(), None, 1000).await.unwrap();
    assert_eq!(result.stdout, b"hello");
}

#[tokio::test]
async fn exec_sync_kills_at_its_timeout() {
    let (_dir, agent, client) = connected().await;
    on_exec(&agent.shared, |_| std::future::pending());
    let error = client.exec_sync(request(), Some(SHORT), 1000).await.unwrap_err();
    assert!(
        matches!(error, GuestError::ExecTimeout(limit) if limit == SHORT),
        "{error:?}"
    );
    assert_eq!(agent.shared.called("SignalExec 9"), 1);
    assert_eq!(agent.shared.called("RemoveExec"), 1);
}

#[tokio::test]
async fn a_dropped_exec_sync_is_killed_and_removed() {
    let (_dir, agent, client) = connected().await;
    on_exec(&agent.shared, |_| std::future::pending());
    let outcome = tokio::time::timeout(SHORT, client.exec_sync(request(), None, 1000)).await;
    assert!(outcome.is_err());
    tokio::time::timeout(LONG, async {
        while agent.shared.called("RemoveExec") == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
    assert_eq!(agent.shared.called("SignalExec 9"), 1);
}
