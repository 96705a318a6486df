//! What is told of pods while they run: events, usage, and limits that change.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fake_host;

use std::{collections::BTreeMap, time::SystemTime};

use caisson_sandbox::{
    ErrorKind, Sandboxes,
    events::{Change, Subscription},
    limits::{LimitChange, PodLimitChange},
    spec::PodLimits,
};
use fake_host::{Node, container, until};

use Change::{Created, Deleted, Started, Stopped};

/// Takes events until `last` has happened to `subject`; the bound is for a test that hangs.
async fn seen(events: &mut Subscription, subject: &str, last: Change) -> Vec<(String, Change)> {
    let mut all = Vec::new();
    let take = async {
        loop {
            let event = events.next().await.unwrap().unwrap();
            let end = event.subject == subject && event.change == last;
            all.push((event.subject, event.change));
            if end {
                return;
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(60), take)
        .await
        .unwrap_or_else(|_| panic!("never: {last:?} of {subject}"));
    all
}

#[tokio::test]
async fn every_step_of_a_life_is_told_once_and_in_order() {
    let node = Node::default();
    let pods = node.open().await;
    let mut events = pods.events().unwrap();
    let mut late = pods.events().unwrap();
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    node.host.machine(&pod).guest.exit(&id.0, 0, None);
    let (p, c) = (pod.0.clone(), id.0.clone());
    let told = seen(&mut events, &c, Stopped).await;
    let expected = [
        (p.clone(), Created),
        (p.clone(), Started),
        (c.clone(), Created),
        (c.clone(), Started),
        (c.clone(), Stopped),
    ];
    assert_eq!(told, expected);
    pods.remove_container(&id.0).await.unwrap();
    pods.stop(&pod.0).await.unwrap();
    pods.remove(&pod.0).await.unwrap();
    let told = seen(&mut events, &p, Deleted).await;
    let expected = [(c, Deleted), (p.clone(), Stopped), (p.clone(), Deleted)];
    assert_eq!(told, expected);
    // The other one has had time, and its queue has them all.
    assert_eq!(seen(&mut late, &p, Deleted).await.len(), 8);
    pods.close().await;
    assert!(events.next().await.is_none());
}

#[tokio::test]
async fn a_vm_that_dies_ends_its_containers_before_the_pod() {
    let node = Node::default();
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    let mut events = pods.events().unwrap();
    node.host.machine(&pod).die("was killed");
    let told = seen(&mut events, &pod.0, Stopped).await;
    assert_eq!(told, [(id.0.clone(), Stopped), (pod.0.clone(), Stopped)]);
    // Of a pod that is removed in one go, everything is told all the same.
    pods.remove(&pod.0).await.unwrap();
    let told = seen(&mut events, &pod.0, Deleted).await;
    assert_eq!(told, [(id.0, Deleted), (pod.0, Deleted)]);
}

#[tokio::test]
async fn events_show_the_pod_after_them() {
    let node = Node::default();
    let pods = node.open().await;
    let mut events = pods.events().unwrap();
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    let mut at = SystemTime::UNIX_EPOCH;
    for _ in 0..3 {
        let event = events.next().await.unwrap().unwrap();
        assert!(event.at >= at, "time went back");
        at = event.at;
        let here = event.picture.containers.iter().any(|view| view.id == id);
        assert_eq!(here, event.subject == id.0);
        assert_eq!(event.picture.sandbox.id, pod);
    }
}

#[tokio::test]
async fn a_boot_that_fails_and_a_restart_are_not_told() {
    let node = Node::default();
    let pods = node.open().await;
    let mut events = pods.events().unwrap();
    node.host.faults.arm("launch");
    pods.run(node.pod("bad")).await.unwrap_err();
    node.host.faults.disarm("launch");
    let pod = pods.run(node.pod("good")).await.unwrap();
    assert_eq!(events.next().await.unwrap().unwrap().subject, pod.0);
    pods.close().await;

    let pods = node.open().await;
    let mut events = pods.events().unwrap();
    pods.stop(&pod.0).await.unwrap();
    assert_eq!(seen(&mut events, &pod.0, Stopped).await, [(pod.0, Stopped)]);
}

async fn running(node: &Node) -> (Sandboxes, String, String) {
    let pods = node.open().await;
    let pod = pods.run(node.pod("a")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    (pods, pod.0, id.0)
}

#[tokio::test]
async fn usage_is_joined_with_the_pod_and_its_time_is_that_of_the_call() {
    let node = Node::default();
    let (pods, pod, id) = running(&node).await;
    let began = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let usage = pods.pod_usage(&pod).await.unwrap();
    assert_eq!(usage.containers[0].view.id.0, id);
    assert_eq!(usage.total.cgroup.usage_usec, 5);
    assert!(u128::from(usage.total.cgroup.timestamp_nanos) >= began.as_nanos());
    let one = pods.container_usage(&id[..8]).await.unwrap();
    assert_eq!(one.view.id.0, id);
    assert_eq!(pods.list_usage(|_| true).await.len(), 1);
    assert!(pods.list_usage(|_| false).await.is_empty());
}

#[tokio::test]
async fn a_guest_that_does_not_answer_is_left_out_of_lists_and_an_error_by_itself() {
    let node = Node {
        agent_deadline: std::time::Duration::from_millis(300),
        ..Node::default()
    };
    let (pods, pod, id) = running(&node).await;
    let other = pods.run(node.pod("other")).await.unwrap();
    node.host.faults.arm("Stats");
    assert!(pods.list_usage(|_| true).await.is_empty());
    node.host.faults.disarm("Stats");
    node.host.faults.arm("Stats hangs");
    assert_eq!(
        pods.container_usage(&id).await.unwrap_err().kind(),
        ErrorKind::Deadline
    );
    node.host.faults.disarm("Stats hangs");
    pods.stop(&pod).await.unwrap();
    let left = pods.list_usage(|_| true).await;
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].sandbox.id, other);
    assert_eq!(
        pods.pod_usage(&pod).await.unwrap_err().kind(),
        ErrorKind::WrongState
    );
}

#[tokio::test]
async fn updates_one_after_another_add_up_and_survive_a_restart() {
    let node = Node::default();
    let (pods, _, id) = running(&node).await;
    let memory = LimitChange {
        memory_limit_bytes: Some(64 << 20),
        ..LimitChange::default()
    };
    let shares = LimitChange {
        cpu_shares: Some(512),
        oom_score_adj: Some(7),
        unified: BTreeMap::from([("memory.high".to_owned(), "1".to_owned())]),
        ..LimitChange::default()
    };
    // At the same time: neither may lose what the other has changed.
    let (one, two) = tokio::join!(
        pods.update_container(&id, memory),
        pods.update_container(&id, shares)
    );
    one.unwrap();
    two.unwrap();
    let check = async |pods: &Sandboxes| {
        let view = pods.container_status(&id).await.unwrap();
        let resources = view.spec.guest.resources.unwrap();
        assert_eq!(
            (resources.memory_limit_bytes, resources.cpu_shares),
            (64 << 20, 512)
        );
        assert_eq!(resources.unified["memory.high"], "1");
        assert_eq!(view.spec.guest.process.unwrap().oom_score_adj, 7);
    };
    check(&pods).await;
    pods.close().await;
    check(&node.open().await).await;
}

#[tokio::test]
async fn an_update_that_fails_or_cannot_be_met_changes_nothing() {
    let node = Node::default();
    let (pods, pod, id) = running(&node).await;
    let memory = |bytes| LimitChange {
        memory_limit_bytes: Some(bytes),
        ..LimitChange::default()
    };
    node.host.faults.arm("UpdateContainer");
    pods.update_container(&id, memory(1 << 20)).await.unwrap_err();
    node.host.faults.disarm("UpdateContainer");
    let error = pods.update_container(&id, memory(1 << 40)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongState);
    assert!(
        error.to_string().contains("VM was booted with 256 MiB"),
        "{error}"
    );
    let view = pods.container_status(&id).await.unwrap();
    assert_eq!(
        view.spec.guest.resources.unwrap_or_default().memory_limit_bytes,
        0
    );

    let resize = |mib: u64| PodLimitChange {
        limits: PodLimits {
            memory_bytes: Some(mib << 20),
            cpu_milli: Some(1000),
        },
        ..PodLimitChange::default()
    };
    assert_eq!(
        pods.resize(&pod, resize(256)).await.unwrap_err().kind(),
        ErrorKind::WrongState
    );
    pods.resize(&pod, resize(200)).await.unwrap();
    assert_eq!(
        pods.status(&pod).await.unwrap().spec.limits.memory_bytes,
        Some(200 << 20)
    );

    node.host
        .machine(&caisson_sandbox::SandboxId(pod.clone()))
        .guest
        .exit(&id, 0, None);
    until("exited", || async {
        pods.update_container(&id, memory(1 << 20)).await.is_err()
    })
    .await;
}

#[tokio::test]
async fn a_vm_that_can_grow_has_what_new_limits_need_before_they_are_set() {
    let node = Node::default();
    node.host.faults.arm("VMs can grow");
    let (pods, pod, id) = running(&node).await;
    let machine = node.host.machine(&caisson_sandbox::SandboxId(pod.clone()));
    let size = async |pods: &Sandboxes| {
        let vm = pods.status(&pod).await.unwrap().info["vm"].clone();
        (vm["memory_mib"].as_u64().unwrap(), vm["vcpus"].as_u64().unwrap())
    };
    let limits = |mib: u64, cpus: u64| LimitChange {
        memory_limit_bytes: Some(mib << 20),
        cpu_quota_micros: Some(i64::try_from(cpus * 100_000).unwrap()),
        ..LimitChange::default()
    };
    // No VM has more CPUs than the host.
    let cpus = std::thread::available_parallelism().unwrap().get().min(2) as u64;
    pods.update_container(&id, limits(200, 1)).await.unwrap();
    assert_eq!(
        (size(&pods).await, node.host.faults.called("grow")),
        ((256, 1), 0)
    );
    node.host.faults.arm("grow");
    pods.update_container(&id, limits(500, cpus)).await.unwrap_err();
    assert_eq!(size(&pods).await, (256, 1));
    node.host.faults.disarm("grow");
    pods.update_container(&id, limits(500, cpus)).await.unwrap();
    assert_eq!(size(&pods).await, (500, cpus));
    let asked = *machine.guest.cpus.lock().unwrap();
    assert!(cpus == 1 || u64::from(asked) == cpus, "{asked}");

    // A restarted daemon knows how large it is, and how large it can become.
    pods.close().await;
    let pods = node.open().await;
    let asked = node.host.faults.called("grow");
    pods.update_container(&id, limits(400, cpus)).await.unwrap();
    assert_eq!(
        (size(&pods).await, node.host.faults.called("grow")),
        ((500, cpus), asked)
    );
    let pod_limits = |mib: u64| PodLimitChange {
        limits: PodLimits {
            memory_bytes: Some(mib << 20),
            cpu_milli: None,
        },
        ..PodLimitChange::default()
    };
    pods.resize(&pod, pod_limits(1000)).await.unwrap();
    assert_eq!(size(&pods).await, (1040, cpus), "and what the guest takes");
    assert_eq!(
        pods.status(&pod).await.unwrap().spec.limits.memory_bytes,
        Some(1000 << 20)
    );
    let error = pods.resize(&pod, pod_limits(2048)).await.unwrap_err();
    assert!(
        error.to_string().contains("its VM can have 2048 MiB at most"),
        "{error}"
    );
    pods.remove(&pod).await.unwrap();
    node.assert_nothing_left();
}
