//! The composition root: chooses the driver, opens each room in order, and serves until told to stop.
//!
//! Every driver is named in [`drivers`] and nowhere else. Each function below makes one thing; what is made runs elsewhere.

use std::sync::Arc;

use anyhow::Context;
use caisson_image::ImageStore;
use caisson_net::Network;
use caisson_nri::Serving;
use caisson_sandbox::{
    Sandboxes,
    hooks::{NoHooks, PodHooks},
};
use caisson_streaming::{Endpoint, Server};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};

use crate::{
    config::Config,
    drivers, notify,
    nri::Plugins,
    pod_cidr::PodCidrStore,
    rpc::service::Cri,
    runtime::{Runtime, Settings, VERSION},
    server,
    socket::{self, BoundSocket, StateLock},
    status::chain,
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
    let plugins = config.nri.as_ref().map(|nri| Plugins::new(nri.settings.clone()));
    let runtime = open(&config, endpoint, plugins.clone()).await?;
    let _nri = serve_nri(&config, plugins.as_ref(), &runtime.sandboxes).await;
    let (listener, bound) = socket::bind(&config.daemon.socket, socket::FOR_GROUP)?;
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
    if let Some(plugins) = &plugins {
        plugins.close().await;
    }
    sandboxes.close().await;
    served?;
    tracing::info!("stopped; pods go on running");
    Ok(())
}

/// Opens each room; the order is that of who needs whom.
async fn open(config: &Config, streaming: Endpoint, nri: Option<Plugins>) -> anyhow::Result<Runtime> {
    let hypervisor = drivers::choose(config).await?;
    let network = Network::new(config.network.clone());
    let images = ImageStore::open(config.images.clone())
        .await
        .context("cannot open the image store")?;
    let hooks = nri.as_ref().map_or_else(no_hooks, Plugins::hooks);
    let sandboxes = Sandboxes::open_with_hooks(
        config.sandboxes(),
        Arc::clone(&hypervisor),
        Arc::new(network.clone()),
        hooks,
    )
    .await
    .context("cannot open the pods' state")?;
    let runtime = Runtime {
        sandboxes,
        images,
        network,
        hypervisor,
        nri,
        pod_cidr: Arc::new(PodCidrStore::open(&config.daemon.root)),
        streaming,
        settings: Arc::new(settings(config)),
    };
    runtime.collect_images().await;
    Ok(runtime)
}

fn no_hooks() -> Arc<dyn PodHooks> {
    Arc::new(NoHooks)
}

/// Pods run without plugins when these cannot be served: on many nodes another runtime has the socket.
async fn serve_nri(
    config: &Config,
    plugins: Option<&Plugins>,
    sandboxes: &Sandboxes,
) -> Option<(Serving, Option<BoundSocket>)> {
    let plugins = plugins?;
    let path = config.nri.as_ref().and_then(|nri| nri.socket.as_deref());
    let (listener, bound) = match path.map(|path| socket::bind(path, socket::FOR_OWNER)).transpose() {
        Ok(made) => made.unzip(),
        Err(error) => {
            tracing::error!(
                error = chain(&error),
                "NRI plugins are not served; where another runtime serves them, nri.socket can be a path of its own"
            );
            return None;
        }
    };
    match plugins.serve(sandboxes.clone(), listener).await {
        Ok(serving) => {
            let socket = bound.as_ref().map(|bound| bound.path().display().to_string());
            tracing::info!(socket, "NRI is served");
            Some((serving, bound))
        }
        Err(error) => {
            tracing::error!(error = chain(&error), "NRI plugins are not served");
            None
        }
    }
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
