//! CreateContainer: a container in a running pod, not yet started. A retry joins the call that runs.

use caisson_cri_api::v1;
use caisson_sandbox::view::SandboxView;

use super::service::id;
use crate::{
    outcome::note,
    runtime::Runtime,
    status::RpcError,
    translate::{self, MountImages, Refusals},
};

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
    // Mounts are looked at on the host, where a dead NFS server may hold a thread.
    let spec = tokio::task::spawn_blocking(move || translate::container_spec(config, &pod, &image, &mounted))
        .await
        .map_err(|_| RpcError::TaskLost("read the request"))??;
    let id = runtime.sandboxes.create_container(&view.id.0, spec).await?;
    note("container.id", &id.0);
    Ok(v1::CreateContainerResponse { container_id: id.0 })
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
