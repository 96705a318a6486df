//! UpdateContainerResources: other limits for a container that is created or runs; only the fields that are set change.

use caisson_cri_api::v1;

use super::service::id;
use crate::{
    outcome::note,
    runtime::Runtime,
    status::RpcError,
    translate::{self, Refusals},
};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::UpdateContainerResourcesRequest,
) -> Result<v1::UpdateContainerResourcesResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let mut refusals = Refusals::default();
    refusals.add_if(request.windows.is_some(), "windows", "containers here run Linux");
    let change = translate::limit_change(request.linux.as_ref(), "linux", &mut refusals);
    let change = refusals.settle(change)?;
    runtime.sandboxes.update_container(container, change).await?;
    Ok(v1::UpdateContainerResourcesResponse {})
}
