//! Random calls, valid and not, side by side, with clients that go away, faults that come and go, VMs that die and daemons that are restarted:
//! whatever happens, every call has an answer in time, what is listed makes sense, each step of a life is told once, and in the end nothing
//! is left.
//!
//! The daemon is the real one behind its socket; only the hypervisor, the network and the guest are made up.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

#[expect(
    clippy::disallowed_methods,
    reason = "the agent made up there is a server of its own, not the CRI's"
)]
#[path = "../../sandbox/tests/fake_host/mod.rs"]
mod fake_host;
#[path = "random_calls/registry.rs"]
mod registry;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    future::Future,
    sync::{Arc, Mutex},
    time::Duration,
};

use caisson_cri_api::v1::{self, ContainerEventType, runtime_service_client::RuntimeServiceClient};
use caisson_image::{Credentials, ImageStore, ImageStoreConfig};
use caisson_net::Network;
use caissond::{
    config::{Config, Overrides},
    inquiry,
    pod_cidr::PodCidrStore,
    rpc::service::Cri,
    runtime::{Runtime, Settings},
    server, socket,
};
use fake_host::Node;
use proptest::prelude::*;
use tokio::{
    sync::oneshot,
    task::{JoinHandle, JoinSet},
};
use tonic::{Code, Status, transport::Channel};

/// Longest time for any answer: far above every deadline that the node below has.
const ANSWER: Duration = Duration::from_secs(60);

/// Faults that a guest or a host may have for a while.
const FAULTS: [&str; 12] = [
    "launch",
    "setup",
    "teardown",
    "kill",
    "attach",
    "CreateContainer",
    "StartContainer",
    "RemoveContainer",
    "UpdateContainer",
    "Stats hangs",
    "term is ignored",
    "ConfigureSandbox",
];

/// One thing that happens. Numbers choose among what there is.
#[derive(Debug, Clone)]
enum Step {
    RunPod(u8),
    StopPod(u8),
    RemovePod(u8),
    Create(u8, u8),
    Start(u8),
    StopContainer(u8),
    RemoveContainer(u8),
    Update(u8, u16),
    Resize(u8, u16),
    Exec(u8),
    Stats(u8),
    Look(u8),
    /// The container's process ends.
    Exit(u8),
    /// The VM ends.
    Die(u8),
    Arm(u8),
    Disarm,
    /// Kills the daemon's tasks in order, and starts it again.
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let n = any::<u8>;
    prop_oneof![
        4 => n().prop_map(Step::RunPod),
        1 => n().prop_map(Step::StopPod),
        1 => n().prop_map(Step::RemovePod),
        5 => (n(), n()).prop_map(|(pod, name)| Step::Create(pod, name)),
        5 => n().prop_map(Step::Start),
        2 => n().prop_map(Step::StopContainer),
        2 => n().prop_map(Step::RemoveContainer),
        2 => (n(), any::<u16>()).prop_map(|(id, mib)| Step::Update(id, mib)),
        1 => (n(), any::<u16>()).prop_map(|(id, mib)| Step::Resize(id, mib)),
        1 => n().prop_map(Step::Exec),
        1 => n().prop_map(Step::Stats),
        2 => n().prop_map(Step::Look),
        2 => n().prop_map(Step::Exit),
        1 => n().prop_map(Step::Die),
        1 => n().prop_map(Step::Arm),
        2 => Just(Step::Disarm),
        1 => Just(Step::Restart),
    ]
}

/// A call, whether its client goes away at once, and whether the next one waits for it.
fn call() -> impl Strategy<Value = (Step, bool, bool)> {
    (step(), prop::bool::weighted(0.1), prop::bool::weighted(0.5))
}

/// A served daemon.
struct Served {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), server::ServeError>>,
    events: JoinHandle<()>,
}

/// What has been told of each subject, in order.
type Told = Arc<Mutex<BTreeMap<String, Vec<ContainerEventType>>>>;

/// The example, which cargo builds with the tests.
fn layer_converter() -> std::path::PathBuf {
    let exe = std::env::current_exe().unwrap();
    let build = exe.parent().and_then(std::path::Path::parent).unwrap();
    let path = build.join("examples/layer_converter");
    assert!(path.is_file(), "{} was not built", path.display());
    path
}

/// A node, its daemon, and what clients know.
struct World {
    node: Node,
    images: ImageStore,
    /// Id of the only one.
    image: String,
    served: Option<Served>,
    pods: Arc<Mutex<BTreeSet<String>>>,
    containers: Arc<Mutex<BTreeSet<String>>>,
    told: Told,
}

impl World {
    async fn new() -> Self {
        let node = Node {
            boot_deadline: Duration::from_secs(5),
            agent_deadline: Duration::from_secs(2),
            ..Node::default()
        };
        let images = ImageStore::open(ImageStoreConfig {
            root: node.dir.path().join("images"),
            insecure_registries: Vec::new(),
            mirrors: BTreeMap::new(),
            hosts_dirs: Vec::new(),
            auth_files: Vec::new(),
            signatures: BTreeMap::new(),
            ca_files: Vec::new(),
            max_image_bytes: 1 << 20,
            stall_deadline: Duration::from_secs(10),
            converter: layer_converter(),
        })
        .await
        .unwrap();
        let registry = registry::serve().await;
        let image = images
            .pull(&registry.image, Credentials::Anonymous)
            .await
            .unwrap()
            .id;
        let mut world = Self {
            node,
            images,
            image,
            served: None,
            pods: Arc::default(),
            containers: Arc::default(),
            told: Arc::default(),
        };
        world.serve().await;
        world
    }

    async fn serve(&mut self) {
        let dir = self.node.dir.path();
        let file = dir.join("config.toml");
        std::fs::write(&file, "").unwrap();
        let overrides = Overrides {
            root: Some(dir.join("daemon")),
            run_dir: Some(dir.join("daemon-run")),
            ..Overrides::default()
        };
        let config = Config::load(Some(&file), &overrides).unwrap();
        // Nobody comes: no test here streams.
        let (_, streaming) = caisson_streaming::Server::bind(&config.streaming).await.unwrap();
        let runtime = Runtime {
            sandboxes: self.node.open().await,
            images: self.images.clone(),
            network: Network::new(config.network.clone()),
            hypervisor: Arc::new(self.node.host.clone()),
            nri: None,
            pod_cidr: Arc::new(PodCidrStore::open(dir)),
            streaming,
            settings: Arc::new(Settings {
                kernel: "/kernel".into(),
                initramfs: "/initramfs".into(),
                sandboxes_root: self.node.root(),
                cgroup_driver: config.daemon.cgroup_driver,
                config: config.summary(),
            }),
        };
        let (listener, bound) = socket::bind(&dir.join("cri.sock"), socket::FOR_GROUP).unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(server::serve(Cri::new(runtime.clone()), listener, async move {
            drop(stopped.await);
        }));
        let client = RuntimeServiceClient::new(inquiry::connect(bound.path()).await.unwrap());
        // The directory goes with the test.
        std::mem::forget(bound);
        let events = listen(client.clone(), self.told.clone()).await;
        self.served = Some(Served {
            runtime,
            client,
            stop,
            server,
            events,
        });
    }

    async fn restart(&mut self) {
        let served = self.served.take().unwrap();
        served.runtime.sandboxes.end_events();
        served.stop.send(()).unwrap();
        drop(served.client);
        answered("the server's end", served.server)
            .await
            .unwrap()
            .unwrap();
        answered("the end of events", served.events).await.unwrap();
        served.runtime.sandboxes.close().await;
        drop(served.runtime);
        std::fs::remove_file(self.node.dir.path().join("cri.sock")).unwrap_or_default();
        // What ended or was rolled back meanwhile is listed, not told.
        self.told.lock().unwrap().clear();
        self.serve().await;
    }

    fn client(&self) -> RuntimeServiceClient<Channel> {
        self.served.as_ref().unwrap().client.clone()
    }

    fn pod(&self, n: u8) -> String {
        choose(&self.pods, n)
    }

    fn container(&self, n: u8) -> String {
        choose(&self.containers, n)
    }
}

/// One of the ids that are known; now and then one that is not, or half of one.
fn choose(ids: &Mutex<BTreeSet<String>>, n: u8) -> String {
    let ids = ids.lock().unwrap();
    let id = ids.iter().nth(usize::from(n) % ids.len().max(1)).cloned();
    match (id, n) {
        (None, _) | (_, 255) => "nobody".to_owned(),
        (Some(id), n) if n % 16 == 7 => id[..32].to_owned(),
        (Some(id), _) => id,
    }
}

async fn answered<T>(what: &str, call: impl Future<Output = T>) -> T {
    tokio::time::timeout(ANSWER, call)
        .await
        .unwrap_or_else(|_| panic!("never answered: {what}"))
}

/// Records events until the stream ends.
async fn listen(mut client: RuntimeServiceClient<Channel>, told: Told) -> JoinHandle<()> {
    let mut events = client
        .get_container_events(v1::GetEventsRequest {})
        .await
        .unwrap()
        .into_inner();
    tokio::spawn(async move {
        while let Ok(Some(event)) = events.message().await {
            let kind = event.container_event_type();
            assert!(event.pod_sandbox_status.is_some());
            told.lock()
                .unwrap()
                .entry(event.container_id)
                .or_default()
                .push(kind);
        }
    })
}

/// An answer that a caller could make sense of: no failure of the daemon itself.
fn sensible(what: &str, result: Result<(), Status>) {
    let Err(status) = result else { return };
    let understood = [
        Code::InvalidArgument,
        Code::NotFound,
        Code::AlreadyExists,
        Code::FailedPrecondition,
        Code::ResourceExhausted,
        Code::DeadlineExceeded,
        Code::Aborted,
        // Faults that were armed; the text has their name.
        Code::Internal,
    ];
    assert!(understood.contains(&status.code()), "{what}: {status:?}");
    assert!(!status.message().is_empty(), "{what}: no reason");
}

type Call = std::pin::Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;

/// A call as a client makes it; `None` for what is no call.
fn as_call(world: &World, step: &Step) -> Option<Call> {
    let mut client = world.client();
    let (pods, containers) = (world.pods.clone(), world.containers.clone());
    macro_rules! calling {
        ($method:ident($request:ident { $($field:ident: $value:expr),* $(,)? })) => {{
            #[allow(clippy::needless_update, reason = "some requests have no other fields")]
            let request = v1::$request { $($field: $value,)* ..Default::default() };
            Box::pin(async move { client.$method(request).await.map(drop) }) as Call
        }};
    }
    Some(match *step {
        Step::RunPod(n) => {
            let request = v1::RunPodSandboxRequest {
                config: Some(pod_config(world, n)),
                ..Default::default()
            };
            Box::pin(async move {
                let id = client.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
                pods.lock().unwrap().insert(id);
                Ok(())
            })
        }
        Step::Create(pod, n) => {
            let request = v1::CreateContainerRequest {
                pod_sandbox_id: world.pod(pod),
                config: Some(container_config(world, n)),
                ..Default::default()
            };
            Box::pin(async move {
                let id = client.create_container(request).await?.into_inner().container_id;
                containers.lock().unwrap().insert(id);
                Ok(())
            })
        }
        Step::StopPod(n) => calling!(stop_pod_sandbox(StopPodSandboxRequest {
            pod_sandbox_id: world.pod(n)
        })),
        Step::RemovePod(n) => {
            calling!(remove_pod_sandbox(RemovePodSandboxRequest {
                pod_sandbox_id: world.pod(n)
            }))
        }
        Step::Start(n) => calling!(start_container(StartContainerRequest {
            container_id: world.container(n)
        })),
        Step::StopContainer(n) => calling!(stop_container(StopContainerRequest {
            container_id: world.container(n),
            timeout: i64::from(n % 2),
        })),
        Step::RemoveContainer(n) => {
            calling!(remove_container(RemoveContainerRequest {
                container_id: world.container(n)
            }))
        }
        Step::Update(n, mib) => calling!(update_container_resources(UpdateContainerResourcesRequest {
            container_id: world.container(n),
            linux: Some(memory(mib)),
        })),
        Step::Resize(n, mib) => calling!(update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: world.pod(n),
            resources: Some(memory(mib)),
        })),
        Step::Exec(n) => calling!(exec_sync(ExecSyncRequest {
            container_id: world.container(n),
            cmd: vec!["true".to_owned()],
            timeout: 1,
        })),
        Step::Stats(n) if n % 2 == 0 => calling!(list_pod_sandbox_stats(ListPodSandboxStatsRequest {})),
        Step::Stats(n) => calling!(container_stats(ContainerStatsRequest {
            container_id: world.container(n)
        })),
        Step::Look(n) if n % 2 == 0 => {
            calling!(container_status(ContainerStatusRequest {
                container_id: world.container(n)
            }))
        }
        Step::Look(n) => calling!(pod_sandbox_status(PodSandboxStatusRequest {
            pod_sandbox_id: world.pod(n)
        })),
        Step::Exit(_) | Step::Die(_) | Step::Arm(_) | Step::Disarm | Step::Restart => return None,
    })
}

fn pod_config(world: &World, n: u8) -> v1::PodSandboxConfig {
    v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: format!("pod-{}", n % 3),
            uid: "uid".into(),
            namespace: "ns".into(),
            attempt: u32::from(n / 3 % 2),
        }),
        log_directory: world.node.logs().display().to_string(),
        ..Default::default()
    }
}

fn container_config(world: &World, n: u8) -> v1::ContainerConfig {
    let image = if n == 255 { "unknown/image:1" } else { &world.image };
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata {
            name: format!("c-{}", n % 4),
            attempt: u32::from(n / 4 % 2),
        }),
        image: Some(v1::ImageSpec {
            image: image.into(),
            ..Default::default()
        }),
        command: vec!["sleep".into()],
        ..Default::default()
    }
}

fn memory(mib: u16) -> v1::LinuxContainerResources {
    v1::LinuxContainerResources {
        memory_limit_in_bytes: i64::from(mib) << 20,
        ..Default::default()
    }
}

/// What happens without a call.
async fn happen(world: &mut World, step: &Step) {
    let machines: Vec<_> = world
        .node
        .host
        .machines
        .lock()
        .unwrap()
        .values()
        .cloned()
        .collect();
    match *step {
        Step::Exit(n) => {
            let id = world.container(n);
            machines
                .iter()
                .for_each(|machine| machine.guest.exit(&id, i32::from(n), None));
        }
        Step::Die(n) => {
            if let Some(machine) = machines.get(usize::from(n) % machines.len().max(1)) {
                machine.die("was killed by signal 9");
            }
        }
        Step::Arm(n) => world.node.host.faults.arm(FAULTS[usize::from(n) % FAULTS.len()]),
        Step::Disarm => disarm(world),
        Step::Restart => world.restart().await,
        _ => {}
    }
}

fn disarm(world: &World) {
    FAULTS
        .iter()
        .for_each(|fault| world.node.host.faults.disarm(fault));
}

/// What every client may rely on at any moment.
async fn check_lists(world: &World) {
    let mut client = world.client();
    let containers = answered(
        "ListContainers",
        client.list_containers(v1::ListContainersRequest::default()),
    );
    let containers = containers.await.unwrap().into_inner().containers;
    let pods = answered(
        "ListPodSandbox",
        client.list_pod_sandbox(v1::ListPodSandboxRequest::default()),
    );
    let pods = pods.await.unwrap().into_inner().items;
    let mut names = BTreeSet::new();
    for pod in &pods {
        let name = format!("{:?}", pod.metadata);
        // A pod that was stopped holds its name until it is removed.
        assert!(names.insert(name.clone()), "two pods have the name {name}");
    }
    let states: HashMap<_, _> = pods.iter().map(|pod| (pod.id.as_str(), pod.state())).collect();
    let mut names = BTreeSet::new();
    for container in &containers {
        let name = format!("{} {:?}", container.pod_sandbox_id, container.metadata);
        assert!(names.insert(name.clone()), "two containers have the name {name}");
        // Listed before the pods were, so its pod may be gone by now, but not be stopped without it.
        if states.get(container.pod_sandbox_id.as_str()) == Some(&v1::PodSandboxState::SandboxNotready) {
            continue;
        }
        assert_ne!(container.image_id, "");
    }
}

/// Each life is told forward, and each step once.
fn check_events(world: &World) {
    use ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
        ContainerStoppedEvent as Stopped,
    };
    for (subject, steps) in world.told.lock().unwrap().iter() {
        for pair in steps.windows(2) {
            let fits = matches!(
                (pair[0], pair[1]),
                (Created, Started | Stopped | Deleted) | (Started, Stopped) | (Stopped, Deleted | Started)
            );
            assert!(fits, "{subject}: {steps:?}");
        }
    }
}

/// Answers what was told of each subject.
async fn scenario(steps: Vec<(Step, bool, bool)>) -> BTreeMap<String, Vec<ContainerEventType>> {
    let mut world = World::new().await;
    let mut running = JoinSet::new();
    for (step, vanishes, waits) in steps {
        if matches!(step, Step::Restart) {
            settle(&mut running).await;
        }
        match as_call(&world, &step) {
            Some(call) if vanishes => {
                // The client goes away before its answer.
                drop(tokio::time::timeout(Duration::from_millis(1), call).await);
            }
            Some(call) => {
                let what = format!("{step:?}");
                running.spawn(async move {
                    sensible(&what, answered(&what, call).await);
                });
                if waits {
                    settle(&mut running).await;
                    check_lists(&world).await;
                }
            }
            None => happen(&mut world, &step).await,
        }
    }
    settle(&mut running).await;
    check_lists(&world).await;
    check_events(&world);
    end(&world).await;
    world.told.lock().unwrap().clone()
}

async fn settle(running: &mut JoinSet<()>) {
    while let Some(ended) = running.join_next().await {
        ended.unwrap();
    }
}

/// With all faults mended, everything can be removed, twice, and is gone.
async fn end(world: &World) {
    disarm(world);
    let mut client = world.client();
    // Also those whose client went away before it heard an id.
    let all = client
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await
        .unwrap();
    let mut ids: BTreeSet<String> = all.into_inner().items.into_iter().map(|pod| pod.id).collect();
    ids.extend(world.pods.lock().unwrap().iter().cloned());
    for id in ids.iter().chain(&ids) {
        let request = v1::RemovePodSandboxRequest {
            pod_sandbox_id: id.clone(),
        };
        answered("RemovePodSandbox", client.remove_pod_sandbox(request))
            .await
            .unwrap();
    }
    // Boots whose client went away end when they like, and are listed only then.
    fake_host::until("every boot is over", || {
        let mut client = client.clone();
        async move {
            let left = client
                .list_pod_sandbox(v1::ListPodSandboxRequest::default())
                .await
                .unwrap();
            for pod in left.into_inner().items {
                let request = v1::RemovePodSandboxRequest {
                    pod_sandbox_id: pod.id,
                };
                answered("RemovePodSandbox", client.remove_pod_sandbox(request))
                    .await
                    .unwrap();
            }
            world.node.host.alive() == 0
                && world.node.host.networks.lock().unwrap().is_empty()
                && world.served.as_ref().unwrap().runtime.sandboxes.is_empty()
        }
    })
    .await;
    world.node.assert_nothing_left();
    fake_host::until("every end is told", || async {
        let told = world.told.lock().unwrap();
        let ended = ContainerEventType::ContainerDeletedEvent;
        told.values().all(|steps| steps.last() == Some(&ended))
    })
    .await;
    check_events(world);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_known_sequence_goes_through_the_whole_life_of_a_pod() {
    use ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
        ContainerStoppedEvent as Stopped,
    };
    let steps = [
        Step::RunPod(0),
        Step::Create(0, 0),
        Step::Start(0),
        Step::Exit(0),
        Step::Look(0),
    ];
    let told = scenario(steps.into_iter().map(|step| (step, false, true)).collect()).await;
    let whole = vec![Created, Started, Stopped, Deleted];
    // The pod and its container.
    assert_eq!(told.into_values().collect::<Vec<_>>(), [whole.clone(), whole]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn whatever_is_asked_everything_is_answered_makes_sense_and_can_be_taken_away(steps in prop::collection::vec(call(), 20..90)) {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(async { drop(scenario(steps).await) });
    }
}
