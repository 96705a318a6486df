//! ListMetricDescriptors: names and labels of the metrics there are.

use caisson_cri_api::v1;

use crate::{metrics, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    _: &Runtime,
    _: v1::ListMetricDescriptorsRequest,
) -> Result<v1::ListMetricDescriptorsResponse, RpcError> {
    Ok(v1::ListMetricDescriptorsResponse {
        descriptors: metrics::descriptors(),
    })
}
