//! What most tests begin with: a daemon on a scratch host, a registry with one image, and that image pulled.

use std::fs;

use anyhow::{Context, Result};
use k8s_cri::v1 as cri;

use crate::{
    cri::{Cri, records},
    daemon::{Daemon, Product},
    host::Host,
    image::{self, Image},
    registry::Registry,
};

/// A daemon, a client of it, and a pulled image. Daemon and registry end when it is dropped.
#[derive(Debug)]
pub struct Node {
    /// The real daemon.
    pub daemon: Daemon,
    /// Its client.
    pub cri: Cri,
    /// Name of the pulled image.
    pub image: String,
    /// Serves the image, and what else a test pushes.
    pub registry: Registry,
}

/// A node with the busybox image.
pub async fn node(host: &Host) -> Result<Node> {
    node_with(host, "test/busybox", &image::busybox()?).await
}

/// A node with an image of the test's own, pushed to `repository`.
pub async fn node_with(host: &Host, repository: &str, image: &Image) -> Result<Node> {
    let registry = Registry::start(&host.dir().join("registry")).await?;
    let image = registry.push(repository, "1", image)?;
    let daemon = Daemon::start(host, &Product::find()?, &[]).await?;
    let mut cri = daemon.cri().await?;
    cri.pull(&image).await?;
    Ok(Node {
        daemon,
        cri,
        image,
        registry,
    })
}

/// Runs a container to its end; answers its status and its log, and removes it.
pub async fn outcome(
    cri: &mut Cri,
    host: &Host,
    pod_id: &str,
    pod: &cri::PodSandboxConfig,
    config: &cri::ContainerConfig,
) -> Result<(cri::ContainerStatus, String)> {
    let id = cri.run(pod_id, config, pod).await?;
    let status = cri.exited(&id).await?;
    let name = &pod.metadata.as_ref().context("no metadata")?.name;
    let log = fs::read_to_string(host.log_dir(name)?.join(&config.log_path))?;
    let text = records(&log)?
        .into_iter()
        .map(|(_, _, text)| text + "\n")
        .collect();
    cri.remove(&id).await?;
    Ok((status, text))
}
