//! Images made in memory, and a store in a temporary directory to pull them into.

use std::{
    collections::BTreeMap,
    io::Write,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use caisson_image::{ImageError, ImageStore, ImageStoreConfig};
use serde_json::{Value, json};
use sha2::Digest as _;

use crate::fake::{Answer, Request};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

pub(crate) fn digest(bytes: &[u8]) -> String {
    let hex: String = sha2::Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// An archive with one file for each pair.
pub(crate) fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_gnu();
        // Not set_path: that refuses what we want to see refused.
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder.append(&header, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[derive(Clone, Copy)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub(crate) fn pack(self, plain: &[u8]) -> Vec<u8> {
        match self {
            Self::Plain => plain.to_vec(),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(plain).unwrap();
                encoder.finish().unwrap()
            }
            Self::Zstd => zstd::encode_all(plain, 3).unwrap(),
        }
    }

    fn media_type(self) -> &'static str {
        match self {
            Self::Plain => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// An image with everything a registry needs to serve it.
#[derive(Clone)]
pub(crate) struct TestImage {
    pub(crate) manifest: Vec<u8>,
    pub(crate) media_type: &'static str,
    /// By digest: config and layers.
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) id: String,
    /// Digests of the layers, bottom first.
    pub(crate) layers: Vec<String>,
}

impl TestImage {
    /// An image of these archives; `mark` makes its config, and so its id, its own.
    pub(crate) fn new(mark: &str, layers: &[(Vec<u8>, Packing)]) -> Self {
        let diff_ids: Vec<_> = layers.iter().map(|(plain, _)| digest(plain)).collect();
        let config = json!({"architecture": "amd64", "os": "linux",
            "config": {"Entrypoint": ["/entry"], "Cmd": null, "Env": [format!("MARK={mark}")], "Labels": {"mark": mark}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}});
        Self::with_config(&config, layers)
    }

    pub(crate) fn with_config(config: &Value, layers: &[(Vec<u8>, Packing)]) -> Self {
        let config = config.to_string().into_bytes();
        let id = digest(&config);
        let mut image = Self {
            manifest: Vec::new(),
            media_type: OCI_MANIFEST,
            blobs: BTreeMap::new(),
            id: id.clone(),
            layers: Vec::new(),
        };
        let mut descriptors = Vec::new();
        for (plain, packing) in layers {
            let packed = packing.pack(plain);
            let name = digest(&packed);
            descriptors
                .push(json!({"mediaType": packing.media_type(), "digest": name, "size": packed.len()}));
            image.layers.push(name.clone());
            image.blobs.insert(name, packed);
        }
        let manifest = json!({"schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": id, "size": config.len()},
            "layers": descriptors});
        image.blobs.insert(id, config);
        image.manifest = manifest.to_string().into_bytes();
        image
    }

    /// One small layer.
    pub(crate) fn small(mark: &str) -> Self {
        let content = format!("content of {mark}");
        Self::new(mark, &[(archive(&[("file", content.as_bytes())]), Packing::Gzip)])
    }

    pub(crate) fn digest(&self) -> String {
        digest(&self.manifest)
    }

    /// The same image in the media types of Docker.
    pub(crate) fn into_docker(mut self) -> Self {
        let text = String::from_utf8(self.manifest).unwrap();
        self.manifest = text
            .replace(OCI_MANIFEST, DOCKER_MANIFEST)
            .replace(
                "application/vnd.oci.image.config.v1+json",
                "application/vnd.docker.container.image.v1+json",
            )
            .replace(
                "application/vnd.oci.image.layer.v1.tar+gzip",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            )
            .into_bytes();
        self.media_type = DOCKER_MANIFEST;
        self
    }

    /// An index of images with their architectures.
    pub(crate) fn index(media_type: &str, images: &[(&str, &Self)]) -> Vec<u8> {
        let entries: Vec<_> = images
            .iter()
            .map(|(architecture, image)| {
                json!({"mediaType": image.media_type, "digest": image.digest(), "size": image.manifest.len(),
                    "platform": {"os": "linux", "architecture": architecture}})
            })
            .collect();
        json!({"schemaVersion": 2, "mediaType": media_type, "manifests": entries})
            .to_string()
            .into_bytes()
    }

    /// What an honest registry answers; the manifest is served for any tag.
    pub(crate) fn serve(&self, request: &Request) -> Answer {
        if let Some((_, version)) = request.path.split_once("/manifests/") {
            return if !version.starts_with("sha256:") || version == self.digest() {
                Answer::ok(self.media_type, &self.manifest)
            } else {
                Answer::status(404)
            };
        }
        let Some((_, name)) = request.path.split_once("/blobs/") else {
            return Answer::status(404);
        };
        let Some(blob) = self.blobs.get(name) else {
            return Answer::status(404);
        };
        match request.range_start() {
            None => Answer::ok("application/octet-stream", blob),
            Some(start) => Answer::partial(blob, start),
        }
    }
}

/// A store of its own for one test.
pub(crate) struct TestStore {
    pub(crate) store: ImageStore,
    pub(crate) config: ImageStoreConfig,
    directory: tempfile::TempDir,
}

impl TestStore {
    pub(crate) async fn new() -> Self {
        Self::with(|_| ()).await
    }

    pub(crate) async fn with(change: impl FnOnce(&mut ImageStoreConfig)) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .with_test_writer()
            .try_init();
        let directory = tempfile::tempdir().unwrap();
        let mut config = ImageStoreConfig {
            root: directory.path().join("store"),
            insecure_registries: Vec::new(),
            mirrors: BTreeMap::new(),
            hosts_dirs: Vec::new(),
            auth_files: Vec::new(),
            signatures: BTreeMap::new(),
            ca_files: Vec::new(),
            max_image_bytes: 64 << 20,
            stall_deadline: Duration::from_secs(20),
            converter: env!("CARGO_BIN_EXE_caisson-layer-converter").into(),
        };
        change(&mut config);
        let store = ImageStore::open(config.clone()).await.unwrap();
        Self {
            store,
            config,
            directory,
        }
    }

    /// Closes the store and opens it again, as a restarted daemon does.
    pub(crate) async fn reopen(self) -> Self {
        let Self {
            store,
            config,
            directory,
        } = self;
        drop(store);
        let store = ImageStore::open(config.clone()).await.unwrap();
        Self {
            store,
            config,
            directory,
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Names in a directory of the store.
    pub(crate) fn names(&self, directory: &str) -> Vec<PathBuf> {
        let directory = self.config.root.join(directory);
        std::fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    /// Nothing listed, no file anywhere.
    pub(crate) async fn assert_empty(&self) {
        assert_eq!(self.store.list().await.unwrap(), []);
        for directory in ["images", "layers", "tmp"] {
            let names = self.names(directory);
            assert!(names.is_empty(), "{names:?}");
        }
    }
}

/// The cause inside an error that came through a shared pull.
pub(crate) fn cause(error: &ImageError) -> &ImageError {
    match error {
        ImageError::Joined(inner) => inner,
        other => other,
    }
}

/// The disk as a guest sees it.
pub(crate) fn content(disk: &[PathBuf]) -> Vec<u8> {
    disk.iter()
        .flat_map(|file| std::fs::read(file).unwrap())
        .collect()
}

/// Whether the disk is EROFS and has `content` in it, which is not compressed there.
pub(crate) fn holds(disk: &[PathBuf], content: &[u8]) -> bool {
    let bytes = self::content(disk);
    bytes[1024..1028] == 0xe0f5_e1e2u32.to_le_bytes()
        && bytes.windows(content.len()).any(|window| window == content)
}

/// Waits for a condition that other tasks bring about.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting)
        .await
        .unwrap_or_else(|_| panic!("{what}: never"));
}

pub(crate) type Handler = Arc<dyn Fn(&Request) -> Answer + Send + Sync>;
