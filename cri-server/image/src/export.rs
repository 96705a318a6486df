//! Images out of the store, as an OCI image layout in one archive.
//!
//! Only reads files that never change, so it works beside a daemon that has the store open: what is removed meanwhile stays readable once it was opened. Every layer
//! is compared with its fs-verity digest first, and its archive is made by the confined process, for a converted layer is what a process
//! wrote that read a registry's bytes.
//!
//! ```text
//! recipe -> each layer: fs-verity digest -> confined process: archive -> digest [diff id of the config? else modes in the other form] -> blob
//!        -> config (to the byte, or with other diff ids) -> manifest -> index.json, manifest.json
//! ```

mod archive;
mod documents;

use std::{
    collections::BTreeMap,
    error::Error,
    fs::File,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use caisson_layer_converter::{protocol::ModeBits, verity};
use tokio::sync::mpsc;

use crate::{
    ImageStoreConfig,
    composition::Compositions,
    conversion::{Converters, Failure},
    digest::Digest,
    layers::{LayerRecord, Layers},
    manifest::{self, Unusable},
    reference::Reference,
    transfer::CHANNEL_CHUNKS,
};
use archive::{Archive, Descriptor};
use documents::Described;

/// An image to export, as the index has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What was asked for: a name, an id, or the beginning of one. A tag of the image's goes out alone; anything else stands for all its tags.
    pub reference: String,
    /// Digest of its config, `sha256:...`.
    pub id: String,
    /// `registry/repository:tag`
    pub repo_tags: Vec<String>,
    /// The whole config as JSON text.
    pub config: String,
}

/// An image that was exported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exported {
    /// The digest of its config in the archive.
    pub id: String,
    /// The names that it has there.
    pub names: Vec<String>,
    /// How many layers it has.
    pub layers: usize,
    /// How many of them are not what they were before they were converted: then the id is another one, too.
    pub changed: usize,
}

/// Why there is no archive.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store does not have all of the image, or its index says something else of it.
    #[error("cannot export image {image}: {reason}")]
    Image {
        /// What was asked for.
        image: String,
        /// What is missing.
        reason: String,
    },
    /// A layer is not what was written.
    #[error("cannot export image {image}: layer {layer} is damaged: {reason}")]
    Damaged {
        /// What was asked for.
        image: String,
        /// Digest of the layer as it was pulled.
        layer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The archive of a layer could not be made.
    #[error("cannot export image {image}: cannot make the archive of layer {layer}")]
    Layer {
        /// What was asked for.
        image: String,
        /// Digest of the layer as it was pulled.
        layer: String,
        /// What the file system or the confined process said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The output could not be written.
    #[error("cannot write the archive")]
    Output(#[source] io::Error),
    /// The task that did the work was stopped.
    #[error("exporting was interrupted")]
    Interrupted,
}

/// Writes images of the store that `config` describes into a file that is empty.
pub async fn export(
    config: &ImageStoreConfig,
    images: &[Wanted],
    output: File,
) -> Result<Vec<Exported>, ExportError> {
    let mut export = Export {
        layers: Arc::new(Layers::at(&config.root)),
        compositions: Arc::new(Compositions::at(&config.root)),
        converters: Converters::new(config.converter.clone(), config.max_image_bytes),
        archive: Arc::new(Mutex::new(Archive::new(output))),
        made: BTreeMap::new(),
    };
    let (mut described, mut exported) = (Vec::new(), Vec::new());
    for image in images {
        let (image, changed) = export.image(image).await?;
        exported.push(Exported {
            id: image.config.digest.to_string(),
            names: image.names.iter().map(ToString::to_string).collect(),
            layers: image.layers.len(),
            changed,
        });
        described.push(image);
    }
    let finish = move |archive: &mut Archive| {
        archive.document("oci-layout", documents::LAYOUT)?;
        archive.document("index.json", &documents::index(&described))?;
        archive.document("manifest.json", &documents::docker(&described))?;
        archive.finish()
    };
    export.write(finish).await?;
    Ok(exported)
}

struct Export {
    layers: Arc<Layers>,
    compositions: Arc<Compositions>,
    converters: Converters,
    archive: Arc<Mutex<Archive>>,
    /// What became of layers, by the layer and all that it lies on: hard links may lead there.
    made: BTreeMap<Vec<String>, Descriptor>,
}

impl Export {
    /// Adds an image; answers how many layers are not what they were as well.
    async fn image(&mut self, wanted: &Wanted) -> Result<(Described, usize), ExportError> {
        let refused = |reason: String| ExportError::Image {
            image: wanted.reference.clone(),
            reason,
        };
        let not_whole = || refused("the store does not have all of it".into());
        let (compositions, id) = (self.compositions.clone(), wanted.id.clone());
        let recipe = blocking(move || compositions.recipe(&id)).await?;
        let recipe = recipe.ok_or_else(not_whole)?;
        if Digest::of(wanted.config.as_bytes()).to_string() != wanted.id {
            return Err(refused("its config is damaged".into()));
        }
        let parsed = manifest::parse_config(wanted.config.clone().into_bytes(), recipe.layers.len());
        let (_, known) = parsed.map_err(|unusable| match unusable {
            Unusable::Garbage(reason) | Unusable::Refused(reason) | Unusable::OtherPlatform(reason) => {
                refused(reason)
            }
        })?;
        let mut opened = Vec::new();
        let mut layers = Vec::new();
        for (hex, known) in recipe.layers.iter().zip(&known) {
            let (digest, file, record) = self.open(wanted, hex).await?;
            opened.push((digest, file));
            let below = recipe.layers.iter().take(opened.len()).cloned().collect();
            layers.push(self.layer(wanted, &opened, (record, known), below).await?);
        }
        let changed = layers
            .iter()
            .zip(&known)
            .filter(|(layer, known)| layer.digest != **known)
            .count();
        let config = documents::config(&wanted.config, &known, &layers)
            .ok_or_else(|| refused("its config has no place for digests of layers".into()))?;
        let config = self.write(move |archive| archive.blob(&config)).await?;
        let manifest = documents::manifest(&config, &layers);
        let manifest = self.write(move |archive| archive.blob(&manifest)).await?;
        let described = Described {
            names: names(wanted),
            manifest,
            config,
            layers,
        };
        Ok((described, changed))
    }

    /// Opens a layer and reads every byte of it.
    async fn open(&self, wanted: &Wanted, hex: &str) -> Result<(Digest, File, LayerRecord), ExportError> {
        let layers = self.layers.clone();
        let name = match hex.len() {
            128 => format!("sha512:{hex}"),
            _ => format!("sha256:{hex}"),
        };
        let damaged = |reason: String| ExportError::Damaged {
            image: wanted.reference.clone(),
            layer: name.clone(),
            reason,
        };
        let digest = Digest::parse(&name).ok_or_else(|| damaged("its name is no digest".into()))?;
        let wanted_digest = digest.clone();
        let opened = blocking(move || {
            let record = layers
                .record(wanted_digest.hex())
                .ok_or("nothing is known of it")?;
            let file = layers.file(&wanted_digest).map_err(|error| error.chain())?;
            let (found, bytes) =
                verity::measure(&file).map_err(|error| format!("it cannot be read: {error}"))?;
            if bytes != record.bytes {
                return Err(format!("it has {bytes} bytes instead of {}", record.bytes));
            }
            if found != record.verity {
                return Err(format!(
                    "its fs-verity digest is {found} instead of {}",
                    record.verity
                ));
            }
            Ok((file, record))
        });
        let (file, record) = opened.await?.map_err(damaged)?;
        Ok((digest, file, record))
    }

    /// Adds the last of these layers, whose archive was `known` once.
    async fn layer(
        &mut self,
        wanted: &Wanted,
        opened: &[(Digest, File)],
        (record, known): (LayerRecord, &Digest),
        below: Vec<String>,
    ) -> Result<Descriptor, ExportError> {
        if let Some(made) = self.made.get(&below) {
            return Ok(made.clone());
        }
        let cap = most_bytes(record.bytes, record.entries);
        let mut made = self.make(wanted, opened, ModeBits::Permissions, cap).await?;
        // They differ in no length: with another one it was neither.
        if made.digest != *known && made.size == record.uncompressed_bytes {
            made = self.make(wanted, opened, ModeBits::FileType, cap).await?;
            if made.digest != *known {
                made = self.make(wanted, opened, ModeBits::Permissions, cap).await?;
            }
        }
        let blob = made.clone();
        self.write(move |archive| archive.keep(&blob)).await?;
        self.made.insert(below, made.clone());
        Ok(made)
    }

    /// Makes the archive of the last of these layers.
    async fn make(
        &self,
        wanted: &Wanted,
        opened: &[(Digest, File)],
        modes: ModeBits,
        cap: u64,
    ) -> Result<Descriptor, ExportError> {
        let failed = |source: Box<dyn Error + Send + Sync>| ExportError::Layer {
            image: wanted.reference.clone(),
            layer: opened
                .last()
                .map(|(digest, _)| digest.to_string())
                .unwrap_or_default(),
            source,
        };
        let (sink, mut chunks) = mpsc::channel(CHANNEL_CHUNKS);
        let (written, restored) = tokio::join!(
            self.write(move |archive| archive.stream(&mut chunks, cap)),
            self.converters.restore(opened, modes, sink)
        );
        match (written, restored) {
            (Ok(blob), Ok(_)) => Ok(blob),
            // The end of one is the end of the other: whoever ended first knows why.
            (Err(ExportError::Output(error)), _) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(failed(error.into()))
            }
            (Err(error), Ok(_) | Err(Failure::Cut)) => Err(error),
            (_, Err(failure)) => Err(failed(cause(failure))),
        }
    }

    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Archive) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ExportError> {
        let archive = self.archive.clone();
        let work = move || work(&mut archive.lock().unwrap_or_else(PoisonError::into_inner));
        blocking(work).await?.map_err(ExportError::Output)
    }
}

/// The names that an image has in the archive.
fn names(wanted: &Wanted) -> Vec<Reference> {
    let asked = Reference::parse(&wanted.reference).ok();
    let asked = asked.filter(|asked| {
        asked
            .tag_name()
            .is_some_and(|name| wanted.repo_tags.contains(&name))
    });
    let tags = || wanted.repo_tags.iter().flat_map(|tag| Reference::parse(tag));
    asked.map_or_else(|| tags().collect(), |asked| vec![asked])
}

/// More than the archive of a converted layer can have: attributes are much longer in it, every entry has blocks of its own.
fn most_bytes(converted: u64, entries: u64) -> u64 {
    let headers = entries.saturating_add(256).saturating_mul(4096);
    converted.saturating_mul(8).saturating_add(headers)
}

/// What the confined process failed of.
fn cause(failure: Failure) -> Box<dyn Error + Send + Sync> {
    match failure {
        Failure::Cut => Box::new(ExportError::Interrupted),
        Failure::Full(source) | Failure::Layer { source, .. } => source,
        Failure::Refused(reason) => reason.into(),
        Failure::Process(error) => error.into(),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ExportError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| ExportError::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_goes_out_alone_and_anything_else_stands_for_all_tags() {
        let tags = ["docker.io/library/app:v1", "r.example/app:v2"].map(str::to_owned);
        let names = |reference: &str| {
            let wanted = Wanted {
                reference: reference.to_owned(),
                id: String::new(),
                repo_tags: tags.to_vec(),
                config: String::new(),
            };
            names(&wanted).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(names("app:v1"), tags[..1]);
        assert_eq!(names("r.example/app:v2"), tags[1..]);
        for all in [
            "0a1b2c",
            &format!("sha256:{}", "0".repeat(64)),
            &format!("app@sha256:{}", "0".repeat(64)),
        ] {
            assert_eq!(names(all), tags, "{all}");
        }
    }
}
