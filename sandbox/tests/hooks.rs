//! Whoever has a say in a pod's life is asked at the right points, and what he says counts.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, reason = "tests")]

mod fake_host;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use caisson_sandbox::{
    Sandboxes,
    hooks::{HookError, Moment, PodHooks, Ticket},
    spec::ContainerSpec,
    view::{ContainerState, ContainerView, SandboxView},
};
use fake_host::{Node, chain, container, until};

/// Writes down what it is told; fails or changes what it is told to.
#[derive(Default)]
struct Hooks {
    told: Mutex<Vec<String>>,
    fail: Mutex<Option<&'static str>>,
    /// Who holds a ticket now.
    held: Arc<Mutex<Vec<&'static str>>>,
}

struct Held(Arc<Mutex<Vec<&'static str>>>, &'static str);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.lock().unwrap().retain(|held| *held != self.1);
    }
}

impl Hooks {
    fn note(&self, what: &'static str, of: &str) -> Result<(), HookError> {
        self.told.lock().unwrap().push(format!("{what} {of}"));
        let mut fail = self.fail.lock().unwrap();
        if *fail == Some(what) {
            *fail = None;
            return Err(format!("told to fail {what}").into());
        }
        Ok(())
    }

    fn ticket(&self, what: &'static str) -> Ticket {
        self.held.lock().unwrap().push(what);
        Ticket::holding(Held(self.held.clone(), what))
    }

    fn fail(&self, what: &'static str) {
        *self.fail.lock().unwrap() = Some(what);
    }

    /// What was told, and no more than once each.
    fn told(&self) -> Vec<String> {
        let mut once = Vec::new();
        for told in self.told.lock().unwrap().iter() {
            if !once.contains(told) {
                once.push(told.clone());
            }
        }
        once
    }
}

#[async_trait]
impl PodHooks for Hooks {
    async fn run_pod(&self, pod: &SandboxView) -> Result<Ticket, HookError> {
        assert!(!pod.ips.is_empty());
        self.note("run", &pod.spec.identity.name)?;
        Ok(self.ticket("run"))
    }

    async fn stop_pod(&self, pod: &SandboxView, containers: &[ContainerView]) {
        for container in containers {
            assert!(matches!(container.state, ContainerState::Exited { .. }));
        }
        drop(self.note("stop", &pod.spec.identity.name));
    }

    async fn remove_pod(&self, pod: &SandboxView, _: &[ContainerView]) -> Ticket {
        drop(self.note("remove", &pod.spec.identity.name));
        self.ticket("remove")
    }

    async fn create_container(
        &self,
        _: &SandboxView,
        container: &ContainerView,
    ) -> Result<(ContainerSpec, Ticket), HookError> {
        self.note("create", &container.spec.name)?;
        let mut spec = container.spec.clone();
        spec.annotations.insert("hook".into(), "was here".into());
        Ok((spec, self.ticket("create")))
    }

    async fn container(
        &self,
        moment: Moment,
        _: &SandboxView,
        container: &ContainerView,
    ) -> Result<(), HookError> {
        let what = match moment {
            Moment::Created => "created",
            Moment::Starting => "starting",
            Moment::Started => "started",
            Moment::Ended => "ended",
        };
        self.note(what, &container.spec.name)
    }

    async fn remove_container(&self, _: &SandboxView, container: &ContainerView) -> Ticket {
        drop(self.note("removed", &container.spec.name));
        self.ticket("removed")
    }
}

async fn open(node: &Node) -> (Sandboxes, Arc<Hooks>) {
    let hooks = Arc::<Hooks>::default();
    (node.open_with_hooks(hooks.clone()).await, hooks)
}

#[tokio::test]
async fn a_life_is_told_in_order_and_tickets_are_held_until_lists_are_true() {
    let node = Node::default();
    let (pods, hooks) = open(&node).await;
    let pod = pods.run(node.pod("p")).await.unwrap();
    until("the ticket is given back", || async {
        hooks.held.lock().unwrap().is_empty()
    })
    .await;
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    let view = pods.container_status(&id.0).await.unwrap();
    assert_eq!(view.spec.annotations["hook"], "was here");
    pods.start_container(&id.0).await.unwrap();
    pods.stop_container(&id.0, Duration::ZERO).await.unwrap();
    let stopped = [
        "run p",
        "create c",
        "created c",
        "starting c",
        "started c",
        "ended c",
    ];
    assert_eq!(hooks.told(), stopped);
    pods.remove_container(&id.0).await.unwrap();
    let second = pods.create_container(&pod.0, container("d")).await.unwrap();
    pods.start_container(&second.0).await.unwrap();
    pods.stop(&pod.0).await.unwrap();
    pods.remove(&pod.0).await.unwrap();
    let told = hooks.told();
    let end = [
        "removed c",
        "create d",
        "created d",
        "starting d",
        "started d",
        "stop p",
        "remove p",
    ];
    assert_eq!(told[..6], stopped);
    assert_eq!(told[6..], end);
    assert!(hooks.held.lock().unwrap().is_empty());
    pods.close().await;
    node.assert_nothing_left();
}

#[tokio::test]
async fn a_hook_that_fails_fails_the_pod_or_container_and_leaves_nothing() {
    let node = Node::default();
    let (pods, hooks) = open(&node).await;
    hooks.fail("run");
    let error = pods.run(node.pod("p")).await.unwrap_err();
    assert!(chain(&error).contains("told to fail run"), "{}", chain(&error));
    assert!(pods.list().await.is_empty());
    until("the pod is undone", || async { pods.is_empty() }).await;
    node.assert_nothing_left();

    let pod = pods.run(node.pod("p")).await.unwrap();
    hooks.fail("create");
    let error = pods.create_container(&pod.0, container("c")).await.unwrap_err();
    assert!(chain(&error).contains("told to fail create"), "{}", chain(&error));
    assert!(pods.list_containers().await.is_empty());
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    hooks.fail("starting");
    let error = pods.start_container(&id.0).await.unwrap_err();
    assert!(
        chain(&error).contains("told to fail starting"),
        "{}",
        chain(&error)
    );
    let state = pods.container_status(&id.0).await.unwrap().state;
    assert!(
        matches!(state, ContainerState::Exited { started_at: None, .. }),
        "{state:?}"
    );
    assert_eq!(hooks.told().last().unwrap(), "ended c");
    pods.remove(&pod.0).await.unwrap();
    pods.close().await;
}

#[tokio::test]
async fn the_end_of_a_vm_is_the_end_of_its_containers() {
    let node = Node::default();
    let (pods, hooks) = open(&node).await;
    let pod = pods.run(node.pod("p")).await.unwrap();
    let id = pods.create_container(&pod.0, container("c")).await.unwrap();
    pods.start_container(&id.0).await.unwrap();
    node.host.machine(&pod).die("a test's whim");
    until("the end is told", || async {
        hooks.told().contains(&"ended c".to_owned())
    })
    .await;
    assert!(!hooks.told().contains(&"stop p".to_owned()));
    pods.remove(&pod.0).await.unwrap();
    assert_eq!(hooks.told()[5..], ["ended c", "stop p", "remove p"]);
    pods.close().await;
}
