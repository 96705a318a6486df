//! RemoveContainer: forgets a container and its writable layer, killing it first. Idempotent.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::RemoveContainerRequest,
) -> Result<v1::RemoveContainerResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    runtime.sandboxes.remove_container(container).await?;
    runtime.collect_images().await;
    Ok(v1::RemoveContainerResponse {})
}
