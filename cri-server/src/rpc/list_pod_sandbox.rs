//! ListPodSandbox: pods that a filter wants.

use caisson_cri_api::v1;

use crate::{answer, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ListPodSandboxRequest,
) -> Result<v1::ListPodSandboxResponse, RpcError> {
    let filter = request.filter.unwrap_or_default();
    let views = runtime.sandboxes.list().await;
    Ok(v1::ListPodSandboxResponse {
        items: views
            .into_iter()
            .filter(|view| answer::wants_sandbox(&filter, view))
            .map(answer::sandbox)
            .collect(),
    })
}
