//! StopPodSandbox: ends the VM and takes the network down. Idempotent.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::StopPodSandboxRequest,
) -> Result<v1::StopPodSandboxResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    runtime.sandboxes.stop(sandbox).await?;
    Ok(v1::StopPodSandboxResponse {})
}
