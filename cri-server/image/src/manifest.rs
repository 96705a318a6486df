//! Image manifests, indexes and configs: parsing what a registry says, with a cap on everything.
//!
//! Implements the parts of the OCI image specification 1.1 and of Docker's image manifest version 2, schema 2 that a pull needs. Answers
//! are texts that say why a document is refused; who pulled it adds the name.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

use crate::{ImageConfig, digest::Digest};

/// Largest manifest or index in bytes.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 4 << 20;
/// Largest image config in bytes.
pub(crate) const MAX_CONFIG_BYTES: u64 = 8 << 20;
/// Most layers of one image.
pub(crate) const MAX_LAYERS: usize = 127;

/// The platform whose images can run here.
pub(crate) const OS: &str = "linux";
pub(crate) const ARCHITECTURE: &str = "amd64";

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1";

/// What is asked for, in order of preference.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, \
    application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json";

const CONFIG_TYPES: [&str; 2] = [
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];

const LAYER_TYPES: [&str; 11] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// A blob as a manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Blob {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    /// Other places that have it, when the registry does not.
    pub(crate) urls: Vec<String>,
}

/// One document behind a tag or digest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Document {
    /// Points to the manifest for this platform.
    Index(Blob),
    /// The image itself.
    Image(Manifest),
}

/// Config and layers of one image, bottom layer first.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Blob,
    pub(crate) layers: Vec<Blob>,
}

/// Why a document is not used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    /// It is no manifest at all: a proxy's or a broken registry's answer.
    Garbage(String),
    /// It is one, of a kind that is refused.
    Refused(String),
    /// It has nothing for this platform.
    OtherPlatform(String),
}

#[derive(Deserialize)]
struct RawDocument {
    #[serde(rename = "schemaVersion")]
    schema_version: u32,
    #[serde(rename = "mediaType", default, deserialize_with = "or_default")]
    media_type: String,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    #[serde(rename = "mediaType", default, deserialize_with = "or_default")]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default, deserialize_with = "or_default")]
    urls: Vec<String>,
    #[serde(default, deserialize_with = "or_default")]
    platform: RawPlatform,
}

#[derive(Deserialize, Default)]
struct RawPlatform {
    #[serde(default, deserialize_with = "or_default")]
    os: String,
    #[serde(default, deserialize_with = "or_default")]
    architecture: String,
}

/// Parses what a registry answered with `content_type`.
pub(crate) fn parse(bytes: &[u8], content_type: &str) -> Result<Document, Unusable> {
    let raw: RawDocument = serde_json::from_slice(bytes)
        .map_err(|error| Unusable::Garbage(format!("the manifest is not understood: {error}")))?;
    let declared = if raw.media_type.is_empty() {
        content_type
    } else {
        &raw.media_type
    };
    if raw.schema_version == 1 || declared.starts_with(DOCKER_SCHEMA1) {
        return refused(
            "docker manifests of schema 1 are not supported: push the image again with a current tool".into(),
        );
    }
    if raw.schema_version != 2 {
        return refused(format!(
            "manifest schema version {} is not supported",
            raw.schema_version
        ));
    }
    // A document that is both would be two images, depending on who reads it.
    let is_index = match (
        raw.manifests.is_some(),
        raw.config.is_some() || raw.layers.is_some(),
    ) {
        (true, false) => true,
        (false, true) => false,
        (true, true) => return refused("the manifest is an index and an image at once".into()),
        (false, false) => {
            return Err(Unusable::Garbage(
                "the document has neither layers nor manifests".into(),
            ));
        }
    };
    let agrees = match raw.media_type.as_str() {
        "" => true,
        OCI_INDEX | DOCKER_LIST => is_index,
        OCI_MANIFEST | DOCKER_MANIFEST => !is_index,
        other => return refused(format!("manifests of type {other:?} are not supported")),
    };
    if !agrees {
        return refused(format!(
            "the manifest says it is {:?}, and is not",
            raw.media_type
        ));
    }
    if is_index {
        select(raw.manifests.unwrap_or_default())
    } else {
        image(raw.config, raw.layers)
    }
}

fn refused<T>(reason: String) -> Result<T, Unusable> {
    Err(Unusable::Refused(reason))
}

/// The first entry for this platform, as every other client chooses.
fn select(entries: Vec<RawDescriptor>) -> Result<Document, Unusable> {
    let mut offered = Vec::new();
    for entry in entries {
        let platform = &entry.platform;
        if platform.os == OS && platform.architecture == ARCHITECTURE {
            if matches!(entry.media_type.as_str(), OCI_INDEX | DOCKER_LIST) {
                return refused("an index inside an index is not supported".into());
            }
            return Ok(Document::Index(blob(entry)?));
        }
        if offered.len() < 16 {
            offered.push(format!("{}/{}", platform.os, platform.architecture));
        }
    }
    let offered = offered.join(", ").escape_debug().to_string();
    Err(Unusable::OtherPlatform(format!(
        "the index has no entry for {OS}/{ARCHITECTURE}, only [{offered}]"
    )))
}

fn image(config: Option<RawDescriptor>, layers: Option<Vec<RawDescriptor>>) -> Result<Document, Unusable> {
    let Some(config) = config else {
        return refused("the manifest names no config".into());
    };
    if !CONFIG_TYPES.contains(&config.media_type.as_str()) {
        return refused(format!(
            "it is no container image: its config has type {:?}",
            config.media_type
        ));
    }
    let config = blob(config)?;
    if config.digest.sha256_hex().is_none() {
        return refused(format!(
            "its config has digest {}, only sha256 can name an image",
            config.digest
        ));
    }
    if config.size > MAX_CONFIG_BYTES {
        return refused(format!(
            "its config has {} bytes, more than {MAX_CONFIG_BYTES}",
            config.size
        ));
    }
    let layers = layers.unwrap_or_default();
    if layers.len() > MAX_LAYERS {
        return refused(format!("it has {} layers, more than {MAX_LAYERS}", layers.len()));
    }
    if let Some(layer) = layers
        .iter()
        .find(|layer| !LAYER_TYPES.contains(&layer.media_type.as_str()))
    {
        return refused(format!("layers of type {:?} are not supported", layer.media_type));
    }
    let layers = layers.into_iter().map(blob).collect::<Result<_, _>>()?;
    Ok(Document::Image(Manifest { config, layers }))
}

fn blob(raw: RawDescriptor) -> Result<Blob, Unusable> {
    match Digest::parse(&raw.digest) {
        Some(digest) => Ok(Blob {
            digest,
            size: raw.size,
            urls: raw.urls,
        }),
        None => refused(format!(
            "the manifest holds a digest that is none: {:?}",
            raw.digest
        )),
    }
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default, deserialize_with = "or_default")]
    os: String,
    #[serde(default, deserialize_with = "or_default")]
    architecture: String,
    #[serde(default, deserialize_with = "or_default")]
    config: RawRun,
    #[serde(default, deserialize_with = "or_default")]
    rootfs: RawRootfs,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    #[serde(deserialize_with = "or_default")]
    user: String,
    #[serde(deserialize_with = "or_default")]
    env: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    working_dir: String,
    #[serde(deserialize_with = "or_default")]
    volumes: BTreeMap<String, serde::de::IgnoredAny>,
    #[serde(deserialize_with = "or_default")]
    stop_signal: String,
    #[serde(deserialize_with = "or_default")]
    labels: BTreeMap<String, String>,
}

#[derive(Deserialize, Default)]
struct RawRootfs {
    #[serde(default, deserialize_with = "or_default")]
    diff_ids: Vec<String>,
}

/// An explicit `null` is as good as absence: Go encoders write it for empty lists and maps.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(input: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(input)?.unwrap_or_default())
}

/// Parses an image config: what to run, and the digest of each of the `layers` layers when uncompressed.
pub(crate) fn parse_config(bytes: Vec<u8>, layers: usize) -> Result<(ImageConfig, Vec<Digest>), Unusable> {
    let text = String::from_utf8(bytes).map_err(|_| Unusable::Refused("its config is not UTF-8".into()))?;
    let raw: RawConfig = serde_json::from_str(&text)
        .map_err(|error| Unusable::Refused(format!("its config is not understood: {error}")))?;
    let fits = |value: &str, wanted: &str| value.is_empty() || value == wanted;
    if !fits(&raw.os, OS) || !fits(&raw.architecture, ARCHITECTURE) {
        let built = format!("{}/{}", raw.os, raw.architecture)
            .escape_debug()
            .to_string();
        return Err(Unusable::OtherPlatform(format!(
            "it is built for {built}, not {OS}/{ARCHITECTURE}"
        )));
    }
    if raw.rootfs.diff_ids.len() != layers {
        let found = raw.rootfs.diff_ids.len();
        return refused(format!(
            "its config describes {found} layers, its manifest {layers}"
        ));
    }
    let diff_ids = raw
        .rootfs
        .diff_ids
        .iter()
        .map(|id| {
            Digest::parse(id).ok_or_else(|| Unusable::Refused(format!("its config has diff id {id:?}")))
        })
        .collect::<Result<_, _>>()?;
    let run = raw.config;
    let config = ImageConfig {
        user: run.user,
        env: run.env,
        entrypoint: run.entrypoint,
        cmd: run.cmd,
        working_dir: run.working_dir,
        volumes: run.volumes.into_keys().collect(),
        stop_signal: run.stop_signal,
        labels: run.labels,
        raw: text,
    };
    Ok((config, diff_ids))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hex(digit: char) -> String {
        format!("sha256:{}", digit.to_string().repeat(64))
    }

    fn parse_json(value: &serde_json::Value) -> Result<Document, Unusable> {
        parse(value.to_string().as_bytes(), "")
    }

    fn image_json() -> serde_json::Value {
        json!({"schemaVersion": 2,
            "config": {"mediaType": CONFIG_TYPES[0], "digest": hex('c'), "size": 2},
            "layers": [{"mediaType": LAYER_TYPES[1], "digest": hex('1'), "size": 10, "urls": null}]})
    }

    #[test]
    fn an_image_manifest_needs_no_media_type() {
        let Ok(Document::Image(image)) = parse_json(&image_json()) else {
            panic!("no image")
        };
        assert_eq!(image.layers.len(), 1);
        assert_eq!(image.layers[0].size, 10);
    }

    #[test]
    fn the_entry_for_this_platform_is_selected() {
        let entry = |arch: &str, digit| {
            json!({"mediaType": OCI_MANIFEST, "digest": hex(digit), "size": 1,
                "platform": {"os": "linux", "architecture": arch}})
        };
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX,
            "manifests": [entry("arm64", 'a'), entry("amd64", 'b'), entry("amd64", 'd')]});
        let Ok(Document::Index(chosen)) = parse_json(&index) else {
            panic!("no index")
        };
        assert_eq!(chosen.digest.to_string(), hex('b'));
        let other = json!({"schemaVersion": 2, "manifests": [entry("arm64", 'a')]});
        assert!(
            matches!(parse_json(&other), Err(Unusable::OtherPlatform(text)) if text.contains("linux/arm64"))
        );
    }

    #[test]
    fn what_is_two_things_at_once_is_refused() {
        let mut both = image_json();
        both["manifests"] = json!([]);
        assert!(matches!(parse_json(&both), Err(Unusable::Refused(text)) if text.contains("at once")));
        let mut lying = image_json();
        lying["mediaType"] = json!(OCI_INDEX);
        assert!(matches!(parse_json(&lying), Err(Unusable::Refused(text)) if text.contains("and is not")));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let cases = [
            (json!({"schemaVersion": 1, "fsLayers": []}), "schema 1"),
            (json!({"schemaVersion": 3, "layers": []}), "version 3"),
            (
                json!({"schemaVersion": 2, "mediaType": "text/x", "layers": []}),
                "text/x",
            ),
            (json!({"schemaVersion": 2, "layers": []}), "no config"),
        ];
        for (document, reason) in cases {
            assert!(matches!(parse_json(&document), Err(Unusable::Refused(text)) if text.contains(reason)));
        }
        let mut artifact = image_json();
        artifact["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json");
        assert!(matches!(parse_json(&artifact), Err(Unusable::Refused(text)) if text.contains("helm")));
        let mut encrypted = image_json();
        encrypted["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted");
        assert!(matches!(parse_json(&encrypted), Err(Unusable::Refused(text)) if text.contains("encrypted")));
        let mut traversal = image_json();
        traversal["config"]["digest"] = json!("sha256:../../etc/passwd");
        assert!(matches!(parse_json(&traversal), Err(Unusable::Refused(_))));
        let mut many = image_json();
        many["layers"] = json!(vec![many["layers"][0].clone(); MAX_LAYERS + 1]);
        assert!(matches!(parse_json(&many), Err(Unusable::Refused(text)) if text.contains("128")));
    }

    #[test]
    fn garbage_is_told_from_what_is_refused() {
        for text in [
            "",
            "<html>",
            "[]",
            "{}",
            "{\"schemaVersion\":2}",
            "{\"schemaVersion\":2,\"layers\":7}",
        ] {
            assert!(
                matches!(parse(text.as_bytes(), ""), Err(Unusable::Garbage(_))),
                "{text}"
            );
        }
        let negative = r#"{"schemaVersion":2,"layers":[{"digest":"x","size":-1}]}"#;
        assert!(matches!(
            parse(negative.as_bytes(), ""),
            Err(Unusable::Garbage(_))
        ));
    }

    #[test]
    fn a_config_full_of_nulls_is_an_empty_one() {
        let text = r#"{"os":"linux","config":{"User":null,"Env":null,"Cmd":null,"Volumes":null,"Labels":null},
            "rootfs":{"type":"layers","diff_ids":null}}"#;
        let (config, ids) = parse_config(text.into(), 0).unwrap();
        assert_eq!(
            config,
            ImageConfig {
                raw: text.into(),
                ..ImageConfig::default()
            }
        );
        assert!(ids.is_empty());
        assert!(parse_config(b"{\"config\":null,\"rootfs\":null}".to_vec(), 0).is_ok());
    }

    #[test]
    fn a_config_says_what_to_run() {
        let text = json!({"architecture": "amd64", "os": "linux",
            "config": {"User": "app:1", "Env": ["A=b"], "Entrypoint": ["/e"], "Cmd": ["c"], "WorkingDir": "/w",
                "Volumes": {"/z": {}, "/a": {}}, "StopSignal": "SIGQUIT", "Labels": {"k": "v"}},
            "rootfs": {"type": "layers", "diff_ids": [hex('1')]}});
        let (config, ids) = parse_config(text.to_string().into_bytes(), 1).unwrap();
        assert_eq!(config.volumes, ["/a", "/z"]);
        assert_eq!(
            (config.user.as_str(), config.stop_signal.as_str()),
            ("app:1", "SIGQUIT")
        );
        assert_eq!(ids[0].to_string(), hex('1'));
    }

    #[test]
    fn a_config_for_another_platform_or_other_layers_is_refused() {
        let arm = br#"{"architecture":"arm64","os":"linux"}"#.to_vec();
        assert!(
            matches!(parse_config(arm, 0), Err(Unusable::OtherPlatform(text)) if text.contains("linux/arm64"))
        );
        let config = br#"{"rootfs":{"diff_ids":[]}}"#.to_vec();
        assert!(matches!(parse_config(config, 1), Err(Unusable::Refused(text)) if text.contains("0 layers")));
    }
}
