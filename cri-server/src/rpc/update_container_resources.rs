//! UpdateContainerResources: other limits for a container that is created or runs; only the fields that are set change.

use caisson_cri_api::v1;

use super::service::id;
use crate::{
    outcome::{note, unbroken},
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
    let mut wanted = refusals.settle(request.linux)?;
    // What plugins are told of happens, whether the client waits for it or not.
    let (runtime, container) = (runtime.clone(), container.to_owned());
    let update = async move {
        if let (Some(nri), Some(asked)) = (&runtime.nri, wanted.take()) {
            wanted = Some(
                nri.update_container(&runtime.sandboxes, &container, asked)
                    .await?,
            );
        }
        let mut refusals = Refusals::default();
        let change = translate::limit_change(wanted.as_ref(), "linux", &mut refusals);
        let change = refusals.settle(change)?;
        runtime.sandboxes.update_container(&container, change).await?;
        if let Some(nri) = &runtime.nri {
            nri.container_updated(&runtime.sandboxes, &container).await;
        }
        Ok::<_, RpcError>(())
    };
    unbroken("update a container", update).await??;
    Ok(v1::UpdateContainerResourcesResponse {})
}
