//! RemovePodSandbox: forgets a pod and its containers, stopping it first. Idempotent.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::RemovePodSandboxRequest,
) -> Result<v1::RemovePodSandboxResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    runtime.sandboxes.remove(sandbox).await?;
    runtime.collect_images().await;
    Ok(v1::RemovePodSandboxResponse {})
}
