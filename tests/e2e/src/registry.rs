//! A real registry (Debian's docker-registry) on loopback, and pushing to it.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{
    eventually,
    image::{Image, digest},
};

/// The media types that an image is pushed with.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    manifest: &'static str,
    config: &'static str,
    layer: &'static str,
    index: &'static str,
}

/// OCI image specification.
pub const OCI: Format = Format {
    manifest: "application/vnd.oci.image.manifest.v1+json",
    config: "application/vnd.oci.image.config.v1+json",
    layer: "application/vnd.oci.image.layer.v1.tar+gzip",
    index: "application/vnd.oci.image.index.v1+json",
};

/// Docker image manifest version 2, schema 2.
pub const DOCKER: Format = Format {
    manifest: "application/vnd.docker.distribution.manifest.v2+json",
    config: "application/vnd.docker.container.image.v1+json",
    layer: "application/vnd.docker.image.rootfs.diff.tar.gzip",
    index: "application/vnd.docker.distribution.manifest.list.v2+json",
};

/// A running registry; ends with this value.
#[derive(Debug)]
pub struct Registry {
    process: Child,
    address: String,
}

impl Registry {
    /// Starts a registry on a free port with its storage below `dir`.
    pub async fn start(dir: &Path) -> Result<Self> {
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Self::start_at(dir, port).await
    }

    /// Starts a registry on this port of loopback.
    pub async fn start_at(dir: &Path, port: u16) -> Result<Self> {
        let address = format!("127.0.0.1:{port}");
        fs::create_dir_all(dir)?;
        let config = json!({
            "version": "0.1",
            "log": { "level": "warn", "accesslog": { "disabled": true } },
            "storage": { "filesystem": { "rootdirectory": dir.join("storage") }, "delete": { "enabled": true } },
            "http": { "addr": address },
        });
        // YAML is a superset of JSON.
        fs::write(dir.join("config.yml"), config.to_string())?;
        let log = fs::File::create(dir.join("registry.log"))?;
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.join("config.yml"))
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("cannot start docker-registry (Debian package docker-registry)")?;
        let registry = Self { process, address };
        eventually("the registry's answer", Duration::from_secs(20), async || {
            ureq::get(format!("http://{}/v2/", registry.address)).call().ok()
        })
        .await?;
        Ok(registry)
    }

    /// `127.0.0.1:port`
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The full name of an image here.
    #[must_use]
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.address)
    }

    /// Pushes an image as `name:tag`; answers its full reference.
    pub fn push(&self, name: &str, tag: &str, image: &Image) -> Result<String> {
        self.push_as(&OCI, name, tag, image)?;
        Ok(self.reference(&format!("{name}:{tag}")))
    }

    /// Pushes an image in this format under `tag`, which may be a digest; answers its manifest's digest.
    pub fn push_as(&self, format: &Format, name: &str, tag: &str, image: &Image) -> Result<String> {
        let manifest = self.push_content(format, name, image)?;
        self.push_manifest(name, tag, format.manifest, &manifest)
    }

    /// Pushes an index of the same image for two platforms, arm64 first; answers the index's digest.
    pub fn push_index(&self, format: &Format, name: &str, tag: &str, image: &Image) -> Result<String> {
        let mut entries = Vec::new();
        for architecture in ["arm64", "amd64"] {
            let mut image = image.clone();
            image.config["architecture"] = architecture.into();
            let manifest = self.push_content(format, name, &image)?;
            let digest = self.push_manifest(name, &digest(&manifest), format.manifest, &manifest)?;
            entries.push(json!({
                "mediaType": format.manifest, "digest": digest, "size": manifest.len(),
                "platform": { "architecture": architecture, "os": "linux" },
            }));
        }
        let index = json!({ "schemaVersion": 2, "mediaType": format.index, "manifests": entries });
        self.push_manifest(name, tag, format.index, &serde_json::to_vec(&index)?)
    }

    /// Pushes layers and config; answers the manifest.
    fn push_content(&self, format: &Format, name: &str, image: &Image) -> Result<Vec<u8>> {
        let config = serde_json::to_vec(&image.config)?;
        self.push_blob(name, &config)?;
        for layer in &image.layers {
            self.push_blob(name, &layer.bytes)?;
        }
        let layers: Vec<_> = image
            .layers
            .iter()
            .map(|layer| json!({ "mediaType": format.layer, "digest": layer.digest, "size": layer.bytes.len() }))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": format.manifest,
            "config": { "mediaType": format.config, "digest": digest(&config), "size": config.len() },
            "layers": layers,
        });
        Ok(serde_json::to_vec(&manifest)?)
    }

    fn push_manifest(&self, name: &str, tag: &str, media_type: &str, manifest: &[u8]) -> Result<String> {
        let url = format!("http://{}/v2/{name}/manifests/{tag}", self.address);
        let answer = ureq::put(&url)
            .header("Content-Type", media_type)
            .send(manifest)?;
        ensure!(answer.status() == 201, "PUT {url} answered {}", answer.status());
        Ok(digest(manifest))
    }

    fn push_blob(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let start = format!("http://{}/v2/{name}/blobs/uploads/", self.address);
        let answer = ureq::post(&start).send_empty()?;
        let location = answer
            .headers()
            .get("Location")
            .context("registry gave no upload location")?
            .to_str()?;
        let separator = if location.contains('?') { '&' } else { '?' };
        let location = if location.starts_with("http") {
            location.to_owned()
        } else {
            format!("http://{}{location}", self.address)
        };
        let url = format!("{location}{separator}digest={}", digest(bytes));
        let answer = ureq::put(&url)
            .header("Content-Type", "application/octet-stream")
            .send(bytes)?;
        ensure!(answer.status() == 201, "PUT {url} answered {}", answer.status());
        Ok(())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _already_gone = self.process.kill();
        let _already_reaped = self.process.wait();
    }
}
