//! What an export says of its blobs: config, manifest, index, and the list that Docker's archives have.
//!
//! Implements the image layout of the OCI image specification 1.1 with containerd's annotation of names, and the `manifest.json` of `docker save`.

use serde_json::{Value, json};

use super::archive::{Descriptor, blob_name};
use crate::{
    digest::Digest,
    layout::{CONTAINERD_NAME, REF_NAME},
    manifest::{ARCHITECTURE, OCI_INDEX, OCI_MANIFEST, OS},
    reference::Reference,
};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What says that the archive is a layout.
pub(super) const LAYOUT: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;

/// One image of the archive.
pub(super) struct Described {
    pub(super) names: Vec<Reference>,
    pub(super) manifest: Descriptor,
    pub(super) config: Descriptor,
    pub(super) layers: Vec<Descriptor>,
}

/// A config with the digests of other layers; with its own it stays as it is, to the byte. `None` when it has no place for them.
pub(super) fn config(raw: &str, known: &[Digest], layers: &[Descriptor]) -> Option<Vec<u8>> {
    if known.iter().eq(layers.iter().map(|layer| &layer.digest)) {
        return Some(raw.as_bytes().to_vec());
    }
    let mut config: Value = serde_json::from_str(raw).ok()?;
    let digests = layers.iter().map(|layer| layer.digest.to_string());
    *config.pointer_mut("/rootfs/diff_ids")? = digests.collect();
    serde_json::to_vec(&config).ok()
}

/// The manifest of an image.
pub(super) fn manifest(config: &Descriptor, layers: &[Descriptor]) -> Vec<u8> {
    let layers: Vec<_> = layers.iter().map(|layer| descriptor(LAYER, layer)).collect();
    let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(CONFIG, config), "layers": layers});
    manifest.to_string().into_bytes()
}

fn descriptor(media_type: &str, blob: &Descriptor) -> Value {
    json!({"mediaType": media_type, "digest": blob.digest.to_string(), "size": blob.size})
}

/// `index.json`: an entry for each name, or one for an image without any.
pub(super) fn index(images: &[Described]) -> Vec<u8> {
    let mut entries: Vec<Value> = Vec::new();
    for image in images {
        let mut entry = descriptor(OCI_MANIFEST, &image.manifest);
        if let Some(entry) = entry.as_object_mut() {
            entry.insert(
                "platform".to_owned(),
                json!({"architecture": ARCHITECTURE, "os": OS}),
            );
        }
        let named = image.names.iter().map(|name| {
            let mut entry = entry.clone();
            let annotations = json!({CONTAINERD_NAME: name.to_string(), REF_NAME: name.version()});
            if let Some(entry) = entry.as_object_mut() {
                entry.insert("annotations".to_owned(), annotations);
            }
            entry
        });
        let mut named: Vec<_> = named.collect();
        if named.is_empty() {
            named.push(entry);
        }
        for entry in named {
            // Asked for twice.
            if !entries.contains(&entry) {
                entries.push(entry);
            }
        }
    }
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    index.to_string().into_bytes()
}

/// `manifest.json`, for a Docker that knows no layouts.
pub(super) fn docker(images: &[Described]) -> Vec<u8> {
    let images: Vec<_> = images
        .iter()
        .map(|image| {
            let names: Vec<_> = image.names.iter().map(ToString::to_string).collect();
            let layers: Vec<_> = image
                .layers
                .iter()
                .map(|layer| blob_name(&layer.digest))
                .collect();
            json!({"Config": blob_name(&image.config.digest), "RepoTags": names, "Layers": layers})
        })
        .collect();
    Value::from(images).to_string().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(content: &[u8]) -> Descriptor {
        Descriptor {
            digest: Digest::of(content),
            size: content.len() as u64,
        }
    }

    #[test]
    fn a_config_changes_only_with_its_layers_and_only_there() {
        let (one, two) = (layer(b"1"), layer(b"2"));
        let raw = format!(
            r#"{{ "os": "linux", "history": [{{"empty_layer": true}}], "rootfs": {{"type": "layers", "diff_ids": ["{}"]}}, "x": 1.5 }}"#,
            one.digest
        );
        let known = [one.digest.clone()];
        assert_eq!(config(&raw, &known, &[one]).unwrap(), raw.as_bytes());
        let changed: Value =
            serde_json::from_slice(&config(&raw, &known, std::slice::from_ref(&two)).unwrap()).unwrap();
        let mut expected: Value = serde_json::from_str(&raw).unwrap();
        expected["rootfs"]["diff_ids"] = json!([two.digest.to_string()]);
        assert_eq!(changed, expected);
        assert_eq!(config("{}", &known, &[two]), None);
    }

    #[test]
    fn every_name_has_an_entry_and_so_has_an_image_without_any() {
        let described = |names: &[&str]| Described {
            names: names.iter().map(|name| Reference::parse(name).unwrap()).collect(),
            manifest: layer(b"manifest"),
            config: layer(b"config"),
            layers: vec![layer(b"layer")],
        };
        let images = [
            described(&["app:v1", "r.example/app:v2"]),
            described(&["app:v1"]),
            described(&[]),
        ];
        let index: Value = serde_json::from_slice(&index(&images)).unwrap();
        let annotations = |at: usize| index["manifests"][at]["annotations"].clone();
        assert_eq!(
            annotations(0),
            json!({CONTAINERD_NAME: "docker.io/library/app:v1", REF_NAME: "v1"})
        );
        assert_eq!(
            annotations(1),
            json!({CONTAINERD_NAME: "r.example/app:v2", REF_NAME: "v2"})
        );
        assert_eq!(annotations(2), Value::Null);
        assert_eq!(index["manifests"].as_array().unwrap().len(), 3);
        let docker: Value = serde_json::from_slice(&docker(&images)).unwrap();
        assert_eq!(
            docker[0]["RepoTags"],
            json!(["docker.io/library/app:v1", "r.example/app:v2"])
        );
        assert_eq!(docker[2]["RepoTags"], json!([]));
    }
}
