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

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

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
        let config = serde_json::to_vec(&image.config)?;
        self.push_blob(name, &config)?;
        for layer in &image.layers {
            self.push_blob(name, &layer.bytes)?;
        }
        let layers: Vec<_> = image
            .layers
            .iter()
            .map(|layer| json!({ "mediaType": LAYER, "digest": layer.digest, "size": layer.bytes.len() }))
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST,
            "config": { "mediaType": CONFIG, "digest": digest(&config), "size": config.len() },
            "layers": layers,
        });
        let url = format!("http://{}/v2/{name}/manifests/{tag}", self.address);
        let answer = ureq::put(&url)
            .header("Content-Type", MANIFEST)
            .send(serde_json::to_vec(&manifest)?.as_slice())?;
        ensure!(answer.status() == 201, "PUT {url} answered {}", answer.status());
        Ok(self.reference(&format!("{name}:{tag}")))
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
