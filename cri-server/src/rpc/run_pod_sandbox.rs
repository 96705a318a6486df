//! RunPodSandbox: a pod's VM, from its network to its answering agent. A retry joins the call that runs.

use caisson_cri_api::v1;

use crate::{outcome::note, runtime::Runtime, status::RpcError, translate};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::RunPodSandboxRequest,
) -> Result<v1::RunPodSandboxResponse, RpcError> {
    if let Some(metadata) = request
        .config
        .as_ref()
        .and_then(|config| config.metadata.as_ref())
    {
        note("pod.name", &metadata.name);
        note("pod.namespace", &metadata.namespace);
    }
    let spec = translate::pod_spec(request)?;
    let id = runtime.sandboxes.run(spec).await?;
    note("sandbox.id", &id.0);
    Ok(v1::RunPodSandboxResponse { pod_sandbox_id: id.0 })
}
