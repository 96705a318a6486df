//! CheckpointContainer: refused, with the reason.

use caisson_cri_api::v1;

use crate::{runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    _: &Runtime,
    _: v1::CheckpointContainerRequest,
) -> Result<v1::CheckpointContainerResponse, RpcError> {
    Err(RpcError::NotYet {
        method: "CheckpointContainer",
        reason: "a checkpoint would have to be one of the whole VM, which no driver can take yet",
    })
}
