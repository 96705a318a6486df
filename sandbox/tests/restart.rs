//! What a new daemon finds of an earlier one.

#![allow(missing_docs, reason = "tests")]

mod fake_host;

use std::time::Duration;

use caisson_sandbox::{
    ErrorKind, Sandboxes,
    events::Change,
    guest,
    view::{ContainerState, SandboxState},
};
use fake_host::{Node, container, until};

async fn restart(node: &Node, pods: Sandboxes) -> Sandboxes {
    pods.close().await;
    drop(pods);
    node.open().await
}

#[tokio::test]
async fn running_pods_are_found_again_and_their_logs_go_on() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let guest = node.host.machine(&pod).guest.clone();
    let created = pods.create_container(&pod.0, container("created")).await.unwrap();
    let running = pods.create_container(&pod.0, container("running")).await.unwrap();
    let ends = pods.create_container(&pod.0, container("ends")).await.unwrap();
    let ended = pods.create_container(&pod.0, container("ended")).await.unwrap();
    for id in [&running, &ends, &ended] {
        pods.start_container(&id.0).await.unwrap();
        guest.print(&id.0, "before\n");
    }
    guest.exit(&ended.0, 4, None);
    let log = |name: &str| std::fs::read_to_string(node.logs().join(name)).unwrap_or_default();
    until("logged", || async {
        ["running.log", "ends.log"]
            .iter()
            .all(|name| log(name).contains("before"))
            && matches!(
                pods.container_status(&ended.0).await.unwrap().state,
                ContainerState::Exited { .. }
            )
    })
    .await;
    let before = pods.status(&pod.0).await.unwrap();
    let started = pods.container_status(&running.0).await.unwrap().state;

    pods.close().await;
    drop(pods);
    // While no daemon runs.
    guest.print(&running.0, "between\n");
    guest.print(&ends.0, "between\n");
    guest.exit(&ends.0, 5, None);
    let pods = node.open().await;

    let after = pods.status(&pod.0).await.unwrap();
    assert_eq!(
        (&after.ips, after.created_at, &after.spec),
        (&before.ips, before.created_at, &before.spec)
    );
    assert_eq!(after.state, SandboxState::Ready);
    assert_eq!(after.info["agent"], before.info["agent"]);
    assert_eq!(
        pods.container_status(&created.0).await.unwrap().state,
        ContainerState::Created
    );
    assert_eq!(pods.container_status(&running.0).await.unwrap().state, started);
    until("the end is seen", || async {
        matches!(
            pods.container_status(&ends.0).await.unwrap().state,
            ContainerState::Exited { exit_code: 5, .. }
        )
    })
    .await;
    assert!(matches!(
        pods.container_status(&ended.0).await.unwrap().state,
        ContainerState::Exited { exit_code: 4, .. }
    ));
    guest.print(&running.0, "after\n");
    until("the log goes on", || async {
        log("running.log").contains("after")
    })
    .await;
    for (name, lines) in [
        ("running.log", vec!["before", "between", "after"]),
        ("ends.log", vec!["before", "between"]),
    ] {
        let text = log(name);
        let seen: Vec<_> = text.lines().filter_map(|line| line.split(' ').nth(3)).collect();
        assert_eq!(seen, lines, "{name}");
    }
    // Everything works as before.
    assert_eq!(pods.run(node.pod("a")).await.unwrap(), pod);
    assert_eq!(
        pods.create_container(&pod.0, container("running"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::AlreadyExists
    );
    pods.start_container(&created.0).await.unwrap();
    pods.stop_container(&running.0, Duration::from_secs(5))
        .await
        .unwrap();
    assert_eq!(
        node.host.faults.called("attach"),
        1,
        "the image is still attached"
    );
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn an_unfinished_boot_is_rolled_back() {
    let node = Node::default();
    node.host.faults.arm("ConfigureSandbox hangs");
    let pods = node.open().await;
    let run = tokio::spawn({
        let (pods, spec) = (pods.clone(), node.pod("a"));
        async move { pods.run(spec).await }
    });
    until("booting", || async {
        node.host.faults.called("ConfigureSandbox") > 0
    })
    .await;
    assert_eq!(node.host.alive(), 1);
    pods.close().await;
    run.abort();
    drop(pods);
    let pods = node.open().await;
    assert!(pods.list().await.is_empty());
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_rollback_that_fails_at_the_start_is_tried_again_by_stop() {
    let node = Node::default();
    node.host.faults.arm("launch hangs");
    let pods = node.open().await;
    let run = tokio::spawn({
        let (pods, spec) = (pods.clone(), node.pod("a"));
        async move { pods.run(spec).await }
    });
    until("booting", || async { node.host.faults.called("launch") > 0 }).await;
    pods.close().await;
    run.abort();
    drop(pods);
    node.host.faults.arm("teardown");
    let pods = node.open().await;
    let [left] = &pods.list().await[..] else {
        panic!("not listed")
    };
    assert_eq!(left.state, SandboxState::NotReady);
    node.host.faults.disarm("teardown");
    pods.remove(&left.id.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_pod_whose_vm_is_gone_is_listed_with_its_containers_until_it_is_removed() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    pods.close().await;
    drop(pods);
    // As after a reboot: no process, and /run is empty.
    node.host.machine(&pod).die("reboot");
    std::fs::remove_dir_all(node.dir.path().join("run")).unwrap();
    let pods = node.open().await;
    let view = pods.status(&pod.0).await.unwrap();
    assert_eq!(view.state, SandboxState::NotReady);
    assert!(
        view.info["why"].as_str().unwrap().contains("VM is gone"),
        "{}",
        view.info
    );
    let exit = pods.container_status(&id.0).await.unwrap().state;
    assert!(
        matches!(exit, ContainerState::Exited { exit_code: 255, .. }),
        "{exit:?}"
    );
    // The next daemon says the same, to the nanosecond.
    let pods = restart(&node, pods).await;
    assert_eq!(pods.container_status(&id.0).await.unwrap().state, exit);
    pods.stop(&pod.0).await.unwrap();
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_pod_whose_agent_does_not_answer_is_not_ready_and_can_be_stopped() {
    let node = Node {
        boot_deadline: Duration::from_secs(2),
        ..Node::default()
    };
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    node.host.faults.arm("agent hangs");
    let pods = restart(&node, pods).await;
    assert_eq!(pods.status(&pod.0).await.unwrap().state, SandboxState::NotReady);
    assert_eq!(
        pods.container_status(&id.0).await.unwrap().state,
        ContainerState::Unknown
    );
    assert_eq!(node.host.alive(), 1);
    pods.stop(&pod.0).await.unwrap();
    assert_eq!(node.host.alive(), 0);
    assert!(matches!(
        pods.container_status(&id.0).await.unwrap().state,
        ContainerState::Exited { exit_code: 137, .. }
    ));
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_stopped_pod_is_still_listed() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    pods.stop(&pod.0).await.unwrap();
    let pods = restart(&node, pods).await;
    assert_eq!(pods.status(&pod.0).await.unwrap().state, SandboxState::NotReady);
    pods.stop(&pod.0).await.unwrap();
    assert_eq!(
        pods.run(node.pod("a")).await.unwrap_err().kind(),
        ErrorKind::AlreadyExists
    );
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_kept_and_listed_until_somebody_removes_it() {
    let node = Node::default();
    let pods = node.open().await;
    let good = pods.run(node.pod("good")).await.unwrap();
    let pod = pods.run(node.pod("a")).await.unwrap();
    pods.close().await;
    drop(pods);
    let record = node.root().join("pods").join(&pod.0).join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace("10.88.0.5", "10.88.0.6")).unwrap();
    let broken = std::fs::read(&record).unwrap();

    let pods = node.open().await;
    let view = pods.status(&pod.0).await.unwrap();
    assert_eq!(view.state, SandboxState::NotReady);
    assert!(
        view.info["why"].as_str().unwrap().contains("checksum"),
        "{}",
        view.info
    );
    assert_eq!(pods.status(&good.0).await.unwrap().state, SandboxState::Ready);
    assert_eq!(std::fs::read(&record).unwrap(), broken);
    assert_eq!(node.host.alive(), 2, "nothing is killed by guess");
    let pods = restart(&node, pods).await;
    assert_eq!(std::fs::read(&record).unwrap(), broken);
    pods.remove(&pod.0).await.unwrap();
    pods.remove(&good.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_container_of_an_unfinished_creation_is_taken_out_of_the_guest() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.close().await;
    drop(pods);
    // As if the daemon had ended between the guest's answer and the journal.
    std::fs::remove_dir_all(
        node.root()
            .join("pods")
            .join(&pod.0)
            .join("containers")
            .join(&id.0),
    )
    .unwrap();
    let pods = node.open().await;
    assert!(pods.list_containers().await.is_empty());
    assert!(
        node.host
            .machine(&pod)
            .guest
            .containers
            .lock()
            .unwrap()
            .is_empty()
    );
    pods.create_container(&pod.0, container("c")).await.unwrap();
}

#[tokio::test]
async fn a_silent_agent_is_asked_again_and_its_pod_becomes_ready() {
    let mut node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let guest = node.host.machine(&pod).guest.clone();
    let runs = pods.create_container(&pod.0, container("runs")).await.unwrap();
    let ends = pods.create_container(&pod.0, container("ends")).await.unwrap();
    let gone = pods.create_container(&pod.0, container("gone")).await.unwrap();
    for id in [&runs, &ends] {
        pods.start_container(&id.0).await.unwrap();
    }
    pods.close().await;
    drop(pods);
    guest.exit(&ends.0, 3, None);
    node.host.faults.arm("Hello hangs");
    node.boot_deadline = Duration::from_millis(200);
    let pods = node.open().await;
    let mut events = pods.events().unwrap();
    assert_eq!(pods.status(&pod.0).await.unwrap().state, SandboxState::NotReady);
    assert_eq!(
        pods.container_status(&runs.0).await.unwrap().state,
        ContainerState::Unknown
    );
    pods.remove_container(&gone.0).await.unwrap();
    node.host.faults.disarm("Hello hangs");
    until("ready", || async {
        pods.status(&pod.0).await.unwrap().state == SandboxState::Ready
    })
    .await;
    assert!(matches!(
        pods.container_status(&runs.0).await.unwrap().state,
        ContainerState::Running { .. }
    ));
    until("the end is seen", || async {
        matches!(
            pods.container_status(&ends.0).await.unwrap().state,
            ContainerState::Exited { exit_code: 3, .. }
        )
    })
    .await;
    // It may have stood still.
    until("its clock is set", || async {
        node.host.faults.called("SetClock") == 1
    })
    .await;
    // What was removed meanwhile is not left in the guest, and what runs is served as before.
    until("discarded", || async {
        guest.containers.lock().unwrap().len() == 2
    })
    .await;
    pods.stop_container(&runs.0, Duration::from_secs(5))
        .await
        .unwrap();
    let mut told = Vec::new();
    while told.len() < 4 {
        let event = events.next().await.unwrap().unwrap();
        told.push((event.subject, event.change));
    }
    assert_eq!(told[0], (gone.0, Change::Deleted));
    assert_eq!(told[1], (pod.0.clone(), Change::Started));
    assert!(told[2..].contains(&(ends.0, Change::Stopped)) && told[2..].contains(&(runs.0, Change::Stopped)));
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_silent_vm_that_ends_ends_its_containers_and_one_that_is_stopped_is_not_asked_any_more() {
    let mut node = Node::default();
    let pods = node.open().await;
    let (dies, stopped) = (
        pods.run(node.pod("dies")).await.unwrap(),
        pods.run(node.pod("stopped")).await.unwrap(),
    );
    let id = pods.create_container(&dies.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    pods.close().await;
    drop(pods);
    node.host.faults.arm("agent hangs");
    node.boot_deadline = Duration::from_millis(200);
    let pods = node.open().await;
    node.host.machine(&dies).die("was killed by signal 9");
    until("its container has ended", || async {
        matches!(
            pods.container_status(&id.0).await.unwrap().state,
            ContainerState::Exited { .. }
        )
    })
    .await;
    let why = pods.status(&dies.0).await.unwrap().info["why"].to_string();
    assert!(why.contains("signal 9"), "{why}");
    for pod in [dies, stopped] {
        pods.stop(&pod.0).await.unwrap();
        pods.remove(&pod.0).await.unwrap();
    }
    node.assert_nothing_left();
}

#[tokio::test]
async fn what_was_started_just_before_the_daemon_died_has_its_time_and_its_commands_are_ended() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    let guest = node.host.machine(&pod).guest.clone();
    pods.close().await;
    drop(pods);
    {
        // The guest had started it, and the daemon could not write that down.
        let mut containers = guest.containers.lock().unwrap();
        let container = containers.get_mut(&id.0).unwrap();
        container.phase = guest::ContainerPhase::ContainerRunning;
        container.started = Some(guest::StartContainerReply {
            pid: 3,
            started_at_nanos: 5_000_000_000,
            uid: 7,
            ..Default::default()
        });
        container.exec_ids = vec!["lost".into()];
    }
    let pods = node.open().await;
    let view = pods.container_status(&id.0).await.unwrap();
    let started_at = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(5);
    assert_eq!(view.state, ContainerState::Running { started_at });
    assert_eq!(view.user.unwrap().uid, 7);
    assert!(guest.containers.lock().unwrap()[&id.0].exec_ids.is_empty());
}

#[tokio::test]
async fn images_of_records_that_cannot_be_read_count_as_in_use() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    let image = format!("sha256:{}", "ab".repeat(32));
    assert_eq!(pods.images_in_use().await.ids, std::slice::from_ref(&image));
    pods.close().await;
    drop(pods);
    let dir = node.root().join("pods").join(&pod.0);
    let record = dir.join("containers").join(&id.0).join("record.json");
    let text = std::fs::read_to_string(&record).unwrap();
    let damaged = text.replace("\"version\": 1", "\"version\": 99");
    assert_ne!(text, damaged);
    std::fs::write(&record, damaged).unwrap();
    let pods = restart(&node, node.open().await).await;
    let in_use = pods.images_in_use().await;
    assert_eq!((in_use.ids, in_use.complete), (vec![image.clone()], true));

    // The pod's own record, too; and then not even a word of the image.
    pods.close().await;
    std::fs::write(dir.join("record.json"), "{").unwrap();
    let pods = restart(&node, node.open().await).await;
    assert_eq!(pods.images_in_use().await.ids, [image]);
    pods.close().await;
    std::fs::write(&record, "").unwrap();
    let pods = restart(&node, node.open().await).await;
    let in_use = pods.images_in_use().await;
    assert!(in_use.ids.is_empty() && !in_use.complete);
    pods.remove(&pod.0).await.unwrap();
    assert!(pods.images_in_use().await.complete);
}
