//! What is told of pods while they run, and limits that change: statistics, metrics, events, streamed lists, updates. critest has nothing for
//! most of it, so this is written as it would be. Messages that the public client does not know yet are ours.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, Result, ensure};
use caisson_cri_api::v1::{
    self as wire, image_service_client::ImageServiceClient, runtime_service_client::RuntimeServiceClient,
};
use caisson_e2e::{
    cri::{Cri, STATE_LIMIT, container, pod},
    eventually,
    host::Host,
    node::{Node, node},
    run,
};
use k8s_cri::v1 as cri;
use tonic::{
    Code, Streaming,
    transport::{Channel, Endpoint},
};

/// Everything, also what is newer than the public client.
async fn wire(socket: &Path) -> Result<(RuntimeServiceClient<Channel>, ImageServiceClient<Channel>)> {
    let channel = Endpoint::try_from(format!("unix://{}", socket.display()))?
        .connect()
        .await?;
    Ok((
        RuntimeServiceClient::new(channel.clone()),
        ImageServiceClient::new(channel),
    ))
}

fn value(value: Option<&cri::UInt64Value>) -> Result<u64> {
    Ok(value.context("a number is absent")?.value)
}

/// Takes events until the given one has come; answers all of them as (id, type).
async fn events_until(
    events: &mut Streaming<cri::ContainerEventResponse>,
    id: &str,
    last: cri::ContainerEventType,
) -> Result<Vec<(String, cri::ContainerEventType)>> {
    let mut all = Vec::new();
    let take = async {
        while let Some(event) = events.message().await? {
            let status = event
                .pod_sandbox_status
                .as_ref()
                .context("an event without its pod's status")?;
            ensure!(status.metadata.is_some(), "kubelet skips events without metadata");
            let kind = event.container_event_type();
            let end = event.container_id == id && kind == last;
            all.push((event.container_id, kind));
            if end {
                return Ok(());
            }
        }
        anyhow::bail!("the stream of events ended")
    };
    tokio::time::timeout(STATE_LIMIT, take)
        .await
        .with_context(|| format!("no {last:?} of {id}"))??;
    Ok(all)
}

async fn file(cri: &mut Cri, id: &str, path: &str) -> Result<String> {
    let (code, text, error) = cri.exec(id, &["cat", path]).await?;
    ensure!(code == 0, "cat {path}: {error}");
    Ok(text.trim().to_owned())
}

#[test]
fn what_happens_to_pods_is_told_once_in_order_and_to_everybody() -> Result<()> {
    use cri::ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
        ContainerStoppedEvent as Stopped,
    };
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let mut one = cri
            .runtime
            .get_container_events(cri::GetEventsRequest {})
            .await?
            .into_inner();
        let mut other = daemon
            .cri()
            .await?
            .runtime
            .get_container_events(cri::GetEventsRequest {})
            .await?
            .into_inner();
        let config = pod(&host, "events");
        let pod_id = cri.run_pod(&config).await?;
        let short = container("short", &image, &["sh", "-c", "exit 3"]);
        let id = cri.run(&pod_id, &short, &config).await?;
        let expected = [
            (pod_id.clone(), Created),
            (pod_id.clone(), Started),
            (id.clone(), Created),
            (id.clone(), Started),
            (id.clone(), Stopped),
        ];
        for events in [&mut one, &mut other] {
            ensure!(events_until(events, &id, Stopped).await? == expected);
        }
        cri.remove(&id).await?;
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        let told = events_until(&mut one, &pod_id, Deleted).await?;
        ensure!(
            told == [
                (id.clone(), Deleted),
                (pod_id.clone(), Stopped),
                (pod_id.clone(), Deleted)
            ],
            "{told:?}"
        );
        host.leftovers()?.nothing_new_since(&before)?;
        // Who listens holds nobody up.
        daemon.terminate().await
    })
}

#[test]
fn usage_is_that_of_the_containers_and_each_list_has_its_stream() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "usage");
        let pod_id = cri.run_pod(&config).await?;
        let mut busy = container(
            "busy",
            &image,
            &[
                "sh",
                "-c",
                "dd if=/dev/zero of=/three bs=1M count=3; sync; while true; do :; done",
            ],
        );
        busy.labels = HashMap::from([("tier".into(), "back".into())]);
        busy.linux = Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources {
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        });
        let busy_id = cri.run(&pod_id, &busy, &config).await?;
        let idle = container("idle", &image, &["sleep", "1000"]);
        // Created and never started: it has statistics all the same.
        let idle_id = cri.create(&pod_id, &idle, &config).await?;

        let request = || cri::ContainerStatsRequest {
            container_id: busy_id.clone(),
        };
        let mut asker = cri.clone();
        let stats = eventually("the file in the writable layer", STATE_LIMIT, async || {
            let answer = asker.runtime.container_stats(request()).await.ok()?;
            let stats = answer.into_inner().stats?;
            let used = value(stats.writable_layer.as_ref()?.used_bytes.as_ref()).ok()?;
            (used >= 3 << 20).then_some(stats)
        })
        .await?;
        let attributes = stats.attributes.as_ref().context("no attributes")?;
        ensure!(attributes.id == busy_id && attributes.labels == busy.labels);
        let layer = stats.writable_layer.as_ref().context("no writable layer")?;
        ensure!(value(layer.inodes_used.as_ref())? >= 1 && layer.timestamp > 0);
        let mountpoint = &layer.fs_id.as_ref().context("no file system")?.mountpoint;
        ensure!(
            Path::new(mountpoint).is_dir(),
            "{mountpoint} is no directory of the host"
        );
        let (cpu, memory) = (stats.cpu.context("no CPU")?, stats.memory.context("no memory")?);
        let used = value(memory.usage_bytes.as_ref())?;
        let working_set = value(memory.working_set_bytes.as_ref())?;
        ensure!(
            working_set > 0 && working_set <= used && used <= 64 << 20,
            "{memory:?}"
        );
        ensure!(value(memory.available_bytes.as_ref())? == (64 << 20) - working_set);
        // Time and CPU time go forward, and a rate comes of it.
        let before_this = value(cpu.usage_core_nano_seconds.as_ref())?;
        let mut asker = cri.clone();
        eventually("a rate of CPU use", STATE_LIMIT, async || {
            let next = asker.runtime.container_stats(request()).await.ok()?;
            let next = next.into_inner().stats?.cpu?;
            (next.timestamp > cpu.timestamp
                && value(next.usage_core_nano_seconds.as_ref()).ok()? > before_this
                && value(next.usage_nano_cores.as_ref()).ok()? > 0)
                .then_some(())
        })
        .await?;

        let filters = [
            (cri::ContainerStatsFilter::default(), 2),
            (
                cri::ContainerStatsFilter {
                    id: idle_id[..12].into(),
                    ..Default::default()
                },
                1,
            ),
            (
                cri::ContainerStatsFilter {
                    label_selector: HashMap::from([("tier".into(), "front".into())]),
                    ..Default::default()
                },
                0,
            ),
        ];
        for (filter, expected) in filters {
            let request = cri::ListContainerStatsRequest {
                filter: Some(filter.clone()),
            };
            let found = cri
                .runtime
                .list_container_stats(request)
                .await?
                .into_inner()
                .stats;
            ensure!(
                found.len() == expected,
                "{filter:?} found {} containers",
                found.len()
            );
            ensure!(
                found
                    .iter()
                    .all(|stats| stats.cpu.as_ref().is_some_and(|cpu| cpu.timestamp > 0)
                        && stats.memory.as_ref().is_some_and(|memory| memory.timestamp > 0)),
                "a container without statistics: {found:?}"
            );
        }

        let request = cri::PodSandboxStatsRequest {
            pod_sandbox_id: pod_id.clone(),
        };
        let stats = cri.runtime.pod_sandbox_stats(request).await?.into_inner().stats;
        let linux = stats
            .and_then(|stats| stats.linux)
            .context("no statistics of the pod")?;
        ensure!(linux.containers.len() == 2);
        ensure!(value(linux.process.context("no processes")?.process_count.as_ref())? >= 1);
        let eth0 = linux
            .network
            .and_then(|network| network.default_interface)
            .context("no interface")?;
        ensure!(eth0.name == "eth0", "{eth0:?}");
        let total = value(linux.cpu.context("no CPU")?.usage_core_nano_seconds.as_ref())?;
        ensure!(total >= before_this, "a pod uses less than its container");

        streams_are_the_lists(&mut cri, &daemon.socket(), &pod_id, &busy_id).await?;
        metrics_have_their_descriptors(&mut cri, &pod_id, &busy_id).await?;
        cri.stop_pod(&pod_id).await?;
        // Nothing is said of what does not run, and nothing waits for it.
        let listed = cri
            .runtime
            .list_pod_sandbox_stats(cri::ListPodSandboxStatsRequest::default())
            .await?;
        ensure!(listed.into_inner().stats.is_empty());
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

async fn streams_are_the_lists(cri: &mut Cri, socket: &Path, pod_id: &str, busy_id: &str) -> Result<()> {
    let (mut runtime, mut images) = wire(socket).await?;
    macro_rules! streamed {
        ($client:ident.$method:ident($request:ident), $items:ident) => {{
            let mut stream = $client.$method(wire::$request::default()).await?.into_inner();
            let mut all = Vec::new();
            while let Some(message) = stream.message().await? {
                ensure!(!message.$items.is_empty(), "an empty message");
                all.extend(message.$items);
            }
            all
        }};
    }
    let pods = streamed!(
        runtime.stream_pod_sandboxes(StreamPodSandboxesRequest),
        pod_sandboxes
    );
    ensure!(pods.len() == 1 && pods[0].id == pod_id);
    ensure!(pods.len() == cri.pods().await?.len());
    let containers = streamed!(runtime.stream_containers(StreamContainersRequest), containers);
    ensure!(containers.len() == 2);
    let stats = streamed!(
        runtime.stream_container_stats(StreamContainerStatsRequest),
        container_stats
    );
    ensure!(stats.len() == 2);
    let busy = stats
        .iter()
        .find(|stats| stats.attributes.as_ref().is_some_and(|a| a.id == busy_id))
        .context("the busy container is not in the stream")?;
    // What the public client has no fields for yet.
    let pressure = busy.cpu.as_ref().and_then(|cpu| cpu.psi).context("no pressure")?;
    ensure!(pressure.some.is_some(), "{pressure:?}");
    ensure!(busy.io.is_some());
    let stats = streamed!(
        runtime.stream_pod_sandbox_stats(StreamPodSandboxStatsRequest),
        pod_sandbox_stats
    );
    ensure!(stats.len() == 1);
    let metrics = streamed!(
        runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest),
        pod_sandbox_metrics
    );
    ensure!(metrics.len() == 1 && metrics[0].pod_sandbox_id == pod_id);
    let images = streamed!(images.stream_images(StreamImagesRequest), images);
    ensure!(images.len() == 1);
    // Filters are those of the lists.
    let request = wire::StreamContainersRequest {
        filter: Some(wire::ContainerFilter {
            id: busy_id.into(),
            ..Default::default()
        }),
    };
    let mut stream = runtime.stream_containers(request).await?.into_inner();
    let only = stream.message().await?.context("no message")?.containers;
    ensure!(only.len() == 1 && only[0].id == busy_id);
    Ok(())
}

async fn metrics_have_their_descriptors(cri: &mut Cri, pod_id: &str, busy_id: &str) -> Result<()> {
    let descriptors = cri
        .runtime
        .list_metric_descriptors(cri::ListMetricDescriptorsRequest {})
        .await?
        .into_inner()
        .descriptors;
    let keys: HashMap<_, _> = descriptors
        .iter()
        .map(|descriptor| (descriptor.name.as_str(), &descriptor.label_keys))
        .collect();
    let pods = cri
        .runtime
        .list_pod_sandbox_metrics(cri::ListPodSandboxMetricsRequest {})
        .await?
        .into_inner()
        .pod_metrics;
    ensure!(pods.len() == 1 && pods[0].pod_sandbox_id == pod_id);
    let busy = pods[0]
        .container_metrics
        .iter()
        .find(|container| container.container_id == busy_id)
        .context("no metrics of the busy container")?;
    for metric in pods[0].metrics.iter().chain(&busy.metrics) {
        let labels = keys
            .get(metric.name.as_str())
            .with_context(|| format!("{} has no descriptor", metric.name))?;
        ensure!(
            labels.len() == metric.label_values.len(),
            "{metric:?} of {labels:?}"
        );
        ensure!(metric.timestamp > 0 && metric.value.is_some(), "{metric:?}");
    }
    for name in [
        "container_cpu_usage_seconds_total",
        "container_memory_working_set_bytes",
        "container_fs_usage_bytes",
        "container_spec_memory_limit_bytes",
        "container_start_time_seconds",
        "container_pressure_cpu_waiting_seconds_total",
    ] {
        ensure!(busy.metrics.iter().any(|metric| metric.name == name), "no {name}");
    }
    let received = "container_network_receive_bytes_total";
    ensure!(pods[0].metrics.iter().any(|metric| metric.name == received));
    Ok(())
}

fn update(id: &str, linux: cri::LinuxContainerResources) -> cri::UpdateContainerResourcesRequest {
    cri::UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(linux),
        ..Default::default()
    }
}

#[test]
fn limits_change_one_by_one_in_the_guest_and_what_the_vm_cannot_hold_is_refused() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "update");
        let pod_id = cri.run_pod(&config).await?;
        let mut config_c = container("c", &image, &["sleep", "1000"]);
        config_c.linux = Some(cri::LinuxContainerConfig {
            resources: Some(cri::LinuxContainerResources {
                cpu_quota: 50_000,
                cpu_period: 100_000,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            ..Default::default()
        });
        let id = cri.run(&pod_id, &config_c, &config).await?;
        let files = async |cri: &mut Cri| -> Result<(String, String)> {
            Ok((
                file(cri, &id, "/sys/fs/cgroup/cpu.max").await?,
                file(cri, &id, "/sys/fs/cgroup/memory.max").await?,
            ))
        };
        ensure!(files(&mut cri).await? == ("50000 100000".into(), (64 << 20).to_string()));

        // Each update touches only what it names.
        let memory = |bytes| {
            update(
                &id,
                cri::LinuxContainerResources {
                    memory_limit_in_bytes: bytes,
                    ..Default::default()
                },
            )
        };
        cri.runtime.update_container_resources(memory(96 << 20)).await?;
        ensure!(files(&mut cri).await? == ("50000 100000".into(), (96 << 20).to_string()));
        let unlimited = update(
            &id,
            cri::LinuxContainerResources {
                cpu_quota: -1,
                oom_score_adj: 500,
                ..Default::default()
            },
        );
        cri.runtime.update_container_resources(unlimited).await?;
        ensure!(files(&mut cri).await? == ("max 100000".into(), (96 << 20).to_string()));
        // PID 1 is not the container's own: containers share a namespace unless asked otherwise.
        let own = ["sh", "-c", "cat /proc/$(pidof sleep)/oom_score_adj"];
        ensure!(cri.exec(&id, &own).await?.1.trim() == "500");
        ensure!(
            file(&mut cri, &id, "/proc/self/oom_score_adj").await? == "500",
            "a new process"
        );

        // What cannot be met, and what means the host, is refused and changes nothing.
        let refused = cri.runtime.update_container_resources(memory(1 << 40)).await;
        let refused = refused.err().context("a terabyte was granted")?;
        ensure!(
            refused.code() == Code::FailedPrecondition && refused.message().contains("its VM"),
            "{refused:?}"
        );
        let (mut wire, _) = wire(&daemon.socket()).await?;
        let resize = |mib: i64| wire::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod_id.clone(),
            resources: Some(wire::LinuxContainerResources {
                memory_limit_in_bytes: mib << 20,
                ..Default::default()
            }),
            ..Default::default()
        };
        wire.update_pod_sandbox_resources(resize(96)).await?;
        let refused = wire.update_pod_sandbox_resources(resize(1 << 20)).await;
        let refused = refused.err().context("a terabyte was granted to the pod")?;
        ensure!(refused.code() == Code::FailedPrecondition, "{refused:?}");

        // A new daemon knows what the old one has changed.
        daemon.terminate().await?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        let status = cri.status(&id).await?;
        let linux = status
            .resources
            .and_then(|resources| resources.linux)
            .context("no resources")?;
        ensure!(
            linux.memory_limit_in_bytes == 96 << 20 && linux.oom_score_adj == 500,
            "{linux:?}"
        );
        cri.runtime.update_container_resources(memory(80 << 20)).await?;
        ensure!(files(&mut cri).await? == ("max 100000".into(), (80 << 20).to_string()));

        // Neither what has ended nor what is gone.
        cri.stop(&id, 0).await?;
        let refused = cri.runtime.update_container_resources(memory(64 << 20)).await;
        ensure!(refused.is_err_and(|error| error.code() == Code::FailedPrecondition));
        cri.remove_pod(&pod_id).await?;
        let refused = cri.runtime.update_container_resources(memory(64 << 20)).await;
        ensure!(refused.is_err_and(|error| error.code() == Code::NotFound));
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn the_pod_cidr_outlives_the_daemon_and_a_checkpoint_is_refused_with_its_reason() -> Result<()> {
    let host = Host::enter()?;
    run(async {
        let Node {
            mut cri, mut daemon, ..
        } = node(&host).await?;
        let request = |cidr: &str| cri::UpdateRuntimeConfigRequest {
            runtime_config: Some(cri::RuntimeConfig {
                network_config: Some(cri::NetworkConfig {
                    pod_cidr: cidr.into(),
                }),
            }),
        };
        cri.runtime
            .update_runtime_config(request("10.200.0.0/16"))
            .await?;
        let refused = cri.runtime.update_runtime_config(request("ten")).await;
        ensure!(refused.is_err_and(|error| error.code() == Code::InvalidArgument));
        daemon.kill()?;
        daemon.start_again().await?;
        let mut cri = daemon.cri().await?;
        let status = cri
            .runtime
            .status(cri::StatusRequest { verbose: true })
            .await?
            .into_inner();
        ensure!(status.info["podCIDR"] == "\"10.200.0.0/16\"", "{:?}", status.info);
        let refused = cri
            .runtime
            .checkpoint_container(cri::CheckpointContainerRequest::default())
            .await;
        ensure!(refused.is_err_and(|error| {
            error.code() == Code::Unimplemented && error.message().contains("CheckpointContainer")
        }));
        Ok(())
    })
}
