//! RuntimeConfig: the cgroup driver that kubelet shall use.

use caisson_cri_api::v1;

use crate::{runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    _: &Runtime,
    _: v1::RuntimeConfigRequest,
) -> Result<v1::RuntimeConfigResponse, RpcError> {
    // The only one that is implemented; the configuration refuses any other word.
    Ok(v1::RuntimeConfigResponse {
        linux: Some(v1::LinuxRuntimeConfiguration {
            cgroup_driver: v1::CgroupDriver::Cgroupfs as i32,
        }),
    })
}
