//! PodSandboxStats: what one pod and each of its containers use.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError, usage};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::PodSandboxStatsRequest,
) -> Result<v1::PodSandboxStatsResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    let used = runtime.sandboxes.pod_usage(sandbox).await?;
    Ok(v1::PodSandboxStatsResponse {
        stats: Some(usage::pod(&used, &runtime.settings.sandboxes_root)),
    })
}
