//! CreateContainer: a container in a running pod, not yet started. A retry joins the call that runs.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use caisson_cri_api::v1;
use caisson_sandbox::{SandboxError, view::SandboxView};

use super::service::id;
use crate::{
    outcome::note,
    runtime::Runtime,
    status::RpcError,
    translate::{self, MountImages, Refusals},
};

/// How long the host's file systems may take to say what the paths of volumes lead to; kubelet gives the whole call two minutes.
const LOOK_LIMIT: Duration = Duration::from_secs(20);

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::CreateContainerRequest,
) -> Result<v1::CreateContainerResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    let mut config = request
        .config
        .ok_or_else(|| Refusals::one("config", "is missing"))?;
    if let Some(metadata) = &config.metadata {
        note("container.name", &metadata.name);
    }
    let view = runtime.sandboxes.status(sandbox).await?;
    let reference = config
        .image
        .as_ref()
        .map(|image| image.image.clone())
        .filter(|reference| !reference.is_empty())
        .ok_or_else(|| Refusals::one("config.image.image", "is missing"))?;
    note("image", &reference);
    let image = runtime
        .images
        .get(&reference)
        .await?
        .ok_or(RpcError::ImageMissing(reference))?;
    let mut mounted = MountImages::new();
    for (index, reference) in translate::mounted_images(&config) {
        let image = runtime.images.get(reference).await?;
        mounted.insert(
            index,
            image.ok_or_else(|| RpcError::ImageMissing(reference.to_owned()))?,
        );
    }
    resolve_target(runtime, &mut config, &view).await?;
    let pod = view.spec;
    host_answers(&config.mounts, LOOK_LIMIT).await?;
    // Mounts are looked at on the host, which blocks.
    let spec = tokio::task::spawn_blocking(move || translate::container_spec(config, &pod, &image, &mounted))
        .await
        .map_err(|_| RpcError::TaskLost("read the request"))??;
    let id = runtime.sandboxes.create_container(&view.id.0, spec).await?;
    note("container.id", &id.0);
    Ok(v1::CreateContainerResponse { container_id: id.0 })
}

/// Finds out which volume is on a file system that does not answer, such as that of a dead NFS server: it holds up a thread, and not the
/// call. What the paths lead to is decided later.
async fn host_answers(mounts: &[v1::Mount], limit: Duration) -> Result<(), RpcError> {
    let at = Arc::new(AtomicUsize::new(0));
    let looking = tokio::task::spawn_blocking({
        let (at, paths) = (at.clone(), mounts.iter().map(|mount| mount.host_path.clone()));
        let paths: Vec<_> = paths.collect();
        move || {
            for (index, path) in paths.iter().enumerate() {
                at.store(index, Ordering::Relaxed);
                // An error is the same later on, and says more there.
                drop(std::fs::metadata(path));
            }
        }
    });
    if tokio::time::timeout(limit, looking).await.is_ok() {
        return Ok(());
    }
    let index = at.load(Ordering::Relaxed);
    let volume = mounts.get(index).cloned().unwrap_or_default();
    let what = format!(
        "config.mounts[{index}].host_path: the look at {:?} for {}",
        volume.host_path, volume.container_path
    );
    Err(SandboxError::Deadline { what, limit }.into())
}

/// Puts the whole id of the container whose PID namespace is wanted into the request; it must be one of this pod.
async fn resolve_target(
    runtime: &Runtime,
    config: &mut v1::ContainerConfig,
    pod: &SandboxView,
) -> Result<(), RpcError> {
    let Some(target) = translate::target_container(config) else {
        return Ok(());
    };
    let target = runtime.sandboxes.container_status(target).await?;
    if target.sandbox_id != pod.id {
        return Err(Refusals::one(
            "config.linux.security_context.namespace_options.target_id",
            format!("{} is a container of another pod", target.id.0),
        )
        .into());
    }
    let options = config
        .linux
        .as_mut()
        .and_then(|linux| linux.security_context.as_mut())
        .and_then(|context| context.namespace_options.as_mut());
    if let Some(options) = options {
        options.target_id = target.id.0;
    }
    Ok(())
}
