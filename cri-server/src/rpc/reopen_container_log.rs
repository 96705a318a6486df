//! ReopenContainerLog: goes on in a new file after kubelet has rotated the old one away.

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ReopenContainerLogRequest,
) -> Result<v1::ReopenContainerLogResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    runtime.sandboxes.reopen_log(container).await?;
    Ok(v1::ReopenContainerLogResponse {})
}
