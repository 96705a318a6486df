//! StartContainer: runs a created container's process; an error says what execve said.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::StartContainerRequest,
) -> Result<v1::StartContainerResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    runtime.sandboxes.start_container(container).await?;
    Ok(v1::StartContainerResponse {})
}
