//! UpdateRuntimeConfig: the node's range of pod addresses, kept and shown. Addresses come from the CNI configuration all the same.

use caisson_cri_api::v1;

use crate::{outcome::note, pod_cidr::PodCidr, runtime::Runtime, status::RpcError, translate::Refusals};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::UpdateRuntimeConfigRequest,
) -> Result<v1::UpdateRuntimeConfigResponse, RpcError> {
    let given = request
        .runtime_config
        .and_then(|config| config.network_config)
        .map(|network| network.pod_cidr)
        .unwrap_or_default();
    // kubelet sends an empty one before the node has a range; that takes nothing back.
    if given.is_empty() {
        return Ok(v1::UpdateRuntimeConfigResponse {});
    }
    note("pod.cidr", &given);
    let cidr = PodCidr::parse(&given)
        .map_err(|reason| Refusals::one("runtime_config.network_config.pod_cidr", reason))?;
    let store = runtime.pod_cidr.clone();
    tokio::task::spawn_blocking(move || store.set(cidr))
        .await
        .map_err(|_| RpcError::TaskLost("remember the pod CIDR"))??;
    Ok(v1::UpdateRuntimeConfigResponse {})
}
