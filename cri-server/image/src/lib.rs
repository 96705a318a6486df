//! Images: from a registry to one read-only disk each, of layers that images share.
//!
//! Owns the registry client, the image store and its index, conversion and garbage collection. Must not know CRI types, pods or VMs:
//! it is told which images are in use. The content of an image is never mounted or unpacked on the host.
//!
//! ```text
//! reference -> manifest -> [known? only names] -> each layer: [known?] download -> digest -> confined process: decompress -> EROFS -> file
//!           -> confined process: compose metadata -> file -> index
//! ```
//!
//! Everything that a registry sends is hostile until its digest is checked: sizes and counts have caps, every wait ends, and what is refused
//! leaves nothing behind.

mod auth_files;
mod composition;
mod conversion;
mod digest;
mod error;
mod examination;
mod export;
mod flights;
mod hosts;
mod index;
mod layering;
mod layers;
mod layout;
mod manifest;
mod pull;
mod reference;
mod registry;
mod signature;
mod store;
mod transfer;
mod verification;

use std::{fmt, path::PathBuf, sync::Arc, time::SystemTime};

pub use error::{ErrorKind, ImageError, RegistryError};
pub use examination::{Damage, Examination, examine};
pub use export::{ExportError, Exported, Wanted, export};
pub use signature::{SignatureRule, SignatureRules};

use crate::{
    conversion::Converters,
    flights::{Flights, KeyedLocks},
    layout::Layout,
    pull::{Puller, blocking},
    reference::Reference,
    registry::Transport,
    signature::Policy,
    store::Store,
};

/// Where things are and how registries are reached, decided by the composition root.
#[derive(Debug, Clone)]
pub struct ImageStoreConfig {
    /// Directory of the store, made when absent.
    pub root: PathBuf,
    /// Registries (`host:port`) that are spoken to over plain HTTP. Loopback addresses and `localhost` always are, as with Docker.
    pub insecure_registries: Vec<String>,
    /// registry host -> mirrors, tried in order before the registry itself. A pull's credentials never go to a mirror. A mirror is `host[:port]`, or
    /// `http://` or `https://` with that.
    pub mirrors: std::collections::BTreeMap<String, Vec<String>>,
    /// Directories with a `hosts.toml` or certificates for each registry, as containerd's `config_path`. Read at each pull.
    pub hosts_dirs: Vec<PathBuf>,
    /// `config.json` of Docker or `auth.json` of containers-auth(5), for pulls that bring no credentials. Read at each of them.
    pub auth_files: Vec<PathBuf>,
    /// Which images must be signed, by whom. Keys are read once, when the store is opened.
    pub signatures: SignatureRules,
    /// More PEM files with certificate authorities. Read once, when the store is opened.
    pub ca_files: Vec<PathBuf>,
    /// Largest uncompressed image in bytes: all layers together, and the disk they become.
    pub max_image_bytes: u64,
    /// The program that reads layers, confined: `caisson-layer-converter`.
    pub converter: PathBuf,
    /// A transfer without progress for this long is broken off.
    pub stall_deadline: std::time::Duration,
}

/// Credentials of one pull.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub enum Credentials {
    /// None.
    #[default]
    Anonymous,
    /// User and password.
    Basic {
        /// User.
        username: String,
        /// Password.
        password: String,
    },
    /// A token for the registry itself.
    Bearer(String),
    /// An OAuth2 refresh token, exchanged for a bearer token.
    IdentityToken(String),
}

/// Names the kind and the user, never a secret.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { username, .. } => f
                .debug_struct("Basic")
                .field("username", username)
                .finish_non_exhaustive(),
            Self::Bearer(_) => f.write_str("Bearer(..)"),
            Self::IdentityToken(_) => f.write_str("IdentityToken(..)"),
        }
    }
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Digest of its config, `sha256:...`: the one value that names it everywhere.
    pub id: String,
    /// `registry/repository:tag`, sorted.
    pub repo_tags: Vec<String>,
    /// `registry/repository@sha256:...` of the manifest (or index) it was pulled by, sorted.
    pub repo_digests: Vec<String>,
    /// Bytes on the host's disk, layers that other images share included.
    pub size_bytes: u64,
    /// Never removed by garbage collection.
    pub pinned: bool,
    /// What its config says about running it.
    pub config: ImageConfig,
    /// The files of its disk, which are an EROFS file system one behind the other: metadata, then layers, which other images may share.
    pub disk: Vec<PathBuf>,
    /// When it was pulled.
    pub pulled_at: SystemTime,
}

/// The part of an OCI image config that matters for running it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ImageConfig {
    /// User, as in the config: empty, name, number, each with an optional group.
    pub user: String,
    /// NAME=value
    pub env: Vec<String>,
    /// Entrypoint.
    pub entrypoint: Vec<String>,
    /// Cmd.
    pub cmd: Vec<String>,
    /// WorkingDir.
    pub working_dir: String,
    /// Volumes, sorted.
    pub volumes: Vec<String>,
    /// StopSignal as text; empty when unset.
    pub stop_signal: String,
    /// Labels.
    pub labels: std::collections::BTreeMap<String, String>,
    /// The whole config as JSON text, for verbose status.
    pub raw: String,
}

/// What the store takes of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes.
    pub used_bytes: u64,
    /// Inodes.
    pub inodes_used: u64,
}

/// What everybody who waited for one pull gets.
type Pulled = Result<Image, Arc<ImageError>>;

/// The images of this node. Cheap to clone.
#[derive(Clone)]
pub struct ImageStore {
    puller: Puller,
    flights: Arc<Flights<(Reference, Credentials), Pulled>>,
}

impl fmt::Debug for ImageStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageStore")
            .field("root", &self.root())
            .finish_non_exhaustive()
    }
}

impl ImageStore {
    /// Opens or makes the store, and sweeps what a crash left half done. One process can have it open.
    pub async fn open(config: ImageStoreConfig) -> Result<Self, ImageError> {
        let config = Arc::new(config);
        let opening = config.clone();
        let opened = tokio::task::spawn_blocking(move || {
            let policy = Policy::new(&opening.signatures)?;
            let transport = Transport::new(opening.clone())?;
            Ok((policy, transport, Store::open(&opening.root)?))
        });
        let (policy, transport, store) = opened
            .await
            .map_err(|_| ImageError::Interrupted("opening the store"))??;
        let conversions = Arc::new(KeyedLocks::new());
        let converters = Converters::new(config.converter.clone(), config.max_image_bytes);
        let puller = Puller {
            converters,
            config,
            transport,
            policy: Arc::new(policy),
            store: Arc::new(store),
            conversions,
        };
        Ok(Self {
            puller,
            flights: Arc::new(Flights::new()),
        })
    }

    /// Pulls by tag or digest and answers the image. Concurrent pulls of one reference with the same credentials are one; it ends early
    /// when nobody waits for it any more.
    pub async fn pull(&self, reference: &str, credentials: Credentials) -> Result<Image, ImageError> {
        let reference = Reference::parse(reference)?;
        let key = (reference.clone(), credentials.clone());
        let puller = self.puller.clone();
        let work = || async move { puller.pull(reference, credentials).await.map_err(Arc::new) };
        match self.flights.join(key, work).await {
            Some(Ok(image)) => Ok(image),
            Some(Err(error)) => Err(ImageError::Joined(error)),
            None => Err(ImageError::Interrupted("a pull")),
        }
    }

    /// Imports the images of an OCI image layout (directory or archive) or an archive of `docker save`: all under the names that it has for
    /// them, or the only one under `name`. With `pin`, garbage collection leaves them. What was imported before an error stays.
    pub async fn import(
        &self,
        path: &std::path::Path,
        name: Option<&str>,
        pin: bool,
    ) -> Result<Vec<Image>, ImageError> {
        let (path, temporary) = (path.to_owned(), self.root().join("tmp"));
        let max_bytes = self.puller.config.max_image_bytes;
        let opening = tokio::task::spawn_blocking(move || Layout::open(&path, &temporary, max_bytes));
        let layout = opening
            .await
            .map_err(|_| ImageError::Interrupted("opening an archive"))??;
        let mut images = Vec::new();
        for offer in layout.offers(name)? {
            let mut image = self.puller.clone().import(offer).await?;
            if pin {
                image = self.pin(&image.id, true).await?.unwrap_or(image);
            }
            images.push(image);
        }
        Ok(images)
    }

    /// Pins the image that `reference` names, or takes the pin off: kubelet's garbage collection leaves pinned images. Unknown: nothing.
    pub async fn pin(&self, reference: &str, pinned: bool) -> Result<Option<Image>, ImageError> {
        let reference = reference.to_owned();
        blocking(&self.puller.store, "pinning an image", move |store| {
            match store.find(&reference)? {
                Some(image) => store.pin(&image.id, pinned),
                None => Ok(None),
            }
        })
        .await
    }

    /// Finds by id, unique id prefix, tag or digest reference. Familiar names are completed (`busybox` -> `docker.io/library/busybox:latest`).
    /// An image of which a file is gone or cut is forgotten and not found: a pull repairs it.
    pub async fn get(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let Some(image) = self.puller.store.find(reference)? else {
            return Ok(None);
        };
        blocking(&self.puller.store, "looking at an image's files", move |store| {
            Ok(store.is_whole(&image)?.then_some(image))
        })
        .await
    }

    /// Every image, by id.
    #[expect(
        clippy::unused_async,
        reason = "callers must not depend on the list being in memory"
    )]
    pub async fn list(&self) -> Result<Vec<Image>, ImageError> {
        Ok(self.puller.store.images().values().cloned().collect())
    }

    /// Removes the image that `reference` names, with all its tags and digests. Unknown: Ok. The files of an image in `in_use`
    /// stay until the next [`ImageStore::collect`] without it.
    pub async fn remove(&self, reference: &str, in_use: &[String]) -> Result<(), ImageError> {
        let Some(image) = self.puller.store.find(reference)? else {
            return Ok(());
        };
        let in_use = in_use.to_vec();
        blocking(&self.puller.store, "removing an image", move |store| {
            store.remove(&image.id, &in_use)
        })
        .await
    }

    /// Deletes files that no image and no id in `in_use` needs.
    pub async fn collect(&self, in_use: &[String]) -> Result<(), ImageError> {
        let in_use = in_use.to_vec();
        blocking(&self.puller.store, "collecting files", move |store| {
            store.collect(&in_use)
        })
        .await
    }

    /// What the store takes.
    pub async fn usage(&self) -> Result<Usage, ImageError> {
        blocking(&self.puller.store, "counting files", Store::usage).await
    }

    /// Where it is.
    #[must_use]
    pub fn root(&self) -> &std::path::Path {
        self.puller.store.root()
    }
}
