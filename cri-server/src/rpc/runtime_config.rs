//! RuntimeConfig: the cgroup driver that kubelet shall use.

use caisson_cri_api::v1;

use crate::{config::CgroupDriver, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    _: v1::RuntimeConfigRequest,
) -> Result<v1::RuntimeConfigResponse, RpcError> {
    let driver = match runtime.settings.cgroup_driver {
        CgroupDriver::Cgroupfs => v1::CgroupDriver::Cgroupfs,
        CgroupDriver::Systemd => v1::CgroupDriver::Systemd,
    };
    Ok(v1::RuntimeConfigResponse {
        linux: Some(v1::LinuxRuntimeConfiguration {
            cgroup_driver: driver as i32,
        }),
    })
}
