//! ListContainers: containers that a filter wants.

use caisson_cri_api::v1;

use crate::{answer, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ListContainersRequest,
) -> Result<v1::ListContainersResponse, RpcError> {
    let filter = request.filter.unwrap_or_default();
    let views = runtime.sandboxes.list_containers().await;
    Ok(v1::ListContainersResponse {
        containers: views
            .into_iter()
            .filter(|view| answer::wants_container(&filter, view))
            .map(answer::container)
            .collect(),
    })
}
