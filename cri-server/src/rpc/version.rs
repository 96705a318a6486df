//! Version: who answers.

use caisson_cri_api::v1;

use crate::{
    runtime::{API_VERSION, NAME, Runtime, VERSION},
    status::RpcError,
};

/// The version of the kubelet runtime API message itself, which has been this since 2016.
const KUBE_API_VERSION: &str = "0.1.0";

pub(super) async fn handle(_: &Runtime, _: v1::VersionRequest) -> Result<v1::VersionResponse, RpcError> {
    Ok(v1::VersionResponse {
        version: KUBE_API_VERSION.into(),
        runtime_name: NAME.into(),
        runtime_version: VERSION.into(),
        runtime_api_version: API_VERSION.into(),
    })
}
