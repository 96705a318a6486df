//! One pull from reference to listed image: resolve, verify, convert, list.
//!
//! The registry is asked even when the image is here: a tag may have moved, and the credentials must be good for it. Layers are fetched
//! only when the content is not in the store.

use std::{sync::Arc, time::SystemTime};

use crate::{
    Credentials, ErrorKind, Image, ImageError, ImageStoreConfig, RegistryError,
    conversion::{self, Converters, Layer},
    flights::KeyedLocks,
    layout::Offer,
    manifest::{self, Document, Manifest, Unusable},
    reference::Reference,
    registry::{Endpoint, Fetched, Sources, Transport},
    signature::Policy,
    store::{Names, Store},
    verification,
};

/// What pulls work with.
#[derive(Clone)]
pub(crate) struct Puller {
    pub(crate) config: Arc<ImageStoreConfig>,
    pub(crate) transport: Transport,
    /// Who must have signed what.
    pub(crate) policy: Arc<Policy>,
    pub(crate) store: Arc<Store>,
    pub(crate) converters: Converters,
    /// By registry, and image id or layer digest: two references to one image, and two images with one layer, convert it once. Only within a
    /// registry, so that one which is slow on purpose does not hold up what is also elsewhere.
    pub(crate) conversions: Arc<KeyedLocks<(String, String)>>,
}

impl Puller {
    /// Pulls `reference` and answers the listed image.
    pub(crate) async fn pull(
        self,
        reference: Reference,
        credentials: Credentials,
    ) -> Result<Image, ImageError> {
        verification::admit(&self.policy, &reference)?;
        let remotes = self.transport.endpoints(&reference, &credentials).await?;
        let endpoints = remotes.into_iter().map(Box::new).map(Endpoint::Remote).collect();
        self.pull_from(reference, endpoints).await
    }

    /// Takes an image that lies on this host, with the same checks.
    pub(crate) async fn import(self, offer: Offer) -> Result<Image, ImageError> {
        verification::admit(&self.policy, &offer.reference)?;
        self.pull_from(offer.reference, vec![Endpoint::Imported(offer.endpoint)])
            .await
    }

    async fn pull_from(self, reference: Reference, endpoints: Vec<Endpoint>) -> Result<Image, ImageError> {
        let began = SystemTime::now();
        let mut pull = Pull {
            sources: Sources::new(endpoints, &reference),
            puller: self,
            reference,
        };
        let (manifest, names) = pull.resolve().await?;
        let id = manifest.config.digest.to_string();
        let _alone = pull
            .puller
            .conversions
            .lock(&(pull.reference.registry().to_owned(), id.clone()))
            .await;
        let (named, wanted) = (id.clone(), names.clone());
        let known = pull
            .blocking("naming an image", move |store| store.name(&named, &wanted))
            .await?;
        let fetched = known.is_none();
        let image = match known {
            Some(image) => image,
            None => pull.fetch(id, &manifest, names).await?,
        };
        let seconds = began.elapsed().unwrap_or_default().as_secs_f32();
        tracing::info!(
            image.id, reference = %pull.reference, image.size_bytes, layers = manifest.layers.len(), fetched, seconds,
            "image.pulled"
        );
        Ok(image)
    }
}

pub(crate) struct Pull {
    pub(crate) puller: Puller,
    pub(crate) reference: Reference,
    pub(crate) sources: Sources,
}

impl Pull {
    /// From tag or digest to the manifest for this platform.
    async fn resolve(&mut self) -> Result<(Manifest, Names), ImageError> {
        let version = self.reference.version();
        let top = self.document(&version).await?;
        let names = Names {
            tag: self.reference.tag_name(),
            digest: self.reference.digest_name(&top.digest),
        };
        verification::verify(&self.puller.policy, &self.sources, &self.reference, &top.digest).await?;
        let document = self.parse(&version, &top)?;
        let chosen = match document {
            Document::Image(manifest) => return Ok((manifest, names)),
            Document::Index(chosen) => chosen,
        };
        let version = chosen.digest.to_string();
        let fetched = self.document(&version).await?;
        if fetched.bytes.len() as u64 != chosen.size {
            let found = fetched.bytes.len();
            return Err(self.refused(format!(
                "manifest {version} has {found} bytes, the index says {}",
                chosen.size
            )));
        }
        match self.parse(&version, &fetched)? {
            Document::Image(manifest) => Ok((manifest, names)),
            Document::Index(_) => Err(self.refused("an index inside an index is not supported".into())),
        }
    }

    async fn document(&mut self, version: &str) -> Result<Fetched, ImageError> {
        let fetched = self.sources.manifest(version).await;
        fetched.map_err(|error| self.registry_error(error))
    }

    fn parse(&self, version: &str, fetched: &Fetched) -> Result<Document, ImageError> {
        manifest::parse(&fetched.bytes, &fetched.content_type)
            .map_err(|unusable| self.unusable(&format!("manifest {version}"), unusable))
    }

    /// Gets what is missing, and lists the image.
    async fn fetch(&self, id: String, manifest: &Manifest, names: Names) -> Result<Image, ImageError> {
        self.check_sizes(manifest)?;
        let config = self
            .sources
            .small_blob(&manifest.config.digest, manifest.config.size)
            .await;
        let config = config.map_err(|error| self.registry_error(error))?;
        let (config, diff_ids) = manifest::parse_config(config, manifest.layers.len())
            .map_err(|unusable| self.unusable("config", unusable))?;
        let layers = manifest.layers.iter().cloned().zip(diff_ids);
        let layers: Vec<_> = layers.map(|(blob, diff_id)| Layer { blob, diff_id }).collect();
        // Held until the image is listed, and with it the layers are needed.
        let held = self.hold(&layers);
        let composed = match self.content(&id).await? {
            // Left by an image that was removed while in use, or by a crash before it was listed.
            true => None,
            false => match self.compose(&layers).await {
                Ok(composed) => Some(composed),
                Err(error) => {
                    // Of an image that is refused no layer stays, the good ones neither.
                    drop(held);
                    self.blocking("collecting layers", |store| store.collect_layers())
                        .await?;
                    return Err(error);
                }
            },
        };
        let image = Image {
            id,
            repo_tags: Vec::new(),
            repo_digests: Vec::new(),
            // Both are the store's to say.
            disk: Vec::new(),
            size_bytes: 0,
            pinned: false,
            config,
            pulled_at: SystemTime::now(),
        };
        // Runs to its end even when nobody waits any more: either the image is complete, or there is none.
        self.blocking("listing an image", move |store| {
            let listed = store.add(image, &names, composed);
            drop(held);
            listed
        })
        .await
    }

    /// Compressed content that is larger than an image may be is not worth a download.
    fn check_sizes(&self, manifest: &Manifest) -> Result<(), ImageError> {
        let max = self.puller.config.max_image_bytes;
        let sum = manifest
            .layers
            .iter()
            .try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        match sum {
            Some(sum) if sum <= max => Ok(()),
            _ => Err(self.refused(format!("its layers are larger than {max} bytes"))),
        }
    }

    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        what: &'static str,
        work: impl FnOnce(&Store) -> Result<T, ImageError> + Send + 'static,
    ) -> Result<T, ImageError> {
        blocking(&self.puller.store, what, work).await
    }

    pub(crate) fn refused(&self, reason: String) -> ImageError {
        ImageError::Content {
            image: self.reference.to_string(),
            reason,
        }
    }

    pub(crate) fn registry_error(&self, source: RegistryError) -> ImageError {
        ImageError::Registry {
            image: self.reference.to_string(),
            source,
        }
    }

    fn unusable(&self, what: &str, unusable: Unusable) -> ImageError {
        let from = || format!("{what} of {}", self.reference);
        match unusable {
            Unusable::Refused(reason) => self.refused(reason),
            Unusable::Garbage(reason) => {
                self.registry_error(RegistryError::new(ErrorKind::Unavailable, from(), reason))
            }
            Unusable::OtherPlatform(reason) => {
                self.registry_error(RegistryError::new(ErrorKind::NotFound, from(), reason))
            }
        }
    }

    pub(crate) fn conversion_error(&self, failure: conversion::Failure) -> ImageError {
        let path = self.puller.store.root().to_owned();
        match failure {
            conversion::Failure::Cut => ImageError::Interrupted("a download"),
            conversion::Failure::Full(source) => ImageError::Exhausted { path, source },
            conversion::Failure::Refused(reason) => self.refused(reason),
            conversion::Failure::Layer {
                digest,
                hostile,
                source,
            } => ImageError::Layer {
                image: self.reference.to_string(),
                layer: digest.to_string(),
                hostile,
                source,
            },
            conversion::Failure::Process(source) => ImageError::Converter(source),
        }
    }
}

/// Runs `work` on a blocking thread.
pub(crate) async fn blocking<T: Send + 'static>(
    store: &Arc<Store>,
    what: &'static str,
    work: impl FnOnce(&Store) -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    let store = store.clone();
    tokio::task::spawn_blocking(move || work(&store))
        .await
        .map_err(|_| ImageError::Interrupted(what))?
}
