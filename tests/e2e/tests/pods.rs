//! Life of pods, as kubelet drives it: run, stop, remove, and VMs that hang or die.

use std::{collections::HashMap, io::Read, net::TcpStream, time::Duration};

use anyhow::{Context, Result, ensure};
use caisson_e2e::{
    cri::{container, pod},
    eventually,
    host::Host,
    node::{Node, node},
    run,
};
use k8s_cri::v1 as cri;

fn http(address: &str) -> Result<String> {
    use std::io::Write;
    let mut stream = TcpStream::connect_timeout(&address.parse()?, Duration::from_secs(2))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn a_pod_lives_from_run_to_remove_and_leaves_nothing_on_the_host() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            mut daemon,
            registry: _registry,
        } = node(&host).await?;
        let mut config = pod(&host, "life");
        config.annotations = HashMap::from([("a".into(), "b".into())]);
        config.port_mappings = vec![cri::PortMapping {
            container_port: 80,
            host_port: 18080,
            ..Default::default()
        }];
        let pod_id = cri.run_pod(&config).await?;

        // The same request again is the same pod.
        ensure!(
            cri.run_pod(&config).await? == pod_id,
            "a retried RunPodSandbox made another pod"
        );
        let (status, _) = cri.pod_status(&pod_id).await?;
        ensure!(
            status.state() == cri::PodSandboxState::SandboxReady,
            "the pod is not ready: {status:?}"
        );
        ensure!(
            status.metadata == config.metadata
                && status.labels == config.labels
                && status.annotations == config.annotations
        );
        ensure!(status.created_at > 0);

        // It is listed, by its label, by a prefix of its id, and not by another's.
        let label = |value: &str| cri::PodSandboxFilter {
            label_selector: HashMap::from([("app".into(), value.into())]),
            ..Default::default()
        };
        let by_id = cri::PodSandboxFilter {
            id: pod_id[..12].into(),
            ..Default::default()
        };
        for (filter, expected) in [(label("life"), 1), (label("other"), 0), (by_id, 1)] {
            let request = cri::ListPodSandboxRequest {
                filter: Some(filter.clone()),
            };
            let found = cri.runtime.list_pod_sandbox(request).await?.into_inner().items;
            ensure!(found.len() == expected, "{filter:?} found {} pods", found.len());
        }

        // A container: created, running, answering on both of the pod's addresses and on the host port.
        let web = container("web", &image, &["httpd", "-f", "-p", "[::]:80", "-h", "/www"]);
        let web_id = cri.create(&pod_id, &web, &config).await?;
        ensure!(
            cri.create(&pod_id, &web, &config).await? == web_id,
            "a retried CreateContainer made another container"
        );
        ensure!(cri.status(&web_id).await?.state() == cri::ContainerState::ContainerCreated);
        cri.start(&web_id).await?;
        let status = cri.status(&web_id).await?;
        ensure!(status.state() == cri::ContainerState::ContainerRunning);
        ensure!(status.created_at > 0 && status.started_at >= status.created_at && status.finished_at == 0);
        ensure!(
            cri.start(&web_id).await.is_err(),
            "a running container was started again"
        );
        let ips = cri.pod_ips(&pod_id).await?;
        ensure!(
            ips.len() == 2,
            "expected an IPv4 and an IPv6 address, got {ips:?}"
        );
        for address in [format!("{}:80", ips[0]), format!("[{}]:80", ips[1])] {
            eventually(
                &format!("a page from {address}"),
                Duration::from_secs(20),
                async || {
                    http(&address)
                        .ok()
                        .filter(|page| page.contains("hello from a microVM"))
                },
            )
            .await?;
        }
        // Host ports are reached by the host's address on the bridge; loopback needs route_localnet, which portmap sets.
        eventually("a page from the host port", Duration::from_secs(20), async || {
            http("127.0.0.1:18080")
                .ok()
                .filter(|page| page.contains("hello from a microVM"))
        })
        .await?;

        // Stop a container: SIGTERM is enough for this one; then stop and remove again, which is no error.
        cri.stop(&web_id, 20).await?;
        let status = cri.status(&web_id).await?;
        ensure!(
            status.state() == cri::ContainerState::ContainerExited,
            "{status:?}"
        );
        ensure!(status.finished_at >= status.started_at);
        cri.stop(&web_id, 0).await?;
        cri.remove(&web_id).await?;
        cri.remove(&web_id).await?;
        let gone = cri
            .status(&web_id)
            .await
            .err()
            .context("a removed container still has a status")?;
        ensure!(gone.code() == tonic::Code::NotFound, "{gone}");

        // Stopping the pod ends what still runs in it.
        let sleeper = cri
            .run(
                &pod_id,
                &container("sleeper", &image, &["sleep", "1000"]),
                &config,
            )
            .await?;
        cri.stop_pod(&pod_id).await?;
        cri.stop_pod(&pod_id).await?;
        let (status, _) = cri.pod_status(&pod_id).await?;
        ensure!(status.state() == cri::PodSandboxState::SandboxNotready);
        ensure!(cri.status(&sleeper).await?.state() == cri::ContainerState::ContainerExited);
        cri.remove_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        ensure!(cri.pods().await?.is_empty());
        ensure!(
            cri.status(&sleeper).await.is_err(),
            "the pod's container outlived it"
        );
        host.leftovers()?.nothing_new_since(&before)?;
        daemon.terminate().await
    })
}

#[test]
fn a_stop_does_not_wait_for_a_guest_that_hangs() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image: _,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let pod_id = cri.run_pod(&pod(&host, "wedged")).await?;
        // A VM whose processes are stopped answers nothing: the harshest guest there is.
        for process in host.leftovers()?.processes {
            let pid = process.split(' ').next().context("no pid")?.parse()?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGSTOP)?;
        }
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}

#[test]
fn a_pod_whose_vm_dies_is_seen_to_be_not_ready() -> Result<()> {
    let host = Host::enter()?;
    let before = host.leftovers()?;
    run(async {
        let Node {
            mut cri,
            image,
            daemon: _daemon,
            registry: _registry,
        } = node(&host).await?;
        let config = pod(&host, "dies");
        let pod_id = cri.run_pod(&config).await?;
        let id = cri
            .run(
                &pod_id,
                &container("sleeper", &image, &["sleep", "1000"]),
                &config,
            )
            .await?;
        for process in host.leftovers()?.processes {
            let pid = process.split(' ').next().context("no pid")?.parse()?;
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
        }
        let status = cri.exited(&id).await?;
        ensure!(status.exit_code != 0, "{status:?}");
        let (status, _) = cri.pod_status(&pod_id).await?;
        ensure!(status.state() == cri::PodSandboxState::SandboxNotready);
        cri.stop_pod(&pod_id).await?;
        cri.remove_pod(&pod_id).await?;
        host.leftovers()?.nothing_new_since(&before)
    })
}
