//! Plugins that behave, and plugins that do not.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fake;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_nri::v1alpha1::{
    ContainerAdjustment, ContainerEviction, ContainerRequest, ContainerUpdate, CreateContainerResponse,
    Event, KeyValue, LinuxContainerUpdate, LinuxMemory, LinuxResources, OptionalInt64, StateChangeEvent,
    SynchronizeRequest, SynchronizeResponse, UpdateContainerResponse, UpdateContainersRequest,
    UpdateContainersResponse, ValidateContainerAdjustmentRequest, ValidateContainerAdjustmentResponse,
};
use fake::{Answer, Fake, Served, container, content, fine, pod, reply, scripted};
use prost::Message as _;

fn with_env(key: &str, value: &str) -> CreateContainerResponse {
    CreateContainerResponse {
        adjust: Some(ContainerAdjustment {
            env: vec![KeyValue {
                key: key.into(),
                value: value.into(),
            }],
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn limit(bytes: i64) -> LinuxResources {
    LinuxResources {
        memory: Some(LinuxMemory {
            limit: Some(OptionalInt64 { value: bytes }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn update(id: &str, bytes: i64) -> ContainerUpdate {
    ContainerUpdate {
        container_id: id.into(),
        linux: Some(LinuxContainerUpdate {
            resources: Some(limit(bytes)),
        }),
        ignore_failure: false,
    }
}

#[tokio::test]
async fn a_pods_whole_life_is_told_in_order_and_each_end_once() {
    let served = Served::start().await;
    let plugin = served.join("00", "a", content(0)).await;
    let (p, c) = (pod("p"), container("c"));
    let nri = &served.nri;
    drop(nri.run_pod_sandbox(&p).await.unwrap());
    drop(nri.create_container(&p, c.clone()).await.unwrap());
    nri.post_create_container(&p, &c).await;
    nri.start_container(&p, &c).await.unwrap();
    nri.post_start_container(&p, &c).await;
    assert_eq!(nri.update_container(&p, &c, limit(1)).await.unwrap(), None);
    nri.post_update_container(&p, &c).await;
    nri.update_pod_sandbox(&p, None, Some(limit(2))).await.unwrap();
    nri.post_update_pod_sandbox(&p).await;
    nri.stop_container(&p, &c).await;
    nri.stop_container(&p, &c).await;
    nri.stop_pod_sandbox(&p, std::slice::from_ref(&c)).await;
    nri.stop_pod_sandbox(&p, std::slice::from_ref(&c)).await;
    drop(nri.remove_container(&p, &c).await);
    drop(nri.remove_pod_sandbox(&p, std::slice::from_ref(&c)).await);
    drop(nri.remove_pod_sandbox(&p, &[]).await);
    let expected = [
        "RunPodSandbox",
        "CreateContainer",
        "ValidateContainerAdjustment",
        "PostCreateContainer",
        "StartContainer",
        "PostStartContainer",
        "UpdateContainer",
        "PostUpdateContainer",
        "UpdatePodSandbox",
        "PostUpdatePodSandbox",
        "StopContainer",
        "StopPodSandbox",
        "RemoveContainer",
        "RemovePodSandbox",
    ];
    assert_eq!(plugin.events(), expected);
    nri.close().await;
    assert_eq!(plugin.events().last().unwrap(), "Shutdown");
}

#[tokio::test]
async fn a_plugin_hears_of_its_events_only() {
    let served = Served::start().await;
    let bit = |event: Event| 1 << (event as i32 - 1);
    let mask = bit(Event::StartContainer) | bit(Event::RemovePodSandbox);
    let plugin = served.join("00", "a", content(mask)).await;
    let (p, c) = (pod("p"), container("c"));
    drop(served.nri.run_pod_sandbox(&p).await.unwrap());
    drop(served.nri.create_container(&p, c.clone()).await.unwrap());
    served.nri.start_container(&p, &c).await.unwrap();
    drop(served.nri.remove_pod_sandbox(&p, &[c]).await);
    assert_eq!(plugin.events(), ["StartContainer", "RemovePodSandbox"]);
}

#[tokio::test]
async fn plugins_are_asked_by_index_and_see_what_those_before_them_want() {
    let served = Served::start().await;
    let seen = Arc::<Mutex<Vec<String>>>::default();
    let ask = |name: &'static str| {
        let seen = seen.clone();
        scripted(move |method, payload| {
            if method != "CreateContainer" {
                return fine();
            }
            let request = ContainerRequest::decode(payload).unwrap();
            let env = request.container.unwrap().env.join(" ");
            seen.lock().unwrap().push(format!("{name}: {env}"));
            reply(&with_env(name, "1"))
        })
    };
    let _late = served.join("90", "late", ask("LATE")).await;
    let _early = served.join("10", "early", ask("EARLY")).await;
    let created = served
        .nri
        .create_container(&pod("p"), container("c"))
        .await
        .unwrap();
    assert_eq!(*seen.lock().unwrap(), ["EARLY: ", "LATE: EARLY=1"]);
    let keys: Vec<_> = created.adjust.env.iter().map(|pair| pair.key.as_str()).collect();
    assert_eq!(keys, ["EARLY", "LATE"]);
}

#[tokio::test]
async fn two_plugins_that_change_one_thing_fail_the_creation_with_both_names() {
    let served = Served::start().await;
    let ask = || {
        scripted(|method, _| match method {
            "CreateContainer" => reply(&with_env("A", "1")),
            _ => fine(),
        })
    };
    let first = served.join("00", "a", ask()).await;
    let _second = served.join("01", "b", ask()).await;
    let error = served
        .nri
        .create_container(&pod("p"), container("c"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "NRI plugins 00-a and 01-b both change env \"A\" of container c"
    );
    assert_eq!(
        first.events(),
        ["CreateContainer", "StopContainer", "RemoveContainer"],
        "who was told of a beginning is told of the end"
    );
}

#[tokio::test]
async fn a_hook_that_fails_fails_the_call_in_its_own_words_and_a_retry_goes_through() {
    let served = Served::start().await;
    let mut failures = 2;
    let plugin = served
        .join(
            "00",
            "a",
            scripted(move |method, _| match method {
                "RunPodSandbox" | "StartContainer" if failures > 0 => {
                    failures -= 1;
                    Answer::Fail(2, "not today")
                }
                _ => fine(),
            }),
        )
        .await;
    let (p, c) = (pod("p"), container("c"));
    let error = served.nri.run_pod_sandbox(&p).await.unwrap_err().to_string();
    assert_eq!(error, "NRI plugin 00-a failed RunPodSandbox: not today");
    assert_eq!(
        plugin.events(),
        ["RunPodSandbox", "StopPodSandbox", "RemovePodSandbox"]
    );
    assert!(served.nri.start_container(&p, &c).await.is_err());
    drop(served.nri.run_pod_sandbox(&p).await.unwrap());
    served.nri.start_container(&p, &c).await.unwrap();
    assert_eq!(served.nri.plugins().await, 1);
}

#[tokio::test]
async fn a_plugin_that_validates_can_reject_what_others_want() {
    let served = Served::start().await;
    let _asks = served
        .join(
            "00",
            "a",
            scripted(|method, _| match method {
                "CreateContainer" => reply(&with_env("A", "1")),
                _ => fine(),
            }),
        )
        .await;
    let _validates = served
        .join(
            "01",
            "b",
            scripted(|method, payload| {
                if method != "ValidateContainerAdjustment" {
                    return fine();
                }
                let request = ValidateContainerAdjustmentRequest::decode(payload).unwrap();
                assert_eq!(request.plugins.len(), 2);
                assert!(request.container.unwrap().env.is_empty());
                let owners = &request.owners.unwrap().owners["c"];
                reply(&ValidateContainerAdjustmentResponse {
                    reject: owners.compound.values().any(|field| field.owners["A"] == "00-a"),
                    reason: "A is mine".into(),
                })
            }),
        )
        .await;
    let error = served
        .nri
        .create_container(&pod("p"), container("c"))
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "NRI plugin 01-b rejects the adjustment of container c: A is mine"
    );
}

#[tokio::test]
async fn a_plugin_that_does_not_answer_is_disconnected_and_the_call_goes_on() {
    let served = Served::with(Duration::from_millis(200)).await;
    let mut silent = served
        .join(
            "00",
            "silent",
            scripted(|method, _| match method {
                "RunPodSandbox" => Answer::Silence,
                _ => fine(),
            }),
        )
        .await;
    let other = served.join("01", "other", content(0)).await;
    drop(served.nri.run_pod_sandbox(&pod("p")).await.unwrap());
    silent.hung_up().await;
    served.plugins(1).await;
    assert_eq!(other.events(), ["RunPodSandbox"]);
}

#[tokio::test]
async fn a_plugin_that_breaks_the_protocol_or_goes_in_the_middle_of_a_call_is_out_and_the_call_goes_on() {
    let frame = |kind: u8, lane: u8| {
        let mut bytes = vec![0, 0, 0, lane, 0, 0, 0, 12, 0, 0, 0, 2, 0, 0, 0, 1, kind, 0];
        bytes.extend([0xff, 0xff]);
        bytes
    };
    type Way = fn(&[u8]) -> Answer;
    let ways: [(&str, Way, Vec<u8>); 7] = [
        ("hang-up", |_| Answer::Hangup, vec![]),
        (
            "frame too large",
            |bytes| Answer::Bytes(bytes.to_vec()),
            vec![0, 0, 0, 1, 0xff, 0, 0, 0],
        ),
        (
            "message too large",
            |bytes| Answer::Bytes(bytes.to_vec()),
            vec![0, 0, 0, 1, 0, 0, 0, 10, 0xff, 0, 0, 0, 0, 0, 0, 1, 2, 0],
        ),
        ("unknown type", |bytes| Answer::Bytes(bytes.to_vec()), frame(9, 1)),
        (
            "wrong direction",
            |bytes| Answer::Bytes(bytes.to_vec()),
            frame(1, 1),
        ),
        (
            "answer to nothing",
            |bytes| Answer::Bytes(bytes.to_vec()),
            frame(2, 2),
        ),
        (
            "envelope of garbage",
            |bytes| Answer::Bytes(bytes.to_vec()),
            frame(2, 1),
        ),
    ];
    let served = Served::start().await;
    for (what, way, bytes) in ways {
        let mut broken = served
            .join(
                "00",
                "broken",
                scripted(move |method, _| match method {
                    "RunPodSandbox" => way(&bytes),
                    _ => fine(),
                }),
            )
            .await;
        let run = tokio::time::timeout(Duration::from_secs(20), served.nri.run_pod_sandbox(&pod(what))).await;
        drop(run.unwrap_or_else(|_| panic!("{what}: the call hangs")).unwrap());
        broken.hung_up().await;
        served.plugins(0).await;
    }
}

#[tokio::test]
async fn an_answer_that_is_not_the_message_disconnects_too() {
    let served = Served::start().await;
    let mut broken = served
        .join(
            "00",
            "broken",
            scripted(|method, _| match method {
                "CreateContainer" => Answer::Reply(vec![0xff; 9]),
                _ => fine(),
            }),
        )
        .await;
    let created = served
        .nri
        .create_container(&pod("p"), container("c"))
        .await
        .unwrap();
    assert_eq!(created.adjust, ContainerAdjustment::default());
    broken.hung_up().await;
}

#[tokio::test]
async fn who_does_not_register_in_time_or_with_a_bad_name_is_not_taken() {
    let served = Served::with(Duration::from_millis(200)).await;
    let mut mute = Fake::connect(&served.socket, content(0)).await;
    mute.hung_up().await;
    for (index, name) in [("1", "a"), ("ab", "a"), ("00", ""), ("00", "../a")] {
        let mut fake = Fake::connect(&served.socket, content(0)).await;
        let answer = fake.register(index, name).await;
        assert_ne!(answer.status.unwrap().code, 0, "{index:?} {name:?}");
        fake.hung_up().await;
    }
    let mut greedy = Fake::connect(&served.socket, content(-1)).await;
    greedy.register("00", "greedy").await;
    greedy.hung_up().await;
    served.plugins(0).await;
}

#[tokio::test]
async fn a_plugin_that_comes_late_is_told_of_everything_and_its_updates_are_done() {
    let served = Served::start().await;
    *served.node.pods.lock().unwrap() = vec![pod("p")];
    *served.node.containers.lock().unwrap() = vec![container("c"), container("d")];
    let told = Arc::<Mutex<(usize, usize)>>::default();
    let ours = told.clone();
    let plugin = served
        .join(
            "00",
            "a",
            scripted(move |method, payload| {
                if method != "Synchronize" {
                    return fine();
                }
                let request = SynchronizeRequest::decode(payload).unwrap();
                *ours.lock().unwrap() = (request.pods.len(), request.containers.len());
                reply(&SynchronizeResponse {
                    update: vec![update("c", 7)],
                    more: false,
                })
            }),
        )
        .await;
    assert_eq!(*told.lock().unwrap(), (1, 2));
    let waits = async {
        while served.node.updates.lock().unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waits)
        .await
        .unwrap();
    assert_eq!(*served.node.updates.lock().unwrap(), [update("c", 7)]);
    // What it was told of, it is told the end of.
    drop(served.nri.remove_pod_sandbox(&pod("p"), &[container("c")]).await);
    assert_eq!(
        plugin.events(),
        [
            "StopContainer",
            "RemoveContainer",
            "StopPodSandbox",
            "RemovePodSandbox"
        ]
    );
}

#[tokio::test]
async fn nothing_is_lost_between_synchronization_and_the_first_event() {
    let served = Served::start().await;
    let created = served
        .nri
        .create_container(&pod("p"), container("c"))
        .await
        .unwrap();
    // The container is not listed yet, so a plugin that comes now has to wait.
    let mut plugin = Fake::connect(&served.socket, content(0)).await;
    plugin.register("00", "a").await;
    let configured = async {
        while !plugin.methods().contains(&"Configure".to_owned()) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), configured)
        .await
        .unwrap();
    assert_eq!(served.nri.plugins().await, 0);
    served.node.containers.lock().unwrap().push(container("c"));
    drop(created.ticket);
    served.plugins(1).await;
    let calls = plugin.calls.lock().unwrap().clone();
    let (_, payload) = calls.iter().find(|(method, _)| method == "Synchronize").unwrap();
    let told = SynchronizeRequest::decode(payload.as_slice()).unwrap();
    assert_eq!(told.containers, [container("c")]);
}

#[tokio::test]
async fn a_plugin_may_ask_for_updates_and_evictions_at_any_time() {
    let served = Served::start().await;
    let mut plugin = served.join("00", "a", content(0)).await;
    let request = UpdateContainersRequest {
        update: vec![update("c", 1), update("unknown", 2)],
        evict: vec![ContainerEviction {
            container_id: "d".into(),
            reason: "too loud".into(),
        }],
    };
    let answer = plugin.call("UpdateContainers", &request).await.unwrap();
    let failed = UpdateContainersResponse::decode(answer.payload.as_slice())
        .unwrap()
        .failed;
    assert_eq!(failed, [update("unknown", 2)]);
    assert_eq!(*served.node.evicted.lock().unwrap(), ["d"]);
    let answer = plugin.call("Nonsense", &request).await.unwrap();
    assert_eq!(answer.status.unwrap().code, 12);
}

#[tokio::test]
async fn an_update_is_what_plugins_make_of_it_and_others_come_with_it() {
    let served = Served::start().await;
    let _plugin = served
        .join(
            "00",
            "a",
            scripted(|method, _| match method {
                "UpdateContainer" => reply(&UpdateContainerResponse {
                    update: vec![update("c", 5), update("d", 6)],
                    evict: vec![],
                }),
                _ => fine(),
            }),
        )
        .await;
    let changed = served
        .nri
        .update_container(&pod("p"), &container("c"), limit(1))
        .await
        .unwrap();
    assert_eq!(changed, Some(limit(5)));
    assert_eq!(*served.node.updates.lock().unwrap(), [update("d", 6)]);
}

#[tokio::test]
async fn a_plugin_of_before_the_calls_were_split_hears_of_state_changes() {
    let served = Served::start().await;
    let plugin = served
        .join(
            "00",
            "old",
            scripted(|method, _| match method {
                "RunPodSandbox" | "StartContainer" | "RemovePodSandbox" | "UpdatePodSandbox" => {
                    Answer::Fail(12, "unimplemented")
                }
                _ => fine(),
            }),
        )
        .await;
    let p = pod("p");
    drop(served.nri.run_pod_sandbox(&p).await.unwrap());
    served.nri.start_container(&p, &container("c")).await.unwrap();
    served.nri.update_pod_sandbox(&p, None, None).await.unwrap();
    let calls = plugin.calls.lock().unwrap().clone();
    let changes: Vec<_> = calls
        .iter()
        .filter(|(method, _)| method == "StateChange")
        .map(|(_, payload)| StateChangeEvent::decode(payload.as_slice()).unwrap().event())
        .collect();
    assert_eq!(changes, [Event::RunPodSandbox, Event::StartContainer]);
}

#[tokio::test]
async fn a_plugin_that_leaves_is_not_called_any_more() {
    let served = Served::start().await;
    let plugin = served.join("00", "a", content(0)).await;
    plugin.leave().await;
    served.plugins(0).await;
    drop(served.nri.run_pod_sandbox(&pod("p")).await.unwrap());
}

#[tokio::test]
async fn there_is_an_end_to_the_number_of_plugins() {
    let served = Served::start().await;
    let mut plugins = Vec::new();
    for _ in 0..64 {
        plugins.push(Fake::connect(&served.socket, content(0)).await);
    }
    let mut more = Fake::connect(&served.socket, content(0)).await;
    more.hung_up().await;
}
