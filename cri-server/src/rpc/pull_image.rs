//! PullImage: fetches, verifies and converts an image. Answers its id, the one value that names it everywhere.

use caisson_cri_api::v1;

use super::service::image_name;
use crate::{
    outcome::note,
    runtime::Runtime,
    status::RpcError,
    translate::{self, Refusals},
};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::PullImageRequest,
) -> Result<v1::PullImageResponse, RpcError> {
    let spec = request.image.unwrap_or_default();
    let reference = image_name(Some(&spec))?;
    note("image", &reference);
    let mut refusals = Refusals::default();
    // One store serves every handler, so a handler only has to be one of ours.
    translate::handler("image.runtime_handler", &spec.runtime_handler, &mut refusals);
    refusals.settle(())?;
    let credentials = translate::credentials(request.auth.as_ref(), &reference)?;
    let image = runtime.images.pull(&reference, credentials).await?;
    Ok(v1::PullImageResponse { image_ref: image.id })
}
