//! The composition root: chooses the driver, opens each room in order, and serves until told to stop.
//!
//! Every driver is named in [`drivers`] and nowhere else. Each function below makes one thing; what is made runs elsewhere.

use std::sync::Arc;

use anyhow::Context;
use caisson_image::ImageStore;
use caisson_net::Network;
use caisson_sandbox::Sandboxes;
use caisson_streaming::{Endpoint, Server};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};

use crate::{
    config::Config,
    drivers, notify,
    pod_cidr::PodCidrStore,
    rpc::service::Cri,
    runtime::{Runtime, Settings, VERSION},
    server,
    socket::{self, StateLock},
    streams::PodStreams,
};

/// Serves until SIGTERM or SIGINT. Pods outlive the daemon.
pub async fn serve(config: Config) -> anyhow::Result<()> {
    // Signals first: a stop during start-up must not kill half-way through recovery with the default action.
    let stop = stop_signal()?;
    let _locks = (
        StateLock::take(&config.daemon.root)?,
        StateLock::take(&config.daemon.run_dir)?,
    );
    let (streaming, endpoint) = Server::bind(&config.streaming)
        .await
        .context("cannot serve exec, attach and port-forward")?;
    let runtime = open(&config, endpoint).await?;
    let (listener, bound) = socket::bind(&config.daemon.socket)?;
    tracing::info!(
        version = VERSION,
        socket = %bound.path().display(),
        hypervisor = runtime.hypervisor.describe(),
        streaming = runtime.streaming.base(),
        "serving"
    );
    tell_manager(notify::READY);
    let sandboxes = runtime.sandboxes.clone();
    let listened = sandboxes.clone();
    let stop = async move {
        stop.await;
        // They would go on as long as their clients like.
        listened.end_events();
    };
    let streams = Arc::new(PodStreams::new(sandboxes.clone()));
    let mut sessions = JoinSet::new();
    sessions.spawn(streaming.run(streams));
    let served = server::serve(Cri::new(runtime), listener, stop).await;
    tell_manager(notify::STOPPING);
    // Clients of streams see their connections closed; what they ran is ended in the guests.
    sessions.shutdown().await;
    sandboxes.close().await;
    served?;
    tracing::info!("stopped; pods go on running");
    Ok(())
}

/// Opens each room; the order is that of who needs whom.
async fn open(config: &Config, streaming: Endpoint) -> anyhow::Result<Runtime> {
    let hypervisor = drivers::choose(config).await?;
    let network = Network::new(config.network.clone());
    let images = ImageStore::open(config.images.clone())
        .await
        .context("cannot open the image store")?;
    let sandboxes = Sandboxes::open(
        config.sandboxes(),
        Arc::clone(&hypervisor),
        Arc::new(network.clone()),
    )
    .await
    .context("cannot open the pods' state")?;
    let runtime = Runtime {
        sandboxes,
        images,
        network,
        hypervisor,
        pod_cidr: Arc::new(PodCidrStore::open(&config.daemon.root)),
        streaming,
        settings: Arc::new(settings(config)),
    };
    runtime.collect_images().await;
    Ok(runtime)
}

fn settings(config: &Config) -> Settings {
    Settings {
        kernel: config.guest.kernel.clone(),
        initramfs: config.guest.initramfs.clone(),
        sandboxes_root: config.sandboxes().root,
        cgroup_driver: config.daemon.cgroup_driver,
        config: config.summary(),
    }
}

fn tell_manager(state: &str) {
    if let Err(error) = notify::notify(state) {
        tracing::warn!(%error, state, "cannot notify the service manager");
    }
}

fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("told to stop by SIGTERM"),
            _ = interrupt.recv() => tracing::info!("told to stop by SIGINT"),
        }
    })
}
