//! ContainerStats: what one container uses.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError, usage};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ContainerStatsRequest,
) -> Result<v1::ContainerStatsResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let used = runtime.sandboxes.container_usage(container).await?;
    Ok(v1::ContainerStatsResponse {
        stats: Some(usage::container(&used, &runtime.settings.sandboxes_root)),
    })
}
