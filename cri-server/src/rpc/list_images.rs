//! ListImages: every image, or the one that a filter names.

use caisson_cri_api::v1;

use crate::{answer, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ListImagesRequest,
) -> Result<v1::ListImagesResponse, RpcError> {
    let wanted = request
        .filter
        .and_then(|filter| filter.image)
        .map(|spec| spec.image)
        .filter(|name| !name.is_empty());
    let images = match wanted {
        Some(name) => runtime.images.get(&name).await?.into_iter().collect(),
        None => runtime.images.list().await?,
    };
    Ok(v1::ListImagesResponse {
        images: images.into_iter().map(answer::image).collect(),
    })
}
