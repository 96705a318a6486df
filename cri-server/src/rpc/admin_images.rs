//! Import, Pin and Describe: what `caissond image` asks of the daemon that runs. Who can connect to the socket is as good as root already.

use std::path::Path;

use caisson_cri_api::admin::{self, images_server::Images};
use tonic::{Request, Response, Status, async_trait};

use super::service::{Cri, id};
use crate::{
    outcome::{Effect, note, observe},
    runtime::Runtime,
    status::RpcError,
    translate::Refusals,
};

#[async_trait]
impl Images for Cri {
    async fn import(
        &self,
        request: Request<admin::ImportRequest>,
    ) -> Result<Response<admin::ImportResponse>, Status> {
        let work = import(self.runtime(), request.into_inner());
        observe("Import", Effect::Change, work).await
    }

    async fn pin(&self, request: Request<admin::PinRequest>) -> Result<Response<admin::PinResponse>, Status> {
        observe("Pin", Effect::Change, pin(self.runtime(), request.into_inner())).await
    }

    async fn describe(
        &self,
        request: Request<admin::DescribeRequest>,
    ) -> Result<Response<admin::DescribeResponse>, Status> {
        let work = describe(self.runtime(), request.into_inner());
        observe("Describe", Effect::Read, work).await
    }
}

async fn import(runtime: &Runtime, request: admin::ImportRequest) -> Result<admin::ImportResponse, RpcError> {
    let path = Path::new(&request.path);
    if !path.is_absolute() {
        return Err(Refusals::one("path", "is not an absolute path").into());
    }
    note("image", &request.path);
    let name = (!request.name.is_empty()).then_some(request.name.as_str());
    let images = runtime.images.import(path, name, request.pin).await?;
    let images = images.into_iter().map(|image| admin::ImportedImage {
        id: image.id,
        repo_tags: image.repo_tags,
        size_bytes: image.size_bytes,
    });
    Ok(admin::ImportResponse {
        images: images.collect(),
    })
}

async fn pin(runtime: &Runtime, request: admin::PinRequest) -> Result<admin::PinResponse, RpcError> {
    let wanted = id("image", &request.image)?;
    note("image", wanted);
    match runtime.images.pin(wanted, request.pinned).await? {
        Some(image) => Ok(admin::PinResponse { id: image.id }),
        None => Err(RpcError::ImageMissing(request.image)),
    }
}

async fn describe(
    runtime: &Runtime,
    request: admin::DescribeRequest,
) -> Result<admin::DescribeResponse, RpcError> {
    let wanted = id("image", &request.image)?;
    note("image", wanted);
    match runtime.images.get(wanted).await? {
        Some(image) => Ok(admin::DescribeResponse {
            id: image.id,
            repo_tags: image.repo_tags,
            config: image.config.raw,
        }),
        None => Err(RpcError::ImageMissing(request.image)),
    }
}
