//! RemoveImage: forgets an image with all its names; the disk that a container uses stays until that container is gone. Idempotent.

use caisson_cri_api::v1;

use super::service::image_name;
use crate::{outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::RemoveImageRequest,
) -> Result<v1::RemoveImageResponse, RpcError> {
    let reference = image_name(request.image.as_ref())?;
    note("image", &reference);
    let in_use = runtime.sandboxes.images_in_use().await;
    let mut ids = in_use.ids;
    if !in_use.complete {
        // It may be the one that a record without a readable word is about.
        ids.extend(runtime.images.get(&reference).await?.map(|image| image.id));
    }
    runtime.images.remove(&reference, &ids).await?;
    Ok(v1::RemoveImageResponse {})
}
