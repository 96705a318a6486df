//! ListPodSandboxMetrics: the metrics of all pods that run and answer.

use caisson_cri_api::v1;

use crate::{metrics, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    _: v1::ListPodSandboxMetricsRequest,
) -> Result<v1::ListPodSandboxMetricsResponse, RpcError> {
    let pods = runtime.sandboxes.list_usage(|_| true).await;
    Ok(v1::ListPodSandboxMetricsResponse {
        pod_metrics: pods.iter().map(metrics::pod).collect(),
    })
}
