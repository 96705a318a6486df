//! ContainerStatus: one container as it is now.

use std::collections::HashMap;

use caisson_cri_api::v1;
use caisson_sandbox::view::ContainerView;
use serde_json::json;

use super::service::id;
use crate::{answer, outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ContainerStatusRequest,
) -> Result<v1::ContainerStatusResponse, RpcError> {
    let container = id("container_id", &request.container_id)?;
    note("container.id", container);
    let view = runtime.sandboxes.container_status(container).await?;
    let info = if request.verbose {
        HashMap::from([("info".to_owned(), info(&view).to_string())])
    } else {
        HashMap::new()
    };
    Ok(v1::ContainerStatusResponse {
        status: Some(answer::container_status(view)),
        info,
    })
}

/// For people. The environment stays out: it is where secrets are.
fn info(view: &ContainerView) -> serde_json::Value {
    let guest = &view.spec.guest;
    let process = guest.process.clone().unwrap_or_default();
    let args: Vec<_> = process
        .args
        .iter()
        .map(|word| String::from_utf8_lossy(word))
        .collect();
    let capabilities = process.capabilities.as_ref().map(|sets| sets.bounding.as_slice());
    json!({
        "sandboxID": view.sandbox_id.0,
        "imageDisk": view.spec.image.disk,
        "args": args,
        "cwd": process.cwd,
        "user": process.user.as_ref().map(|user| user.spec.as_str()),
        "capabilities": capabilities,
        "noNewPrivileges": process.no_new_privileges,
        "terminal": process.terminal,
        "privileged": guest.privileged,
        "readonlyRootfs": guest.readonly_rootfs,
        "imageVolumes": guest.image_volumes,
        "copiedFiles": view.spec.files.iter().map(|files| json!({
            "hostPath": files.host_path,
            "containerPath": files.container_path,
            "readonly": files.readonly,
        })).collect::<Vec<_>>(),
        "terminationFile": view.spec.termination_file,
    })
}
