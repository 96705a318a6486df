//! PortForward: a URL where a client connects to ports of a pod. Ports are named by the client's streams, so those of the request are
//! checked and otherwise not needed.

use caisson_cri_api::v1;
use caisson_sandbox::view::SandboxState;
use caisson_streaming::Wish;

use super::service::id;
use crate::{outcome::note, runtime::Runtime, status::RpcError, translate::Refusals};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::PortForwardRequest,
) -> Result<v1::PortForwardResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    let mut refusals = Refusals::default();
    for port in &request.port {
        if !(1..=65535).contains(port) {
            refusals.add("port", format!("{port} is no port"));
        }
    }
    refusals.settle(())?;
    let view = runtime.sandboxes.status(sandbox).await?;
    if view.state != SandboxState::Ready {
        return Err(RpcError::PodNotReady(view.id.0));
    }
    let url = runtime.streaming.url(Wish::PortForward(view.id.0))?;
    Ok(v1::PortForwardResponse { url })
}
