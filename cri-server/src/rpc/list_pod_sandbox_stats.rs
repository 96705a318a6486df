//! ListPodSandboxStats: what the pods use that a filter wants. Pods that don't run, or whose guest does not answer, are left out.

use caisson_cri_api::v1;

use crate::{runtime::Runtime, status::RpcError, usage};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ListPodSandboxStatsRequest,
) -> Result<v1::ListPodSandboxStatsResponse, RpcError> {
    let filter = request.filter.unwrap_or_default();
    let pods = runtime
        .sandboxes
        .list_usage(|view| usage::wants_pod(&filter, view))
        .await;
    Ok(v1::ListPodSandboxStatsResponse {
        stats: pods
            .iter()
            .map(|pod| usage::pod(pod, &runtime.settings.sandboxes_root))
            .collect(),
    })
}
