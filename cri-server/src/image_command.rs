//! `caissond image`: lists, imports, exports and pins images.
//!
//! The store belongs to one process at a time. When a daemon runs, it does the work and this asks for it over the CRI socket; when none
//! does, the store is opened here, under the lock that a daemon would take. Files that never change are read here either way.

mod export;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::Context;
use caisson_cri_api::{
    admin::{self, images_client::ImagesClient},
    v1::{self, image_service_client::ImageServiceClient},
};
use caisson_image::{ImageError, ImageStore};
use clap::Subcommand;
use serde_json::json;
use tonic::transport::Channel;

use crate::{answer, config::Config, inquiry, socket::StateLock, status::chain};

/// Largest list that is read, as kubelet's.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// What can be done with images.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum ImageCommand {
    /// Show the images of this node
    List {
        /// Print one JSON document instead of lines for people
        #[arg(long)]
        json: bool,
    },
    /// Import images from an archive of docker save, or an OCI image layout as archive or directory
    Import {
        /// The archive or directory; - reads an archive from standard input
        path: PathBuf,
        /// Name for the image, instead of the one it was saved with; only when there is one image
        #[arg(long, value_name = "REFERENCE")]
        name: Option<String>,
        /// Keep kubelet's garbage collection from removing them
        #[arg(long)]
        pin: bool,
    },
    /// Write images into an archive of an OCI image layout, which docker load, ctr, skopeo and image import read.
    ///
    /// Layers are kept converted, so their archives are made anew: files, owners, times, attributes, links and whiteouts are those of the image, the
    /// bytes not always. What containerd and BuildKit wrote comes out as it was; otherwise the digests of these layers differ from
    /// the registry's, and with them the image's id. What is printed says so.
    Export {
        /// Names, ids or beginnings of them; a tag goes out alone, anything else with all tags of the image
        #[arg(required = true, value_name = "REFERENCE")]
        images: Vec<String>,
        /// The archive, put in place when it is whole; - writes to standard output
        file: PathBuf,
    },
    /// Read every byte of the store and compare it with its digest; exit status 0 when nothing is damaged
    Check {
        /// Delete damaged files: the images that need them are pulled again
        #[arg(long)]
        remove: bool,
    },
    /// Keep kubelet's garbage collection from removing an image
    Pin {
        /// Name, id or the beginning of one
        image: String,
    },
    /// Let garbage collection have an image again
    Unpin {
        /// Name, id or the beginning of one
        image: String,
    },
}

/// Does it; answers what is to be printed.
pub async fn run(config: &Config, command: ImageCommand) -> anyhow::Result<String> {
    let images = async || Images::open(config).await;
    match command {
        // Works on the files, whoever has the store open.
        ImageCommand::Check { remove } => check(config.images.root.clone(), remove).await,
        ImageCommand::List { json } => {
            let list = images().await?.list().await?;
            Ok(if json { as_json(&list) } else { as_text(&list) })
        }
        ImageCommand::Import { path, name, pin } => {
            let spooled = (path == Path::new("-")).then(spool).transpose()?;
            let path = match &spooled {
                Some(file) => file.path().to_owned(),
                None => std::path::absolute(&path)
                    .with_context(|| format!("cannot tell where {} is", path.display()))?,
            };
            let imported = images().await?.import(path, name, pin).await?;
            Ok(imported
                .iter()
                .map(|image| format!("{} {}\n", image.id, image.repo_tags.join(" ")))
                .collect())
        }
        ImageCommand::Export { images: wanted, file } => {
            export::export(config, &images().await?, wanted, &file).await
        }
        ImageCommand::Pin { image } => Ok(format!("{}\n", images().await?.pin(image, true).await?)),
        ImageCommand::Unpin { image } => Ok(format!("{}\n", images().await?.pin(image, false).await?)),
    }
}

/// Compares every byte with its digest. Damage is an error, so that scripts see it.
async fn check(root: PathBuf, remove: bool) -> anyhow::Result<String> {
    let examined = tokio::task::spawn_blocking(move || caisson_image::examine(&root, remove)).await?;
    let examination = examined.map_err(failed)?;
    let read = format!(
        "{} files of {} MiB read",
        examination.files,
        examination.bytes >> 20
    );
    if examination.damages.is_empty() {
        return Ok(format!("{read}, nothing is damaged\n"));
    }
    let list: Vec<_> = examination
        .damages
        .iter()
        .map(|damage| format!("\n  {}: {}", damage.file.display(), damage.reason))
        .collect();
    let done = if remove {
        "removed; the images that need them are pulled again"
    } else {
        "--remove deletes them, so that the next pull repairs the images"
    };
    anyhow::bail!("{read}; damaged ({done}):{}", list.concat())
}

/// Who does the work.
enum Images {
    Daemon(Channel),
    Here { store: ImageStore, _lock: StateLock },
}

impl Images {
    async fn open(config: &Config) -> anyhow::Result<Self> {
        if let Ok(channel) = inquiry::connect(&config.daemon.socket).await {
            return Ok(Self::Daemon(channel));
        }
        let lock = StateLock::take(&config.daemon.root).with_context(|| {
            let socket = config.daemon.socket.display();
            format!("no daemon answers on {socket}, and its store cannot be opened here")
        })?;
        let store = ImageStore::open(config.images.clone())
            .await
            .context("cannot open the image store")?;
        Ok(Self::Here { store, _lock: lock })
    }

    async fn list(&self) -> anyhow::Result<Vec<v1::Image>> {
        match self {
            Self::Daemon(channel) => {
                let mut client =
                    ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
                let answer = client.list_images(v1::ListImagesRequest::default()).await;
                Ok(answer.map_err(refused)?.into_inner().images)
            }
            Self::Here { store, .. } => {
                let images = store.list().await.map_err(failed)?;
                Ok(images.into_iter().map(answer::image).collect())
            }
        }
    }

    async fn import(
        &self,
        path: PathBuf,
        name: Option<String>,
        pin: bool,
    ) -> anyhow::Result<Vec<admin::ImportedImage>> {
        match self {
            Self::Daemon(channel) => {
                let path = path.into_os_string().into_string();
                let path = path.map_err(|path| anyhow::anyhow!("the path {path:?} is not UTF-8"))?;
                let request = admin::ImportRequest {
                    path,
                    name: name.unwrap_or_default(),
                    pin,
                };
                let answer = ImagesClient::new(channel.clone()).import(request).await;
                Ok(answer.map_err(refused)?.into_inner().images)
            }
            Self::Here { store, .. } => {
                let images = store.import(&path, name.as_deref(), pin).await.map_err(failed)?;
                let images = images.into_iter().map(|image| admin::ImportedImage {
                    id: image.id,
                    repo_tags: image.repo_tags,
                    size_bytes: image.size_bytes,
                });
                Ok(images.collect())
            }
        }
    }

    /// What an export has to know of an image.
    async fn describe(&self, image: String) -> anyhow::Result<admin::DescribeResponse> {
        match self {
            Self::Daemon(channel) => {
                let mut client =
                    ImagesClient::new(channel.clone()).max_decoding_message_size(MAX_ANSWER_BYTES);
                let answer = client.describe(admin::DescribeRequest { image }).await;
                Ok(answer.map_err(refused)?.into_inner())
            }
            Self::Here { store, .. } => match store.get(&image).await.map_err(failed)? {
                Some(found) => Ok(admin::DescribeResponse {
                    id: found.id,
                    repo_tags: found.repo_tags,
                    config: found.config.raw,
                }),
                None => Err(absent(&image)),
            },
        }
    }

    async fn pin(&self, image: String, pinned: bool) -> anyhow::Result<String> {
        match self {
            Self::Daemon(channel) => {
                let request = admin::PinRequest { image, pinned };
                let answer = ImagesClient::new(channel.clone()).pin(request).await;
                Ok(answer.map_err(refused)?.into_inner().id)
            }
            Self::Here { store, .. } => match store.pin(&image, pinned).await.map_err(failed)? {
                Some(image) => Ok(image.id),
                None => Err(absent(&image)),
            },
        }
    }
}

/// The daemon's words alone: its code means nothing to a person.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{}", status.message())
}

fn absent(image: &str) -> anyhow::Error {
    anyhow::anyhow!("image {image:?} is not in the store")
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn failed(error: ImageError) -> anyhow::Error {
    anyhow::anyhow!("{}", chain(&error))
}

/// Standard input as a file: an archive's parts are not in the order in which they are needed.
fn spool() -> anyhow::Result<tempfile::NamedTempFile> {
    let spooling = || -> io::Result<_> {
        let mut file = tempfile::NamedTempFile::new()?;
        io::copy(&mut io::stdin().lock(), &mut file)?;
        file.flush()?;
        Ok(file)
    };
    spooling().context("cannot keep what comes on standard input in a temporary file")
}

fn as_text(images: &[v1::Image]) -> String {
    let mut text = String::new();
    for image in images {
        let digits = image.id.strip_prefix("sha256:").unwrap_or(&image.id);
        let short = digits.get(..12).unwrap_or(digits);
        let (mib, tenths) = (image.size >> 20, ((image.size & 0xf_ffff) * 10) >> 20);
        let pinned = if image.pinned { "pinned" } else { "" };
        let names: &[String] = if image.repo_tags.is_empty() {
            &image.repo_digests
        } else {
            &image.repo_tags
        };
        text.push_str(&format!(
            "{short}  {mib:>6}.{tenths} MiB  {pinned:6}  {}\n",
            names.join(" ")
        ));
    }
    text
}

fn as_json(images: &[v1::Image]) -> String {
    let images: Vec<_> = images
        .iter()
        .map(|image| {
            json!({
                "id": image.id,
                "repoTags": image.repo_tags,
                "repoDigests": image.repo_digests,
                "sizeBytes": image.size,
                "pinned": image.pinned,
            })
        })
        .collect();
    format!("{:#}\n", json!({ "images": images }))
}
