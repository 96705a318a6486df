//! ImageStatus: one image; an unknown one is answered by its absence, not by an error.

use std::collections::HashMap;

use caisson_cri_api::v1;
use caisson_image::Image;
use serde_json::{Value, json};

use super::service::image_name;
use crate::{answer, outcome::note, runtime::Runtime, status::RpcError};

pub(super) async fn handle(
    runtime: &Runtime,
    request: v1::ImageStatusRequest,
) -> Result<v1::ImageStatusResponse, RpcError> {
    let reference = image_name(request.image.as_ref())?;
    note("image", &reference);
    let found = runtime.images.get(&reference).await?;
    let info = match &found {
        Some(image) if request.verbose => HashMap::from([("info".to_owned(), info(image).to_string())]),
        _ => HashMap::new(),
    };
    Ok(v1::ImageStatusResponse {
        image: found.map(answer::image),
        info,
    })
}

fn info(image: &Image) -> Value {
    let config = serde_json::from_str::<Value>(&image.config.raw)
        .unwrap_or_else(|_| Value::String(image.config.raw.clone()));
    json!({ "disk": image.disk, "imageSpec": config })
}
