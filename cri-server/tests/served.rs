//! The CRI as a client sees it over a real socket: the server, its error edge and its empty rooms, with a hypervisor and a network that
//! only fail. Pods that run are tested end to end (tests/e2e).

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests fail as tests do"
)]

use std::{path::Path, sync::Arc};

use async_trait::async_trait;
use caisson_cri_api::v1::{
    self, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use caisson_hypervisor::{Hypervisor, HypervisorError, Vm, VmRecord, VmSpec};
use caisson_image::ImageStore;
use caisson_net::Network;
use caisson_sandbox::Sandboxes;
use caissond::{
    config::{Config, Overrides},
    inquiry,
    pod_cidr::PodCidrStore,
    rpc::service::Cri,
    runtime::{Runtime, Settings},
    server, socket,
};
use tempfile::TempDir;
use tokio::{sync::oneshot, task::JoinHandle};
use tonic::{Code, Status, transport::Channel};

/// A hypervisor that is never asked for a VM: the network fails first.
struct NoHypervisor;

#[async_trait]
impl Hypervisor for NoHypervisor {
    fn name(&self) -> &'static str {
        "none"
    }

    fn describe(&self) -> String {
        "no hypervisor, for tests".into()
    }

    async fn launch(&self, _: VmSpec) -> Result<Box<dyn Vm>, HypervisorError> {
        Err(HypervisorError::Spec("there is no hypervisor".into()))
    }

    async fn adopt(&self, _: VmRecord) -> Result<Option<Box<dyn Vm>>, HypervisorError> {
        Ok(None)
    }
}

/// A served CRI on a scratch directory without CNI configuration, kernel or images.
struct Served {
    sandboxes: Sandboxes,
    channel: Channel,
    dir: TempDir,
    stop: oneshot::Sender<()>,
    server: JoinHandle<Result<(), server::ServeError>>,
}

impl Served {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let runtime = runtime(dir.path()).await;
        let sandboxes = runtime.sandboxes.clone();
        let (listener, bound) = socket::bind(&dir.path().join("cri.sock"), socket::FOR_GROUP).unwrap();
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(server::serve(Cri::new(runtime), listener, async move {
            drop(stopped.await);
        }));
        let channel = inquiry::connect(bound.path()).await.unwrap();
        // The directory goes with the test.
        std::mem::forget(bound);
        Self {
            sandboxes,
            channel,
            dir,
            stop,
            server,
        }
    }

    fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone())
    }

    fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone())
    }
}

async fn runtime(dir: &Path) -> Runtime {
    let config = configuration(dir);
    let network = Network::new(config.network.clone());
    let hypervisor: Arc<dyn Hypervisor> = Arc::new(NoHypervisor);
    let sandboxes = Sandboxes::open(
        config.sandboxes(),
        Arc::clone(&hypervisor),
        Arc::new(network.clone()),
    )
    .await
    .unwrap();
    // Nobody comes: URLs are all that these tests want.
    let (_, streaming) = caisson_streaming::Server::bind(&config.streaming).await.unwrap();
    Runtime {
        sandboxes,
        images: ImageStore::open(config.images.clone()).await.unwrap(),
        network,
        hypervisor,
        nri: None,
        pod_cidr: Arc::new(PodCidrStore::open(dir)),
        streaming,
        settings: Arc::new(Settings {
            kernel: config.guest.kernel.clone(),
            initramfs: config.guest.initramfs.clone(),
            sandboxes_root: config.sandboxes().root,
            cgroup_driver: config.daemon.cgroup_driver,
            config: config.summary(),
        }),
    }
}

fn configuration(dir: &Path) -> Config {
    let file = dir.join("config.toml");
    std::fs::write(&file, "").unwrap();
    let overrides = Overrides {
        root: Some(dir.join("root")),
        run_dir: Some(dir.join("run")),
        cni_conf_dir: Some(dir.join("cni")),
        kernel: Some(dir.join("vmlinuz")),
        initramfs: Some(dir.join("initramfs.cpio")),
        ..Overrides::default()
    };
    Config::load(Some(&file), &overrides).unwrap()
}

fn refused<T>(result: Result<T, Status>, code: Code, words: &str) {
    match result {
        Ok(_) => panic!("a call that should answer {code:?} succeeded"),
        Err(status) => {
            assert_eq!(status.code(), code, "{}", status.message());
            assert!(status.message().contains(words), "{}", status.message());
        }
    }
}

#[tokio::test]
async fn version_status_and_configuration_are_told_truthfully() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    let version = runtime
        .version(v1::VersionRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(version.runtime_name, "caisson");
    assert_eq!(version.runtime_api_version, "v1");

    let status = runtime
        .status(v1::StatusRequest { verbose: true })
        .await
        .unwrap()
        .into_inner();
    let conditions = status.status.unwrap().conditions;
    assert_eq!(conditions[0].r#type, "RuntimeReady");
    assert!(!conditions[0].status && conditions[0].message.contains("vmlinuz"));
    assert_eq!(conditions[1].r#type, "NetworkReady");
    assert!(!conditions[1].status && conditions[1].message.contains("cni"));
    let handlers: Vec<_> = status
        .runtime_handlers
        .iter()
        .map(|handler| handler.name.as_str())
        .collect();
    assert_eq!(handlers, ["", "caisson"]);
    assert!(status.info["hypervisor"].contains("no hypervisor, for tests"));

    for name in ["vmlinuz", "initramfs.cpio"] {
        std::fs::write(served.dir.path().join(name), "x").unwrap();
    }
    let status = runtime
        .status(v1::StatusRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert!(status.status.unwrap().conditions[0].status);
    assert!(status.info.is_empty());

    let config = runtime.runtime_config(v1::RuntimeConfigRequest {}).await.unwrap();
    assert_eq!(
        config.into_inner().linux.unwrap().cgroup_driver,
        v1::CgroupDriver::Cgroupfs as i32
    );
}

#[tokio::test]
async fn unknown_ids_are_errors_where_something_must_be_and_fine_where_nothing_is_wanted() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    let id = || "feed".to_owned();
    refused(
        runtime
            .pod_sandbox_status(v1::PodSandboxStatusRequest {
                pod_sandbox_id: id(),
                verbose: false,
            })
            .await,
        Code::NotFound,
        "feed",
    );
    refused(
        runtime
            .container_status(v1::ContainerStatusRequest {
                container_id: id(),
                verbose: false,
            })
            .await,
        Code::NotFound,
        "feed",
    );
    refused(
        runtime
            .start_container(v1::StartContainerRequest { container_id: id() })
            .await,
        Code::NotFound,
        "feed",
    );
    runtime
        .stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: id() })
        .await
        .unwrap();
    runtime
        .remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id: id() })
        .await
        .unwrap();
    runtime
        .stop_container(v1::StopContainerRequest {
            container_id: id(),
            timeout: 0,
        })
        .await
        .unwrap();
    runtime
        .remove_container(v1::RemoveContainerRequest { container_id: id() })
        .await
        .unwrap();
    refused(
        runtime
            .stop_pod_sandbox(v1::StopPodSandboxRequest::default())
            .await,
        Code::InvalidArgument,
        "pod_sandbox_id: is missing",
    );
    let pods = runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await
        .unwrap();
    assert!(pods.into_inner().items.is_empty());
    let containers = runtime
        .list_containers(v1::ListContainersRequest::default())
        .await
        .unwrap();
    assert!(containers.into_inner().containers.is_empty());
}

#[tokio::test]
async fn a_refused_pod_leaves_nothing_and_says_what_is_wrong() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    refused(
        runtime.run_pod_sandbox(v1::RunPodSandboxRequest::default()).await,
        Code::InvalidArgument,
        "config: is missing",
    );
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "p".into(),
            uid: "u".into(),
            namespace: "n".into(),
            attempt: 0,
        }),
        ..Default::default()
    };
    refused(
        runtime
            .run_pod_sandbox(v1::RunPodSandboxRequest {
                config: Some(config.clone()),
                runtime_handler: "runc".into(),
            })
            .await,
        Code::InvalidArgument,
        "runtime_handler: \"runc\"",
    );
    // Without a CNI configuration the boot fails, and is undone.
    refused(
        runtime
            .run_pod_sandbox(v1::RunPodSandboxRequest {
                config: Some(config),
                runtime_handler: String::new(),
            })
            .await,
        Code::FailedPrecondition,
        "no CNI network configuration",
    );
    let pods = runtime
        .list_pod_sandbox(v1::ListPodSandboxRequest::default())
        .await
        .unwrap();
    assert!(pods.into_inner().items.is_empty());
}

#[tokio::test]
async fn images_that_are_not_there_are_answered_by_their_absence() {
    let served = Served::start().await;
    let mut images = served.images();
    let spec = || {
        Some(v1::ImageSpec {
            image: "registry.invalid/nothing:1".into(),
            ..Default::default()
        })
    };
    let status = images
        .image_status(v1::ImageStatusRequest {
            image: spec(),
            verbose: true,
        })
        .await
        .unwrap();
    assert!(status.into_inner().image.is_none());
    images
        .remove_image(v1::RemoveImageRequest { image: spec() })
        .await
        .unwrap();
    let list = images
        .list_images(v1::ListImagesRequest {
            filter: Some(v1::ImageFilter { image: spec() }),
        })
        .await
        .unwrap();
    assert!(list.into_inner().images.is_empty());
    let info = images
        .image_fs_info(v1::ImageFsInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    let mountpoint = &info.image_filesystems[0].fs_id.as_ref().unwrap().mountpoint;
    assert!(mountpoint.ends_with("root/images"));
    assert_eq!(info.container_filesystems.len(), 1);
    refused(
        images.image_status(v1::ImageStatusRequest::default()).await,
        Code::InvalidArgument,
        "image.image: is missing",
    );
    refused(
        images
            .pull_image(v1::PullImageRequest {
                image: Some(v1::ImageSpec {
                    image: "NOT A REFERENCE".into(),
                    ..Default::default()
                }),
                ..Default::default()
            })
            .await,
        Code::InvalidArgument,
        "NOT A REFERENCE",
    );
}

#[tokio::test]
async fn streams_of_what_is_not_there_are_refused_by_name() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    let exec = v1::ExecRequest {
        container_id: "none".into(),
        cmd: vec!["ls".into()],
        stdout: true,
        ..Default::default()
    };
    refused(runtime.exec(exec.clone()).await, Code::NotFound, "none");
    let wrong = v1::ExecRequest {
        cmd: Vec::new(),
        stderr: true,
        tty: true,
        ..exec
    };
    refused(
        runtime.exec(wrong).await,
        Code::InvalidArgument,
        "cmd: is empty; stderr: a terminal has none",
    );
    let attach = v1::AttachRequest {
        container_id: "none".into(),
        stdin: true,
        ..Default::default()
    };
    refused(runtime.attach(attach).await, Code::NotFound, "none");
    let forward = v1::PortForwardRequest {
        pod_sandbox_id: "none".into(),
        port: vec![80],
    };
    refused(
        runtime.port_forward(forward.clone()).await,
        Code::NotFound,
        "none",
    );
    let wrong = v1::PortForwardRequest {
        port: vec![70000],
        ..forward
    };
    refused(
        runtime.port_forward(wrong).await,
        Code::InvalidArgument,
        "port: 70000 is no port",
    );
}

/// Calls every method that is not served, and expects its name in the answer.
macro_rules! unimplemented_by_name {
    ($client:expr; $($method:ident($request:ident): $name:literal),+ $(,)?) => {
        $(refused(
            $client.$method(v1::$request::default()).await,
            Code::Unimplemented,
            concat!("does not implement ", $name),
        );)+
    };
}

#[tokio::test]
async fn every_call_that_is_not_served_says_so_by_its_name() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    unimplemented_by_name!(runtime;
        checkpoint_container(CheckpointContainerRequest): "CheckpointContainer",
    );
}

#[tokio::test]
async fn lists_and_their_streams_are_empty_where_nothing_is() {
    let served = Served::start().await;
    let (mut runtime, mut images) = (served.runtime(), served.images());
    macro_rules! empty_stream {
        ($client:ident.$method:ident($request:ident)) => {
            let mut stream = $client
                .$method(v1::$request::default())
                .await
                .unwrap()
                .into_inner();
            assert_eq!(stream.message().await.unwrap(), None);
        };
    }
    empty_stream!(runtime.stream_pod_sandboxes(StreamPodSandboxesRequest));
    empty_stream!(runtime.stream_containers(StreamContainersRequest));
    empty_stream!(runtime.stream_container_stats(StreamContainerStatsRequest));
    empty_stream!(runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest));
    empty_stream!(runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest));
    empty_stream!(images.stream_images(StreamImagesRequest));
    let stats = runtime
        .list_container_stats(v1::ListContainerStatsRequest::default())
        .await
        .unwrap();
    assert!(stats.into_inner().stats.is_empty());
    let descriptors = runtime
        .list_metric_descriptors(v1::ListMetricDescriptorsRequest {})
        .await
        .unwrap()
        .into_inner()
        .descriptors;
    assert!(
        descriptors
            .iter()
            .any(|descriptor| descriptor.name == "container_memory_working_set_bytes")
    );
    refused(
        runtime
            .container_stats(v1::ContainerStatsRequest {
                container_id: "nobody".into(),
            })
            .await,
        Code::NotFound,
        "nobody",
    );
}

#[tokio::test]
async fn the_pod_cidr_is_checked_kept_and_shown() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    let request = |cidr: &str| v1::UpdateRuntimeConfigRequest {
        runtime_config: Some(v1::RuntimeConfig {
            network_config: Some(v1::NetworkConfig {
                pod_cidr: cidr.into(),
            }),
        }),
    };
    refused(
        runtime.update_runtime_config(request("10.0.0.0/40")).await,
        Code::InvalidArgument,
        "pod_cidr: \"10.0.0.0/40\"",
    );
    runtime
        .update_runtime_config(request("10.7.0.0/16"))
        .await
        .unwrap();
    // kubelet has none before its node has one.
    runtime.update_runtime_config(request("")).await.unwrap();
    let status = runtime
        .status(v1::StatusRequest { verbose: true })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(status.info["podCIDR"], "\"10.7.0.0/16\"");
}

#[tokio::test]
async fn a_listener_for_events_does_not_hold_up_the_servers_end() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    let mut events = runtime
        .get_container_events(v1::GetEventsRequest {})
        .await
        .unwrap()
        .into_inner();
    served.sandboxes.end_events();
    assert_eq!(events.message().await.unwrap(), None);
}

#[tokio::test]
async fn the_server_ends_when_told_though_a_client_stays_connected() {
    let served = Served::start().await;
    let mut runtime = served.runtime();
    runtime.version(v1::VersionRequest::default()).await.unwrap();
    served.stop.send(()).unwrap();
    served.server.await.unwrap().unwrap();
    refused(
        runtime.version(v1::VersionRequest::default()).await,
        Code::Unavailable,
        "",
    );
}

#[tokio::test]
async fn status_tells_people_what_runs() {
    let served = Served::start().await;
    let answer = inquiry::ask(&served.dir.path().join("cri.sock")).await.unwrap();
    let text = answer.text();
    assert!(
        text.contains("✘ RuntimeReady") && text.contains("0 ready of 0"),
        "{text}"
    );
    let json: serde_json::Value = serde_json::from_str(&answer.json()).unwrap();
    assert_eq!(json["hypervisor"]["name"], "none");
    assert_eq!(json["pods"]["all"], 0);
}
