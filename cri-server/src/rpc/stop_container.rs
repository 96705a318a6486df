//! StopContainer: the stop signal, and SIGKILL after the grace period. Idempotent.

use std::time::Duration;

use caisson_cri_api::v1;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::StopContainerRequest,
) -> Result<v1::StopContainerResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    // No grace is SIGKILL at once; so is a negative one, as with containerd.
    let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
    runtime.sandboxes.stop_container(container, grace).await?;
    Ok(v1::StopContainerResponse {})
}
