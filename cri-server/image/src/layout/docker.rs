//! `manifest.json` of `docker save`: config and layers by file name, from which a manifest as registries have it is made.

use serde::Deserialize;
use serde_json::json;

use super::{Entry, Layout, MAX_ENTRIES};
use crate::{
    ImageError,
    digest::Digest,
    manifest::{DOCKER_MANIFEST, MAX_CONFIG_BYTES, MAX_LAYERS},
};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

/// Adds the images that `manifest` describes.
pub(super) fn describe(layout: &mut Layout, manifest: &[u8]) -> Result<(), ImageError> {
    let source = layout.source.clone();
    let refused = |reason: String| ImageError::Content {
        image: source.clone(),
        reason,
    };
    let saved: Vec<Saved> = serde_json::from_slice(manifest)
        .map_err(|error| refused(format!("its manifest.json is not understood: {error}")))?;
    let counted = saved.len() <= MAX_ENTRIES
        && saved.iter().all(|image| {
            image
                .layers
                .as_ref()
                .is_none_or(|layers| layers.len() <= MAX_LAYERS)
        });
    if !counted {
        return Err(refused(format!(
            "it has more than {MAX_ENTRIES} images, or one with more than {MAX_LAYERS} layers"
        )));
    }
    for image in saved {
        let missing = |name: &str| refused(format!("its manifest.json names {name:?}, which is not there"));
        let config = layout
            .read(&image.config, MAX_CONFIG_BYTES)?
            .ok_or_else(|| missing(&image.config))?;
        let config_digest = Digest::of(&config);
        let mut layers = Vec::new();
        for name in image.layers.unwrap_or_default() {
            let (digest, size) = layer(layout, &name)?.ok_or_else(|| missing(&name))?;
            // The type does not say how it is packed; its first bytes do.
            layers.push(
                json!({"mediaType": "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "digest": digest.to_string(), "size": size}),
            );
            layout.named.insert(digest, name);
        }
        let document = json!({"schemaVersion": 2, "mediaType": DOCKER_MANIFEST,
            "config": {"mediaType": "application/vnd.docker.container.image.v1+json",
                "digest": config_digest.to_string(), "size": config.len()},
            "layers": layers});
        let document = document.to_string().into_bytes();
        let digest = Digest::of(&document);
        layout.named.insert(config_digest, image.config);
        layout
            .made
            .insert(digest.clone(), (document, DOCKER_MANIFEST.to_owned()));
        let mut names: Vec<_> = image
            .repo_tags
            .unwrap_or_default()
            .into_iter()
            .map(Some)
            .collect();
        if names.is_empty() {
            names.push(None);
        }
        layout.entries.extend(names.into_iter().map(|name| Entry {
            name,
            digest: digest.clone(),
            media_type: DOCKER_MANIFEST.to_owned(),
        }));
    }
    Ok(())
}

/// Digest and size of a layer; nothing when it is not there.
fn layer(layout: &Layout, name: &str) -> Result<Option<(Digest, u64)>, ImageError> {
    let failed = |error| ImageError::Io {
        doing: "read",
        path: format!("{}: {name}", layout.source).into(),
        source: error,
    };
    // An archive knows its names; a directory is only ever asked for names of the specification.
    let Some(mut section) = layout.container.find(name).map_err(failed)? else {
        return Ok(None);
    };
    let size = section.len();
    let mut hasher = Digest::of(b"").hasher();
    while let Some(chunk) = section.read_chunk().map_err(failed)? {
        hasher.update(&chunk);
    }
    Ok(Some((hasher.finish(), size)))
}
