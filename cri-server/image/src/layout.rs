//! Images that come from this host: an OCI image layout (directory or archive) or an archive of `docker save`.
//!
//! Nothing is unpacked: blobs are read where they lie, inside the archive. What is found is offered in the form of a registry, so that an
//! import goes through the same checks, digests and conversion as a pull. An archive is as hostile as a registry.
//!
//! Implements the image layout of the OCI image specification 1.1 and the `manifest.json` of Docker's archives.

mod container;
mod docker;

use std::{collections::BTreeMap, fmt, path::Path, sync::Arc};

use serde::Deserialize;

use container::Container;
pub(crate) use container::Section;

use crate::{
    ErrorKind, ImageError, RegistryError,
    digest::Digest,
    manifest::{ARCHITECTURE, MAX_MANIFEST_BYTES, OS},
    reference::Reference,
    registry::{BlobStream, Document},
};

/// Most images and signatures of one archive.
const MAX_ENTRIES: usize = 4096;

/// A layout that was opened: what it names, and where its blobs are.
pub(crate) struct Layout {
    source: String,
    container: Container,
    /// Blobs whose name in the archive is not their digest.
    named: BTreeMap<Digest, String>,
    /// Documents that the archive does not have and that were made of what it has.
    made: BTreeMap<Digest, (Vec<u8>, String)>,
    entries: Vec<Entry>,
}

/// One image or signature of a layout.
#[derive(Debug, Clone)]
struct Entry {
    /// As the archive writes it; a whole reference or only a tag.
    name: Option<String>,
    digest: Digest,
    media_type: String,
}

/// One image of a layout in the form of a place that content comes from.
#[derive(Clone)]
pub(crate) struct Imported {
    layout: Arc<Layout>,
    /// What the reference's tag or digest is here.
    version: String,
    target: Digest,
}

/// An image to import, under the name that it gets.
pub(crate) struct Offer {
    pub(crate) reference: Reference,
    pub(crate) endpoint: Imported,
}

#[derive(Deserialize)]
struct RawIndex {
    manifests: Vec<RawEntry>,
}

#[derive(Deserialize)]
struct RawEntry {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    annotations: Option<BTreeMap<String, String>>,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

/// The name of an entry as containerd, and so Docker, writes it: a whole reference.
pub(crate) const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// ... and as the specification has it: what the tool was told, a tag or a reference.
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";

impl Layout {
    /// Opens what is at `path`; a compressed archive is decompressed into `temporary`, into at most `max_bytes`.
    pub(crate) fn open(path: &Path, temporary: &Path, max_bytes: u64) -> Result<Self, ImageError> {
        let source = path.display().to_string();
        let refused = |reason: String| ImageError::Content {
            image: source.clone(),
            reason,
        };
        let container = Container::open(path, temporary, max_bytes)?;
        let mut layout = Self {
            source: source.clone(),
            container,
            named: BTreeMap::new(),
            made: BTreeMap::new(),
            entries: Vec::new(),
        };
        // Docker writes both files; the index says more.
        if let Some(index) = layout.read("index.json", MAX_MANIFEST_BYTES)? {
            layout.entries = entries(&index).map_err(refused)?;
        } else if layout.container.is_archive()
            && let Some(manifest) = layout.read("manifest.json", MAX_MANIFEST_BYTES)?
        {
            docker::describe(&mut layout, &manifest)?;
        } else {
            return Err(refused(
                "it holds neither index.json (an OCI layout) nor manifest.json (an archive of docker save)"
                    .into(),
            ));
        }
        Ok(layout)
    }

    /// The images to import: all that the archive names, or the only one under `name`.
    pub(crate) fn offers(self, name: Option<&str>) -> Result<Vec<Offer>, ImageError> {
        let refused = |reason: &str| ImageError::Content {
            image: self.source.clone(),
            reason: reason.into(),
        };
        let mut wanted: Vec<(Reference, Digest)> = Vec::new();
        match name {
            Some(name) => {
                let mut images: Vec<_> = self.images().map(|image| image.digest.clone()).collect();
                images.dedup();
                let reference = Reference::parse(name)?;
                let [image] = images.as_slice() else {
                    return Err(refused("a name can be given to an archive of one image only"));
                };
                wanted.push((reference, image.clone()));
            }
            None => {
                for image in self.images() {
                    let Some(name) = image.name.as_deref().filter(|name| is_whole(name)) else {
                        continue;
                    };
                    wanted.push((Reference::parse(name)?, image.digest.clone()));
                }
                if wanted.is_empty() {
                    return Err(refused("it does not say what its image is called: give a name"));
                }
            }
        }
        let layout = Arc::new(self);
        let offers = wanted.into_iter().map(|(reference, target)| Offer {
            endpoint: Imported {
                layout: layout.clone(),
                version: reference.version(),
                target,
            },
            reference,
        });
        Ok(offers.collect())
    }

    /// Entries that are images and not signatures of some.
    fn images(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter().filter(|entry| {
            !entry
                .name
                .as_deref()
                .is_some_and(|name| crate::signature::is_signature_tag(last_part(name)))
        })
    }

    fn read(&self, name: &str, cap: u64) -> Result<Option<Vec<u8>>, ImageError> {
        let read = |section: Section| section.read_all(cap);
        let found = self.container.find(name);
        found
            .and_then(|found| found.map(read).transpose())
            .map_err(|source| ImageError::Io {
                doing: "read",
                path: format!("{}: {name}", self.source).into(),
                source,
            })
    }

    fn blob(&self, digest: &Digest) -> std::io::Result<Option<Section>> {
        match self.named.get(digest) {
            Some(name) => self.container.find(name),
            None => {
                let text = digest.to_string();
                let (algorithm, hex) = text.split_once(':').unwrap_or_default();
                self.container.find(&format!("blobs/{algorithm}/{hex}"))
            }
        }
    }
}

/// What comes after the last colon: the tag of a name that has one.
fn last_part(name: &str) -> &str {
    name.rsplit_once(':').map_or(name, |(_, tag)| tag)
}

/// Whether a name says which repository it is of, and is not only a tag.
fn is_whole(name: &str) -> bool {
    name.contains(['/', ':', '@'])
}

fn entries(index: &[u8]) -> Result<Vec<Entry>, String> {
    let index: RawIndex = serde_json::from_slice(index)
        .map_err(|error| format!("its index.json is not understood: {error}"))?;
    if index.manifests.len() > MAX_ENTRIES {
        return Err(format!("it has more than {MAX_ENTRIES} manifests"));
    }
    let mut entries = Vec::new();
    for raw in index.manifests {
        let other_platform = raw
            .platform
            .is_some_and(|platform| platform.os != OS || platform.architecture != ARCHITECTURE);
        if other_platform {
            continue;
        }
        let digest = Digest::parse(&raw.digest)
            .ok_or_else(|| format!("its index.json holds a digest that is none: {:?}", raw.digest))?;
        let mut annotations = raw.annotations.unwrap_or_default();
        entries.push(Entry {
            name: annotations
                .remove(CONTAINERD_NAME)
                .or_else(|| annotations.remove(REF_NAME)),
            digest,
            media_type: raw.media_type,
        });
    }
    Ok(entries)
}

impl Imported {
    /// What is asked for in words, for errors.
    pub(crate) fn describe(&self, document: Document<'_>) -> String {
        match document {
            Document::Manifest(version) => format!("manifest {version} in {}", self.layout.source),
            Document::Blob(digest) => format!("blob {digest} in {}", self.layout.source),
        }
    }

    /// A whole document of at most `cap` bytes, and its media type as far as the archive says it.
    pub(crate) async fn document(
        &self,
        document: Document<'_>,
        cap: u64,
    ) -> Result<(Vec<u8>, String), RegistryError> {
        let tried = self.describe(document);
        let absent = || RegistryError::new(ErrorKind::NotFound, self.describe(document), "it is not there");
        let (digest, media_type) = match document {
            Document::Manifest(version) => self.lookup(version).ok_or_else(absent)?,
            Document::Blob(digest) => (digest.clone(), String::new()),
        };
        if let Some((bytes, media_type)) = self.layout.made.get(&digest) {
            return Ok((bytes.clone(), media_type.clone()));
        }
        let layout = self.layout.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let Some(section) = layout.blob(&digest)? else {
                return Ok(None);
            };
            section.read_all(cap).map(Some)
        });
        let failed = |reason| RegistryError::new(ErrorKind::Internal, tried.as_str(), reason);
        match reading.await {
            Ok(Ok(Some(bytes))) => Ok((bytes, media_type)),
            Ok(Ok(None)) => Err(absent()),
            Ok(Err(error)) => Err(failed("it cannot be read").because(error)),
            Err(_) => Err(failed("reading it was interrupted")),
        }
    }

    /// A blob from `offset` on.
    pub(crate) fn blob(&self, digest: &Digest, offset: u64) -> Result<BlobStream, RegistryError> {
        let tried = self.describe(Document::Blob(digest));
        match self.layout.blob(digest) {
            Ok(Some(section)) => Ok(BlobStream::local(section.from(offset), offset, tried)),
            Ok(None) => Err(RegistryError::new(ErrorKind::NotFound, tried, "it is not there")),
            Err(error) => {
                Err(RegistryError::new(ErrorKind::Internal, tried, "it cannot be opened").because(error))
            }
        }
    }

    /// What a tag or digest is here.
    fn lookup(&self, version: &str) -> Option<(Digest, String)> {
        let target = if version == self.version {
            Some(self.target.clone())
        } else {
            Digest::parse(version)
        };
        match target {
            Some(digest) => {
                let known = self.layout.entries.iter().find(|entry| entry.digest == digest);
                Some((
                    digest,
                    known.map_or_else(String::new, |entry| entry.media_type.clone()),
                ))
            }
            None => {
                let named = |entry: &&Entry| entry.name.as_deref().map(last_part) == Some(version);
                let entry = self.layout.entries.iter().find(named)?;
                Some((entry.digest.clone(), entry.media_type.clone()))
            }
        }
    }
}

impl fmt::Debug for Imported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Imported")
            .field("source", &self.layout.source)
            .field("target", &self.target)
            .finish_non_exhaustive()
    }
}
