//! ListContainerStats: what the containers use that a filter wants. Containers of pods whose guest does not answer are left out.

use caisson_cri_api::v1;

use crate::{runtime::Runtime, status::RpcError, usage};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ListContainerStatsRequest,
) -> Result<v1::ListContainerStatsResponse, RpcError> {
    let filter = request.filter.unwrap_or_default();
    let disks = &runtime.settings.sandboxes_root;
    let pods = runtime
        .sandboxes
        .list_usage(|view| view.id.0.starts_with(&filter.pod_sandbox_id))
        .await;
    Ok(v1::ListContainerStatsResponse {
        stats: pods
            .iter()
            .flat_map(|pod| &pod.containers)
            .filter(|container| usage::wants_container(&filter, &container.view))
            .map(|container| usage::container(container, disks))
            .collect(),
    })
}
