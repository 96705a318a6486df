//! Containers in a pod: files in, logs and messages out, starts that fail, stops that are bounded.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fake_host;

use std::{sync::Arc, time::Duration};

use caisson_sandbox::{
    ContainerId, ErrorKind, SandboxId, Sandboxes, guest, spec,
    view::{ContainerState, LinuxUser},
};
use fake_host::{Machine, Node, chain, container, container_of, until};

async fn pod(node: &Node) -> (Sandboxes, SandboxId, Arc<Machine>) {
    let pods = node.open().await;
    let id = pods.run(node.pod("a")).await.unwrap();
    let machine = node.host.machine(&id);
    (pods, id, machine)
}

async fn exited(pods: &Sandboxes, id: &ContainerId) -> (i32, String, String) {
    until("exited", || async {
        matches!(
            pods.container_status(&id.0).await.unwrap().state,
            ContainerState::Exited { .. }
        )
    })
    .await;
    match pods.container_status(&id.0).await.unwrap().state {
        ContainerState::Exited {
            exit_code,
            reason,
            message,
            ..
        } => (exit_code, reason, message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_container_lives_and_its_log_and_message_are_there_before_its_exit() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let files = node.dir.path().join("token");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("token"), "secret").unwrap();
    let termination = node.dir.path().join("termination");
    std::fs::write(&termination, "").unwrap();
    let mut wanted = container("c");
    wanted.termination_file = Some(termination.clone());
    wanted.files = vec![spec::PushedFiles {
        host_path: files,
        container_path: "/var/run/secrets".into(),
        readonly: true,
    }];
    let id = pods.create_container(&pod.0, wanted).await.unwrap();
    assert_eq!(
        pods.container_status(&id.0).await.unwrap().state,
        ContainerState::Created
    );
    {
        let containers = machine.guest.containers.lock().unwrap();
        let made = &containers[&id.0].spec;
        assert_eq!(made.image_serial, "img-abababababababab");
        assert_eq!((made.mounts.len(), made.mounts[0].readonly), (1, true));
        assert_eq!(
            machine.guest.volumes.lock().unwrap()[&format!("{}-0", id.0)].len(),
            2
        );
    }
    pods.start_container(&id.0).await.unwrap();
    let view = pods.container_status(&id.0[..12]).await.unwrap();
    assert!(matches!(view.state, ContainerState::Running { .. }));
    assert_eq!(
        view.user,
        Some(LinuxUser {
            uid: 65534,
            gid: 65534,
            supplemental_gids: vec![1]
        })
    );
    assert_eq!(
        pods.start_container(&id.0).await.unwrap_err().kind(),
        ErrorKind::WrongState
    );

    machine.guest.print(&id.0, "hello\n");
    machine.guest.exit(&id.0, 3, Some("why it ended"));
    assert_eq!(exited(&pods, &id).await.0, 3);
    let log = std::fs::read_to_string(view.log_path.unwrap()).unwrap();
    assert!(log.contains(" stdout F hello\n"), "{log}");
    assert_eq!(std::fs::read_to_string(&termination).unwrap(), "why it ended");

    pods.remove_container(&id.0).await.unwrap();
    pods.remove_container(&id.0).await.unwrap();
    assert!(machine.guest.containers.lock().unwrap().is_empty());
    assert!(machine.guest.volumes.lock().unwrap().is_empty());
    assert_eq!(
        pods.container_status(&id.0).await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn an_image_is_attached_once_and_slots_run_out_by_name() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let (a, b) = tokio::join!(
        pods.create_container(&pod.0, container("a")),
        pods.create_container(&pod.0, container("b"))
    );
    a.unwrap();
    b.unwrap();
    assert_eq!(node.host.faults.called("attach"), 1);
    pods.create_container(&pod.0, container_of("c", "sha256:cc"))
        .await
        .unwrap();
    let error = pods
        .create_container(&pod.0, container_of("d", "sha256:dd"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted);
    assert!(chain(&error).contains("all 2 slots"), "{}", chain(&error));
    assert_eq!(machine.guest.containers.lock().unwrap().len(), 3);
    assert_eq!(pods.images_in_use().await.ids.len(), 2);
}

#[tokio::test]
async fn a_disk_goes_with_the_last_container_that_has_it() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let attached = || -> Vec<String> {
        let slots = machine.record.lock().unwrap().slots.clone();
        slots.into_iter().flatten().collect()
    };
    let a = pods.create_container(&pod.0, container("a")).await.unwrap();
    let b = pods.create_container(&pod.0, container("b")).await.unwrap();
    pods.remove_container(&a.0).await.unwrap();
    assert_eq!(attached().len(), 1, "the other container has it still");
    pods.remove_container(&b.0).await.unwrap();
    assert_eq!(attached(), Vec::<String>::new());
    assert_eq!(node.host.faults.called("ReleaseDisk"), 1);

    // Each image had its turn, with fewer slots than images.
    for image in ["sha256:c1", "sha256:c2", "sha256:c3"] {
        let made = pods
            .create_container(&pod.0, container_of("c", image))
            .await
            .unwrap();
        pods.remove_container(&made.0).await.unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_the_guest_holds_stays_until_a_later_removal() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let slots = || machine.record.lock().unwrap().slots.iter().flatten().count();
    let a = pods.create_container(&pod.0, container("a")).await.unwrap();
    let b = pods
        .create_container(&pod.0, container_of("b", "sha256:bb"))
        .await
        .unwrap();
    node.host.faults.arm("ReleaseDisk");
    pods.remove_container(&a.0).await.unwrap();
    assert_eq!((slots(), node.host.faults.called("detach")), (2, 0));
    node.host.faults.disarm("ReleaseDisk");
    pods.remove_container(&b.0).await.unwrap();
    assert_eq!(slots(), 0);
}

#[tokio::test]
async fn a_retry_joins_the_creation_and_a_used_name_is_refused() {
    let node = Node::default();
    let (pods, pod, _) = pod(&node).await;
    let (a, b) = tokio::join!(
        pods.create_container(&pod.0, container("c")),
        pods.create_container(&pod.0, container("c"))
    );
    let id = a.unwrap();
    assert_eq!(b.unwrap(), id);
    assert_eq!(pods.create_container(&pod.0, container("c")).await.unwrap(), id);
    assert_eq!(node.host.faults.called("CreateContainer"), 1);
    pods.start_container(&id.0).await.unwrap();
    let error = pods.create_container(&pod.0, container("c")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists);
}

#[tokio::test]
async fn a_creation_that_fails_leaves_nothing_in_the_guest() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    std::fs::write(node.dir.path().join("file"), "x").unwrap();
    let mut wanted = container("c");
    wanted.files = vec![spec::PushedFiles {
        host_path: node.dir.path().join("file"),
        container_path: "/etc/hosts".into(),
        readonly: false,
    }];
    node.host.faults.arm("CreateContainer");
    let error = pods.create_container(&pod.0, wanted.clone()).await.unwrap_err();
    assert!(
        chain(&error).contains("CreateContainer was told to fail"),
        "{}",
        chain(&error)
    );
    until("volumes are gone", || async {
        machine.guest.volumes.lock().unwrap().is_empty()
    })
    .await;
    assert!(pods.list_containers().await.is_empty());
    node.host.faults.disarm("CreateContainer");
    pods.create_container(&pod.0, wanted.clone()).await.unwrap();

    let mut absent = wanted;
    absent.name = "absent".into();
    absent.files[0].host_path = "/nonexistent/file".into();
    let error = chain(&pods.create_container(&pod.0, absent).await.unwrap_err());
    assert!(error.contains("/nonexistent/file"), "{error}");
}

#[tokio::test]
async fn a_start_that_fails_is_an_exit_with_the_guests_words() {
    let node = Node::default();
    let (pods, pod, _) = pod(&node).await;
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    node.host.faults.arm("StartContainer");
    let error = chain(&pods.start_container(&id.0).await.unwrap_err());
    assert!(error.contains("StartContainer was told to fail"), "{error}");
    let (code, reason, message) = exited(&pods, &id).await;
    assert_eq!((code, reason.as_str()), (128, "StartError"));
    assert!(message.contains("told to fail"), "{message}");
    pods.remove_container(&id.0).await.unwrap();
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_fails_the_start() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let mut wanted = container("c");
    wanted.log_path = Some("no/such/directory.log".into());
    let id = pods.create_container(&pod.0, wanted).await.unwrap();
    let error = pods.start_container(&id.0).await.unwrap_err().to_string();
    assert!(error.contains("no/such/directory.log"), "{error}");
    assert_eq!(
        machine.guest.containers.lock().unwrap()[&id.0].phase,
        caisson_sandbox::guest::ContainerPhase::ContainerCreated
    );
    let mut outside = container("d");
    outside.log_path = Some("../outside".into());
    assert_eq!(
        pods.create_container(&pod.0, outside).await.unwrap_err().kind(),
        ErrorKind::Invalid
    );
}

#[tokio::test]
async fn a_stop_sends_the_signal_and_kills_what_ignores_it() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let polite = pods.create_container(&pod.0, container("polite")).await.unwrap();
    pods.stop_container(&polite.0, Duration::from_secs(1))
        .await
        .unwrap();
    pods.start_container(&polite.0).await.unwrap();
    pods.stop_container(&polite.0, Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(exited(&pods, &polite).await.0, 143);

    node.host.faults.arm("term is ignored");
    let stubborn = pods
        .create_container(&pod.0, container("stubborn"))
        .await
        .unwrap();
    pods.start_container(&stubborn.0).await.unwrap();
    let (a, b) = tokio::join!(
        pods.stop_container(&stubborn.0, Duration::from_millis(50)),
        pods.stop_container(&stubborn.0, Duration::from_millis(50))
    );
    a.unwrap();
    b.unwrap();
    assert_eq!(exited(&pods, &stubborn).await.0, 137);
    let signals = machine.guest.signals.lock().unwrap().clone();
    assert_eq!(
        signals.iter().filter(|signal| **signal == 15).count(),
        2,
        "one for each container: {signals:?}"
    );
    pods.stop_container("unknown", Duration::ZERO).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_cannot_kill_gives_a_deadline_and_the_pod_can_be_stopped() {
    let node = Node::default();
    let (pods, pod, _) = pod(&node).await;
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    node.host.faults.arm("SignalContainer hangs");
    let error = pods
        .stop_container(&id.0, Duration::from_secs(2))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{}", chain(&error));
    pods.stop(&pod.0).await.unwrap();
    let (code, reason, message) = exited(&pods, &id).await;
    assert_eq!(
        (code, reason.as_str(), message.as_str()),
        (137, "Error", "killed with its pod sandbox")
    );
}

#[tokio::test]
async fn containers_of_a_vm_that_dies_have_exited_and_can_be_removed() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    machine.die("fake exited with status 3");
    let (code, reason, message) = exited(&pods, &id).await;
    assert_eq!((code, reason.as_str()), (255, "Unknown"), "{message}");
    pods.stop_container(&id.0, Duration::ZERO).await.unwrap();
    pods.remove_container(&id.0).await.unwrap();
    pods.remove(&pod.0).await.unwrap();
    node.assert_nothing_left();
}

#[tokio::test]
async fn removing_a_running_container_ends_it_and_leaves_no_record() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    for n in 0..20 {
        let id = pods
            .create_container(&pod.0, container(&format!("c{n}")))
            .await
            .unwrap();
        pods.start_container(&id.0).await.unwrap();
        let (a, b) = tokio::join!(pods.remove_container(&id.0), pods.remove_container(&id.0));
        a.unwrap();
        b.unwrap();
    }
    assert!(machine.guest.containers.lock().unwrap().is_empty());
    pods.close().await;
    drop(pods);
    assert!(node.open().await.list_containers().await.is_empty());
}

#[tokio::test]
async fn requests_in_the_wrong_state_say_which() {
    let node = Node::default();
    let (pods, pod, _) = pod(&node).await;
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    let exec = spec::ExecSpec {
        args: vec![b"x".to_vec()],
        timeout: None,
    };
    let error = pods.exec_sync(&id.0, exec.clone()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);
    assert!(error.to_string().ends_with("it is created"), "{error}");
    assert_eq!(
        pods.reopen_log(&id.0).await.unwrap_err().kind(),
        ErrorKind::WrongState
    );
    pods.start_container(&id.0).await.unwrap();
    pods.reopen_log(&id.0).await.unwrap();
    let error = chain(&pods.exec_sync(&id.0, exec).await.unwrap_err());
    assert!(error.contains("no such file or directory"), "{error}");
    assert_eq!(
        pods.create_container("unknown", container("d"))
            .await
            .unwrap_err()
            .kind(),
        ErrorKind::NotFound
    );
    assert_eq!(
        pods.start_container("unknown").await.unwrap_err().kind(),
        ErrorKind::NotFound
    );
}

fn confined(name: &str, profile: &str) -> spec::ContainerSpec {
    let mut wanted = container(name);
    let process = wanted.guest.process.as_mut().unwrap();
    process.apparmor = Some(guest::ApparmorProfile {
        name: profile.into(),
        optional: false,
    });
    wanted
}

#[tokio::test]
async fn a_profile_of_the_host_is_loaded_before_the_container_is_made() {
    let node = Node::default();
    let files = node.apparmor().directory;
    std::fs::write(files.join("mine"), "profile deny-write { file, deny /** w, }\n").unwrap();
    let (pods, pod, machine) = pod(&node).await;
    let id = pods
        .create_container(&pod.0, confined("c", "deny-write"))
        .await
        .unwrap();
    {
        let policies = machine.guest.policies.lock().unwrap();
        assert_eq!(policies.len(), 1);
        assert!(policies[0].windows(11).any(|part| part == b"deny-write\0"));
        let containers = machine.guest.containers.lock().unwrap();
        let process = containers[&id.0].spec.process.clone().unwrap();
        assert_eq!(process.apparmor.unwrap().name, "deny-write");
    }
    pods.create_container(&pod.0, confined("default", ""))
        .await
        .unwrap();
    assert_eq!(
        machine.guest.policies.lock().unwrap().len(),
        1,
        "the guest has its default profile by itself"
    );
}

#[tokio::test]
async fn a_profile_that_the_host_has_not_is_no_container() {
    let node = Node::default();
    let (pods, pod, machine) = pod(&node).await;
    let error = pods
        .create_container(&pod.0, confined("c", "nobodys"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let told = chain(&error);
    assert!(
        told.contains("no AppArmor profile \"nobodys\"") && told.contains("apparmor.d"),
        "{told}"
    );
    assert!(machine.guest.containers.lock().unwrap().is_empty());
    assert!(machine.guest.policies.lock().unwrap().is_empty());
}
