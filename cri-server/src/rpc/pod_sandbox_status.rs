//! PodSandboxStatus: one pod as it is now.

use std::{collections::HashMap, time::SystemTime};

use caisson_cri_api::v1;

use super::service::id;
use crate::{answer, outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::PodSandboxStatusRequest,
) -> Result<v1::PodSandboxStatusResponse, RpcError> {
    let sandbox = id("pod_sandbox_id", &request.pod_sandbox_id)?;
    note("sandbox.id", sandbox);
    let view = runtime.sandboxes.status(sandbox).await?;
    let mut containers = runtime.sandboxes.list_containers().await;
    containers.retain(|container| container.sandbox_id == view.id);
    let info = if request.verbose {
        HashMap::from([("info".to_owned(), view.info.to_string())])
    } else {
        HashMap::new()
    };
    Ok(v1::PodSandboxStatusResponse {
        status: Some(answer::sandbox_status(view)),
        info,
        // For kubelets that listen to GetContainerEvents.
        containers_statuses: containers.into_iter().map(answer::container_status).collect(),
        timestamp: answer::nanos(SystemTime::now()),
    })
}
