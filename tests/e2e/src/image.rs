//! Test images, made from Debian's packages: a tree of files becomes layers, a config and a manifest.
//!
//! Deterministic: the same packages give the same digests.

use std::{
    fs,
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{cache, host::text};

/// A layer as a registry holds it.
#[derive(Debug, Clone)]
pub struct Blob {
    /// `sha256:...` of `bytes`.
    pub digest: String,
    /// `sha256:...` of the uncompressed tar.
    pub diff_id: String,
    /// Content.
    pub bytes: Vec<u8>,
}

/// An image: layers and a config.
#[derive(Debug, Clone)]
pub struct Image {
    /// Bottom first.
    pub layers: Vec<Blob>,
    /// OCI image config.
    pub config: Value,
}

/// A tar of a layer in the making.
pub struct Layer {
    tar: tar::Builder<Vec<u8>>,
}

/// `sha256:...`
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            tar: tar::Builder::new(Vec::new()),
        }
    }
}

impl Layer {
    fn header(kind: tar::EntryType, mode: u32, size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(0);
        header.set_uid(0);
        header.set_gid(0);
        header
    }

    /// Adds a file.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Result<Self> {
        let mut header = Self::header(tar::EntryType::Regular, mode, content.len() as u64);
        self.tar.append_data(&mut header, path, content)?;
        Ok(self)
    }

    /// Adds a directory.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let mut header = Self::header(tar::EntryType::Directory, mode, 0);
        self.tar.append_data(&mut header, path, std::io::empty())?;
        Ok(self)
    }

    /// Adds a symbolic link.
    pub fn symlink(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = Self::header(tar::EntryType::Symlink, 0o777, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds another name of a file that is in the layer.
    pub fn hard_link(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = Self::header(tar::EntryType::Link, 0o755, 0);
        self.tar.append_link(&mut header, path, target)?;
        Ok(self)
    }

    /// Adds an entry with any name and link, as an attacker would: nothing is normalized.
    pub fn raw(
        mut self,
        kind: tar::EntryType,
        path: &str,
        link: Option<&str>,
        content: &[u8],
    ) -> Result<Self> {
        let mut header = Self::header(kind, 0o644, content.len() as u64);
        let copy = |field: &mut [u8], text: &str| {
            for (to, from) in field.iter_mut().zip(text.bytes()) {
                *to = from;
            }
        };
        copy(&mut header.as_old_mut().name, path);
        if let Some(link) = link {
            copy(&mut header.as_old_mut().linkname, link);
        }
        header.set_cksum();
        self.tar.append(&header, content)?;
        Ok(self)
    }

    /// Adds every file of a Debian package that `wanted` accepts; paths have no leading slash or dot.
    pub fn package(mut self, deb: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let output = Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb).output()?;
        anyhow::ensure!(output.status.success(), "dpkg-deb cannot read {}", deb.display());
        let mut package = tar::Archive::new(output.stdout.as_slice());
        for entry in package.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.display().to_string();
            let path = path.trim_start_matches("./").trim_end_matches('/').to_owned();
            if path.is_empty() || !wanted(&path) {
                continue;
            }
            let mut header = Self::header(
                entry.header().entry_type(),
                entry.header().mode()?,
                entry.header().size()?,
            );
            if let Some(link) = entry.link_name()? {
                header.set_size(0);
                self.tar.append_link(&mut header, &path, link)?;
            } else {
                let mut content = Vec::new();
                entry.read_to_end(&mut content)?;
                self.tar.append_data(&mut header, &path, content.as_slice())?;
            }
        }
        Ok(self)
    }

    /// The finished layer, gzip-compressed.
    pub fn gzip(self) -> Result<Blob> {
        let tar = self.tar.into_inner()?;
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&tar)?;
        let bytes = gzip.finish()?;
        Ok(Blob {
            digest: digest(&bytes),
            diff_id: digest(&tar),
            bytes,
        })
    }
}

impl Image {
    /// An image of these layers; `config` is the `config` member of the OCI image configuration.
    #[must_use]
    pub fn new(layers: Vec<Blob>, config: &Value) -> Self {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
            "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        Self { layers, config }
    }
}

/// Debian's packages of this name, downloaded once into the cache directory.
pub fn debian_package(name: &str) -> Result<PathBuf> {
    let dir = cache().join("debs").join(name);
    let held = || -> Option<PathBuf> {
        fs::read_dir(&dir)
            .ok()?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|e| e == "deb"))
    };
    if let Some(found) = held() {
        return Ok(found);
    }
    fs::create_dir_all(&dir)?;
    text(Command::new("apt-get").current_dir(&dir).args([
        "-qq",
        "-o",
        "APT::Sandbox::User=root",
        "download",
        name,
    ]))
    .with_context(|| format!("cannot download Debian's {name} (apt-get update first?)"))?;
    held().with_context(|| format!("apt-get downloaded no package {name}"))
}

/// Downloads what the images here are made of, while there is a network.
pub fn fetch_packages() -> Result<()> {
    for name in ["busybox", "libc6"]
        .iter()
        .chain(&NETWORK_PACKAGES)
        .chain(&crate::critest_images::NGINX_PACKAGES)
    {
        debian_package(name)?;
    }
    Ok(())
}

/// iptables, ip and tc, with the libraries that they need.
const NETWORK_PACKAGES: [&str; 13] = [
    "iptables",
    "iproute2",
    "libip4tc2",
    "libip6tc2",
    "libxtables12",
    "libnftnl11",
    "libmnl0",
    "libbpf1",
    "libelf1",
    "libcap2",
    "libbsd0",
    "libmd0",
    "zlib1g",
];

/// A layer with iptables (legacy and nft), ip and tc.
pub fn network_layer() -> Result<Blob> {
    let mut layer = Layer::default();
    for name in NETWORK_PACKAGES {
        layer = layer.package(&debian_package(name)?, |path| {
            path.contains(".so") || path.contains("bin/")
        })?;
    }
    layer.gzip()
}

/// Base layer: Debian's busybox with all its applets, libc6's libraries, three users.
pub fn busybox_layer() -> Result<Blob> {
    let busybox = debian_package("busybox")?;
    let libraries = ["ld-linux-x86-64.so.2", "libc.so.6", "libresolv.so.2", "libm.so.6"];
    let mut layer = Layer::default();
    for dir in [
        "bin", "dev", "etc", "home", "lib", "proc", "root", "run", "sys", "usr", "usr/bin", "usr/sbin",
        "var", "var/log",
    ] {
        layer = layer.directory(dir, 0o755)?;
    }
    layer = layer
        .directory("tmp", 0o1777)?
        .file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/sh\n")?
        .file("etc/group", 0o644, b"root:x:0:\naudio:x:29:www-data\nwww-data:x:33:\nnogroup:x:65534:\n")?
        .package(&debian_package("libc6")?, |path| {
            path.starts_with("lib64") || libraries.iter().any(|name| path == format!("lib/x86_64-linux-gnu/{name}"))
        })?
        .package(&busybox, |path| path == "bin/busybox")?;
    for applet in applets(&busybox)? {
        layer = layer.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    layer.gzip()
}

/// What this busybox can be called as.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>> {
    let dir = tempfile::tempdir()?;
    text(Command::new("dpkg-deb").arg("-x").arg(busybox).arg(dir.path()))?;
    let names = text(Command::new(dir.path().join("bin/busybox")).arg("--list"))?;
    Ok(names
        .lines()
        .filter(|name| *name != "busybox" && !name.contains('/'))
        .map(String::from)
        .collect())
}

/// The image that most tests run: two layers, `sh` by default, a web page in /www.
pub fn busybox() -> Result<Image> {
    let page = Layer::default()
        .directory("www", 0o755)?
        .file("www/index.html", 0o644, b"<h1>hello from a microVM</h1>\n")?
        .gzip()?;
    Ok(Image::new(
        vec![busybox_layer()?, page],
        &json!({ "Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin"] }),
    ))
}
