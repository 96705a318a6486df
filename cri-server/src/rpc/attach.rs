//! Attach: a URL where a client joins a container's own streams.

use caisson_cri_api::v1;
use caisson_streaming::{
    Wish,
    port::{Attach, Stdio},
};

use super::{exec::stdio, service::id};
use crate::{outcome::note, runtime::Runtime, status::RpcError, translate::Refusals};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::AttachRequest,
) -> Result<v1::AttachResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let mut refusals = Refusals::default();
    let stdio = stdio(
        Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            tty: request.tty,
        },
        &mut refusals,
    );
    refusals.settle(())?;
    let container = runtime.running_container(container, "attach to").await?;
    let url = runtime.streaming.url(Wish::Attach(Attach { container, stdio }))?;
    Ok(v1::AttachResponse { url })
}
