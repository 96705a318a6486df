//! How pods come and go: every step that fails, retries, stops that don't wait, a VM that dies.

#![allow(missing_docs, reason = "tests")]

mod fake_host;

use std::time::Duration;

use caisson_sandbox::{ErrorKind, view::SandboxState};
use fake_host::{Node, chain, until};

#[tokio::test]
async fn a_pod_boots_is_configured_and_leaves_nothing() {
    let node = Node::default();
    let pods = node.open().await;
    let id = pods.run(node.pod("a")).await.unwrap();

    let view = pods.status(&id.0).await.unwrap();
    assert_eq!(view.state, SandboxState::Ready);
    assert_eq!(view.ips, ["10.88.0.5".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(view.info["driver"], "fake");
    assert_eq!(view.info["agent"]["kernel_nanos"], 7);
    assert_eq!(view.info["agent"]["network_nanos"], 9);
    assert_eq!(view.info["vm"]["memory_mib"], 256);
    for step in [
        "journal",
        "network",
        "disk",
        "launch",
        "connect",
        "configure",
        "record",
        "total",
    ] {
        assert!(view.info["timings_ms"][step].is_number(), "{step}: {}", view.info);
    }
    let configured = node
        .host
        .machine(&id)
        .guest
        .configured
        .lock()
        .unwrap()
        .clone()
        .unwrap();
    assert_eq!(configured.hostname, "a");
    assert_eq!(configured.scratch_serial, "scratch");
    assert_eq!(configured.dns.unwrap().servers, ["10.0.0.10"]);
    assert_eq!(configured.interfaces[0].addresses, ["10.88.0.5/16"]);
    assert_eq!(configured.entropy.len(), 64);

    pods.stop(&id.0).await.unwrap();
    pods.stop(&id.0).await.unwrap();
    let view = pods.status(&id.0).await.unwrap();
    assert_eq!((view.state, view.ips.len()), (SandboxState::NotReady, 0));
    assert_eq!(node.host.alive(), 0);
    assert!(node.host.networks.lock().unwrap().is_empty());
    pods.remove(&id.0).await.unwrap();
    pods.remove(&id.0).await.unwrap();
    pods.stop(&id.0).await.unwrap();
    assert_eq!(pods.status(&id.0).await.unwrap_err().kind(), ErrorKind::NotFound);
    node.assert_nothing_left();
}

#[tokio::test]
async fn each_step_that_fails_is_named_and_undone() {
    for (fault, step, words) in [
        ("setup", "network failed", "no CNI network configuration"),
        ("launch", "launch failed", "told to fail"),
        ("launch fails late", "launch failed", "told to fail"),
        ("vm dies at once", "connect failed", "killed by signal 11"),
        (
            "ConfigureSandbox",
            "configure failed",
            "ConfigureSandbox was told to fail",
        ),
    ] {
        let node = Node::default();
        node.host.faults.arm(fault);
        let pods = node.open().await;
        let error = chain(&pods.run(node.pod("a")).await.unwrap_err());
        assert!(error.contains(step) && error.contains(words), "{fault}: {error}");
        assert!(!error.contains("not undone"), "{error}");
        assert!(pods.list().await.is_empty(), "{fault}");
        node.assert_nothing_left();
        assert!(
            node.host.faults.called("teardown") >= 1,
            "{fault}: DEL after a failed ADD"
        );
        // The name is free again.
        node.host.faults.disarm(fault);
        let id = pods.run(node.pod("a")).await.unwrap();
        pods.remove(&id.0).await.unwrap();
        node.assert_nothing_left();
    }
}

#[tokio::test]
async fn an_agent_that_never_comes_up_gives_a_deadline_and_the_console() {
    let node = Node {
        boot_deadline: Duration::from_millis(500),
        ..Node::default()
    };
    let pods = node.open().await;
    for fault in ["no agent", "Hello hangs", "ConfigureSandbox hangs"] {
        node.host.faults.arm(fault);
        let error = pods.run(node.pod("a")).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline, "{fault}: {}", chain(&error));
        assert!(
            error.to_string().contains("first line | last words of the guest"),
            "{error}"
        );
        node.assert_nothing_left();
        node.host.faults.disarm(fault);
    }
}

#[tokio::test]
async fn a_rollback_that_fails_keeps_the_pod_for_another_stop() {
    let node = Node::default();
    node.host.faults.arm("launch");
    node.host.faults.arm("teardown");
    let pods = node.open().await;
    let error = pods.run(node.pod("a")).await.unwrap_err().to_string();
    assert!(
        error.contains("launch failed") && error.contains("not undone"),
        "{error}"
    );
    let [left] = &pods.list().await[..] else {
        panic!("not listed")
    };
    assert_eq!(left.state, SandboxState::NotReady);
    assert!(
        left.info["why"].as_str().unwrap().contains("clean-up failed"),
        "{}",
        left.info
    );
    assert_eq!(
        pods.run(node.pod("a")).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    assert!(
        pods.stop(&left.id.0)
            .await
            .unwrap_err()
            .to_string()
            .contains("cannot clean up")
    );
    node.host.faults.disarm("teardown");
    pods.stop(&left.id.0).await.unwrap();
    pods.remove(&left.id.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn retries_join_the_boot_and_a_ready_pod_answers_as_it_is() {
    let node = Node::default();
    node.host.faults.arm("setup hangs");
    let pods = node.open().await;
    let first = tokio::spawn({
        let (pods, spec) = (pods.clone(), node.pod("a"));
        async move { pods.run(spec).await }
    });
    until("the network is being set up", || async {
        node.host.faults.called("setup") == 1
    })
    .await;
    assert!(
        pods.list().await.is_empty(),
        "a pod whose id nobody knows is not listed"
    );
    // kubelet gave up, and tries again.
    first.abort();
    let retry = tokio::spawn({
        let (pods, spec) = (pods.clone(), node.pod("a"));
        async move { pods.run(spec).await }
    });
    tokio::task::yield_now().await;
    assert_eq!(node.host.faults.called("setup"), 1);
    retry.abort();
    drop(pods);

    let node = Node::default();
    let pods = node.open().await;
    let (a, b) = tokio::join!(pods.run(node.pod("a")), pods.run(node.pod("a")));
    let id = a.unwrap();
    assert_eq!(b.unwrap(), id);
    assert_eq!(pods.run(node.pod("a")).await.unwrap(), id);
    assert_eq!(node.host.faults.called("launch"), 1);
    pods.stop(&id.0).await.unwrap();
    let error = pods.run(node.pod("a")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
    assert!(error.to_string().contains(&id.0), "{error}");
}

#[tokio::test]
async fn joined_callers_get_the_same_failure() {
    let node = Node::default();
    node.host.faults.arm("launch");
    let pods = node.open().await;
    let (a, b) = tokio::join!(pods.run(node.pod("a")), pods.run(node.pod("a")));
    assert_eq!(a.unwrap_err().to_string(), b.unwrap_err().to_string());
    assert_eq!(node.host.faults.called("launch"), 1);
}

#[tokio::test]
async fn a_stop_during_the_boot_breaks_it_off_and_undoes_it() {
    for fault in ["launch hangs", "Hello hangs", "ConfigureSandbox hangs"] {
        let node = Node::default();
        node.host.faults.arm(fault);
        let pods = node.open().await;
        let run = tokio::spawn({
            let (pods, spec) = (pods.clone(), node.pod("a"));
            async move { pods.run(spec).await }
        });
        let step = fault.trim_end_matches(" hangs");
        until(fault, || async { node.host.faults.called(step) > 0 }).await;
        let id = std::fs::read_dir(node.root().join("pods"))
            .unwrap()
            .next()
            .unwrap()
            .unwrap()
            .file_name();
        let id = id.to_str().unwrap();
        let (stop, remove) = tokio::join!(pods.stop(id), pods.remove(id));
        stop.unwrap();
        remove.unwrap();
        let error = run.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{}", chain(&error));
        node.assert_nothing_left();
    }
}

#[tokio::test]
async fn a_wedged_guest_does_not_hold_up_a_stop() {
    let node = Node::default();
    let pods = node.open().await;
    let id = pods.run(node.pod("a")).await.unwrap();
    node.host.faults.arm("agent hangs");
    let creating = tokio::spawn({
        let (pods, id) = (pods.clone(), id.clone());
        async move { pods.create_container(&id.0, fake_host::container("c")).await }
    });
    until("the guest was asked", || async {
        node.host.faults.called("CreateContainer") > 0
    })
    .await;
    // Well below the agent's deadline.
    tokio::time::timeout(node.agent_deadline / 2, pods.stop(&id.0))
        .await
        .expect("stop waits on the guest")
        .unwrap();
    assert_eq!(creating.await.unwrap().unwrap_err().kind(), ErrorKind::Cancelled);
    pods.remove(&id.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_kill_that_fails_falls_back_to_a_sweep() {
    let node = Node::default();
    let pods = node.open().await;
    let id = pods.run(node.pod("a")).await.unwrap();
    node.host.faults.arm("kill");
    pods.stop(&id.0).await.unwrap();
    assert_eq!(node.host.faults.called("sweep"), 1);
    pods.remove(&id.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_vm_that_dies_makes_its_pod_not_ready_and_its_network_waits_for_the_stop() {
    let node = Node::default();
    let pods = node.open().await;
    let id = pods.run(node.pod("a")).await.unwrap();
    node.host.machine(&id).die("fake exited with status 3");
    until("not ready", || async {
        pods.status(&id.0).await.unwrap().state == SandboxState::NotReady
    })
    .await;
    let view = pods.status(&id.0).await.unwrap();
    assert!(
        view.info["why"]
            .as_str()
            .unwrap()
            .contains("exited with status 3")
    );
    assert_eq!(node.host.networks.lock().unwrap().len(), 1);
    let error = pods
        .create_container(&id.0, fake_host::container("c"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);
    pods.stop(&id.0).await.unwrap();
    pods.remove(&id.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn prefixes_resolve_when_unique() {
    let node = Node::default();
    let pods = node.open().await;
    let mut ids = Vec::new();
    // With 17 pods, two share the first digit.
    for n in 0..17 {
        ids.push(pods.run(node.pod(&format!("p{n}"))).await.unwrap().0);
    }
    let digit = ids
        .iter()
        .map(|id| &id[..1])
        .find(|digit| ids.iter().filter(|id| id.starts_with(digit)).count() > 1)
        .unwrap();
    let error = pods.status(digit).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().contains("ambiguous")),
        (ErrorKind::Invalid, true)
    );
    assert_eq!(pods.status(&ids[3][..20]).await.unwrap().id.0, ids[3]);
    assert_eq!(pods.status("").await.unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(
        pods.status("nothing").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

#[tokio::test]
async fn limits_size_the_vm() {
    let node = Node::default();
    let pods = node.open().await;
    let mut spec = node.pod("a");
    spec.limits.memory_bytes = Some(1000 << 20);
    let id = pods.run(spec).await.unwrap();
    assert_eq!(node.host.machine(&id).spec_memory_mib, 1040);
}
